"""What the method needs to know of a diffusion model.

Letters: z is an encoded picture, sigma the noise level, x = z + sigma * eps the noisy one (variance exploding
scale), x0 the model's guess of z. With alpha_bar the usual diffusion product, sigma = sqrt((1 - alpha_bar) /
alpha_bar), and the variance preserving x_t of the papers is x / sqrt(1 + sigma^2). Since
eps_hat - eps = (z - x0) / sigma, every formula of score distillation can be written with x0 alone, whatever the
model predicts.

Shapes: pictures [B, F, 3, H, W] in [0, 1]; encoded ones [B, F, c, h, w]; sigma [B].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditions:
    """What a denoiser is told about each of B x F pictures.

    Args:
        tokens: [B, F, L, D] what the cross-attention reads (text or image tokens).
        vector: [B, F, K] what is added to the time embedding (a camera, a frame's time), or None.
        concat: [B, F, c, h, w] extra input channels, or None.
    """

    tokens: Tensor
    vector: Tensor | None = None
    concat: Tensor | None = None


class Denoiser(Protocol):
    """A frozen diffusion model, seen as a function from noisy to clean."""

    image_size: tuple[int, int]
    """(height, width) in pixels of the pictures that `encode` takes."""
    n_frames: int | None
    """How many views or frames belong together in one group; None where pictures are independent."""
    alphas_bar: Tensor
    """[T] cumulative products of the training schedule, timestep 0 first."""

    def encode(self, pictures: Tensor) -> Tensor:
        """Encode [B, F, 3, H, W] in [0, 1]; differentiable."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Decode to [B, F, 3, H, W] in [0, 1] (not clamped)."""
        ...

    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Predict the clean z from x = z + sigma * eps; no gradient. sigma [B]."""
        ...


def sigma_of_alpha_bar(alpha_bar: Tensor) -> Tensor:
    """Return the noise level of a diffusion product."""
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def alpha_bar_of_sigma(sigma: Tensor) -> Tensor:
    """Return the diffusion product of a noise level."""
    return 1 / (1 + sigma**2)


def timestep_of_sigma(sigma: Tensor, alphas_bar: Tensor) -> Tensor:
    """Return the integer timestep [B] whose noise level is nearest to sigma [B], in log sigma."""
    table = sigma_of_alpha_bar(alphas_bar.float()).log()
    distance = (sigma.float().log()[:, None] - table[None]).abs()
    return distance.argmin(1)


def stack_conditions(conditions: Sequence[Conditions]) -> Conditions:
    """Concatenate along the groups B, so that one forward pass serves several conditions."""
    columns = {f.name: [getattr(c, f.name) for c in conditions] for f in fields(Conditions)}
    missing = {name for name, values in columns.items() if any(v is None for v in values)}
    for name in missing:
        if any(v is not None for v in columns[name]):
            raise ValueError(f"conditions disagree: some have {name!r}, some have not")
    return Conditions(**{name: None if name in missing else torch.cat(values) for name, values in columns.items()})


def split_conditions(conditions: Conditions, groups_at_once: int) -> Sequence[Conditions]:
    """Undo `stack_conditions`: pieces of so many groups, in order."""
    columns = {f.name: getattr(conditions, f.name) for f in fields(Conditions)}
    given = {name: value.split(groups_at_once) for name, value in columns.items() if value is not None}
    return [Conditions(**dict(zip(given, piece, strict=True))) for piece in zip(*given.values(), strict=True)]


def denoise_each(denoiser: Denoiser, x: Tensor, sigma: Tensor, conditions: Sequence[Conditions]) -> tuple[Tensor, ...]:
    """Return the prediction x0 under each of the conditions, computed in one batch."""
    n = len(conditions)
    x0 = denoiser.denoise(x.repeat(n, 1, 1, 1, 1), sigma.repeat(n), stack_conditions(conditions))
    return x0.chunk(n)
