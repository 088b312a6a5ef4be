"""What the method needs to know of a diffusion model.

Letters: z is an encoded image, sigma the noise level, x = z + sigma * eps the noisy one (variance exploding
scale), x0 the model's guess of z. With alpha_bar the usual diffusion product, sigma = sqrt((1 - alpha_bar) /
alpha_bar), and the variance preserving x_t of the papers is x / sqrt(1 + sigma^2). Since
eps_hat - eps = (z - x0) / sigma, every formula of score distillation can be written with x0 alone, whatever the
model predicts.

Shapes: images [B, F, 3, H, W] in [0, 1]; encoded ones [B, f, c, h, w] with f = F, or fewer where an autoencoder
compresses time; sigma [B].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from .execution import Execution
from .noise import NoiseSchedule


@dataclass(frozen=True)
class Conditions:
    """What a denoiser is told about each of B x F images."""

    tokens: Tensor  # [B, F, L, D] what the cross-attention reads (text or image tokens)
    vector: Tensor | None = None  # [B, F, K] what is added to the time embedding (a camera, a frame's time)
    concat: Tensor | None = None  # [B, F, c, h, w] extra input channels
    mask: Tensor | None = None  # [B, F, L], 1 where a token is one, 0 where it only fills up


class Denoiser(Protocol):
    """A frozen diffusion model, seen as a function from noisy to clean."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that `encode` takes."""

    @property
    def n_frames(self) -> int | None:
        """How many views or frames belong together in one group; None where images are independent."""

    @property
    def noise(self) -> NoiseSchedule:
        """The noise levels that it was trained on."""

    @property
    def images_apart(self) -> bool:
        """Whether `encode` and `decode` look at each image by itself, also where several belong together."""

    def encode(self, images: Tensor, carried: Tensor | None = None) -> Tensor:
        """Encode [B, F, 3, H, W] in [0, 1] to [B, f, c, h, w]; differentiable.

        `carried`: [B, F] bool, on the CPU, which images a gradient is asked for; None: all. The gradient on the others
        may be anything, and what only it needs may be left out.
        """
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Decode to [B, F, 3, H, W] in [0, 1] (not clamped)."""
        ...

    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Predict the clean z from x = z + sigma * eps; no gradient. sigma [B]."""
        ...

    def run_as(self, execution: Execution) -> Denoiser:
        """Return the same model run in this way, as far as it can be; memory and time change, nothing else."""
        ...

    def forget(self) -> None:
        """Be told that weights have moved: what refers to their old places (CUDA graphs) can't be used any more."""
        ...


def stack_conditions(conditions: Sequence[Conditions]) -> Conditions:
    """Concatenate along the groups B, so that one forward pass serves several conditions."""
    columns = {f.name: [getattr(c, f.name) for c in conditions] for f in fields(Conditions)}
    missing = {name for name, values in columns.items() if any(v is None for v in values)}
    for name in missing:
        if any(v is not None for v in columns[name]):
            raise ValueError(f"conditions disagree: some have {name!r}, some have not")
    return Conditions(**{name: torch.cat(values) for name, values in columns.items() if name not in missing})


def split_conditions(conditions: Conditions, groups: int | list[int]) -> Sequence[Conditions]:
    """Undo `stack_conditions`: pieces of so many groups, or of these numbers of groups, in order."""
    columns = {f.name: getattr(conditions, f.name) for f in fields(Conditions)}
    given = {name: value.split(groups) for name, value in columns.items() if value is not None}
    return [Conditions(**dict(zip(given, piece, strict=True))) for piece in zip(*given.values(), strict=True)]


def denoise_each(denoiser: Denoiser, x: Tensor, sigma: Tensor, conditions: Sequence[Conditions]) -> tuple[Tensor, ...]:
    """Return the prediction x0 under each of the conditions, computed in one batch."""
    n = len(conditions)
    x0 = denoiser.denoise(x.repeat(n, 1, 1, 1, 1), sigma.repeat(n), stack_conditions(conditions))
    return x0.chunk(n)
