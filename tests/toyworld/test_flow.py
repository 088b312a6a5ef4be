"""Rectified flows of the toy world, from training to a moving scene, on networks whose answer is known."""

from dataclasses import replace

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn
from training_cases import CPU, motion_case, solid_ball

from dream4d_engine.assets import save_scene
from dream4d_engine.cameras import fixed_take
from dream4d_engine.guidance.denoiser import Conditions
from dream4d_engine.guidance.noise import rectified_flow, variance_preserving
from dream4d_engine.priors.conditioning import text_conditions
from dream4d_engine.priors.formats.configurations import noise_of
from dream4d_engine.priors.loading import load_prior
from dream4d_engine.priors.networks.denoisers import UNetDenoiser
from dream4d_engine.rendering import render_chunked
from dream4d_engine.schedules import Schedule, constant
from dream4d_engine.toyworld import datasets, measure, models, train
from dream4d_engine.toyworld.ideal import IdealDenoiser
from dream4d_engine.toyworld.samples import sample
from dream4d_engine.training.loop import RunControl
from dream4d_engine.training.motion import train_motion

SMALL = models.ToySize((8, 16, 16), (1, 1, 1))
DIFFUSION, FLOW = (noise_of(models.scheduler_config("video", prediction))[0] for prediction in ("v", "flow"))


class Knowing(nn.Module):
    """A network called as a UNet, that answers v or a velocity as an ideal denoiser would."""

    def __init__(self, ideal, prediction):
        super().__init__()
        self.ideal, self.prediction = ideal, prediction
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep, tokens, **_):
        seen = sample.unflatten(0, (-1, self.ideal.bank.shape[1]))
        time = timestep[:: seen.shape[1]]
        if self.prediction == "flow":
            t = time / 1000
            image, noise = 1 - t, t
        else:
            alpha_bar = DIFFUSION.alphas_bar[time]
            image, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        image, noise = (values[:, None, None, None, None] for values in (image, noise))
        clean = self.ideal.denoise(seen / image, (noise / image).flatten())
        eps = (seen - image * clean) / noise
        answer = eps - clean if self.prediction == "flow" else image * eps - noise * clean
        return (answer.flatten(0, 1),)


def knowing(ideal, prediction):
    name, noise = ("flow", FLOW) if prediction == "flow" else ("v_prediction", DIFFUSION)
    return UNetDenoiser(Knowing(ideal, prediction), noise, name, ideal.image_size, ideal.n_frames)


def moved(prediction, steps, low, high, extra=0):
    """The opacities [F, H, W] of a jump learned from an ideal prior of it and of `extra` other films."""
    recipe, guidance, cameras, still, rise = motion_case(steps)
    film = guidance["video"].denoiser.bank
    others = [film.roll(3 * (i + 1), 1) for i in range(extra)]
    denoiser = knowing(IdealDenoiser(torch.cat((film, *others))), prediction)
    told = replace(guidance["video"].config, min_noise=low, max_noise=high)
    recipe = replace(recipe, guidance=(replace(recipe.guidance[0], distillation=told),))
    guidance = {"video": replace(guidance["video"], denoiser=denoiser, config=told)}
    scene, _ = train_motion(still, recipe, guidance, seed=0, device=CPU, control=RunControl(), deformation_scale=1.0)
    return render_chunked(scene, cameras).opacity[0, ..., 0], rise, render_chunked(still, cameras).opacity[0, ..., 0]


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_v_and_flow_of_one_model_make_the_same_scene(share):
    """At the same level of noise, which each of the two schedules has at a share of its own."""
    same = float(FLOW.share_of(DIFFUSION.sigma_of(torch.tensor(share))))
    shown, _, still = moved("v", 10, constant(share), constant(share), extra=2)
    flowing, _, _ = moved("flow", 10, constant(same), constant(same), extra=2)
    assert (shown - still).abs().max() > 0.2
    assert (shown - flowing).abs().max() < 1e-4  # rounding


def test_a_flow_moves_a_scene_as_the_film_does_that_it_knows():
    """By the shares of the toy recipe, as they are."""
    opacity, rise, _ = moved("flow", 60, Schedule(0.98, 0.40), Schedule(0.98, 0.70))
    rows = torch.arange(opacity.shape[1], dtype=torch.float32)
    centre = -(opacity.sum(2) * rows).sum(1) / opacity.sum((1, 2))
    signal, truth = centre - centre[0], torch.tensor(rise, dtype=torch.float32)
    assert torch.corrcoef(torch.stack((signal, truth)))[0, 1] > 0.95
    assert 0.8 < signal.max() / truth.max() < 1.2


def test_shares_of_the_flow_are_nearly_the_noise_of_the_other_priors():
    shares = torch.tensor([0.4, 0.7, 0.98])  # the bounds of the toy recipe's noise
    ratio = FLOW.sigma_of(shares) / DIFFUSION.sigma_of(shares)
    assert ((ratio > 0.55) & (ratio < 1.2)).all()
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(models.scheduler_config("video", "flow"))
    sigma = FLOW.sigma_of(torch.arange(1, 1000) / 1000)  # between no noise and noise alone
    assert torch.allclose(sigma / (1 + sigma), scheduler.sigmas.flip(0)[:-1].clamp(max=0.999), atol=1e-6)


# ---- training ----------------------------------------------------------------------------------------------------


class Answering(nn.Module):
    """A network that remembers what it saw, and gives the answer it was made with."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight = answer, nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep, tokens, **_):
        self.seen, self.told = sample, timestep
        return (self.answer.flatten(0, 1),)


def batch_of(kind, n=4):
    bank = datasets.render_bank(kind, 8, torch.Generator().manual_seed(0), "cpu")
    return datasets.batch_maker(kind, bank)(n, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_a_network_is_trained_on_what_it_is_used_for(prediction):
    """The same input, time and answer in training as in a run; the right answer has no loss."""
    schedule = FLOW if prediction == "flow" else DIFFUSION
    batch, levels = batch_of("video"), train.levels_of(schedule, CPU)
    place = batch.timestep / 1000 + (0.0005 if prediction == "flow" else 0)
    sigma = schedule.sigma_of(place)
    wide = sigma[:, None, None, None, None]
    v = (batch.noise - wide * batch.clean) * (1 + wide**2).rsqrt()
    prior = models.build_prior("video", SMALL)
    prior.unet = network = Answering(batch.noise - batch.clean if prediction == "flow" else v)
    assert train.training_loss(prior, batch, levels) < 1e-9
    seen, told = network.seen, network.told
    name = "flow" if prediction == "flow" else "v_prediction"
    denoiser = UNetDenoiser(network, schedule, name, (32, 32), 8)
    tokens = Conditions(torch.zeros(4, 8, 1, 1))
    found = denoiser.denoise(batch.clean + wide * batch.noise, sigma, tokens)
    assert torch.allclose(network.seen, seen, atol=1e-4)
    assert torch.allclose(network.told.float(), told.float(), atol=0.01)
    assert (found - batch.clean).abs().max() < 0.02  # at sigma 999 float32 has no more


def test_a_trained_flow_is_an_ordinary_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(models.SIZES, "video", SMALL)
    models.save_prior(models.build_prior("video"), "video", tmp_path / "start" / "video")
    training = train.Training("video", steps=2, batch=2, bank=4, lr=1e-3, prediction="flow")
    folder = train.train(training, tmp_path, CPU, tmp_path / "start", log=lambda line: None)
    prior = load_prior(folder)
    with pytest.raises(ValueError, match=r"state\.pt is of a training for flow: choose another"):
        train.train(replace(training, prediction="v"), tmp_path, CPU, tmp_path / "start", log=lambda line: None)
    denoiser = prior.denoiser
    assert prior.name == "toy video flow" and prior.kind == "video" and denoiser.n_frames == 8
    assert denoiser.prediction_type == "flow" and denoiser.noise.n_levels is None
    assert denoiser.noise.sigma_of(torch.tensor(0.5)) == models.FLOW_SHIFT
    # one step of diffusers' own sampler from its k-th time
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(10)
    k, z_t = 3, torch.randn(1, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    time, t, following = scheduler.timesteps[k], scheduler.sigmas[k], scheduler.sigmas[k + 1]
    text, _ = text_conditions(prior, "a red cube is jumping")(fixed_take(8, 32, 32))
    with torch.no_grad():
        velocity = denoiser.unet(
            z_t[0], time.expand(8), text.tokens[0], class_labels=text.vector[0], cross_attention_kwargs={"n_views": 8}
        ).sample
    stepped = scheduler.step(velocity, time, z_t[0]).prev_sample
    sigma = t / (1 - t)
    clean = denoiser.denoise(z_t * (1 + sigma), sigma[None], text)[0]
    noise = (z_t[0] - (1 - t) * clean) / t
    assert torch.allclose(stepped, (1 - following) * clean + following * noise, atol=1e-5)


def test_the_pixel_prior_has_no_flow():
    with pytest.raises(ValueError, match="answers a diffusion's variance too"):
        train.Training("pixel", steps=1, batch=1, bank=1, lr=1e-3, prediction="flow")


def test_what_a_network_answers_and_its_noise_must_be_of_one_kind():
    for noise, name in ((rectified_flow(), "epsilon"), (variance_preserving(torch.linspace(0.9, 0.1, 5)), "flow")):
        with pytest.raises(ValueError, match="another kind of model"):
            UNetDenoiser(nn.Linear(1, 1), noise, name, (8, 8))


def test_samples_of_a_flow_come_to_rest_without_noise():
    bank = torch.rand(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    denoiser = knowing(IdealDenoiser(bank), "flow")
    told = Conditions(torch.zeros(2, 2, 1, 1))
    found = sample(denoiser, (told, told), torch.Generator().manual_seed(1), n_steps=12)
    nearest = (found[:, None] - bank).square().mean((2, 3, 4, 5)).amin(1)
    assert (nearest < 1e-6).all()


def test_video_priors_are_compared_on_the_same_still_object(tmp_path):
    """The object that lies there is taken, and the prior that is asked for."""
    models.save_prior(models.build_prior("video", SMALL), "video", tmp_path / "flow" / "video", prediction="flow")
    priors = ("toy", str(tmp_path / "flow" / "video"))
    cases = measure.all_cases(["priors"], tmp_path, "cpu", [0], 0.004, video_priors=priors, stills=tmp_path)
    assert len(cases) == 24 and cases[0].name == "a red cube is jumping, toy"
    case = next(c for c in cases if c.name == "a blue sphere is sliding, flow/video")
    save_scene(tmp_path / "a_blue_sphere_0_0.004.safetensors", solid_ball(0.4))
    _, found, images = measure.measure_prior(case)
    assert found["iou"] > 0.9 and found["colors_right"] == 0, "a grey ball"
    assert found["place_error"] == pytest.approx(0.17, abs=0.06), "after one step it is still: 0.3 |sin| of 1.1"
    assert images.shape == (8, 64, 64, 3)
