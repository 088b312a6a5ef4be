"""Models in one file, with random numbers under the full-size files' names, and the folders made of them."""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import ldm_layout as layout
import pytest
import torch
import torch.nn.functional as functional
from ldm_layout import WIDTH, small_checkpoint
from places import ROOT
from safetensors.torch import load_file, save_file

from dream4d_engine.cameras import make_cameras, orbit
from dream4d_engine.guidance.denoiser import Conditions
from dream4d_engine.priors.conditioning import clip_pixels, embed_image, image_conditions, text_conditions
from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.files import prior_files
from dream4d_engine.priors.formats.checkpoints import open_checkpoint
from dream4d_engine.priors.formats.convert import convert
from dream4d_engine.priors.formats.identify import identify, identify_all
from dream4d_engine.priors.formats.tiny_vae import TinyDecoder
from dream4d_engine.priors.loading import load_prior

KINDS = {"sd15": "image", "sd21": "image", "mvdream": "multiview", "zero123": "novel_view"}
FILES = {"sd15": "sd15.safetensors", "sd21": "sd21.ckpt", "mvdream": "mvdream.pt", "zero123": "zero123.ckpt"}


@pytest.fixture(scope="module")
def states():
    return {name: layout.random_state(small_checkpoint(name), seed) for seed, name in enumerate(KINDS)}


@pytest.fixture(scope="module")
def files(tmp_path_factory, states) -> dict[str, Path]:
    """Each as its full-size original was saved: tensors alone, under `state_dict`, beside a training's state."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_file(states["sd15"], folder / FILES["sd15"])
    torch.save({"state_dict": states["sd21"], "global_step": 220000}, folder / FILES["sd21"])
    torch.save(OrderedDict(states["mvdream"]), folder / FILES["mvdream"])
    torch.save({"state_dict": states["zero123"], "epoch": 3, "optimizer_states": [{}]}, folder / FILES["zero123"])
    return {name: folder / file for name, file in FILES.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, files) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("converted")
    return {name: convert(path, root / name, KINDS[name]).folder for name, path in files.items()}


def conditions_of(prior):
    cameras = orbit(4, 16, 16)
    if prior.kind == "novel_view":
        image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(3))
        return image_conditions(prior, image, make_cameras(0.0, 0.0, 3.0, 0.7, 0.0, 16, 16))(cameras)
    return text_conditions(prior, "a blue cat!! on a café's table", "ugly")(cameras)


def answers(prior) -> list[torch.Tensor]:
    """What a prior makes of an image and of noise under both conditions."""
    generator, both = torch.Generator().manual_seed(1), conditions_of(prior)
    side = 8 if both[0].concat is None else both[0].concat.shape[-1]
    x = torch.randn(1, 4, 4, side, side, generator=generator)
    z = prior.denoiser.encode(torch.rand(1, 4, 3, 16, 16, generator=generator))
    return [z, prior.denoiser.decode(z), *(prior.denoiser.denoise(x, torch.tensor([2.0]), c) for c in both)]


@pytest.mark.parametrize("name", KINDS)
def test_checkpoints_load_and_their_folders_give_the_same(files, folders, name):
    prior, converted = load_prior(files[name]), load_prior(folders[name])
    for one in (prior, converted):
        assert one.kind == KINDS[name] and one.name == name
        assert one.denoiser.image_size == ((128, 128) if one.kind == "image" else (64, 64))  # latents of 64 and 32
        assert one.denoiser.prediction_type == "epsilon" and one.denoiser.group_attention == (name == "mvdream")
    for ours, theirs in zip(answers(prior), answers(converted), strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    text, negative = conditions_of(prior)
    assert not torch.equal(text.tokens, negative.tokens)
    names = {path.name for path in folders[name].iterdir()}
    assert names >= {"model_index.json", "unet", "vae", "scheduler"}
    assert all(path.suffix in (".json", ".safetensors", ".txt") for path in folders[name].rglob("*.*"))


@pytest.mark.parametrize("name", KINDS)
def test_paths_are_identified(files, folders, name):
    assert (identify(files[name]).layout, identify(files[name]).kind) == ("checkpoint", KINDS[name])
    assert (identify(folders[name]).layout, identify(folders[name]).kind) == ("diffusers folder", KINDS[name])


def test_all_of_a_folder_is_identified(files, tmp_path):
    (tmp_path / "deep").mkdir()
    os.link(files["sd15"], tmp_path / "deep" / "sd15.safetensors")
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    found = identify_all(tmp_path)
    assert [(one.path.name, one.kind) for one in found] == [("sd15.safetensors", "image")]


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_diffusers_own_loader_reads_the_same(files, states, folders, name):
    """`from_single_file` fills the networks of the converted folder with the very same numbers."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    ours = load_prior(files[name]).denoiser
    for network, network_class, part in ((ours.unet, UNet2DConditionModel, "unet"), (ours.vae, AutoencoderKL, "vae")):
        config = str(folders[name])
        theirs = network_class.from_single_file(
            dict(states[name]), config=config, subfolder=part, local_files_only=True
        )
        state = theirs.state_dict()
        assert state.keys() == network.state_dict().keys()
        for key, value in network.state_dict().items():
            torch.testing.assert_close(value, state[key].reshape(value.shape), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_diffusers_pipeline_loads_the_converted_folder(folders, name):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folders[name], local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    hidden, _ = pipeline.encode_prompt("a red cube", "cpu", 1, False)
    ours = load_prior(folders[name]).encode_text(["a red cube"])
    torch.testing.assert_close(hidden, ours, rtol=1e-4, atol=1e-4)


# --- Encoders, against plain formulas ----------------------------------------------------------------------------


def norm(state, name, x):
    return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def block(state, name, x, mask, gelu):
    """A residual attention block of OpenAI's CLIP and OpenCLIP; x [n, L, D]."""
    width, y = x.shape[-1], norm(state, f"{name}.ln_1", x).transpose(0, 1)
    attended, _ = functional.multi_head_attention_forward(
        y,
        y,
        y,
        width,
        width // 64,
        state[f"{name}.attn.in_proj_weight"],
        state[f"{name}.attn.in_proj_bias"],
        None,
        None,
        False,
        0.0,
        state[f"{name}.attn.out_proj.weight"],
        state[f"{name}.attn.out_proj.bias"],
        training=False,
        need_weights=False,
        attn_mask=mask,
    )
    x = x + attended.transpose(0, 1)
    wide = functional.linear(
        norm(state, f"{name}.ln_2", x), state[f"{name}.mlp.c_fc.weight"], state[f"{name}.mlp.c_fc.bias"]
    )
    return x + functional.linear(gelu(wide), state[f"{name}.mlp.c_proj.weight"], state[f"{name}.mlp.c_proj.bias"])


def test_open_clip_is_read_at_its_last_but_one_layer(files, states):
    """Padded with zeros, and `!!` is one ordinary word."""
    model = {k.removeprefix("cond_stage_model.model."): v for k, v in states["mvdream"].items()}
    ids = torch.tensor([[49406, 320, 2368, 748, 49407] + [0] * 72])  # a cat!!
    x = model["token_embedding.weight"][ids] + model["positional_embedding"]
    mask = torch.full((77, 77), -torch.inf).triu(1)
    for i in range(2):  # of three
        x = block(model, f"transformer.resblocks.{i}", x, mask, functional.gelu)
    expected = norm(model, "ln_final", x)
    ours = load_prior(files["mvdream"]).encode_text(["a cat!!"])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_clip_image_encoder(files, states):
    root = "cond_stage_model.model.visual."
    model = {k.removeprefix(root): v for k, v in states["zero123"].items() if k.startswith(root)}
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = functional.conv2d(clip_pixels(images, 32), model["conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat((model["class_embedding"].expand(2, 1, -1), x), 1) + model["positional_embedding"]
    x = norm(model, "ln_pre", x)
    for i in range(2):
        x = block(model, f"transformer.resblocks.{i}", x, None, lambda y: y * torch.sigmoid(1.702 * y))
    expected = norm(model, "ln_post", x[:, 0]) @ model["proj"]
    ours = embed_image(load_prior(files["zero123"]), images)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_corners_stay_in_place_without_antialiasing():
    """Zero123's way of resizing: the corner pixels are those of the image."""
    images = torch.rand(1, 3, 50, 50, generator=torch.Generator().manual_seed(0))
    corners, usual = clip_pixels(images, 20, "corners"), clip_pixels(images, 20)
    unchanged = clip_pixels(images, 50, "corners")
    torch.testing.assert_close(corners[..., ::19, ::19], unchanged[..., ::49, ::49], rtol=1e-4, atol=1e-4)
    assert (corners - usual).abs().max() > 0.1


# --- What checkpoints leave open ---------------------------------------------------------------------------------


def test_configuration_beside_the_file_or_given(files, tmp_path):
    path = tmp_path / "sd21.ckpt"
    os.link(files["sd21"], path)
    unet = {"params": {"num_head_channels": 16}}
    settings = {"parameterization": "v", "image_size": 96, "linear_end": 0.02, "scale_factor": 0.2, "unet_config": unet}
    given = load_prior(path, config=settings)
    (tmp_path / "sd21.yaml").write_text(json.dumps({"model": {"target": "a.b.C", "params": settings}}))  # JSON is YAML
    beside = load_prior(path)
    for prior in (given, beside):
        denoiser = prior.denoiser
        assert denoiser.prediction_type == "v_prediction" and denoiser.image_size == (192, 192)
        assert denoiser.vae.config.scaling_factor == 0.2
        assert denoiser.unet.config.attention_head_dim == (2, 4)
        expected = 1 - torch.linspace(0.00085**0.5, 0.02**0.5, 1000) ** 2
        torch.testing.assert_close(denoiser.noise.alphas_bar, expected.cumprod(0), rtol=1e-4, atol=1e-6)
    assert load_prior(convert(path, tmp_path / "folder").folder).denoiser.prediction_type == "v_prediction"
    with pytest.raises(PriorError, match="unknown parameterization 'flow'"):
        load_prior(path, config={"parameterization": "flow"})


def test_another_schedule_in_the_file_is_the_one(states, tmp_path):
    betas = torch.linspace(1e-4, 0.03, 500)
    torch.save(states["sd21"] | {"betas": betas}, tmp_path / "odd.ckpt")
    alphas_bar = load_prior(tmp_path / "odd.ckpt").denoiser.noise.alphas_bar
    torch.testing.assert_close(alphas_bar, (1 - betas).cumprod(0), rtol=1e-4, atol=1e-6)
    folder = convert(tmp_path / "odd.ckpt", tmp_path / "folder").folder
    torch.testing.assert_close(load_prior(folder).denoiser.noise.alphas_bar, alphas_bar, rtol=1e-5, atol=1e-7)


def test_running_means_are_used_where_they_are_all_there(states, tmp_path):
    root = "model.diffusion_model."
    means = {
        f"model_ema.diffusion_model{k.removeprefix(root).replace('.', '')}": v + 1
        for k, v in states["zero123"].items()
        if k.startswith(root)
    }
    torch.save({"state_dict": states["zero123"] | means | {"model_ema.decay": torch.tensor(0.99)}}, tmp_path / "a.ckpt")
    unet = load_prior(tmp_path / "a.ckpt").denoiser.unet
    torch.testing.assert_close(unet.conv_in.bias.data, states["zero123"][f"{root}input_blocks.0.0.bias"] + 1)
    means.popitem()
    torch.save({"state_dict": states["zero123"] | means}, tmp_path / "b.ckpt")
    unet = load_prior(tmp_path / "b.ckpt").denoiser.unet
    torch.testing.assert_close(unet.conv_in.bias.data, states["zero123"][f"{root}input_blocks.0.0.bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(files, tmp_path, dtype):
    prior = load_prior(files["mvdream"], dtype=dtype)
    assert prior.denoiser.dtype == dtype
    z = prior.denoiser.encode(torch.rand(1, 4, 3, 16, 16))
    conditions = Conditions(torch.randn(1, 4, 77, WIDTH), torch.randn(1, 4, 16))
    assert z.dtype == torch.float32
    assert torch.isfinite(prior.denoiser.denoise(z, torch.ones(1), conditions)).all()
    done = convert(files["mvdream"], tmp_path / "folder", dtype=dtype)
    weights = load_file(done.folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert done.parts == ("unet", "vae", "scheduler", "text_encoder", "tokenizer")


def test_sizes_can_be_given(files):
    denoiser = load_prior(files["mvdream"], image_size=(32, 48), n_frames=2).denoiser
    assert denoiser.image_size == (32, 48) and denoiser.n_frames == 2


# --- Prompts -----------------------------------------------------------------------------------------------------


def test_long_prompts_are_cut_with_a_warning(files, caplog):
    prior = load_prior(files["sd21"])
    with caplog.at_level(logging.WARNING):
        prior.encode_text(["a cat " * 30 + "in the very last corner"])
        assert not caplog.records
        hidden = prior.encode_text(["a cat " * 36 + "in the very last corner"])
    assert hidden.shape == (1, 77, WIDTH)
    assert [record.getMessage() for record in caplog.records] == [
        "the prompt is longer than the text encoder's 77 tokens; this end is cut: 'last corner'"
    ]


# --- The tiny autoencoder ----------------------------------------------------------------------------------------


SMALL_TINY = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    tiny = AutoencoderTiny(**SMALL_TINY, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    folder = tmp_path_factory.mktemp("tiny") / "taesd"
    tiny.save_pretrained(folder)
    return folder, tiny.eval()


@pytest.mark.parametrize("name", ["sd21", "zero123"])
def test_tiny_autoencoder_takes_the_place_of_the_full_one(files, tiny_vae, name):
    folder, tiny = tiny_vae
    prior = load_prior(files[name], tiny_vae=folder)
    images = torch.rand(1, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    z = prior.denoiser.encode(images)
    with torch.no_grad():
        torch.testing.assert_close(z[0], tiny.encode(2 * images[0] - 1).latents, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            prior.denoiser.decode(z)[0], tiny.decode(z[0]).sample / 2 + 0.5, rtol=1e-4, atol=1e-5
        )
    z.sum().backward()
    assert images.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in prior.denoiser.vae.parameters())
    if name == "zero123":  # its reference is the latent before scaling
        text, _ = conditions_of(prior)
        image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(3))
        resized = functional.interpolate(image[None], (64, 64), mode="bilinear", antialias=True)
        with torch.no_grad():
            expected = tiny.encode(2 * resized - 1).latents / 0.18215
        torch.testing.assert_close(text.concat[0, 0], expected[0], rtol=1e-4, atol=1e-4)


def test_a_tiny_decoder_shows_what_the_full_encoder_sees(files, tiny_vae):
    folder, tiny = tiny_vae
    full, both = load_prior(files["sd21"]), load_prior(files["sd21"], tiny_vae=TinyDecoder(folder))
    images = torch.rand(1, 2, 3, *full.denoiser.image_size, generator=torch.Generator().manual_seed(1))
    pulled = []
    for prior in (full, both):
        given = images.clone().requires_grad_()
        z = prior.denoiser.encode(given)
        z.square().sum().backward()
        pulled.append((z.detach(), given.grad))
    torch.testing.assert_close(pulled[1], pulled[0], rtol=0, atol=0)
    with torch.no_grad():
        shown = both.denoiser.decode(pulled[0][0])
        torch.testing.assert_close(shown[0], tiny.decode(pulled[0][0][0]).sample / 2 + 0.5, rtol=1e-4, atol=1e-5)
    assert not any(name.startswith("full.decoder") for name in both.denoiser.vae.state_dict()), "its memory is free"


def test_tiny_autoencoder_errors(files, folders, tiny_vae, tmp_path):
    assert identify(tiny_vae[0]).layout == "tiny autoencoder"
    with pytest.raises(PriorError, match="there is no model folder"):
        load_prior(files["sd21"], tiny_vae=tmp_path / "nowhere")
    with pytest.raises(PriorError, match="AutoencoderKL, not an AutoencoderTiny"):
        load_prior(files["sd21"], tiny_vae=folders["sd21"])
    with pytest.raises(PriorError, match="config.json is no AutoencoderTiny: give the folder"):
        load_prior(files["sd21"], tiny_vae=tiny_vae[0] / "config.json")
    pixel = ROOT / "dream4d_engine" / "priors" / "toy" / "pixel"
    with pytest.raises(PriorError, match="works on pixels"):
        load_prior(pixel, tiny_vae=tiny_vae[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent_channels": 16}, "of 16 channels, 2 times smaller than images; .* reads 4 channels, 2 times smaller"),
        ({"encoder_block_out_channels": [8] * 4}, "of 4 channels, 8 times smaller than images; .* reads 4 channels, 2"),
        ({"encoder_block_out_channels": []}, "encoder_block_out_channels has 0 entries"),
    ],
)
@pytest.mark.parametrize("part", [Path, TinyDecoder])
def test_a_tiny_autoencoder_of_other_latents_is_refused_before_its_weights_are_read(
    files, folders, tmp_path, change, words, part
):
    """Of another family's: it failed in the first step, or gave latents of another size without a word."""
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny", **SMALL_TINY, **change}))
    for model in (files["sd21"], folders["sd21"]):
        with pytest.raises(PriorError, match=words):
            load_prior(model, tiny_vae=part(tmp_path))
        with pytest.raises(PriorError, match=words):
            replace(prior_files(model), tiny_vae=part(tmp_path)).check_added()


# --- Bad files ---------------------------------------------------------------------------------------------------


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickle_bombs_are_refused(states, tmp_path, new_format):
    mark = tmp_path / "exploded"
    path = tmp_path / "bomb.ckpt"
    torch.save(
        {"state_dict": dict(states["sd21"]), "callbacks": Bomb(mark)}, path, _use_new_zipfile_serialization=new_format
    )
    for attempt in (load_prior, identify, lambda p: convert(p, tmp_path / "out")):
        with pytest.raises(PriorError, match="was not opened: it is a pickle that holds more than w.*safetensors"):
            attempt(path)
    assert not mark.exists()


def test_lightning_callbacks_are_passed_over(states, tmp_path, monkeypatch):
    """Their classes are not here, and would not be needed; the tensors are read all the same."""
    import sys
    import types

    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kept = type("ModelCheckpoint", (), {"__module__": names[-1]})
    sys.modules[names[-1]].ModelCheckpoint = kept
    callback = kept()
    callback.best = 3
    torch.save({"state_dict": states["zero123"], "callbacks": {kept: {"best": 1}, "it": callback}}, tmp_path / "z.ckpt")
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    assert load_prior(tmp_path / "z.ckpt").kind == "novel_view"


def test_bad_files(files, states, tmp_path):
    def fails(name, words, content=None, **saved):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        elif path.suffix == ".safetensors":
            save_file(saved["state"], path)
        elif saved:
            torch.save(saved["state"], path)
        with pytest.raises(PriorError, match=words):
            load_prior(path)

    fails("nowhere.ckpt", "there is no file")
    fails("nowhere", "there is no model folder")
    fails("half.safetensors", "not a readable .safetensors", Path(files["sd15"]).read_bytes()[:5000])
    fails("half.ckpt", "can't be read.*download complete", Path(files["sd21"]).read_bytes()[:5000])
    fails("list.pt", "no table of weights but list", state=[torch.zeros(1)])
    fails("empty.pt", "holds no weights", state={"a": 1})
    fails("other.safetensors", "no model of a known kind: it holds thing", state={"thing": torch.zeros(1)})
    fails("lora.safetensors", "is a LoRA", state={"unet.a.lora_A.weight": torch.zeros(1, 1)})
    key = "model.diffusion_model.out.2.bias"
    fails("hole.pt", "its UNet does not fit: conv_out.bias is missing", state={**states["sd21"]} | {key: 1})
    some = {k: v for k, v in states["sd21"].items() if not k.startswith("first_stage_model.")}
    fails("no_vae.pt", "has no autoencoder", state=some)
    other = states["sd21"] | {key: torch.zeros(5)}
    fails("shape.pt", "does not fit: conv_out.bias is of another shape", state=other)
    more = states["sd21"] | {"model.diffusion_model.output_blocks.0.7.odd.weight": torch.zeros(5)}
    fails("more.pt", "does not fit: up_blocks.0.resnets.0.odd.weight is not known", state=more)
    over_time = states["zero123"] | {"model.diffusion_model.input_blocks.1.0.time_stack.out.bias": torch.zeros(5)}
    over_time["model.diffusion_model.label_emb.0.0.weight"] = torch.zeros(5, 5)  # it was told to be SDXL's by this
    fails(
        "sv3d.safetensors", "of the kind of Stable Video Diffusion and SV3D; SV3D is read in ComfyUI", state=over_time
    )
    fails("networks.safetensors", "without their configuration", state={"unet.conv_in.weight": torch.zeros(1)})
    with pytest.raises(PriorError, match="of kind 'image' and can't be used as 'multiview'"):
        load_prior(files["sd21"], "multiview")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PriorError, match="bad.json is not valid JSON: Expecting property name"):
        load_prior(files["sd21"], config=tmp_path / "bad.json")


def test_encoders_that_are_not_there(files, states, tmp_path):
    some = {k: v for k, v in states["mvdream"].items() if not k.startswith("cond_stage_model.")}
    torch.save(some, tmp_path / "bare.pt")
    prior = load_prior(tmp_path / "bare.pt")
    with pytest.raises(PriorError, match="has no text encoder"):
        text_conditions(prior, "a cat")
    assert convert(tmp_path / "bare.pt", tmp_path / "bare").parts == ("unet", "vae", "scheduler")
    with pytest.raises(PriorError, match="text_encoder/config.json is missing"):
        text_conditions(load_prior(tmp_path / "bare"), "a cat")
    some = {k: v for k, v in states["zero123"].items() if not k.startswith("cond_stage_model.")}
    torch.save(some, tmp_path / "blind.pt")
    with pytest.raises(PriorError, match="has no image encoder"):
        conditions_of(load_prior(tmp_path / "blind.pt"))


def test_convert_refuses(files, folders, tmp_path):
    with pytest.raises(PriorError, match="there is nothing to convert"):
        convert(folders["sd21"], tmp_path / "out")
    with pytest.raises(PriorError, match="can't be used as 'novel_view'"):
        convert(files["sd21"], tmp_path / "out", "novel_view")
    (tmp_path / "taken").mkdir()
    with pytest.raises(PriorError, match="taken is there already"):
        convert(files["sd21"], tmp_path / "taken")
    assert convert(files["sd21"], tmp_path / "taken", overwrite=True).kind == "image"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]
    assert convert(files["mvdream"], tmp_path / "taken", overwrite=True).kind == "multiview"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_convert_replaces_only_models(files, tmp_path):
    """What else lies in a folder is never removed, nor the checkpoint itself."""
    import shutil

    models = tmp_path / "models"
    models.mkdir()
    (models / "other.safetensors").write_bytes(b"years of work")
    with pytest.raises(PriorError, match="models holds other.safetensors and is no model's folder"):
        convert(files["sd21"], models, overwrite=True)
    shutil.copy(files["sd21"], models / "sd.pt")
    (models / "model_index.json").write_text("{}")
    for folder in (models, tmp_path, models / ".." / "models"):
        with pytest.raises(PriorError, match="lies in .*, which would be replaced"):
            convert(models / "sd.pt", folder, overwrite=True)
    assert sorted(path.name for path in models.iterdir()) == ["model_index.json", "other.safetensors", "sd.pt"]


def test_missing_parts_of_folders_are_named(folders, tmp_path):
    import shutil

    def fails(part, words, **write):
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folders["zero123" if "camera" in part or "image" in part else "sd21"], folder)
        path = folder / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, text in write.items():
            (path.parent / name.replace("__", ".")).write_text(text)
        with pytest.raises(PriorError, match=words):
            load_prior(folder)

    fails("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors is missing")
    fails("tokenizer", "tokenizer/ is missing")
    fails("text_encoder", "text_encoder/config.json is missing")
    fails("image_encoder/model.safetensors", "image_encoder/model.safetensors is missing")
    fails("clip_camera_projection", "clip_camera_projection/diffusion_pytorch_model.safetensors is missing")
    shards = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    fails(
        "text_encoder/model.safetensors",
        "text_encoder/model-00001-of-00002.safetensors is missing",
        model__safetensors__index__json=shards,
    )


def test_open_checkpoint_reads_only_what_is_asked_for(files):
    file = open_checkpoint(files["mvdream"])
    assert file.shapes["model.diffusion_model.camera_embed.0.weight"] == (128, 16)
    assert len(file.under("first_stage_model.")) == len(layout.vae(32, (1, 2), 1))


def test_a_configuration_beside_a_file_makes_another_model_of_it(files, tmp_path):
    """Or a run that was finished before would be taken for one with it."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(Path(files["sd15"]).read_bytes())
    handle = prior_files(path)
    before = handle.fingerprint()
    beside = tmp_path / "model.json"
    beside.write_text('{"model": {"name": "from a gallery"}, "notes": "nice"}')
    assert handle.fingerprint() == before, "it is passed over where the model is loaded, too"
    beside.write_text('{"parameterization": "v"}')
    assert handle.fingerprint() != before
    beside.write_text("{")
    assert handle.fingerprint() != before


def test_what_galleries_write_beside_a_lora_changes_no_run(files, tmp_path):
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"any")
    prior = replace(prior_files(files["sd15"]), lora=lora)
    before = prior.fingerprint()
    (tmp_path / "lora.json").write_text('{"activation text": "sks"}')
    assert prior.fingerprint() == before
    lora.write_bytes(b"others")
    assert prior.fingerprint() != before
