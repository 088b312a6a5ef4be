"""A mesh's own vertices over time, against motions that are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from exact_scene import exact_scene, jump, sway, turn

from dream4d_engine.fields.edit import MotionEdit
from dream4d_engine.mesh import MeshError
from dream4d_engine.meshes import Model, model_from_tensors, place
from dream4d_engine.surface import own, track_own_vertices

TIMES = torch.linspace(0, 1, 5)


def swayed(points: torch.Tensor, time: float) -> torch.Tensor:
    """What `sway` is the inverse of."""
    lean = 0.4 * (points[:, 2] + 0.5) * math.sin(2 * math.pi * time)
    return points + torch.stack((lean * 0, lean, lean * 0), -1)


def cube(seams: bool = False) -> Model:
    """Of eight vertices, or of four a side."""
    corners = torch.tensor([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)]).float() * 100 + 7
    quads = torch.tensor([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    if seams:
        corners, quads = corners[quads.flatten()], torch.arange(24).view(6, 4)
    return model_from_tensors(corners, torch.cat((quads[:, :3], quads[:, [0, 2, 3]])))


@pytest.fixture(autouse=True)
def rough(monkeypatch) -> None:
    """Refined less than usual: the motions here are affine, or are compared with what that gives."""
    monkeypatch.setattr(own, "_LONGEST", 0.2)


@pytest.mark.parametrize("scale", [0.8, 1.2])
def test_the_zoom_is_taken_out(scale: float) -> None:
    model = cube()
    placement = place(model, "y", "+z", size=0.4)  # in the zoomed frame it doesn't leave the box
    scene = exact_scene("cube", lambda points, times: sway(points / scale, times), scale=scale)
    shares: list[float] = []
    tracks = track_own_vertices(scene, model, placement, TIMES, shares.append)
    assert tracks.positions.shape == (5, 8, 3) and tracks.unconverged == 0 and tracks.notes == ()
    start = placement.to_world(model.mesh.vertices)
    for positions, time in zip(tracks.positions, TIMES.tolist(), strict=True):
        assert (placement.to_world(positions) - swayed(start, time)).norm(dim=-1).max() < 0.004
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert tracks.positions[0] == pytest.approx(model.mesh.vertices, abs=0.2)  # in the file's units


def test_what_leaves_the_box_is_said() -> None:
    """As of the scene's own surface: at twice the strength a jump goes through the box's top."""
    model, scene = cube(), exact_scene("cube", jump)
    for strength, leaves in ((2.0, True), (1.0, False)):
        tracks = track_own_vertices(scene.edited(MotionEdit(strength)), model, place(model, size=0.55), TIMES)
        assert (tracks.outside > 0.1) == leaves == ("the vertices' places in time lie outside of" in str(tracks.notes))


def test_cuts_stay_closed() -> None:
    model = cube(seams=True)
    scene = exact_scene("cube", turn)
    tracks = track_own_vertices(scene, model, place(model), TIMES)
    assert tracks.followed == 8
    _, same = torch.unique(model.mesh.vertices, dim=0, return_inverse=True)
    for positions in tracks.positions:
        first = torch.zeros(8, 3).index_copy(0, same, positions)
        assert torch.equal(first[same], positions)


def test_places_that_are_nearly_one_are_one() -> None:
    points = torch.tensor([[0.5, 0.5, 0.5], [0.5 + 2e-6, 0.5, 0.5 - 2e-6], [0.1, 0.2, 0.3], [0.5, 0.5001, 0.5]])
    for shift in (0.0, 0.3e-5, 0.5e-5, 0.77e-5):  # wherever the cells' borders are
        found, of = own._distinct(points + shift, 1e-5)
        assert len(found) == 3 and of[0] == of[1] and of[2] != of[0] != of[3]


def test_a_fine_mesh_goes_along(monkeypatch) -> None:
    monkeypatch.setattr(own, "_MOST", 500)
    n = 60
    u, v = torch.meshgrid(torch.linspace(0, 2 * math.pi, n + 1)[:-1], torch.linspace(0.02, 3.12, n), indexing="ij")
    places = torch.stack((u.cos() * v.sin(), u.sin() * v.sin(), v.cos()), -1).reshape(-1, 3)
    i, j = (x.reshape(-1) for x in torch.meshgrid(torch.arange(n), torch.arange(n - 1), indexing="ij"))
    a, b, c, d = i * n + j, i * n + j + 1, (i + 1) % n * n + j, (i + 1) % n * n + j + 1
    model = model_from_tensors(places, torch.cat((torch.stack((a, b, c), -1), torch.stack((b, d, c), -1))))
    placement = place(model, "z")
    tracks = track_own_vertices(exact_scene("sphere", sway), model, placement, TIMES)
    assert tracks.followed <= 500 < len(places)
    start = placement.to_world(places)
    for positions, time in zip(tracks.positions, TIMES.tolist(), strict=True):
        off = (placement.to_world(positions) - swayed(start, time)).norm(dim=-1)
        assert off.max() < 0.01 and off.mean() < 0.002  # of a motion of up to 0.4, in cells of 0.07


def twisted_back(points: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """The inverse of a turn by 4 z sin(pi t)."""
    angle = -4 * points[:, 2] * torch.sin(math.pi * times)
    x, y, z = points.unbind(-1)
    return torch.stack((angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y, z), -1)


def test_a_coarse_mesh_is_not_blurred(monkeypatch) -> None:
    off = []
    for longest in (9.0, 0.1):
        monkeypatch.setattr(own, "_LONGEST", longest)
        model = cube()
        placement = place(model)
        tracks = track_own_vertices(exact_scene("cube", twisted_back), model, placement, TIMES)
        start = placement.to_world(model.mesh.vertices)
        middle = twisted_back(start, torch.full((8,), -0.5))  # the turn itself: the other way around
        off.append(float((placement.to_world(tracks.positions[2]) - middle).norm(dim=-1).max()))
    assert off[1] < 0.04 < 3 * off[1] < off[0]


def test_a_still_scene_has_no_motion_to_give() -> None:
    with pytest.raises(MeshError, match="animate it first"):
        track_own_vertices(exact_scene("cube"), cube(), place(cube()), TIMES)


def test_vertices_that_no_face_names_stay() -> None:
    model, scene = cube(), exact_scene("cube", sway)
    far = torch.tensor([[1e6, 0.0, 0.0]])
    more = model_from_tensors(torch.cat((far, model.mesh.vertices)), model.mesh.faces + 1)
    assert place(more) == place(model)
    tracks, plain = (track_own_vertices(scene, one, place(model), TIMES) for one in (more, model))
    assert torch.equal(tracks.positions[:, 1:], plain.positions) and tracks.unconverged == plain.unconverged
    assert torch.equal(tracks.positions[:, :1], far.expand(5, 1, 3))
