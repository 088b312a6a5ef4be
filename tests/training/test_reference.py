"""The image that a scene is made from: what is read, what is refused, what the reference pass pulls at."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from dream4d_engine.cameras import make_cameras
from dream4d_engine.randomness import Draw
from dream4d_engine.rendering import RenderOptions, render, render_chunked, render_view
from dream4d_engine.scene import build_scene
from dream4d_engine.supervision import PhotometricWeights, photometric
from dream4d_engine.toyworld.evaluate import reference_match
from dream4d_engine.toyworld.world import render_caption
from dream4d_engine.training.config import (
    IMAGE_RECIPES,
    IMAGE_TO_3D,
    IMAGE_TO_3D_ORBIT,
    ORBIT_RECIPES,
    TEXT_TO_3D,
    TOY_IMAGE,
    TOY_STATIC,
    ReferenceConfig,
    ReferencePhase,
    with_view_limit,
)
from dream4d_engine.training.loop import RunControl
from dream4d_engine.training.reference import (
    ImageError,
    check_reference,
    load_reference,
    prepare_reference,
    reference_cameras,
    reference_targets,
)
from dream4d_engine.training.stages import current_phase
from dream4d_engine.training.static import train_static
from dream4d_engine.training.validate import check_recipe

CPU = torch.device("cpu")
FIXED = ReferenceConfig(fill=(0.5, 0.5))


RAMP = torch.linspace(0, 1, 60).expand(40, 60)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def block(height=40, width=60, top=5, left=20, rows=10, columns=16):
    """An image [H, W, 4] that is transparent but for a block, red on its left half and blue on its right."""
    image = torch.zeros(height, width, 4)
    image[top : top + rows, left : left + columns, 3] = 1
    image[..., 0], image[..., 2] = 1.0, 0.0
    image[:, left + columns // 2 :, 0], image[:, left + columns // 2 :, 2] = 0.0, 1.0
    return image


def extent(mask):
    rows, columns = mask[..., 0].any(1).nonzero(), mask[..., 0].any(0).nonzero()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


# ---- the recipe --------------------------------------------------------------------------------------------------


def test_the_image_recipe_has_the_published_numbers():
    novel_view, pixel = (term.distillation for term in IMAGE_TO_3D.guidance)
    assert [(t.prior, t.weight) for t in IMAGE_TO_3D.guidance] == [("novel_view", 0.1), ("pixel", 0.1)]
    assert IMAGE_TO_3D.steps == 2000
    assert (novel_view.guidance_scale, pixel.guidance_scale) == (3.0, 21.0), "20 in the form text + s (text - negative)"
    assert [novel_view.min_noise(s / 2000) for s in (0, 100, 200, 1999)] == pytest.approx([0.4, 0.3, 0.2, 0.2])
    assert [novel_view.max_noise(s / 2000) for s in (0, 200)] == [0.85, 0.5]
    assert (pixel.min_noise(0), pixel.max_noise(0.5)) == (0.02, 0.5)
    phases = [current_phase(IMAGE_TO_3D.phases, s / 2000) for s in (0, 199, 200, 299, 300)]
    assert [(p.n_groups, p.height) for p in phases] == [(12, 64), (12, 64), (4, 128), (4, 128), (2, 256)]
    reference = IMAGE_TO_3D.reference
    sizes = [current_phase(reference.phases, s / 2000).size for s in (0, 199, 200, 299, 300)]
    assert sizes == [128, 128, 256, 256, 512]
    assert (reference.rgb, reference.mask, reference.ray_jitter) == (500.0, 50.0, 2e-3)
    assert (reference.azimuth_deg, reference.elevation_deg, reference.distance, reference.fov_y_deg) == (0, 0, 3.8, 20)
    assert (reference.depth, reference.relative_depth, reference.normal) == (0.0, 0.0, 0.0)
    assert (IMAGE_TO_3D.regularizers.opacity, IMAGE_TO_3D.regularizers.entropy) == (0.1, 0.1)
    cameras = IMAGE_TO_3D.cameras
    assert (cameras.azimuth_deg, cameras.elevation_deg) == ((-180, 180), (-10, 80))
    assert (cameras.distance, cameras.fov_y_deg, cameras.relative_distance) == ((3.8, 3.8), (20, 20), False)
    optimizer = IMAGE_TO_3D.optimizer
    assert (optimizer.name, optimizer.betas, optimizer.eps) == ("adam", (0.9, 0.99), 1e-8)
    assert optimizer.lr_grid == optimizer.lr_mlp == optimizer.lr_background == 0.01
    assert IMAGE_TO_3D.scene.background.color == (1, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phases": ()}, r"recipe\.reference\.phases must have one that starts at 0"),
        ({"phases": (ReferencePhase(0.0, 0),)}, r"reference\.phases\.0\.size must be at least 1, got 0"),
        ({"fill": (0.9, 0.5)}, r"reference\.fill must keep to"),
        ({"fov_y_deg": 180.0}, r"reference\.fov_y_deg must lie in \(0, 180\), got 180"),
        ({"elevation_deg": 91.0}, r"reference\.elevation_deg"),
        ({"distance": 0.0}, r"reference\.distance must be above 0"),
        ({"rgb": -1.0}, r"reference\.rgb must be at least 0, got -1"),
        ({"mask": float("nan")}, r"reference\.mask must be a finite number"),
    ],
)
def test_numbers_that_no_image_can_be_looked_at_with(change, message):
    for recipe in (IMAGE_RECIPES | ORBIT_RECIPES).values():
        check_recipe(recipe)
    with pytest.raises(ValueError, match=message):
        check_recipe(replace(TOY_IMAGE, reference=replace(TOY_IMAGE.reference, **change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": None}, r"recipe\.orbit ends where an image was seen from"),
        ({"n_views": 1}, r"recipe\.n_views must be at least 2, got 1"),
        ({"reference": replace(IMAGE_TO_3D_ORBIT.reference, elevation_deg=70.0)}, r"from -10 to 60, .*, got 70"),
        (
            {
                "reference": replace(IMAGE_TO_3D_ORBIT.reference, elevation_deg=90.0),
                "cameras": replace(IMAGE_TO_3D_ORBIT.cameras, elevation_deg=(0.0, 90.0)),
            },
            "and below 90, got 90",
        ),
    ],
)
def test_orbits_that_can_not_be_made(change, message):
    with pytest.raises(ValueError, match=message):
        check_recipe(replace(IMAGE_TO_3D_ORBIT, **change))


def test_the_recipe_for_orbits_shows_the_subject_at_the_same_size():
    """Only where it is seen from is another: 33.8 degrees are the view of SV3D's training (2403.12008, section 3)."""
    usual, orbit = (
        r.distance * math.tan(math.radians(r.fov_y_deg) / 2)
        for r in (IMAGE_TO_3D.reference, IMAGE_TO_3D_ORBIT.reference)
    )
    assert orbit == pytest.approx(usual, rel=0.005)
    drawn = IMAGE_TO_3D_ORBIT.sample_cameras(IMAGE_TO_3D_ORBIT.phases[0], torch.Generator().manual_seed(0))
    ends = reference_cameras(IMAGE_TO_3D_ORBIT.reference)
    assert drawn.shape == (1, 21) and torch.allclose(drawn.c2w[:, -1:], ends.c2w, atol=1e-5)
    assert torch.allclose(drawn.fov_y, ends.fov_y.expand(1, 21))


def test_the_view_limit_is_the_image_priors_alone():
    limited = with_view_limit(TEXT_TO_3D, 145.0)
    assert [t.distillation.max_azimuth_deg for t in limited.guidance] == [180.0, 145.0]
    check_recipe(limited)
    with pytest.raises(ValueError, match=r"guidance\.1\.distillation\.max_azimuth_deg must lie in \(0, 180\], got 0"):
        check_recipe(with_view_limit(TEXT_TO_3D, 0.0))
    with pytest.raises(ValueError, match="'toy' has no image prior"):
        with_view_limit(TOY_STATIC, 145.0)


# ---- preparing ---------------------------------------------------------------------------------------------------


def test_the_subject_is_centred_and_brought_to_size():
    found = prepare_reference(block(), FIXED)
    assert found.rgb.shape == (32, 32, 3) and found.mask.shape == (32, 32, 1)
    assert extent(found.mask) == (11, 21, 8, 24), "16 of 32 pixels, in the middle"
    assert found.mask.unique().tolist() == [0, 1]
    assert found.rgb[16, 9].tolist() == [1, 0, 0] and found.rgb[16, 22].tolist() == [0, 0, 1]
    assert torch.equal(found.over()[0, 0], torch.ones(3))
    assert "16x10 of 60x40 pixels, by its alpha" in found.statement
    assert "enlarged to 50% of the frame (32x32)" in found.statement


def test_a_subject_of_a_size_that_will_do_keeps_its_pixels():
    found = prepare_reference(block(), replace(FIXED, fill=(0.2, 0.5)))
    assert found.rgb.shape == (60, 60, 3) and "kept at 27%" in found.statement
    assert extent(found.mask) == (25, 35, 22, 38)


def test_a_large_subject_gets_a_margin_and_is_told_where_it_is_cut_off():
    found = prepare_reference(block(40, 40, 0, 0, 40, 30), FIXED)
    assert found.rgb.shape == (80, 80, 3)
    assert extent(found.mask) == (20, 60, 25, 55)
    assert "shrunk to 50%" in found.statement and "touches the image's edge" in found.statement


def test_comfyui_tensors_and_a_separate_mask():
    image = block()
    mask = image[..., 3]
    one = prepare_reference(image[None, ..., :3], FIXED, mask=mask[None])
    other = prepare_reference(image, FIXED)
    assert torch.equal(one.mask, other.mask) and torch.equal(one.over(), other.over())
    assert one.fingerprint() == other.fingerprint()
    assert "by its mask" in one.statement
    changed = image.clone()
    changed[6, 21, 1] = 0.5
    assert prepare_reference(changed, FIXED).fingerprint() != other.fingerprint()
    hidden = image.clone()
    hidden[0, 0, 1] = 0.5
    assert prepare_reference(hidden, FIXED).fingerprint() == other.fingerprint(), "what the mask hides says nothing"


def test_very_large_images_are_reduced():
    image = torch.zeros(1500, 1500, 4)
    image[100:1400, 100:1400] = 1
    found = prepare_reference(image, FIXED)
    assert found.mask.shape == (1024, 1024, 1) and found.mask.unique().tolist() == [0, 1]
    assert found.mask.mean() == pytest.approx(0.25, abs=0.01)


def test_depth_and_normals_follow_the_image():
    image = block()
    ramp = torch.linspace(0, 1, 60).expand(40, 60)
    toward = torch.tensor([0.5, 0.5, 1.0]).expand(40, 60, 3)
    found = prepare_reference(image, FIXED, depth=ramp, normals=toward)
    assert found.depth[16, 9] > found.depth[16, 22], "bright is near"
    dark = prepare_reference(image, replace(FIXED, depth_near="dark"), depth=ramp)
    assert torch.allclose(dark.depth[11:21, 8:24], 1 - found.depth[11:21, 8:24])
    view = reference_targets(found, FIXED, 64)
    inside = view.mask[0, 0, ..., 0] > 0.99
    front = torch.tensor([1.0, 0.0, 0.0])
    assert torch.allclose(view.normals[0, 0][inside], front.expand(int(inside.sum()), 3), atol=1e-5), "front is +x"


def test_resizing_bleeds_nothing_into_the_subject():
    image = block()
    image[..., :3][image[..., 3] == 0] = torch.tensor([0.0, 1.0, 0.0])
    view = reference_targets(prepare_reference(image, FIXED), FIXED, 12)
    covered = view.mask[0, 0, ..., 0] > 0.05
    assert view.rgb[0, 0][covered][:, 1].max() < 1e-5
    assert 0.05 < view.mask[view.mask > 0.05].min() < 0.9, "edges are covered in part"


# ---- bad images ------------------------------------------------------------------------------------------------


def empty():
    image = block()
    image[..., 3] = 0
    return image


@pytest.mark.parametrize(
    ("image", "more", "message"),
    [
        (empty(), {}, "no subject: its alpha is empty"),
        (torch.ones(20, 20, 4), {}, "no subject: its alpha covers all of it"),
        (torch.ones(20, 20, 3), {"mask": torch.ones(20, 20)}, "no subject: its mask covers all of it"),
        (torch.ones(20, 20, 3), {"mask": torch.zeros(1, 20, 20)}, "no subject: its mask is empty"),
        (torch.ones(20, 20, 3), {}, "no alpha and no mask was given: cut the subject out"),
        (block(), {"mask": torch.ones(40, 61)}, "the mask has 61x40 pixels, the image 60x40"),
        (block(), {"depth": torch.ones(20, 60)}, "the depth map has 60x20 pixels, the image 60x40"),
        (block(), {"normals": torch.ones(1, 80, 120, 3)}, "the normal map has 120x80 pixels, the image 60x40"),
        (block(), {"normals": torch.ones(40, 60, 1)}, "the normal map needs 3 channels, got 1"),
        (torch.ones(2, 20, 20, 3), {}, "one image is needed, got 2"),
        (torch.ones(20, 20), {}, r"the image must be \[H, W, 3 or 4\], got \[20, 20\]"),
        (block(rows=2, columns=3), {}, "the subject is only 3 pixels large"),
    ],
)
def test_images_that_are_refused(image, more, message):
    with pytest.raises(ImageError, match=message):
        prepare_reference(image, FIXED, **more)


def save(path, pixels):
    Image.fromarray((pixels.numpy() * 255).round().astype(np.uint8)).save(path)
    return path


def test_files_of_all_kinds(tmp_path):
    image = save(tmp_path / "p.png", block())
    found = load_reference(image, FIXED)
    flat = save(tmp_path / "flat.png", block()[..., :3])
    mask = save(tmp_path / "mask.png", block()[..., 3])
    cutout = save(tmp_path / "cutout.png", block())
    for by in (mask, cutout):
        assert load_reference(flat, FIXED, mask=by).fingerprint() == found.fingerprint()
    ramp = (torch.linspace(0, 1, 60).expand(40, 60) * 65535).round().numpy().astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "depth.png")
    depth = load_reference(image, FIXED, depth=tmp_path / "depth.png").depth
    eight = load_reference(image, FIXED, depth=save(tmp_path / "d8.png", torch.linspace(0, 1, 60).expand(40, 60)))
    assert torch.allclose(depth, eight.depth, atol=3e-3)
    palette = Image.open(image).quantize(8)
    palette.save(tmp_path / "palette.png")
    assert torch.equal(load_reference(tmp_path / "palette.png", FIXED).mask, found.mask)


@pytest.mark.parametrize("damage", ["missing", "folder", "text", "truncated"])
def test_files_that_cannot_be_read(tmp_path, damage):
    path = tmp_path / "image.png"
    if damage == "folder":
        path.mkdir()
    elif damage == "text":
        path.write_text("no image")
    elif damage == "truncated":
        save(path, torch.rand(64, 64, 4))
        path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ImageError, match=r"image\.png (does not exist|is a folder|could not be read as an image)"):
        load_reference(path, FIXED)


def test_maps_and_weights_go_together():
    plain, with_depth = (prepare_reference(block(), FIXED, depth=d) for d in (None, RAMP))
    weighed = replace(TOY_IMAGE, reference=replace(TOY_IMAGE.reference, relative_depth=1.0))
    check_reference(weighed, with_depth)
    check_reference(TOY_IMAGE, plain)
    with pytest.raises(ImageError, match="weighs a depth map, but none was given"):
        check_reference(weighed, plain)
    with pytest.raises(ImageError, match="a depth map was given, but its weight is 0"):
        check_reference(TOY_IMAGE, with_depth)
    with pytest.raises(ImageError, match="'toy' looks at no image"):
        check_reference(TOY_STATIC, plain)
    with pytest.raises(ImageError, match="makes a scene from an image: give one"):
        check_reference(TOY_IMAGE, None)


# ---- the reference pass ------------------------------------------------------------------------------------------


def toy_image(caption, size=64):
    cameras = make_cameras(0.0, 0.0, 3.0, math.radians(40), 0.0, size, size)
    image = render_caption(caption, cameras, 4)
    return torch.cat((image.rgb, image.mask), -1)[0, 0]


def alone(steps=60):
    """The toy recipe without priors: what the image alone says."""
    return replace(TOY_IMAGE, steps=steps, guidance=())


def test_the_image_alone_is_reproduced_from_its_own_view():
    recipe = alone()
    reference = prepare_reference(toy_image("an orange cone"), recipe.reference)
    scene, _ = train_static(recipe, {}, seed=0, device=CPU, control=RunControl(), reference=reference)
    psnr, iou = reference_match(scene, reference, recipe.reference)
    assert psnr > 22 and iou > 0.9
    above = make_cameras(0.0, 1.4, 3.0, math.radians(40), 0.0, 32, 32)
    white = RenderOptions(background=torch.ones(3))
    front, top = (render_chunked(scene, c, white).rgb for c in (reference_cameras(recipe.reference, 32), above))
    assert (front - top).abs().mean() > 0.05, "which says nothing of the others"


def facing(size):
    """Colours [size, size, 3] of random normals that look towards the camera."""
    normals = torch.randn(size, size, 3, generator=seeded(1))
    normals[..., 2] = normals[..., 2].abs() + 0.1
    return (torch.nn.functional.normalize(normals, dim=-1) + 1) / 2


def loss_of(scene, targets, config, seed=0):
    weights = PhotometricWeights(*(getattr(config, f.name) for f in fields(PhotometricWeights)))
    one, draw = photometric("reference", lambda scene, progress: targets, weights, config.ray_jitter), Draw(seed)
    view = one.view(scene, 0.0, draw)
    losses = one.loss(scene, render_view(scene, view), view, 0.0, draw).losses
    return sum(losses.values()), losses


@pytest.mark.parametrize("term", ["rgb", "mask", "depth", "relative_depth", "normal", "entropy"])
def test_every_term_pulls_at_the_scene(term):
    config = replace(replace(TOY_IMAGE.reference, rgb=0.0, mask=0.0, ray_jitter=0.0), **{term: 2.0})
    scene = build_scene(TOY_IMAGE.scene, seeded())
    size = 16
    maps = {"depth": torch.rand(64, 64, generator=seeded()), "normals": facing(64)}
    reference = prepare_reference(toy_image("a red sphere"), config, **maps)
    view = reference_targets(reference, config, size)
    loss, terms = loss_of(scene, view, config)
    assert set(terms) == {f"reference.{term}"} and loss.item() == pytest.approx(terms[f"reference.{term}"].item())
    halved, _ = loss_of(scene, view, replace(config, **{term: 1.0}))
    assert loss.item() == pytest.approx(2 * halved.item(), rel=1e-5)
    loss.backward()
    gradients = [p.grad.abs().sum() for p in scene.canonical.parameters() if p.grad is not None]
    assert sum(gradients) > 0 and all(g.isfinite() for g in gradients)


def test_the_weighted_errors_are_those_of_the_formulas():
    config = replace(TOY_IMAGE.reference, ray_jitter=0.0, rgb=500.0, mask=50.0)
    scene = build_scene(TOY_IMAGE.scene, seeded())
    reference = prepare_reference(toy_image("a red sphere"), config)
    view = reference_targets(reference, config, 16)
    loss, _ = loss_of(scene, view, config, seed=5)
    rays = Draw(5).for_("reference rays")
    output = render(scene, view.cameras, RenderOptions(stratified=True), rays)
    wanted = view.rgb * view.mask + (1 - view.mask)  # the recipe's background is white
    expected = 500 * (output.rgb - wanted).square().mean() + 50 * (output.opacity - view.mask).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
