"""The record of a supervision: a view to render, and a loss on the rendering."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

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
    """What a supervision thinks of a rendering.

    Args:
        losses: weighted scalars by name, with gradient; the loop minimises the sum of all and reports each.
        notes: further scalars for people to read, detached.
    """

    losses: dict[str, Tensor]
    notes: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Supervision:
    """Something that looks at a scene in training.

    Args:
        view: what it looks at. loss: (scene, rendering of the view, view, progress, draws) -> what it thinks of it.
    """

    name: str
    view: ViewFunction
    loss: Callable[[Scene, RenderOutput, View, float, Draw], Terms]


def views_of(supervisions: Sequence[Supervision], scene: Scene, progress: float, draw: Draw) -> Views:
    """Return what a step looks at, each view once however many look at it."""
    return {view: view(scene, progress, draw) for view in dict.fromkeys(one.view for one in supervisions)}


def supervise(supervisions: Sequence[Supervision], scene: Scene, views: Views, progress: float, draw: Draw) -> Terms:
    """Render each view once, when the first supervision asks for it, and gather what all think of it."""
    outputs, losses, notes = {}, {}, {}
    for one in supervisions:
        if one.view not in outputs:
            outputs[one.view] = render_view(scene, views[one.view])
        found = one.loss(scene, outputs[one.view], views[one.view], progress, draw)
        losses |= found.losses
        notes |= found.notes
    return Terms(losses, notes)
