"""Weights that are no numbers are found when they are loaded, in every part of every kind of model."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import ldm_layout as layout
import pytest
import torch
from ldm_layout import small_checkpoint
from safetensors.torch import load_file, save_file

from dream4d_engine.cameras import make_cameras
from dream4d_engine.priors.conditioning import image_conditions
from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.files import PriorFiles, toy_folder
from dream4d_engine.priors.formats.convert import convert
from dream4d_engine.priors.formats.finite import check_finite
from dream4d_engine.priors.loading import load_prior
from dream4d_engine.priors.networks.execution import Runtime

PARTS = {
    "image": ("unet", "text_encoder"),
    "multiview": ("unet", "text_encoder"),
    "pixel": ("unet", "text_encoder"),
    "video": ("unet", "text_encoder"),
    "novel_view": ("unet", "image_encoder", "clip_camera_projection"),
}
CASES = [(kind, part) for kind, parts in PARTS.items() for part in parts]


def with_value(folder: Path, part: str, value: float) -> tuple[Path, str]:
    """Put a value into the last tensor of a part; return the file and the tensor's name."""
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    name = max(key for key, tensor in state.items() if tensor.is_floating_point())
    state[name] = state[name].clone()
    state[name].view(-1)[-1] = value
    file.unlink()
    save_file(state, file, {"format": "pt"})
    return file, name


def load_all(path: Path, kind: str, **options) -> None:
    """Load all parts, as a run does before its first step."""
    prior = load_prior(path, kind, **options)
    if kind != "novel_view":
        prior.encode_text(["a red cube"])
        return
    image_conditions(prior, torch.rand(3, 32, 32), make_cameras(0.0, 0.0, 2.0, 0.8, 0.0, 32, 32))


@pytest.mark.parametrize(("kind", "part"), CASES)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_value_in_any_part_of_a_folder(tmp_path, kind, part, value):
    folder = shutil.copytree(toy_folder(kind), tmp_path / kind)
    file, name = with_value(folder, part, value)
    with pytest.raises(PriorError) as raised:
        load_all(folder, kind)
    said = str(raised.value)
    short = name.removeprefix("text_model.").removeprefix("proj.")  # some libraries have other names in memory
    assert short in said and re.search(r"holds NaN or infinite numbers \(1 of [\d,]+ values\)", said)
    assert (str(file) in said) if part != "clip_camera_projection" else "its pose projection" in said
    assert "download it again" in said and "\n" not in said


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("sd21", "model.diffusion_model.out.2.bias"),
        ("sd21", "first_stage_model.decoder.conv_out.bias"),
        ("sd21", "cond_stage_model.model.ln_final.bias"),
        ("sd15", "cond_stage_model.transformer.text_model.final_layer_norm.bias"),
        ("zero123", "cond_stage_model.model.visual.ln_post.bias"),
        ("zero123", "cc_projection.bias"),
        ("mvdream", "model.diffusion_model.camera_embed.0.bias"),
    ],
)
def test_a_value_in_any_part_of_a_checkpoint(tmp_path, kind, key):
    state = layout.random_state(small_checkpoint(kind))
    state[key][0] = math.nan
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    with pytest.raises(PriorError, match=r"model.safetensors: its .*: .*(weight|bias) holds NaN"):
        load_all(path, {"zero123": "novel_view", "mvdream": "multiview"}.get(kind, "image"))
    with pytest.raises(PriorError, match="holds NaN"):
        convert(path, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_value_in_networks_under_diffusers_names(tmp_path):
    unet = toy_folder("image") / "unet"
    (file,) = unet.glob("*.safetensors")
    state = {f"unet.{name}": tensor for name, tensor in load_file(file).items()}
    state["unet.conv_in.bias"] = torch.full_like(state["unet.conv_in.bias"], math.inf)
    save_file(state, tmp_path / "n.safetensors")
    config = json.loads((unet / "config.json").read_text(encoding="utf-8"))
    scheduler = json.loads((unet.parent / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    with pytest.raises(PriorError, match=r"n.safetensors: its UNet: conv_in.bias holds NaN or infinite"):
        load_prior(tmp_path / "n.safetensors", config={"unet": config, "scheduler": scheduler})


def test_a_value_in_a_tiny_autoencoder(tmp_path):
    from diffusers import AutoencoderTiny

    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    with torch.random.fork_rng():
        tiny = AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    tiny.save_pretrained(tmp_path / "models" / "vae")
    file, name = with_value(tmp_path / "models", "vae", math.nan)
    save_file(layout.random_state(small_checkpoint("sd21")), tmp_path / "sd.safetensors")
    with pytest.raises(PriorError, match=f"{file.name}: {name} holds NaN"):
        PriorFiles("sd", "image", tmp_path / "sd.safetensors", tiny_vae=tmp_path / "models").load(
            Runtime(torch.device("cpu"))
        )


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_half_precision_that_is_too_small(tmp_path, part):
    folder = shutil.copytree(toy_folder("image"), tmp_path / "image")
    (file,) = (folder / part).glob("*.safetensors")
    save_file(
        {name: tensor.float() for name, tensor in load_file(file).items()}, tmp_path / file.name, {"format": "pt"}
    )
    shutil.move(tmp_path / file.name, file)
    file, _name = with_value(folder, part, 1e5)
    load_all(folder, "image")  # in full precision all is well
    with pytest.raises(PriorError) as raised:
        load_all(folder, "image", dtype=torch.float16)
    said = str(raised.value)
    assert f"{file}: " in said and "is infinite in half precision (1 of " in said and "ends at 65,504" in said
    assert "in full precision (--static.loop.precision full" in said


def test_a_half_checkpoint_of_large_weights_is_not_written(tmp_path):
    state = layout.random_state(small_checkpoint("sd21"))
    state["cond_stage_model.model.ln_final.bias"][0] = 7e4
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(PriorError, match="its encoder: .*final_layer_norm.bias is infinite in half precision"):
        convert(tmp_path / "m.safetensors", tmp_path / "folder", dtype=torch.float16)
    assert not (tmp_path / "folder").exists()
    convert(tmp_path / "m.safetensors", tmp_path / "folder")


def test_one_of_several_files_is_named(tmp_path):
    for name, value in (("a", 1.0), ("b", math.nan)):
        save_file({f"{name}.weight": torch.tensor([value])}, tmp_path / f"{name}.safetensors")
    (tmp_path / "c.safetensors").write_text("none", encoding="utf-8")
    with pytest.raises(PriorError, match=r"b\.safetensors: b\.weight holds NaN"):
        check_finite({"a.weight": torch.ones(1), "b.weight": torch.tensor([math.nan])}, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_numbers_pass_whatever_their_sum(dtype):
    most = torch.finfo(dtype).max
    sound = torch.full((1000,), most, dtype=dtype)
    check_finite({"w": sound, "n": torch.arange(3), "none": torch.zeros(0), "m": torch.zeros(2, device="meta")}, "here")
    for place in (0, 499, 999):
        for value in (math.nan, math.inf, -math.inf):
            bad = sound.clone()
            bad[place] = value
            with pytest.raises(PriorError, match=r"^here: w .*\(1 of 1,000 values\)"):
                check_finite({"sound": sound, "w": bad}, "here")
    both = torch.tensor([math.inf, -math.inf], dtype=dtype)
    with pytest.raises(PriorError, match="2 of 2 values"):
        check_finite({"w": both}, "here")
