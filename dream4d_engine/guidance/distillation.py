"""Score distillation: the loss that makes images look the way a diffusion model expects.

Letters as in denoiser.py: z encoded images, x = z + sigma * eps, x0 the (guided) prediction of z. Each way of
distilling names a target for z and pulls it there with 0.5 * |z - stop(target)|^2, so the gradient on z is
(z - target) / n:

    sds        target = z - w * (eps_hat - eps), w: see noise.py         DreamFusion 2209.14988, equation 3
    x0         target = x0                                               MVDream 2308.16512, equation 5
    multistep  target = the end of a guided walk from x to no noise      HiFA 2305.18766, section 3.1
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..cameras import CameraBatch
from ..division import WHOLE, Division
from ..randomness import Draw, draw_rows
from ..schedules import Schedule
from ..transfers import send
from . import shares
from .combine import cfg, perp_neg, rescale
from .denoiser import Conditions, Denoiser, stack_conditions
from .noise import NoiseSchedule
from .prompts import PerpNegConditions

LossForm = Literal["sds", "x0", "multistep"]
BatchUnit = Literal["images", "groups"]
NONFINITE = "nonfinite"
"""The name of a term: the share of a prior's answer that is not finite."""


@dataclass(frozen=True)
class DistillationConfig:
    """How one prior guides."""

    guidance_scale: float  # in the form negative + scale * (text - negative); see combine.published_scale
    min_noise: Schedule  # least noise level as a share of the training schedule, over the run
    max_noise: Schedule  # largest noise level as a share of the training schedule, over the run
    loss: LossForm = "sds"  # which target the images are pulled to; see guidance/distillation.py
    rescale: float = 0.0  # share of the guided x0 whose standard deviation is brought to that of the text prediction
    n_steps: int = 1  # of the multistep walk over the whole schedule (from a share s it takes about n_steps * s)
    color_weight: float = 0.0  # of the squared distance between the images and the decoded target
    perp_neg: bool = False  # perp-neg instead of plain guidance, for priors that see single images
    shared_timestep: bool = False  # one noise level for all groups instead of one for each
    # What the summed loss is divided by the number of. None: what the published recipes do, groups for multistep
    # (a video is one sample) and images otherwise (each of a group's views is one).
    batch: BatchUnit | None = None
    # Images whose camera is this far from the front or farther are left out (180: none is). For priors that see
    # single images.
    max_azimuth_deg: float = 180.0
    last_guidance_scale: float | None = None  # what the scale goes to over the run, linearly; None: it stays

    def at(self, progress: float) -> DistillationConfig:
        """What holds at this share of the run."""
        if self.last_guidance_scale is None:
            return self
        scale = Schedule(self.guidance_scale, self.last_guidance_scale)(progress)
        return replace(self, guidance_scale=scale, last_guidance_scale=None)

    def __post_init__(self) -> None:
        if self.loss not in get_args(LossForm):
            raise ValueError(f"loss must be one of {get_args(LossForm)}, got {self.loss!r}")
        if self.batch is not None and self.batch not in get_args(BatchUnit):
            raise ValueError(f"batch must be one of {get_args(BatchUnit)} or None, got {self.batch!r}")
        if not 0.0 <= self.rescale <= 1.0:
            raise ValueError(f"rescale is a share and must lie in [0, 1], got {self.rescale}")
        if self.n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, got {self.n_steps}")
        if self.color_weight < 0:
            raise ValueError(f"color_weight must not be negative, got {self.color_weight}")
        for name in ("min_noise", "max_noise"):
            schedule = getattr(self, name)
            if not (0 <= min(schedule.first, schedule.last) and max(schedule.first, schedule.last) <= 1):
                raise ValueError(f"{name} holds shares of the timesteps and must stay in [0, 1], got {schedule}")


@dataclass(frozen=True)
class Guidance:
    """A prior that has been told what to look for."""

    name: str  # of its terms and its random numbers
    denoiser: Denoiser
    # cameras [B, F] -> (text, negative); asked for in the denoiser's grouping, [B * F, 1] where its n_frames is None
    conditions: Callable[[CameraBatch], tuple[Conditions, Conditions]]
    config: DistillationConfig
    perp_neg: Callable[[CameraBatch], PerpNegConditions] | None = None  # what the config's perp_neg needs
    division: Division = WHOLE  # among processes that all ask about the same images


@dataclass(frozen=True)
class DistillationOutput:
    """What one distillation gives; B', F' in the grouping that the denoiser saw."""

    loss: Tensor  # [], with gradient to the images
    terms: dict[str, Tensor]  # detached scalars to log, see `distill_at`
    share: Tensor  # [B'] of the noise schedule
    x0: Tensor  # [B', F', c, h, w], the guided prediction of z, or the end of the walk for multistep


def _per_group(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1, 1]."""
    return values[:, None, None, None, None]


def sds_gradient(z: Tensor, x0: Tensor, sigma: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return w * (eps_hat - eps), w the schedule's weight, from x0; z, x0 [B, F, c, h, w], sigma [B]."""
    # eps_hat - eps = (z - x0) / sigma, whatever the model predicts
    return _per_group(schedule.weight(sigma) / sigma) * (z - x0)


def half_squared_distance(z: Tensor, target: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return (0.5 * |z - stop(target)|^2 / n, the share of values that were not finite and counted as 0)."""
    difference = z - target.detach()
    finite = difference.detach().isfinite()
    difference = torch.where(finite, difference, torch.zeros_like(difference))  # a product with 0 would stay NaN
    return 0.5 * difference.square().sum() / n, (~finite).float().mean()


def distillation_loss(z: Tensor, target: Tensor, n: int | None = None) -> Tensor:
    """Return 0.5 * |z - stop(target)|^2 summed and divided by `n`, by default the number of images B * F.

    Its gradient on z is (z - target) / n; values that are not finite count as 0.
    """
    return half_squared_distance(z, target, n or z.shape[0] * z.shape[1])[0]


def color_loss(images: Tensor, target: Tensor, n: int | None = None) -> Tensor:
    """Return |images - stop(target)|^2 summed and divided by `n`, by default the number of groups B.

    [B, F, 3, H, W] in [0, 1]; values that are not finite count as 0. HiFA (2305.18766), section 3.1.
    """
    return 2 * half_squared_distance(images, target, n or images.shape[0])[0]


def ancestral_step(x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor) -> Tensor:
    """Return x at sigma_next: a DDIM step with eta = 1 (2010.02502, equations 12 and 16); sigmas [B].

    Sigmas that are equal leave x as it is.
    """
    # equation 16 on the variance exploding scale: s^2 = s_n^2 * (1 - s_n^2 / sigma^2) with s_n = sigma_next
    fresh = (sigma_next**2 * (1 - sigma_next**2 / sigma**2)).clamp_min(0).sqrt()
    # equation 12: of the predicted noise (x - x0) / sigma, s_n^2 / sigma is left
    return x0 + _per_group((sigma_next / sigma) ** 2) * (x - x0) + _per_group(fresh) * noise


def multistep_target(
    x: Tensor,
    share: Tensor,
    schedule: NoiseSchedule,
    predict: Callable[[Tensor, Tensor], Tensor],
    n_steps: int,
    noise: Callable[[torch.Size], Tensor],
) -> Tensor:
    """Walk from x to the end of the schedule and return where it leads, on the scale of z.

    Args:
        x: [B, F, c, h, w] at `share` [B], on the CPU: it says how many steps there are.
        predict: (x, sigma [B]) -> guided x0. noise: shape -> standard normal noise, called once a step.
    """
    n_levels = schedule.n_levels
    if n_steps < 1 or (n_levels is not None and n_steps > n_levels):
        raise ValueError(f"n_steps must lie between 1 and the number of training timesteps ({n_levels}), got {n_steps}")
    # of T timesteps a step goes down by T // n_steps of them, until the share is 0
    stride = 1 / n_steps if n_levels is None else n_levels // n_steps / n_levels
    share = share.double().cpu()  # many small steps must add up
    moving = torch.ones_like(share, dtype=torch.bool)
    while moving.any():
        following = share - stride
        sigma, sigma_next = (send(schedule.sigma_of(s.clamp_min(0)), x.device) for s in (share, following))
        fresh = send(noise(x.shape), x.device).to(x)
        stepped = ancestral_step(x, predict(x, sigma), sigma, sigma_next, fresh)
        # groups with a smaller share arrive earlier
        x = stepped if moving.all() else torch.where(_per_group(send(moving, x.device)), stepped, x)
        share, moving = following, moving & (following > 1e-9)
    # the lowest level, not no noise at all; the variance preserving x there, as the published targets are
    last = schedule.sigma_of(torch.zeros(())).to(x.dtype)
    return x * (1 + last**2).rsqrt().item()  # a number: a tensor's copy to the device would wait for the walk


def guided_prediction(guidance: Guidance, cameras: CameraBatch) -> Callable[[Tensor, Tensor], Tensor]:
    """Return (x, sigma [B]) -> x0 after guidance and rescaling, all conditions in one forward pass, no gradient."""
    denoiser, config = guidance.denoiser, guidance.config
    text, negative = guidance.conditions(cameras)
    avoidance = None
    if config.perp_neg:
        if guidance.perp_neg is None:
            raise ValueError(
                f"guidance {guidance.name!r} has no perp-neg conditions: turn perp_neg off or pass them as perp_neg"
            )
        avoidance = guidance.perp_neg(cameras)
    each = (text, negative) if avoidance is None else (avoidance.text, negative, *avoidance.avoid)
    n, together = len(each), stack_conditions(each)  # once, however many steps a walk has

    @torch.no_grad()
    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        # [n B, F, c, h, w], in one pass
        x0 = shares.denoise(denoiser, guidance.division, x.repeat(n, 1, 1, 1, 1), sigma.repeat(n), together)
        x0_text, x0_negative, *x0_avoid = x0.chunk(n)
        if avoidance is None:
            guided = cfg(x0_text, x0_negative, config.guidance_scale)
        else:
            guided = perp_neg(x0_text, x0_negative, x0_avoid, avoidance.weights, config.guidance_scale)
        return rescale(guided, x0_text, config.rescale)

    return predict


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [B, F, 3, H, W] bilinearly to (height, width); pixels are areas (align_corners off), no antialiasing."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    resized = functional.interpolate(images.flatten(0, 1), tuple(size), mode="bilinear", align_corners=False)
    return resized.unflatten(0, images.shape[:2])


def noise_bounds(config: DistillationConfig, schedule: NoiseSchedule, progress: float) -> tuple[float, float]:
    """Return the smallest and the largest share of the schedule that may be drawn at this progress.

    Of T timesteps they are multiples of 1 / T, and at most (T - 1) / T.
    """
    low, high = config.min_noise(progress), config.max_noise(progress)
    if low > high:
        raise ValueError(f"min_noise is above max_noise at progress {progress:g}: {low:g} > {high:g}")
    n = schedule.n_levels
    if n is not None:  # the small addition keeps 0.29 * 100 from becoming 28
        low, high = (min(int(share * n + 1e-6), n - 1) / n for share in (low, high))
    return low, high


def draw_shares(
    config: DistillationConfig, schedule: NoiseSchedule, n_groups: int, progress: float, draw: Draw, name: str = ""
) -> Tensor:
    """Draw [n_groups] shares of the schedule (float64, CPU), uniform between the config's bounds, both included.

    `name`: of the prior, whose shares are its own.
    """
    low, high = noise_bounds(config, schedule, progress)
    purpose, n = f"{name} share", schedule.n_levels

    def one(generator: torch.Generator) -> Tensor:
        if n is not None:
            # a timestep, both bounds included, as a share
            return torch.randint(round(low * n), round(high * n) + 1, (1,), generator=generator).double() / n
        return low + (high - low) * torch.rand(1, generator=generator, dtype=torch.float64)

    if config.shared_timestep:
        return one(draw.for_(purpose)).expand(n_groups).clone()
    return torch.cat([one(generator) for generator in draw.groups(purpose, n_groups)])


def _group_for(guidance: Guidance, images: Tensor, cameras: CameraBatch) -> tuple[Tensor, CameraBatch, Tensor | None]:
    """Return the images and cameras grouped as the denoiser sees them, and which groups it is to see (None: all)."""
    if guidance.denoiser.n_frames is not None:
        return images, cameras, None
    images, cameras = images.flatten(0, 1)[:, None], cameras.reshape(-1, 1)
    if guidance.config.max_azimuth_deg >= 180:
        return images, cameras, None
    azimuth = cameras.azimuth[:, 0]
    away = torch.rad2deg(torch.atan2(azimuth.sin(), azimuth.cos())).abs()  # in [0, 180]
    return images, cameras, (away < guidance.config.max_azimuth_deg).cpu()


def distill_at(
    guidance: Guidance,
    images: Tensor,
    cameras: CameraBatch,
    share: Tensor,
    noise: Callable[[torch.Size], Tensor],
    carried: Tensor | None = None,
    encoded_by: Sequence[int] | None = None,
) -> DistillationOutput:
    """Distil at given noise levels, with given noise; nothing else is random.

    Args:
        images: [B, F, 3, H, W] in [0, 1], grouped as the denoiser sees them. share: [B] of the schedule, on the CPU.
        noise: shape of z -> standard normal noise; called for x first, then once for each step of a walk.
        carried: [B, F] bool, on the CPU: see Denoiser.encode.
        encoded_by: how many of the B * F images each process encodes; None: all of them.
    """
    denoiser, config, division = guidance.denoiser, guidance.config, guidance.division
    resized = resize_images(images, denoiser.image_size)
    z = shares.encode(denoiser, division, encoded_by, resized, carried)
    sigma = send(denoiser.noise.sigma_of(share), z.device)
    predict = guided_prediction(guidance, cameras)
    with torch.no_grad():
        x = z + _per_group(sigma) * send(noise(z.shape), z.device).to(z)  # [B, f, c, h, w]
        if config.loss == "multistep":
            target = x0 = multistep_target(x, share, denoiser.noise, predict, config.n_steps, noise)
        else:
            x0 = predict(x, sigma)
            target = x0 if config.loss == "x0" else z - sds_gradient(z, x0, sigma, denoiser.noise)
    unit = config.batch or ("groups" if config.loss == "multistep" else "images")
    n = z.shape[0] if unit == "groups" else z.shape[0] * z.shape[1]
    loss, nonfinite = half_squared_distance(z, target, n)
    terms = {
        "distillation": loss.detach(),  # this and "color": the parts of the loss, weighted
        "gradient_norm": (2 * loss.detach() / n).sqrt(),  # of the loss with respect to z: |z - target| / n
        NONFINITE: nonfinite,  # share of the gradient's values that counted as 0
        "noise": send(share.float(), z.device).mean(),
    }
    if config.color_weight > 0:
        with torch.no_grad():
            # one bad value would spread
            decoded = shares.decode(denoiser, division, torch.where(target.isfinite(), target, z))
        color = config.color_weight * color_loss(resized, decoded, n)
        terms["color"] = color.detach()
        loss = loss + color
    return DistillationOutput(loss, terms, share, x0)


def distill(
    guidance: Guidance,
    images: Tensor,
    cameras: CameraBatch,
    progress: float,
    draw: Draw,
    carried: Tensor | None = None,
) -> DistillationOutput:
    """Score images by a prior; the gradient reaches them through the encoder only, never through the denoiser.

    Args:
        images: [B, F, 3, H, W] in [0, 1], with gradient, of any size: they are resized for the encoder.
        cameras: [B, F]. draw: of this step; noise level and noise of each group that the denoiser sees are its own.
        carried: [B, F] bool, on the CPU: which of the images have gradient; None: all.
    """
    if images.ndim != 5 or images.shape[2] != 3 or tuple(images.shape[:2]) != cameras.shape:
        raise ValueError(
            f"images must be [B, F, 3, H, W] with the cameras' B, F = {cameras.shape}, got {tuple(images.shape)}"
        )
    seen, cameras, keep = _group_for(guidance, images, cameras)
    if carried is not None and guidance.denoiser.n_frames is None:
        carried = carried.reshape(-1, 1)
    if keep is not None and not keep.any():  # a loss of 0 that still has a gradient, of 0
        zero, empty = images.new_zeros(()), images.new_zeros((0, 1, 1, 1, 1))
        terms = {name: zero for name in ("distillation", "gradient_norm", NONFINITE, "noise")}
        return DistillationOutput(0.0 * images.sum(), terms, torch.zeros(0), empty)
    n_groups, turns = seen.shape[0], itertools.count()
    encoded_by = shares.encoded_by(guidance.denoiser, guidance.division, images.shape[0] * images.shape[1], keep)
    share = draw_shares(guidance.config, guidance.denoiser.noise, n_groups, progress, draw, guidance.name)

    def noise(shape: torch.Size) -> Tensor:
        purpose = f"{guidance.name} noise {next(turns)}"
        # for all groups, those that are left out too: a group's numbers follow from its place in the batch
        drawn = draw_rows(torch.randn, (n_groups, *shape[1:]), draw.groups(purpose, n_groups))
        return drawn if keep is None else drawn[keep]

    if keep is not None:
        seen, cameras, share = seen[send(keep, seen.device)], cameras.groups(keep), share[keep]
        carried = None if carried is None else carried[keep]
    now = replace(guidance, config=guidance.config.at(progress))
    return distill_at(now, seen, cameras, share, noise, carried, encoded_by)
