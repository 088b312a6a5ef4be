"""A personal subject that no caption describes: a snowman with a head of another colour than its body.

The toy priors have only seen snowmen of one colour, and no caption can ask for two. The image prior learns it from
four images by a LoRA (see train_lora.py) under the word "sks"; the other priors are told "a snowman".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cameras import CameraBatch, make_cameras, orbit
from ..guidance.prompts import VIEWS, view_index
from ..scene import Scene
from ..training.config import TOY_DISTANCE, TOY_FOV_DEG, TOY_SIZE
from .captions import Caption
from .evaluate import Renderer, align, darkness, frames_of, nearest_color, scene_renderer
from .world import WorldImage, render_caption

BODY_COLOR, HEAD_COLOR = "purple", "green"
SUBJECT_PROMPT = "a sks snowman"
PHOTO_AZIMUTHS_DEG, PHOTO_ELEVATION_DEG = (0.0, 100.0, 180.0, 250.0), 15.0
"""Where the four images for training are taken from."""


def render_subject(
    cameras: CameraBatch, supersample: int = 2, background: Tensor | Sequence[float] | None = None
) -> WorldImage:
    """Render the subject, as `world.render_caption` renders a caption."""
    return render_caption(Caption(BODY_COLOR, "snowman"), cameras, supersample, background, head_color=HEAD_COLOR)


def photo_cameras(size: int = TOY_SIZE) -> CameraBatch:
    """The cameras of the four images, [4, 1]."""
    azimuth = torch.tensor(PHOTO_AZIMUTHS_DEG).deg2rad()[:, None]
    elevation = math.radians(PHOTO_ELEVATION_DEG)
    return make_cameras(azimuth, elevation, TOY_DISTANCE, math.radians(TOY_FOV_DEG), 0.0, size, size)


def photos(size: int = TOY_SIZE) -> Tensor:
    """The four images, cut out: [4, 4, H, W], colours multiplied by the alpha."""
    image = render_subject(photo_cameras(size), 4)
    rgba = torch.cat((image.rgb * image.mask, image.mask), -1)
    return rgba[:, 0].movedim(-1, 1).contiguous()


def photo_prompts() -> list[str]:
    """What is said of each of the four images: "a sks snowman, front view"."""
    cameras = photo_cameras()
    return [f"{SUBJECT_PROMPT}, {VIEWS[i]} view" for i in view_index(cameras.azimuth, cameras.elevation)[:, 0]]


@dataclass(frozen=True)
class Likeness:
    """How much of the subject is in a result, seen from views all around.

    Args:
        body, head: the named colour of each part in each view, "none" where there is nothing of it.
        right: how many views have the right colour in both parts. iou: mean silhouette IoU (see Evaluation).
    """

    body: tuple[str, ...]
    head: tuple[str, ...]
    right: int
    iou: float


def _part_color(color: Tensor, solid: Tensor) -> str:
    return nearest_color(tuple(color[solid].mean(0).tolist())) if int(solid.sum()) >= 4 else "none"


def likeness(renderer: Renderer, size: int = 64, n_views: int = 8) -> Likeness:
    """Compare a result with the subject, part by part, at elevation 15 degrees.

    A part's colour is the mean over the result's solid pixels, without the dark mark, where the true part is seen
    after the best common scale and each view's best shift.
    """
    views = orbit(n_views, size, size)
    color, opacity = frames_of(renderer, views)
    truth = render_subject(views, background=(0.0, 0.0, 0.0))
    true_opacity = truth.mask[0, ..., 0]
    color, opacity, iou = align(color, opacity, true_opacity)
    hue = truth.rgb[0]
    part = true_opacity > 0.99
    heads, bodies = part & (hue[..., 1] > hue[..., 2]), part & (hue[..., 2] > hue[..., 1])  # green, purple
    shown = (opacity > 0.5) & (darkness(color, opacity) < 0.1)
    body = tuple(_part_color(c, s & b) for c, s, b in zip(color, shown, bodies, strict=True))
    head = tuple(_part_color(c, s & h) for c, s, h in zip(color, shown, heads, strict=True))
    right = sum(b == BODY_COLOR and h == HEAD_COLOR for b, h in zip(body, head, strict=True))
    return Likeness(body, head, right, float(iou.mean()))


def scene_likeness(scene: Scene, size: int = 64, n_views: int = 8) -> Likeness:
    """`likeness` of a scene, rendered over black."""
    return likeness(scene_renderer(scene), size, n_views)
