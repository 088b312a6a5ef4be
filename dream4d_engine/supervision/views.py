"""What supervisions look at: cameras drawn for a step, before a background that may be drawn, too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cameras import CameraBatch
from ..randomness import Draw
from ..rendering import GradientFrames, RenderOptions, View, prepare_view
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


def with_gradient_in(view: View, at_most: int | None, source: Sequence[torch.Generator] | None) -> View:
    """Return the view with gradient through at most so many frames of each take, that follow each other.

    A take is cut into as few parts as that allows, of nearly one length, and one of them is drawn: each frame as often
    as any other. `at_most` None: all frames. `source`: a generator for each take; None: the first part, which is the
    longest, and takes most memory where an encoder hands features on to the frames after.
    """
    n_groups, n_frames = view.cameras.shape
    if at_most is None or at_most >= n_frames:
        return replace(view, gradient=None)
    n_parts = -(-n_frames // at_most)
    parts = torch.tensor_split(torch.arange(n_frames), n_parts)
    drawn = [0 if source is None else int(torch.randint(n_parts, (1,), generator=source[i])) for i in range(n_groups)]
    frames = torch.zeros(n_groups, n_frames, dtype=torch.bool)
    for row, part in zip(frames, drawn, strict=True):
        row[parts[part]] = True
    per_frame = len(view.rays.origins) // frames.numel()
    rays = send(frames.flatten().repeat_interleave(per_frame), view.rays.origins.device)
    return replace(view, gradient=GradientFrames(frames, rays, float(n_parts)))


def heaviest(view: View) -> View:
    """Return the view with gradient where a step takes most memory for it."""
    if view.gradient is None:
        return view
    n_frames = view.cameras.shape[1]
    return with_gradient_in(view, math.ceil(n_frames / view.gradient.factor), None)


def training_view(
    cameras: Callable[[float, Draw], CameraBatch],
    options: Callable[[float], RenderOptions],
    background: RandomBackground,
    gradient_frames: int | None = None,
) -> ViewFunction:
    """Return what draws the cameras [B, F] of a step, their rays and the background. `options`: by progress.

    `gradient_frames`: of each take, see `with_gradient_in`.
    """

    def view(scene: Scene, progress: float, draw: Draw) -> View:
        seen_by = cameras(progress, draw)
        # one colour for all groups, and so in all processes
        color = draw_background(background, draw.for_("background"), scene.device)
        rays = draw.groups("rays", seen_by.shape[0])
        seen = prepare_view(scene, seen_by, replace(options(progress), stratified=True, background=color), rays)
        return with_gradient_in(seen, gradient_frames, draw.groups("gradient frames", seen_by.shape[0]))

    return view
