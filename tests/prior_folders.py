"""Small models as folders in diffusers' format, written new or copied to be damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from dream4d_engine.priors.files import toy_folder
from dream4d_engine.priors.loading import load_prior
from dream4d_engine.priors.networks.text import END, write_clip_tokenizer

WIDTH = 32


def write_index(folder: Path, pipeline: str, **parts: str) -> None:
    index = {"_class_name": pipeline, "_diffusers_version": "0.20.0"}
    for name, what in parts.items():
        index[name] = what.split(".") if what else [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))


def write_scheduler(folder: Path, **changes) -> None:
    (folder / "scheduler").mkdir(parents=True)
    config = {
        "_class_name": "PNDMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        **changes,
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


def write_vae(folder: Path) -> None:
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(16, 16), norm_num_groups=8, **kinds).save_pretrained(folder / "vae")


def write_text(folder: Path, pad: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    size = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(vocab_size=49408, **size)).save_pretrained(folder / "text_encoder")
    write_clip_tokenizer(folder / "tokenizer", pad)


def image_folder(folder: Path, **scheduler) -> Path:
    """Stable Diffusion's layout."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DConditionModel(
            sample_size=96,
            block_out_channels=(32, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
        ).save_pretrained(folder / "unet")
        write_vae(folder)
        write_text(folder, END)
    write_scheduler(folder, **scheduler)
    parts = {"unet": "diffusers.UNet2DConditionModel", "vae": "diffusers.AutoencoderKL", "safety_checker": ""}
    parts |= {"text_encoder": "transformers.CLIPTextModel", "tokenizer": "transformers.CLIPTokenizer"}
    write_index(folder, "StableDiffusionPipeline", **parts, scheduler="diffusers.PNDMScheduler")
    return folder


NEVER_SAID = ("trust_remote_code", "weights_only", "huggingface.co", "Traceback", "token=", "unexpected", "defect")


def copy_of(kind: str, place: Path) -> Path:
    """A toy prior's folder to be damaged; the UNet's weights are a link until somebody writes there."""
    shutil.copytree(toy_folder(kind), place, ignore=shutil.ignore_patterns("*.png", "diffusion_pytorch_model.*"))
    for path in toy_folder(kind).rglob("diffusion_pytorch_model.*"):
        (place / path.relative_to(toy_folder(kind))).symlink_to(path)
    return place


def use(folder: Path) -> None:
    """All that a run loads of a folder."""
    prior = load_prior(folder)
    if prior.kind == "novel_view":
        prior.loader.image_encoder(torch.float32, "cpu")
        prior.loader.projection("cpu")
    else:
        prior.encode_text(["a red cube"])
