"""How much a scene moves, read from scenes whose motion is known in closed form.

Places are right to 0.002 of the size, sizes to 1 %, so displacements to 1 %; shares of the surface to 0.05.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch
from exact_scene import ExactField, exact_scene, jump, turn

from dream4d_engine.fields.edit import Box, MotionEdit
from dream4d_engine.mesh import MeshError
from dream4d_engine.surface import follow_surface, measure_motion, what_is_frozen
from dream4d_engine.surface.motion import N_TIMES
from dream4d_engine.toyworld.shapes import SHAPE_MODELS

TIMES = torch.linspace(0, 1, N_TIMES)
SIDE = 0.9  # of the toy world's cube


class Paint(ExactField):
    """A solid with a sharp skin, grey and brighter towards +y: 0.5 + 0.4 y."""

    def forward(self, u, kernels):
        return self.density(u, kernels), (0.5 + 0.4 * (2 * u[:, 1:2] - 1)).expand(-1, 3)


def moving(distance="cube", came_from=None, radius=1.0, scale=1.0):
    if isinstance(distance, str):
        distance = SHAPE_MODELS[distance].distance
    scene = exact_scene(distance, came_from, radius, scale)
    scene.canonical = Paint(distance, radius, softness=0.001)
    return scene


def ball(points, at=(0.0, 0.0, 0.0), radius=0.3):
    return (points - points.new_tensor(at)).norm(dim=-1) - radius


def two_balls(points):
    return torch.minimum(ball(points, (0.0, -0.4, 0.0)), ball(points, (0.0, 0.4, 0.0)))


def right_ball_jumps(points, times):
    return torch.where(points[:, 1:2] > 0, jump(points, times), points)


def test_a_translation() -> None:
    found = measure_motion(moving(came_from=jump))
    sine = torch.sin(math.pi * TIMES)
    assert found.size == pytest.approx(SIDE, rel=0.01)
    assert found.mean_displacement == pytest.approx(float(0.3 / SIDE * sine.mean()), rel=0.015)
    assert found.peak_displacement == pytest.approx(0.3 / SIDE, rel=0.015)
    assert found.moving_share == 1.0 and found.flicker is None and found.folded == 0.0
    assert found.strain < 0.002 and found.loop_gap < 0.001 and found.loop_gap_steps < 0.02
    assert found.line == (
        "moves 0.20 of its size on average, 0.33 at most; 100 % of the surface; distances kept to 0.0 %; "
        "first and last moment 0.00 apart"
    )


def test_a_motion_that_does_not_come_back_in_a_larger_box() -> None:
    def away(points, times):
        return points - times[:, None] * points.new_tensor([1.0, 0.0, 0.0])

    found = measure_motion(moving(lambda points: ball(points, (-0.5, 0, 0), 0.8), away, radius=2.0))
    assert found.size == pytest.approx(1.6, rel=0.01)
    assert found.mean_displacement == pytest.approx(0.5 / 1.6, rel=0.015)
    assert found.loop_gap == pytest.approx(1 / 1.6, rel=0.015)
    assert found.loop_gap_steps == pytest.approx(N_TIMES - 1, rel=0.01)


def test_what_leaves_the_box() -> None:
    """A cube jumps through the top of the box, by the strength of an edit, or as its motion was trained."""
    inside = moving(came_from=jump)
    scene = inside.edited(MotionEdit(2.0))
    motion = follow_surface(scene)
    top = motion.rest[:, 2] + 0.6 * torch.sin(math.pi * TIMES)[:, None]
    expected, found = float((top > 1).float().mean()), measure_motion(scene, motion)
    assert expected > 0.03 and found.outside == pytest.approx(expected, abs=0.003)
    assert found.line.endswith(f"; cut off outside of the scene's box in {100 * expected:.1f} % of places and moments")
    # by a trained motion what leaves the box has no inverse, and is followed to its side
    trained = measure_motion(moving(came_from=lambda points, times: jump(points, times, 2.0)))
    assert expected / 2 < trained.outside < expected + 0.003
    assert measure_motion(inside).outside == 0 and "box" not in measure_motion(inside).line


def test_a_rotation_keeps_distances() -> None:
    scene = moving(came_from=turn)
    motion = follow_surface(scene)
    angle = math.radians(50) * torch.sin(2 * math.pi * TIMES)[:, None]
    x, y, z = motion.rest.unbind(-1)
    turned = torch.stack((angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y, z.expand(25, -1)), -1)
    assert (motion.positions - turned).norm(dim=-1).max() < 0.002
    found = measure_motion(scene, motion)
    assert found.strain < 0.002 and found.loop_gap < 0.001
    # the corners go farthest: 2 r sin(angle / 2)
    farthest = 2 * SIDE / math.sqrt(2) * math.sin(math.radians(25))
    assert found.peak_displacement == pytest.approx(farthest / SIDE, rel=0.02)


def test_growth_changes_distances_by_as_much() -> None:
    def grown(points, times):
        return points / (1 + 0.2 * torch.sin(math.pi * times))[:, None]

    found = measure_motion(moving("sphere", grown))
    sine = torch.sin(math.pi * TIMES)
    assert found.strain == pytest.approx(float(0.2 * sine.mean()), rel=0.01)
    assert found.mean_displacement == pytest.approx(float(0.1 * sine.mean()), rel=0.015)  # of the size: 2 radii
    assert found.peak_displacement == pytest.approx(0.1, rel=0.015)


def test_half_of_an_object_moves_and_the_rest_does_not_flicker() -> None:
    found = measure_motion(moving(two_balls, right_ball_jumps))
    assert found.moving_share == pytest.approx(0.5, abs=0.05)
    assert found.peak_displacement == pytest.approx(0.3 / 1.4, rel=0.015)
    assert found.mean_displacement == pytest.approx(
        found.moving_share * 0.3 / 1.4 * float(torch.sin(math.pi * TIMES).mean()), rel=0.02
    )
    assert found.strain < 0.002
    assert found.flicker is not None and found.flicker < 1e-4


@pytest.mark.parametrize(("strength", "radius", "scale"), [(1.0, 1.0, 1.0), (0.5, 2.0, 1.25)])
def test_how_much_of_the_surface_is_frozen(strength, radius, scale) -> None:
    scene = moving(two_balls, right_ball_jumps, radius, scale).edited(MotionEdit(strength))
    right = MotionEdit(frozen=(Box((-9, 0.01, -9), (9, 9, 9), 0.005),))
    share, words = what_is_frozen(scene, scene.edited(right)).split("%")
    assert float(share) == pytest.approx(50, abs=5) and words == " of the surface is frozen"
    everything, nothing = (MotionEdit(frozen=(Box((low,) * 3, (9, 9, 9), 0.01),)) for low in (-9, 0.95))
    assert what_is_frozen(scene, scene.edited(everything)) == "all of the surface is frozen: nothing moves"
    assert what_is_frozen(scene, scene.edited(nothing)).startswith("what was frozen holds nothing of the surface")
    assert what_is_frozen(moving(lambda points: points[:, 0] * 0 + 1, jump), scene) == ""


def test_flicker_put_in_on_purpose() -> None:
    """A painted ball turns to and fro between neighbouring moments, by less than counts as moving."""
    tremor = 0.03

    def trembling(points, times):
        angle = tremor * ((times * (N_TIMES - 1)).round() % 2)
        x, y, z = points.unbind(-1)
        return torch.stack((angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x, z), -1)

    scene = moving("sphere", trembling)
    motion = follow_surface(scene)
    found = measure_motion(scene, motion)
    assert found.moving_share == 0.0
    x, y, _ = motion.rest.unbind(-1)
    expected = 0.4 * (math.cos(tremor) * y - math.sin(tremor) * x - y).abs().mean()
    assert found.flicker == pytest.approx(float(expected), rel=0.05)
    assert found.line == "still: moves 0.015 of its size at most; what rests flickers by 0.003"


def test_the_zoom_is_part_of_the_object_not_of_its_motion() -> None:
    scene = moving(came_from=lambda points, times: jump(points, times) / 1.3, scale=1.3)
    found = measure_motion(scene)
    assert found.size == pytest.approx(1.3 * SIDE, rel=0.01)
    assert found.peak_displacement == pytest.approx(0.3 / (1.3 * SIDE), rel=0.015)
    assert found.strain < 0.002


def test_what_the_motion_swallows_has_no_inverse() -> None:
    """A slit opens in the middle of a ball, and what was there is nowhere to be seen."""

    def parted(points, times):
        x, y, z = points.unbind(-1)
        return torch.stack((x, y + 0.1 * times * y.sign(), z), -1)

    found = measure_motion(moving("sphere", parted))
    # the slit's share of a sphere's area is its share of the height; places off by 0.01 count as found
    assert found.folded == pytest.approx(float((0.1 * TIMES - 0.01).clamp_min(0).mean() / 0.56), rel=0.2)
    assert "folds or tears in" in found.line


@pytest.mark.parametrize("came_from", [None, lambda points, times: points])
def test_a_still_scene_is_still(came_from) -> None:
    found = measure_motion(moving("torus", came_from))
    assert found.n_points > 300 and found.size == pytest.approx(1.14, rel=0.01)
    numbers = found.to_dict()
    del numbers["n_points"], numbers["size"]
    assert set(numbers.values()) == {0.0}
    assert found.line == "still"


@pytest.mark.parametrize("came_from", [None, jump])
def test_an_empty_scene_says_so(came_from) -> None:
    scene = moving(lambda points: points[:, 0] * 0 + 9.0, came_from)
    assert measure_motion(scene).n_points == 0
    assert measure_motion(scene).line.startswith("empty: ")


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(MeshError, match="not a finite number"):
        scene = moving(lambda points: points[:, 0] * torch.nan)
        scene.occupancy.occupied.fill_(True)
        measure_motion(scene)
    with pytest.raises(MeshError, match="not a finite number"):  # broken later than at the first moment
        measure_motion(moving("sphere", lambda points, times: points / (times < 0.5)[:, None].float()))
    with pytest.raises(ValueError, match="at least 2 moments, got n_times 1"):
        follow_surface(moving("sphere"), n_times=1)


def test_without_the_libraries_of_meshes_and_inside_inference_mode(monkeypatch) -> None:
    for name in ("skimage", "skimage.measure", "fast_simplification", "scipy"):
        monkeypatch.setitem(sys.modules, name, None)
    shares: list[float] = []
    scene = moving("sphere", jump)
    with torch.inference_mode():
        found = measure_motion(scene, on_progress=shares.append)
    assert found.peak_displacement == pytest.approx(0.3 / 1.12, rel=0.015)
    assert shares == sorted(shares) and shares[-1] == 1.0
