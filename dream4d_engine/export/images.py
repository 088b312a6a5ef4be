"""Single images: PNG files and labelled sheets of many."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..documents import printable, shortened
from ..machine import write_atomically

if TYPE_CHECKING:
    import numpy as np
    from PIL import ImageFont

_MARGIN, _PAPER, _INK = 6, (255, 255, 255), (40, 40, 40)
_LINE, _MOST_LINES = 16, 4
"""Height of a line of the title, pixels, and how many there are at most."""


def to_bytes(image: Tensor | np.ndarray) -> np.ndarray:
    """Return an image [H, W, 3] or [H, W, 1] as uint8 [H, W, 3].

    Floats are in [0, 1] (clamped; what is not finite becomes 0); uint8 passes unchanged.
    """
    tensor = torch.as_tensor(image).detach().cpu()
    if tensor.ndim != 3 or tensor.shape[-1] not in (1, 3):
        raise ValueError(f"an image has the shape [H, W, 3] or [H, W, 1], got {list(tensor.shape)}")
    if tensor.dtype != torch.uint8:
        tensor = (tensor.float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return tensor.expand(-1, -1, 3).contiguous().numpy()


def save_image(path: Path, image: Tensor | np.ndarray) -> None:
    """Write an image (see `to_bytes`), whole or not at all: as JPEG where the name ends in .jpg, else as PNG."""
    from PIL import Image

    buffer, file = io.BytesIO(), Image.fromarray(to_bytes(image))
    if path.suffix.lower() in (".jpg", ".jpeg"):
        file.save(buffer, "JPEG", quality=90, subsampling=0)
    else:
        file.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def contact_sheet(
    images: Tensor, row_labels: Sequence[str], column_labels: Sequence[str], title: str = ""
) -> np.ndarray:
    """Lay images [rows, columns, H, W, 3] out on white, with a label beside each row and above each column.

    The title is broken into lines as wide as the sheet, and shortened where it needs more than four. Returns uint8
    [height, width, 3].
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    if images.ndim != 5 or images.shape[:2] != (len(row_labels), len(column_labels)):
        raise ValueError(
            f"{len(row_labels)} row and {len(column_labels)} column labels don't fit images {list(images.shape)}"
        )
    rows, columns, height, width = images.shape[:4]
    font = ImageFont.load_default(12)
    left = _MARGIN + max(int(font.getlength(label)) for label in row_labels) + _MARGIN
    right = left + columns * (width + _MARGIN)
    lines = _broken(title, font, right - 2 * _MARGIN)
    top = _MARGIN + (_LINE * len(lines) + 4 if lines else 0) + 16
    sheet = Image.new("RGB", (right, top + rows * (height + _MARGIN)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + _LINE * index), line, fill=_INK, font=font)
    for column, label in enumerate(column_labels):
        middle = left + column * (width + _MARGIN) + width / 2
        draw.text((middle, top - 10), label, fill=_INK, font=font, anchor="mm")
    for row, label in enumerate(row_labels):
        y = top + row * (height + _MARGIN)
        draw.text((_MARGIN, y + height / 2), label, fill=_INK, font=font, anchor="lm")
        for column in range(columns):
            tile = Image.fromarray(to_bytes(images[row, column]))
            sheet.paste(tile, (left + column * (width + _MARGIN), y))
    return np.asarray(sheet)


def _broken(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break a text into lines no wider than `width` pixels, at spaces where there are any."""
    words = printable(shortened(text, width * _MOST_LINES)).split()  # no letter that is seen is narrower than a pixel
    lines: list[str] = []
    while words and len(lines) < _MOST_LINES:
        line = words.pop(0)
        if font.getlength(line) > width:
            n_letters = max(1, _fitting(line, font, width))
            words.insert(0, line[n_letters:])
            line = line[:n_letters]
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line += f" {words.pop(0)}"
        lines.append(line)
    if words:
        last = lines[-1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        lines[-1] = f"{last}…"
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> int:
    """How many letters of a text fit into `width` pixels."""
    fitting, too_many = 0, len(text) + 1
    while too_many - fitting > 1:  # halving: a text's width takes as long to find as the text is
        middle = (fitting + too_many) // 2
        if font.getlength(text[:middle]) <= width:
            fitting = middle
        else:
            too_many = middle
    return fitting
