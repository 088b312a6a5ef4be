"""The picture that a scene is made from: read, checked, and cut to the frame that the recipe's camera expects.

Everything here is a square of S x S pixels once it is prepared, with the subject's bounding box in the middle.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..cameras import CameraBatch, make_cameras
from ..transfers import send
from .config import ReferenceConfig, StaticRecipe

LEAST_SUBJECT, MOST_PIXELS, LARGEST_SIDE = 8, 2**26, 1024
"""Pixels: of the subject's longer side, of a picture that is read, and of a prepared picture's side."""


class PictureError(ValueError):
    """A picture that no scene can be made from, and what to give instead."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A prepared picture of the subject, on the CPU.

    Args:
        rgb: [S, S, 3] in [0, 1], of no meaning outside of the mask. mask: [S, S, 1], 1 on the subject, else 0.
        statement: one line about what was done to the picture.
        depth: [S, S, 1] in [0, 1], growing away from the camera, right up to an unknown scale and shift; or None.
        normals: [S, S, 3] unit vectors in the camera's frame (right, up, towards the camera), or None.
    """

    rgb: Tensor
    mask: Tensor
    statement: str
    depth: Tensor | None = None
    normals: Tensor | None = None

    def over(self, color: Sequence[float] = (1.0, 1.0, 1.0)) -> Tensor:
        """The subject before one colour, [S, S, 3]."""
        return self.rgb * self.mask + (1 - self.mask) * torch.tensor(color)

    def fingerprint(self) -> str:
        """A name of the contents: a run goes on only with the very same picture, mask and maps."""
        name = hashlib.sha256()
        for tensor in (self.rgb * self.mask, self.mask, self.depth, self.normals):
            name.update(b"none" if tensor is None else f"{list(tensor.shape)}".encode())
            if tensor is not None:
                name.update(tensor.contiguous().numpy().tobytes())
        return name.hexdigest()


# ---- reading -----------------------------------------------------------------------------------------------------


def load_reference(
    picture: Path | str,
    config: ReferenceConfig,
    *,
    mask: Path | str | None = None,
    depth: Path | str | None = None,
    normals: Path | str | None = None,
) -> Reference:
    """Read a picture with its mask and maps from files and prepare it (see `prepare_reference`).

    Any format that Pillow reads. The mask is the picture's own alpha unless `mask` names a file: white (or opaque)
    on the subject. Raises PictureError.
    """
    pixels = _read(picture, "picture")
    mask_pixels = None
    if mask is not None:
        grey = _read(mask, "mask")
        mask_pixels = grey[..., 3] if _is_cut_out(grey) else grey[..., :3].mean(-1)
    return prepare_reference(
        pixels,
        config,
        mask=mask_pixels,
        depth=None if depth is None else _read(depth, "depth map")[..., :3].mean(-1),
        normals=None if normals is None else _read(normals, "normal map")[..., :3],
    )


def _is_cut_out(pixels: Tensor) -> bool:
    return pixels.shape[-1] == 4 and bool((pixels[..., 3] <= 0.5).any())


def _read(path: Path | str, what: str) -> Tensor:
    """Read a file as [H, W, 3] or [H, W, 4] in [0, 1], turned upright."""
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    if not path.is_file():
        raise PictureError(f"the {what} {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        with Image.open(path) as file:
            if file.width * file.height > MOST_PIXELS:
                raise PictureError(
                    f"the {what} {path} has {file.width}x{file.height} pixels, more than {MOST_PIXELS}: make it smaller"
                )
            upright = ImageOps.exif_transpose(file)
            if upright.mode.startswith(("I", "F")):  # 16 bits of grey, as depth maps have
                values = torch.from_numpy(np.asarray(upright).astype("float32"))
                most = 255.0 if values.max() <= 255 else 65535.0
                return (values / most).clamp(0, 1)[..., None].expand(-1, -1, 3).contiguous()
            has_alpha = "A" in upright.getbands() or "transparency" in upright.info
            values = np.asarray(upright.convert("RGBA" if has_alpha else "RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, PictureError):
            raise
        why = "it is no picture" if isinstance(error, UnidentifiedImageError) else error
        raise PictureError(f"the {what} {path} can't be read ({why}): give a PNG, JPEG or WebP file") from error
    return torch.from_numpy(values.copy()).float() / 255


# ---- preparing ---------------------------------------------------------------------------------------------------


def prepare_reference(
    picture: Tensor,
    config: ReferenceConfig,
    *,
    mask: Tensor | None = None,
    depth: Tensor | None = None,
    normals: Tensor | None = None,
) -> Reference:
    """Find the subject and put it into the frame: centred, and as large as `config.fill` says.

    Args:
        picture: [H, W, 3 or 4] in [0, 1], or [1, H, W, 3 or 4] as ComfyUI has it.
        mask: [H, W] or [1, H, W], above 0.5 on the subject; None takes the picture's alpha.
        depth: [H, W], [1, H, W] or with 1 or 3 channels. normals: [(1,) H, W, 3], colours (n + 1) / 2.

    Raises PictureError for a picture without a subject, without a mask, or with a mask or map of another size.
    """
    picture = _single(picture, "picture", (3, 4))
    height, width = picture.shape[:2]
    source = "its alpha" if mask is None else "its mask"
    if mask is None:
        if picture.shape[-1] < 4:
            raise PictureError(
                "the picture has no alpha and no mask was given: cut the subject out (RGBA), or give a mask of the "
                "picture's size, white on the subject"
            )
        mask = picture[..., 3]
    solid = (_of_size(mask, "mask", height, width)[..., :1] > 0.5).float()
    layers = {"rgb": picture[..., :3].clamp(0, 1), "mask": solid}
    if depth is not None:
        values = _of_size(depth, "depth map", height, width).mean(-1, keepdim=True).clamp(0, 1)
        layers["depth"] = 1 - values if config.depth_near == "bright" else values
    if normals is not None:
        colors = _of_size(normals, "normal map", height, width)
        if colors.shape[-1] != 3:
            raise PictureError(f"the normal map needs 3 channels, got {colors.shape[-1]}")
        layers["normals"] = functional.normalize(2 * colors - 1, dim=-1)
    frame, statement = _frame(solid[..., 0], config, source)
    cut = {name: _cut(layer, frame) for name, layer in layers.items()}
    if frame.side > LARGEST_SIDE:
        cut = _resized(cut, LARGEST_SIDE)
        cut["mask"] = (cut["mask"] > 0.5).float()
    return Reference(**cut, statement=statement)


def _single(pixels: Tensor, what: str, channels: tuple[int, ...]) -> Tensor:
    """One picture [H, W, c] on the CPU, whatever its batch of one was."""
    if pixels.ndim == 4:
        if len(pixels) != 1:
            raise PictureError(f"one {what} is needed, got {len(pixels)}: pick one of the batch")
        pixels = pixels[0]
    if pixels.ndim != 3 or pixels.shape[-1] not in channels:
        raise PictureError(f"the {what} must be [H, W, {' or '.join(map(str, channels))}], got {list(pixels.shape)}")
    return pixels.detach().float().cpu().nan_to_num(0.0)


def _of_size(pixels: Tensor, what: str, height: int, width: int) -> Tensor:
    """A mask or map [H, W, c] that belongs to a picture of this size."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4):  # [B, H, W] as ComfyUI's masks
        pixels = pixels[..., None]
    pixels = _single(pixels, what, (1, 3, 4))
    if tuple(pixels.shape[:2]) != (height, width):
        raise PictureError(
            f"the {what} has {pixels.shape[1]}x{pixels.shape[0]} pixels, the picture {width}x{height}: "
            f"give a {what} of the picture's size"
        )
    return pixels


@dataclass(frozen=True)
class _Frame:
    """A square of a picture's pixels, perhaps reaching beyond it."""

    top: int
    left: int
    side: int


def _frame(solid: Tensor, config: ReferenceConfig, source: str) -> tuple[_Frame, str]:
    """Choose the square that shows the subject [H, W] as the recipe's camera expects it, and say so."""
    height, width = solid.shape
    if not solid.any():
        raise PictureError(f"the picture has no subject: {source} is empty (nothing of it is above one half)")
    if solid.all():
        raise PictureError(
            f"the picture has no subject: {source} covers all of it; cut the subject out (RGBA), or give another mask"
        )
    rows, columns = (solid.any(dim).nonzero()[:, 0] for dim in (1, 0))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    longer = max(bottom - top, right - left)
    if longer < LEAST_SUBJECT:
        raise PictureError(f"the subject is only {longer} pixels large: give a picture that shows at least 8 of it")
    share = longer / max(height, width)
    wanted = min(max(share, config.fill[0]), config.fill[1])
    side = max(height, width) if wanted == share else math.ceil(longer / wanted)
    frame = _Frame(round((top + bottom - side) / 2), round((left + right - side) / 2), side)
    touches = top == 0 or left == 0 or bottom == height or right == width
    words = "kept at" if wanted == share else "enlarged to" if wanted > share else "shrunk to"
    statement = (
        f"the subject ({right - left}x{bottom - top} of {width}x{height} pixels, by {source}) was centred and {words} "
        f"{wanted:.0%} of the frame ({side}x{side})"
    )
    if touches:
        statement += "; it touches the picture's edge, and what is cut off there can't be known"
    return frame, statement


def _cut(layer: Tensor, frame: _Frame) -> Tensor:
    """The square of a layer [H, W, c]; 0 where it reaches beyond the picture."""
    height, width = layer.shape[:2]
    beyond = (-frame.left, frame.left + frame.side - width, -frame.top, frame.top + frame.side - height)
    return functional.pad(layer.movedim(-1, 0), beyond).movedim(0, -1).contiguous()


def _resized(layers: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Resize all layers; what is outside of the mask doesn't bleed into it."""
    mask = _resize(layers["mask"], size)
    resized = {"mask": mask}
    for name, layer in layers.items():
        if name != "mask":
            resized[name] = _resize(layer * layers["mask"], size) / mask.clamp_min(1e-4)
    if "normals" in resized:
        resized["normals"] = functional.normalize(resized["normals"], dim=-1)
    return resized


def _resize(layer: Tensor, size: int) -> Tensor:
    if layer.shape[0] == size:
        return layer
    channels_first = layer.movedim(-1, 0)[None]
    resized = functional.interpolate(channels_first, (size, size), mode="bilinear", antialias=True)
    return resized[0].movedim(0, -1)


# ---- for training ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceView:
    """What the reference pass compares a rendering of `cameras` [1, 1] with, at one size.

    Args:
        rgb: [1, 1, S, S, 3]. mask: [1, 1, S, S, 1], the share of each pixel that the subject covers.
        depth: as the mask, or None. normals: [1, 1, S, S, 3] in the world's frame, or None.
    """

    cameras: CameraBatch
    rgb: Tensor
    mask: Tensor
    depth: Tensor | None = None
    normals: Tensor | None = None


def reference_cameras(config: ReferenceConfig, size: int = 1) -> CameraBatch:
    """The camera that saw the picture, [1, 1]."""
    return make_cameras(
        math.radians(config.azimuth_deg),
        math.radians(config.elevation_deg),
        config.distance,
        math.radians(config.fov_y_deg),
        0.0,
        size,
        size,
    )


def reference_view(
    reference: Reference, config: ReferenceConfig, size: int, device: torch.device | str = "cpu"
) -> ReferenceView:
    """The prepared picture at one of the recipe's sizes."""
    present = {n: getattr(reference, n) for n in ("rgb", "mask", "depth", "normals")}
    layers = _resized({n: layer for n, layer in present.items() if layer is not None}, size)
    cameras = reference_cameras(config, size)
    if "normals" in layers:
        rotation = cameras.c2w[0, 0, :3, :3]
        layers["normals"] = (rotation * layers["normals"][..., None, :]).sum(-1)
    return ReferenceView(cameras.to(device), **{n: send(layer[None, None], device) for n, layer in layers.items()})


def check_reference(recipe: StaticRecipe, reference: Reference | None) -> None:
    """Refuse a picture where none is looked at, none where one is needed, and maps that don't fit the weights."""
    config = recipe.reference
    if config is None:
        if reference is not None:
            raise PictureError(f"the recipe {recipe.name!r} looks at no picture: take one that does (image-to-3d)")
        return
    if reference is None:
        raise PictureError(f"the recipe {recipe.name!r} makes a scene from a picture: give one")
    weights = {"depth map": (reference.depth, config.depth or config.relative_depth, "depth or .relative-depth")}
    weights["normal map"] = (reference.normals, config.normal, "normal")
    for name, (given, weight, flag) in weights.items():
        if weight and given is None:
            raise PictureError(f"the recipe weighs a {name}, but none was given: give one, or set the weight to 0")
        if given is not None and not weight:
            raise PictureError(f"a {name} was given, but its weight is 0: raise reference.{flag}, or leave it out")
