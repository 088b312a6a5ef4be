"""Pixels of files and tensors, read a part at a time, so that a large image is never held in full as floats."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...documents import disguise, first_line, printable

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS, MOST_SIDE, MOST_BYTES = 2**26, 2**16, 2**29
"""Of an image that is read (8192 x 8192, say), of one of its sides, and of its file."""
ALL = slice(None)
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM", "TGA", "JPEG2000")
"""What is read. Not all that Pillow knows: some formats are programs for others, some hide another size inside."""
_ANIMATED = ("PNG", "GIF", "WEBP", "AVIF")
_VALUES_AT_ONCE = 2**22
_TURNS = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))
"""EXIF's orientation -> Pillow's Transpose."""


class ImageError(ValueError):
    """An image that no scene can be made from, and what to give instead."""


@dataclass(frozen=True)
class Pixels:
    """An image, mask or map whose numbers are asked for a part at a time."""

    name: str  # what it is and which file, for messages
    height: int
    width: int
    channels: int
    block: Callable[..., Tensor]  # (top, bottom, left, right, channels=ALL) -> [h, w, channels] float32 on the CPU
    largest: float = 1.0  # the stored number that became 1
    stored: bool = False  # in a file
    finite: bool = False  # whether it is known that no number is NaN or infinite
    note: str = ""  # what has to be said about the way it was read

    def strips(self) -> Iterator[tuple[int, Tensor]]:
        """All of it from top to bottom, as (first row, [h, W, channels])."""
        at_once = max(1, _VALUES_AT_ONCE // (self.width * self.channels))
        for top in range(0, self.height, at_once):
            yield top, self.block(top, min(top + at_once, self.height), 0, self.width)

    def sample(self, most: int) -> Tensor:
        """Its pixels at a grid of no more than `most` rows and columns, the outermost ones among them."""
        columns = spread(self.width, most)
        # row by row: files are decoded, but not held as floats
        rows = (self.block(row, row + 1, 0, self.width)[:, columns] for row in spread(self.height, most).tolist())
        return torch.cat(list(rows))

    def only(self, channels: slice, name: str | None = None) -> Pixels:
        """Some of its channels."""

        def block(top: int, bottom: int, left: int, right: int, inner: slice = ALL) -> Tensor:
            return self.block(top, bottom, left, right, channels)[..., inner]

        n_channels = len(range(*channels.indices(self.channels)))
        return replace(self, name=name or self.name, channels=n_channels, block=block)


def spread(n: int, most: int) -> Tensor:
    """No more than `most` of n places, evenly spread from the first to the last."""
    return torch.linspace(0, n - 1, min(n, most)).round().long()


def tensor_pixels(pixels: Tensor, what: str, channels: tuple[int, ...]) -> Pixels:
    """One image [H, W, c], or a batch of one. Bytes are of 255. Raises ImageError for other shapes."""
    if pixels.ndim == 4:
        if len(pixels) != 1:
            raise ImageError(f"one {what} is needed, got {len(pixels)}: pick one of the batch")
        pixels = pixels[0]
    if pixels.ndim != 3 or pixels.shape[-1] not in channels or not pixels.numel():
        raise ImageError(f"the {what} must be [H, W, {' or '.join(map(str, channels))}], got {list(pixels.shape)}")
    unit = 255.0 if pixels.dtype == torch.uint8 else 1.0

    def block(top: int, bottom: int, left: int, right: int, channels: slice = ALL) -> Tensor:
        part = pixels[top:bottom, left:right, channels].detach().to("cpu", torch.float32)
        return part if unit == 1 else part / unit

    height, width, n_channels = pixels.shape
    return Pixels(what, height, width, n_channels, block, unit)


def map_pixels(pixels: Tensor, what: str) -> Pixels:
    """One mask or map: [H, W], [1, H, W], or with 1, 3 or 4 channels at the end."""
    if pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4)):  # [B, H, W] as ComfyUI's masks
        pixels = pixels[..., None]
    return tensor_pixels(pixels, what, (1, 3, 4))


@contextmanager
def file_pixels(path: Path | str, what: str) -> Iterator[Pixels]:
    """Open an image file, turned upright; its first frame, if it moves. Raises ImageError for what can't be read."""
    path = Path(path)
    name = f"{what} {printable(str(path))}"
    try:
        if not path.is_file():
            raise ImageError(f"the {name} {'is a folder' if path.is_dir() else 'does not exist'}")
        image, pixels = _decoded(path, name)
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever they like
        raise ImageError(f"the {name} could not be read as an image: {_why(path, error)}") from error
    try:
        yield pixels
    finally:
        image.close()


def _decoded(path: Path, name: str) -> tuple[Image.Image, Pixels]:
    from PIL import Image

    n_bytes = path.stat().st_size
    if n_bytes > MOST_BYTES:
        raise ImageError(f"the {name} holds {n_bytes:,} bytes, more than {MOST_BYTES:,}: make it smaller")
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damage that doesn't matter, in the decoders' words
        image = Image.open(path, formats=[kind for kind in _FORMATS if kind in Image.OPEN])
        size = f"{image.width}x{image.height} pixels"
        if image.width * image.height > MOST_PIXELS:
            image.close()
            raise ImageError(f"the {name} has {size}, more than {MOST_PIXELS}: make it smaller")
        if max(image.size) > MOST_SIDE:
            image.close()
            raise ImageError(f"the {name} has {size}, more than {MOST_SIDE} on one side: cut it")
        moves = image.format in _ANIMATED and bool(getattr(image, "is_animated", False))
        turn = _TURNS.get(_orientation(image))
        image.load()
        upright = image if turn is None else image.transpose(Image.Transpose(turn))
        note = f"of the frames of {printable(path.name)} the first one was taken" if moves else ""
        pixels = _image_pixels(upright, name, note)
        pixels.block(0, 1, 0, 1)  # what can't be converted is found here
    return upright, pixels


def _orientation(image: Image.Image) -> int:
    """How the camera was held, as EXIF has it; 1, upright, where the EXIF can't be understood."""
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # malformed in any of many ways: the pixels are none the worse
        return 1
    return found if isinstance(found, int) else 1


def _why(path: Path, error: Exception) -> str:
    """What is wrong with a file that is no image."""
    from PIL import Image, UnidentifiedImageError

    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return first_line(error.strerror if isinstance(error, OSError) and error.strerror else error)
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {MOST_PIXELS} pixels: make it smaller"
    if b"<svg" in head:
        return "it is a drawing (SVG): export it as PNG"
    strange = disguise(head)
    if strange is not None:
        return f"it {strange}"
    if not isinstance(error, UnidentifiedImageError):
        said = isinstance(error, OSError | ValueError | SyntaxError) and str(error).strip()
        why = "it needs more memory than there is" if isinstance(error, MemoryError) else "its decoder gave up"
        return f"{first_line(error) if said else why}; save it again, or give another file"
    if head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif"):
        return "it is an HEIC file, as phones save them: save it as PNG or JPEG"
    return "it is damaged or none of the formats that are read: give a PNG, JPEG or WebP file"


def _image_pixels(image: Image.Image, name: str, note: str) -> Pixels:
    import numpy as np

    numbers = image.mode.startswith(("I", "F"))  # grey of 16 or 32 bits
    mode = "RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB"

    def block(top: int, bottom: int, left: int, right: int, channels: slice = ALL) -> Tensor:
        part = image.crop((left, top, right, bottom))
        if not numbers and part.mode != mode:
            # Pillow can't bring premultiplied grey to colours in one go
            part = (part.convert("LA") if part.mode == "La" else part).convert(mode)
        stored = np.asarray(part)
        chosen = stored[..., None] if stored.ndim == 2 else stored[..., channels]
        return torch.from_numpy(chosen.astype("float32")).div_(unit)

    channels, unit = len(mode) if mode != "L" else 1, 1.0
    if not numbers:
        unit = 255.0
        return Pixels(name, image.height, image.width, channels, block, unit, True, True, note)
    raw = Pixels(name, image.height, image.width, 1, block)
    largest = max(float(part.nan_to_num(0, 0, 0).max()) for _, part in raw.strips())
    unit = next((unit for unit in (1.0, 255.0, 65535.0) if largest <= unit), largest)  # numbers are stored up to these
    return Pixels(name, image.height, image.width, 1, block, unit, True, image.mode[0] == "I", note)
