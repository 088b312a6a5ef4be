"""Textures of others: decoded if they are images of a size that can be meant."""

from __future__ import annotations

import io
import warnings

import torch
from torch import Tensor

from ..documents import first_line
from ..mesh import MeshError

MOST_PIXELS = 2**26
"""Of one texture."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TGA", "TIFF", "GIF")


class BadImage(ValueError):
    """These bytes can't be shown as an image; the message says why, as the end of a sentence."""


def decode_image(data: bytes, where: str) -> Tensor:
    """An image as uint8 [H, W, 4], sRGB and alpha.

    Raises BadImage where there is none to be had (a model can be shown without), and MeshError for one that is too
    large.
    """
    import numpy as np
    from PIL import Image

    Image.init()
    too_large = f"{where} has more than {MOST_PIXELS:,} pixels: make it smaller"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damage that doesn't matter, in the decoders' words
            image: Image.Image = Image.open(io.BytesIO(data), formats=[kind for kind in _FORMATS if kind in Image.OPEN])
            if image.width * image.height > MOST_PIXELS:
                raise MeshError(too_large)
            if image.mode.startswith("I"):  # 16 bits of grey
                image = Image.fromarray((np.asarray(image) >> 8).astype("u1"))
            pixels = np.array(image.convert("RGBA"))
    except MeshError:
        raise
    except Image.DecompressionBombError as error:
        raise MeshError(too_large) from error
    except Exception as error:  # whatever the decoders raise
        raise BadImage(f"can't be read as an image ({first_line(error)})") from error
    return torch.from_numpy(pixels)


def encode_image(pixels: Tensor) -> bytes:
    """uint8 [H, W, 4] as a PNG; without alpha where all of it is opaque."""
    from PIL import Image

    opaque = bool((pixels[..., 3] == 255).all())
    buffer = io.BytesIO()
    Image.fromarray((pixels[..., :3] if opaque else pixels).contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()
