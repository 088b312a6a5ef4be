"""The published figures again, with the tiny networks themselves, loaded as users load full-size ones.

The multi-view network lies beside these tests in the layout of MVDream's checkpoint, the image network as a file of
tensors. The two others and their figures are larger; they are looked for in the folder that the environment variable
DREAM4D_GOLDEN names, or in ../shared/golden/guidance, and skipped where they are not.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from guidance_cases import EpsDenoiser, cameras_of, plain, relative_error, tokens_of
from places import GUIDANCE as DATA
from places import ROOT
from safetensors.torch import load_file
from torch import Tensor

from dream4d_engine.cameras import CameraBatch, make_cameras
from dream4d_engine.guidance.combine import published_scale
from dream4d_engine.guidance.denoiser import Conditions
from dream4d_engine.guidance.distillation import (
    Guidance,
    distill_at,
    distillation_loss,
    guided_prediction,
    multistep_target,
    sds_gradient,
)
from dream4d_engine.guidance.noise import sigma_of_alpha_bar
from dream4d_engine.guidance.prompts import perp_neg_conditions
from dream4d_engine.priors.conditioning import camera_vector, embedded_conditions, table_conditions
from dream4d_engine.priors.formats.convert import convert
from dream4d_engine.priors.loading import load_prior

BESIDE = ROOT.parent / "shared" / "golden" / "guidance"
WHOLE = Path(os.environ.get("DREAM4D_GOLDEN", BESIDE))
TOLERANCE = 1e-4

SCHEDULER = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

needs_whole = pytest.mark.skipif(
    not (WHOLE / "guidance.safetensors").is_file(),
    reason="the larger published networks are not here (DREAM4D_GOLDEN names their folder)",
)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(DATA / "golden.safetensors")


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    return load_file(WHOLE / "guidance.safetensors")


@pytest.fixture(scope="module", params=["checkpoint", "converted"])
def multiview(request, tmp_path_factory):
    """MVDream's tiny twin, from its checkpoint and from the folder that it was converted to."""
    path = DATA / "mvdream_tiny.pt"
    if request.param == "checkpoint":
        return load_prior(path)
    folder = tmp_path_factory.mktemp("converted") / "mvdream"
    convert(path, folder, "multiview")
    return load_prior(folder)


@pytest.fixture(scope="module")
def image():
    config = {"unet": json.loads((DATA / "sd_unet.json").read_text()), "scheduler": SCHEDULER}
    return load_prior(DATA / "sd_unet.safetensors", "image", config=config)


def whole_prior(name: str, unet: str, scheduler: str, **metadata):
    """One of the networks of the whole folder."""
    configs = json.loads((WHOLE / "guidance.json").read_text())
    config = {"unet": configs[unet], "scheduler": configs[scheduler], "vae": configs["vae"], "dream4d": metadata}
    return load_prior(WHOLE / f"{name}.safetensors", config=config)


def with_c2w(golden: dict[str, Tensor]) -> CameraBatch:
    """The recorded cameras, one group of four views [1, 4]."""
    return replace(cameras_of(golden), c2w=golden["c2w"][None])


def tables(golden: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return tokens_of(golden, "text"), tokens_of(golden, "negative")


def predicted_noise(prior, x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
    """What the denoiser takes for noise in the variance preserving x [B, F, c, h, w]; timestep [B]."""
    sigma = sigma_of_alpha_bar(prior.denoiser.noise.alphas_bar[timestep])
    wide = sigma[:, None, None, None, None]
    exploding = x * (1 + wide**2).sqrt()
    return (exploding - prior.denoiser.denoise(exploding, sigma, conditions)) / wide


# --- MVDream -----------------------------------------------------------------------------------------------------


def test_multiview_checkpoint_is_what_it_should_be(multiview):
    assert (multiview.kind, multiview.vector, multiview.denoiser.n_frames) == ("multiview", "camera", 4)
    assert multiview.denoiser.image_size == (64, 64) and multiview.denoiser.prediction_type == "epsilon"
    assert len(multiview.denoiser.noise.alphas_bar) == 1000
    assert not any(p.requires_grad for p in multiview.denoiser.unet.parameters())


def test_multiview_forward(golden, multiview):
    """Two groups of four views: the text's, then the negative prompt's."""
    x, t, camera = (golden[f"mvdream.unet.{k}"] for k in ("x", "t", "camera"))
    assert relative_error(camera_vector(with_c2w(golden))[0], camera[:4]) < TOLERANCE
    text, negative = (table[:1].expand(4, -1, -1) for table in tables(golden))
    conditions = Conditions(torch.stack((text, negative)), camera.unflatten(0, (2, 4)))
    ours = predicted_noise(multiview, x.unflatten(0, (2, 4)), t[::4], conditions)
    assert relative_error(ours.flatten(0, 1), golden["mvdream.unet.eps"]) < TOLERANCE


def test_multiview_autoencoder(golden, multiview):
    latents, scale = golden["mvdream.vae.latent_mode_unscaled"], multiview.denoiser.vae.config.scaling_factor
    assert scale == 0.18215
    with torch.no_grad():
        ours = multiview.denoiser.encode(golden["mvdream.vae.image"][:, None])[:, 0] / scale
        decoded = multiview.denoiser.decode(latents[:, None] * scale)[:, 0]
    assert relative_error(ours, latents) < TOLERANCE
    assert relative_error(2 * decoded - 1, golden["mvdream.vae.decoded"]) < TOLERANCE


@pytest.mark.parametrize("case", [0, 1])
def test_multiview_loss_and_gradient(golden, multiview, case):
    text, negative = tables(golden)
    conditions = table_conditions(multiview, text[:1], negative[0])
    guidance = Guidance("mvdream", multiview.denoiser, conditions, plain(50.0, loss="x0", rescale=0.5))
    z, noise, t = (golden[f"mvdream.{case}.{k}"][None] for k in ("z", "noise", "t"))
    z.requires_grad_()
    sigma = sigma_of_alpha_bar(multiview.denoiser.noise.alphas_bar[t])
    x = z.detach() + sigma[:, None, None, None, None] * noise
    loss = distillation_loss(z, guided_prediction(guidance, with_c2w(golden))(x, sigma))
    (gradient,) = torch.autograd.grad(loss, z)
    assert relative_error(loss.detach(), golden[f"mvdream.{case}.loss"]) < TOLERANCE
    assert relative_error(gradient[0], golden[f"mvdream.{case}.grad"]) < TOLERANCE


# --- Stable Diffusion --------------------------------------------------------------------------------------------


def noisy_image_case(golden, image, noise: str):
    z = golden["sd.0.z"][:, None]
    sigma = sigma_of_alpha_bar(image.denoiser.noise.alphas_bar[golden["sd.0.t"]]).repeat(4)
    return z, z + sigma[:, None, None, None, None] * golden[noise][:, None], sigma


def test_image_gradient(golden, image):
    guidance = Guidance("sd", image.denoiser, table_conditions(image, *tables(golden)), plain(published_scale(100.0)))
    z, x, sigma = noisy_image_case(golden, image, "sd.0.noise")
    x0 = guided_prediction(guidance, cameras_of(golden).reshape(4, 1))(x, sigma)
    assert relative_error(sds_gradient(z, x0, sigma, image.denoiser.noise)[:, 0], golden["sd.0.grad"]) < TOLERANCE


def test_image_perp_neg(golden, image):
    """With the published order of images (see test_guidance), which the loaded network is wrapped for."""
    views = torch.arange(4)
    swap = torch.cat([(2 * views + i) % 4 for i in range(2)])
    denoiser = EpsDenoiser(image.denoiser.unet, image.denoiser.noise.alphas_bar, swap=swap)
    text, _ = tables(golden)
    guidance = Guidance(
        "sd",
        denoiser,
        table_conditions(image, *tables(golden)),
        plain(100.0, perp_neg=True),
        perp_neg=lambda c: perp_neg_conditions(c.azimuth, c.elevation, text),
    )
    z, x, sigma = noisy_image_case(golden, image, "sd.perp_neg.noise")
    x0 = guided_prediction(guidance, cameras_of(golden).reshape(4, 1))(x, sigma)
    assert (
        relative_error(sds_gradient(z, x0, sigma, image.denoiser.noise)[:, 0], golden["sd.perp_neg.grad"]) < TOLERANCE
    )


# --- Zero123 -----------------------------------------------------------------------------------------------------


def test_novel_view_conditioning(golden):
    """The rows are the negatives, then the positives; the reference camera stands at distance 3.8."""
    azimuth, elevation = (torch.deg2rad(golden[f"{a}_deg"])[None] for a in ("azimuth", "elevation"))
    distance = torch.tensor([[3.8, 3.8, 3.6, 4.0]])
    cameras = make_cameras(azimuth, elevation, distance, 0.35, 0.0, 8, 8)
    reference = make_cameras(0.0, 0.0, 3.8, 0.35, 0.0, 8, 8)
    projection = golden["zero123.proj_weight"], golden["zero123.proj_bias"]
    embedding, concat = golden["zero123.image_embedding"][0], golden["zero123.concat_latent"][None]
    text, negative = embedded_conditions(embedding, concat, projection, reference)(cameras)
    expected = golden["zero123.context_neg_then_pos"]
    assert relative_error(text.tokens[0], expected[4:]) < TOLERANCE
    assert torch.equal(negative.tokens[0], expected[:4]) and not expected[:4].any()
    assert torch.equal(text.concat[0, 3], concat[0, 0]) and not negative.concat.any()


# --- Networks that may not be here -------------------------------------------------------------------------------


@needs_whole
@pytest.mark.parametrize("n_steps", [1, 4])
def test_video_target(whole, n_steps):
    prior = whole_prior("video_tiny", "video_unet", "scheduler", n_frames=6)
    assert prior.kind == "video"
    text, negative = tables(whole)
    conditions = table_conditions(prior, text, negative)
    guidance = Guidance("video", prior.denoiser, conditions, plain(published_scale(100.0), loss="multistep"))
    cameras = make_cameras(0.0, 0.0, 3.0, 0.5, torch.linspace(0, 1, 6)[None], 8, 8)  # its first sees the front
    case = f"video.n{n_steps}.0"
    z, noise = (whole[f"{case}.{k}"].transpose(1, 2) for k in ("z", "noise"))
    timestep, alphas_bar = whole[f"{case}.t"][None], prior.denoiser.noise.alphas_bar
    x = z + sigma_of_alpha_bar(alphas_bar[timestep]) * noise
    recorded = (whole[f"{case}.ddim_noise.{j}"][None] for j in range(n_steps))
    predict = guided_prediction(guidance, cameras)
    target = multistep_target(x, timestep / 1000, prior.denoiser.noise, predict, n_steps, lambda shape: next(recorded))
    assert relative_error(target.transpose(1, 2), whole[f"{case}.target"]) < TOLERANCE


@needs_whole
def test_pixel_call(golden, whole):
    """With the noise that the published call drew (see data/guidance/make_data.py)."""
    prior = whole_prior("if_tiny", "if_unet", "if_scheduler", image_size=(64, 64))
    assert prior.kind == "pixel" and prior.denoiser.vae is None
    conditions = table_conditions(prior, *tables(whole))
    guidance = Guidance("if", prior.denoiser, conditions, plain(published_scale(20.0)))
    images = whole["if.rgb"].permute(0, 3, 1, 2)[:, None].requires_grad_()
    cameras = cameras_of(whole).reshape(4, 1)
    output = distill_at(
        guidance, images, cameras, whole["if.t"] / 1000, lambda shape: golden["if.noise"].reshape(shape)
    )
    (gradient,) = torch.autograd.grad(output.loss, images)
    assert relative_error(output.loss.detach(), whole["if.loss"]) < TOLERANCE
    assert relative_error(gradient[:, 0].permute(0, 2, 3, 1), whole["if.rgb_grad"]) < TOLERANCE


@needs_whole
def test_image_file_with_autoencoder(whole):
    """The whole image file: the gradient again, and an autoencoder of finite answers at 2x the latents' size."""
    configs = json.loads((WHOLE / "guidance.json").read_text())
    prior = load_prior(
        WHOLE / "sd_tiny.safetensors",
        config={"unet": configs["sd_unet"], "vae": configs["vae"], "scheduler": configs["scheduler"]},
    )
    assert prior.kind == "image" and prior.denoiser.image_size == (16, 16)
    guidance = Guidance("sd", prior.denoiser, table_conditions(prior, *tables(whole)), plain(published_scale(100.0)))
    z, x, sigma = noisy_image_case(whole, prior, "sd.0.noise")
    x0 = guided_prediction(guidance, cameras_of(whole).reshape(4, 1))(x, sigma)
    assert relative_error(sds_gradient(z, x0, sigma, prior.denoiser.noise)[:, 0], whole["sd.0.grad"]) < TOLERANCE
    images = torch.rand(1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = prior.denoiser.encode(images)
    assert latents.shape == (1, 2, 4, 8, 8) and torch.isfinite(prior.denoiser.decode(latents)).all()
