"""Supervision by a diffusion prior: score distillation (see guidance/distillation.py)."""

from __future__ import annotations

from ..guidance.distillation import Guidance, distill
from ..randomness import Draw
from ..rendering import RenderOutput, View
from ..scene import Scene
from .record import Supervision, Terms, ViewFunction


def distillation(name: str, weight: float, guidance: Guidance, view: ViewFunction) -> Supervision:
    """Return the supervision of a prior, told by `guidance` what to look for. `name`: of its terms."""

    def loss(scene: Scene, output: RenderOutput, view: View, progress: float, draw: Draw) -> Terms:
        found = distill(guidance, output.rgb.movedim(-1, 2), view.cameras, progress, draw, view.carried)
        return Terms({name: weight * found.loss}, {f"{name}.{part}": value for part, value in found.terms.items()})

    return Supervision(name, view, loss)
