"""Teach the toy image prior a personal subject: `python -m dream4d_engine.toyworld.train_lora --out DIR`.

DreamBooth with low-rank additions to the attention's weights (2208.12242, 2106.09685), from four images of
subject.py's snowman. The file is what diffusers' own training writes: pytorch_lora_weights.safetensors with pairs
`unet.<layer>.lora.down.weight` [r, i] and `.up.weight` [o, r], to be added as up @ down.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..priors.files import toy_folder
from ..priors.loading import load_prior
from .datasets import GREY
from .subject import photo_prompts, photos

FILE = "pytorch_lora_weights.safetensors"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class LoraTraining:
    """`rank`: of the additions. `batch`: images a step, each of the four as often. `lr`: falls to 0 linearly."""

    rank: int = 4
    steps: int = 400
    batch: int = 16
    lr: float = 2e-3
    seed: int = 0


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank addition, 0 at the start."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features, generator=generator) / rank)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def add_lora(unet: nn.Module, rank: int, generator: torch.Generator) -> dict[str, LoraLinear]:
    """Put additions beside the attention's layers, in place; return them by the layers' names."""
    targets = {n: m for n, m in unet.named_modules() if n.endswith(TARGETS) and isinstance(m, nn.Linear)}
    added = {}
    for name, layer in targets.items():
        parent, _, last = name.rpartition(".")
        added[name] = LoraLinear(layer, rank, generator)
        setattr(unet.get_submodule(parent), last, added[name])
    return added


def train_lora(training: LoraTraining, log: Callable[[str], None] = print) -> dict[str, Tensor]:
    """Train the additions on the four images, before random greys; return the file's tensors."""
    generator = torch.Generator().manual_seed(training.seed)
    prior = load_prior(toy_folder("image"), "image")
    unet, alphas_bar = prior.denoiser.unet, prior.denoiser.noise.alphas_bar.to(prior.denoiser.device)
    added = add_lora(unet, training.rank, generator)
    parameters = [p for layer in added.values() for p in (layer.down, layer.up)]
    optimizer = torch.optim.AdamW(parameters, lr=training.lr, weight_decay=1e-4)
    images, tokens = photos(), prior.encode_text(photo_prompts())
    losses: list[float] = []
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.lr * (1 - step / training.steps)
        index = torch.arange(training.batch) % len(images)
        grey = GREY[0] + (GREY[1] - GREY[0]) * torch.rand(training.batch, 1, 1, 1, generator=generator)
        clean = 2 * (images[index, :3] + (1 - images[index, 3:]) * grey) - 1
        noise = torch.randn(clean.shape, generator=generator)
        timestep = torch.randint(len(alphas_bar), (training.batch,), generator=generator)
        alpha_bar = alphas_bar[timestep][:, None, None, None]
        noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
        target = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean
        loss = (unet(noisy, timestep, tokens[index], return_dict=False)[0] - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            log(f"step {step + 1} of {training.steps}, loss {sum(losses[-50:]) / 50:.4f}")
    halves = {"down": lambda layer: layer.down, "up": lambda layer: layer.up}
    return {
        f"unet.{name}.lora.{half}.weight": of(layer).detach().half().contiguous()
        for name, layer in added.items()
        for half, of in halves.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Train and save."""
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(prog="python -m dream4d_engine.toyworld.train_lora", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help=f"folder that gets {FILE}")
    for name, default in vars(LoraTraining()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    out.mkdir(parents=True, exist_ok=True)
    tensors = train_lora(LoraTraining(**options))
    save_file(tensors, str(out / FILE), metadata={"format": "pt"})
    print(f"{out / FILE}: {(out / FILE).stat().st_size / 2**10:.0f} KiB")


if __name__ == "__main__":
    main()
