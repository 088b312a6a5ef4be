"""Networks of the full-size kinds, small and in double precision."""

from __future__ import annotations

import torch

from dream4d_engine.guidance.denoiser import Conditions
from dream4d_engine.guidance.noise import variance_preserving
from dream4d_engine.priors import architectures
from dream4d_engine.priors.networks.denoisers import UNetDenoiser

CPU = torch.device("cpu")
SMALL_UNET = {"sample_size": 8, "block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 16}
SMALL_VAE = {**architectures._SD_VAE, "block_out_channels": (32, 32, 64, 64)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    """Double precision: networks of random weights make thousands of times more of a rounding error."""
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def video_denoiser(unet, vae, **changes):
    noise = variance_preserving(torch.linspace(0.999, 0.01, 50))
    return UNetDenoiser(unet, noise, "epsilon", (32, 64), 4, vae, **changes)


def tokens_for(cameras):
    table = randn(2, 5, 16).to(cameras.time.device)
    return tuple(Conditions(row.expand(*cameras.shape, -1, -1)) for row in table)
