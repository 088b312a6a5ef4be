"""Finding the samples of the next step while the GPU is busy with this one.

How many samples a step has decides how long its lists are, so the CPU has to know it, and asking would make it wait
until the GPU has done everything before. So a step's views are prepared at the end of the step before, ahead of its
backward pass, with the parameters as they are then; that decides only which samples are too transparent to count.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..rendering import SamplesAhead, View, find_samples_ahead
from ..scene import Scene

Views = tuple[View, ...]
Start = Callable[[], Views]
"""Draws what is random at the beginning of a step and returns its views; may bring the occupancy grid up to date."""

SPARE = 1.05
"""Room for samples: so many times the most that cameras like these had in the latest steps. Where that is too small,
the step finds its samples itself and waits for the GPU."""
REMEMBERED = 16
"""Steps."""


@dataclass(frozen=True)
class _Begun:
    """The beginning of a step, and what there was before it."""

    views: Views
    found: tuple[SamplesAhead, ...]
    generator: Tensor
    occupancy: dict[str, Tensor]


class LookAhead:
    """Begins steps before their time, if `enabled`; `half`: looks at the scene in half precision, as the step will."""

    def __init__(self, scene: Scene, generator: torch.Generator, half: bool, enabled: bool) -> None:
        self._scene, self._generator, self._half, self._enabled = scene, generator, half, enabled
        self._begun: _Begun | None = None
        self._densest: dict[int, deque[float]] = {}  # intervals in relation to the views' sizes, by number

    def views(self, start: Start) -> Views:
        """Return the views of a step: those begun ahead, or else begun now."""
        if self._begun is None:
            return start()
        begun, self._begun = self._begun, None
        return tuple(self._complete(n, *pair) for n, pair in enumerate(zip(begun.views, begun.found, strict=True)))

    def begin(self, start: Start) -> None:
        """Begin the next step."""
        if not self._enabled:
            return
        occupancy = {name: value.clone() for name, value in self._scene.occupancy.state_dict().items()}
        state, views = self._generator.get_state(), start()
        with torch.autocast(self._scene.device.type, torch.float16, enabled=self._half):
            found = tuple(find_samples_ahead(self._scene, v, self._room(n, v)) for n, v in enumerate(views))
        self._begun = _Begun(views, found, state, occupancy)

    def undo(self) -> None:
        """Put back what beginning the next step has changed, so that the scene and the generator can be saved."""
        if self._begun is not None:
            self._generator.set_state(self._begun.generator)
            self._scene.occupancy.load_state_dict(self._begun.occupancy)
            self._begun = None

    def _room(self, number: int, view: View) -> int | None:
        latest = self._densest.get(number)
        return math.ceil(SPARE * max(latest) * _size(view)) if latest else None

    def _complete(self, number: int, view: View, found: SamplesAhead) -> View:
        samples, n_found = found.take()
        if n_found < 0:
            self._enabled = False  # it wouldn't be known the next time either
        else:
            self._densest.setdefault(number, deque(maxlen=REMEMBERED)).append(n_found / _size(view))
        return replace(view, samples=samples)


def _size(view: View) -> float:
    """To which the number of samples is about proportional."""
    return len(view.rays.origins) * view.apparent_area
