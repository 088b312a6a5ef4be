"""Guidance against the published figures (tests/data/guidance) and against models whose answers are known."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from guidance_cases import EpsDenoiser, cameras_of, plain, relative_error, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GUIDANCE as DATA
from safetensors.torch import load_file
from torch import Tensor

from dream4d_engine.cameras import CameraBatch, make_cameras
from dream4d_engine.guidance.combine import cfg, perp_neg, perpendicular, published_scale, rescale
from dream4d_engine.guidance.denoiser import Conditions, Denoiser
from dream4d_engine.guidance.distillation import (
    Guidance,
    ancestral_step,
    color_loss,
    distill,
    distill_at,
    distillation_loss,
    draw_shares,
    guided_prediction,
    multistep_target,
    noise_bounds,
    resize_images,
    sds_gradient,
)
from dream4d_engine.guidance.noise import (
    NoiseSchedule,
    log_spaced,
    rectified_flow,
    sigma_of_alpha_bar,
    variance_preserving,
)
from dream4d_engine.guidance.prompts import (
    NEGATIVE_PROMPT,
    VIEWS,
    perp_neg_conditions,
    perp_neg_views,
    view_index,
    view_prompts,
    without_word,
)
from dream4d_engine.guidance.windows import WindowedDenoiser
from dream4d_engine.priors.networks.denoisers import UNetDenoiser, predicted_clean
from dream4d_engine.priors.networks.transformers import TransformerDenoiser
from dream4d_engine.randomness import Draw
from dream4d_engine.schedules import constant
from dream4d_engine.toyworld.ideal import IdealDenoiser

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(DATA / "golden.safetensors")


@pytest.fixture(scope="module")
def image_unet():
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**json.loads((DATA / "sd_unet.json").read_text()))
    unet.load_state_dict(load_file(DATA / "sd_unet.safetensors"))
    return unet.eval().requires_grad_(False)


def view_dependent(golden: dict[str, Tensor], cameras: CameraBatch) -> tuple[Conditions, Conditions]:
    index = view_index(cameras.azimuth, cameras.elevation)
    return Conditions(tokens_of(golden, "text")[index]), Conditions(tokens_of(golden, "negative")[index])


@dataclass(frozen=True, eq=False)
class RecordedDenoiser:
    """What a network predicted under K conditions for one input; asking for anything else fails."""

    x: Tensor
    eps: Tensor
    tokens: tuple[Tensor, ...]
    alphas_bar: Tensor
    image_size: tuple[int, int] = (8, 8)
    n_frames: int | None = None

    @property
    def noise(self) -> NoiseSchedule:
        return variance_preserving(self.alphas_bar)

    def encode(self, images: Tensor, carried: Tensor | None = None) -> Tensor:
        return 2 * images - 1

    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        k = self.eps.shape[0]
        scale = (1 + sigma**2).sqrt()[:, None, None, None, None]
        torch.testing.assert_close(x / scale, self.x.repeat(k, 1, 1, 1, 1), rtol=1e-4, atol=1e-5)
        asked = conditions.tokens.reshape(k, -1, *conditions.tokens.shape[-2:])
        for ours, recorded in zip(asked, self.tokens, strict=True):
            assert torch.equal(ours, recorded.expand_as(ours))
        return x - sigma[:, None, None, None, None] * self.eps.flatten(0, 1)


# --- the protocol -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [UNetDenoiser, TransformerDenoiser, IdealDenoiser, WindowedDenoiser])
def test_a_denoiser_keeps_all_that_is_promised(kind: type) -> None:
    promised = {name for name in vars(Denoiser) if not name.startswith("_")}
    assert {"denoise", "encode", "decode", "run_as", "forget", "noise"} <= promised
    set_when_made = {"image_size", "n_frames", "noise"}
    assert not {name for name in promised if not hasattr(kind, name)} - set_when_made


# --- published figures -------------------------------------------------------------------------------------------


def test_published_sds_gradient_of_an_image_prior(golden, image_unet) -> None:
    cameras = cameras_of(golden).reshape(4, 1)
    denoiser = EpsDenoiser(image_unet, golden["alphas_bar"])
    guidance = Guidance("sd", denoiser, lambda c: view_dependent(golden, c), plain(published_scale(100.0)))
    z, noise = golden["sd.0.z"][:, None], golden["sd.0.noise"][:, None]
    sigma = sigma_of_alpha_bar(golden["alphas_bar"][golden["sd.0.t"]]).repeat(4)
    x0 = guided_prediction(guidance, cameras)(z + sigma[:, None, None, None, None] * noise, sigma)
    assert relative_error(sds_gradient(z, x0, sigma, denoiser.noise)[:, 0], golden["sd.0.grad"]) < TOLERANCE


def test_published_perp_neg_gradient(golden, image_unet) -> None:
    """The published code lets the avoided prompts see other images' noise: number 2 v + i (mod 4) for view v.

    (It lists images and avoided prompts in different orders.) With that the figures are the same; ours sees the
    same noisy image under every prompt, as the paper has it.
    """
    cameras = cameras_of(golden).reshape(4, 1)
    views = torch.arange(4)
    swap = torch.cat([(2 * views + i) % 4 for i in range(2)])
    denoiser = EpsDenoiser(image_unet, golden["alphas_bar"], swap=swap)
    tokens = tokens_of(golden, "text")

    def conditions(c: CameraBatch):
        return perp_neg_conditions(c.azimuth, c.elevation, tokens)

    torch.testing.assert_close(conditions(cameras).weights[:, 0], golden["sd.perp_neg.weights"], rtol=1e-5, atol=1e-5)
    guidance = Guidance(
        "sd", denoiser, lambda c: view_dependent(golden, c), plain(100.0, perp_neg=True), perp_neg=conditions
    )
    z, noise = golden["sd.0.z"][:, None], golden["sd.perp_neg.noise"][:, None]
    sigma = sigma_of_alpha_bar(golden["alphas_bar"][golden["sd.0.t"]]).repeat(4)
    x0 = guided_prediction(guidance, cameras)(z + sigma[:, None, None, None, None] * noise, sigma)
    assert relative_error(sds_gradient(z, x0, sigma, denoiser.noise)[:, 0], golden["sd.perp_neg.grad"]) < TOLERANCE


@pytest.mark.parametrize("case", [0, 1])
def test_published_multiview_loss_and_gradient(golden, case: int) -> None:
    """One group of four views; the published batch size counts the views."""
    tables = tuple(tokens_of(golden, table)[0] for table in ("text", "negative"))
    case = f"mvdream.{case}"
    denoiser = RecordedDenoiser(
        golden[f"{case}.x"], golden[f"{case}.eps"], tables, golden["alphas_bar"], (8, 8), n_frames=4
    )
    both = tuple(Conditions(table.expand(1, 4, -1, -1)) for table in tables)
    guidance = Guidance("mvdream", denoiser, lambda _: both, plain(50.0, loss="x0", rescale=0.5))
    z, noise = golden[f"{case}.z"][None].requires_grad_(), golden[f"{case}.noise"][None]
    sigma = sigma_of_alpha_bar(golden["alphas_bar"][golden[f"{case}.t"]])[None]
    x0 = guided_prediction(guidance, cameras_of(golden))(z.detach() + sigma[:, None, None, None, None] * noise, sigma)
    loss = distillation_loss(z, x0)
    (gradient,) = torch.autograd.grad(loss, z)
    assert relative_error(loss.detach(), golden[f"{case}.loss"]) < TOLERANCE
    assert relative_error(gradient[0], golden[f"{case}.grad"]) < TOLERANCE


@pytest.mark.parametrize("n_steps", [1, 4])
def test_published_multistep_target(golden, n_steps: int) -> None:
    """The camera of this case is not on record; its prompts are those of the front view."""
    case = f"video.n{n_steps}.0"
    tables = tuple(tokens_of(golden, table)[1] for table in ("text", "negative"))
    alphas_bar = golden["alphas_bar"]
    denoiser = RecordedDenoiser(golden["video.x"], golden["video.eps"], tables, alphas_bar, n_frames=6)
    both = tuple(Conditions(table.expand(1, 6, -1, -1)) for table in tables)
    guidance = Guidance("video", denoiser, lambda _: both, plain(published_scale(100.0), loss="multistep"))
    predict = guided_prediction(guidance, make_cameras(0.0, 0.0, 3.0, 0.5, torch.linspace(0, 1, 6)[None], 8, 8))
    z, noise = (golden[f"{case}.{k}"].transpose(1, 2) for k in ("z", "noise"))
    timestep = golden[f"{case}.t"][None]
    x = z + sigma_of_alpha_bar(alphas_bar[timestep]) * noise
    recorded = iter([golden[f"{case}.ddim_noise.0"][None]])
    schedule = variance_preserving(alphas_bar)
    target = multistep_target(x, timestep / 1000, schedule, predict, n_steps, lambda shape: next(recorded))
    assert relative_error(target.transpose(1, 2), golden[f"{case}.target"]) < TOLERANCE


def test_published_whole_call_of_a_pixel_prior(golden) -> None:
    tables = tuple(tokens_of(golden, table) for table in ("text", "negative"))
    cameras = cameras_of(golden).reshape(4, 1)
    index = view_index(cameras.azimuth, cameras.elevation)[:, 0]
    denoiser = RecordedDenoiser(
        golden["if.x"], golden["if.eps"], tuple(t[index] for t in tables), golden["if.alphas_bar"], (64, 64)
    )
    guidance = Guidance("if", denoiser, lambda c: view_dependent(golden, c), plain(published_scale(20.0)))
    images = golden["if.rgb"].permute(0, 3, 1, 2)[:, None].requires_grad_()
    output = distill_at(
        guidance, images, cameras, golden["if.t"] / 1000, lambda shape: golden["if.noise"].reshape(shape)
    )
    (gradient,) = torch.autograd.grad(output.loss, images)
    assert relative_error(output.loss.detach(), golden["if.loss"]) < TOLERANCE
    assert relative_error(gradient[:, 0].permute(0, 2, 3, 1), golden["if.rgb_grad"]) < TOLERANCE
    # the published timesteps lie within the same bounds
    low, high = noise_bounds(guidance.config, denoiser.noise, 0.0)
    assert low <= golden["if.t"].min() / 1000 and golden["if.t"].max() / 1000 <= high


# --- combining ---------------------------------------------------------------------------------------------------


def predictions(n: int, seed: int = 0, shape=(2, 3, 4, 5, 6)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(n)]


@given(st.floats(0.05, 50), st.floats(0, 100))
@settings(max_examples=20, deadline=None)
def test_guidance_on_x0_equals_guidance_on_eps(sigma: float, scale: float) -> None:
    x, text, negative, first, second = predictions(5)
    weights = -torch.rand(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def x0(eps: Tensor) -> Tensor:
        return x - sigma * eps

    torch.testing.assert_close(cfg(x0(text), x0(negative), scale), x0(cfg(text, negative, scale)))
    ours = perp_neg(x0(text), x0(negative), [x0(first), x0(second)], weights, scale)
    torch.testing.assert_close(ours, x0(perp_neg(text, negative, [first, second], weights, scale)))


def test_guidance_scales() -> None:
    text, negative = predictions(2)
    torch.testing.assert_close(cfg(text, negative, 1.0), text)
    torch.testing.assert_close(cfg(text, negative, 0.0), negative)
    torch.testing.assert_close(cfg(text, negative, published_scale(7.0)), text + 7.0 * (text - negative))


def test_perp_neg_without_weight_is_plain_guidance() -> None:
    text, negative, other = predictions(3)
    ours = perp_neg(text, negative, [other], torch.zeros(2, 3, 1), 9.0)
    torch.testing.assert_close(ours, cfg(text, negative, 9.0))


def test_perpendicular() -> None:
    vector, direction = predictions(2)
    rest = perpendicular(vector, direction)
    torch.testing.assert_close((rest * direction).sum((-3, -2, -1)), torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(perpendicular(direction, direction), torch.zeros_like(direction))
    torch.testing.assert_close(perpendicular(vector, 0 * direction), vector)


def test_rescale() -> None:
    guided, text = predictions(2)
    guided = 9 * guided + 0.5
    assert torch.equal(rescale(guided, text, 0.0), guided)
    dims = (1, 2, 3, 4)
    torch.testing.assert_close(rescale(guided, text, 1.0).std(dims), text.std(dims))
    torch.testing.assert_close(rescale(guided, text, 0.5), 0.5 * guided + 0.5 * rescale(guided, text, 1.0))


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("azimuth_deg", "elevation_deg", "view"),
    [
        (0, 0, "front"),
        (29.9, 10, "front"),
        (30.1, 10, "side"),
        (-29.9, 10, "front"),
        (90, 0, "side"),
        (149, 0, "side"),
        (151, 0, "back"),
        (180, 0, "back"),
        (-151, 0, "back"),
        (361, 0, "front"),
        (-190, 0, "back"),
        (0, 61, "overhead"),
        (180, 61, "overhead"),
        (0, 60 - 1e-3, "front"),
        (0, -80, "front"),
    ],
)
def test_view_of_a_camera(azimuth_deg: float, elevation_deg: float, view: str) -> None:
    angles = (torch.tensor([[math.radians(a)]]) for a in (azimuth_deg, elevation_deg))
    assert VIEWS[view_index(*angles).item()] == view


def test_prompt_texts() -> None:
    assert view_prompts("a cat") == (
        "a cat, side view",
        "a cat, front view",
        "a cat, back view",
        "a cat, overhead view",
    )
    assert without_word("a sks cat, running") == "a cat, running"
    assert without_word("a photo of asks") == "a photo of asks"
    assert NEGATIVE_PROMPT.startswith("ugly, bad anatomy,") and NEGATIVE_PROMPT.endswith(", bad proportions")


@given(st.floats(-720, 720), st.floats(-90, 90))
@settings(max_examples=100, deadline=None)
def test_perp_neg_views(azimuth_deg: float, elevation_deg: float) -> None:
    azimuth, elevation = torch.tensor([[math.radians(azimuth_deg)]]), torch.tensor([[math.radians(elevation_deg)]])
    views = perp_neg_views(azimuth, elevation)
    assert views.mix.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert views.mix.min() >= -1e-5 and views.weights.max() <= 1e-5
    mirrored = perp_neg_views(-azimuth, elevation)
    torch.testing.assert_close(mirrored.mix, views.mix, rtol=0, atol=1e-3)
    if elevation_deg > 60.1:
        assert views.mix[0, 0, 3] == 1 and not views.weights.any()


def test_perp_neg_needs_its_conditions() -> None:
    guidance = point_guidance(torch.zeros(3, 4, 4), perp_neg=True)
    with pytest.raises(ValueError, match="perp-neg"):
        distill(guidance, torch.rand(1, 1, 3, 4, 4), flat_cameras(1, 1), 0.0, Draw(0))


# --- distillation ------------------------------------------------------------------------------------------------

ALPHAS_BAR = (
    torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0).float()
)


@dataclass(frozen=True, eq=False)
class GaussianDenoiser:
    """The exact denoiser of N(mean, deviation^2), whatever the conditions."""

    mean: Tensor
    deviation: float = 0.0
    image_size: tuple[int, int] = (4, 4)
    n_frames: int | None = None
    noise: NoiseSchedule = field(default_factory=lambda: variance_preserving(ALPHAS_BAR))

    def encode(self, images: Tensor, carried: Tensor | None = None) -> Tensor:
        return 2 * images - 1

    def decode(self, z: Tensor) -> Tensor:
        return z / 2 + 0.5 + 0 * z.mean()  # as in a real decoder, one bad value spreads

    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        assert not torch.is_grad_enabled()
        sigma = sigma[:, None, None, None, None]
        share = self.deviation**2 / (self.deviation**2 + sigma**2)
        return self.mean + share * (x - self.mean)


def flat_cameras(n_groups: int, n_frames: int) -> CameraBatch:
    azimuth = torch.linspace(0, 2 * math.pi, n_groups * n_frames + 1)[:-1].reshape(n_groups, n_frames)
    return make_cameras(azimuth, 0.0, 3.0, 0.5, 0.0, 4, 4)


def blank_conditions(cameras: CameraBatch) -> tuple[Conditions, Conditions]:
    blank = Conditions(torch.zeros(*cameras.shape, 1, 1))
    return blank, blank


def point_guidance(mean: Tensor, deviation: float = 0.0, n_frames: int | None = None, **changes) -> Guidance:
    size = (mean.shape[-2], mean.shape[-1])
    return Guidance("toy", GaussianDenoiser(mean, deviation, size, n_frames), blank_conditions, plain(5.0, **changes))


@pytest.mark.parametrize("loss", ["sds", "x0", "multistep"])
def test_distillation_pulls_images_to_the_mean(loss: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mean = 2 * torch.rand(3, 4, 4, generator=generator) - 1
    guidance = point_guidance(mean, 0.3, loss=loss, n_steps=2)
    images = torch.rand(2, 2, 3, 4, 4, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.05)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        optimizer.zero_grad()
        distill(guidance, images, flat_cameras(2, 2), step / 300, Draw(0, step)).loss.backward()
        optimizer.step()
    found = 2 * images.detach() - 1
    assert (found - mean).abs().mean() < 0.05
    assert (found - mean).abs().max() < 0.25


def test_multistep_with_the_denoiser_of_one_point_returns_the_point() -> None:
    point = torch.full((3, 4, 4), 0.7)
    generator = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(2, 3, 3, 4, 4, generator=generator)
    # The schedule's first timestep still has a little noise, which the walk leaves in.
    starts, schedule = torch.tensor([0.25, 0.9]), variance_preserving(ALPHAS_BAR)
    target = multistep_target(x, starts, schedule, lambda x, sigma: point.expand_as(x), 4, torch.zeros)
    kept = (x - point).abs().max() * (sigma_of_alpha_bar(ALPHAS_BAR[0]) / sigma_of_alpha_bar(ALPHAS_BAR[250])) ** 2
    assert (target / ALPHAS_BAR[0].sqrt() - point).abs().max() <= kept + 1e-6
    clean = torch.cat((torch.ones(1), ALPHAS_BAR[1:]))  # a schedule that does end at no noise, as a flow's does
    for schedule in (variance_preserving(clean), rectified_flow(3.0)):
        target = multistep_target(x, starts, schedule, lambda x, sigma: point.expand_as(x), 4, torch.randn)
        torch.testing.assert_close(target, point.expand_as(target))


def test_multistep_is_ddim_with_eta_1() -> None:
    """Against diffusers' scheduler, over several steps, with groups that start at different timesteps."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, clip_sample=False
    )
    n_steps, starts = 5, [300, 950]
    scheduler.num_inference_steps = n_steps
    generator = torch.Generator().manual_seed(0)
    x_t, *noises = [torch.randn(2, 1, 4, 4, 4, generator=generator) for _ in range(1 + n_steps)]

    def eps(x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        return 0.5 * torch.sin(3 * x_t) + (1 - alpha_bar).sqrt() * x_t

    expected = []
    for group, start in enumerate(starts):
        walked, t, step = x_t[group], start, 0
        while step == 0 or t > 0:
            predicted = eps(walked, scheduler.alphas_cumprod[t])
            walked = scheduler.step(predicted, t, walked, eta=1.0, variance_noise=noises[step][group]).prev_sample
            t, step = t - 1000 // n_steps, step + 1
        expected.append(walked)

    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma[:, None, None, None, None]
        alpha_bar = 1 / (1 + sigma**2)
        return x - sigma * eps(x * alpha_bar.sqrt(), alpha_bar)

    timestep = torch.tensor(starts)
    x = x_t / scheduler.alphas_cumprod[timestep].sqrt()[:, None, None, None, None]
    drawn = iter(noises)
    schedule = variance_preserving(scheduler.alphas_cumprod)
    ours = multistep_target(x, timestep / 1000, schedule, predict, n_steps, lambda shape: next(drawn))
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_step_to_the_same_noise_level_changes_nothing() -> None:
    x, x0, noise = (p.float() for p in predictions(3))
    sigma = torch.tensor([0.5, 2.0])
    torch.testing.assert_close(ancestral_step(x, x0, sigma, sigma, noise), x)


def test_multistep_refuses_impossible_step_counts() -> None:
    x = torch.zeros(1, 1, 1, 1, 1)
    for n_steps in (0, 1001):
        with pytest.raises(ValueError, match="n_steps"):
            schedule = variance_preserving(ALPHAS_BAR)
            multistep_target(x, torch.tensor([0.005]), schedule, lambda x, s: x, n_steps, torch.zeros)


def test_sds_gradient_is_the_weighted_noise_difference() -> None:
    z, noise, predicted = (p.float() for p in predictions(3))
    alpha_bar = torch.tensor([0.9, 0.1])
    sigma = sigma_of_alpha_bar(alpha_bar)
    wide = sigma[:, None, None, None, None]
    expected = (1 - alpha_bar)[:, None, None, None, None] * (predicted - noise)
    schedule = variance_preserving(ALPHAS_BAR)
    torch.testing.assert_close(sds_gradient(z, z + wide * noise - wide * predicted, sigma, schedule), expected)


SHARES = torch.tensor([0.05, 0.3, 0.62, 0.9])


@pytest.mark.parametrize(
    "schedule",
    [variance_preserving(ALPHAS_BAR), rectified_flow(), rectified_flow(5.0), log_spaced(0.002, 700.0)],
)
def test_shares_and_noise_levels_are_each_others_inverse(schedule: NoiseSchedule) -> None:
    sigma = schedule.sigma_of(SHARES)
    assert (sigma.diff() > 0).all()
    torch.testing.assert_close(schedule.share_of(sigma), SHARES, rtol=1e-5, atol=1e-6)
    assert schedule.sigma_of(torch.ones(1)).isfinite()


def test_shares_of_any_level_are_places_of_its_logarithm() -> None:
    sigma = log_spaced(0.002, 700.0).sigma_of(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(sigma, torch.tensor([0.002, 1.4**0.5, 700.0]), rtol=1e-4, atol=0.0)
    for lowest, highest in ((0.0, 1.0), (2.0, 2.0)):
        with pytest.raises(ValueError, match="0 < lowest < highest"):
            log_spaced(lowest, highest)


def test_predictions_of_noise_v_and_velocity_give_the_same_gradient() -> None:
    """On N(mean, deviation^2), whose exact score and velocity are known in closed form."""
    generator = torch.Generator().manual_seed(0)
    mean, z, eps = (torch.randn(4, 1, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    deviation = 0.7
    for schedule in (variance_preserving(ALPHAS_BAR), log_spaced(0.002, 700.0), rectified_flow(3.0)):
        sigma = schedule.sigma_of(SHARES).double()
        wide = sigma[:, None, None, None, None]
        x = z + wide * eps
        score = (mean - x) / (deviation**2 + wide**2)  # of the density of x
        noise = -wide * score
        clean = x - wide * noise
        alpha = (1 + wide**2).rsqrt()  # of the variance preserving x
        # what each kind of model would put out
        outputs = {
            "epsilon": noise,
            "v_prediction": alpha * noise - wide * alpha * clean,
            "sample": clean,
            "flow": noise - clean,
        }
        gradients = {
            kind: sds_gradient(z, predicted_clean(output, x, sigma, kind), sigma, schedule)
            for kind, output in outputs.items()
        }
        expected = schedule.weight(sigma)[:, None, None, None, None] * (noise - eps)
        for kind, gradient in gradients.items():
            assert relative_error(gradient, expected) < 1e-5, kind
    # a flow's weight (the last schedule's) makes it the residual of the velocity at the image that it was asked about
    velocity = noise - clean
    assert relative_error(gradients["flow"], velocity - (eps - z)) < 1e-5


def test_loss_gradient_and_batch() -> None:
    z, target = (p.float() for p in predictions(2))
    z.requires_grad_()
    for n, expected in ((None, 6), (2, 2)):
        (gradient,) = torch.autograd.grad(distillation_loss(z, target, n), z)
        torch.testing.assert_close(gradient, (z.detach() - target) / expected)


@pytest.mark.parametrize(("loss", "batch", "n"), [("sds", None, 6), ("x0", None, 6), ("multistep", None, 2)])
def test_what_the_batch_counts(loss: str, batch: str | None, n: int) -> None:
    """The gradient norm of a loss divided by n tells n: every form here has the same target."""
    mean, images = torch.zeros(3, 4, 4), torch.full((2, 3, 3, 4, 4), 0.75)
    for choice, count in ((batch, n), ("groups", 2), ("images", 6)):
        guidance = point_guidance(mean, n_frames=3, loss=loss, batch=choice)
        leaf = images.clone().requires_grad_()
        timestep = torch.tensor([500, 500])
        output = distill_at(guidance, leaf, flat_cameras(2, 3), timestep, torch.zeros)
        target_distance = torch.autograd.grad(output.loss, leaf)[0] * count / 2
        if loss == "x0":
            torch.testing.assert_close(target_distance, torch.full_like(leaf, 0.5))
        reference = replace(guidance, config=replace(guidance.config, batch="images"))
        once = distill_at(reference, leaf, flat_cameras(2, 3), timestep, torch.zeros)
        torch.testing.assert_close(output.loss * count, once.loss * 6)
        norm = torch.autograd.grad(once.loss, leaf)[0].norm() / 2
        torch.testing.assert_close(once.terms["gradient_norm"], norm)


def test_timesteps_follow_the_schedules() -> None:
    from dream4d_engine.schedules import Schedule

    config = plain(1.0, min_noise=Schedule(0.98, 0.02, 0.0, 0.8), max_noise=Schedule(0.98, 0.5, 0.0, 0.8))
    schedule, flow = variance_preserving(ALPHAS_BAR), rectified_flow()
    assert noise_bounds(config, schedule, 0.0) == (0.98, 0.98) == noise_bounds(config, flow, 0.0)
    assert noise_bounds(config, schedule, 0.9) == (0.02, 0.5)
    assert noise_bounds(plain(1.0, max_noise=constant(1.0)), schedule, 0.0) == (0.02, 0.999)
    drawn = draw_shares(config, schedule, 4000, 0.9, Draw(0))
    assert drawn.min() == 0.02 and drawn.max() == 0.5 and torch.equal((drawn * 1000).round() / 1000, drawn)
    drawn = draw_shares(config, flow, 4000, 0.9, Draw(0))
    assert 0.02 <= drawn.min() < 0.021 and 0.499 < drawn.max() <= 0.5 and drawn.unique().numel() == 4000
    assert draw_shares(replace(config, shared_timestep=True), schedule, 9, 0.9, Draw(0)).unique().numel() == 1
    crossed = replace(config, max_noise=constant(0.01))
    with pytest.raises(ValueError, match="above max_noise"):
        noise_bounds(crossed, schedule, 0.9)


def test_same_seed_same_loss_and_single_images_get_their_own_timestep() -> None:
    guidance = point_guidance(torch.zeros(3, 4, 4), 0.5)
    images = torch.rand(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    first, second = (distill(guidance, images, flat_cameras(2, 4), 0.1, Draw(7, 3)) for _ in range(2))
    assert torch.equal(first.loss, second.loss) and torch.equal(first.x0, second.x0)
    for other in (Draw(8, 3), Draw(7, 4), Draw(7, 3, rank=1)):
        assert distill(guidance, images, flat_cameras(2, 4), 0.1, other).loss != first.loss
    assert first.share.shape == (8,) and first.share.unique().numel() > 1
    grouped = point_guidance(torch.zeros(3, 4, 4), 0.5, n_frames=4)
    assert distill(grouped, images, flat_cameras(2, 4), 0.1, Draw(0)).share.shape == (2,)


class ToldDenoiser(GaussianDenoiser):
    """Answers the number that it is told, everywhere."""

    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        return conditions.tokens[..., None].expand_as(x)


def test_guidance_goes_from_one_scale_to_another_over_the_run() -> None:
    """Told 1 by the text and 0 by the negative prompt, the guided answer is the scale."""

    def conditions(cameras: CameraBatch) -> tuple[Conditions, Conditions]:
        return Conditions(torch.ones(*cameras.shape, 1, 1)), Conditions(torch.zeros(*cameras.shape, 1, 1))

    guidance = Guidance("told", ToldDenoiser(torch.zeros(3, 4, 4)), conditions, plain(9.0, last_guidance_scale=2.0))
    for progress, scale in ((0.0, 9.0), (0.5, 5.5), (1.0, 2.0)):
        output = distill(guidance, torch.rand(1, 2, 3, 4, 4), flat_cameras(1, 2), progress, Draw(0))
        assert output.x0.unique().tolist() == [scale]


def test_images_seen_from_behind_can_be_left_out() -> None:
    images = torch.rand(1, 4, 3, 4, 4).requires_grad_()
    cameras = flat_cameras(1, 4)  # azimuths 0, 90, 180, 270 degrees
    guidance = point_guidance(torch.zeros(3, 4, 4), max_azimuth_deg=145.0)
    output = distill(guidance, images, cameras, 0.0, Draw(0))
    output.loss.backward()
    touched = images.grad.abs().sum((0, 2, 3, 4)) > 0
    assert touched.tolist() == [True, True, False, True]
    assert output.x0.shape[0] == 3
    none = replace(guidance, config=replace(guidance.config, max_azimuth_deg=0.0))
    images.grad = None
    output = distill(none, images, cameras, 0.0, Draw(0))
    output.loss.backward()
    assert output.loss == 0 and not images.grad.any()


@pytest.mark.parametrize("loss", ["sds", "x0", "multistep"])
def test_values_that_are_not_finite_count_as_0(loss: str) -> None:
    mean = torch.zeros(3, 4, 4)
    mean[0, 0, 0], mean[1, 2, 3] = float("nan"), float("inf")
    guidance = point_guidance(mean, loss=loss, color_weight=0.1)
    images = torch.rand(2, 1, 3, 4, 4).requires_grad_()
    output = distill(guidance, images, flat_cameras(2, 1), 0.0, Draw(0))
    output.loss.backward()
    assert output.loss.isfinite() and output.terms["nonfinite"] == pytest.approx(4 / 96) and output.terms["color"] > 0
    assert images.grad.isfinite().all()
    assert not images.grad[:, :, 0, 0, 0].any() and (images.grad[:, :, 0, 1, 1] != 0).all()


def test_color_loss_is_the_squared_distance_to_the_decoded_target() -> None:
    mean = torch.full((3, 4, 4), 0.5)
    guidance = point_guidance(mean, loss="x0", color_weight=0.1, n_frames=2)
    images = torch.rand(2, 2, 3, 4, 4).requires_grad_()
    output = distill(guidance, images, flat_cameras(2, 2), 0.0, Draw(0))
    expected = 0.1 * (images.detach() - 0.75).square().sum() / 4
    torch.testing.assert_close(output.terms["color"], expected)
    torch.testing.assert_close(output.loss.detach(), output.terms["color"] + output.terms["distillation"])
    torch.testing.assert_close(color_loss(torch.ones(2, 1, 3, 1, 1), torch.zeros(2, 1, 3, 1, 1)), torch.tensor(3.0))


def test_images_of_any_size_are_resized_with_gradient() -> None:
    guidance = point_guidance(torch.zeros(3, 4, 4))
    images = torch.rand(1, 2, 3, 9, 7).requires_grad_()
    distill(guidance, images, flat_cameras(1, 2), 0.0, Draw(0)).loss.backward()
    assert images.grad.isfinite().all() and images.grad.any()
    assert torch.equal(resize_images(images, (9, 7)), images)
    torch.testing.assert_close(resize_images(torch.ones(1, 1, 3, 8, 8), (5, 4)), torch.ones(1, 1, 3, 5, 4))


def test_bad_input_is_named() -> None:
    for changes in (
        {"loss": "other"},
        {"batch": "frames"},
        {"rescale": 1.5},
        {"n_steps": 0},
        {"color_weight": -1.0},
        {"max_noise": constant(1.2)},
    ):
        with pytest.raises(ValueError, match=next(iter(changes))):
            plain(1.0, **changes)
    with pytest.raises(ValueError, match="images must be"):
        guidance = point_guidance(torch.zeros(3, 4, 4))
        distill(guidance, torch.rand(2, 1, 3, 4, 4), flat_cameras(1, 2), 0.0, Draw(0))
