"""Damaged images of many formats: an image, or one sentence about the file; never much memory or time."""

from __future__ import annotations

import io
import random
import resource
import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from dream4d_engine.training.config import ReferenceConfig
from dream4d_engine.training.reference import ImageError, load_reference, prepare_reference
from dream4d_engine.training.reference.pixels import file_pixels

CONFIG = ReferenceConfig()
ROUNDS = 12
SIZE = 48
MOST_GIGABYTES, MOST_SECONDS = 1.0, 5.0
FORMATS = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "TIFF": ["1", "L", "RGB", "RGBA", "I;16", "F", "CMYK"],
    "GIF": ["L", "P", "RGBA"],
    "BMP": ["L", "RGB"],
    "PPM": ["L", "RGB"],
    "TGA": ["L", "RGBA"],
    "JPEG2000": ["L", "RGBA"],
    "AVIF": ["RGB", "RGBA"],
}


def good_files() -> dict[str, bytes]:
    """One small image in each format and mode that this Pillow writes, by name."""
    colors = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    inside = np.zeros((SIZE, SIZE), np.uint8)
    inside[10:40, 12:34] = 255
    image = Image.fromarray(np.dstack((colors, inside)))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    made = {}
    for kind, modes in FORMATS.items():
        for mode in modes:
            buffer = io.BytesIO()
            if mode == "I;16":
                converted = Image.fromarray(inside.astype(np.uint16) * 257)
            elif mode == "CMYK":
                converted = image.convert("RGB").convert(mode)
            else:
                converted = image.convert("L").convert(mode) if mode == "F" else image.convert(mode)
            extra = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "AVIF") else {}
            try:
                converted.save(buffer, kind, **extra)
            except (KeyError, OSError):  # an encoder that isn't built in
                continue
            made[f"{kind}-{mode}"] = buffer.getvalue()
    return made


GOOD = good_files()


def flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 2, 8, 40))):
        data[draw.randrange(len(data))] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))


def flip_head(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 2, 4))):
        data[draw.randrange(min(len(data), 64))] = draw.randrange(256)


def number(data: bytearray, draw: random.Random) -> None:
    """Another size, offset or count."""
    value = draw.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 100_000))
    form = draw.choice(("<I", ">I", "<H", ">H"))
    value &= 0xFFFF if form[1] == "H" else 0xFFFFFFFF
    struct.pack_into(form, data, draw.randrange(max(1, len(data) - 4)), value)


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def drop(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data))
    del data[at : at + draw.choice((1, 4, 16, 200))]


def repeat(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data))
    data[at:at] = data[at : at + draw.choice((1, 8, 64, 400))] * draw.choice((1, 3, 50))


def append(data: bytearray, draw: random.Random) -> None:
    data += draw.randbytes(draw.choice((1, 100, 5000)))


def mend_png(data: bytearray) -> None:
    """Right checksums, so that damage gets past them."""
    at = 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if at + 12 + length > len(data):
            return
        struct.pack_into(">I", data, at + 8 + length, zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length


DAMAGES: tuple[Callable[[bytearray, random.Random], None], ...] = (flip, flip_head, number, cut, drop, repeat, append)


def damaged(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        if changed:
            draw.choice(DAMAGES)(changed, draw)
    if draw.random() < 0.6:
        mend_png(changed)
    return bytes(changed)


def gigabytes() -> float:
    """The most memory that this process ever took."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def attempt(make: Callable[[], object], what: str) -> None:
    """Only a ImageError of one line is allowed, soon, and without much memory."""
    began, before = time.process_time(), gigabytes()
    try:
        make()
    except ImageError as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 1000 and text.isprintable(), (what, text)
        assert "Error" not in text.split(":")[-1] or "error" in text, (what, text)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert time.process_time() - began < MOST_SECONDS, what
    assert gigabytes() - before < MOST_GIGABYTES, what


@pytest.mark.parametrize("name", GOOD)
def test_damaged_files(name, fuzz, tmp_path):
    """As the image, its mask, its depth and its normal map."""
    mask, image, path = tmp_path / "mask.png", tmp_path / "image.png", tmp_path / "p"
    mask.write_bytes(GOOD["PNG-L"])
    image.write_bytes(GOOD["PNG-RGBA"])
    path.write_bytes(GOOD[name])
    with file_pixels(path, "image") as whole:
        assert {whole.height, whole.width} == {SIZE} and len(whole.sample(SIZE)) == SIZE
    for seed in range(ROUNDS * fuzz):
        path.write_bytes(damaged(GOOD[name], random.Random(f"{name} {seed}")))
        maps = [{"mask": path}, {"depth": path}, {"normals": path}][seed % 3]
        attempt(lambda: load_reference(path, CONFIG), f"{name} {seed} as the image")
        attempt(lambda maps=maps: load_reference(image, CONFIG, **maps), f"{name} {seed} as {[*maps]}")


def strange(draw: random.Random, seed: int) -> torch.Tensor:
    """A tensor of nearly the right shape with nearly the right numbers."""
    side, other = draw.choice(((1, 1), (1, 40), (40, 40), (40, 40), (40, 40), (2, 3)))
    shape = draw.choice(((side, other), (1, side, other), (side, other, 3), (1, side, other, 4), (side, other, 1)))
    shape = draw.choice((shape, shape, shape, (2, *shape), (0, *shape[1:]), ()))
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    how = draw.randrange(9)
    if how == 0:
        values = torch.full(shape, draw.choice((0.0, 1.0, -1.0, 0.5, 1e30, float("nan"), float("inf"))))
    elif how == 1:
        values = (values > 0.5).to(draw.choice((torch.float32, torch.bool, torch.uint8, torch.int64, torch.float16)))
    elif how == 2:
        values = torch.where(values > 0.9, float("nan"), values)
    elif how == 3:
        values = values * draw.choice((255, -3, 1e-5, 65535))
    elif how == 4 and values.ndim > 1:
        values = values.transpose(0, 1)
    return values


def test_strange_tensors(fuzz):
    for seed in range(400 * fuzz):
        draw = random.Random(seed)
        image = torch.rand(40, 40, draw.choice((3, 4)), generator=torch.Generator().manual_seed(seed))
        maps = {
            name: strange(draw, seed + i) for i, name in enumerate(("mask", "depth", "normals")) if draw.random() < 0.5
        }
        shows = draw.choice(("automatic", "automatic", "subject"))
        if draw.random() < 0.3:
            image = strange(draw, seed)

        def make(image=image, maps=maps, shows=shows):
            found = prepare_reference(image, CONFIG, **maps, mask_shows=shows)
            for layer in (found.rgb, found.mask, found.depth, found.normals):
                assert layer is None or layer.isfinite().all()

        attempt(make, f"tensors of seed {seed}")


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, color: int = 6) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    """Small files that claim or unpack to much."""
    zeros = zlib.compress(bytes(2**26), 9)
    made = {
        "png of 4 gigapixels": png(65535, 65535, chunk(b"IDAT", zeros)),
        "png of 67 megapixels": png(8192, 8192, chunk(b"IDAT", zlib.compress(bytes(2**28 + 8192), 9))),
        "png of one row": png(2**26, 1, chunk(b"IDAT", zeros)),
        "png of one column": png(1, 2**26, chunk(b"IDAT", zeros)),
        "text in a png": png(SIZE, SIZE, *[chunk(b"zTXt", b"a\0\0" + zeros)] * 20),
        "profile in a png": png(SIZE, SIZE, chunk(b"iCCP", b"a\0\0" + zeros)),
        "many chunks": png(SIZE, SIZE, *[chunk(b"tEXt", b"a\0b")] * 50_000),
        "gif of 4 gigapixels": b"GIF89a"
        + struct.pack("<HH", 65535, 65535)
        + bytes(3)
        + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;",
        "bmp of 4 gigapixels": b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 65000, 65000, 1, 24, *[0] * 6),
        "tga of 4 gigapixels": struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, 65535, 65535, 32, 8)
        + b"\xff" * 64,
        "ppm of 4 gigapixels": b"P6 65535 65535 255\n" + bytes(64),
        "ppm without end": b"P3 " + b"9" * 1_000_000,
    }
    frames = [Image.new("L", (SIZE, SIZE), i % 256) for i in range(300)]
    for kind in ("GIF", "PNG", "TIFF"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        made[f"{kind} of 300 frames"] = buffer.getvalue()
    return made


BOMBS = bombs()


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_that_claim_much(name, tmp_path):
    (tmp_path / "p").write_bytes(BOMBS[name])
    (tmp_path / "image.png").write_bytes(GOOD["PNG-RGBA"])
    attempt(lambda: load_reference(tmp_path / "p", CONFIG), name)
    attempt(lambda: load_reference(tmp_path / "image.png", CONFIG, mask=tmp_path / "p"), f"{name} as mask")


def test_the_damage_is_damage(tmp_path):
    """Many files are refused, and some are still read: neither door is always shut."""
    outcomes = []
    for seed in range(60):
        (tmp_path / "p").write_bytes(damaged(GOOD["PNG-RGBA"], random.Random(seed)))
        try:
            load_reference(tmp_path / "p", CONFIG)
            outcomes.append("read")
        except ImageError:
            outcomes.append("refused")
    assert 5 < outcomes.count("read") < 55 and len(GOOD) > 20
