"""The toy world against closed forms, its evaluation against known faults, the ideal denoiser against brute force."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from dream4d_engine.cameras import fixed_take, make_cameras, orbit
from dream4d_engine.guidance.denoiser import Conditions
from dream4d_engine.rays import rays_from_cameras
from dream4d_engine.surface import SurfaceMotion, follow_surface
from dream4d_engine.toyworld.captions import COLORS, MOTIONS, SHAPES, Caption, all_captions, parse_caption, vocabulary
from dream4d_engine.toyworld.evaluate import (
    Images,
    best_scale,
    correlation,
    evaluate,
    evaluate_scene,
    find_faces,
    nearest_color,
    surface_errors,
    true_renderer,
)
from dream4d_engine.toyworld.ideal import IdealDenoiser
from dream4d_engine.toyworld.motions import SPIN_DEG, world_from_canonical
from dream4d_engine.toyworld.shapes import MARK_COLOR, SHAPE_MODELS, SNOWMAN_NECK, is_marked, paint, surface_normals
from dream4d_engine.toyworld.world import render_caption, render_captions


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def surface_points(name: str, n: int = 2000) -> torch.Tensor:
    """Points on a shape, by walking random points down its distance."""
    shape = SHAPE_MODELS[name]
    points = 2 * torch.rand(n, 3, generator=generator()) - 1
    for _ in range(20):
        points = points - surface_normals(shape, points) * shape.distance(points)[:, None]
    return points[shape.distance(points).abs() < 1e-3]


# --- captions


def test_captions_round_trip():
    captions = all_captions()
    assert len(captions) == len(set(captions)) == 8 * 6 * 6
    assert all(parse_caption(caption.text) == caption for caption in captions)
    assert all(parse_caption(c.object_text) == c for c in all_captions(("still",)))
    words = set(" ".join(caption.text for caption in captions).split())
    assert words <= set(vocabulary()) and len(set(vocabulary())) == len(vocabulary())


@pytest.mark.parametrize(
    "text",
    [
        "a red cube is jumping",
        "A Red Cube is jumping.",
        "the red cube is jumping",
        "  red  cube is jumping ",
        "a red cube is jumping, front view",
        "a red cube is jumping, overhead view.",
        "an red cube is jumping.",
    ],
)
def test_parse_accepts_variants(text):
    assert parse_caption(text) == Caption("red", "cube", "jumping")


@pytest.mark.parametrize(
    "text", ["", "a cube", "a crimson cube", "a red dog", "a red cube is flying", "red cube jumping"]
)
def test_parse_errors_name_the_known_words(text):
    with pytest.raises(ValueError) as error:
        parse_caption(text)
    assert "\n" not in str(error.value)
    known = {"a crimson cube": COLORS, "a red dog": SHAPES, "a red cube is flying": MOTIONS}
    assert all(word in str(error.value) for word in known.get(text, (*COLORS, *SHAPES, *MOTIONS)))


def test_articles_follow_the_colour():
    assert Caption("orange", "cone").object_text == "an orange cone"
    assert Caption("red", "cone", "spinning").text == "a red cone is spinning"


# --- shapes


@pytest.mark.parametrize("name", SHAPES)
def test_distances_are_exact_outside(name):
    shape = SHAPE_MODELS[name]
    points = (2 * torch.rand(500, 3, generator=generator()) - 1).requires_grad_()
    distance = shape.distance(points)
    (gradient,) = torch.autograd.grad(distance.sum(), points)
    outside = distance > 1e-3
    assert torch.allclose(gradient[outside].norm(dim=-1), torch.ones(int(outside.sum())), atol=1e-4)
    # the distance to a cloud of surface points can only be a little larger
    cloud = surface_points(name, 4000)
    nearest = torch.cdist(points[outside][:100], cloud).amin(1)
    assert (nearest - distance[outside][:100] > -2e-3).all() and (nearest - distance[outside][:100]).mean() < 0.02


@pytest.mark.parametrize("name", SHAPES)
def test_bounds_marks_and_bottoms_fit_the_shape(name):
    shape, points = SHAPE_MODELS[name], surface_points(name)
    assert points.norm(dim=-1).max() <= shape.bound + 1e-3
    assert float(points[:, 2].min()) == pytest.approx(shape.z_bottom, abs=0.02)
    assert abs(float(shape.distance(torch.tensor(shape.mark)))) < 1e-3
    marked = points[is_marked(shape, points)]
    assert len(marked) and (marked[:, 0] > 0).all()


@pytest.mark.parametrize("name", SHAPES)
def test_paint_is_dark_on_the_mark_and_shaded_elsewhere(name):
    shape, points = SHAPE_MODELS[name], surface_points(name)
    colors = paint(shape, points, torch.ones_like(points))
    dark = is_marked(shape, points)
    assert torch.allclose(colors[dark], torch.tensor(MARK_COLOR).expand(int(dark.sum()), 3))
    assert 0.7 <= colors[~dark].min() < 0.75 and 0.95 < colors[~dark].max() <= 1.0 + 1e-6


# --- motions


@pytest.mark.parametrize("name", SHAPES)
def test_motions_start_at_rest_keep_volume_and_stay_in_the_box(name):
    points = surface_points(name, 1000)
    homogeneous = torch.cat((points, torch.ones(len(points), 1)), -1)
    shape = torch.tensor(SHAPES.index(name)).expand(17)
    time = torch.linspace(0, 1, 17)
    for i, motion in enumerate(MOTIONS):
        affine = world_from_canonical(torch.full((17,), i), shape, time)
        assert torch.allclose(affine[[0, -1]], torch.eye(4).expand(2, 4, 4), atol=1e-5)
        assert torch.allclose(torch.linalg.det(affine), torch.ones(17), atol=1e-5)
        moved = homogeneous @ affine.mT
        assert moved[..., :3].abs().max() <= 1.0
        furthest = (moved[8 if motion == "jumping" else 4] - homogeneous).abs().max()
        assert furthest == 0 if motion == "still" else furthest > 0.15
        if motion == "still":
            assert torch.equal(affine, torch.eye(4).expand(17, 4, 4))


def test_swaying_holds_the_bottom_and_spinning_turns_left_first():
    cone, quarter = torch.tensor([SHAPES.index("cone")]), torch.tensor([0.25])
    sway = world_from_canonical(torch.tensor([MOTIONS.index("swaying")]), cone, quarter)[0]
    foot = torch.tensor([0.2, 0.1, SHAPE_MODELS["cone"].z_bottom, 1.0])
    assert torch.allclose(sway @ foot, foot, atol=1e-6)
    spin = world_from_canonical(torch.tensor([MOTIONS.index("spinning")]), cone, quarter)[0]
    face = spin @ torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert math.degrees(math.atan2(face[1], face[0])) == pytest.approx(SPIN_DEG, abs=1e-3)


# --- images


def ellipsoid_depth(cameras, center: torch.Tensor, radii: torch.Tensor) -> torch.Tensor:
    """Closed form: distances of the first hits with an ellipsoid, infinity where there is none."""
    rays = rays_from_cameras(cameras)
    origins, directions = (rays.origins - center) / radii, rays.directions / radii
    a, b, c = (directions**2).sum(-1), (origins * directions).sum(-1), (origins**2).sum(-1) - 1
    inner = b**2 - a * c
    return torch.where(inner > 0, (-b - inner.clamp(min=0).sqrt()) / a, torch.inf).reshape(rays.shape)


@pytest.mark.parametrize("motion", ["still", "jumping", "sliding", "stretching", "spinning"])
def test_spheres_have_the_depth_and_silhouette_of_the_closed_form(motion):
    time, stretch = 0.2, 1 + 0.4 * math.sin(0.4 * math.pi)
    cameras = orbit(5, 40, 33, elevation_deg=25.0, time=time)
    image = render_caption(f"a blue sphere is {motion}", cameras, supersample=1)
    wide = stretch**-0.5 if motion == "stretching" else 1.0
    tall = stretch if motion == "stretching" else 1.0
    center = torch.tensor(
        [
            0.0,
            0.3 * math.sin(0.4 * math.pi) if motion == "sliding" else 0.0,
            0.35 * math.sin(0.2 * math.pi) if motion == "jumping" else 0.0,
        ]
    )
    truth = ellipsoid_depth(cameras, center, 0.56 * torch.tensor([wide, wide, tall]))
    seen = image.mask[..., 0] > 0
    assert (seen != truth.isfinite()).float().mean() < 1e-3
    both = seen & truth.isfinite()
    error = (image.depth[..., 0] - truth)[both].abs()
    assert error.median() < 1e-3 and error.max() < 0.03  # the largest where a ray grazes


def test_cube_depth_at_the_middle_and_its_slide_in_the_image():
    image = render_caption("a red cube", fixed_take(1, 33, 33, elevation_deg=0.0), supersample=1)
    assert float(image.depth[0, 0, 16, 16, 0]) == pytest.approx(3 - 0.45, abs=1e-3)
    # +y is to the right in the image of the front camera
    slid = render_caption("a red cube is sliding", fixed_take(5, 33, 33, elevation_deg=0.0)).mask[0, ..., 0]
    columns = torch.arange(33.0)
    middle = (slid.sum(1) * columns).sum(-1) / slid.sum((1, 2))
    assert middle[1] > middle[0] + 3 and middle[3] < middle[0] - 3
    assert middle[2] == pytest.approx(float(middle[0]), abs=0.1)


@pytest.mark.parametrize("name", SHAPES)
def test_the_mark_is_clear_in_front_and_absent_behind(name):
    cameras = orbit(8, 32, 32, elevation_deg=15.0)
    image = render_caption(f"a yellow {name}", cameras)
    dark = ((image.rgb.amax(-1) < 0.3) & (image.mask[..., 0] > 0.5)).sum((-1, -2))[0]
    assert dark[0] >= 16 and (dark[[1, 7]] >= 9).all() and (dark[3:6] == 0).all()
    two_faced = render_caption(f"a yellow {name}", cameras, mark_azimuths_deg=(0.0, 180.0))
    assert ((two_faced.rgb.amax(-1) < 0.3) & (two_faced.mask[..., 0] > 0.5)).sum((-1, -2))[0, 4] >= 16


@pytest.mark.parametrize("name", SHAPES)
def test_objects_fill_about_half_the_image_and_stay_inside(name):
    mask = render_caption(f"a red {name}", orbit(8, 32, 32)).mask[0, ..., 0]
    rows, columns = mask.amax(2) > 0.5, mask.amax(1) > 0.5
    assert (rows.sum(1) >= 14).all() and (rows.sum(1) <= 22).all() and (columns.sum(1) <= 22).all()
    for motion in MOTIONS[1:]:
        moving = render_caption(f"a red {name} is {motion}", fixed_take(9, 32, 32)).mask[0, ..., 0]
        assert moving[:, [0, -1]].max() == 0 and moving[:, :, [0, -1]].max() == 0


def test_a_batch_of_captions_equals_each_alone_whatever_the_chunks():
    captions = ["a red cube is jumping", "a white torus is spinning", "a cyan snowman", "a red cube is swaying"]
    cameras = make_cameras(torch.linspace(0, 5, 8).reshape(4, 2), 0.2, 3.0, 0.7, torch.tensor([[0.3, 0.8]]), 16, 20)
    together = render_captions(captions, cameras, chunk_rays=3000)
    for i, caption in enumerate(captions):
        one = replace(
            cameras, **{f: getattr(cameras, f)[i : i + 1] for f in "c2w fov_y azimuth elevation distance time".split()}
        )
        alone = render_caption(caption, one)
        for field in ("rgb", "mask", "depth"):
            assert torch.allclose(getattr(together, field)[i : i + 1], getattr(alone, field), atol=1e-5)
    with pytest.raises(ValueError, match="4 groups"):
        render_captions(captions[:2], cameras)


def test_backgrounds_are_composited_and_rgb_is_straight_without_one():
    cameras = orbit(2, 24, 24)
    plain = render_caption("a green cone", cameras)
    wall = torch.tensor([[[0.2, 0.4, 0.6], [0.9, 0.1, 0.3]]])
    over = render_caption("a green cone", cameras, background=wall)
    assert torch.allclose(over.rgb, plain.rgb * plain.mask + (1 - plain.mask) * wall[:, :, None, None], atol=1e-6)
    assert (plain.rgb[plain.mask[..., 0] == 0] == 0).all()
    edge = (plain.mask[..., 0] > 0) & (plain.mask[..., 0] < 1) & (plain.rgb.amax(-1) > 0.4)
    assert edge.any() and set(plain.mask.unique().tolist()) == {0.0, 0.25, 0.5, 0.75, 1.0}


def test_a_snowman_can_have_a_head_of_another_colour():
    cameras = orbit(4, 32, 32, elevation_deg=0.0, start_deg=135.0)
    image = render_caption("a red snowman", cameras, head_color="blue").rgb[0, 0]
    above = round((1 - SNOWMAN_NECK / 1.09) * 16)
    red, blue = image[..., 0] > 0.3, image[..., 2] > 0.3
    assert red[above + 1 :].sum() > 50 and blue[: above - 1].sum() > 15
    assert not red[: above - 1].any() and not blue[above + 2 :].any()


# --- evaluation

SMALL = {"size": 40, "n_azimuths": 12}


@pytest.mark.parametrize("shape, motion, color", list(zip(SHAPES, MOTIONS, list(COLORS)[2:], strict=True)))
def test_the_truth_evaluates_to_perfection(shape, motion, color):
    caption = Caption(color, shape, motion)
    result = evaluate(true_renderer(caption), caption, **SMALL)
    assert result.colors == (color,) * 8 and result.colors_right == 8
    assert result.iou == result.raw_iou == result.clip_iou == result.scale == 1.0
    assert result.n_faces == 1 and result.one_face_in_front
    assert abs(result.face_azimuth_deg) < 2 and result.face_strength == pytest.approx(1)
    assert result.stray_motion < 1e-5
    if motion == "still":
        assert result.motion_correlation is None and result.motion_amplitude < 1e-5
    else:
        assert result.motion_correlation == pytest.approx(1) and result.motion_amplitude == pytest.approx(1)
    assert json.loads(json.dumps(result.to_dict()))["caption"] == caption.text
    assert "\n" not in result.summary() and "8/8" in result.summary()


def test_a_wrong_shape_has_a_lower_iou_even_after_the_best_scale():
    masks = {shape: render_caption(f"a red {shape}", orbit(4, 32, 32)).mask[0, ..., 0] for shape in SHAPES}
    for shape, truth in masks.items():
        for other, mask in masks.items():
            iou = best_scale(mask, truth)[1].mean()
            assert iou == 1.0 if other == shape else iou < 0.9


def test_scale_and_shift_are_found():
    truth = render_caption("a red cone", orbit(4, 64, 64)).mask[0, ..., 0]
    far = render_caption("a red cone", orbit(4, 64, 64, distance=3.6)).mask[0, ..., 0].roll((5, -7), (1, 2))
    scale, iou = best_scale(far, truth)
    assert scale == pytest.approx(1.2, abs=0.051) and iou.min() > 0.93


def test_a_wrong_colour_shows_in_every_view_and_nowhere_else():
    result = evaluate(true_renderer("an orange cylinder"), "a red cylinder", n_times=0, **SMALL)
    assert result.colors == ("orange",) * 8 and result.colors_right == 0
    assert result.iou == 1.0 and result.one_face_in_front
    assert result.motion_amplitude is None and result.clip_iou is None


@pytest.mark.parametrize("name", COLORS)
def test_named_colours_survive_shade_and_paleness(name):
    rgb = torch.tensor(COLORS[name])
    for shade in (1.0, 0.7, 0.6 if name == "white" else 0.3):
        for pale in (0.0, 0.3, 0.5):
            assert nearest_color(tuple((shade * (rgb + pale * (1 - rgb))).tolist())) == name
    assert nearest_color((0.02, 0.02, 0.02)) == nearest_color((0.5, 0.5, 0.5)) == "none"


@pytest.mark.parametrize("shape", ["torus", "cone"])
def test_two_faces_no_face_and_a_face_behind_are_told_apart(shape):
    caption = f"a purple {shape}"

    def faces(*azimuths):
        return evaluate(true_renderer(caption, mark_azimuths_deg=azimuths), caption, n_times=0, **SMALL)

    two, none, behind = faces(0.0, 180.0), faces(), faces(180.0)
    assert two.n_faces == 2 and not two.one_face_in_front and two.iou == 1.0
    assert none.n_faces == 0 and none.face_azimuth_deg is None and not none.one_face_in_front
    assert behind.n_faces == 1 and abs(behind.face_azimuth_deg) > 178 and not behind.one_face_in_front


def test_faces_on_synthetic_profiles():
    bump = torch.tensor([1.0, 0.9, 0.5, 0.1, 0, 0, 0, 0, 0, 0.1, 0.5, 0.9])
    assert find_faces(bump, 1.0)[::3] == (1, True)
    assert find_faces(0.5 * bump, 1.0)[::3] == (1, True)
    assert find_faces(0.1 * bump, 1.0)[0] == 0
    assert find_faces(bump + 0.6 * bump.roll(6), 1.0)[::3] == (2, False)
    assert find_faces(bump + 0.3 * bump.roll(6), 1.0)[::3] == (1, True)
    assert find_faces(bump.roll(3), 1.0)[1] == pytest.approx(90, abs=1e-3)
    assert not find_faces(torch.ones(12), 1.0)[3]
    assert find_faces(torch.zeros(12), 1.0) == (0, None, 0.0, False)


@pytest.mark.parametrize("motion", MOTIONS[1:])
def test_stillness_and_half_the_motion_show_in_the_amplitude(motion):
    caption = f"a green snowman is {motion}"
    small = {"size": 32, "n_azimuths": 4, "n_views": 2}
    still = evaluate(true_renderer("a green snowman"), caption, **small)
    assert still.motion_correlation == 0 and still.motion_amplitude < 1e-5 and still.colors_right == 2
    half = evaluate(true_renderer(caption, strength=0.5), caption, **small)
    assert half.motion_correlation > 0.97 and 0.4 < half.motion_amplitude < 0.6
    backwards = evaluate(true_renderer(caption, strength=-1.0), caption, **small)
    assert backwards.motion_correlation < -0.85
    restless = evaluate(true_renderer(caption), "a green snowman is still", **small)
    assert restless.motion_correlation is None and restless.motion_amplitude > 0.9
    if motion != "spinning":  # a snowman turns without changing its silhouette
        assert still.clip_iou < half.clip_iou < 0.95


def test_another_motion_has_no_correlation_but_is_a_stray_one():
    small = {"size": 48, "n_azimuths": 4, "n_views": 2}
    result = evaluate(true_renderer("a blue sphere is sliding"), "a blue sphere is jumping", **small)
    assert abs(result.motion_correlation) < 0.2 and result.motion_amplitude < 0.1 and result.stray_motion > 0.9


@pytest.mark.parametrize("motion", ["still", "spinning"])
@pytest.mark.parametrize("filling", [0.0, 0.3, math.nan])
def test_an_empty_result_scores_nothing_and_is_never_nan(motion, filling):
    def renderer(cameras):
        shape = (*cameras.shape, cameras.height, cameras.width)
        return Images(torch.full((*shape, 3), filling), torch.full((*shape, 1), filling))

    result = evaluate(renderer, f"a red cube is {motion}", **SMALL)
    assert result.colors == ("none",) * 8 and result.colors_right == 0
    assert result.iou == result.raw_iou == result.clip_iou == 0 and result.n_faces == 0
    assert result.motion_amplitude == 0 and result.motion_correlation == (None if motion == "still" else 0)
    assert "NaN" not in json.dumps(result.to_dict())


def worn(caption: str, **options):
    """The truth as a rough field would show it: smaller, blurred, paler, in fog, with noise and a grey mark."""

    def renderer(cameras):
        noise = generator()
        wide = replace(cameras.resized(32, 32), fov_y=2 * torch.atan(1.1 * torch.tan(cameras.fov_y / 2)))
        image = render_caption(caption, wide, **options)
        rgb = torch.where(image.rgb.amax(-1, keepdim=True) < 0.3, 0.2, image.rgb)
        rgb = rgb + 0.2 * (0.5 - rgb)
        layers = torch.cat((rgb * image.mask, image.mask), -1)[0].permute(0, 3, 1, 2)
        layers = torch.nn.functional.avg_pool2d(layers, 3, 1, 1)
        layers = torch.nn.functional.interpolate(layers, size=cameras.height, mode="bilinear").permute(0, 2, 3, 1)
        opacity = layers[..., 3:]
        rgb = layers[..., :3] / opacity.clamp(min=1e-3)
        rgb = (rgb + 0.05 * torch.randn(rgb.shape, generator=noise)).clamp(0, 1)
        opacity = (0.9 * opacity + 0.1 * torch.rand(opacity.shape, generator=noise)).clamp(0, 1)
        return Images((rgb * opacity)[None], opacity[None])

    return renderer


@pytest.mark.parametrize("caption", ["a green torus is swaying", "a white snowman is spinning", "a purple cone"])
def test_a_worn_result_is_still_recognised(caption):
    result = evaluate(worn(caption), caption)
    assert result.colors_right == 8 and result.iou > 0.9 and result.scale == pytest.approx(1.1, abs=0.051)
    assert result.raw_iou < result.iou and result.clip_iou > 0.85
    assert result.one_face_in_front and abs(result.face_azimuth_deg) < 5 and result.face_strength < 0.7
    if caption == "a purple cone":
        assert result.motion_amplitude < 0.1
    else:
        assert result.motion_correlation > 0.98 and 0.8 < result.motion_amplitude < 1.2
    assert evaluate(worn(caption, mark_azimuths_deg=(0.0, 180.0)), caption, n_times=0).n_faces == 2


def test_correlation_is_pearsons_and_needs_motion():
    truth = torch.sin(torch.linspace(0, 6.28, 9))
    assert correlation(2 * truth + 3, truth) == pytest.approx(1)
    assert correlation(-truth, truth) == pytest.approx(-1)
    assert correlation(0.01 * truth, truth) == 0 and correlation(torch.zeros(9), truth) == 0


def test_a_fresh_scene_is_a_grey_ball():
    from dream4d_engine.fields.encodings import HashGridConfig
    from dream4d_engine.fields.radiance import RadianceConfig
    from dream4d_engine.scene import SceneConfig, build_scene

    radiance = RadianceConfig(grid=HashGridConfig(n_levels=2, log2_entries=8, base_resolution=4), hidden_width=8)
    scene = build_scene(SceneConfig(radiance=radiance, n_samples=48), generator())
    small = {"size": 32, "n_views": 2, "n_azimuths": 4}
    result = evaluate_scene(scene, "a white sphere", n_times=2, **small)
    assert result.colors == ("none", "none") and result.n_faces == 0
    assert result.iou > 0.95 and result.scale > 1 and result.motion_amplitude < 1e-3
    assert result.surface is not None and result.surface.place_error == 0.0 and "places off by 0.00" in result.summary()
    # it stays where it should slide by 0.3 |sin(2 pi t)|
    motion = follow_surface(scene)
    errors = surface_errors(motion, "a white sphere is sliding")
    sine = torch.sin(2 * math.pi * motion.times).abs()
    assert errors.place_error == pytest.approx(float(0.3 * sine.mean()) / motion.size, rel=1e-4)
    assert errors.worst_place_error == pytest.approx(0.3 / motion.size, rel=1e-4)
    assert errors.rigidity_error < 1e-6
    assert evaluate_scene(scene, "a white sphere", n_times=0, **small).surface is None


def ways(name: str, motion: str, change=lambda places, times: places, strength: float = 1.0) -> SurfaceMotion:
    """Points of a shape that go where the truth carries them, but for what `change` does then."""
    rest, times = surface_points(name), torch.linspace(0, 1, 9)
    indices = (torch.full((9,), k) for k in (MOTIONS.index(motion), SHAPES.index(name)))
    affine = world_from_canonical(*indices, times, strength)
    places = rest @ affine[:, :3, :3].mT + affine[:, None, :3, 3]
    nothing = torch.zeros(0, 2, dtype=torch.int64)
    carried = torch.zeros(9, len(rest), dtype=torch.bool)
    return SurfaceMotion(times, change(places, times[:, None, None]), rest, nothing, carried, rest, rest)


@pytest.mark.parametrize("shape, motion", list(zip(SHAPES, MOTIONS, strict=True)))
def test_a_surface_that_goes_the_true_way_has_no_error(shape, motion):
    errors = surface_errors(ways(shape, motion), f"a red {shape} is {motion}")
    assert max(vars(errors).values()) < 1e-6


def test_the_errors_of_a_surface_are_those_put_in():
    # the whole of it 0.1 aside: places are off by that, distances by nothing; sizes of a cube are 0.9
    aside = surface_errors(ways("cube", "jumping", lambda x, t: x + torch.tensor([0.1, 0, 0])), "a red cube is jumping")
    assert aside.place_error == pytest.approx(0.1 / 0.9, rel=1e-3) and aside.rigidity_error < 1e-6
    # half of the way: what is left is half of the way
    half = surface_errors(ways("cube", "jumping", strength=0.5), "a red cube is jumping")
    assert half.worst_place_error == pytest.approx(0.175 / 0.9, rel=1e-3) and half.rigidity_error < 1e-6
    # half of a turn is rigid, and so is another motion
    for other in (ways("cube", "spinning", strength=0.5), ways("cube", "sliding")):
        found = surface_errors(other, "a red cube is spinning")
        assert found.place_error > 0.05 and found.rigidity_error < 1e-6
    # growing by a tenth until the end changes all distances by a tenth, so their mean by a tenth of the mean distance
    grown = ways("cube", "still", lambda x, t: x * (1 + 0.1 * t))
    errors = surface_errors(grown, "a red cube")
    mean = float(torch.pdist(grown.rest[:1000]).mean()) / 0.9
    assert errors.worst_rigidity_error == pytest.approx(0.1 * mean, rel=0.03)
    assert errors.rigidity_error == pytest.approx(0.05 * mean, rel=0.03)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="n_times"):
        evaluate(true_renderer("a red cube"), "a red cube", n_times=1)


# --- the ideal denoiser


def bank(n: int = 5, frames: int = 3) -> torch.Tensor:
    return torch.rand(n, frames, 3, 4, 4, generator=generator())


def test_the_ideal_denoiser_is_the_posterior_mean():
    members = bank()
    denoiser = IdealDenoiser(members)
    x = torch.randn(2, 3, 3, 4, 4, generator=generator(1))
    sigma = torch.tensor([0.8, 3.0])
    expected = []
    for image, s in zip(x, sigma, strict=True):
        z = 2 * members.double() - 1
        logits = torch.tensor([-float(((image - v) ** 2).sum() / (2 * s**2)) for v in z], dtype=torch.float64)
        expected.append(sum(w * v for w, v in zip(logits.softmax(0), z, strict=True)))
    assert torch.allclose(denoiser.denoise(x, sigma), torch.stack(expected).float(), atol=1e-5)


def test_two_members_give_the_closed_form():
    """Members at +v and -v: the posterior mean is v tanh(x.v / sigma^2)."""
    v = 0.1 * torch.randn(1, 1, 3, 4, 4, generator=generator())
    denoiser = IdealDenoiser(torch.cat((1 + v, 1 - v)) / 2)
    x, sigma = torch.randn(3, 1, 3, 4, 4, generator=generator(2)), torch.tensor([0.2, 0.5, 2.0])
    expected = v * torch.tanh((x * v).sum((1, 2, 3, 4)) / sigma**2)[:, None, None, None, None]
    assert torch.allclose(denoiser.denoise(x, sigma), expected, atol=1e-5)


def test_its_limits_are_the_nearest_member_and_the_mean():
    members = bank()
    denoiser = IdealDenoiser(members)
    z = denoiser.encode(members)
    x = z[[3, 1]] + 0.05 * torch.randn(2, 3, 3, 4, 4, generator=generator(3))
    for sigma in (0.0, 1e-8, 1e-3):
        assert torch.allclose(denoiser.denoise(x, torch.full((2,), sigma)), z[[3, 1]], atol=1e-6)
    assert torch.allclose(denoiser.denoise(x, torch.full((2,), 1e6)), z.mean(0).expand(2, -1, -1, -1, -1), atol=1e-5)


def test_it_is_a_pixel_space_denoiser_of_its_banks_kind():
    members = bank()
    denoiser, single = IdealDenoiser(members), IdealDenoiser(members[:, :1])
    assert denoiser.image_size == (4, 4) and denoiser.n_frames == 3 and single.n_frames is None
    assert torch.allclose(denoiser.decode(denoiser.encode(members)), members, atol=1e-6)
    assert denoiser.noise.alphas_bar.shape == (1000,) and (denoiser.noise.alphas_bar.diff() < 0).all()
    x, sigma = torch.randn(2, 3, 3, 4, 4, generator=generator(4)), torch.tensor([0.5, 1.5])
    grouped = single.denoise(x, sigma)
    assert torch.allclose(grouped[1, 2], single.denoise(x[1:, 2:], sigma[1:])[0, 0], atol=1e-6)
    with pytest.raises(ValueError, match="bank"):
        denoiser.denoise(x[:, :2], sigma)
    with pytest.raises(ValueError, match="bank must be"):
        IdealDenoiser(members[0])


def test_conditions_can_choose_members():
    members = bank()
    denoiser = IdealDenoiser(members, allowed=lambda c: torch.arange(5)[None] == c.vector[:, 0, :1].long())
    x, sigma = torch.randn(2, 3, 3, 4, 4, generator=generator(5)), torch.tensor([1.0, 5.0])
    which = torch.tensor([4.0, 2.0])[:, None, None].expand(2, 3, 1)
    conditions = Conditions(tokens=torch.zeros(2, 3, 1, 1), vector=which)
    assert torch.allclose(denoiser.denoise(x, sigma, conditions), denoiser.encode(members[[4, 2]]), atol=1e-6)
