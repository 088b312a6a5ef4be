"""How a diffusion model's noise levels are ordered: by shares of its training schedule, from 0 (least) to 1 (most).

Letters as in denoiser.py: x = z + sigma * eps. A model that predicts eps, v or z was trained at T timesteps with the
diffusion products alpha_bar, sigma = sqrt((1 - alpha_bar) / alpha_bar). A rectified flow (2209.03003) sees
z_t = (1 - t) z + t eps = x / (1 + sigma) with t = sigma / (1 + sigma), at any t. A model of EDM (2206.00364) was
trained at any sigma between two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

LAST_FLOW_TIME = 0.999
"""At t = 1 a flow's image is noise alone: there is no sigma."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise levels of a model."""

    sigma_of: Callable[[Tensor], Tensor]  # share -> sigma, of the same shape
    share_of: Callable[[Tensor], Tensor]  # its inverse, the nearest level of a model that has T
    weight: Callable[[Tensor], Tensor]  # sigma -> what score distillation multiplies (eps_hat - eps) with
    sigmas: Tensor | None = None  # [T], the levels of its training, the lowest first; None: it knows all between

    @property
    def n_levels(self) -> int | None:
        """T, or None."""
        return None if self.sigmas is None else len(self.sigmas)

    @property
    def alphas_bar(self) -> Tensor:
        """[T], the diffusion products of the levels. Raises a ValueError where there are none."""
        if self.sigmas is None:
            raise ValueError("a flow has no diffusion products")
        return 1 / (1 + self.sigmas**2)


def sigma_of_alpha_bar(alpha_bar: Tensor) -> Tensor:
    """Return the noise level of a diffusion product."""
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def variance_preserving(alphas_bar: Tensor) -> NoiseSchedule:
    """Return the schedule of a model that was trained with these products [T], timestep 0 first."""
    sigmas = sigma_of_alpha_bar(alphas_bar.detach().float().cpu())
    n = len(sigmas)  # T: a share is timestep / T

    @lru_cache(maxsize=8)
    def on(device: torch.device) -> tuple[Tensor, Tensor]:
        return sigmas.to(device), sigmas.log().to(device)

    def sigma_of(share: Tensor) -> Tensor:
        return on(share.device)[0][(share * n).round().long().clamp(0, n - 1)]

    def share_of(sigma: Tensor) -> Tensor:
        distance = (sigma.float().log()[..., None] - on(sigma.device)[1]).abs()
        return distance.argmin(-1) / n

    # the weight is 1 - alpha_bar: DreamFusion 2209.14988, equation 3
    return NoiseSchedule(sigma_of, share_of, lambda sigma: sigma**2 / (1 + sigma**2), sigmas)


def rectified_flow(shift: float = 1.0) -> NoiseSchedule:
    """Return the schedule of a rectified flow whose times were moved towards noise; a share is a time before that."""

    def sigma_of(share: Tensor) -> Tensor:
        # t = shift u / (1 + (shift - 1) u), 2403.03206, section 5.3.2
        time = (shift * share / (1 + (shift - 1) * share)).clamp(0, LAST_FLOW_TIME)
        return (time / (1 - time)).float()

    def share_of(sigma: Tensor) -> Tensor:
        time = sigma / (1 + sigma)
        return time / (shift - (shift - 1) * time)

    # the weight makes the gradient on z that of the velocity, v_hat - (eps - z): RFDS 2406.03293, equation 8
    return NoiseSchedule(sigma_of, share_of, lambda sigma: 1 + sigma)


def log_spaced(lowest: float, highest: float) -> NoiseSchedule:
    """Return the schedule of a model of EDM (2206.00364) between two sigmas; a share is a place of their logarithms."""
    if not 0 < lowest < highest:
        raise ValueError(f"noise levels must keep to 0 < lowest < highest, got {lowest:g} and {highest:g}")
    start, span = math.log(lowest), math.log(highest / lowest)

    def sigma_of(share: Tensor) -> Tensor:
        return (start + span * share).exp().float()

    def share_of(sigma: Tensor) -> Tensor:
        return (sigma.log() - start) / span

    # the weight of a model of T levels at the same sigma
    return NoiseSchedule(sigma_of, share_of, lambda sigma: sigma**2 / (1 + sigma**2))
