"""Images of the toy world: any caption, from any cameras, at any time.

Rays are moved into the canonical frame by the inverse of the object's affine motion, with their directions left
unnormalised: the parameter t of a point stays the distance along the world's unit ray, and a distance d in the
canonical frame allows a step of d / |direction|. Silhouettes and depths are thus exact for every motion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cameras import CameraBatch
from ..rays import rays_from_cameras
from .captions import COLORS, MOTIONS, SHAPES, Caption, all_captions, as_caption, parse_caption, vocabulary
from .motions import world_from_canonical
from .shapes import SHAPE_MODELS, Shape, paint

__all__ = [
    "COLORS",
    "MOTIONS",
    "SHAPES",
    "Caption",
    "Objects",
    "WorldImage",
    "all_captions",
    "parse_caption",
    "render_caption",
    "render_captions",
    "render_objects",
    "vocabulary",
    "world_from_canonical",
]

TRACE_STEPS, TRACE_ROUND, HIT = 72, 8, 2e-4


@dataclass(frozen=True)
class WorldImage:
    """B x F images.

    Args:
        rgb: [B, F, H, W, 3]: over the background if one was given, else the object's own colour (not multiplied
            by the mask; 0 where there is no object).
        mask: [B, F, H, W, 1] coverage in [0, 1].
        depth: [B, F, H, W, 1] coverage times distance along the ray, as a field's sum of weights times t.
    """

    rgb: Tensor
    mask: Tensor
    depth: Tensor


def trace(shape: Shape, origins: Tensor, directions: Tensor) -> Tensor:
    """Return [S] distances t of the first hit at origins + t * directions, or infinity.

    Args:
        origins, directions: [S, 3] in the canonical frame; directions of any length.
    """
    speed = directions.norm(dim=-1)
    # the shape's bounding sphere says where to start, when to give up, and which rays miss
    middle = -(origins * directions).sum(-1) / speed**2
    inside = shape.bound**2 - (origins + middle[:, None] * directions).square().sum(-1)
    half = inside.clamp(min=0).sqrt() / speed
    hits = torch.full_like(speed, torch.inf)
    index = ((inside > 0) & (middle + half > 0)).nonzero()[:, 0]
    origins, directions, speed = origins[index], directions[index], speed[index]
    t, end = (middle - half).clamp(min=0)[index], (middle + half)[index] + HIT
    for _ in range(TRACE_STEPS // TRACE_ROUND):
        for _ in range(TRACE_ROUND):
            gap = shape.distance(origins + t[:, None] * directions)
            t = t + gap / speed
        done = gap.abs() < HIT
        hits[index[done]] = t[done]
        going = (~done & (t < end)).nonzero()[:, 0]
        if not len(going):
            break
        index, t, end = index[going], t[going], end[going]
        origins, directions, speed = origins[going], directions[going], speed[going]
    return hits


def _by_shape(shape_index: Tensor, chunk: int) -> Iterator[tuple[Shape, Tensor]]:
    """Yield each shape with the places of at most `chunk` of the images that show it."""
    for i, name in enumerate(SHAPES):
        for places in (shape_index == i).nonzero()[:, 0].split(chunk):
            if len(places):
                yield SHAPE_MODELS[name], places


def _linear(maps: Tensor, vectors: Tensor) -> Tensor:
    """Apply [N, 3, 3] to [N, R, 3]; by sums, as a matrix product may be rounded to fewer bits on some devices."""
    x, y, z = (vectors[..., j, None] * maps[:, None, :, j] for j in range(3))
    return x + y + z


def _pool(values: Tensor, factor: int) -> Tensor:
    """Average [N, H*factor, W*factor, C] to [N, H, W, C]."""
    n, height, width, channels = values.shape
    return values.reshape(n, height // factor, factor, width // factor, factor, channels).mean((2, 4))


def _render_shape(
    shape: Shape,
    color: Tensor,
    head_color: Tensor | None,
    canonical_from_world: Tensor,
    cameras: CameraBatch,
    supersample: int,
    mark_azimuths_deg: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Render N images of one shape; return rgb (multiplied by the mask), mask and depth, [N, H, W, C]."""
    n, height, width = len(color), cameras.height * supersample, cameras.width * supersample
    bundle = rays_from_cameras(cameras.resized(height, width))
    linear, offset = canonical_from_world[:, :3, :3], canonical_from_world[:, None, :3, 3]
    origins = (_linear(linear, cameras.position) + offset).expand(n, height * width, 3).reshape(-1, 3)
    directions = _linear(linear, bundle.directions.reshape(n, -1, 3)).reshape(-1, 3)
    t = trace(shape, origins, directions)
    hit = t.isfinite()
    rays = hit.nonzero()[:, 0]
    points = origins[rays] + t[rays, None] * directions[rays]
    image = rays // (height * width)
    head = None if head_color is None else head_color[image]
    rgb = torch.zeros_like(origins)
    rgb[rays] = paint(shape, points, color[image], head, mark_azimuths_deg)
    layers = (rgb, hit.to(t.dtype)[:, None], torch.where(hit, t, 0.0)[:, None])
    rgb, mask, depth = (_pool(layer.reshape(n, height, width, -1), supersample) for layer in layers)
    return rgb, mask, depth


@dataclass(frozen=True)
class Objects:
    """N things, each for an image of its own."""

    shape_index: Tensor  # [N], places in SHAPES
    color: Tensor  # [N, 3]
    canonical_from_world: Tensor  # [N, 4, 4], affine maps
    head_color: Tensor | None = None  # [N, 3], of the snowman's head; None: of one colour
    mark_azimuths_deg: Sequence[float] = (0.0,)  # where the mark is; (0, 180): two faces, (): none


def render_objects(
    objects: Objects,
    cameras: CameraBatch,
    supersample: int = 2,
    background: Tensor | Sequence[float] | None = None,
    chunk_rays: int | None = None,
) -> WorldImage:
    """Render N = B*F images, each of its own object, on the device of the cameras.

    Args:
        cameras: [B, F] in the objects' order.
        supersample: each pixel is the mean of this number squared of rays.
        background: None, [3], or a colour for each image [B, F, 3].
        chunk_rays: rays traced at once; bounds the memory (about 150 bytes a ray).
    """
    if supersample < 1:
        raise ValueError(f"supersample must be at least 1, got {supersample}")
    (n_groups, n_frames), height, width = cameras.shape, cameras.height, cameras.width
    device = cameras.c2w.device
    n = n_groups * n_frames
    shape_index, color = objects.shape_index.to(device), objects.color.to(device)
    canonical_from_world = objects.canonical_from_world.to(device)
    if not len(shape_index) == len(color) == len(canonical_from_world) == n:
        raise ValueError(f"{n} cameras need as many objects, got {len(shape_index)}")
    chunk_rays = chunk_rays or (2**23 if device.type == "cuda" else 2**18)
    chunk = max(1, chunk_rays // (height * width * supersample**2))
    head_color = None if objects.head_color is None else objects.head_color.to(device)
    flat = cameras.reshape(n, 1)
    layers = [torch.zeros(n, height, width, channels, device=device) for channels in (3, 1, 1)]
    for shape, index in _by_shape(shape_index, chunk):
        # only the snowman has a head to paint
        head = head_color[index] if head_color is not None and shape is SHAPE_MODELS["snowman"] else None
        maps, marks = canonical_from_world[index], objects.mark_azimuths_deg
        parts = _render_shape(shape, color[index], head, maps, flat.groups(index), supersample, marks)
        for layer, part in zip(layers, parts, strict=True):
            layer[index] = part
    rgb, mask, depth = (layer.reshape(n_groups, n_frames, height, width, -1) for layer in layers)
    if background is None:
        rgb = torch.where(mask > 0, rgb / mask.clamp(min=1e-6), 0.0)
    else:
        wall = torch.as_tensor(background, dtype=rgb.dtype, device=device)
        rgb = rgb + (1 - mask) * (wall if wall.ndim == 1 else wall[..., None, None, :])
    return WorldImage(rgb, mask, depth)


def render_captions(
    captions: Sequence[Caption | str],
    cameras: CameraBatch,
    supersample: int = 2,
    background: Tensor | Sequence[float] | None = None,
    strength: float = 1.0,
    head_color: str | Sequence[float] | None = None,
    mark_azimuths_deg: Sequence[float] = (0.0,),
    chunk_rays: int | None = None,
) -> WorldImage:
    """Render one caption for each group of the cameras [B, F]; the cameras' times move the objects.

    `head_color` is a name or RGB; `strength` multiplies the motions' amplitudes; the rest as in `Objects` and
    `render_objects`.
    """
    n_groups, n_frames = cameras.shape
    if len(captions) != n_groups:
        raise ValueError(f"{n_groups} groups of cameras need as many captions, got {len(captions)}")
    known = [as_caption(caption) for caption in captions]
    device = cameras.c2w.device

    def per_image(values: list) -> Tensor:
        return torch.tensor(values, device=device).repeat_interleave(n_frames, 0)

    shape = per_image([SHAPES.index(caption.shape) for caption in known])
    motion = per_image([MOTIONS.index(caption.motion) for caption in known])
    color = per_image([COLORS[caption.color] for caption in known])
    moved = world_from_canonical(motion, shape, cameras.time.reshape(-1), strength)
    head = None
    if head_color is not None:
        named = COLORS[head_color] if isinstance(head_color, str) else head_color
        head = torch.tensor(named, device=device).expand(len(shape), 3)
    objects = Objects(shape, color, torch.linalg.inv(moved), head, mark_azimuths_deg)
    return render_objects(objects, cameras, supersample, background, chunk_rays)


def render_caption(
    caption: Caption | str,
    cameras: CameraBatch,
    supersample: int = 2,
    background: Tensor | Sequence[float] | None = None,
    strength: float = 1.0,
    head_color: str | Sequence[float] | None = None,
    mark_azimuths_deg: Sequence[float] = (0.0,),
    chunk_rays: int | None = None,
) -> WorldImage:
    """Render one caption from all cameras; see `render_captions`."""
    captions = [as_caption(caption)] * cameras.shape[0]
    return render_captions(
        captions, cameras, supersample, background, strength, head_color, mark_azimuths_deg, chunk_rays
    )
