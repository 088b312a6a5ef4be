"""What it takes to try convolutions out, and what that gains: `python benchmarks/convolution_trials.py [NAME ...]`.

Networks of the published sizes with random weights, without a gradient or with one on what they read. Each in a process
of its own, as cuDNN keeps what it chose for a shape: by its own guess, as the best of three, as the best of ten
(PyTorch's way). The first pass, the median of later ones, the most memory beside the weights.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import torch
from common import CUDA, DEVICE, milliseconds, wait
from torch import Tensor, nn

from dream4d_engine.guidance.execution import Execution
from dream4d_engine.priors.architectures import ARCHITECTURES, random_network, random_vae
from dream4d_engine.priors.networks.frozen import speed_up
from dream4d_engine.priors.networks.video_encoders import encode_video, lay_out

DTYPE = torch.float16 if CUDA else torch.float32
WAYS = {"cuDNN's guess": 0, "best of 3": 3, "best of 10": 10}
SHRINK = 1 if CUDA else 8


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape[:-2], *(side // SHRINK for side in shape[-2:]), device=DEVICE, dtype=DTYPE)


def denoiser(name: str, shape: tuple[int, ...], fused: bool) -> Callable[[], object]:
    """A network that is asked without a gradient."""
    of = ARCHITECTURES[name]
    unet = random_network(of.unet_class, of.unet, DEVICE, DTYPE)
    if fused:
        speed_up(unet)
    words = torch.randn(shape[0], 77, of.token_width, device=DEVICE, dtype=DTYPE)
    given = noise(*shape), torch.full((shape[0],), 500, device=DEVICE), words

    def ask() -> object:
        with torch.no_grad():
            return unet(*given)

    return ask


def encoder(network: nn.Module, shape: tuple[int, ...]) -> Callable[[], object]:
    """An encoding and the gradient through it."""
    pixels = noise(*shape).requires_grad_()
    speed_up(network) if len(shape) == 4 else lay_out(network)

    def encode() -> Tensor:
        if len(shape) == 4:
            return network.encode(pixels).latent_dist.mode()
        return encode_video(network, pixels, None, Execution(), True)

    return lambda: torch.autograd.grad(encode().float().square().sum(), pixels)


NETWORKS: dict[str, Callable[[], Callable[[], object]]] = {
    "image-unet": lambda: denoiser("Stable Diffusion 2.1 base", (8, 4, 64, 64), False),
    "image-unet-fused": lambda: denoiser("Stable Diffusion 2.1 base", (8, 4, 64, 64), True),
    "video-unet-fused": lambda: denoiser("ZeroScope v2 576w", (2, 4, 24, 40, 72), True),
    "image-encoder": lambda: encoder(random_vae("full", DEVICE, DTYPE), (4, 3, 512, 512)),
    "video-encoder": lambda: encoder(random_network("AutoencoderKLWan", {}, DEVICE, DTYPE), (1, 3, 17, 320, 576)),
}


def measure(name: str, way: str) -> None:
    """Print a network's line for one way, in a process that has run none before."""
    torch.backends.cudnn.benchmark = WAYS[way] > 0
    torch.backends.cudnn.benchmark_limit = WAYS[way]
    ask = NETWORKS[name]()
    before = torch.cuda.memory_allocated() if CUDA else 0
    wait()
    began = time.perf_counter()
    ask()
    wait()
    first = time.perf_counter() - began
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    took = milliseconds(ask)
    peak = f", {(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GiB" if CUDA else ""
    print(f"{name:<18}{way:<16}{first:6.1f} s, then {took:8.1f} ms{peak}", flush=True)


def main() -> None:
    """Run every network's ways one after the other."""
    if len(sys.argv) == 3 and sys.argv[2] in WAYS:
        measure(*sys.argv[1:])
        return
    for name in sys.argv[1:] or NETWORKS:
        for way in WAYS:
            subprocess.run([sys.executable, __file__, name, way], check=True)


if __name__ == "__main__":
    main()
