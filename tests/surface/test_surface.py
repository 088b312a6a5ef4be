"""Surfaces of scenes known in closed form: where they lie, what they look like, and what is said of those without."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch
from exact_scene import BOTTOM, DENSEST, GRID, TOP, ExactMotion, exact_scene, jump, stretch, sway, turn

from dream4d_engine.fields.deformation import DeformationConfig
from dream4d_engine.fields.radiance import RadianceConfig
from dream4d_engine.mesh import MeshError, edges_of, face_normals, rasterize
from dream4d_engine.rendering import render_chunked
from dream4d_engine.scene import SceneConfig, build_scene
from dream4d_engine.surface import SurfaceOptions, bake_texture, extract_surface, track_vertices, tracks
from dream4d_engine.surface.silhouettes import find_threshold, silhouette_cameras
from dream4d_engine.toyworld.shapes import SHAPE_MODELS, surface_normals

pytest.importorskip("skimage", reason="scikit-image is not installed")
pytest.importorskip("fast_simplification", reason="fast-simplification is not installed")
QUICK = SurfaceOptions(resolution=48, n_faces=5000)


def silhouette_iou(scene, vertices, faces, time: float, size: int = 64) -> float:
    """Of a mesh with what the renderer shows, over all views together."""
    cameras = silhouette_cameras(scene, time, size)
    solid = render_chunked(scene, cameras).opacity[0, ..., 0] > 0.5
    shared = union = 0
    for view in range(cameras.shape[1]):
        c2w, focal = cameras.c2w[0, view], 0.5 * size / torch.tan(cameras.fov_y[0, view] / 2)
        local = (vertices - c2w[:3, 3]) @ c2w[:3, :3]
        depth = -local[:, 2]
        corners = torch.stack(
            (size / 2 + focal * local[:, 0] / depth, size / 2 - focal * local[:, 1] / depth, depth), -1
        )
        shown = rasterize(corners, faces, size, size).face >= 0
        shared, union = shared + int((shown & solid[view]).sum()), union + int((shown | solid[view]).sum())
    return shared / union


def true_points(name: str, n: int = 4000) -> torch.Tensor:
    """Points of a toy shape's true surface."""
    shape, generator = SHAPE_MODELS[name], torch.Generator().manual_seed(0)
    points = (torch.rand(n, 3, generator=generator) * 2 - 1) * shape.bound
    for _ in range(30):
        points = points - shape.distance(points)[:, None] * surface_normals(shape, points)
    return points[shape.distance(points).abs() < 1e-3]


@pytest.mark.parametrize("name", ["cube", "cone", "torus", "snowman"])
def test_a_surface_lies_where_the_solid_ends(name: str) -> None:
    scene = exact_scene(name)
    found = extract_surface(scene, options=QUICK)
    mesh = found.mesh
    truth = true_points(name)
    size = float((truth.amax(0) - truth.amin(0)).max())
    there = SHAPE_MODELS[name].distance(mesh.vertices).abs().mean() / size
    middles = mesh.vertices[mesh.faces].mean(1)
    back = torch.cdist(truth, torch.cat((mesh.vertices, middles))).amin(1).mean() / size
    assert there < 0.015 and back < 0.02
    assert found.silhouette_iou > 0.96
    assert silhouette_iou(scene, mesh.vertices, mesh.faces, 0.0) > 0.96
    assert len(mesh.faces) <= QUICK.n_faces and not found.notes


def test_faces_look_outwards_and_close() -> None:
    mesh = extract_surface(exact_scene("sphere"), options=QUICK).mesh
    outward = face_normals(mesh.vertices, mesh.faces)
    assert ((outward * mesh.vertices[mesh.faces].mean(1)).sum(-1) > 0).all()
    assert ((mesh.normals * torch.nn.functional.normalize(mesh.vertices, dim=-1)).sum(-1) > 0.95).all()
    assert len(mesh.vertices) - len(edges_of(mesh.faces)) + len(mesh.faces) == 2  # Euler's number of a sphere


def test_a_ring_keeps_its_hole() -> None:
    mesh = extract_surface(exact_scene("torus"), options=QUICK).mesh
    assert len(mesh.vertices) - len(edges_of(mesh.faces)) + len(mesh.faces) == 0


def test_the_threshold_is_the_one_with_the_best_silhouettes() -> None:
    scene = exact_scene("cube")
    threshold, iou = find_threshold(scene, 0.0)
    ious = []
    for other in (threshold / 30, threshold, 0.995 * DENSEST):
        mesh = extract_surface(scene, 0.0, replace(QUICK, threshold=other, smoothing=0)).mesh
        ious.append(silhouette_iou(scene, mesh.vertices, mesh.faces, 0.0))
    assert max(ious) == ious[1] and abs(ious[1] - iou) < 0.04


def test_a_radius_other_than_one() -> None:
    scene = exact_scene(lambda points: points.norm(dim=-1) - 1.2, radius=2.0)
    mesh = extract_surface(scene, options=QUICK).mesh
    assert (mesh.vertices.norm(dim=-1) - 1.2).abs().max() < 0.05


def test_colors_are_those_that_are_seen() -> None:
    scene = exact_scene("sphere")
    mesh = extract_surface(scene, options=QUICK).mesh
    clear = mesh.vertices[:, 2].abs() > 0.1
    expected = torch.where(mesh.vertices[:, 2:] > 0, torch.tensor(TOP), torch.tensor(BOTTOM))
    assert (mesh.colors - expected)[clear].abs().max() < 0.02


def test_caves_and_specks_are_left_out() -> None:
    def hollow(points):  # a shell around a hollow, and a ball of a tenth of its size beside it
        shell = torch.maximum(points.norm(dim=-1) - 0.5, 0.3 - points.norm(dim=-1))
        return torch.minimum(shell, (points - torch.tensor([0.0, 0.7, 0.0])).norm(dim=-1) - 0.05)

    found = extract_surface(exact_scene(hollow), options=QUICK)
    assert (found.mesh.vertices.norm(dim=-1) - 0.5).abs().max() < 0.03
    assert any("speck" in note for note in found.notes)
    kept = extract_surface(exact_scene(hollow), options=replace(QUICK, keep_specks=True)).mesh
    assert kept.vertices[:, 1].max() > 0.7


def test_what_is_cut_off_is_said_and_closed() -> None:
    found = extract_surface(exact_scene(lambda points: (points - 0.7).norm(dim=-1) - 0.5), options=QUICK)
    assert any("cut off" in note for note in found.notes)
    sides = edges_of(found.mesh.faces)
    assert len(found.mesh.vertices) - len(sides) + len(found.mesh.faces) == 2


@pytest.mark.parametrize(
    ("distance", "said"),
    [
        (lambda points: points[:, 0] * 0 + 9.0, "empty"),
        (lambda points: points[:, 0] * 0 - 9.0, "fills its box"),
        (lambda points: points[:, 0] * torch.nan, "not a finite number"),
    ],
)
def test_fields_without_a_surface(distance, said: str) -> None:
    scene = exact_scene(distance)
    scene.occupancy.occupied.fill_(True)
    for options in (QUICK, replace(QUICK, threshold=8.0)):
        with pytest.raises(MeshError, match=said):
            extract_surface(scene, options=options)


def test_a_missing_library_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.measure", None)
    with pytest.raises(MeshError, match=r"dream4d\[mesh\]"):
        extract_surface(exact_scene("sphere"), options=replace(QUICK, threshold=8.0))


def test_progress_goes_up_to_one() -> None:
    shares: list[float] = []
    extract_surface(exact_scene("sphere"), options=QUICK, on_progress=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_a_baked_texture_shows_the_field() -> None:
    pytest.importorskip("xatlas", reason="xatlas is not installed")
    scene = exact_scene("sphere")
    mesh = extract_surface(scene, options=replace(QUICK, n_faces=1000)).mesh
    baked, origin = bake_texture(scene, None, mesh, 256)
    assert torch.equal(baked.vertices, mesh.vertices[origin]) and baked.colors is None
    assert baked.uv.min() >= 0 and baked.uv.max() <= 1
    middles = baked.faces[baked.vertices[baked.faces][..., 2].abs().amin(1) > 0.1]
    place = (baked.uv[middles].mean(1) * 256).long()
    expected = torch.where(baked.vertices[middles].mean(1)[:, 2:] > 0, torch.tensor(TOP), torch.tensor(BOTTOM))
    assert (baked.texture[place[:, 1], place[:, 0]] - expected).abs().max() < 0.05


# ---- tracks ------------------------------------------------------------------------------------------------------


def jumped(places, time):
    return places + torch.tensor([0.0, 0.0, 0.3]) * math.sin(math.pi * time)


def swayed(places, time):
    lean = 0.4 * (places[:, 2] + 0.5) * math.sin(2 * math.pi * time)
    return places + torch.stack((lean * 0, lean, lean * 0), -1)


def stretched(places, time):
    tall = 1 + 0.4 * math.sin(2 * math.pi * time)
    return places * torch.tensor([tall**-0.5, tall**-0.5, tall])


FORWARD = {jump: jumped, sway: swayed, stretch: stretched}


@pytest.mark.parametrize(("motion", "scale"), [(jump, 1.0), (sway, 1.3), (stretch, 0.8)])
def test_vertices_go_where_the_motion_takes_them(motion, scale: float) -> None:
    scene = exact_scene("cone", motion, scale=scale)
    mesh = extract_surface(scene, options=replace(QUICK, n_faces=1500, colors=False)).mesh
    times = torch.linspace(0, 1, 9)
    tracks = track_vertices(scene, mesh.vertices, mesh.faces, times)
    truth = torch.stack([FORWARD[motion](mesh.vertices, t) for t in times.tolist()])
    off = (tracks.positions - truth).norm(dim=-1)
    assert off.mean() < 1e-3 and off.max() < 0.01
    assert tracks.unconverged == 0 and tracks.residual.max() < 5e-3


def test_a_moved_surface_has_the_renderers_silhouettes() -> None:
    scene = exact_scene("cube", turn)
    mesh = extract_surface(scene, options=QUICK).mesh
    times = torch.tensor([0.0, 0.2, 0.7])
    tracks = track_vertices(scene, mesh.vertices, mesh.faces, times)
    for place, time in zip(tracks.positions, times.tolist(), strict=True):
        assert silhouette_iou(scene, place, mesh.faces, time) > 0.96


def test_what_has_no_inverse_is_carried_and_counted() -> None:
    def torn(points, times):  # nothing comes from |x| < 0.1 at the end: a strip there is never looked up
        gap = 0.1 * times * torch.where(points[:, 0] > 0, 1.0, -1.0)
        return points + torch.stack((gap, gap * 0, gap * 0), -1)

    scene = exact_scene("sphere", torn)
    mesh = extract_surface(scene, options=replace(QUICK, n_faces=2000)).mesh
    tracks = track_vertices(scene, mesh.vertices, mesh.faces, torch.linspace(0, 1, 9))
    last, strip = tracks.positions[-1], mesh.vertices[:, 0].abs() < 0.08
    assert tracks.carried[-1][strip].all() and not tracks.carried[-1][mesh.vertices[:, 0].abs() > 0.12].any()
    assert 0 < tracks.unconverged < 0.3
    assert last.isfinite().all() and (last[strip, 0].abs() < 0.1).all()  # they stayed between their neighbours
    assert (last - mesh.vertices).norm(dim=-1).max() < 0.15


def test_a_vertex_that_was_carried_to_a_wrong_place_comes_back() -> None:
    def holed(points, times):  # nothing comes from within 0.12 of the origin
        off = points.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        return points / off * off.clamp_min(0.12)

    ticks = torch.linspace(-0.5, 0.5, 21)
    sheet = torch.cartesian_prod(ticks, ticks, torch.zeros(1))
    at = torch.arange(21 * 21).view(21, 21)
    edges = torch.cat(
        (torch.stack((at[1:], at[:-1]), -1).view(-1, 2), torch.stack((at[:, 1:], at[:, :-1]), -1).view(-1, 2))
    )
    rest, middle = (sheet + 1) / 2, int(at[10, 10])
    before = rest.clone()
    before[middle, 2] += 0.2  # of the box: a spike
    warp = tracks._Warp(ExactMotion(holed, 1.0, 1.0), None, 0.0, tracks.Precision())
    places, _, carried = tracks._solve(warp, rest, before, rest, torch.cat((edges, edges.flip(-1))))
    assert carried[middle] and not carried[sheet.norm(dim=-1) > 0.13].any()
    assert (places - rest).norm(dim=-1).max() < 0.03  # a cell is 0.025


def test_a_still_scene_stays() -> None:
    scene = exact_scene("sphere")
    mesh = extract_surface(scene, options=replace(QUICK, n_faces=500)).mesh
    tracks = track_vertices(scene, mesh.vertices, mesh.faces, torch.linspace(0, 1, 3))
    assert torch.equal(tracks.positions, mesh.vertices.expand(3, -1, -1)) and tracks.unconverged == 0


def test_tracking_tells_its_progress_and_can_be_stopped() -> None:
    scene = exact_scene("sphere", jump)
    mesh = extract_surface(scene, options=replace(QUICK, n_faces=500)).mesh
    shares: list[float] = []
    track_vertices(scene, mesh.vertices, mesh.faces, torch.linspace(0, 1, 4), shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]

    def stop(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        track_vertices(scene, mesh.vertices, mesh.faces, torch.linspace(0, 1, 4), stop)


def test_scenes_that_were_made_in_inference_mode_are_followed_too() -> None:
    config = SceneConfig(radiance=RadianceConfig(GRID, hidden_width=8), occupancy_resolution=8, n_samples=32)
    with torch.inference_mode():
        scene = build_scene(config, torch.Generator().manual_seed(0))
        scene = scene.with_deformation(DeformationConfig(GRID, 8, 1), torch.Generator().manual_seed(1))
        scene.deformation.mlp.layers[-1].fill_(0.05)
        mesh = extract_surface(scene, options=replace(QUICK, n_faces=500, colors=False)).mesh
        tracks = track_vertices(scene, mesh.vertices, mesh.faces, torch.linspace(0, 1, 2))
    assert tracks.unconverged == 0 and tracks.residual.max() < 5e-3


def test_faces_that_are_too_few_are_said_to_be() -> None:
    with pytest.raises(MeshError, match=r"1 faces are too few: none of the surface's [\d,]+ is left; ask for more"):
        extract_surface(exact_scene("sphere"), options=replace(QUICK, n_faces=1, colors=False))
