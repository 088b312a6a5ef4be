"""Train a toy video prior that works on latents, and a full and a tiny autoencoder for it, to measure what the tiny one
does: `python -m dream4d_engine.toyworld.train_latent --out DIR`, then `measure --only autoencoders --latent DIR`.

Writes DIR/video (a diffusers folder with its AutoencoderKL) and DIR/tiny (an AutoencoderTiny for the same latents,
taught by the full one). They are not part of the package: the shipped toy priors work on pixels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .datasets import GREY, Bank, composite, render_bank
from .models import build_autoencoder, build_tiny_autoencoder
from .train import TRAININGS, learning_rate, scaled_latents, train

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKL, AutoencoderTiny

KL_WEIGHT = 1e-6
Log = Callable[[str], None]


def draw_images(bank: Bank, n: int, generator: torch.Generator) -> Tensor:
    """Draw single frames [n, 3, H, W] in [-1, 1], each over a grey of its own."""
    device = bank.rgba.device
    which = (torch.randint(size, (n,), generator=generator, device=device) for size in bank.rgba.shape[:2])
    grey = GREY[0] + (GREY[1] - GREY[0]) * torch.rand(n, generator=generator, device=device)
    return 2 * composite(bank.rgba[tuple(which)][:, None], grey)[:, 0] - 1


def train_autoencoder(bank: Bank, steps: int, batch: int, log: Log, seed: int = 0) -> AutoencoderKL:
    """Train the full autoencoder; its scaling factor brings the latents' deviation to 1."""
    torch.manual_seed(seed)
    vae = build_autoencoder().to(bank.rgba.device)  # type: ignore[arg-type]  # diffusers' decorator hides the types of `to`

    def loss(images: Tensor) -> Tensor:
        latents = vae.encode(images).latent_dist
        shown = vae.decode(latents.sample()).sample
        return functional.l1_loss(shown, images) + functional.mse_loss(shown, images) + KL_WEIGHT * latents.kl().mean()

    _descend(vae, loss, bank, steps, batch, seed, "autoencoder", log)
    with torch.no_grad():
        latents = vae.encode(draw_images(bank, 512, _generator(bank, seed + 1))).latent_dist.mode()
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae.eval().requires_grad_(False)


def train_tiny_autoencoder(
    bank: Bank, vae: AutoencoderKL, steps: int, batch: int, log: Log, seed: int = 0
) -> AutoencoderTiny:
    """Teach the tiny autoencoder the full one's latents (scaled, as it gives them) and to show them."""
    torch.manual_seed(seed)
    tiny = build_tiny_autoencoder().to(bank.rgba.device)  # type: ignore[arg-type]  # diffusers' decorator hides the types of `to`

    def loss(images: Tensor) -> Tensor:
        with torch.no_grad():
            latents = scaled_latents(vae, images)
        shown = tiny.decode(latents).sample
        return functional.mse_loss(tiny.encode(images).latents, latents) + functional.mse_loss(shown, images)

    _descend(tiny, loss, bank, steps, batch, seed, "tiny autoencoder", log)
    return tiny.eval().requires_grad_(False)


def _generator(bank: Bank, seed: int) -> torch.Generator:
    return torch.Generator(bank.rgba.device).manual_seed(seed)


def _descend(
    network: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    bank: Bank,
    steps: int,
    batch: int,
    seed: int,
    name: str,
    log: Log,
) -> None:
    """Adam with the priors' learning rates on random images."""
    rates = replace(TRAININGS["video"], lr=2e-3)
    optimizer, generator = torch.optim.Adam(network.parameters()), _generator(bank, seed)
    began, losses = time.monotonic(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(rates, step / steps)
        loss = loss_of(draw_images(bank, batch, generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % 200 == 0 or step + 1 == steps:
            mean = float(torch.stack(losses).mean())
            log(f"{name}: step {step + 1} of {steps}, loss {mean:.4f} after {time.monotonic() - began:.0f} s")
            losses.clear()


def main(arguments: list[str] | None = None) -> None:
    """Train all three."""
    usual = TRAININGS["video"]
    parser = argparse.ArgumentParser(prog="python -m dream4d_engine.toyworld.train_latent", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autoencoder-steps", type=int, default=4000, help="of each autoencoder")
    parser.add_argument("--steps", type=int, default=usual.steps, help="of the video prior")
    parser.add_argument("--minutes", type=float, help="of the video prior, instead of steps")
    parser.add_argument("--batch", type=int, default=usual.batch, help="clips a step; 4 times as many images")
    parser.add_argument("--bank", type=int, default=usual.bank, help="clips rendered beforehand")
    parser.add_argument("--graph", action="store_true", help="replay the video prior's step as a CUDA graph")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    bank = render_bank("video", min(options.bank, 4096), torch.Generator().manual_seed(0), device)
    log = partial(print, flush=True)
    vae = train_autoencoder(bank, options.autoencoder_steps, 4 * options.batch, log)
    tiny = train_tiny_autoencoder(bank, vae, options.autoencoder_steps, 4 * options.batch, log)
    tiny.cpu().save_pretrained(options.out / "tiny")
    changes = {name: getattr(options, name) for name in ("steps", "minutes", "batch", "bank", "graph")}
    train(replace(usual, **changes), options.out, device, log=log, vae=vae)


if __name__ == "__main__":
    main()
