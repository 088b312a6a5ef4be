"""Takes that are longer than a prior's: it sees them through windows of time that overlap.

A take is noised whole, and then cut, so windows share the noise where they overlap. Each window is denoised with its
own conditions, and the x0 of what lies in several is their weighted mean: MultiDiffusion (2302.08113) along time, as in
Gen-L-Video (2305.18264). A walk of several steps is blended at each of them.

Letters and shapes as in denoiser.py: a take has F frames, f of them encoded; a window W and w. Where an autoencoder
puts frames together, its latents are cut: F = 1 + step (f - 1) and W = 1 + step (w - 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..cameras import CameraBatch
from ..transfers import send
from .denoiser import Conditions, Denoiser
from .distillation import Guidance
from .execution import Execution
from .noise import NoiseSchedule


@dataclass(frozen=True)
class Windows:
    """How a take is cut."""

    n_frames: int  # of the take, F
    window: int  # frames that the prior sees at once, W
    frame_step: int = 1  # frames that its autoencoder puts into one, after the first
    overlap: float = 0.25  # share of a window that neighbours have in common: rounded, and at the least

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= 0.75:  # of more than that, most would be seen four times and oftener
            raise ValueError(f"the overlap is a share of a window and must lie in [0, 0.75], got {self.overlap}")
        if self.window < 2 or self.frame_step < 1 or (self.window - 1) % self.frame_step:
            raise ValueError(
                f"a window of {self.window} frames is none that a model of videos sees: 2 or more are, and a multiple "
                f"of {self.frame_step} and one"
            )
        if self.n_frames < self.window:
            raise ValueError(
                f"{self.n_frames} frames are fewer than the {self.window} that the model sees at once: ask for "
                f"{self.window} or more"
            )
        beyond = (self.n_frames - self.window) % self.frame_step
        if beyond:
            below = self.n_frames - beyond
            raise ValueError(
                f"the model puts {self.frame_step} frames into one, and takes of a multiple of {self.frame_step} and "
                f"one are seen whole: ask for {below} or {below + self.frame_step} frames, not {self.n_frames}"
            )

    @property
    def length(self) -> float:
        """Of the take, in those that the prior makes: frames are as far apart in time as in these."""
        return (self.n_frames - 1) / (self.window - 1)

    @property
    def n_encoded(self) -> int:
        """Encoded frames of the take, f."""
        return 1 + (self.n_frames - 1) // self.frame_step

    @property
    def size(self) -> int:
        """Encoded frames of a window, w."""
        return 1 + (self.window - 1) // self.frame_step

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the windows begin, in encoded frames: evenly, the last one ends with the take."""
        spare = self.n_encoded - self.size
        if spare == 0:
            return (0,)
        shared = min(max(1, round(self.overlap * self.size)), self.size - 1) if self.overlap else 0
        n = math.ceil(spare / (self.size - shared)) + 1
        return tuple(round(i * spare / (n - 1)) for i in range(n))

    def weights(self) -> Tensor:
        """How much each window says of each encoded frame, [n, f]; they sum to 1 over the windows.

        Less towards a window's ends, in even steps: from one to the next the change is smooth.
        """
        place = torch.arange(self.size)
        hat = torch.minimum(place, place.flip(0)) + 1.0
        spread = torch.zeros(len(self.starts), self.n_encoded)
        for row, start in zip(spread, self.starts, strict=True):
            row[start : start + self.size] = hat
        return spread / spread.sum(0)

    def cut(self, cameras: CameraBatch) -> CameraBatch:
        """The windows of cameras [B, F] as groups of their own, [B * n, W]: first all of the first group.

        Their times are in lengths of a prior's take, so that the first window sees about 0 to 1. A prior that is told
        times thus knows how far it is from the beginning.
        """
        if cameras.shape[1] != self.n_frames:
            raise ValueError(f"takes of {self.n_frames} frames are cut into windows, got {cameras.shape[1]}")
        parts = cameras.windows([start * self.frame_step for start in self.starts], self.window)
        return parts.at_time(parts.time * self.length)

    def describe(self) -> str:
        """The cut in words."""
        n, lengths = len(self.starts), f"{self.length:.1f} times as long as the model's own"
        return f"takes of {self.n_frames} frames, {lengths}, seen through {n} windows of {self.window} that overlap"


@dataclass(frozen=True, eq=False)
class WindowedDenoiser:
    """A denoiser of takes that are longer than its model's.

    It asks the model for one window after the other, so the memory is that of one. What it is told, `conditions`, are
    those of B takes times n windows, as `Windows.cut` orders them.
    """

    model: Denoiser
    windows: Windows

    @property
    def image_size(self) -> tuple[int, int]:
        """The model's."""
        return self.model.image_size

    @property
    def n_frames(self) -> int:
        """Of the takes."""
        return self.windows.n_frames

    @property
    def noise(self) -> NoiseSchedule:
        """The model's."""
        return self.model.noise

    @property
    def images_apart(self) -> bool:
        """The model's."""
        return self.model.images_apart

    def encode(self, images: Tensor, carried: Tensor | None = None) -> Tensor:
        """Encode whole takes [B, F, 3, H, W] to [B, f, c, h, w]; differentiable. `carried`: see Denoiser.encode."""
        return self.model.encode(images, carried)

    def decode(self, z: Tensor) -> Tensor:
        """Decode whole takes."""
        return self.model.decode(z)

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Predict z of whole takes from x = z + sigma * eps, [B, f, c, h, w]; sigma [B], conditions of B * n groups."""
        windows = self.windows
        if x.shape[1] != windows.n_encoded:
            raise ValueError(
                f"{windows.n_frames} frames were encoded to {x.shape[1]}, not {windows.n_encoded}: the model's "
                f"autoencoder doesn't put {windows.frame_step} frames into one, so its takes can't be made longer"
            )
        weights, x0 = send(windows.weights(), x.device), torch.zeros_like(x)
        for k, start in enumerate(windows.starts):
            seen = slice(start, start + windows.size)
            part = self.model.denoise(x[:, seen], sigma, _every(conditions, k, len(windows.starts)))
            x0[:, seen] += weights[k, seen, None, None, None] * part
        return x0

    def run_as(self, execution: Execution) -> WindowedDenoiser:
        """The same of the model run in this way."""
        return replace(self, model=self.model.run_as(execution))

    def forget(self) -> None:
        """Let the model forget."""
        self.model.forget()


def _every(conditions: Conditions, first: int, n: int) -> Conditions:
    """The conditions of every n-th group from the first on."""
    given = {f.name: getattr(conditions, f.name) for f in fields(Conditions)}
    return Conditions(**{name: value[first::n] for name, value in given.items() if value is not None})


def windowed(guidance: Guidance, windows: Windows) -> Guidance:
    """Return the guidance of takes that are longer than the prior's; one of single images has no takes, and stays."""
    if guidance.denoiser.n_frames is None:
        return guidance
    return replace(
        guidance,
        denoiser=WindowedDenoiser(guidance.denoiser, windows),
        conditions=lambda cameras: guidance.conditions(windows.cut(cameras)),
        perp_neg=None,  # is for single images
    )
