"""The image that a scene is made from: read, checked, and cut to the frame that the recipe's camera expects.

Everything here is a square of S x S pixels once it is prepared, with the subject's bounding box in the middle.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..config import ReferenceConfig
from .maps import read_depth, read_normals
from .masks import (
    AUTOMATIC,
    BACKGROUND,
    MASK_SHOWS,
    SAMPLED,
    SUBJECT,
    UNKNOWN,
    MaskShows,
    Solid,
    box_of,
    read_mask,
    unclear_mask,
    what_mask_shows,
)
from .pixels import ImageError, Pixels, file_pixels, map_pixels, tensor_pixels

LEAST_SUBJECT, LARGEST_SIDE = 8, 1024
"""Pixels: of the subject's longer side, and of a prepared image's side."""

Source = Callable[[], AbstractContextManager[Pixels]]
"""Opens an image, mask or map; it is closed before the next one is opened."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A prepared image of the subject, on the CPU."""

    rgb: Tensor  # [S, S, 3] in [0, 1], of no meaning outside of the mask
    mask: Tensor  # [S, S, 1], 1 on the subject, else 0
    statement: str  # one line about what was done to the image
    depth: Tensor | None = None  # [S, S, 1] in [0, 1], growing away from the camera, up to an unknown scale and shift
    normals: Tensor | None = None  # [S, S, 3] unit vectors in the camera's frame (right, up, towards the camera)

    def over(self, color: Sequence[float] = (1.0, 1.0, 1.0)) -> Tensor:
        """The subject before one colour, [S, S, 3]."""
        return self.rgb * self.mask + (1 - self.mask) * torch.tensor(color)

    def fingerprint(self) -> str:
        """A name of the contents: a run goes on only with the very same image, mask and maps."""
        name = hashlib.sha256()
        # what lies outside of the mask is nothing that a run sees
        for tensor in (self.rgb * self.mask, self.mask, self.depth, self.normals):
            name.update(b"none" if tensor is None else f"{list(tensor.shape)}".encode())
            if tensor is not None:
                name.update(tensor.contiguous().numpy().tobytes())
        return name.hexdigest()


def load_reference(
    image: Path | str,
    config: ReferenceConfig,
    *,
    mask: Path | str | None = None,
    depth: Path | str | None = None,
    normals: Path | str | None = None,
    mask_shows: MaskShows = AUTOMATIC,
) -> Reference:
    """Read an image with its mask and maps from files and prepare it (see `prepare_reference`).

    The mask is the image's own alpha unless `mask` names a file. Raises ImageError.
    """

    def opener(path: Path | str | None, what: str) -> Source | None:
        return None if path is None else lambda: file_pixels(path, what)

    sources = (opener(mask, "mask"), opener(depth, "depth map"), opener(normals, "normal map"))
    return _prepare(lambda: file_pixels(image, "image"), config, *sources, mask_shows)


def prepare_reference(
    image: Tensor,
    config: ReferenceConfig,
    *,
    mask: Tensor | None = None,
    depth: Tensor | None = None,
    normals: Tensor | None = None,
    mask_shows: MaskShows = AUTOMATIC,
) -> Reference:
    """Find the subject and put it into the frame: centred, and as large as `config.fill` says.

    Args:
        image: [H, W, 3 or 4] in [0, 1] (or bytes), or [1, H, W, 3 or 4] as ComfyUI has it.
        mask: [H, W] or [1, H, W], above 0.5 on the subject or on the background; None takes the image's alpha.
        depth: [H, W], [1, H, W] or with 1 or 3 channels. normals: [(1,) H, W, 3], colours (n + 1) / 2.
        mask_shows: what is white in `mask`: "subject", "background", or "automatic" to have it told, see
            `what_mask_shows`.

    Raises ImageError for an image without a subject, without a mask, or with a mask or map of another size or that
    can't be what it should be; UnclearMask where it can't be told what the mask shows.
    """

    def opener(pixels: Tensor | None, what: str) -> Source | None:
        return None if pixels is None else lambda: nullcontext(map_pixels(pixels, what))

    sources = (opener(mask, "mask"), opener(depth, "depth map"), opener(normals, "normal map"))
    return _prepare(lambda: nullcontext(tensor_pixels(image, "image", (3, 4))), config, *sources, mask_shows)


def _prepare(
    image: Source,
    config: ReferenceConfig,
    mask: Source | None,
    depth: Source | None,
    normals: Source | None,
    mask_shows: MaskShows,
) -> Reference:
    if mask_shows not in MASK_SHOWS:
        raise ImageError(f"mask_shows must be one of {', '.join(MASK_SHOWS)}, got {mask_shows!r}")
    given = None
    if mask is not None:
        with mask() as pixels:
            given = read_mask(pixels)
    elif mask_shows == BACKGROUND:
        raise ImageError("mask_shows is 'background', but no mask was given: give one, or leave mask_shows away")
    with image() as pixels:
        size = pixels.height, pixels.width
        white, source, notes = _subject(pixels, given, mask_shows)
        frame, statement = _frame(white, config, source)
        rgb, share = _cut(pixels.only(slice(0, 3)), white, frame)
        notes = [pixels.note, *notes]
    layers = {"rgb": rgb.clamp(0, 1).expand(-1, -1, 3).contiguous()}
    if depth is not None:
        with depth() as pixels:
            layer = _cut(_of_size(pixels, *size), white, frame)[0]
            values = read_depth(layer, share, pixels.name)
        # estimators give nearness: turned round, it grows away from the camera
        layers["depth"] = values if config.depth_near == "dark" else (1 - values) * (share > 0)
    if normals is not None:
        with normals() as pixels:
            if pixels.channels < 3:
                raise ImageError(f"the {pixels.name} needs 3 channels, got {pixels.channels}: is it a depth map?")
            layer = _cut(_of_size(pixels, *size), white, frame)[0]
            layers["normals"], warning = read_normals(layer, share, pixels.name)
        notes.append(warning)
    layers["mask"] = share
    if len(share) > LARGEST_SIDE:
        layers = resized(layers, LARGEST_SIDE)
    layers["mask"] = (layers["mask"] > 0.5).float()
    return Reference(**layers, statement="; ".join([statement, *filter(None, notes)]))


def _of_size(pixels: Pixels, height: int, width: int) -> Pixels:
    """A mask or map that belongs to an image of this size."""
    if (pixels.height, pixels.width) != (height, width):
        raise ImageError(_other_size(pixels.name, pixels.height, pixels.width, height, width))
    return pixels


def _other_size(name: str, height: int, width: int, wanted_height: int, wanted_width: int) -> str:
    return (
        f"the {name} has {width}x{height} pixels, the image {wanted_width}x{wanted_height}: give one of the "
        "image's size"
    )


def _subject(image: Pixels, given: Solid | None, shows: MaskShows) -> tuple[Tensor, str, list[str]]:
    """Where the subject is [H, W], by what that is known, and what has to be said of it."""
    if given is None:
        if image.channels != 4:
            raise ImageError(
                "the image has no alpha and no mask was given: cut the subject out (RGBA), or give a mask of the "
                "image's size, white on the subject"
            )
        alpha = read_mask(image.only(slice(3, 4), f"alpha of the {image.name}"))
        return alpha.white, "its alpha", [alpha.note]
    height, width = given.white.shape
    if (height, width) != (image.height, image.width):
        raise ImageError(_other_size("mask", height, width, image.height, image.width))
    if shows != AUTOMATIC:
        return (given.white if shows == SUBJECT else ~given.white), f"its mask, white on the {shows}", [given.note]
    seen = image.sample(SAMPLED).nan_to_num(0).clamp(0, 1)
    seen = seen.expand(-1, -1, 3) if seen.shape[-1] == 1 else seen
    reading = what_mask_shows(given.soft, seen)
    if reading.shows == UNKNOWN:
        raise unclear_mask(given.white, seen[..., :3], reading.reason)
    if reading.shows == BACKGROUND:
        inverted = f"the mask is white on the background, for {reading.reason}, and was inverted"
        notes = [f"{inverted} (mask_shows or --mask-shows says otherwise)", given.note]
        return ~given.white, "the black part of its mask", notes
    return given.white, "its mask", [given.note]


@dataclass(frozen=True)
class _Frame:
    """A square of an image's pixels, perhaps reaching beyond it."""

    top: int  # row of its first pixel, below 0 where it begins above the image
    left: int
    side: int  # a multiple of the reduction
    reduction: int  # so many pixels become one on either axis


def _frame(white: Tensor, config: ReferenceConfig, source: str) -> tuple[_Frame, str]:
    """Choose the square that shows the subject [H, W] as the recipe's camera expects it, and say so."""
    height, width = white.shape
    if not white.any():
        raise ImageError(f"the image has no subject: {source} is empty (nothing of it is above one half)")
    if white.all():
        raise ImageError(
            f"the image has no subject: {source} covers all of it; cut the subject out (RGBA), or give another mask"
        )
    top, bottom, left, right = box_of(white)
    longer = max(bottom - top, right - left)
    if longer < LEAST_SUBJECT:
        raise ImageError(f"the subject is only {longer} pixels large: give an image that shows at least 8 of it")
    share = longer / max(height, width)
    wanted = min(max(share, config.fill[0]), config.fill[1])
    # without a need to change its size, the frame is as large as the image
    side = max(height, width) if wanted == share else math.ceil(longer / wanted)
    reduction = max(1, side // LARGEST_SIDE)
    side = math.ceil(side / reduction) * reduction
    frame = _Frame(round((top + bottom - side) / 2), round((left + right - side) / 2), side, reduction)
    touches = top == 0 or left == 0 or bottom == height or right == width
    words = "kept at" if wanted == share else "enlarged to" if wanted > share else "shrunk to"
    statement = (
        f"the subject ({right - left}x{bottom - top} of {width}x{height} pixels, by {source}) was centred and {words} "
        f"{wanted:.0%} of the frame ({side}x{side})"
    )
    if touches:
        statement += "; it touches the image's edge, and what is cut off there can't be known"
    return frame, statement


def _cut(pixels: Pixels, white: Tensor, frame: _Frame) -> tuple[Tensor, Tensor]:
    """The square of a layer where the subject [H, W] is, reduced: [S, S, c], 0 elsewhere; and its share [S, S, 1].

    A pixel is the mean of those of the subject that became it. Only some rows are held as floats at once.
    """
    layers, shares = [], []
    n = frame.reduction
    left, right = max(frame.left, 0), min(frame.left + frame.side, pixels.width)
    rows = n * max(1, 2**20 // (n * frame.side))  # about a million pixels at once
    for start in range(frame.top, frame.top + frame.side, rows):
        stop = min(start + rows, frame.top + frame.side)
        top, bottom = (min(max(row, 0), pixels.height) for row in (start, stop))
        inside = white[top:bottom, left:right, None]
        values = (
            pixels.block(top, bottom, left, right) if top < bottom else torch.zeros(0, right - left, pixels.channels)
        )
        if not pixels.finite:
            if not values.isfinite().logical_or(~inside).all():
                raise ImageError(f"the {pixels.name} holds values that are no numbers (NaN or infinity) on the subject")
            values = torch.where(inside, values, 0.0)
        above = top - start if top < bottom else stop - start  # rows of the frame over the image's first one
        beyond = (0, 0, left - frame.left, frame.left + frame.side - right, above, stop - start - above - len(inside))
        values, share = (_reduced(functional.pad(x, beyond), n) for x in (values * inside, inside.float()))
        layers.append(values / share.clamp_min(0.5 / n**2))  # a share is 0, or at least 1 / n^2
        shares.append(share)
    return torch.cat(layers), torch.cat(shares)


def _reduced(values: Tensor, n: int) -> Tensor:
    """The mean of n x n pixels [H, W, c]."""
    if n == 1:
        return values
    height, width, channels = values.shape
    values = values.view(height // n, n, -1).sum(1)  # rows first: whole rows are added fast
    return values.view(height // n, width // n, n, channels).sum(2) / n**2


def resized(layers: dict[str, Tensor], size: int) -> dict[str, Tensor]:
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
