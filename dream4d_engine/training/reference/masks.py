"""Where the subject is: masks in all the ways they are stored, and what is white in them, subject or background."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from .pixels import ImageError, Pixels, spread

AUTOMATIC: Final = "automatic"
SUBJECT: Final = "subject"
BACKGROUND: Final = "background"
UNKNOWN: Final = "unknown"
MASK_SHOWS = (AUTOMATIC, SUBJECT, BACKGROUND)
"""What may be said of a mask's white part."""
MaskShows = Literal["automatic", "subject", "background"]

COLORED = 24 / 255
"""How far red, green and blue of grey pixels may lie apart: JPEG and converters leave some of it."""
SAMPLED = 512  # rows and columns at most that are looked at to tell what a mask shows
_VOID = 224 << 16 | 224 << 8 | 192
"""The colour that label images of the VOC kind draw around an object, where they don't know."""


class UnclearMask(ImageError):
    """A mask whose white part may be the subject or the background.

    `readings` [h, w, 3] shows both, the white part as the subject on the left.
    """

    def __init__(self, message: str, readings: Tensor) -> None:
        super().__init__(message)
        self.readings = readings


@dataclass(frozen=True, eq=False)
class Solid:
    """A mask that was read."""

    white: Tensor  # [H, W] bool
    soft: Tensor  # [h, w] in [0, 1], the mask's numbers at the places of `Pixels.sample(SAMPLED)`
    note: str = ""  # how it was stored, where that isn't as usual


# ---- how it is stored --------------------------------------------------------------------------------------------


def cut_out(pixels: Pixels) -> bool:
    """Whether something of an image is transparent."""
    if pixels.channels != 4:
        return False
    return any(bool((strip <= 0.5).any()) for _, strip in pixels.only(slice(3, 4)).strips())


def read_mask(pixels: Pixels) -> Solid:
    """Read a mask of 1, 3 or 4 channels: its alpha where that hides something, else what is bright, or one colour.

    Understood beside white on black: one colour on black, numbers up to 255 or 65535, alpha, and in files 0 and any
    other number (labels 0 and 1, say). Raises ImageError, with the largest number, where more than one meaning is
    left.
    """
    if cut_out(pixels):
        pixels = pixels.only(slice(3, 4), f"alpha of the {pixels.name}")
    low, high, colored, bright = 0.0, 0.0, 0, 0
    for _, strip in pixels.strips():
        if not pixels.finite and not strip.isfinite().all():
            raise ImageError(f"the {pixels.name} holds values that are no numbers (NaN or infinity): give 0 to 1")
        value, apart = _brightest(strip)
        low, high = min(low, float(value.min())), max(high, float(value.max()))
        if pixels.channels > 1:
            colored, bright = colored + int((apart > COLORED).sum()), bright + int((value > 0.1).sum())
    if low < -0.01:
        raise ImageError(
            f"the {pixels.name} holds numbers from {low * pixels.largest:.6g} to {high * pixels.largest:.6g}, as a "
            "model's raw answers: give a mask from 0 to 1, or black and white"
        )
    if colored > 0.01 * bright:
        return _one_color(pixels)
    # 255 and 65535 may stand for 1
    high = high if high <= 1.5 else 255.0 if high <= 255 else 65535.0 if high <= 65535 else high
    unit = high if high > 1.5 else 1.0
    soft = _brightest(pixels.sample(SAMPLED))[0] / unit
    if high / unit > 0.5:
        _refuse_labels(pixels, soft)
        white = torch.cat([_brightest(strip)[0] > unit / 2 for _, strip in pixels.strips()])
        return Solid(white, soft.clamp(0, 1))
    parts, most = [], max(high, 1e-30)
    others: set[float] = set()
    for _, strip in pixels.strips():
        value = _brightest(strip)[0]
        parts.append(value > 0)
        if len(others) < 5:
            others |= set(value[(value > 0) & (value < most)].unique()[:5].tolist())
    largest = high * pixels.largest
    # a tensor with next to nothing in it may be the alpha of an image that is nearly opaque, as Load Image gives it
    if others or (high and not pixels.stored):
        some = ", ".join(f"{value * pixels.largest:.6g}" for value in sorted(others)[:4])
        beside = f" ({some}{', …' if len(others) > 4 else ''} lie between)" if some else ""
        raise ImageError(
            f"the largest value of the {pixels.name} is {largest:.6g}{beside}, where white is "
            f"{unit * pixels.largest:.6g}: nothing of it is above one half. If it holds labels, make a mask of the one "
            "object; if it is a faint mask, stretch it to black and white"
        )
    note = f"the {pixels.name} holds 0 and {largest:.6g} alone, and {largest:.6g} was taken for white" if high else ""
    return Solid(torch.cat(parts), soft / most if high else soft, note)


def _refuse_labels(pixels: Pixels, soft: Tensor) -> None:
    """Refuse a file of a few levels much of which is dark: 0, the labels of objects, and 255 where nothing is known."""
    levels, counts = soft.unique(return_counts=True)
    dark = (levels > 0) & (levels <= 0.5)
    if pixels.stored and len(levels) <= 4 and counts[dark].sum() > 0.2 * counts[levels > 0].sum():
        values = ", ".join(f"{level * pixels.largest:.6g}" for level in levels.tolist())
        raise ImageError(
            f"the {pixels.name} holds {values} alone, which look like labels: make a mask of the one object, white on "
            "black"
        )


def _brightest(strip: Tensor) -> tuple[Tensor, Tensor]:
    """The value of every pixel [h, w], and how far its colours lie apart."""
    if strip.shape[-1] == 1:
        return strip[..., 0], torch.zeros(())
    colors = strip[..., :3]
    high = colors.amax(-1)
    apart = high - colors.amin(-1)
    return torch.where(apart > COLORED, high, colors.mean(-1)), apart


def _one_color(pixels: Pixels) -> Solid:
    """A mask in colour: what isn't black is white, if it has one colour."""
    found: list[int] = []
    white = []
    for _, strip in pixels.strips():
        codes = _codes(strip)
        rest = codes[(codes != 0) & (codes != _VOID)]
        for color in found:
            rest = rest[rest != color]
        while len(rest) and len(found) < 2:
            found.append(int(rest[0]))
            rest = rest[rest != found[-1]]
        if len(found) > 1:
            raise ImageError(
                f"the {pixels.name} is a coloured image (with #{found[0]:06x} and #{found[1]:06x}, say): a mask is "
                "black and white, or one colour on black. If these are labels, make a mask of the one object"
            )
        white.append(codes == (found[0] if found else -1))
    soft = (_codes(pixels.sample(SAMPLED)) == found[0]).float()
    note = f"the {pixels.name} holds one colour, #{found[0]:06x}, which was taken for white"
    return Solid(torch.cat(white), soft, note)


def _codes(strip: Tensor) -> Tensor:
    red, green, blue = (strip[..., :3] * 255).round().int().unbind(-1)
    return red << 16 | green << 8 | blue


# ---- what it shows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskReading:
    """What a mask's white part is."""

    shows: Literal["subject", "background", "unknown"]
    reason: str  # as the end of a sentence


@dataclass(frozen=True)
class _Hint:
    """Something that speaks for white being the subject or the background."""

    weight: float  # above 0 for the subject, below for the background; 2 is enough
    reason: str = ""


def what_mask_shows(mask: Tensor, rgb: Tensor) -> MaskReading:
    """Tell whether a mask is white on the subject or on the background, where that can be told.

    What lies under the mask counts: a part of the image that is one colour is the background, as cut-outs hide it.
    So does where it lies: the background fills the border, the subject the middle. Where both say nothing, or one
    contradicts the other, nothing is known.

    Args:
        mask: [h, w] in [0, 1]. rgb: [h, w, 3 or 4] in [0, 1] of the same places; with an alpha that hides something,
            the mask is compared with it.
    """
    white = mask > 0.5
    if white.all() or not white.any():
        return MaskReading(SUBJECT, "it is white all over" if white.all() else "it is black all over")
    if rgb.shape[-1] == 4:
        solid = rgb[..., 3] > 0.5
        agreeing = float((solid == white).float().mean())
        if not solid.all() and solid.any() and not 0.05 < agreeing < 0.95:  # the alpha is the mask, or its inverse
            reason = f"it is white where the image is {'opaque' if agreeing > 0.5 else 'hidden'}"
            return MaskReading(SUBJECT if agreeing > 0.5 else BACKGROUND, reason)
    colors, place = _hint_of_colors(mask, rgb[..., :3]), _hint_of_place(white)
    against = colors.weight * place.weight < 0
    # a weak hint of the colours yields to a strong one of the place; otherwise a contradiction is one
    if against and not (abs(place.weight) == 2 and abs(colors.weight) == 1):
        return MaskReading(UNKNOWN, f"{colors.reason}, but {place.reason}")
    deciding = place if against else max(colors, place, key=lambda hint: abs(hint.weight))
    if not against and abs(colors.weight + place.weight) < 2:
        return MaskReading(UNKNOWN, "neither the colours under it nor the places of its parts tell")
    return MaskReading(SUBJECT if deciding.weight > 0 else BACKGROUND, deciding.reason)


def _hint_of_colors(mask: Tensor, rgb: Tensor) -> _Hint:
    """What cut-outs hide is one colour, mostly pure black or white."""
    (one, color), (other, other_color) = (_evenness(rgb[part]) for part in (mask > 0.98, mask < 0.02))
    pure, other_pure = _is_pure(color), _is_pure(other_color)
    if one == other == 2:  # both are flat drawings: pure black or white is what tools fill with
        one, other = 2 * pure, 2 * other_pure
    if one == other:
        return _Hint(0)
    part, even, filled = ("white", one, pure) if one > other else ("black", other, other_pure)
    # another colour alone may be a subject's that is drawn flat
    weight = 1 if even == 1 else 2 if filled else 1.5
    what = "is one colour in the image" if even == 2 else "is nearly one colour in the image"
    return _Hint(-weight if part == "white" else weight, f"what is {part} in it {what}")


def _is_pure(color: Tensor) -> bool:
    return bool((color < 1e-3).all() or (color > 0.999).all())


def _evenness(colors: Tensor) -> tuple[int, Tensor]:
    """2: colors [N, 3] are one, 1: nearly, 0: they aren't, or too few to say; and the middle one."""
    if len(colors) < 16:
        return 0, torch.full((3,), 0.5)
    middle = colors.median(0).values
    apart = (colors - middle).abs().amax(-1)
    if (apart < 0.75 / 255).float().mean() >= 0.999:
        return 2, middle
    return int((apart < 6 / 255).float().mean() >= 0.97), middle


def _hint_of_place(white: Tensor) -> _Hint:
    """The background fills the border, the subject the middle."""
    height, width = white.shape
    inner = white[height // 4 : height - height // 4, width // 4 : width - width // 4]
    border, middle = _border(white), float(inner.float().mean())
    if border in (0, 1):
        part = "white" if border else "black"
        return _Hint(2 if part == "black" else -2, f"what is {part} in it fills the image's border")
    lean = middle - border
    weight = 2 if abs(lean) >= 0.6 else 1 if abs(lean) >= 0.15 else 0
    part, share, rest = ("white", border, middle) if lean < 0 else ("black", 1 - border, 1 - middle)
    reason = f"what is {part} in it covers {share:.0%} of the image's border and {rest:.0%} of its middle"
    return _Hint(weight if lean > 0 else -weight, reason)


def _border(white: Tensor) -> float:
    edge = torch.cat((white[0], white[-1], white[:, 0], white[:, -1]))
    return float(edge.float().mean())


# ---- asking ------------------------------------------------------------------------------------------------------


def unclear_mask(white: Tensor, rgb: Tensor, reason: str) -> UnclearMask:
    """Ask what a mask [H, W] shows; `rgb` [h, w, 3] is the image at the places of `Pixels.sample(SAMPLED)`."""
    height, width = white.shape
    rows, columns = spread(height, SAMPLED), spread(width, SAMPLED)
    small = white[rows][:, columns, None].float()
    panels = [rgb * part + (0.25 * rgb + 0.6) * (1 - part) for part in (small, 1 - small)]
    gap = torch.ones(len(rows), 4, 3)
    return UnclearMask(
        f"it can't be told whether the mask is white on the subject or on the background: {reason}. Say it with "
        f"mask_shows (on the command line --mask-shows): 'subject' takes its white part ({_described(white)}), "
        f"'background' its black part ({_described(~white)})",
        torch.cat((panels[0], gap, panels[1]), 1).clamp(0, 1),
    )


def _described(part: Tensor) -> str:
    top, bottom, left, right = box_of(part)
    return (
        f"{part.float().mean():.0%} of the image, {right - left}x{bottom - top} pixels from ({left}, {top}) on, "
        f"{_border(part):.0%} of its border"
    )


def box_of(part: Tensor) -> tuple[int, int, int, int]:
    """The smallest box (top, bottom, left, right) that holds all of a part [H, W] that isn't empty."""
    rows, columns = (part.any(dim).nonzero()[:, 0] for dim in (1, 0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
