"""Train the toy priors: `python -m dream4d_engine.toyworld.train --out DIR`.

Each prior is trained to predict v (2202.00512), or the velocity of a rectified flow (2209.03003), on images of the
toy world, with AdamW, a cosine learning rate after a short warm-up, an exponential moving average of the weights and
bf16 on CUDA. The length of a run is a number of steps (reproducible) or of minutes (the schedule follows the clock). A
run that was cut off goes on where its last `state.pt` was written. The video prior starts from the multi-view prior's
weights, found in DIR.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from ..guidance.noise import NoiseSchedule
from ..priors.conditioning import clip_pixels
from ..priors.files import toy_folder
from ..priors.formats.configurations import noise_of
from ..priors.formats.folders import read_schedule
from ..priors.handle import PriorKind
from ..priors.networks.denoisers import flow_input
from .datasets import Batch, BatchMaker, NovelViewBatch, TextBatch, batch_maker, render_bank
from .models import (
    IMAGE_SIZE,
    KINDS,
    N_TIMESTEPS,
    NovelViewPrior,
    Prediction,
    TextPrior,
    ToyPrior,
    build_prior,
    load_weights,
    save_prior,
    scheduler_config,
    write_json,
)

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKL

ORDER: tuple[PriorKind, ...] = ("multiview", "video", "image", "novel_view", "pixel")


@dataclass(frozen=True)
class Training:
    """One prior's run.

    Args:
        steps, minutes: the length; minutes win where given.
        batch: groups a step. bank: groups rendered beforehand. lr: the highest learning rate.
        graph: record the step once as a CUDA graph and replay it. compile: torch.compile the UNet.
        noisy: share of the examples whose noise is drawn from NOISY alone, where it is decided which way things move.
        keep: share of the weights that it started from in the result (2109.01903, section 3).
    """

    kind: PriorKind
    steps: int
    batch: int
    bank: int
    lr: float
    minutes: float | None = None
    warm_up: float = 0.03
    ema: float = 0.999
    weight_decay: float = 0.01
    seed: int = 0
    graph: bool = False
    compile: bool = False
    channels_last: bool = False
    save_seconds: float = 60.0
    prediction: Prediction = "v"
    noisy: float = 0.0
    keep: float = 0.0

    def __post_init__(self) -> None:
        if self.prediction == "flow" and self.kind == "pixel":
            raise ValueError("the pixel prior answers a diffusion's variance too, which a flow has not: it predicts v")
        for name in ("noisy", "keep"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, from 0 to 1, got {getattr(self, name)}")


TRAININGS: dict[PriorKind, Training] = {
    "image": Training("image", steps=6000, batch=256, bank=60_000, lr=1e-3),
    "multiview": Training("multiview", steps=6000, batch=64, bank=24_000, lr=1e-3),
    "video": Training("video", steps=5000, batch=32, bank=24_000, lr=6e-4),
    "novel_view": Training("novel_view", steps=6000, batch=256, bank=60_000, lr=1e-3),
    "pixel": Training("pixel", steps=6000, batch=256, bank=60_000, lr=1e-3),
}

NOISY = (0.5, 0.99)
"""Shares of the schedule between which `Training.noisy` draws."""


# --- The loss --------------------------------------------------------------------------------------------------


def condition_tokens(prior: ToyPrior, batch: Batch) -> Tensor:
    """Return the cross-attention's tokens [B, L, D]."""
    if isinstance(prior, NovelViewPrior) and isinstance(batch, NovelViewBatch):
        embedding = prior.image(clip_pixels(batch.reference / 2 + 0.5, IMAGE_SIZE)).image_embeds
        token = prior.projection(torch.cat((embedding, batch.pose.to(embedding)), -1))
        return (token * batch.keep[:, None].to(token))[:, None]
    if not (isinstance(prior, TextPrior) and isinstance(batch, TextBatch)):
        raise TypeError(f"a {type(batch).__name__} is not for a {type(prior).__name__}")
    # CLIP reads its padding, T5 does not (as the full-size models were trained)
    mask = batch.token_mask if prior.text.config.model_type.startswith("t5") else None
    return prior.text(batch.token_ids, attention_mask=mask)[0]


@dataclass(frozen=True)
class Levels:
    """The noise levels that are trained at, [T] each.

    The network sees image * z + noise * eps, is told `told`, and is to answer noise_asked * eps - image_asked * z.
    """

    image: Tensor
    noise: Tensor
    image_asked: Tensor
    noise_asked: Tensor
    told: Tensor


def levels_of(schedule: NoiseSchedule, device: torch.device) -> Levels:
    """The levels of a diffusion's v-prediction, or of a flow: T equal shares of its schedule, at their middles.

    So more of a flow's steps are taken where its shift leads, at much noise, as a diffusion's are. Logit-normal times
    (2403.03206, section 3.1) would leave 1 step in 10,000 for the noise that distillation begins with, where it is
    decided which way things move.
    """
    if schedule.sigmas is None:
        sigma = schedule.sigma_of((torch.arange(N_TIMESTEPS) + 0.5) / N_TIMESTEPS)
        image, told = flow_input(torch.ones(N_TIMESTEPS), sigma)
        one = torch.ones_like(image)
        tensors = (image, 1 - image, one, one, told)
    else:
        image = schedule.alphas_bar.sqrt()
        noise = (1 - schedule.alphas_bar).sqrt()
        tensors = (image, noise, noise, image, torch.arange(len(image)))
    return Levels(*(tensor.to(device) for tensor in tensors))


def training_loss(prior: ToyPrior, batch: Batch, levels: Levels, channels_last: bool = False) -> Tensor:
    """Return the mean squared error of the answer (and of the variance head, where the network has one)."""
    n_groups, n_frames = batch.clean.shape[:2]

    def at_level(values: Tensor) -> Tensor:
        return values[batch.timestep][:, None, None, None, None]

    noisy = at_level(levels.image) * batch.clean + at_level(levels.noise) * batch.noise
    target = at_level(levels.noise_asked) * batch.noise - at_level(levels.image_asked) * batch.clean
    model_input = noisy
    if isinstance(batch, NovelViewBatch):
        reference = batch.reference * batch.keep[:, None, None, None]
        model_input = torch.cat((noisy, reference[:, None]), 2)
    model_input = model_input.flatten(0, 1)
    if channels_last:
        model_input = model_input.contiguous(memory_format=torch.channels_last)
    vector = batch.vector if isinstance(batch, TextBatch) else None
    output = prior.unet(
        model_input,
        levels.told[batch.timestep].repeat_interleave(n_frames),
        condition_tokens(prior, batch).repeat_interleave(n_frames, 0),
        class_labels=None if vector is None else vector.flatten(0, 1),
        cross_attention_kwargs=None if vector is None else {"n_views": n_frames},
        return_dict=False,
    )[0]
    output = output.float().unflatten(0, (n_groups, n_frames))
    answer, extra = output.split([target.shape[2], output.shape[2] - target.shape[2]], 2)
    loss = (answer - target).square().mean()
    if extra.shape[2]:
        loss = loss + 0.05 * variance_loss(answer.detach(), target, extra, batch.timestep, levels.image.square())
    return loss


def variance_loss(v: Tensor, target: Tensor, extra: Tensor, timestep: Tensor, alphas_bar: Tensor) -> Tensor:
    """Train a learned-range variance head (2102.09672, eq. 15) on the variance that the model's errors call for.

    A reverse step's variance lies between log beta~ (extra = -1) and log beta (extra = 1); an error e of x0 adds
    (sqrt(alpha_bar_prev) beta / (1 - alpha_bar))^2 e^2 to beta~.
    """
    previous = torch.cat((alphas_bar.new_ones(1), alphas_bar[:-1]))[timestep]
    alpha_bar = alphas_bar[timestep]
    beta = 1 - alpha_bar / previous
    # beta~ is 0 at the first timestep; its neighbour's ratio stands in, as usual
    lowest = beta * ((1 - previous) / (1 - alpha_bar)).clamp(min=0.25)
    error = (1 - alpha_bar) * (previous.sqrt() * beta / (1 - alpha_bar)).square()
    beta, lowest, error = (x[:, None, None, None, None] for x in (beta, lowest, error))
    wanted = torch.log1p(error * (v - target).square() / lowest) / (beta.log() - lowest.log()).clamp(min=1e-4)
    return (extra - (2 * wanted.clamp(0, 1) - 1)).square().mean()


# --- The step --------------------------------------------------------------------------------------------------


def make_optimizer(prior: ToyPrior, training: Training, device: torch.device) -> torch.optim.Optimizer:
    """AdamW; on CUDA fused and with the rate as a tensor, so that a captured step can be given new ones."""
    on_cuda = device.type == "cuda"
    rate = torch.tensor(0.0, device=device) if on_cuda else 0.0
    return torch.optim.AdamW(
        prior.parameters(), lr=rate, weight_decay=training.weight_decay, fused=on_cuda, capturable=on_cuda
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def make_step(
    prior: ToyPrior, optimizer: torch.optim.Optimizer, levels: Levels, training: Training, first: Batch
) -> Callable[[Batch], Tensor]:
    """Return a function that takes a batch, updates the networks and returns the loss (a tensor)."""
    device = levels.image.device
    parameters = list(prior.parameters())
    if training.channels_last:
        prior.unet.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # diffusers' decorator hides the types of `to`
    if training.compile:
        prior.unet.compile(dynamic=False)

    def forward_backward(batch: Batch) -> Tensor:
        autocast = torch.autocast(device.type, torch.bfloat16, device.type == "cuda", cache_enabled=not training.graph)
        with autocast:
            loss = training_loss(prior, batch, levels, training.channels_last)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach()

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        return forward_backward(batch)

    if not (training.graph and device.type == "cuda"):
        return step
    return _record(step, forward_backward, optimizer, first)


def _record(
    step: Callable[[Batch], Tensor],
    forward_backward: Callable[[Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    first: Batch,
) -> Callable[[Batch], Tensor]:
    """Record a step as a CUDA graph over fixed memory; a replay costs one launch instead of two thousand."""
    tensors = {f.name: getattr(first, f.name) for f in fields(first)}
    held = replace(first, **{name: tensor.clone() for name, tensor in tensors.items() if tensor is not None})
    set_rate(optimizer, 0.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(held)
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = forward_backward(held)

    def replay(batch: Batch) -> Tensor:
        held.copy_from(batch)
        graph.replay()
        return loss.clone()

    return replay


# --- The run ---------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """How far a run is: steps done and seconds spent, over all of its sessions."""

    step: int = 0
    seconds: float = 0.0


def learning_rate(training: Training, progress: float) -> float:
    """A linear warm-up, then half a cosine to a fiftieth."""
    if progress < training.warm_up:
        return training.lr * progress / training.warm_up
    share = (progress - training.warm_up) / (1 - training.warm_up)
    return training.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


def progress_of(training: Training, clock: Clock) -> float:
    """Return the share of the run that is done."""
    if training.minutes is not None:
        return clock.seconds / (60 * training.minutes)
    return clock.step / training.steps


def initial_prior(training: Training, out: Path, start_from: Path | None = None, latent: bool = False) -> ToyPrior:
    """Return the networks as training finds them.

    Fresh ones, or those in start_from/KIND. The video prior's come from out/multiview, but for the class embedding;
    those of one that is to work on latents from the shipped one, but for the first and the last layer.
    """
    torch.manual_seed(training.seed)  # diffusers and transformers initialise from the global generator
    prior = build_prior(training.kind, latent=latent)
    if latent:
        load_weights(prior, toy_folder(training.kind), leave_out=("conv_in", "conv_out"))
    elif start_from is not None:
        load_weights(prior, start_from / training.kind)
    elif training.kind == "video":
        load_weights(prior, out / "multiview", leave_out=("class_embedding",))
    return prior


def train(
    training: Training,
    out: Path,
    device: torch.device,
    start_from: Path | None = None,
    log: Callable[[str], None] = print,
    vae: AutoencoderKL | None = None,
) -> Path:
    """Train one prior and write its folder out/KIND; returns it. Goes on from out/KIND/state.pt if there is one.

    `vae`: an autoencoder on the device, in whose latents the prior is to work.
    """
    folder = out / training.kind
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    prior = initial_prior(training, out, start_from, latent=vae is not None).to(device)
    optimizer = make_optimizer(prior, training, device)
    start, average = ([p.detach().clone() for p in prior.parameters()] for _ in range(2))
    # the images are drawn by the seed alone, so a resumed run renders the same ones again
    bank = render_bank(training.kind, training.bank, torch.Generator().manual_seed(training.seed), device)
    log(f"{training.kind}: {len(bank.rgba)} groups rendered in {time.perf_counter() - started:.1f} s")
    generator = torch.Generator(device).manual_seed(training.seed + 1)
    clock, state_path = Clock(), folder / "state.pt"
    if state_path.is_file():
        found = read_schedule(folder)[1]
        if (found == "flow") != (training.prediction == "flow"):
            raise ValueError(f"{state_path} is of a training for {found}: choose another --out, or remove it")
        clock = _load_state(state_path, prior, optimizer, average, generator)
        log(f"{training.kind}: goes on at step {clock.step}")
    offset = clock.seconds
    make_batch = batch_maker(training.kind, bank)
    if training.noisy:
        make_batch = at_more_noise(make_batch, training.noisy)
    if vae is not None:
        make_batch = in_latents(make_batch, vae)
    write_json_schedule(folder, training)
    levels = levels_of(read_schedule(folder)[0], device)
    # a generator of its own: what shapes the recording must not use up the run's random numbers
    first = make_batch(training.batch, torch.Generator(device).manual_seed(training.seed))
    step = make_step(prior, optimizer, levels, training, first)
    saved = time.perf_counter()
    losses: list[Tensor] = []
    parameters: list[Tensor] = list(prior.parameters())
    while (progress := progress_of(training, clock)) < 1:
        set_rate(optimizer, learning_rate(training, progress))
        losses.append(step(make_batch(training.batch, generator)))
        clock.step += 1
        decay = min(training.ema, (1 + clock.step) / (10 + clock.step))
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - decay)
        if clock.step % 20 == 0 and device.type == "cuda":
            torch.cuda.synchronize()  # the clock must not run ahead of the device
        clock.seconds = offset + time.perf_counter() - started
        if len(losses) == 200:
            log(_line(training, clock, losses))
            losses.clear()
        if time.perf_counter() - saved > training.save_seconds:
            _save_state(state_path, prior, optimizer, average, generator, clock)
            saved = time.perf_counter()
    if losses:
        log(_line(training, clock, losses))
    _save_state(state_path, prior, optimizer, average, generator, clock)
    torch._foreach_lerp_(average, start, training.keep)
    averaged = _with_average(prior, average)
    save_prior(averaged, training.kind, folder, vae=vae, prediction=training.prediction)
    record = {**{f.name: getattr(training, f.name) for f in fields(training)}, "steps": clock.step}
    record |= {"seconds": round(clock.seconds, 1), "device": _device_name(device), "torch": torch.__version__}
    write_json(folder / "training.json", record)
    return folder


def scaled_latents(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """What an autoencoder makes of images [n, 3, H, W] in [-1, 1], scaled as diffusion models take it."""
    return vae.config["scaling_factor"] * vae.encode(images).latent_dist.mode()


def in_latents(make_batch: BatchMaker, vae: AutoencoderKL) -> BatchMaker:
    """The same batches with the latents of an autoencoder in the images' place."""

    @torch.no_grad()
    def make(n: int, generator: torch.Generator) -> Batch:
        batch = make_batch(n, generator)
        latents = scaled_latents(vae, batch.clean.flatten(0, 1)).unflatten(0, batch.clean.shape[:2])
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        return replace(batch, clean=latents, noise=noise)

    return make


def at_more_noise(make_batch: BatchMaker, share: float) -> BatchMaker:
    """The same batches, a share of them at levels of NOISY alone."""
    low, high = (round(end * N_TIMESTEPS) for end in NOISY)

    def make(n: int, generator: torch.Generator) -> Batch:
        batch = make_batch(n, generator)
        noisy = torch.randint(low, high, (n,), generator=generator, device=batch.timestep.device)
        taken = torch.rand(n, generator=generator, device=batch.timestep.device) < share
        return replace(batch, timestep=torch.where(taken, noisy, batch.timestep))

    return make


def write_json_schedule(folder: Path, training: Training) -> None:
    """Write the scheduler's part of the folder, from which training and use both read the noise levels."""
    (folder / "scheduler").mkdir(exist_ok=True)
    config = scheduler_config(training.kind, training.prediction)
    write_json(folder / "scheduler" / "scheduler_config.json", config)


def _line(training: Training, clock: Clock, losses: list[Tensor]) -> str:
    loss = torch.stack(losses).mean().item()
    return (
        f"{training.kind}: step {clock.step} ({progress_of(training, clock):.0%}) loss {loss:.4f} "
        f"after {clock.seconds:.0f} s"
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _with_average(prior: ToyPrior, average: list[Tensor]) -> ToyPrior:
    """Return a copy of the networks with averaged weights, in the ordinary memory layout."""
    averaged = copy.deepcopy(prior)
    averaged.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch's types leave this way out
    with torch.no_grad():
        for parameter, value in zip(averaged.parameters(), average, strict=True):
            parameter.copy_(value)
    return averaged.cpu()


def _save_state(path: Path, prior, optimizer, average, generator, clock: Clock) -> None:
    state = {
        "prior": prior.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
        "generator": generator.get_state(),
        "step": clock.step,
        "seconds": clock.seconds,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _load_state(path: Path, prior, optimizer, average, generator) -> Clock:
    state = torch.load(path, map_location=next(prior.parameters()).device, weights_only=True)
    prior.load_state_dict(state["prior"])
    optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for held, value in zip(average, state["average"], strict=True):
            held.copy_(value)
    generator.set_state(state["generator"].cpu())
    return Clock(state["step"], state["seconds"])


# --- Command line ----------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m dream4d_engine.toyworld.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets one folder a prior")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(ORDER), help="which priors, in this order")
    parser.add_argument("--steps", type=int, help="steps of each (default: the published ones)")
    parser.add_argument("--minutes", type=float, help="minutes of each, instead of steps")
    parser.add_argument("--batch", type=int, help="groups a step")
    parser.add_argument("--bank", type=int, help="groups rendered beforehand")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--noisy", type=float, help=f"share of the examples at {NOISY} of the schedule alone")
    parser.add_argument("--keep", type=float, help="share of the weights it started from in the result")
    parser.add_argument("--start-from", type=Path, help="start from the weights in this folder's KIND folders")
    parser.add_argument("--prediction", choices=get_args(Prediction), default="v", help="what the networks answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--graph", action="store_true", help="replay the step as a CUDA graph")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--bench", type=int, metavar="STEPS", help="only time this many steps of each")
    parser.add_argument("--no-samples", action="store_true", help="write no sample sheet and no metrics")
    parser.add_argument("--sample-steps", type=int, default=30, help="DDIM steps of the samples")
    return parser.parse_args(arguments)


def chosen_training(kind: PriorKind, options: argparse.Namespace) -> Training:
    """The published run of a kind, changed by the command line."""
    changes = {name: getattr(options, name) for name in ("steps", "minutes", "batch", "bank", "lr", "noisy", "keep")}
    changes = {name: value for name, value in changes.items() if value is not None}
    flags = {name: getattr(options, name) for name in ("seed", "graph", "compile", "channels_last", "prediction")}
    return replace(TRAININGS[kind], **changes, **flags)


def bench(training: Training, device: torch.device, n_steps: int) -> dict[str, float]:
    """Time a training step: seconds to the first one and steps a second afterwards."""
    torch.manual_seed(0)
    prior = build_prior(training.kind).to(device)
    optimizer = make_optimizer(prior, training, device)
    begun = time.perf_counter()
    bank = render_bank(training.kind, min(training.bank, 4096), torch.Generator().manual_seed(0), device)
    rendered = time.perf_counter() - begun
    make_batch, generator = batch_maker(training.kind, bank), torch.Generator(device).manual_seed(0)
    levels = levels_of(noise_of(scheduler_config(training.kind, training.prediction))[0], device)
    begun = time.perf_counter()
    step = make_step(prior, optimizer, levels, training, make_batch(training.batch, generator))
    set_rate(optimizer, training.lr)
    first = step(make_batch(training.batch, generator)).item()
    for _ in range(3):
        step(make_batch(training.batch, generator))
    ready = time.perf_counter() - begun
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(n_steps):
        loss = step(make_batch(training.batch, generator))
    last = loss.item()
    rate = n_steps / (time.perf_counter() - begun)
    return {"render_4096_s": rendered, "ready_s": ready, "steps_per_s": rate, "loss_first": first, "loss_last": last}


def main(arguments: list[str] | None = None) -> None:
    """Train, sample, measure."""
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    for kind in options.only:
        training = chosen_training(kind, options)
        if options.bench:
            print(kind, json.dumps(bench(training, device, options.bench)), flush=True)
            continue
        folder = train(training, options.out, device, options.start_from, lambda line: print(line, flush=True))
        if not options.no_samples:
            from .samples import write_samples

            metrics = write_samples(folder, kind, device, options.sample_steps)
            print(kind, json.dumps(metrics), flush=True)


if __name__ == "__main__":
    main()
