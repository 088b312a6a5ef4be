"""The exact denoiser of a finite bank: what a diffusion model would be that knew the bank and nothing else.

With the bank's members v_i equally likely and x = z + sigma * eps, the posterior mean of z is
sum_i w_i v_i with w = softmax(-|x - v_i|^2 / (2 sigma^2)). It separates what distillation does from what a trained
prior knows. Pixel space: z = 2 * image - 1. A member is a whole group of F views or frames.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..guidance.denoiser import Conditions
from ..guidance.execution import Execution
from ..guidance.noise import variance_preserving


def latent_diffusion_alphas_bar(n_timesteps: int = 1000, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """Return the [T] diffusion products of the scaled-linear schedule that latent diffusion models train with."""
    betas = torch.linspace(first**0.5, last**0.5, n_timesteps, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


class IdealDenoiser:
    """The posterior mean over a bank, as a `Denoiser`.

    Args:
        bank: [N, F, 3, H, W] true images (F = 1), groups of views or videos in [0, 1]. With F = 1 the images of
            a group are denoised independently.
        alphas_bar: [T]; the schedule of latent diffusion models if None.
        allowed: from Conditions of B groups to [B, N] bool, the members that the conditions leave possible (at
            least one each); None ignores the conditions.
    """

    def __init__(
        self,
        bank: Tensor,
        alphas_bar: Tensor | None = None,
        allowed: Callable[[Conditions], Tensor] | None = None,
    ) -> None:
        if bank.ndim != 5 or bank.shape[2] != 3 or not len(bank):
            raise ValueError(f"the bank must be [N, F, 3, H, W] with N at least 1, got {tuple(bank.shape)}")
        self.bank = bank
        self.noise = variance_preserving(latent_diffusion_alphas_bar() if alphas_bar is None else alphas_bar)
        self.allowed = allowed
        self.image_size = (bank.shape[3], bank.shape[4])
        self.n_frames = bank.shape[1] if bank.shape[1] > 1 else None

    images_apart = True

    def encode(self, images: Tensor, carried: Tensor | None = None) -> Tensor:
        """Encode [B, F, 3, H, W] in [0, 1] to z in [-1, 1]."""
        return 2 * images - 1

    def decode(self, z: Tensor) -> Tensor:
        """Decode z to images in [0, 1] (not clamped)."""
        return (z + 1) / 2

    @torch.no_grad()
    def weights(self, x: Tensor, sigma: Tensor, conditions: Conditions | None = None) -> Tensor:
        """Return [B, N] posterior probabilities of the bank's members given x [B, F, 3, H, W] and sigma [B]."""
        if x.shape[1:] != self.bank.shape[1:]:
            raise ValueError(f"groups must be {tuple(self.bank.shape[1:])} as in the bank, got {tuple(x.shape[1:])}")
        # -|x - v|^2 / 2 without |x|^2, which all members share; in float64, since sigma^2 may be tiny
        members = self.encode(self.bank.to(x.device, torch.float64)).flatten(1)
        score = x.double().flatten(1) @ members.T - members.square().sum(1) / 2
        if self.allowed is not None and conditions is not None:
            score = score.masked_fill(~self.allowed(conditions).to(x.device), -torch.inf)
        # the best member's score is made 0 before the division, so that sigma -> 0 gives the nearest, not NaN
        score = score - score.amax(1, keepdim=True)
        return (score / sigma.double().clamp(min=1e-12)[:, None] ** 2).softmax(1)

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions | None = None) -> Tensor:
        """Return the posterior mean of z, shaped like x [B, F, 3, H, W]; sigma [B]."""
        n_frames = x.shape[1]
        if self.n_frames is None and n_frames > 1:
            if self.allowed is not None:
                raise ValueError(f"with `allowed`, a bank of single images takes groups of 1 image, got {n_frames}")
            each = self.denoise(x.flatten(0, 1)[:, None], sigma.repeat_interleave(n_frames))
            return each.reshape(x.shape)
        weights = self.weights(x, sigma, conditions)
        mean = weights @ self.encode(self.bank.to(x.device, torch.float64)).flatten(1)
        return mean.reshape(x.shape).to(x.dtype)

    def run_as(self, execution: Execution) -> IdealDenoiser:
        """Return itself: there is one way to look through a bank."""
        return self

    def forget(self) -> None:
        """Nothing refers to where its members lie."""
