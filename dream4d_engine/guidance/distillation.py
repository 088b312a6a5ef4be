"""Score distillation: the loss that makes pictures look the way a diffusion model expects.

Letters as in denoiser.py: z encoded pictures, x = z + sigma * eps, x0 the (guided) prediction of z. Each way of
distilling names a target for z and pulls it there with 0.5 * |z - stop(target)|^2, so the gradient on z is
(z - target) / n:

    sds        target = z - w * (eps_hat - eps), w = 1 - alpha_bar       DreamFusion 2209.14988, equation 3
    x0         target = x0                                               MVDream 2308.16512, equation 5
    multistep  target = the end of a guided walk from x to no noise      HiFA 2305.18766, section 3.1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..cameras import CameraBatch
from ..randomness import draw_rows, own_rows, share_of
from ..schedules import Schedule
from ..transfers import send
from .combine import cfg, perp_neg, rescale
from .denoiser import Conditions, Denoiser, denoise_each, sigma_of_alpha_bar
from .prompts import PerpNegConditions

LossForm = Literal["sds", "x0", "multistep"]
BatchUnit = Literal["pictures", "groups"]
NONFINITE = "nonfinite"
"""The name of a term: the share of a prior's answer that is not finite."""


@dataclass(frozen=True)
class DistillationConfig:
    """How one prior guides.

    Args:
        guidance_scale: in the form negative + scale * (text - negative); see combine.published_scale.
        min_noise, max_noise: bounds of the timestep as shares of the training timesteps, over progress.
        loss: see the module's docstring.
        rescale: share of the guided x0 whose standard deviation is brought to that of the text prediction.
        n_steps: of the multistep walk over the whole schedule (from timestep t it takes about n_steps * t / T).
        color_weight: of the squared distance between the pictures and the decoded target.
        perp_neg: use Guidance.perp_neg instead of plain guidance.
        shared_timestep: one timestep for all groups instead of one for each.
        batch: what the summed loss is divided by the number of. None: what the published recipes do, groups for
            multistep (a video is one sample) and pictures otherwise (each of a group's views is one).
        max_azimuth_deg: pictures whose camera is this far from the front or farther are left out (180: none is).
            For priors that see single pictures.
    """

    guidance_scale: float
    min_noise: Schedule
    max_noise: Schedule
    loss: LossForm = "sds"
    rescale: float = 0.0
    n_steps: int = 1
    color_weight: float = 0.0
    perp_neg: bool = False
    shared_timestep: bool = False
    batch: BatchUnit | None = None
    max_azimuth_deg: float = 180.0

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
    """A prior that has been told what to look for.

    Args:
        conditions: (text, negative) for cameras [B, F]; they are asked for in the grouping that the denoiser sees,
            [B * F, 1] where its n_frames is None.
        perp_neg: what the config's perp_neg needs (see prompts.perp_neg_conditions), or None.
    """

    name: str
    denoiser: Denoiser
    conditions: Callable[[CameraBatch], tuple[Conditions, Conditions]]
    config: DistillationConfig
    perp_neg: Callable[[CameraBatch], PerpNegConditions] | None = None


@dataclass(frozen=True)
class DistillationOutput:
    """What one distillation gives.

    Args:
        loss: scalar, with gradient to the pictures.
        terms: detached scalars to log: "distillation" and "color" (the parts of the loss, weighted),
            "gradient_norm" (of the loss with respect to z), NONFINITE (the share of the gradient's values that were
            not finite and counted as 0), "timestep" (mean).
        timestep: [B'] int64. x0: [B', F', c, h, w], the guided prediction of z, or the end of the walk for
            multistep. Both in the grouping that the denoiser saw.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    timestep: Tensor
    x0: Tensor


def _per_group(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1, 1]."""
    return values[:, None, None, None, None]


def sds_gradient(z: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Return w * (eps_hat - eps) with w = 1 - alpha_bar, from x0; z, x0 [B, F, c, h, w], sigma [B].

    eps_hat - eps = (z - x0) / sigma and w = sigma^2 / (1 + sigma^2).
    """
    return _per_group(sigma / (1 + sigma**2)) * (z - x0)


def half_squared_distance(z: Tensor, target: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return (0.5 * |z - stop(target)|^2 / n, the share of values that were not finite and counted as 0)."""
    difference = z - target.detach()
    finite = difference.detach().isfinite()
    difference = torch.where(finite, difference, torch.zeros_like(difference))
    return 0.5 * difference.square().sum() / n, (~finite).float().mean()


def distillation_loss(z: Tensor, target: Tensor, n: int | None = None) -> Tensor:
    """Return 0.5 * |z - stop(target)|^2 summed and divided by `n`, by default the number of pictures B * F.

    Its gradient on z is (z - target) / n; values that are not finite count as 0.
    """
    return half_squared_distance(z, target, n or z.shape[0] * z.shape[1])[0]


def color_loss(pictures: Tensor, target: Tensor, n: int | None = None) -> Tensor:
    """Return |pictures - stop(target)|^2 summed and divided by `n`, by default the number of groups B.

    [B, F, 3, H, W] in [0, 1]; values that are not finite count as 0. HiFA (2305.18766), section 3.1.
    """
    return 2 * half_squared_distance(pictures, target, n or pictures.shape[0])[0]


def ancestral_step(x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor) -> Tensor:
    """Return x at sigma_next: a DDIM step with eta = 1 (2010.02502, equations 12 and 16); sigmas [B].

    On the variance exploding scale its deviation is s^2 = s_n^2 * (1 - s_n^2 / sigma^2) with s_n = sigma_next, and
    what is left of the predicted noise is s_n^2 / sigma. Sigmas that are equal leave x as it is.
    """
    fresh = (sigma_next**2 * (1 - sigma_next**2 / sigma**2)).clamp_min(0).sqrt()
    return x0 + _per_group((sigma_next / sigma) ** 2) * (x - x0) + _per_group(fresh) * noise


def multistep_target(
    x: Tensor,
    timestep: Tensor,
    alphas_bar: Tensor,
    predict: Callable[[Tensor, Tensor], Tensor],
    n_steps: int,
    noise: Callable[[torch.Size], Tensor],
) -> Tensor:
    """Walk from x to the end of the schedule and return where it leads, on the scale of z.

    Each step goes from timestep t to t - T // n_steps, until t <= 0. The schedule ends at its first timestep, not at
    no noise at all, and the result is the variance preserving x there, as the published targets are.

    Args:
        x: [B, F, c, h, w] at `timestep` [B], best on the CPU: it says how many steps there are. alphas_bar: [T].
        predict: (x, sigma [B]) -> guided x0. noise: shape -> standard normal noise, called once a step.
    """
    n_timesteps = alphas_bar.shape[0]
    if not 1 <= n_steps <= n_timesteps:
        raise ValueError(f"n_steps must lie in [1, {n_timesteps}], the number of timesteps, got {n_steps}")
    sigmas = sigma_of_alpha_bar(alphas_bar.to(x.device))
    timestep = timestep.cpu()
    moving = torch.ones_like(timestep, dtype=torch.bool)
    while moving.any():
        following = timestep - n_timesteps // n_steps
        sigma, sigma_next = (sigmas[send(t.clamp_min(0), x.device)] for t in (timestep, following))
        fresh = send(noise(x.shape), x.device).to(x)
        stepped = ancestral_step(x, predict(x, sigma), sigma, sigma_next, fresh)
        # groups with a smaller timestep arrive earlier
        x = stepped if moving.all() else torch.where(_per_group(send(moving, x.device)), stepped, x)
        timestep, moving = following, moving & (following > 0)
    return x * alphas_bar[0].to(x).sqrt()


def walk_length(timestep: int, n_timesteps: int, n_steps: int) -> int:
    """Return how many steps `multistep_target` takes from a timestep."""
    return max(1, -(-timestep // (n_timesteps // n_steps)))


def guided_prediction(guidance: Guidance, cameras: CameraBatch) -> Callable[[Tensor, Tensor], Tensor]:
    """Return (x, sigma [B]) -> x0 after guidance and rescaling, all conditions in one forward pass, no gradient."""
    denoiser, config = guidance.denoiser, guidance.config
    text, negative = guidance.conditions(cameras)
    if config.perp_neg and guidance.perp_neg is None:
        raise ValueError(
            f"guidance {guidance.name!r} has no perp-neg conditions: turn perp_neg off or pass them as perp_neg"
        )
    avoidance = guidance.perp_neg(cameras) if config.perp_neg else None
    each = (text, negative) if avoidance is None else (avoidance.text, negative, *avoidance.avoid)

    @torch.no_grad()
    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        x0_text, x0_negative, *x0_avoid = denoise_each(denoiser, x, sigma, each)
        if avoidance is None:
            guided = cfg(x0_text, x0_negative, config.guidance_scale)
        else:
            guided = perp_neg(x0_text, x0_negative, x0_avoid, avoidance.weights, config.guidance_scale)
        return rescale(guided, x0_text, config.rescale)

    return predict


def resize_pictures(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [B, F, 3, H, W] bilinearly to (height, width); pixels are areas (align_corners off), no antialiasing."""
    if tuple(pictures.shape[-2:]) == tuple(size):
        return pictures
    resized = functional.interpolate(pictures.flatten(0, 1), tuple(size), mode="bilinear", align_corners=False)
    return resized.unflatten(0, pictures.shape[:2])


def timestep_bounds(config: DistillationConfig, n_timesteps: int, progress: float) -> tuple[int, int]:
    """Return the smallest and the largest timestep that may be drawn at this progress."""
    shares = config.min_noise(progress), config.max_noise(progress)
    # the small addition keeps 0.29 * 100 from becoming 28
    low, high = (min(int(share * n_timesteps + 1e-6), n_timesteps - 1) for share in shares)
    if low > high:
        raise ValueError(f"min_noise is above max_noise at progress {progress:g}: {shares[0]:g} > {shares[1]:g}")
    return low, high


def draw_timestep(
    config: DistillationConfig, n_timesteps: int, n_groups: int, progress: float, generator: torch.Generator
) -> Tensor:
    """Draw [n_groups] timesteps (int64, CPU), uniform between the config's bounds, both included."""
    return own_rows(_draw_timesteps(config, n_timesteps, n_groups, progress, generator), generator).clone()


def _draw_timesteps(
    config: DistillationConfig, n_timesteps: int, n_groups: int, progress: float, generator: torch.Generator
) -> Tensor:
    """Draw the timesteps of all processes' groups."""
    low, high = timestep_bounds(config, n_timesteps, progress)
    n_all = n_groups * share_of(generator)[1]
    n_draws = 1 if config.shared_timestep else n_all
    return torch.randint(low, high + 1, (n_draws,), generator=generator).expand(n_all)


def _group_for(guidance: Guidance, pictures: Tensor, cameras: CameraBatch) -> tuple[Tensor, CameraBatch, Tensor | None]:
    """Return the pictures and cameras grouped as the denoiser sees them, and which groups it is to see (None: all)."""
    if guidance.denoiser.n_frames is not None:
        return pictures, cameras, None
    pictures, cameras = pictures.flatten(0, 1)[:, None], cameras.reshape(-1, 1)
    if guidance.config.max_azimuth_deg >= 180:
        return pictures, cameras, None
    azimuth = cameras.azimuth[:, 0]
    away = torch.rad2deg(torch.atan2(azimuth.sin(), azimuth.cos())).abs()
    keep = away < guidance.config.max_azimuth_deg
    return pictures, cameras, keep.cpu()


def distill_at(
    guidance: Guidance,
    pictures: Tensor,
    cameras: CameraBatch,
    timestep: Tensor,
    noise: Callable[[torch.Size], Tensor],
) -> DistillationOutput:
    """Distil at given timesteps, with given noise; nothing else is random.

    Args:
        pictures: [B, F, 3, H, W] in [0, 1], grouped as the denoiser sees them. timestep: [B] int64, on the CPU.
        noise: shape of z -> standard normal noise; called for x first, then once for each step of a walk.
    """
    denoiser, config = guidance.denoiser, guidance.config
    resized = resize_pictures(pictures, denoiser.image_size)
    z = denoiser.encode(resized)
    steps, timestep = timestep, send(timestep, z.device)
    alphas_bar = denoiser.alphas_bar.to(z.device, torch.float32)
    sigma = sigma_of_alpha_bar(alphas_bar[timestep])
    predict = guided_prediction(guidance, cameras)
    with torch.no_grad():
        x = z + _per_group(sigma) * send(noise(z.shape), z.device).to(z)
        if config.loss == "multistep":
            target = x0 = multistep_target(x, steps, alphas_bar, predict, config.n_steps, noise)
        else:
            x0 = predict(x, sigma)
            target = x0 if config.loss == "x0" else z - sds_gradient(z, x0, sigma)
    n = _batch_size(config, z.shape)
    loss, nonfinite = half_squared_distance(z, target, n)
    terms = {
        "distillation": loss.detach(),
        "gradient_norm": (2 * loss.detach() / n).sqrt(),
        NONFINITE: nonfinite,
        "timestep": timestep.float().mean(),
    }
    if config.color_weight > 0:
        with torch.no_grad():
            decoded = denoiser.decode(torch.where(target.isfinite(), target, z))  # one bad value would spread
        color = config.color_weight * color_loss(resized, decoded, n)
        terms["color"] = color.detach()
        loss = loss + color
    return DistillationOutput(loss, terms, timestep, x0)


def _batch_size(config: DistillationConfig, shape: torch.Size) -> int:
    """Return what the summed loss is divided by; shape (B, F, ...)."""
    unit = config.batch or ("groups" if config.loss == "multistep" else "pictures")
    return shape[0] if unit == "groups" else shape[0] * shape[1]


def distill(
    guidance: Guidance, pictures: Tensor, cameras: CameraBatch, progress: float, generator: torch.Generator
) -> DistillationOutput:
    """Score pictures by a prior; the gradient reaches them through the encoder only, never through the denoiser.

    Args:
        pictures: [B, F, 3, H, W] in [0, 1], with gradient, of any size: they are resized for the encoder.
        cameras: [B, F]. generator: on the CPU; the timesteps are drawn first, then the noise.
    """
    if pictures.ndim != 5 or pictures.shape[2] != 3 or tuple(pictures.shape[:2]) != cameras.shape:
        raise ValueError(
            f"pictures must be [B, F, 3, H, W] with the cameras' B, F = {cameras.shape}, got {tuple(pictures.shape)}"
        )
    config, n_timesteps = guidance.config, guidance.denoiser.alphas_bar.shape[0]
    seen, cameras, keep = _group_for(guidance, pictures, cameras)
    n_groups = seen.shape[0]
    # numbers are drawn for groups that are left out too, so that processes who share the work stay in step
    everyones = _draw_timesteps(config, n_timesteps, n_groups, progress, generator)
    timestep = own_rows(everyones, generator).clone()

    def noise(shape: torch.Size) -> Tensor:
        drawn = draw_rows(torch.randn, (n_groups, *shape[1:]), generator)
        return drawn if keep is None else drawn[keep]

    blank = keep is not None and not keep.any()
    if blank and share_of(generator)[1] == 1:
        return _nothing_seen(pictures)
    if blank:
        keep[0] = True  # seen for nothing, so that as many numbers are drawn as elsewhere
    if keep is not None:
        seen, cameras, timestep = seen[send(keep, seen.device)], cameras.groups(keep), timestep[keep]
    output = distill_at(guidance, seen, cameras, timestep, noise)
    if config.loss == "multistep":
        longest, own = (walk_length(int(t.max()), n_timesteps, config.n_steps) for t in (everyones, timestep))
        for _ in range(longest - own):
            noise(output.x0.shape)
    return replace(output, loss=0 * output.loss) if blank else output


def _nothing_seen(pictures: Tensor) -> DistillationOutput:
    """The output where every picture was left out: a loss of 0 that still has a gradient, of 0."""
    zero = pictures.new_zeros(())
    terms = {name: zero for name in ("distillation", "gradient_norm", NONFINITE, "timestep")}
    empty = pictures.new_zeros((0, 1, 1, 1, 1))
    return DistillationOutput(0.0 * pictures.sum(), terms, torch.zeros(0, dtype=torch.int64), empty)
