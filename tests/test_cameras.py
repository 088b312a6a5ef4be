"""Cameras, their distributions and the rays they cast."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dream4d_engine import cameras as cam
from dream4d_engine.rays import rays_from_cameras


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


angles = st.floats(-math.pi, math.pi)


@given(angles, st.floats(-1.5, 1.5), st.floats(0.5, 5))
def test_cameras_are_proper_rotations_that_look_at_the_origin(azimuth, elevation, distance):
    c2w = cam.look_at_origin(*(torch.tensor([v], dtype=torch.float64) for v in (azimuth, elevation, distance)))[0]
    rotation, position = c2w[:3, :3], c2w[:3, 3]
    assert torch.allclose(rotation.T @ rotation, torch.eye(3, dtype=torch.float64), atol=1e-9)
    assert torch.linalg.det(rotation) == pytest.approx(1)
    assert torch.allclose(-rotation[:, 2] * distance, -position, atol=1e-9)
    assert rotation[2, 0] == pytest.approx(0), "the horizon stays level"
    assert rotation[2, 1] >= 0, "up is up"


def test_the_front_camera_sits_on_plus_x_and_azimuth_grows_towards_plus_y():
    front = cam.make_cameras(0.0, 0.0, 2.0, 0.7, 0.0, 4, 4)
    left = cam.make_cameras(math.pi / 2, 0.0, 2.0, 0.7, 0.0, 4, 4)
    assert torch.allclose(front.position[0, 0], torch.tensor([2.0, 0, 0]), atol=1e-6)
    assert torch.allclose(left.position[0, 0], torch.tensor([0.0, 2, 0]), atol=1e-6)


def test_rays_start_at_the_pixel_the_convention_says():
    cameras = cam.make_cameras(0.0, 0.0, 3.0, math.radians(60), 0.25, 2, 4)
    bundle = rays_from_cameras(cameras)
    focal = 0.5 * 2 / math.tan(math.radians(30))
    # the camera on +x: right is +y, up is +z; pixel (i=3, j=0) is right and up
    expected = torch.tensor([-1.0, (3.5 - 2) / focal, -(0.5 - 1) / focal])
    assert torch.allclose(bundle.directions[3], expected / expected.norm(), atol=1e-6)
    assert bundle.shape == (1, 1, 2, 4)
    assert torch.all(bundle.times == 0.25)


def test_jitter_moves_rays_a_little_and_keeps_them_unit():
    cameras = cam.orbit(2, 8, 8)
    plain, moved = rays_from_cameras(cameras), rays_from_cameras(cameras, 2e-3, seeded())
    shift = (plain.directions - moved.directions).norm(dim=-1)
    assert 0 < shift.max() < 0.02
    assert torch.allclose(moved.directions.norm(dim=-1), torch.ones(len(shift)))


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_groups_of_views_are_evenly_spaced_and_share_the_rest(seed):
    views = cam.sample_views(cam.CameraRanges(), 3, 4, 8, 8, seeded(seed))
    steps = torch.remainder(views.azimuth[:, 1:] - views.azimuth[:, :-1], 2 * math.pi)
    assert torch.allclose(steps, torch.full_like(steps, math.pi / 2), atol=1e-5)
    for shared in (views.elevation, views.distance, views.fov_y):
        assert torch.all(shared == shared[:, :1])
    assert views.azimuth.abs().max() <= math.pi + 1e-5
    relative = views.distance * torch.tan(views.fov_y / 2)
    assert 0.8 - 1e-5 <= relative.min() and relative.max() <= 1.0 + 1e-5
    assert 0 <= views.elevation.min() and views.elevation.max() <= math.radians(30) + 1e-6


@pytest.mark.parametrize("law", ["uniform", "sphere", "mixed"])
def test_elevations_follow_their_law(law):
    ranges = cam.CameraRanges(elevation_deg=(-10.0, 80.0), elevation_law=law)
    elevation = cam.sample_views(ranges, 20_000, 1, 1, 1, seeded()).elevation
    low, high = math.radians(-10), math.radians(80)
    uniform_mean = (low + high) / 2
    # E[asin(u)] for u uniform on [sin low, sin high]
    antiderivative = [u * math.asin(u) + math.sqrt(1 - u * u) for u in (math.sin(low), math.sin(high))]
    sphere_mean = (antiderivative[1] - antiderivative[0]) / (math.sin(high) - math.sin(low))
    expected = {"uniform": uniform_mean, "sphere": sphere_mean, "mixed": (uniform_mean + sphere_mean) / 2}[law]
    assert elevation.mean().item() == pytest.approx(expected, abs=0.01)
    assert low <= elevation.min() and elevation.max() <= high


@pytest.mark.parametrize("elevation_deg", [0.0, 20.0, -10.0])
def test_orbits_go_once_around_and_end_where_they_should(elevation_deg):
    ranges = cam.CameraRanges(elevation_deg=(-10.0, 60.0), fov_y_deg=(33.8, 33.8))
    end = (0.4, math.radians(elevation_deg))
    static, dynamic = (cam.sample_orbits(ranges, o, end, 200, 21, 8, 6, seeded()) for o in ("static", "dynamic"))
    for orbit in (static, dynamic):
        assert orbit.shape == (200, 21) and (orbit.height, orbit.width) == (8, 6)
        last = cam.look_at_origin(*(torch.full((200,), angle) for angle in end), orbit.distance[:, -1])
        assert torch.allclose(orbit.c2w[:, -1], last, atol=1e-5)
        assert torch.all(orbit.distance == orbit.distance[:, :1]) and torch.all(orbit.time == 0)
        assert torch.all(orbit.azimuth[:, 1:] > orbit.azimuth[:, :-1])
    steps = torch.diff(torch.cat((torch.full((200, 1), end[0]), static.azimuth), 1))
    assert torch.allclose(steps, torch.full_like(steps, 2 * math.pi / 21), atol=1e-5)
    assert torch.all(static.elevation == static.elevation[0, 0])
    off = (dynamic.azimuth - static.azimuth) / (2 * math.pi / 21)
    assert off[:, :-1].min() == pytest.approx(-0.25, abs=0.01) and off[:, :-1].max() == pytest.approx(0.25, abs=0.01)
    degrees = torch.rad2deg(dynamic.elevation)
    assert degrees.min() >= -10 - 1e-3 and degrees.max() <= 60 + 1e-3 and degrees.max() > 55
    behind, sides = (
        degrees[:, 10],
        degrees[:, 4],
    )  # waves that come once are highest behind, those that come twice aside
    once = (behind - elevation_deg).abs() > (sides - elevation_deg).abs()
    assert 60 < once.sum() < 140
    assert torch.diff(degrees).abs().max() < 22  # 18 a view at most from 0 to 60, 21 where it goes down by 70


def test_takes_hold_the_camera_still_over_a_random_interval():
    takes = cam.sample_takes(cam.CameraRanges(azimuth_deg=(-150, 150)), 50, 24, 4, 4, seeded())
    assert torch.all(takes.azimuth == takes.azimuth[:, :1])
    assert torch.all(takes.time[:, 1:] > takes.time[:, :-1])
    length = takes.time[:, -1] - takes.time[:, 0]
    assert 0.8 - 1e-5 <= length.min() and length.max() <= 1 + 1e-5
    assert 0 <= takes.time.min() and takes.time.max() <= 1
    assert takes.time[:, 0].max() > 0.1, "the interval's place is random too"


def test_a_loops_takes_are_the_same_drawn_elsewhere_and_go_on_past_its_end():
    ranges = cam.CameraRanges()
    takes, looped = (cam.sample_takes(ranges, 40, 8, 4, 4, seeded(), starts=s) for s in (None, (-0.1, 0.1)))
    assert torch.equal(takes.c2w, looped.c2w)
    assert 0 <= looped.time.min() and looped.time.max() < 1
    start = (looped.time[:, 0] + 0.5).remainder(1) - 0.5
    assert -0.1 <= start.min() < -0.08 and 0.08 < start.max() <= 0.1
    steps = looped.time.diff(dim=1).remainder(1)
    assert torch.allclose(steps, takes.time.diff(dim=1), atol=1e-6), "of the same length, each"
    assert (looped.time.diff(dim=1) < 0).any(1).float().mean() > 0.4, "many of them past the end"


def test_a_loops_film_shows_no_moment_twice():
    assert cam.film_times(4, loop=True).tolist() == [0, 0.25, 0.5, 0.75]
    assert cam.film_times(5).tolist() == [0, 0.25, 0.5, 0.75, 1] and cam.film_times(1).tolist() == [0]
    assert torch.equal(cam.fixed_take(6, 8, 8, loop=True).time[0], cam.film_times(6, loop=True))
    path = cam.final_path(8, 8, 4, 6, loop=True)
    turned = (path.time[0].roll(-1) - path.time[0]).remainder(1)
    assert torch.allclose(turned, torch.full((24,), 1 / 6)), "from part to part, and from the end to the beginning"
    away = path.azimuth[0].diff().reshape(-1)
    assert torch.allclose(away[6:12], torch.full((6,), math.pi / 6), atol=1e-5), "nor does the camera stop between"


def test_the_final_path_alternates_still_parts_and_orbits_and_closes_the_turn():
    path = cam.final_path(8, 8)
    assert path.shape == (1, 192)
    azimuth, time = path.azimuth.reshape(8, 24), path.time.reshape(8, 24)
    assert torch.all(azimuth[::2] == azimuth[::2, :1])
    assert torch.allclose(azimuth[1::2, -1], azimuth[1::2, 0] + math.pi / 2)
    assert azimuth[-1, -1] == pytest.approx(2 * math.pi)
    assert torch.allclose(time, torch.linspace(0, 1, 24).expand(8, 24))


def test_azimuths_gather_in_the_middle_of_their_range():
    even = cam.CameraRanges(azimuth_deg=(-140.0, 160.0))
    takes = [cam.sample_takes(replace(even, gather=g), 4000, 1, 8, 8, seeded()).azimuth for g in (0.0, 2.0)]
    uniform, gathered = ((torch.rad2deg(azimuth[:, 0]) - 10) / 150 for azimuth in takes)
    assert gathered.abs().max() <= 1
    torch.testing.assert_close(gathered, uniform.sign() * uniform.abs() ** 3, atol=1e-5, rtol=0)
    assert (gathered.abs() < 1 / 8).float().mean() == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match=r"gather must lie in \[0, 10\], got -1"):
        cam.CameraRanges(gather=-1)


def test_same_seed_same_cameras():
    first, second = (cam.sample_views(cam.CameraRanges(), 2, 4, 8, 8, seeded(7)) for _ in range(2))
    assert torch.equal(first.c2w, second.c2w)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"elevation_deg": (30.0, 0.0)}, "elevation_deg"),
        ({"fov_y_deg": (0.0, 60.0)}, "fov_y_deg"),
        ({"distance": (-1.0, 1.0)}, "distance"),
        ({"elevation_deg": (0.0, 120.0)}, "elevation_deg"),
    ],
)
def test_impossible_ranges_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        cam.CameraRanges(**change)


def test_regrouping_and_picking_keep_each_camera_whole():
    views = cam.sample_views(cam.CameraRanges(), 2, 4, 8, 8, seeded())
    flat = views.reshape(8, 1)
    kept = flat.groups(flat.azimuth[:, 0].abs() < 1.0)
    assert torch.equal(flat.c2w[:, 0], views.c2w.reshape(8, 4, 4))
    assert torch.equal(kept.position, flat.position[flat.azimuth[:, 0].abs() < 1.0])
    assert torch.all(views.at_time(0.5).time == 0.5)
