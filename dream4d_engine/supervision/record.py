"""The record of a supervision: a view to render, and a loss on the rendering."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..division import WHOLE, Division
from ..randomness import Draw
from ..rendering import RenderOutput, View, render_view
from ..scene import Scene

ViewFunction = Callable[[Scene, float, Draw], View]
"""(scene, progress in [0, 1), the step's draws) -> what is to be rendered. Supervisions that share one share its
rendering."""
Views = Mapping[ViewFunction, View]
"""What one step looks at."""


@dataclass(frozen=True)
class Terms:
    """What a supervision thinks of a rendering: scalars by name."""

    # weighted, with gradient; the loop minimises the sum of all and reports each. Of a step that is divided among
    # processes each has the whole: by the view's images, else the term asks for the division's `once`.
    losses: dict[str, Tensor]
    notes: dict[str, Tensor] = field(default_factory=dict)  # for people to read, detached


@dataclass(frozen=True)
class Supervision:
    """Something that looks at a scene in training."""

    name: str
    view: ViewFunction  # what it looks at
    loss: Callable[[Scene, RenderOutput, View, float, Draw], Terms]  # (.., its rendering, .., progress, ..) -> opinion


def needed(image: Tensor | None, what: str) -> Tensor:
    """Return an image that a term looks at; refuse to go on without it."""
    if image is None:
        raise ValueError(f"a term of the loss needs {what}, and there is none")
    return image


def views_of(
    supervisions: Sequence[Supervision], scene: Scene, progress: float, draw: Draw, division: Division = WHOLE
) -> Views:
    """Return what a step looks at, each view once however many look at it; `division`: of its rendering."""
    wanted = dict.fromkeys(one.view for one in supervisions)
    return {view: replace(view(scene, progress, draw), division=division) for view in wanted}


def rendered(
    supervisions: Sequence[Supervision], scene: Scene, views: Views
) -> Iterator[tuple[Supervision, View, RenderOutput]]:
    """Yield each supervision with its view and the rendering of that."""
    outputs: dict[ViewFunction, RenderOutput] = {}
    for one in supervisions:
        # not before it is asked for: what a gradient keeps of it is memory that the priors before it need
        if one.view not in outputs:
            outputs[one.view] = render_view(scene, views[one.view])
        yield one, views[one.view], outputs[one.view]


def gather(found: Sequence[Terms]) -> Terms:
    """Return what all think in one; their names differ."""
    return Terms({k: v for t in found for k, v in t.losses.items()}, {k: v for t in found for k, v in t.notes.items()})
