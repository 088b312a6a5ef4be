"""Encoding for a gradient by a graph's autoencoders, core's own layers and the fused ones in turns.

    PYTHON_OF_COMFYUI benchmarks/graph_encoders.py COMFYUI [--trials]

Autoencoders of real width with random weights, as core's loader makes them; forward and backward, medians, the most
memory, and the cosine between the two gradients. On a GPU; elsewhere small images. `--trials`: cuDNN tries convolutions
of the fused ones out, which the nodes don't let it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

sys.path[:0] = [sys.argv[1], str(Path(__file__).resolve().parent.parent / "tests" / "nodes")]
TRIALS = "--trials" in sys.argv
sys.argv = [sys.argv[0]]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import torch  # noqa: E402

if not torch.cuda.is_available():
    sys.argv.append("--cpu")

import comfy.latent_formats  # noqa: E402
import comfy.model_management as management  # noqa: E402
import graph_models as models  # noqa: E402
from graph_pack import pack  # noqa: E402

Encoder = pack("nodes.graph_encoder").Encoder
Execution = pack("dream4d_engine.guidance.execution").Execution

DEVICE = management.get_torch_device()
CUDA = DEVICE.type == "cuda"
TURNS, REPEATS = (4, 3) if CUDA else (1, 1)
CASES = {
    "Stable Diffusion's": (lambda: models.vae(models.kl_vae()), "SD15", (4, 3, 512, 512)),
    "Wan 2.1's": (lambda: models.vae(models.wan_vae(dim=96)), "Wan21", (1, 3, 17, 320, 576)),
    "Wan 2.2's": (lambda: models.wan22_vae(dim=160), "Wan22", (1, 3, 25, 352, 640)),
    "LTX-Video 0.9's": (lambda: models.vae(*models.ltx_vae_state(version=0, width=128)), "LTXV", (1, 3, 25, 320, 576)),
    "LTX-Video 0.9.5's": (
        lambda: models.vae(*models.ltx_vae_state(version=2, width=128)),
        "LTXV",
        (1, 3, 25, 320, 576),
    ),
}
WAYS = {"core's": (False, Execution()), "fused": (True, Execution())}
WAYS |= {f"{name}, computed again": (fused, Execution(images_kept=0)) for name, (fused, _) in WAYS.items()}


def gradient(encoder: Encoder, pixels: torch.Tensor, way: Execution) -> tuple[torch.Tensor, float]:
    """The gradient of a weighted sum of latents, and the seconds it took."""
    torch.backends.cudnn.benchmark = TRIALS and encoder.fused is not None
    began = time.perf_counter()
    z = encoder.encode(pixels, way)
    pull = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z)
    (found,) = torch.autograd.grad(z, pixels, pull)
    if CUDA:
        torch.cuda.synchronize()
    return found, time.perf_counter() - began


def main() -> None:
    """Print a line for each way of each autoencoder."""
    for name, (make, latents, shape) in CASES.items():
        if not CUDA:
            shape = (*shape[:-2], 32, 32)
        pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
        vae, form = make(), getattr(comfy.latent_formats, latents)()
        encoders = {fused: Encoder.copied(vae, form, DEVICE, fused) for fused in (False, True)}
        if encoders[True].fused is None:
            print(f"{name}: not fused, the log says why")
            continue
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        peaks: dict[str, int] = {}
        for turn in range(TURNS):
            for way, (fused, execution) in WAYS.items():
                if execution.images_kept == 0 and len(shape) == 4:
                    continue  # images are computed again slice by slice, whichever layers do it
                for _ in range(REPEATS):
                    if CUDA:
                        torch.cuda.reset_peak_memory_stats()
                        before = torch.cuda.memory_allocated()
                    _, took = gradient(encoders[fused], pixels, execution)
                    if turn or TURNS == 1:
                        seconds[way].append(took)
                        peaks[way] = torch.cuda.max_memory_allocated() - before if CUDA else 0
        ours, theirs = (gradient(encoders[fused], pixels, Execution())[0] for fused in (True, False))
        cosine = float(torch.nn.functional.cosine_similarity(ours.double().flatten(), theirs.double().flatten(), 0))
        n_images, (height, width) = shape[0] if len(shape) == 4 else shape[2], shape[-2:]
        what = f"{name}, {n_images} {'images' if len(shape) == 4 else 'frames'} of {width}x{height}, {vae.vae_dtype}"
        print(f"{what}: cosine of the gradients {cosine:.6f}")
        for way, found in seconds.items():
            if found:
                memory = f", {peaks[way] / 2**30:.2f} GiB" if CUDA else ""
                print(f"  {way}: {1000 * median(found):.1f} ms{memory}", flush=True)


if __name__ == "__main__":
    main()
