"""Images, masks and maps as people have them: in every way that they are stored, and what is white in a mask."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from pack import part_of_the_pack
from PIL import Image, ImageDraw, ImageFilter
from places import CASES

from dream4d_engine.training.config import ReferenceConfig
from dream4d_engine.training.reference import ImageError, UnclearMask, load_reference, prepare_reference
from dream4d_engine.training.reference.masks import what_mask_shows

CONFIG = ReferenceConfig()
TIGHT = ("mug_tight", "building_filled", "tight_circle", "portrait_bust")


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def drawn(draw, size=128, under=(0, 0, 0), subject=None):
    """A cut-out: noise (or `subject`, a colour) where `draw` paints, `under` where it is transparent."""
    alpha = Image.new("L", (size, size))
    draw(ImageDraw.Draw(alpha), size)
    alpha = np.asarray(alpha)
    colors = noise(size, size) if subject is None else np.full((size, size, 3), subject, np.uint8)
    hidden = noise(size, size, 1) if under is None else np.full((size, size, 3), under, np.uint8)
    return Image.fromarray(np.dstack((np.where(alpha[..., None] > 127, colors, hidden), alpha)))


def icon(draw, n):
    draw.rounded_rectangle((0, 0, n - 1, n - 1), n // 8, fill=255)


def triangle(draw, n):
    draw.polygon([(0, n - 1), (n // 2, 0), (n - 1, n - 1)], fill=255)


def lower_half(draw, n):
    draw.rectangle((0, n // 2, n - 1, n - 1), fill=255)


def tower(draw, n):
    draw.rectangle((n // 4, 0, n * 3 // 4, n - 1), fill=255)


def corner(draw, n):
    draw.rectangle((0, 0, n // 3, n // 3), fill=255)


def frame(draw, n):
    draw.rectangle((0, 0, n - 1, n - 1), fill=255)
    draw.rectangle((n // 4, n // 4, n * 3 // 4, n * 3 // 4), fill=0)


def middle(draw, n):
    draw.ellipse((n // 4, n // 4, n * 3 // 4, n * 3 // 4), fill=255)


SHAPES = (icon, triangle, lower_half, tower, corner, middle)


def as_comfyui(image):
    """What Load Image gives: IMAGE [1, H, W, 3] without the alpha, MASK [1, H, W] = 1 - alpha."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGBA")).astype("float32")) / 255
    return pixels[None, ..., :3], 1 - pixels[None, ..., 3]


def reading_of(image):
    rgb, mask = as_comfyui(image)
    return what_mask_shows(mask[0], rgb[0])


# ---- what a mask shows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TIGHT, "rgba_ok"])
def test_cut_outs_that_touch_their_frame(name):
    """The opaque part is the subject: by alpha, by Load Image's mask, by that of a node that removes backgrounds."""
    images, path = part_of_the_pack("images"), CASES / f"{name}.png"
    image = Image.open(path)
    opaque = np.asarray(image)[..., 3] > 127
    found = load_reference(path, CONFIG)
    assert found.mask.sum() == opaque.sum(), "nothing was reduced"
    rgb, hidden = as_comfyui(image)
    for mask in (hidden, 1 - hidden):
        assert images.reference_of(rgb, mask, "automatic", CONFIG).fingerprint() == found.fingerprint()
    assert (
        "white on the background, for what is white in it is one colour"
        in prepare_reference(rgb, CONFIG, mask=hidden).statement
    )
    assert images.reference_of(rgb, hidden, "background", CONFIG).fingerprint() == found.fingerprint()
    inside_out = images.reference_of(rgb, hidden, "subject", CONFIG)
    assert inside_out.mask.sum() == (~opaque).sum(), "what is said outright is obeyed"


@pytest.mark.parametrize("draw", SHAPES, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("under", [(0, 0, 0), (255, 255, 255), (71, 112, 76)])
def test_other_shapes_over_one_colour(draw, under):
    """Right, or asked: a subject that leaves the middle free may look like a hole. Never inside out."""
    rgb, hidden = as_comfyui(drawn(draw, under=under))
    for mask, right in ((hidden, "background"), (1 - hidden, "subject")):
        assert what_mask_shows(mask[0], rgb[0]).shows in (right, "unknown")
    if draw in (icon, triangle, tower, middle) or (draw is lower_half and under != (71, 112, 76)):
        assert what_mask_shows(hidden[0], rgb[0]).shows == "background"


KEPT = [
    (draw, subject, under)
    for draw in SHAPES
    for subject in (None, (200, 30, 30), (0, 0, 0), (255, 255, 255))
    for under in (None, (0, 0, 0), (255, 255, 255))
    # pure black or white, and nothing else to go by: experience says that it was filled
    if under or subject in (None, (200, 30, 30)) or draw not in (lower_half, corner)
]


@pytest.mark.parametrize(("draw", "subject", "under"), KEPT)
def test_nothing_is_taken_inside_out(draw, subject, under):
    """Flat drawings, silhouettes, and cut-outs that kept the colours of what they hide."""
    assert reading_of(drawn(draw, under=under, subject=subject)).shows in ("background", "unknown")


def test_where_it_cannot_be_known_both_readings_are_shown():
    image = drawn(frame)
    rgb, hidden = as_comfyui(image)
    with pytest.raises(UnclearMask) as asked:
        prepare_reference(rgb, CONFIG, mask=hidden)
    text = str(asked.value)
    assert "one colour in the image, but what is black in it fills the image's border" in text
    assert "'subject' takes its white part (26% of the image, 65x65 pixels from (32, 32) on, 0% of its border)" in text
    assert "'background' its black part (74% of the image, 128x128 pixels from (0, 0) on, 100% of its border)" in text
    readings = asked.value.readings
    assert readings.shape == (128, 260, 3) and 0 <= readings.min() and readings.max() <= 1
    white, black = readings[:, :128], readings[:, 132:]
    assert torch.equal(white[64, 64], rgb[0, 64, 64]) and torch.equal(black[0, 0], rgb[0, 0, 0])
    assert not torch.equal(white[0, 0], rgb[0, 0, 0]), "what isn't taken is faded"
    assert prepare_reference(rgb, CONFIG, mask=hidden, mask_shows="background").mask.sum() == 128**2 - 65**2
    with pytest.raises(ImageError, match="mask_shows must be one of automatic, subject, background, got 'both'"):
        prepare_reference(rgb, CONFIG, mask=hidden, mask_shows="both")
    with pytest.raises(ImageError, match="mask_shows is 'background', but no mask was given"):
        load_reference(CASES / "rgba_ok.png", CONFIG, mask_shows="background")


def test_an_inverted_mask_file_is_told_from_a_good_one(tmp_path):
    image = CASES / "rgba_ok.png"
    Image.open(image).convert("RGB").save(tmp_path / "flat.png")
    Image.fromarray(noise(128, 128)).save(tmp_path / "noise.png")
    right = load_reference(image, CONFIG)
    for given in (tmp_path / "flat.png", tmp_path / "noise.png", image):
        good = load_reference(given, CONFIG, mask=CASES / "mask_255.png")
        turned = load_reference(given, CONFIG, mask=CASES / "mask_inverted.png")
        assert torch.equal(good.mask, right.mask) and torch.equal(turned.mask, right.mask)
        assert "inverted" not in good.statement and "the mask is white on the background, for" in turned.statement
        assert "--mask-shows" in turned.statement
    obeyed = load_reference(image, CONFIG, mask=CASES / "mask_inverted.png", mask_shows="subject")
    assert obeyed.mask.mean() > 0.3 and "by its mask, white on the subject" in obeyed.statement


def test_the_images_own_alpha_tells_what_a_mask_shows():
    image = drawn(frame, under=None)
    pixels = torch.from_numpy(np.asarray(image).astype("float32")) / 255
    for mask in (pixels[..., 3], 1 - pixels[..., 3]):
        assert prepare_reference(pixels, CONFIG, mask=mask).mask.sum() == 128**2 - 65**2


def test_an_empty_mask_beside_alpha_says_nothing():
    """Load Image's small black mask, beside an image whose alpha was kept."""
    pixels = torch.from_numpy(np.asarray(Image.open(CASES / "rgba_ok.png")).astype("float32"))[None] / 255
    found = part_of_the_pack("images").reference_of(pixels, torch.zeros(1, 64, 64), "automatic", CONFIG)
    assert found.fingerprint() == load_reference(CASES / "rgba_ok.png", CONFIG).fingerprint()


# ---- how a mask is stored ----------------------------------------------------------------------------------------


BOX = np.zeros((128, 128), bool)
BOX[30:90, 40:80] = True


def stored(name, folder):
    """A mask file of the box."""
    values, path = BOX.astype(np.uint8), folder / f"{name}.png"
    if name == "bits":
        Image.fromarray(BOX).save(path)
    elif name.startswith("label"):
        Image.fromarray(values * int(name[5:])).save(path)
    elif name == "sixteen01":
        Image.fromarray(values.astype(np.uint16)).save(path)
    elif name == "sixteen255":
        Image.fromarray(values.astype(np.uint16) * 255).save(path)
    elif name == "sixteen":
        Image.fromarray(values.astype(np.uint16) * 65535).save(path)
    elif name == "integers":
        Image.fromarray(values.astype(np.int32)).save(path := folder / "mask.tif")
    elif name == "floats255":
        Image.fromarray(values.astype(np.float32) * 255).save(path := folder / "mask.tif")
    elif name == "red":
        Image.fromarray(np.dstack((values * 255, values * 0, values * 0))).save(path)
    elif name == "dark blue":
        Image.fromarray(np.dstack((values * 0, values * 0, values * 64))).save(path)
    elif name == "grey alpha":
        Image.fromarray(np.dstack((values * 0, values * 255)), "LA").save(path)
    elif name == "alpha":
        Image.fromarray(np.dstack((noise(128, 128), values * 255))).save(path)
    elif name == "jpeg":
        Image.fromarray(values * 255).convert("RGB").save(path := folder / "mask.jpg", quality=95)
    elif name == "indexed":
        image = Image.fromarray(1 - values, "P")  # 0 is white in it
        image.putpalette([255, 255, 255, 0, 0, 0])
        image.save(path)
    elif name == "void":
        border = np.asarray(Image.fromarray(values * 255).filter(ImageFilter.MaxFilter(5))) > 0
        image = Image.fromarray(np.where(BOX, 7, np.where(border, 255, 0)).astype(np.uint8), "P")
        palette = np.zeros((256, 3), np.uint8)
        palette[7], palette[255] = (128, 128, 128), (224, 224, 192)
        palette[7] = (128, 128, 0)
        image.putpalette(palette.tobytes())
        image.save(path)
    return path


STORED = ["bits", "label1", "label2", "label100", "sixteen01", "sixteen255", "sixteen", "integers", "floats255", "red"]
STORED += ["dark blue", "grey alpha", "alpha", "jpeg", "indexed", "void"]


@pytest.mark.parametrize("name", ["mask_0_1.png", "mask_palette_voc.png", "mask_float01.tif", "mask_255.png", *STORED])
def test_masks_in_every_way_they_are_stored(name, tmp_path):
    path = CASES / name if "." in name else stored(name, tmp_path)
    Image.fromarray(noise(128, 128)).save(tmp_path / "image.png")
    found = load_reference(tmp_path / "image.png", CONFIG, mask=path)
    wanted = prepare_reference(torch.rand(128, 128, 3), CONFIG, mask=torch.from_numpy(BOX).float())
    assert torch.equal(found.mask, wanted.mask)
    told = {"mask_0_1.png": "holds 0 and 1 alone, and 1 was taken for white", "label100": "holds 0 and 100 alone"}
    told |= {
        "mask_palette_voc.png": "holds one colour, #800000, which was",
        "void": "one colour, #808000",
        "red": "#ff0000",
    }
    assert told.get(name, "") in found.statement


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            np.arange(128)[:, None] % 5,
            r"the largest value of the mask .*m\.png is 4 \(1, 2, 3 lie between\), where white",
        ),
        (
            np.arange(128)[:, None] % 3 * 20,
            r"the largest value of the mask .*m\.png is 40 \(20 lie between\), where white",
        ),
        (
            np.arange(128)[:, None].astype(np.uint16) * 100 + 300,
            r"the largest value .* is 13000 \(.*where white is 65535",
        ),
        (np.arange(128)[:, None].astype(np.float32) - 64, r"holds numbers from -64 to 63, as a model's raw answers"),
        (np.where(np.arange(128) == 5, np.nan, 0.7)[:, None].astype(np.float32), "values that are no numbers"),
        (np.arange(128)[:, None].astype(np.float32) / 300, r"the largest value .* is 0\.423333 \("),
        (np.array([0, 15, 15, 255] * 32)[:, None], r"holds 0, 15, 255 alone, which look like labels: make a mask"),
        (np.array([0, 1, 1, 200] * 32)[:, None], r"holds 0, 1, 200 alone, which look like labels: make a mask"),
        (np.zeros((128, 1), np.uint8), "no subject: its mask is empty"),
        (np.full((128, 1), 255, np.uint8), "no subject: its mask covers all of it"),
    ],
)
def test_masks_that_may_mean_more_than_one_thing(values, message, tmp_path):
    values = np.broadcast_to(values, (128, 128))
    values = values.astype(np.uint8) if values.dtype == np.int64 else values
    path = tmp_path / ("m.tif" if values.dtype == np.float32 else "m.png")
    Image.fromarray(np.ascontiguousarray(values)).save(path)
    with pytest.raises(ImageError, match=message):
        load_reference(CASES / "rgba_ok.png", CONFIG, mask=path)


def test_a_coloured_image_is_no_mask(tmp_path):
    for name in ("depth_coloured.png", "rgba_ok.png"):
        Image.open(CASES / name).convert("RGB").save(tmp_path / "m.png")
        with pytest.raises(ImageError, match=r"m\.png is a coloured image \(with #.*make a mask of the one object"):
            load_reference(CASES / "rgba_ok.png", CONFIG, mask=tmp_path / "m.png")


# ---- depth and normal maps ---------------------------------------------------------------------------------------


def sphere(size=128, radius=0.4):
    """Normals [size, size, 3] of a sphere, and its cut-out."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    inside = x**2 + y**2 < radius**2
    normals = np.stack((x, -y, np.sqrt(np.clip(radius**2 - x**2 - y**2, 0, None))), -1) / radius
    return np.where(inside[..., None], normals, [0, 0, 1]), inside


NORMALS, INSIDE = sphere()
RGBA = torch.from_numpy(np.dstack((np.random.default_rng(0).random((128, 128, 3)), INSIDE)).astype("float32"))


def with_map(**maps):
    return prepare_reference(RGBA, CONFIG, **{name: torch.from_numpy(np.asarray(m, "f4")) for name, m in maps.items()})


@pytest.mark.parametrize("name", ["depth8.png", "depth16.png"])
def test_good_depth_maps(name, tmp_path):
    found = load_reference(CASES / "rgba_ok.png", CONFIG, depth=CASES / name)
    inside = found.mask[..., 0] > 0
    assert found.depth[inside].max() - found.depth[inside].min() > 0.9
    Image.open(CASES / "depth8.png").convert("RGB").save(tmp_path / "d.jpg", quality=60)
    lossy = load_reference(CASES / "rgba_ok.png", CONFIG, depth=tmp_path / "d.jpg")
    assert (lossy.depth - found.depth)[inside].abs().mean() < 0.03
    tinted = (np.asarray(Image.open(CASES / "depth8.png").convert("RGB")) + np.array([4, 0, 2])).clip(0, 255)
    Image.fromarray(tinted.astype(np.uint8)).save(tmp_path / "tinted.png")
    load_reference(CASES / "rgba_ok.png", CONFIG, depth=tmp_path / "tinted.png")


def test_depth_in_its_own_units_keeps_its_shape():
    metres = 2 + 1.5 * NORMALS[..., 2]
    for scale, shift in ((1, 0), (1000, 0), (-1, 0), (1e-4, 0)):
        found = with_map(depth=metres * scale + shift).depth[..., 0]
        wanted = with_map(depth=NORMALS[..., 2]).depth[..., 0]
        inside = wanted > 0
        pair = torch.stack((found[inside], wanted[inside]))
        assert float(torch.corrcoef(pair)[0, 1]) == pytest.approx(math.copysign(1, scale), abs=1e-3)
        assert 0 <= found.min() and found.max() <= 1


def jet(values):
    return np.stack([np.clip(1.5 - np.abs(4 * values - centre), 0, 1) for centre in (3, 2, 1)], -1)


def heat(values):
    return np.stack([np.clip(3 * values - k, 0, 1) for k in range(3)], -1)


def bone(values):
    return np.stack((values * 0.85, values * 0.92, np.clip(values * 1.1 + 0.08, 0, 1)), -1)


@pytest.mark.parametrize("colors", [jet, heat, bone])
def test_depth_in_false_colours_is_refused(colors):
    with pytest.raises(ImageError, match=r"the depth map is coloured.*save the depth itself as a grey PNG"):
        with_map(depth=colors(NORMALS[..., 2]))
    with pytest.raises(ImageError, match=r"the normal map .*It must hold the camera's normals"):
        with_map(normals=colors(NORMALS[..., 2]))


def test_the_coloured_case_is_refused_in_both_places():
    for name in ("depth", "normals"):
        with pytest.raises(ImageError, match="coloured.*false colours|holds no unit vectors"):
            load_reference(CASES / "rgba_ok.png", CONFIG, **{name: CASES / "depth_coloured.png"})


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_depth_map_that_says_nothing_is_refused(value):
    with pytest.raises(ImageError, match="is the same everywhere on the subject"):
        with_map(depth=np.full((128, 128), value))
    with pytest.raises(ImageError, match="is the same everywhere on the subject"):
        with_map(depth=np.where(INSIDE, value, NORMALS[..., 0]))


def test_maps_that_hold_no_numbers_are_refused():
    for hole in (np.nan, np.inf):
        with pytest.raises(ImageError, match="the depth map holds values that are no numbers"):
            with_map(depth=np.where(NORMALS[..., 0] > 0.5, hole, NORMALS[..., 2]))
        with_map(depth=np.where(INSIDE, NORMALS[..., 2], hole))


def test_normal_maps_are_told_from_other_images(tmp_path):
    good = (NORMALS + 1) / 2
    found = with_map(normals=good)
    inside = found.mask[..., 0] > 0
    assert torch.allclose(found.normals[inside].norm(dim=-1), torch.ones(int(inside.sum())), atol=1e-5)
    assert "seems" not in found.statement
    Image.fromarray((good * 255).round().astype(np.uint8)).save(tmp_path / "n.jpg", quality=80)
    Image.fromarray((RGBA.numpy() * 255).astype(np.uint8)).save(tmp_path / "p.png")
    load_reference(tmp_path / "p.png", CONFIG, normals=tmp_path / "n.jpg")
    grey = np.repeat(NORMALS[..., 2:], 3, -1)
    turned, world = good * [1, 1, -1] + [0, 0, 1], good[..., [2, 0, 1]] * [-1, 1, 1] + [1, 0, 0]
    refused = {"is grey on the subject": grey, "is middle grey": np.full((128, 128, 3), 128 / 255)}
    refused |= {"points away from the camera at": turned, "holds no unit vectors": RGBA[..., :3]}
    for message, colors in refused.items():
        with pytest.raises(ImageError, match=f"the normal map {message}"):
            with_map(normals=colors)
    with pytest.raises(ImageError, match="points away"):
        with_map(normals=world)
    with pytest.raises(ImageError, match="needs 3 channels, got 1: is it a depth map"):
        load_reference(CASES / "rgba_ok.png", CONFIG, normals=CASES / "depth8.png")
    with pytest.raises(ImageError, match=r"the depth map is coloured.*a normal map \(give it as the normal map\)"):
        with_map(depth=good)


@pytest.mark.parametrize(("channel", "name"), [(0, "red seems to point left"), (1, "green seems to point down")])
def test_a_channel_that_is_turned_round_is_said(channel, name):
    normals = NORMALS.copy()
    normals[..., channel] *= -1
    assert f"the normal map's {name}" in with_map(normals=(normals + 1) / 2).statement


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exif_resunit_rational", "exif_width_rational", "exif_orientation_ascii"])
def test_malformed_exif_leaves_the_pixels_alone(name):
    found = load_reference(CASES / f"{name}.png", CONFIG)
    assert found.mask.sum() == 50 * 40


def exif_block(*entries):
    """EXIF whose entries are (tag, type, count, four bytes)."""
    rows = b"".join(struct.pack(">HHI4s", *entry) for entry in entries)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + rows + b"\0\0\0\0"


BROKEN = [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0", b"Exif\0\0" + bytes(range(200))]
BROKEN += [exif_block((0x0112, kind, 1, b"\xff\xff\xff\xff")) for kind in range(14)]
BROKEN += [exif_block((0x0112, 3, count, b"\0\x63\0\0")) for count in (0, 1, 2, 2**31)]
BROKEN += [exif_block((0x8769, 4, 1, b"\xff\xff\xff\xf0")), exif_block((0x8769, 4, 1, struct.pack(">I", 8)))]


@pytest.mark.parametrize("exif", BROKEN)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_any_exif_at_all(exif, kind, tmp_path):
    """Good pixels are read, whatever stands beside them."""
    path, mask = tmp_path / f"p.{kind.lower()}", tmp_path / "m.png"
    Image.fromarray(noise(128, 96)).save(path, kind, exif=exif)
    Image.fromarray(BOX[:, :96].astype(np.uint8) * 255).save(mask)
    assert load_reference(path, CONFIG, mask=mask).mask.sum() == BOX.sum()


def test_the_damaged_exif_of_a_photo():
    with pytest.raises(ImageError, match="no alpha and no mask was given"):
        load_reference(CASES / "exif_damaged_struct_error.jpg", CONFIG)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation, tmp_path):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    image = drawn(triangle)
    image.save(tmp_path / "p.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "p.png"))
    wanted = torch.from_numpy(np.asarray(upright).astype("float32") / 255)
    assert load_reference(tmp_path / "p.png", CONFIG).fingerprint() == prepare_reference(wanted, CONFIG).fingerprint()


def modes():
    image = drawn(middle, subject=(200, 30, 30))
    yield "rgba.png", image
    yield "grey_alpha.png", image.convert("LA")
    yield "palette.png", image.quantize(16)
    yield "lossless.webp", image
    yield "alpha.tif", image
    yield "alpha.tga", image
    yield "alpha.gif", image
    yield "alpha.jp2", image


@pytest.mark.parametrize(("name", "image"), list(modes()), ids=[name for name, _ in modes()])
def test_alpha_in_every_format(name, image, tmp_path):
    image.save(tmp_path / name, **({"lossless": True, "exact": True} if name.endswith("webp") else {}))
    found = load_reference(tmp_path / name, CONFIG)
    assert found.mask.sum() == (np.asarray(drawn(middle))[..., 3] > 127).sum()
    red, blue = (float(found.rgb[..., c][found.mask[..., 0] > 0].mean()) for c in (0, 2))
    assert (abs(red - blue) < 0.01) if "grey" in name else (red > 0.7 and blue < 0.2)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "I;16", "I", "F", "LAB"])
def test_every_mode_of_opaque_images(mode, tmp_path):
    grey = Image.fromarray(np.tile(np.arange(128, dtype=np.uint8) * 2, (128, 1)))
    path = tmp_path / "p.tif" if mode in ("CMYK", "YCbCr", "F", "I", "LAB") else tmp_path / "p.png"
    image = (
        grey.convert("RGB").convert(mode)
        if mode in ("CMYK", "YCbCr")
        else grey.convert("I")
        if mode[0] == "I"
        else grey
    )
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "LAB":
        image = Image.merge("LAB", (grey, Image.new("L", (128, 128), 128), Image.new("L", (128, 128), 128)))
    elif mode not in ("I", "CMYK", "YCbCr"):
        image = grey.convert(mode)
    image.save(path)
    found = load_reference(path, CONFIG, mask=CASES / "mask_255.png")
    inside = found.rgb[found.mask[..., 0] > 0]
    assert inside.shape == (BOX.sum(), 3) and 0.4 < inside.mean() < 0.55 and (mode == "1" or inside.std() < 0.2)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_a_moving_image_the_first_frame_is_taken(kind, tmp_path):
    frames = [drawn(middle, subject=(200, 30, 30)), drawn(middle, subject=(30, 30, 200))]
    path = tmp_path / f"p.{kind.lower()}"
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], duration=100)
    found = load_reference(path, CONFIG)
    assert found.rgb[..., 0][found.mask[..., 0] > 0].mean() > 0.7 and "the first one was taken" in found.statement


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "it is a Git LFS pointer"),
        ("p.png", b"<!DOCTYPE html><html>", "it is a web page"),
        ("p.png", b"", "it is empty"),
        ("p.png", b'<?xml version="1.0"?><svg width="3">', "it is a drawing"),
        ("p.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is an HEIC file"),
        (
            "p.eps",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "it is damaged or none of the formats that are read",
        ),
    ],
)
def test_files_that_are_no_images(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=f"the image .*{name} could not be read as an image: {message}"):
        load_reference(tmp_path / name, CONFIG)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "p\udcff.png", "a\nb.png"])
def test_names_that_no_file_has(name, tmp_path):
    with pytest.raises(ImageError) as refused:
        load_reference(tmp_path / name, CONFIG)
    assert str(refused.value).isprintable() and str(refused.value).startswith("the image ")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "AVIF", "JPEG2000"])
def test_cut_off_files(kind, tmp_path):
    path = tmp_path / "p"
    try:
        Image.fromarray(noise(64, 64)).save(path, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    whole = path.read_bytes()
    for share in (0.02, 0.3, 0.7):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ImageError, match="could not be read as an image|no alpha and no mask"):
            load_reference(path, CONFIG)


# ---- large images ----------------------------------------------------------------------------------------------


def test_a_large_image_is_reduced_as_by_averaging(tmp_path):
    """2,600 pixels become 1,024 through a reduction to a half: the subject's mean colours and its edges stay."""
    side = 2600
    y, x = np.mgrid[:side, :side]
    inside = (y - side / 2) ** 2 + (x - side / 2) ** 2 < (side * 0.4) ** 2
    colors = np.stack((x * 255 // side, y * 255 // side, np.full_like(x, 90)), -1)
    Image.fromarray(np.dstack((colors * inside[..., None], inside * 255)).astype(np.uint8)).save(tmp_path / "p.png")
    found = load_reference(tmp_path / "p.png", CONFIG)
    assert found.mask.shape == (1024, 1024, 1) and found.mask.unique().tolist() == [0, 1]
    assert found.mask.mean() == pytest.approx(math.pi * 0.4**2, abs=2e-3)
    rows, columns = found.mask[..., 0].nonzero().unbind(-1)
    wanted = torch.stack((columns / 1024, rows / 1024, torch.full(rows.shape, 90 / 255)), -1)
    assert (found.rgb[rows, columns] - wanted).abs().max() < 0.006, "nothing bleeds in from outside"


MEASURE = """
import ctypes, json, re, sys, time
if sys.argv[3] == "small pages":  # huge ones count whole, and come as the kernel sees fit (0.80 to 1.1 GiB)
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
from pathlib import Path
from PIL import Image
Image.init()
from dream4d_engine.training.config import ReferenceConfig
from dream4d_engine.training.reference import load_reference
began = time.process_time()
found = load_reference(sys.argv[1], ReferenceConfig(), mask=sys.argv[2] or None)
seconds = time.process_time() - began
# not ru_maxrss: it begins with what the process that started this one held
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps([peak / 2**20, seconds, list(found.rgb.shape)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what a process held at most is read from Linux' /proc")
@pytest.mark.parametrize("kind", ["alpha", "small", "photo"])
def test_sixty_four_megapixels_fit_into_a_gigabyte(kind, tmp_path):
    side, path, mask = 8192, tmp_path / ("p.jpg" if kind == "photo" else "p.png"), ""
    alpha = Image.new("L", (side, side))
    box = (5000, 3000, 5400, 3300) if kind == "small" else (400, 400, 7800, 7800)
    ImageDraw.Draw(alpha).ellipse(box, fill=255)
    image = Image.fromarray(noise(128, 128)).resize((side, side), Image.Resampling.BILINEAR)
    if kind == "photo":
        mask = str(tmp_path / "m.png")
        alpha.save(mask)
        exif = Image.Exif()
        exif[0x0112] = 3
        image.save(path, exif=exif)
    else:
        image.putalpha(alpha)
        image.save(path, compress_level=1)

    def measured(pages):
        words = [sys.executable, "-c", MEASURE, str(path), mask, pages]
        return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    gigabytes, (_, seconds, shape) = measured("small pages")[0], measured("as usual")
    if gigabytes >= 1:  # 0.84 as a rule, and sometimes more: a system that is busy frees later
        gigabytes = min(gigabytes, measured("small pages")[0])
    assert shape == ([502, 502, 3] if kind == "small" else [1024, 1024, 3]), "a small subject keeps its pixels"
    assert gigabytes < 1 and seconds < 10


def test_images_that_are_too_large_are_refused_unread(tmp_path):
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 6, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", b""))
    chunks = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts)
    (tmp_path / "p.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with pytest.raises(ImageError, match="more than 67108864.*make it smaller"):
        load_reference(tmp_path / "p.png", CONFIG)
    Image.new("1", (70000, 2)).save(tmp_path / "p.png")
    with pytest.raises(ImageError, match="has 70000x2 pixels, more than 65536 on one side: cut it"):
        load_reference(tmp_path / "p.png", CONFIG)
    Image.new("1", (8200, 8200)).save(tmp_path / "p.png")
    with pytest.raises(ImageError, match="has 8200x8200 pixels, more than 67108864: make it smaller"):
        load_reference(tmp_path / "p.png", CONFIG)
