"""Checkpoints as others wrote them: parts under other names, with fewer or more layers, with or without settings."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import ldm_layout as layout
import pytest
import torch
import torch.nn.functional as functional
from ldm_layout import WIDTH, small, small_checkpoint
from places import CASES
from safetensors.torch import save_file

from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.formats import clip_keys, ldm_keys
from dream4d_engine.priors.formats.convert import convert
from dream4d_engine.priors.formats.identify import identify, identify_all, open_loader
from dream4d_engine.priors.loading import load_prior

CONDITION, VAE, UNET = "cond_stage_model.", "first_stage_model.", "model.diffusion_model."


@pytest.fixture(scope="module")
def sd15() -> layout.Shapes:
    return layout.random_state(small_checkpoint("sd15"), 3)


@pytest.fixture(scope="module")
def sd21() -> layout.Shapes:
    return layout.random_state(small_checkpoint("sd21"), 4)


def saved(state, path: Path) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    return path


def renamed(state, changes: dict[str, str]):
    """The state with the beginnings of names replaced."""
    found = {}
    for name, tensor in state.items():
        old = next((old for old in changes if name.startswith(old)), "")
        found[changes.get(old, "") + name.removeprefix(old)] = tensor
    return found


# --- Text towers: what the model reads, not what the file holds --------------------------------------------------


TOWER = 1024  # the width of Stable Diffusion 2's; its 24 layers share their weights here, to be small


@pytest.fixture(scope="module")
def tower() -> dict[str, torch.Tensor]:
    """One layer of OpenCLIP's text tower with a thin MLP, and what stands around the layers."""
    shapes = layout.open_clip_text(TOWER, 1, vocabulary=64)
    shapes |= layout.layer("model.transformer.resblocks.0.mlp.c_fc", 64, TOWER)
    shapes |= layout.layer("model.transformer.resblocks.0.mlp.c_proj", TOWER, 64)
    state = layout.random_state(shapes, 5)
    # attention with weights of a size that lets every layer change something
    return {k: 0.3 * v if "in_proj_weight" in k or "out_proj.weight" in k else v for k, v in state.items()}


def as_open_clip(tower, n_layers: int):
    block = "model.transformer.resblocks.0."
    found = {k: v for k, v in tower.items() if not k.startswith(block)}
    for i in range(n_layers):
        found |= {k.replace("blocks.0.", f"blocks.{i}."): v for k, v in tower.items() if k.startswith(block)}
    return found


def as_transformers(tower, n_layers: int):
    """The same weights under transformers' names, as conversions of Stable Diffusion 2 have them."""
    root, block = "transformer.text_model", "model.transformer.resblocks.0."
    found = {
        f"{root}.embeddings.token_embedding.weight": tower["model.token_embedding.weight"],
        f"{root}.embeddings.position_embedding.weight": tower["model.positional_embedding"],
        f"{root}.final_layer_norm.weight": tower["model.ln_final.weight"],
        f"{root}.final_layer_norm.bias": tower["model.ln_final.bias"],
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for i in range(n_layers):
        here = f"{root}.encoder.layers.{i}."
        for part in ("weight", "bias"):
            found |= {f"{here}{new}.{part}": tower[f"{block}{old}.{part}"] for old, new in names.items()}
            thirds = tower[f"{block}attn.in_proj_{part}"].chunk(3)
            found |= {f"{here}self_attn.{q}_proj.{part}": third for q, third in zip("qkv", thirds, strict=True)}
    return found


def reference(tower, ids: torch.Tensor, n_layers: int) -> torch.Tensor:
    """OpenCLIP's text tower by plain formulas, up to its final norm."""

    def norm(name, x):
        return functional.layer_norm(x, (TOWER,), tower[f"model.{name}.weight"], tower[f"model.{name}.bias"])

    block = "transformer.resblocks.0"
    weights = {k.removeprefix(f"model.{block}."): v for k, v in tower.items() if k.startswith(f"model.{block}.")}
    x = tower["model.token_embedding.weight"][ids] + tower["model.positional_embedding"]
    mask = torch.ones(77, 77, dtype=torch.bool).tril()
    for _ in range(n_layers):
        projected = functional.linear(norm(f"{block}.ln_1", x), weights["attn.in_proj_weight"])
        q, k, v = (projected + weights["attn.in_proj_bias"]).unflatten(-1, (3, 16, 64)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = x + functional.linear(mixed, weights["attn.out_proj.weight"], weights["attn.out_proj.bias"])
        wide = functional.linear(norm(f"{block}.ln_2", x), weights["mlp.c_fc.weight"], weights["mlp.c_fc.bias"])
        x = x + functional.linear(functional.gelu(wide), weights["mlp.c_proj.weight"], weights["mlp.c_proj.bias"])
    return norm("ln_final", x)


def with_tower(tower, sd21):
    """A small Stable Diffusion 2 whose UNet reads tokens of the tower's width."""
    state = layout.random_state({UNET + k: v for k, v in layout.unet(small(context=TOWER)).items()})
    state |= {k: v for k, v in sd21.items() if k.startswith(VAE)}
    return state | {CONDITION + k: v for k, v in tower.items()}


@pytest.mark.parametrize("layers", [23, 24])
@pytest.mark.parametrize("names", [as_open_clip, as_transformers])
def test_stable_diffusion_2_reads_the_23rd_layer_whatever_the_file_holds(tower, sd21, tmp_path, names, layers):
    torch.save(with_tower(names(tower, layers), sd21), tmp_path / "sd2.ckpt")
    source = open_loader(tmp_path / "sd2.ckpt")
    tokenizer, encoder = source.text_encoder(torch.float32, "cpu")
    assert encoder.config.num_hidden_layers == 23 and encoder.config.hidden_act == "gelu"
    assert tokenizer.pad_id == 0 and source.pad_token() == "!"
    ids = torch.randint(0, 64, (2, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = encoder(ids)[0]
    torch.testing.assert_close(ours, reference(tower, ids, 23), rtol=1e-3, atol=1e-3)
    assert (ours - reference(tower, ids, 22)).abs().max() > 0.01  # a layer more or less would show


def test_the_configuration_says_which_layer_is_read(sd21, tmp_path):
    path = saved(sd21, tmp_path / "sd21.safetensors")  # of three layers
    for layer, n in (("penultimate", 2), ("last", 3)):
        config = {"cond_stage_config": {"params": {"layer": layer}}}
        assert open_loader(path, config).text_parts()[0]["num_hidden_layers"] == n
    for layer, said in (
        ("hidden", "must be 'last' or 'penultimate', got 'hidden'"),
        (11, "layer must be text, got 11"),
    ):
        with pytest.raises(PriorError, match=said):
            load_prior(path, config={"cond_stage_config": {"params": {"layer": layer}}})


@pytest.mark.parametrize(
    ("names", "width", "there", "read"),
    [
        (layout.open_clip_text, 1024, 24, 23),
        (layout.open_clip_text, 1024, 23, 23),
        (layout.open_clip_text, 1280, 32, 31),
        (layout.open_clip_text, 1280, 31, 31),
        (layout.open_clip_text, 1280, 36, 35),
        (layout.open_clip_text, 768, 12, 11),
        (layout.open_clip_text, 768, 11, 11),
        (layout.hf_clip_text, 768, 12, 12),
        (layout.hf_clip_text, 1024, 24, 23),
        (layout.hf_clip_text, 1024, 23, 23),
    ],
)
def test_layers_that_are_read_of_full_size_towers(names, width, there, read):
    shapes = names(width, there)
    kind = clip_keys.encoder_layout(shapes)
    config = clip_keys.text_config(shapes, kind)
    assert config["num_hidden_layers"] == read
    is_open_clip = width != 768 or names is layout.open_clip_text
    assert (config["hidden_act"], config["pad_token_id"]) == (("gelu", 0) if is_open_clip else ("quick_gelu", 49407))
    layers = {m[1] for k in clip_keys.text_pieces(shapes, kind) if (m := re.search(r"layers\.(\d+)\.", k))}
    assert layers == {str(i) for i in range(read)}


def test_towers_that_lack_layers_are_refused():
    with pytest.raises(PriorError, match="has 20 layers, a tower of width 1024 has 24, of which the model reads 23"):
        clip_keys.text_config(layout.open_clip_text(1024, 20), "open_clip")
    gap = {k: v for k, v in layout.open_clip_text().items() if "resblocks.7." not in k}
    with pytest.raises(PriorError, match="is not complete: layer 7 is missing"):
        clip_keys.text_config(gap, "open_clip")


@pytest.mark.parametrize("root", ["transformer.", "text_model.", "", "transformer.transformer.text_model."])
def test_text_encoders_under_shortened_names(sd15, tmp_path, root):
    """Stable Diffusion 1 without `text_model.`, or without `transformer.`, and the like."""
    usual = load_prior(saved(sd15, tmp_path / "usual.safetensors")).encode_text(["a red cube"])
    state = renamed(sd15, {f"{CONDITION}transformer.text_model.": CONDITION + root})
    state[f"{CONDITION}transformer.text_projection.weight"] = torch.zeros(3, 3)  # no part of what is read
    path = saved(state, tmp_path / "short.safetensors")
    assert torch.equal(load_prior(path).encode_text(["a red cube"]), usual)
    folder = convert(path, tmp_path / "folder").folder
    torch.testing.assert_close(load_prior(folder).encode_text(["a red cube"]), usual, rtol=1e-5, atol=1e-5)


def test_what_is_no_text_encoder_is_said(sd15, tmp_path):
    state = renamed(sd15, {f"{CONDITION}transformer.text_model.encoder.": f"{CONDITION}bert.model."})
    with pytest.raises(
        PriorError, match=r"no text encoder \(cond_stage_model\.\* is bert\.model, transformer\.text_model"
    ):
        load_prior(saved(state, tmp_path / "bert.safetensors")).encode_text(["a cat"])
    other = {k: v for k, v in sd15.items() if not k.startswith(CONDITION)}
    other |= layout.random_state({CONDITION + k: v for k, v in layout.hf_clip_text(128, 2).items()})
    with pytest.raises(PriorError, match="text encoder gives 128 numbers a token, its UNet reads 64"):
        load_prior(saved(other, tmp_path / "wide.safetensors"))


def test_a_whole_clip_is_read_by_what_the_model_needs(sd21, tmp_path):
    """Both towers were kept: Stable Diffusion 2 still reads text."""
    visual = layout.clip_image(WIDTH, 2, patch=8, n_patches=16)
    kept = {CONDITION + k: v for k, v in visual.items() if k.startswith("model.visual.")}
    path = saved(sd21 | layout.random_state(kept), tmp_path / "whole.safetensors")
    usual = load_prior(saved(sd21, tmp_path / "usual.safetensors")).encode_text(["a cat"])
    assert torch.equal(load_prior(path).encode_text(["a cat"]), usual)


# --- The autoencoder's attention ---------------------------------------------------------------------------------


ATTENTION = {
    "ours": ("norm", "q", "k", "v", "proj_out"),
    "diffusers": ("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    "older": ("group_norm", "query", "key", "value", "proj_attn"),
    "mixed": ("norm", "query", "to_k", "v", "to_out.0"),
}


@pytest.mark.parametrize("n_dims", [2, 3, 4])
@pytest.mark.parametrize("names", ATTENTION)
def test_autoencoders_under_other_names(sd15, tmp_path, names, n_dims):
    state = dict(sd15)
    for side in ("encoder", "decoder"):
        root = f"{VAE}{side}.mid.attn_1."
        for old, new in zip(ATTENTION["ours"], ATTENTION[names], strict=True):
            for part in ("weight", "bias"):
                tensor = state.pop(f"{root}{old}.{part}")
                state[f"{root}{new}.{part}"] = (
                    tensor.flatten(1)[(...,) + (None,) * (n_dims - 2)] if tensor.ndim > 1 else tensor
                )
    usual = load_prior(saved(sd15, tmp_path / "usual.safetensors")).denoiser
    ours = load_prior(saved(state, tmp_path / "other.safetensors")).denoiser
    images = torch.rand(1, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.encode(images), usual.encode(images))
    assert torch.equal(ours.decode(ours.encode(images)), usual.decode(usual.encode(images)))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("decoder.mid.attn_1.q.", "decoder.mid.attn_1.wq.", "no known model has: decoder.mid.attn_1.wq"),
        ("decoder.mid.attn_1.q.", "decoder.mid.attn_1.", "no known model has: decoder.mid.attn_1"),
        ("decoder.mid.attn_1.q.", "decoder.mid.attn_2.q.", "no known model has: decoder.mid.attn_2.q"),
        ("encoder.conv_in.", "encoder.conv_first.", "encoder.conv_in.weight is missing"),
        ("decoder.conv_out.", "decoder.conv_last.", "decoder.conv_out.weight is missing"),
        ("post_quant_conv.", "quantize.", "post_quant_conv.weight is missing"),
        ("encoder.down.0.", "encoder.down.7.", r"encoder.down.*is not complete: layer 0 is missing"),
        ("encoder.down.0.block.0.conv2.", "encoder.down.0.block.0.conv3.", "conv2.weight is missing"),
    ],
)
def test_what_an_autoencoder_lacks_is_named(sd15, tmp_path, old, new, said):
    path = saved(renamed(sd15, {VAE + old: VAE + new}), tmp_path / "odd.safetensors")
    with pytest.raises(PriorError, match=said) as error:
        load_prior(path)
    assert "odd.safetensors" in str(error.value)


def test_a_part_that_is_there_twice_is_refused(sd15, tmp_path):
    twice = sd15 | {f"{VAE}decoder.mid.attn_1.query.weight": sd15[f"{VAE}decoder.mid.attn_1.q.weight"]}
    with pytest.raises(PriorError, match="has one part twice: decoder.mid.attn_1.q.weight and .*query.weight"):
        load_prior(saved(twice, tmp_path / "twice.safetensors"))


# --- The UNet ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drop", "add", "said"),
    [
        ("input_blocks.1.0.out_layers.3.", {}, "input_blocks.1.0.out_layers.3.weight of its UNet is missing"),
        ("out.2.", {}, "out.2.weight is missing"),
        ("input_blocks.1.1.proj_in", {"input_blocks.1.1.proj_in.weight": (32,)}, "proj_in.weight is of another shape"),
        ("", {"input_blocks.0.0.weight": (4,)}, "0 input channels, not 4"),
        ("", {"out.2.weight": (4, 32)}, r"out.2.weight has shape \(4, 32\), not one of 4 dimensions"),
        ("", {"input_blocks.x.0.weight": (1,)}, "no known model has: input_blocks.x.0.weight"),
        ("", {"input_blocks.0.0.op.weight": (1,)}, "has -1 blocks in a level"),
        ("", {"input_blocks.99999.0.op.weight": (1,)}, "is not complete: layer 4 is missing"),
        ("", {f"input_blocks.{i}.0.op.bias": (1,) for i in range(100_00)}, "10,000 layers: no known model has more"),
        ("", {f"input_blocks.1.1.transformer_blocks.{i}.x": (1,) for i in range(99)}, "99 layers: no known"),
    ],
)
def test_what_a_unet_lacks_is_named(sd15, tmp_path, drop, add, said):
    state = {k: v for k, v in sd15.items() if not drop or not k.startswith(UNET + drop)}
    state |= {UNET + name: torch.zeros(shape) for name, shape in add.items()}
    with pytest.raises(PriorError, match=said) as error:
        load_prior(saved(state, tmp_path / "odd.safetensors"))
    assert "odd.safetensors" in str(error.value)


def test_few_names_do_not_build_many_layers(tmp_path):
    """16 levels of 16 blocks with 60 transformers each would be a hundred thousand layers."""
    shapes = {"out.2.weight": (4, 32, 3, 3), "input_blocks.0.0.weight": (32, 4, 3, 3)}
    for place in range(1, 16 * 17):
        shapes[f"input_blocks.{place}.0.{'op' if place % 17 == 0 else 'out_layers.3'}.weight"] = (32, 32, 3, 3)
    for place in range(1, 16 * 17, 17):
        for i in range(60):
            shapes[f"input_blocks.{place}.1.transformer_blocks.{i}.attn2.to_k.weight"] = (32, 8)
    shapes["input_blocks.1.1.proj_in.weight"] = (32, 32)
    with pytest.raises(PriorError, match="is not complete: it has"):
        ldm_keys.unet_config(shapes)


def test_quantized_weights_are_refused(sd15, tmp_path):
    name = f"{UNET}out.2.weight"
    for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64):
        path = saved(sd15 | {name: torch.ones(sd15[name].shape, dtype=dtype)}, tmp_path / "q.safetensors")
        with pytest.raises(PriorError, match=f"out.2.weight is stored as {str(dtype)[6:]}: quantized"):
            load_prior(path)
    eight = {k: v.to(torch.float8_e4m3fn) if k.startswith(UNET) else v for k, v in sd15.items()}
    unet = load_prior(saved(eight, tmp_path / "f8.safetensors")).denoiser.unet
    assert torch.equal(unet.conv_out.weight, eight[name].float())


# --- What lies beside a file -------------------------------------------------------------------------------------


FOREIGN = {
    "json_model_null": (CASES / "json_model_null.json").read_text(),
    "json_model_str": (CASES / "json_model_str.json").read_text(),
    "gallery": json.dumps({"description": "nice", "sd version": "SD1", "model": {"name": "x", "type": "Checkpoint"}}),
    "web interface": json.dumps({"vae": "some.safetensors", "notes": "", "preferred weight": 0}),
    "null": "null",
    "text": '"512x512"',
    "list": "[1, 2]",
    "nothing": "{}",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_notes_beside_a_file_are_passed_over(sd15, tmp_path, name):
    path = saved(sd15, tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_text(FOREIGN[name])
    metadata = open_loader(path).metadata(None)
    assert metadata.notes == (f"{tmp_path / 'model.json'} was passed over: it has none of a model's settings",)
    assert metadata.image_size == (128, 128) and load_prior(path).kind == "image"
    (tmp_path / "model.yaml").write_text("model: {params: {image_size: 32, parameterization: v}}")  # this one is
    assert open_loader(path).metadata(None).image_size == (64, 64)
    assert load_prior(path).denoiser.prediction_type == "v_prediction"


BAD = {
    "json_image_size_str": (
        (CASES / "json_image_size_str.json").read_text(),
        "image_size must be a whole number, got '512x512'",
    ),
    "no json": ("{", "model.json is not valid JSON"),
    "deep": ("[" * 100_000, "nested too deep"),
    "page": ("<!DOCTYPE html><html>", "is a web page"),
    "nan": ('{"linear_start": NaN}', "linear_start must be a number, got nan"),
    "huge steps": ('{"timesteps": 1000000000}', r"timesteps must lie in \[2, 10000\], got 1000000000"),
    "half a step": ('{"timesteps": 1000.5}', "timesteps must be a whole number, got 1000.5"),
    "order": ('{"linear_start": 0.5, "linear_end": 0.1}', "linear_end must lie in"),
    "scale": ('{"scale_factor": 0}', "scale_factor must lie in"),
    "unet list": ('{"unet_config": [1]}', r"unet_config must hold an object, got \[1\]"),
    "unet text": ('{"unet_config": {"params": "x"}}', "unet_config.params must hold an object, got 'x'"),
    "heads": ('{"unet_config": {"params": {"num_heads": 1000000000}}}', "num_heads is 1000000000, which doesn't fit"),
    "head width": ('{"unet_config": {"params": {"num_head_channels": 7}}}', "num_head_channels is 7, which doesn't"),
    "heads text": ('{"unet_config": {"params": {"num_heads": "8"}}}', "num_heads must be a whole number, got '8'"),
    "parameterization": ('{"parameterization": 3}', "parameterization must be text, got 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_cannot_be_meant_are_named(sd15, tmp_path, name):
    text, said = BAD[name]
    path = saved(sd15, tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(PriorError, match=said) as error:
        open_loader(path).metadata(None)
    assert "model.json" in str(error.value) and "\n" not in str(error.value)


def test_yaml_that_grows_without_end_is_refused(sd15, tmp_path):
    path = saved(sd15, tmp_path / "model.safetensors")
    lines = ["image_size: 64", "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "model.yaml").write_text("\n".join(lines))
    with pytest.raises(PriorError, match="model.yaml.*grows without end"):
        open_loader(path)


def test_nulls_are_as_if_not_there(sd15, tmp_path):
    path = saved(sd15, tmp_path / "model.safetensors")
    fields = dict.fromkeys(("image_size", "timesteps", "parameterization", "unet_config", "scale_factor"))
    (tmp_path / "model.json").write_text(json.dumps({"model": {"params": fields}}))
    assert open_loader(path).metadata(None).image_size == (128, 128)


def test_given_settings_must_be_some(sd15, tmp_path):
    path = saved(sd15, tmp_path / "model.safetensors")
    (tmp_path / "other.json").write_text('{"description": "nice"}')
    for given in (tmp_path / "other.json", {"colour": 1}):
        with pytest.raises(PriorError, match="has none of a model's settings"):
            load_prior(path, config=given)
    assert load_prior(path, config={}).kind == "image"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unet": [1]}, r"unet must hold an object, got \[1\]"),
        ({"unet": {"layers_per_block": 100_000}}, "layers_per_block is 100000; the file has"),
        ({"unet": {"block_out_channels": [32] * 1000}}, "block_out_channels has 1,000 entries"),
        ({"unet": {"block_out_channels": ["a"]}}, r"its UNet: block_out_channels must be a list, got \['a'\]"),
        ({"unet": {"sample_size": "x"}}, "image_size must be .height, width. in pixels"),
        ({"scheduler": None}, "has no 'scheduler'"),
        ({"scheduler": {"num_train_timesteps": 10**9}}, "num_train_timesteps is 1,000,000,000; 2 to 100,000"),
        ({"scheduler": {"beta_schedule": "curly"}}, "scheduler: beta_schedule is 'curly'"),
        ({"dream4d": "x"}, "dream4d must hold an object"),
        ({"dream4d": {"kind": 3}}, "kind must be text, got 3"),
        ({"dream4d": {"image_size": [10**9, 8]}}, "image_size must be"),
        ({"dream4d": {"n_frames": "4"}}, "n_frames must be a whole number"),
        ({"vae": {"block_out_channels": "wide"}}, "block_out_channels must be a list"),
    ],
)
def test_configurations_of_networks_are_checked(tmp_path, changes, said):
    path = saved({"unet.conv_in.weight": torch.zeros(1), "vae.a": torch.zeros(1)}, tmp_path / "n.safetensors")
    whole = {"unet": {"block_out_channels": [32]}, "scheduler": {}, "vae": {"block_out_channels": [8]}} | changes
    (tmp_path / "n.json").write_text(json.dumps(whole))
    with pytest.raises(PriorError, match=said) as error:
        load_prior(path)
    assert "n.json" in str(error.value) or "n.safetensors" in str(error.value)


# --- What a Stable Diffusion 2 predicts --------------------------------------------------------------------------


MARK = f"{UNET}output_blocks.3.1.transformer_blocks.0.norm1.bias"  # the last block of the small UNet


def spread(state, amount: float):
    values = torch.linspace(-1, 1, state[MARK].numel())
    return state | {MARK: amount * values / values.std(correction=0)}


def test_v_models_are_told_by_their_weights(sd21, tmp_path):
    for amount, kind, size, word in ((0.11, "v_prediction", 96, "v-model"), (0.07, "epsilon", 64, "predicts noise")):
        source = open_loader(saved(spread(sd21, amount), tmp_path / "sd2.safetensors"))
        metadata = source.metadata(None)
        assert source.schedule()[1] == kind and metadata.image_size == (2 * size, 2 * size)  # a small autoencoder
        assert len(metadata.notes) == 2 and word in metadata.notes[0] and "norm1.bias" in metadata.notes[0]
        assert f"{8 * size} pixels were assumed" in metadata.notes[1]


def test_what_is_said_of_a_model_needs_no_guess(sd21, tmp_path):
    path = saved(spread(sd21, 0.2), tmp_path / "sd2.safetensors")
    source = open_loader(path, {"parameterization": "eps", "image_size": 64})
    assert source.schedule()[1] == "epsilon" and source.metadata(None).notes == ()
    header = {"modelspec.prediction_type": "epsilon", "modelspec.resolution": "768x768"}
    save_file(spread(sd21, 0.2), path, header)
    source = open_loader(path)
    assert source.schedule()[1] == "epsilon" and source.metadata(None).image_size == (192, 192)
    assert source.metadata(None).notes == ()
    save_file(sd21 | {"v_pred": torch.zeros(0)}, path)
    assert open_loader(path).schedule()[1] == "v_prediction"
    with pytest.raises(PriorError, match="unknown parameterization 'flow'"):
        save_file(sd21, path, {"modelspec.prediction_type": "flow"})
        open_loader(path).metadata(None)


@pytest.mark.parametrize("name", ["sd15", "mvdream", "zero123"])
def test_other_models_are_not_guessed_at(tmp_path, name):
    state = layout.random_state(small_checkpoint(name))
    source = open_loader(saved(state | ({MARK: 10 * state[MARK]}), tmp_path / "m.safetensors"))
    assert source.schedule()[1] == "epsilon" and source.metadata(None).notes == ()


def test_what_was_assumed_is_kept_by_a_conversion_and_said(sd21, tmp_path):
    done = convert(saved(spread(sd21, 0.11), tmp_path / "sd2.safetensors"), tmp_path / "folder")
    assert "v-model" in done.notes[0]
    prior = load_prior(done.folder)
    assert prior.denoiser.prediction_type == "v_prediction" and prior.denoiser.image_size == (192, 192)


# --- Folders with bad files in them ------------------------------------------------------------------------------


def test_no_file_ends_the_scan_of_a_folder(sd15, tmp_path):
    saved(sd15, tmp_path / "z.safetensors")
    for case in ("lfs.ckpt", "lfs.safetensors", "page.ckpt", "page.safetensors"):
        shutil.copy(CASES / case, tmp_path / f"case_{case}")
    for name, text in (BAD | {"surrogate": ('{"image_size": "\\ud800"}', "")}).items():
        os.link(tmp_path / "z.safetensors", tmp_path / f"{name.replace(' ', '_')}.safetensors")
        (tmp_path / f"{name.replace(' ', '_')}.json").write_text(text[0])
    for name, content in (("deep", "[" * 10**6), ("null", "null"), ("text", '"x"'), ("bytes", "\udcff")):
        (tmp_path / f"folder_{name}").mkdir()
        for file in ("model_index.json", "config.json"):
            (tmp_path / f"folder_{name}" / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty.bin").write_bytes(b"")
    found = {one.path.name for one in identify_all(tmp_path)}
    assert "z.safetensors" in found and not found & {"case_lfs.ckpt", "case_page.ckpt", "empty.bin", "deep.safetensors"}
    assert identify(tmp_path / "z.safetensors").kind == "image"
