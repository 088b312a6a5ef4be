"""What supervisions look at: cameras drawn for a step, before a background that may be drawn, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cameras import CameraBatch
from ..randomness import Draw
from ..rendering import RenderOptions, View, prepare_view
from ..scene import Scene
from ..transfers import send
from .record import ViewFunction


@dataclass(frozen=True)
class RandomBackground:
    """Of a step, the whole batch may be seen before one random colour."""

    probability: float = 0.5  # of a random colour instead of the scene's own background
    low: float = 0.0  # bounds of red, green and blue
    high: float = 1.0
    grey: bool = False  # one number for red, green and blue


def draw_background(config: RandomBackground, generator: torch.Generator, device: torch.device) -> Tensor | None:
    """Return a random colour [3] for the whole batch, or None to keep the scene's own background."""
    # both in any case, so that the colour doesn't depend on the probability
    coin, color = torch.rand((), generator=generator), torch.rand(3, generator=generator)
    if coin >= config.probability:
        return None
    if config.grey:
        color = color[:1].expand(3)
    return send(config.low + (config.high - config.low) * color, device)


def training_view(
    cameras: Callable[[float, Draw], CameraBatch],
    options: Callable[[float], RenderOptions],
    background: RandomBackground,
) -> ViewFunction:
    """Return what draws the cameras [B, F] of a step, their rays and the background. `options`: by progress."""

    def view(scene: Scene, progress: float, draw: Draw) -> View:
        seen_by = cameras(progress, draw)
        # one colour for all groups, and so in all processes
        color = draw_background(background, draw.for_("background"), scene.device)
        rays = draw.groups("rays", seen_by.shape[0])
        return prepare_view(scene, seen_by, replace(options(progress), stratified=True, background=color), rays)

    return view
