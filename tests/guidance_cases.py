"""What the recorded guidance is compared with: its cameras, tokens and a denoiser."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dream4d_engine.cameras import CameraBatch, make_cameras
from dream4d_engine.guidance.denoiser import Conditions
from dream4d_engine.guidance.distillation import DistillationConfig
from dream4d_engine.guidance.noise import NoiseSchedule, sigma_of_alpha_bar, variance_preserving
from dream4d_engine.schedules import constant


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def tokens_of(golden: dict[str, Tensor], table: str) -> Tensor:
    return golden[f"{table}_embeddings.side_front_back_overhead"]


def cameras_of(golden: dict[str, Tensor]) -> CameraBatch:
    azimuth, elevation = (torch.deg2rad(golden[f"{a}_deg"])[None] for a in ("azimuth", "elevation"))
    return make_cameras(azimuth, elevation, golden["distance"][None], 0.5, 0.0, 8, 8)


def plain(scale: float, **changes) -> DistillationConfig:
    return replace(DistillationConfig(scale, constant(0.02), constant(0.98)), **changes)


@dataclass(frozen=True, eq=False)
class EpsDenoiser:
    """A diffusers UNet on single images; `swap` gives the last conditions other images to look at."""

    unet: object
    alphas_bar: Tensor
    image_size: tuple[int, int] = (8, 8)
    n_frames: int | None = None
    swap: Tensor | None = None

    @property
    def noise(self) -> NoiseSchedule:
        return variance_preserving(self.alphas_bar)

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        table = sigma_of_alpha_bar(self.alphas_bar)
        timestep = (table[None] - sigma[:, None]).abs().argmin(1)
        noisy = (x / (1 + sigma**2).sqrt()[:, None, None, None, None]).flatten(0, 1)
        if self.swap is not None:
            n = self.swap.shape[0]
            noisy[-n:] = noisy[:-n][self.swap]
        eps = self.unet(noisy, timestep, conditions.tokens.flatten(0, 1)).sample.reshape(x.shape)
        return x - sigma[:, None, None, None, None] * eps
