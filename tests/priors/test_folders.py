"""Folders as diffusers' own pipelines are published, at small size and with random numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from prior_folders import WIDTH, image_folder, write_index, write_scheduler, write_text, write_vae
from safetensors.torch import load_file, save_file

from dream4d_engine.cameras import fixed_take, make_cameras, orbit
from dream4d_engine.priors.conditioning import image_conditions, text_conditions
from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.files import toy_folder
from dream4d_engine.priors.formats.identify import identify
from dream4d_engine.priors.loading import load_prior
from dream4d_engine.priors.networks.text import END, write_clip_tokenizer


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """ModelScope's layout."""
    from diffusers import UNet3DConditionModel

    folder = tmp_path_factory.mktemp("video") / "text-to-video-ms-1.7b"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet3DConditionModel(
            sample_size=32,
            block_out_channels=(32, 32),
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
        ).save_pretrained(folder / "unet")
        write_vae(folder)
        write_text(folder, "!")
    write_scheduler(folder)
    parts = {"unet": "diffusers.UNet3DConditionModel", "vae": "diffusers.AutoencoderKL"}
    parts |= {"text_encoder": "transformers.CLIPTextModel", "tokenizer": "transformers.CLIPTokenizer"}
    write_index(folder, "TextToVideoSDPipeline", **parts, scheduler="diffusers.DDIMScheduler")
    return folder


@pytest.fixture(scope="module")
def pixel(tmp_path_factory) -> Path:
    """DeepFloyd IF's layout: its blocks, projected T5 tokens that are also pooled into the time embedding."""
    from diffusers import UNet2DConditionModel
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("pixel") / "IF-I-XL-v1.0"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DConditionModel(
            sample_size=64,
            in_channels=3,
            out_channels=6,
            block_out_channels=(32, 32),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            layers_per_block=1,
            attention_head_dim=16,
            cross_attention_dim=WIDTH,
            encoder_hid_dim=16,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text",
            addition_embed_type_num_heads=4,
            cross_attention_norm="group_norm",
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
        ).save_pretrained(folder / "unet")
        t5 = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
        T5EncoderModel(t5).save_pretrained(folder / "text_encoder")
    shutil.copytree(toy_folder("pixel") / "tokenizer", folder / "tokenizer")
    settings = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 512}))
    write_scheduler(
        folder,
        _class_name="DDPMScheduler",
        beta_schedule="squaredcos_cap_v2",
        beta_start=0.0001,
        beta_end=0.02,
        variance_type="learned_range",
        thresholding=True,
    )
    parts = {"unet": "diffusers.UNet2DConditionModel", "text_encoder": "transformers.T5EncoderModel"}
    parts |= {"tokenizer": "transformers.T5Tokenizer", "safety_checker": "", "scheduler": "diffusers.DDPMScheduler"}
    write_index(folder, "IFPipeline", **parts)
    return folder


# --- Video -------------------------------------------------------------------------------------------------------


def test_modelscope(video):
    prior = load_prior(video)
    assert (prior.kind, prior.denoiser.n_frames, prior.denoiser.image_size) == ("video", 16, (64, 64))
    assert prior.denoiser.prediction_type == "epsilon" and prior.name == "text-to-video-ms-1.7b"
    cameras = fixed_take(3, 8, 8, azimuth_deg=0.0)
    text, _negative = text_conditions(prior, "a cat")(cameras)
    assert text.tokens.shape == (1, 3, 77, WIDTH) and text.vector is None
    z = prior.denoiser.encode(torch.rand(1, 3, 3, 16, 24))
    x = torch.randn(1, 3, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    answer = prior.denoiser.denoise(x, torch.ones(1), text)
    assert z.shape == answer.shape == x.shape and torch.isfinite(answer).all()


@pytest.mark.parametrize("name", ["zeroscope_v2_576w", "models--cerspense--zeroscope_v2_576w/snapshots/0abc"])
def test_zeroscope_is_known_by_its_name(video, tmp_path, name):
    """Its configuration names ModelScope's image size."""
    folder = tmp_path / name
    shutil.copytree(video, folder)
    prior = load_prior(folder)
    assert (prior.denoiser.n_frames, prior.denoiser.image_size) == (24, (320, 576))
    assert prior.name == "zeroscope_v2_576w"
    assert load_prior(folder, image_size=(40, 72), n_frames=8).denoiser.image_size == (40, 72)


@pytest.mark.parametrize("form", ["bin", "fp16", "fp16 bin", "pieces"])
def test_every_form_of_weights(video, tmp_path, form):
    """As .bin, as the half precision variant, as several files."""
    from diffusers import UNet3DConditionModel
    from transformers import CLIPTextModel

    folder = tmp_path / "video"
    shutil.copytree(video, folder)
    expected = load_prior(video)
    for part, network_class in (("unet", UNet3DConditionModel), ("text_encoder", CLIPTextModel)):
        stem = "diffusion_pytorch_model" if part == "unet" else "model"
        path = folder / part / f"{stem}.safetensors"
        state = load_file(path)
        if form == "pieces":
            network_class.from_pretrained(folder / part).save_pretrained(folder / part, max_shard_size="300KB")
            assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1
        if form == "bin":
            torch.save(state, folder / part / f"{stem if part == 'unet' else 'pytorch_model'}.bin")
        if form == "fp16":
            half = {name: tensor.half() for name, tensor in state.items()}
            save_file(half, folder / part / f"{stem}.fp16.safetensors", {"format": "pt"})
        if form == "fp16 bin":
            half = {name: tensor.half() for name, tensor in state.items()}
            torch.save(half, folder / part / f"{stem if part == 'unet' else 'pytorch_model'}.fp16.bin")
        path.unlink(missing_ok=True)
    prior = load_prior(folder)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if "fp16" in form else {}
    ours, theirs = (p.denoiser.unet.conv_in.weight for p in (prior, expected))
    torch.testing.assert_close(ours, theirs, **tolerance)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(prior.encode_text(["a cat"]), expected.encode_text(["a cat"]), **tolerance)
    if form == "pieces":
        next((folder / "unet").glob("*-00002-of-*.safetensors")).unlink()
        with pytest.raises(PriorError, match="unet/diffusion_pytorch_model-00002-of-.* is missing"):
            load_prior(folder)


# --- Images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_stable_diffusion(tmp_path, prediction_type):
    prior = load_prior(image_folder(tmp_path / "sd", prediction_type=prediction_type))
    assert (prior.kind, prior.denoiser.n_frames, prior.denoiser.image_size) == ("image", None, (192, 192))
    assert prior.denoiser.prediction_type == prediction_type
    text, _ = text_conditions(prior, "a cat")(orbit(2, 8, 8))
    x, step = torch.randn(1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 400
    alpha_bar = prior.denoiser.noise.alphas_bar[step]
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    noisy = x[0] * alpha_bar.sqrt()
    with torch.no_grad():
        output = prior.denoiser.unet(noisy, step, text.tokens[0]).sample
    if prediction_type == "epsilon":
        expected = (noisy - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt()
    else:
        expected = alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * output
    torch.testing.assert_close(prior.denoiser.denoise(x, sigma[None], text)[0], expected, rtol=1e-4, atol=1e-4)


def test_padding_follows_the_special_tokens(tmp_path):
    """Stable Diffusion 2's tokenizer_config.json names a padding that its special_tokens_map.json corrects."""
    folder = image_folder(tmp_path / "sd")
    prior = load_prior(folder)
    with_end = prior.encode_text(["a cat"])
    shutil.rmtree(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer", "!")
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": END}))
    with_zero = prior.encode_text(["a cat"])
    assert torch.equal(with_end[:, :4], with_zero[:, :4]) and not torch.equal(with_end[:, 4:], with_zero[:, 4:])
    # an exclamation mark of the prompt is a word, not padding
    assert not torch.equal(prior.encode_text(["a cat !"]), with_zero)
    assert identify(folder).kind == "image"


# --- Pixels ------------------------------------------------------------------------------------------------------


def test_deepfloyd_if(pixel):
    prior = load_prior(pixel)
    assert (prior.kind, prior.denoiser.image_size, prior.denoiser.vae) == ("pixel", (64, 64), None)
    text, negative = text_conditions(prior, "A red Cube", "a blue cone")(orbit(2, 8, 8))
    assert text.tokens.shape == (1, 2, 77, 16)
    x = torch.randn(1, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    answer = prior.denoiser.denoise(x, torch.ones(1), text)
    assert answer.shape == x.shape and torch.isfinite(answer).all()  # six channels came out of the network
    assert not torch.equal(answer, prior.denoiser.denoise(x, torch.ones(1), negative))


def test_deepfloyd_prompts_are_encoded_as_its_pipeline_does(pixel):
    from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
    from transformers import AutoTokenizer, T5EncoderModel

    pipeline = IFPipeline(
        tokenizer=AutoTokenizer.from_pretrained(pixel / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(pixel / "text_encoder"),
        unet=UNet2DConditionModel.from_pretrained(pixel / "unet"),
        scheduler=DDPMScheduler.from_pretrained(pixel / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt("A red Cube", do_classifier_free_guidance=False, device="cpu")
    torch.testing.assert_close(load_prior(pixel).encode_text(["A red Cube"]), theirs.float())


# --- Novel views -------------------------------------------------------------------------------------------------


def test_zero123_folder_with_a_bin_projection(tmp_path):
    """As the public folders are: without an entry of ours, so with Zero123's own way of resizing."""
    import ldm_layout as layout
    from ldm_layout import small_checkpoint

    from dream4d_engine.priors.formats.convert import convert

    torch.save(layout.random_state(small_checkpoint("zero123")), tmp_path / "zero123.pt")
    folder = convert(tmp_path / "zero123.pt", tmp_path / "zero123-xl-diffusers").folder
    index = json.loads((folder / "model_index.json").read_text())
    del index["dream4d"]
    (folder / "model_index.json").write_text(json.dumps(index))
    part = folder / "clip_camera_projection" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(part), part.with_suffix(".bin"))
    part.unlink()
    prior, original = load_prior(folder), load_prior(tmp_path / "zero123.pt")
    assert (prior.kind, prior.image_resize, prior.denoiser.image_size) == ("novel_view", "corners", (64, 64))
    image, reference = torch.rand(3, 90, 90), make_cameras(0.0, 0.0, 3.0, 0.7, 0.0, 8, 8)
    ours, theirs = (image_conditions(p, image, reference)(orbit(3, 8, 8))[0] for p in (prior, original))
    torch.testing.assert_close(ours.tokens, theirs.tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.concat, theirs.concat, rtol=1e-4, atol=1e-5)
    torch.save({"weight": torch.zeros(1)}, part.with_suffix(".bin"))
    with pytest.raises(PriorError, match=r"holds \['weight'\], not proj.weight and proj.bias"):
        image_conditions(load_prior(folder), image, reference)


def test_other_networks_are_refused(tmp_path):
    folder = image_folder(tmp_path / "sd")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "MultiViewUNetModel"}))
    with pytest.raises(PriorError, match="is a MultiViewUNetModel.*original checkpoint, dream4d convert"):
        load_prior(folder)
