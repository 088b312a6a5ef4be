"""Write small models with random weights as the files that core loader nodes read.

    graph_files.py CHECKOUT FOLDER [--full]

`--full`: also Stable Diffusion 1.5 and Wan 2.1 1.3B at their real sizes (5 GB), for a GPU.

Run with ComfyUI's Python. Text encoders of today's video models are recognised at their full size alone, so those have
no files: the server's test pack makes them (see tests/guard).
"""

from __future__ import annotations

import sys
from pathlib import Path

COMFYUI, FOLDER, FULL = sys.argv[1], Path(sys.argv[2]), "--full" in sys.argv
sys.path[:0] = [COMFYUI]
sys.argv = ["files", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import graph_models as models  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def write(place: str, state: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Save a file below the folder."""
    path = FOLDER / place
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata)


def sd15_text() -> dict[str, torch.Tensor]:
    """CLIP ViT-L as checkpoints have it: twelve layers, of which all but the first add nothing."""
    from comfy import sd1_clip

    model = sd1_clip.SDClipModel(dtype=torch.float16)
    found = models.random_weights(model, 3)
    for name in found:
        layer = name.split("layers.")[-1].split(".")[0]
        if "layers." in name and layer != "0" and ("out_proj" in name or "fc2" in name):
            found[name] = torch.zeros_like(found[name])
    wanted = {n: v.half() for n, v in found.items() if n.startswith("transformer.text_model.")}
    return models.prefixed(wanted, "cond_stage_model.")


unet = models.sd15_unet()
checkpoint = models.prefixed(unet, models.UNET_PREFIX) | sd15_text()
write("checkpoints/small_sd15.safetensors", checkpoint | models.prefixed(models.kl_vae(), "first_stage_model."))
write("loras/small.safetensors", models.attention_lora(models.checkpoint_model(unet)))
write("diffusion_models/small_wan.safetensors", models.wan_transformer())
write("vae/small_wan.safetensors", models.wan_vae())
write("vae/small_sd.safetensors", models.kl_vae())
write("vae/tiny_wan.safetensors", models.tiny_video_vae())
zero123 = models.prefixed(models.sd15_unet(in_channels=8), models.UNET_PREFIX)
zero123 |= models.prefixed(models.random_weights(torch.nn.Linear(772, 768), 5), "cc_projection.")
write("checkpoints/small_zero123.safetensors", zero123)
write("diffusion_models/small_ltx.safetensors", models.ltx_transformer())
write("vae/small_ltx.safetensors", *models.ltx_vae_state())
if FULL:
    halved = {n: v.half() for n, v in models.prefixed(models.full_sd15_unet(), models.UNET_PREFIX).items()}
    halved |= {n: v.half() for n, v in models.prefixed(models.kl_vae(), "first_stage_model.").items()}
    write("checkpoints/full_sd15.safetensors", halved | sd15_text())
    del halved
    whole = models.wan_transformer(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
    write("diffusion_models/full_wan.safetensors", {n: v.bfloat16() for n, v in whole.items()})
    write("vae/full_wan.safetensors", {n: v.bfloat16() for n, v in models.wan_vae(dim=96).items()})
