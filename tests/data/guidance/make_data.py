"""Make the files beside this one from the folder of published guidance figures: `make_data.py FOLDER`.

`sd_unet.safetensors` is the tiny image network as it is, `mvdream_tiny.pt` with its .json the multi-view one in the
layout of its full-size checkpoint (copied by hand). `golden.safetensors` holds the published cases and, so that
the other networks need not be kept, what those networks predict at the points where the cases ask them:
`<case>.eps` [K, P, F, c, h, w] for K conditions and P groups, at `<case>.x` [P, F, c, h, w] (variance preserving).

`if.noise` is not the recorded one. The published call drew its noise with the memory layout of an image (channels
last), which gives other numbers than the same seed with the usual layout; the recorded noise is in the usual one. The
seed is known, so the noise is drawn again here; it reproduces the published loss to 1e-6.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as functional
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel, UNet3DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from dream4d_engine.priors.networks.view_attention import attend_across_views

HERE = Path(__file__).parent
KEPT = ("azimuth_deg", "elevation_deg", "c2w", "distance", "text_embeddings", "negative_embeddings", "sd.", "video.")
KEPT += ("mvdream.unet.", "mvdream.vae.", "zero123.concat_latent", "zero123.image_embedding")
ZERO123_ROWS = 64  # of the 768 rows of its projection, which are independent
IF_SEED = 700


def load_unet(folder: Path, name: str, kind: type, config: dict) -> torch.nn.Module:
    unet = kind(**config).eval().requires_grad_(False)
    weights = load_file(folder / name)
    unet.load_state_dict({k.removeprefix("unet."): v for k, v in weights.items() if k.startswith("unet.")})
    return unet


def load_multiview(folder: Path) -> torch.nn.Module:
    old = torch.load(folder / "mvdream_tiny.pt", weights_only=True)
    unet = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=16,
    )
    weights = convert_ldm_unet_checkpoint(old, {"layers_per_block": 1})
    for there, here in (("0", "linear_1"), ("2", "linear_2")):
        for part in ("weight", "bias"):
            weights[f"class_embedding.{here}.{part}"] = old[f"model.diffusion_model.camera_embed.{there}.{part}"]
    unet.load_state_dict(weights)
    attend_across_views(unet)
    return unet.eval().requires_grad_(False)


def noisy(z: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    return alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * noise


@torch.no_grad()
def main(folder: Path) -> None:
    given = load_file(folder / "guidance.safetensors")
    configs = json.loads((folder / "guidance.json").read_text())
    text, negative = (given[f"{k}_embeddings.side_front_back_overhead"] for k in ("text", "negative"))
    latent_schedule = DDIMScheduler(**configs["scheduler"]).alphas_cumprod
    pixel_schedule = DDPMScheduler(**configs["if_scheduler"]).alphas_cumprod
    out = {k: v for k, v in given.items() if k.startswith(KEPT)}
    out |= {"alphas_bar": latent_schedule, "if.alphas_bar": pixel_schedule}

    unet = load_unet(folder, "video_tiny.safetensors", UNet3DConditionModel, configs["video_unet"])
    z, noise, t = (given[f"video.n1.0.{k}"] for k in ("z", "noise", "t"))
    x = noisy(z, noise, latent_schedule[t])
    eps = torch.stack([unet(x, t, table[1:2]).sample for table in (text, negative)])
    out |= {"video.x": x.transpose(1, 2), "video.eps": eps.transpose(2, 3)}

    unet = load_multiview(folder)
    cameras = given["c2w"].clone()
    cameras[:, :3, 3] /= cameras[:, :3, 3].norm(dim=1, keepdim=True)
    for case in ("mvdream.0", "mvdream.1"):
        out |= {k: v for k, v in given.items() if k.startswith(case)}
        z, noise, t = (given[f"{case}.{k}"] for k in ("z", "noise", "t"))
        x = noisy(z, noise, latent_schedule[t])
        views = {"class_labels": cameras.flatten(1), "cross_attention_kwargs": {"n_views": 4}}
        eps = [unet(x, t, table[:1].expand(4, -1, -1), **views).sample for table in (text, negative)]
        out |= {f"{case}.x": x[None], f"{case}.eps": torch.stack(eps)[:, None]}

    unet = load_unet(folder, "if_tiny.safetensors", UNet2DConditionModel, configs["if_unet"])
    out |= {k: given[k] for k in ("if.loss", "if.rgb", "if.rgb_grad", "if.t")}
    images = functional.interpolate(2 * given["if.rgb"].permute(0, 3, 1, 2) - 1, (64, 64), mode="bilinear")
    generator = torch.Generator().manual_seed(IF_SEED)
    assert torch.equal(torch.randint(20, 981, (4,), generator=generator), given["if.t"])
    layout = torch.empty(4, 3, 64, 64, memory_format=torch.channels_last)
    noise = layout.normal_(generator=generator)
    x = noisy(images, noise, pixel_schedule[given["if.t"]][:, None, None, None])
    view = torch.tensor([2, 0, 1, 3])
    eps = torch.stack([unet(x, given["if.t"], table[view]).sample[:, :3] for table in (text, negative)])
    out |= {"if.noise": noise, "if.x": x[:, None], "if.eps": eps[:, :, None]}

    for name in ("proj_weight", "proj_bias"):
        out[f"zero123.{name}"] = given[f"zero123.{name}"][:ZERO123_ROWS]
    out["zero123.context_neg_then_pos"] = given["zero123.context_neg_then_pos"][..., :ZERO123_ROWS]

    save_file({k: v.contiguous() for k, v in out.items()}, HERE / "golden.safetensors")
    weights = load_file(folder / "sd_tiny.safetensors")
    save_file({k[5:]: v for k, v in weights.items() if k.startswith("unet.")}, HERE / "sd_unet.safetensors")
    (HERE / "sd_unet.json").write_text(json.dumps(configs["sd_unet"], indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
