"""What is changed of a motion, on scenes whose motion is known in closed form."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from exact_scene import exact_scene, jump, stretch, sway, turn
from scene_cases import CONFIG, tiny_scene

from dream4d_engine.assets import config_from_dict, load_scene, save_scene
from dream4d_engine.cameras import fixed_take
from dream4d_engine.fields.edit import Box, MotionEdit, TimeMap, parse_box, parse_keys
from dream4d_engine.fields.stencil import SIDE, stencil
from dream4d_engine.rendering import RenderOptions, render_chunked
from dream4d_engine.scene import SceneConfig
from dream4d_engine.surface import track_vertices

LOWER = Box((-1, -1, -1), (1, 1, -0.2), 0.4)


def forward(motion, points, times):
    """Where a motion of exact_scene has points [S, 3] of the thing at rest."""
    if motion is jump:
        return jump(points, times, -1.0)
    if motion is sway:
        return 2 * points - sway(points, times)  # z stays, and with it how far y goes
    if motion is stretch:
        tall = 1 + 0.4 * torch.sin(2 * math.pi * times)
        return points / torch.stack((tall.sqrt(), tall.sqrt(), 1 / tall), -1)
    return turn(points, -times)  # the sine is odd


def body(n: int = 300) -> torch.Tensor:
    """Points of a ball of 0.5."""
    points = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    return 0.5 * torch.nn.functional.normalize(points, dim=-1) * torch.linspace(0.05, 1, n)[:, None]


@pytest.mark.parametrize(("motion", "radius"), [(jump, 1.0), (sway, 2.0), (stretch, 1.0), (turn, 2.0)])
def test_things_go_as_far_as_the_strength_says(motion, radius: float) -> None:
    zoom, rest = 1.25, body()

    def came_from(points, times):
        return radius * motion(points / radius, times)

    scene = exact_scene(lambda p: p.norm(dim=-1) - 0.6 * radius, came_from, radius, zoom)
    for strength in (0.0, 0.1, 0.5, 1.0, 1.5):
        edited = scene.edited(MotionEdit(strength)) if strength != 1 else scene
        for time in (0.2, 0.8):
            times, still = torch.full((len(rest),), time), zoom * rest  # the scene at rest shows all enlarged
            place = still + strength * (forward(motion, rest, times) - still)
            found = 2 * edited.query(radius * place, times).displacement
            assert (found - (still - place)).abs().max() < 1e-3, (strength, time)
            tracks = track_vertices(edited, radius * rest, torch.zeros(0, 3, dtype=torch.int64), torch.tensor([time]))
            assert (tracks.positions[0] / radius - place).abs().max() < 3e-3, (strength, time)


def test_nothing_is_changed_where_nothing_is_asked_for() -> None:
    scene = tiny_scene()
    points, times = torch.rand(200, 3) * 2 - 1, torch.rand(200)
    same = scene.edited(MotionEdit())
    assert same.config == scene.config and same.config.deformation.edit is None
    for name, value in scene.state_dict().items():
        assert torch.equal(same.state_dict()[name], value)
    again = scene.edited(MotionEdit(times=(TimeMap(0.5),)))
    before, after = scene.query(points, times * 0.5), again.query(points, times)
    assert torch.equal(before.displacement, after.displacement) and torch.equal(before.density, after.density)


def test_strength_0_is_the_still_scene() -> None:
    config = replace(CONFIG, deformation=replace(CONFIG.deformation, scale=1.0))
    scene, rest = tiny_scene(config), tiny_scene(replace(config, deformation=None))
    rest.canonical.load_state_dict(scene.canonical.state_dict())
    rest.background.load_state_dict(scene.background.state_dict())
    rest.refresh_occupancy()
    still, cameras = scene.edited(MotionEdit(0.0)), fixed_take(3, 16, 16)
    assert torch.equal(still.occupancy.values, rest.occupancy.values)
    assert torch.equal(render_chunked(still, cameras).rgb, render_chunked(rest, cameras).rgb)
    assert not still.query(torch.rand(9, 3), torch.rand(9)).displacement.any()


@pytest.mark.parametrize("motion", [sway, stretch])
def test_what_is_frozen_keeps_still_and_the_rest_goes_on(motion) -> None:
    scene = exact_scene(lambda p: p.norm(dim=-1) - 0.6, motion)
    edited = scene.edited(MotionEdit(frozen=(LOWER,)))
    rest = body()
    times = torch.full((len(rest),), 0.2)
    frozen, free = rest[:, 2] <= -0.2, rest[:, 2] >= 0.2
    between = ~frozen & ~free
    moved = forward(motion, rest, times)
    share = ((rest[:, 2:] + 0.2) / 0.4).clamp(0, 1)
    place = rest + share * share * (3 - 2 * share) * (moved - rest)
    found = 2 * edited.query(place, times).displacement
    assert not found[frozen].any()
    assert (found - (rest - place))[free].abs().max() < 1e-3
    assert (found - (rest - place))[between].abs().max() < 5e-3
    tracks = track_vertices(edited, rest, torch.zeros(0, 3, dtype=torch.int64), torch.tensor([0.2]))
    assert (tracks.positions[0] - place).abs().max() < 2e-3
    assert not tracks.carried[0, frozen].any()


def test_times_go_as_they_are_told() -> None:
    times = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert TimeMap()(times).tolist() == times.tolist()
    assert TimeMap(2.0)(times).tolist() == [0.0, 0.5, 1.0, 0.5, 1.0]
    assert TimeMap(0.5)(times).tolist() == [0.0, 0.125, 0.25, 0.375, 0.5]
    assert TimeMap(ping_pong=True)(times).tolist() == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert TimeMap(keys=parse_keys("0:1, 1:0"))(times).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    slow = TimeMap(keys=parse_keys("0:0,0.5:0.2,1:1"))
    assert torch.allclose(slow(times), torch.tensor([0.0, 0.1, 0.2, 0.6, 1.0]))
    held = TimeMap(keys=((0.25, 0.3), (0.5, 0.6)))  # before the first key and behind the last: as there
    assert torch.allclose(held(times), torch.tensor([0.3, 0.3, 0.6, 0.6, 0.6]))
    both = MotionEdit(times=(slow,)).then(MotionEdit(times=(TimeMap(ping_pong=True),)))
    assert torch.allclose(both.moments(times), torch.tensor([0.0, 0.2, 1.0, 0.2, 0.0]))


def test_all_that_look_at_a_scene_see_the_same_times() -> None:
    scene = exact_scene(lambda p: p.norm(dim=-1) - 0.4, jump)
    late = TimeMap(ping_pong=True, keys=((0.0, 0.9), (1.0, 0.5)))
    edited = scene.edited(MotionEdit(times=(late,)))
    times = torch.tensor([0.0, 0.3, 0.5, 1.0])
    moments = late(times)
    points = body()
    for time, moment in zip(times, moments, strict=True):
        one, other = edited.query(points, time.expand(300)), scene.query(points, moment.expand(300))
        assert torch.equal(one.displacement, other.displacement)
        assert torch.equal(edited.density(points, time.expand(300)), other.density)
    faces = torch.zeros(0, 3, dtype=torch.int64)
    tracks = track_vertices(edited, points, faces, times)
    for row, moment in enumerate(moments):
        place = forward(jump, points, moment.expand(300))
        assert (tracks.positions[row] - place).abs().max() < 2e-3
    assert torch.equal(tracks.positions[0], tracks.positions[3])


@pytest.mark.parametrize(
    "edits",
    [
        (MotionEdit(1.8),),
        (MotionEdit(0.3), MotionEdit(2.0)),
        (MotionEdit(frozen=(LOWER,)), MotionEdit(1.5)),
    ],
)
def test_no_part_of_what_moves_elsewhere_is_skipped(edits) -> None:
    scene = exact_scene(lambda p: p.norm(dim=-1) - 0.35, jump)
    for edit in edits:
        scene = scene.edited(edit)
    assert scene.occupancy.occupied.float().mean() < 0.5
    cameras = fixed_take(3, 20, 20)
    pruned = render_chunked(scene, cameras).opacity
    every = render_chunked(scene, cameras, RenderOptions(prune=False)).opacity
    assert (pruned - every).abs().max() < 0.05
    assert ((pruned > 0.5) == (every > 0.5)).float().mean() > 0.999


def test_edits_add_up() -> None:
    scene = tiny_scene()
    twice = scene.edited(MotionEdit(0.5, (LOWER,))).edited(MotionEdit(0.5, times=(TimeMap(2.0),)))
    assert twice.edit == MotionEdit(0.25, (LOWER,), times=(TimeMap(2.0),))
    with pytest.raises(ValueError, match=r"already has 1.5 times its strength, and 2 times that is 3.* at most"):
        scene.edited(MotionEdit(1.5)).edited(MotionEdit(2.0))
    assert scene.edited(MotionEdit(0.5)).edited(MotionEdit(2.0)).deformation.config.edit is None
    assert scene.edit == MotionEdit()


def test_an_edit_is_kept_in_the_file(tmp_path) -> None:
    mask = torch.zeros(12, 24)
    mask[:, :12] = 1
    edit = MotionEdit(0.5, (LOWER,), (stencil(mask, 0.1),), (TimeMap(2.0, True, ((0.0, 0.5), (1.0, 1.0))),))
    scene = tiny_scene().edited(edit)
    save_scene(tmp_path / "a.safetensors", scene)
    again, _ = load_scene(tmp_path / "a.safetensors")
    assert again.edit == edit
    points, times = torch.rand(50, 3) * 2 - 1, torch.rand(50)
    assert torch.equal(again.density(points, times), scene.density(points, times))
    plain = asdict(CONFIG)
    del plain["deformation"]["edit"]  # as files of before have it
    assert config_from_dict(SceneConfig, json.loads(json.dumps(plain))) == CONFIG
    fresh = scene.with_deformation(CONFIG.deformation, torch.Generator().manual_seed(0))
    assert fresh.edit == MotionEdit()  # a motion trained anew is not the one that was changed


def test_a_mask_freezes_what_lies_behind_its_white() -> None:
    mask = torch.zeros(40, 60)
    mask[:, :20] = 1  # a third on the left: the camera stands on +x, so y < 0
    moves = stencil(mask, 0.2).moves
    half = 3 * math.tan(math.radians(20))  # of the view's height, at the origin
    y = torch.tensor([-0.9, -0.55, -0.5, -0.4, 0.0, 0.9]) * half
    share = moves(torch.stack((0 * y, y, 0 * y), -1))
    assert share[:2].abs().max() < 0.02 and share[3] > 0.05
    assert (share[4:] - 1).abs().max() < 0.02
    top = torch.zeros(64, 64)
    top[:32] = 1
    above, below = stencil(top, 0.1).moves(torch.tensor([[0.0, 0.3, 0.4], [0.0, 0.3, -0.4]]))
    assert above < 0.01 and below > 0.99
    # nearer to the camera things are seen lower: it looks down
    assert stencil(top, 0.1).moves(torch.tensor([[0.9, 0.0, 0.1]])) > 0.9


def test_what_can_not_be_an_edit_is_refused() -> None:
    nan = float("nan")
    for make, said in [
        (lambda: MotionEdit(2.1), "strength must lie in"),
        (lambda: MotionEdit(nan), "strength must lie in"),
        (lambda: MotionEdit(-0.1), "strength must lie in"),
        (lambda: parse_box("0,0,0,1,1,0"), "lower corner first, got z from 0 to 0"),
        (lambda: parse_box("0,0,0,1,nan,1"), "a box's y must lie in"),
        (lambda: parse_box("0,0,0,1,1"), "six numbers"),
        (lambda: parse_box("a box"), "six numbers"),
        (lambda: Box((0, 0, 0), (1, 1, 1), 0.0), "border must lie in"),
        (lambda: TimeMap(0.0), "speed must lie in"),
        (lambda: TimeMap(nan), "speed must lie in"),
        (lambda: TimeMap(keys=((0.5, 0.0), (0.5, 1.0))), "grow from key to key, got 0.5 before 0.5"),
        (lambda: TimeMap(keys=((0.0, 0.0), (1.0, 1.5))), "times must lie in"),
        (lambda: TimeMap(keys=((0.0, 0.0),)), "number of a remap's keys"),
        (lambda: parse_keys("0:0,1"), "pairs of times out:in"),
        (lambda: parse_keys("0:0,x:1"), "pairs of times out:in"),
        (lambda: stencil(torch.zeros(8, 8)), "the mask is black"),
        (lambda: stencil(torch.full((8, 8), nan)), "no finite numbers"),
        (lambda: stencil(torch.ones(8)), "shape"),
        (lambda: replace(stencil(torch.ones(8, 8)), pixels="AAAA"), f"3 pixels, expected {SIDE**2}"),
        (lambda: replace(stencil(torch.ones(8, 8)), pixels="?"), "no base64"),
        (lambda: tiny_scene().edited(MotionEdit(frozen=(Box((0, 0, 1.5), (1, 1, 2)),))), "lies outside of the scene"),
        (lambda: exact_scene("cube").edited(MotionEdit(0.5)), "doesn't move"),
    ]:
        with pytest.raises(ValueError, match=said.replace("(", r"\(")):
            make()
    assert parse_keys(" ") == () and MotionEdit().in_words() == "nothing"
