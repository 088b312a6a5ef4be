"""Finding the samples of the next step while the GPU is busy with this one.

How many samples a step has decides how long its lists are, so the CPU has to know it, and asking would make it wait
until the GPU has done everything before. So a step's views are prepared at the end of the step before, ahead of its
backward pass, with the parameters and the occupancy as they are then; that decides only which samples count. Nothing
has to be taken back: what is random in a step follows from its number.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

import torch

from ..rendering import PrefetchedSamples, View, prefetch_samples
from ..scene import Scene
from ..supervision import Views

SPARE = 1.05
"""Capacity for samples: so many times the most that cameras like these had in the latest steps. Where that is too
small, the step finds its samples itself and waits for the GPU."""
REMEMBERED = 16
"""Steps."""


class Prefetch:
    """Finds samples ahead of a step, if `enabled`; `half`: looks at the scene in half precision, as the step will."""

    def __init__(self, scene: Scene, half: bool, enabled: bool) -> None:
        self._scene, self._half, self.enabled = scene, half, enabled
        self._begun: tuple[Views, tuple[PrefetchedSamples, ...]] | None = None
        self._densest: dict[int, deque[float]] = {}  # intervals in relation to the views' sizes, by the views' order

    def begin(self, views: Views) -> None:
        """Begin to find the samples of the next step's views."""
        with torch.autocast(self._scene.device.type, torch.float16, enabled=self._half):
            found = []
            for number, view in enumerate(views.values()):
                latest = self._densest.get(number)  # None in the first step, which waits for the GPU
                capacity = math.ceil(SPARE * max(latest) * _size(view)) if latest else None
                found.append(prefetch_samples(self._scene, view, capacity))
        self._begun = views, tuple(found)

    def take(self) -> Views | None:
        """The views that were begun ahead, with their samples where they are known; None where none were."""
        if self._begun is None:
            return None
        (views, found), self._begun = self._begun, None
        complete = {}
        for number, ((key, view), ahead) in enumerate(zip(views.items(), found, strict=True)):
            samples, n_found = ahead.take()
            if n_found < 0:
                self.enabled = False  # it wouldn't be known the next time either
            else:
                self._densest.setdefault(number, deque(maxlen=REMEMBERED)).append(n_found / _size(view))
            complete[key] = replace(view, samples=samples)
        return complete


def _size(view: View) -> float:
    """To which the number of samples is about proportional."""
    return len(view.rays.origins) * view.apparent_area
