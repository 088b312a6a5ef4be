"""Adapters, folders and conditions of the diffusion priors, on freshly initialised toy networks."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from dream4d_engine.cameras import fixed_take, make_cameras, orbit
from dream4d_engine.guidance.denoiser import Conditions, denoise_each
from dream4d_engine.guidance.distillation import DistillationConfig, distill
from dream4d_engine.guidance.noise import sigma_of_alpha_bar, variance_preserving
from dream4d_engine.priors.conditioning import (
    camera_vector,
    check_prompt,
    frame_time_vector,
    image_conditions,
    pose_vector,
    text_conditions,
    text_guidance,
)
from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.formats.configurations import noise_of
from dream4d_engine.priors.loading import load_prior
from dream4d_engine.priors.networks.denoisers import UNetDenoiser, predicted_clean
from dream4d_engine.randomness import Draw
from dream4d_engine.schedules import constant
from dream4d_engine.toyworld import datasets, models, train

SMALL = models.ToySize((8, 16, 16), (1, 1, 1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One small untrained prior of each kind, written as training writes them."""
    root = tmp_path_factory.mktemp("priors")
    torch.manual_seed(0)
    for kind in models.KINDS:
        models.save_prior(models.build_prior(kind, SMALL), kind, root / kind)
    return root


def cameras_of(kind):
    if kind == "video":
        return fixed_take(8, 32, 32, azimuth_deg=20.0)
    return orbit(4, 32, 32)


def conditions_of(prior):
    cameras = cameras_of(prior.kind)
    if prior.kind == "novel_view":
        image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(3))
        return image_conditions(prior, image, orbit(1, 32, 32, elevation_deg=0.0))(cameras)
    return text_conditions(prior, "a red cube is jumping")(cameras)


@pytest.mark.parametrize("kind", models.KINDS)
def test_folder_round_trip(folders, kind):
    """A saved folder loads, says what it is, and denoises its groups to finite images of the same shape."""
    prior = load_prior(folders / kind)
    assert prior.kind == kind and prior.denoiser.image_size == (32, 32)
    assert prior.denoiser.n_frames == {"multiview": 4, "video": 8}.get(kind)
    conditions = conditions_of(prior)
    x = 3 * torch.randn(1, cameras_of(kind).shape[1], 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text, negative = denoise_each(prior.denoiser, x, torch.tensor([3.0]), conditions)
    assert text.shape == x.shape and torch.isfinite(text).all()
    assert not torch.equal(text, negative)


def test_weights_are_half_precision(folders):
    from safetensors.torch import load_file

    state = load_file(str(folders / "image" / "unet" / "diffusion_pytorch_model.safetensors"))
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}


def test_scheduler_is_the_declared_one(folders):
    denoiser = load_prior(folders / "image").denoiser
    expected = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    assert torch.allclose(denoiser.noise.alphas_bar, expected, rtol=1e-5)
    assert denoiser.prediction_type == "v_prediction"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_exact_outputs_give_back_the_image(prediction_type):
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    sigma = torch.tensor([0.3, 20.0])
    alpha_bar = (1 / (1 + sigma**2))[:, None, None]
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * z
    output = {"epsilon": noise, "v_prediction": v, "sample": z}[prediction_type]
    x = z + sigma[:, None, None] * noise
    assert torch.allclose(predicted_clean(output, x, sigma, prediction_type), z, atol=1e-4)


class Recorder(torch.nn.Module):
    """A network that remembers its input and returns zeros with `channels` channels."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.channels = torch.nn.Parameter(torch.zeros(())), channels

    def forward(self, sample, timestep, tokens, **rest):
        self.sample, self.timestep, self.tokens, self.rest = sample, timestep, tokens, rest
        return (torch.zeros(len(sample), self.channels, *sample.shape[2:]),)


def test_model_input_is_variance_preserving():
    """x / sqrt(1 + sigma^2) at the nearest timestep; further output channels are ignored, further inputs appended."""
    alphas_bar = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    unet = Recorder(6)
    denoiser = UNetDenoiser(unet, variance_preserving(alphas_bar), "epsilon", (4, 4))
    sigma = sigma_of_alpha_bar(alphas_bar[[100, 700]])
    x = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    conditions = Conditions(torch.zeros(2, 3, 1, 8), concat=torch.ones(2, 3, 3, 4, 4))
    x0 = denoiser.denoise(x, sigma, conditions)
    assert torch.equal(x0, x)  # a predicted noise of zero
    assert unet.timestep.tolist() == [100] * 3 + [700] * 3
    expected = (x * alphas_bar[[100, 700]].sqrt()[:, None, None, None, None]).flatten(0, 1)
    assert torch.allclose(unet.sample[:, :3], expected, atol=1e-6)
    assert torch.equal(unet.sample[:, 3:], torch.ones(6, 3, 4, 4))


def test_group_attention_mixes_views_and_only_within_a_group(folders):
    prior = load_prior(folders / "multiview")
    text, _ = conditions_of(prior)
    both = Conditions(text.tokens.repeat(2, 1, 1, 1), text.vector.repeat(2, 1, 1))
    x = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0, 0] += 1
    sigma = torch.ones(2)
    difference = (prior.denoiser.denoise(changed, sigma, both) - prior.denoiser.denoise(x, sigma, both)).abs()
    assert (difference[0, 1:].amax((-1, -2, -3)) > 0).all()
    assert difference[1].max() < 1e-5


def test_single_images_are_independent(folders):
    prior = load_prior(folders / "image")
    text, _ = conditions_of(prior)
    x = torch.randn(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0, 0] += 1
    difference = prior.denoiser.denoise(changed, torch.ones(1), text) - prior.denoiser.denoise(x, torch.ones(1), text)
    assert difference[0, 1:].abs().max() < 1e-5


def test_group_attention_of_one_view_is_the_ordinary_one(folders):
    grouped = load_prior(folders / "multiview").denoiser
    conditions = Conditions(torch.randn(1, 1, 16, 64), torch.randn(1, 1, 16))
    x = torch.randn(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first = grouped.denoise(x, torch.ones(1), conditions)
    from diffusers.models.attention_processor import AttnProcessor2_0

    grouped.unet.set_attn_processor(AttnProcessor2_0())
    plain = UNetDenoiser(grouped.unet, grouped.noise, "v_prediction", (32, 32))
    assert torch.allclose(plain.denoise(x, torch.ones(1), conditions), first, atol=1e-4)


def test_pixels_encode_to_themselves_with_gradient(folders):
    denoiser = load_prior(folders / "pixel").denoiser
    images = torch.rand(1, 2, 3, 32, 32, requires_grad=True)
    z = denoiser.encode(images)
    assert torch.allclose(denoiser.decode(z), images, atol=1e-6)
    z.sum().backward()
    assert torch.equal(images.grad, torch.full_like(images, 2.0))


def test_distillation_runs_on_a_loaded_prior(folders):
    config = DistillationConfig(guidance_scale=3.0, min_noise=constant(0.5), max_noise=constant(0.5), loss="x0")
    guidance = text_guidance(load_prior(folders / "multiview"), "a red cube", None, config)
    images = torch.rand(1, 4, 3, 32, 32, requires_grad=True)
    distill(guidance, images, orbit(4, 32, 32), 0.0, Draw(0)).loss.backward()
    assert images.grad.abs().sum() > 0


# --- Conditions ------------------------------------------------------------------------------------------------


def test_camera_vector_has_unit_translation():
    cameras = orbit(5, 8, 8, distance=3.7)
    vector = camera_vector(cameras).reshape(1, 5, 4, 4)
    assert torch.allclose(vector[..., :3, 3].norm(dim=-1), torch.ones(1, 5))
    assert torch.equal(vector[..., :3, :3], cameras.c2w[..., :3, :3])
    assert torch.equal(cameras.c2w[..., :3, 3].norm(dim=-1) > 3, torch.ones(1, 5, dtype=torch.bool))


def test_frame_time_vector():
    vector = frame_time_vector(torch.tensor([[0.0, 0.25]]))
    assert vector.shape == (1, 2, 16)
    assert torch.allclose(vector[0, 1, :8], torch.tensor([1.0, 0, -1, 0, 0, -1, 0, 1]), atol=1e-6)
    assert vector[0, :, 8:].argmax(-1).tolist() == [0, 1]
    with pytest.raises(ValueError, match="at most 8 frames, got 9"):
        frame_time_vector(torch.zeros(1, 9))


def test_pose_vector():
    reference = make_cameras(0.1, 0.0, 3.0, 0.7, 0.0, 8, 8)
    cameras = make_cameras(0.1 + math.pi / 2, 0.5, 3.5, 0.7, 0.0, 8, 8)
    expected = torch.tensor([-0.5, 1.0, 0.0, 0.5])
    assert torch.allclose(pose_vector(cameras, reference)[0, 0], expected, atol=1e-6)


def test_text_follows_the_view(folders):
    azimuth = torch.tensor([[0.0, math.pi / 2, math.pi]])
    cameras = make_cameras(azimuth, 0.0, 3.0, 0.7, 0.0, 32, 32)
    image = load_prior(folders / "image")
    words = image.encode_text([f"a red cube, {view} view" for view in ("front", "side", "back")])
    text, negative = text_conditions(image, "a red cube")(cameras)
    assert torch.allclose(text.tokens[0], words, atol=1e-5) and text.vector is None
    assert torch.allclose(negative.tokens[0, 1], image.encode_text([""])[0], atol=1e-5)
    video, _ = text_conditions(load_prior(folders / "video"), "a red cube")(cameras)
    assert torch.equal(video.tokens[0, 2], video.tokens[0, 0])
    multiview, negative = text_conditions(load_prior(folders / "multiview"), "a red cube")(cameras)
    assert torch.equal(multiview.tokens[0, 2], multiview.tokens[0, 0])
    assert torch.equal(multiview.vector, negative.vector)


def test_novel_view_negative_is_zero(folders):
    prior = load_prior(folders / "novel_view")
    text, negative = conditions_of(prior)
    assert text.tokens.shape == (1, 4, 1, models.WIDTH) and text.concat.shape == (1, 4, 3, 32, 32)
    assert not torch.equal(text.tokens[0, 0], text.tokens[0, 1])
    assert negative.tokens.abs().max() == 0 and negative.concat.abs().max() == 0


# --- Words and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "pixel"])
def test_every_known_word_is_one_token(kind):
    ids, _ = models.tokenize(kind, [*models.WORDS, ""])
    # CLIP pads with its end token, so only the word differs; with T5 the end token moves too
    changed = (ids[:-1] != ids[-1]).sum(-1)
    assert (changed == {"image": 1, "pixel": 2}[kind]).all()
    assert len({tuple(row) for row in ids.tolist()}) == len(ids)


def test_captions_fit_and_differ():
    texts = datasets.caption_table()
    assert texts[0] == "" and len(set(texts)) == len(texts)
    ids, _ = models.tokenize("image", texts)
    assert len({tuple(row) for row in ids.tolist()}) == len(texts)
    assert ids.shape[1] == models.MAX_TOKENS


def test_check_prompt_names_unknown_words(folders):
    prior = load_prior(folders / "image")
    check_prompt(prior.name, prior.known_words, "A red cube, front view")
    with pytest.raises(PriorError, match="'hippo'.*its words are: a, "):
        check_prompt(prior.name, prior.known_words, "a red hippo")
    with pytest.raises(PriorError, match="prompt is empty"):
        check_prompt(prior.name, prior.known_words, "  ")
    with pytest.raises(PriorError, match="'ugly'"):
        text_conditions(prior, "a red cube", "ugly")


@pytest.mark.parametrize(
    "missing",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
def test_missing_files_are_named(folders, tmp_path, missing):
    shutil.copytree(folders / "image", tmp_path / "image")
    (tmp_path / "image" / missing).unlink()
    with pytest.raises(PriorError, match=missing.replace(".", r"\.") + " is missing"):
        load_prior(tmp_path / "image")


def test_missing_text_encoder_is_named(folders, tmp_path):
    shutil.copytree(folders / "image", tmp_path / "image")
    (tmp_path / "image" / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(PriorError, match=r"text_encoder/model\.safetensors is missing"):
        text_conditions(load_prior(tmp_path / "image"), "a red cube")


def test_broken_folders_are_errors(folders, tmp_path):
    with pytest.raises(PriorError, match="there is no model folder"):
        load_prior(tmp_path / "nowhere")
    shutil.copytree(folders / "image", tmp_path / "image")
    weights = tmp_path / "image" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PriorError, match=r"unet/diffusion_pytorch_model\.safetensors"):
        load_prior(tmp_path / "image")
    index = tmp_path / "image" / "model_index.json"
    index.write_text(json.dumps({"dream4d": {"kind": "audio"}}))
    with pytest.raises(PriorError, match="unknown kind of prior 'audio'"):
        load_prior(tmp_path / "image")


# --- Training --------------------------------------------------------------------------------------------------


def tiny_training(kind, steps):
    return train.Training(kind, steps=steps, batch=2, bank=8, lr=1e-3)


@pytest.mark.parametrize("kind", models.KINDS)
def test_batches_have_a_finite_loss(kind):
    bank = datasets.render_bank(kind, 8, torch.Generator().manual_seed(0), "cpu")
    batch = datasets.batch_maker(kind, bank)(3, torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    levels = train.levels_of(noise_of(models.scheduler_config(kind))[0], torch.device("cpu"))
    prior = models.build_prior(kind, SMALL)
    loss = train.training_loss(prior, batch, levels)
    loss.backward()
    assert torch.isfinite(loss)
    assert batch.clean.abs().max() <= 1.001
    without = [name for name, p in prior.named_parameters() if p.grad is None]
    assert all("post_layernorm" in name or "position" in name for name in without), without


def test_interrupted_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setitem(models.SIZES, "pixel", SMALL)
    whole = train.train(tiny_training("pixel", 4), tmp_path / "whole", torch.device("cpu"), log=lambda line: None)
    short = train.Training("pixel", steps=4, batch=2, bank=8, lr=1e-3, save_seconds=0.0)
    calls = []

    def stop(line):
        calls.append(line)

    # a run that is cut off after two steps leaves the state it saved last
    real = train.progress_of
    monkeypatch.setattr(train, "progress_of", lambda t, clock: 1.0 if clock.step >= 2 else real(t, clock))
    train.train(short, tmp_path / "cut", torch.device("cpu"), log=stop)
    monkeypatch.setattr(train, "progress_of", real)
    resumed = train.train(short, tmp_path / "cut", torch.device("cpu"), log=stop)
    assert any("goes on at step 2" in line for line in calls)
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (whole / name).read_bytes() == (resumed / name).read_bytes()


def test_video_starts_from_the_multiview_prior(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(models.SIZES, "video", SMALL)
    prior = train.initial_prior(tiny_training("video", 1), folders)
    source = load_prior(folders / "multiview").denoiser.unet.state_dict()
    for name, value in prior.unet.state_dict().items():
        same = torch.allclose(value, source[name], atol=1e-6)
        assert same == ("class_embedding" not in name) or "bias" in name
    with pytest.raises(ValueError, match="is missing"):
        train.initial_prior(tiny_training("video", 1), tmp_path)
