"""Samples of a toy prior: sheets to look at, and numbers that say whether it knows its world.

The gate of the video prior: from a *still* take, noised to timestep 700, its one-step guess must already show the
motion that the caption asks for. Score distillation can only teach what that guess holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cameras import CameraBatch, fixed_take, make_cameras
from ..guidance.denoiser import Conditions, Denoiser, denoise_each, stack_conditions
from ..priors.conditioning import image_conditions, text_conditions
from ..priors.formats.configurations import noise_of
from ..priors.handle import PriorKind
from ..priors.loading import LoadedPrior, load_prior
from ..training.config import TOY_DISTANCE, TOY_FOV_DEG
from .captions import COLORS, MOTIONS, parse_caption
from .models import IMAGE_SIZE, N_FRAMES, scheduler_config, write_json
from .world import render_captions

if TYPE_CHECKING:
    from PIL import Image

CAPTIONS = (
    "a red cube is jumping",
    "a blue sphere is sliding",
    "a green cone is stretching",
    "a yellow cylinder is spinning",
    "a purple torus is swaying",
    "a white snowman is jumping",
    "an orange sphere is stretching",
    "a cyan cube is spinning",
    "a red snowman is sliding",
    "a blue cone is swaying",
    "a green torus is still",
    "a yellow snowman is spinning",
)
GUIDANCE_SCALE, GATE_NOISE, GATE_GREY, GATE_AZIMUTH_DEG = 3.0, 0.7, 0.5, 20.0


# --- Sampling --------------------------------------------------------------------------------------------------


def sample(
    denoiser: Denoiser,
    conditions: tuple[Conditions, Conditions],
    generator: torch.Generator,
    n_steps: int = 30,
    scale: float = GUIDANCE_SCALE,
) -> Tensor:
    """Draw images [B, F, 3, H, W] in [0, 1] by deterministic DDIM (2010.02502) with classifier-free guidance."""
    text, negative = conditions
    n_groups, n_frames = text.tokens.shape[:2]
    device = text.tokens.device
    levels = denoiser.noise.sigma_of(torch.linspace(1, 0, n_steps))
    sigmas = torch.cat((levels[levels > 0], torch.zeros(1))).to(device)  # a flow's share 0 is no noise already
    shape = (n_groups, n_frames, 3, *denoiser.image_size)
    x = sigmas[0] * torch.randn(shape, generator=generator).to(device)
    for sigma, next_sigma in itertools.pairwise(sigmas):
        x0 = guided(denoiser, x, sigma.expand(n_groups), (text, negative), scale)
        x = x0 + (x - x0) * (next_sigma / sigma)
    return denoiser.decode(x).clamp(0, 1)


def guided(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, conditions: tuple[Conditions, Conditions], scale: float
) -> Tensor:
    """Return the prediction x0 under classifier-free guidance."""
    text, negative = denoise_each(denoiser, x, sigma, conditions)
    return negative + scale * (text - negative)


# --- What an image shows --------------------------------------------------------------------------------------


def wall_of(images: Tensor) -> Tensor:
    """Return the background [..., 3, 1, 1] of images [..., 3, H, W]: the median of their border."""
    border = torch.cat((images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]), -1)
    return border.median(-1).values[..., None, None]


def foreground(images: Tensor, threshold: float = 0.05, softness: float = 0.15) -> Tensor:
    """Return [..., H, W] how surely a pixel differs from the background, 0 to 1."""
    difference = (images - wall_of(images)).abs().amax(-3)
    return ((difference - threshold) / softness).clamp(0, 1)


def darkness(images: Tensor) -> Tensor:
    """Return [..., H, W] how surely a pixel is the dark mark; backgrounds are never as dark."""
    return ((0.14 - images.amax(-3)) / 0.06).clamp(0, 1)


def nearest_color(image: Tensor) -> str:
    """Return the named colour of the object in an image [3, H, W], "none" where there is no object."""
    weight = (foreground(image) > 0.9).float() * (1 - darkness(image))
    if weight.sum() < 12:
        return "none"
    mean = (image * weight).sum((-1, -2)) / weight.sum()
    named = torch.tensor(list(COLORS.values()), device=image.device)
    # the light changes the brightness alone
    distance = (mean / mean.amax() - named / named.amax(-1, keepdim=True)).norm(dim=-1)
    return list(COLORS)[int(distance.argmin())]


def motion_signals(frames: Tensor) -> dict[str, Tensor]:
    """Return for each motion what it changes, [F], in pixels or logarithms, from frames [F, 3, H, W]."""
    weight = foreground(frames)
    height, width = frames.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=frames.device), torch.arange(width, device=frames.device), indexing="ij"
    )
    total = weight.sum((-1, -2)).clamp(min=1e-3)

    def mean(values: Tensor, weights: Tensor = weight, total: Tensor = total) -> Tensor:
        return (weights * values).sum((-1, -2)) / total

    cx, cy = mean(x), mean(y)
    dx, dy = x - cx[:, None, None], y - cy[:, None, None]
    var_x, var_y = mean(dx**2).clamp(min=1e-3), mean(dy**2).clamp(min=1e-3)
    dark = darkness(frames) * weight
    seen = dark.sum((-1, -2))
    mark_x = mean(x, dark, seen.clamp(min=1e-3))
    return {
        "jumping": -cy,
        "sliding": cx,
        "stretching": 0.5 * (var_y / var_x).log(),
        "spinning": torch.where(seen > 0.5, mark_x - cx, torch.zeros_like(cx)),
        "swaying": -mean(dx * dy) / var_y,
    }


def compare_signals(signal: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return (correlation, amplitude relative to the truth) of two signals [F] about their means."""
    signal, truth = signal - signal.mean(), truth - truth.mean()
    product = (signal * truth).sum()
    correlation = product / (signal.norm() * truth.norm()).clamp(min=1e-6)
    return float(correlation), float(signal.std() / truth.std().clamp(min=1e-6))


# --- Measures --------------------------------------------------------------------------------------------------


def view_cameras(n_groups: int) -> CameraBatch:
    """Four views of the moment 0: front, left, back, right; [n_groups, 4]."""
    azimuth = torch.tensor([[0.0, 90.0, 180.0, -90.0]]).expand(n_groups, 4)
    return _cameras(azimuth, 15.0)


def _cameras(azimuth_deg: Tensor, elevation_deg: float) -> CameraBatch:
    return make_cameras(
        torch.deg2rad(azimuth_deg),
        math.radians(elevation_deg),
        TOY_DISTANCE,
        math.radians(TOY_FOV_DEG),
        0.0,
        IMAGE_SIZE,
        IMAGE_SIZE,
    )


def _stack(parts: Sequence[tuple[Conditions, Conditions]]) -> tuple[Conditions, Conditions]:
    return stack_conditions([text for text, _ in parts]), stack_conditions([negative for _, negative in parts])


def captions_conditions(
    prior: LoadedPrior, captions: Sequence[str], cameras: CameraBatch
) -> tuple[Conditions, Conditions]:
    """Conditions of one caption a group, for the same cameras [1, F]."""
    return _stack([text_conditions(prior, caption)(cameras) for caption in captions])


def measure_views(images: Tensor, captions: Sequence[str]) -> dict[str, Any]:
    """Score images [N, 4, 3, H, W] of `view_cameras`: colours, silhouettes, and the mark in front alone."""
    colors = [[nearest_color(view) for view in group] for group in images]
    asked = [parse_caption(caption).color for caption in captions]
    right = [[color == wanted for color in group] for group, wanted in zip(colors, asked, strict=True)]
    marks = darkness(images).sum((-1, -2))
    truth = render_captions(captions, view_cameras(len(captions))).mask[..., 0] > 0.5
    found = foreground(images).cpu() > 0.5
    iou = (truth & found).sum((-1, -2)) / (truth | found).sum((-1, -2)).clamp(min=1)
    return {
        "colors_right": sum(map(sum, right)) / sum(map(len, right)),
        "captions_all_right": sum(map(all, right)),
        "mark_in_front": (marks[:, 0] > 4).float().mean().item(),
        "mark_behind": (marks[:, 2] > 2).float().mean().item(),
        "iou_mean": iou.mean().item(),
        "iou_per_caption": [round(v, 3) for v in iou.mean(-1).tolist()],
        "wrong": [f"{captions[i]}: {', '.join(colors[i])}" for i in range(len(captions)) if not all(right[i])],
    }


def measure_takes(images: Tensor, captions: Sequence[str], cameras: CameraBatch) -> dict[str, Any]:
    """Score clips [N, F, 3, H, W] of one caption each from cameras [1, F]: motion and colour."""
    rows: list[tuple[str, float | None, float]] = []  # caption, correlation (of a moving one), amplitude or pixels
    right: list[bool] = []
    for clip, caption in zip(images, captions, strict=True):
        truth = render_captions([caption], cameras, background=(GATE_GREY,) * 3).rgb[0].permute(0, 3, 1, 2)
        motion = parse_caption(caption).motion
        signals, true_signals = motion_signals(clip.cpu()), motion_signals(truth)
        right += [nearest_color(frame) == parse_caption(caption).color for frame in clip]
        if motion == "still":
            rows.append((caption, None, max(float(signals[name].std()) for name in ("jumping", "sliding"))))
        else:
            rows.append((caption, *compare_signals(signals[motion], true_signals[motion])))
    correlations = [correlation for _, correlation, _ in rows if correlation is not None]
    amplitudes = [amplitude for _, correlation, amplitude in rows if correlation is not None]
    return {
        "colors_right": sum(right) / len(right),
        "correlation_mean": sum(correlations) / max(len(correlations), 1),
        "correlation_min": min(correlations, default=0.0),
        "amplitude_mean": sum(amplitudes) / max(len(amplitudes), 1),
        "rows": [[row[0], *(None if v is None else round(v, 3) for v in row[1:])] for row in rows],
    }


GATE_OBJECTS = ("a red cube", "a blue sphere", "a yellow snowman", "a green cylinder", "a white cone", "a purple torus")


def motion_gate(prior: LoadedPrior, generator: torch.Generator) -> dict[str, Any]:
    """Per motion: the one-step guess from a still take at timestep 700 against the truth.

    Returns for each motion the mean correlation and amplitude over `GATE_OBJECTS`; for "still" the largest
    deviation of the object's place, in pixels.
    """
    denoiser = prior.denoiser
    cameras = fixed_take(N_FRAMES, IMAGE_SIZE, IMAGE_SIZE, azimuth_deg=GATE_AZIMUTH_DEG)
    wall = (GATE_GREY,) * 3
    still = render_captions(list(GATE_OBJECTS), _repeat(cameras.at_time(0.0), len(GATE_OBJECTS)), background=wall)
    z = denoiser.encode(still.rgb.permute(0, 1, 4, 2, 3).to(denoiser.device))
    # as much noise for a flow as for the priors of v
    schedule, _ = noise_of(scheduler_config("video"))
    sigma = schedule.sigma_of(torch.tensor(GATE_NOISE, device=z.device)).expand(len(z))
    x = z + sigma[0] * torch.randn(z.shape, generator=generator).to(z.device)
    report = {}
    for motion in MOTIONS:
        captions = [f"{thing} is {motion}" for thing in GATE_OBJECTS]
        x0 = guided(denoiser, x, sigma, captions_conditions(prior, captions, cameras), GUIDANCE_SCALE)
        measured = measure_takes(denoiser.decode(x0).clamp(0, 1), captions, cameras)
        if motion == "still":
            report[motion] = {"pixels_max": max(row[2] for row in measured["rows"])}
        else:
            names = ("correlation_mean", "correlation_min", "amplitude_mean")
            report[motion] = {name: round(measured[name], 3) for name in names}
    return report


def _repeat(cameras: CameraBatch, n: int) -> CameraBatch:
    return cameras._map(lambda tensor: tensor.expand(n, *tensor.shape[1:]))


# --- Sheets ----------------------------------------------------------------------------------------------------


def sheet(labels: Sequence[str], images: Tensor, zoom: int = 3) -> Image.Image:
    """Return an image with a labelled row for each of images [R, C, 3, H, W] in [0, 1]."""
    from PIL import Image, ImageDraw

    n_rows, n_columns, _, height, width = images.shape
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    whole = pixels.permute(0, 3, 1, 4, 2).reshape(n_rows * height, n_columns * width, 3)
    grid = Image.fromarray(whole.numpy())
    grid = grid.resize((n_columns * width * zoom, n_rows * height * zoom), Image.Resampling.NEAREST)
    margin = 190
    canvas = Image.new("RGB", (margin + grid.width, grid.height), "white")
    canvas.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(labels):
        draw.text((4, (row + 0.5) * height * zoom - 6), label, fill="black")
    return canvas


def _novel_views(prior: LoadedPrior, generator: torch.Generator, n_steps: int) -> tuple[Tensor, dict[str, Any]]:
    """Sample five turns of each object from one image of its front; rows are reference, then (sample, truth)."""
    reference = _cameras(torch.zeros(1, 1), 0.0)
    cameras = _cameras(torch.tensor([[0.0, 45.0, 90.0, 180.0, -90.0]]), 20.0)
    white = (1.0, 1.0, 1.0)
    given = [render_captions([c], reference, background=white).rgb[0, 0].permute(2, 0, 1) for c in CAPTIONS]
    truth = render_captions(list(CAPTIONS), _repeat(cameras.at_time(0.0), len(CAPTIONS)), background=white).rgb
    truth = truth.permute(0, 1, 4, 2, 3)
    conditions = _stack([image_conditions(prior, image, reference)(cameras) for image in given])
    found = sample(prior.denoiser, conditions, generator, n_steps).cpu()
    psnr = -10 * (found - truth).square().mean((-1, -2, -3)).clamp(min=1e-8).log10()
    rows = torch.cat((torch.stack(given)[:, None], found, truth), 1)
    return rows, {"psnr_mean": psnr.mean().item(), "psnr_per_view": [round(v, 2) for v in psnr.mean(0).tolist()]}


def write_samples(
    folder: Path, kind: PriorKind, device: torch.device | str, n_steps: int = 30, seed: int = 0
) -> dict[str, Any]:
    """Sample a saved prior, write folder/samples.png and folder/metrics.json, and return the numbers."""
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    prior = load_prior(folder, kind, device, dtype)
    generator = torch.Generator().manual_seed(seed)
    captions = list(CAPTIONS)
    if kind == "novel_view":
        images, metrics = _novel_views(prior, generator, n_steps)
    elif kind == "video":
        cameras = fixed_take(N_FRAMES, IMAGE_SIZE, IMAGE_SIZE, azimuth_deg=GATE_AZIMUTH_DEG)
        images = sample(prior.denoiser, captions_conditions(prior, captions, cameras), generator, n_steps)
        metrics = measure_takes(images, captions, cameras) | {"gate": motion_gate(prior, generator)}
    else:
        cameras = view_cameras(1)
        images = sample(prior.denoiser, captions_conditions(prior, captions, cameras), generator, n_steps)
        metrics = measure_views(images, captions)
    sheet(captions, images).save(folder / "samples.png")
    write_json(folder / "metrics.json", metrics)
    return metrics
