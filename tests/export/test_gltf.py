"""Meshes as files: read again by a reader that knows only the specification, and by the Khronos validator."""

from __future__ import annotations

import struct
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from browsers import why_no_module
from exact_scene import exact_scene, jump, sway
from glb import Glb, issues_of

from dream4d_engine.export import ExportOptions, GltfOptions, export_scene, glb_bytes, save_mesh, scene_mesh
from dream4d_engine.export.gltf import y_up
from dream4d_engine.mesh import Mesh, MeshError, vertex_normals
from dream4d_engine.meshes.glb import key_frames
from dream4d_engine.surface import SurfaceOptions


def ball(n: int = 24) -> Mesh:
    """A ball of n x n patches, closed but for its poles."""
    u, v = torch.meshgrid(torch.linspace(0, 2 * torch.pi, n + 1)[:-1], torch.linspace(0.05, 3.09, n), indexing="ij")
    places = torch.stack((u.cos() * v.sin(), u.sin() * v.sin(), v.cos()), -1).reshape(-1, 3) * 0.5
    i, j = (x.reshape(-1) for x in torch.meshgrid(torch.arange(n), torch.arange(n - 1), indexing="ij"))
    a, b, c, d = i * n + j, i * n + j + 1, (i + 1) % n * n + j, (i + 1) % n * n + j + 1
    faces = torch.cat((torch.stack((a, b, c), -1), torch.stack((b, d, c), -1)))
    return Mesh(places, faces, vertex_normals(places, faces), (places + 0.5).clamp(0, 1))


def moving_ball(n_times: int = 9, n: int = 24, bend: float = 0.3) -> Mesh:
    """A ball that rises and bends, and does not come back."""
    mesh, times = ball(n), torch.linspace(0, 1, n_times)
    tracks = torch.stack(
        [
            mesh.vertices
            + torch.stack(
                (bend * t * mesh.vertices[:, 2] ** 2, 0 * mesh.vertices[:, 0], (t**2).expand(len(mesh.vertices))), -1
            )
            for t in times
        ]
    )
    return replace(mesh, vertices=tracks[0], tracks=tracks, times=times)


@pytest.mark.parametrize("quantize", [True, False])
def test_the_places_and_normals_of_each_moment_are_read_again(quantize: bool) -> None:
    mesh = moving_ball()
    data, n_keys = glb_bytes(mesh, GltfOptions(quantize=quantize, error=1e-6, duration=3.0))
    file = Glb(data)
    assert n_keys == 9 and len(file.primitive["targets"]) == 8
    for index, time in enumerate(mesh.times.tolist()):
        assert np.abs(file.at(3 * time) - y_up(mesh.tracks[index]).numpy()).max() < 1e-4
        normals = y_up(vertex_normals(mesh.tracks[index], mesh.faces)).numpy()
        assert np.abs(file.at(3 * time, "NORMAL") - normals).max() < (0.02 if quantize else 1e-5)
    assert (file.read(file.primitive["indices"])[:, 0].reshape(-1, 3) == mesh.faces.numpy()).all()
    assert ("KHR_mesh_quantization" in file.tree["extensionsUsed"]) == quantize
    assert file.tree["meshes"][0]["extras"]["targetNames"][0] == "t=0.125"


def turned_ball(degrees: float, away: float, n_times: int = 5) -> Mesh:
    """A ball that turns about the vertical and goes away."""
    mesh, times = ball(16), torch.linspace(0, 1, n_times)
    a = torch.deg2rad(times * degrees)
    turns = torch.stack((a.cos(), -a.sin(), 0 * a, a.sin(), a.cos(), 0 * a, 0 * a, 0 * a, 0 * a + 1), -1)
    tracks = mesh.vertices @ turns.view(-1, 3, 3).mT + times[:, None, None] * torch.tensor([0.0, away, 0.0])
    return replace(mesh, vertices=tracks[0], tracks=tracks, times=times)


@pytest.mark.parametrize("degrees", [20, 180])
@pytest.mark.parametrize("away", [0.2, 7.0])
def test_weights_stay_where_no_reader_cuts_them_off(degrees: float, away: float) -> None:
    mesh = turned_ball(degrees, away)
    file = Glb(glb_bytes(mesh, GltfOptions(error=1e-6))[0])
    _, weights = file.weights()
    assert 0 < weights.max() <= 1 and weights.min() == 0
    for index, time in enumerate(mesh.times.tolist()):
        assert np.abs(file.at(2 * time) - y_up(mesh.tracks[index]).numpy()).max() < 1e-4
        normals = y_up(vertex_normals(mesh.tracks[index], mesh.faces)).numpy()
        assert np.abs(file.at(2 * time, "NORMAL") - normals).max() < 0.02
    kinds = {file.tree["accessors"][k]["componentType"] for t in file.primitive["targets"] for k in t.values()}
    assert ("KHR_mesh_quantization" in file.tree["extensionsUsed"]) == (kinds != {5126})


def test_up_is_y_and_the_front_is_z() -> None:
    front, left, up = torch.eye(3)
    assert y_up(front).tolist() == [0, 0, 1] and y_up(left).tolist() == [1, 0, 0] and y_up(up).tolist() == [0, 1, 0]


def test_colors_are_linear() -> None:
    file = Glb(glb_bytes(replace(ball(), colors=torch.full((576, 3), 0.5)))[0])
    assert np.abs(file.read(file.primitive["attributes"]["COLOR_0"]) - 0.2140).max() < 1e-3
    assert "KHR_materials_unlit" in file.tree["materials"][0]["extensions"] and "animations" not in file.tree
    lit = Glb(glb_bytes(ball(), GltfOptions(lit=True))[0])
    assert "extensionsUsed" not in lit.tree and "extensions" not in lit.tree["materials"][0]


def test_key_frames_keep_to_the_bound_and_are_few() -> None:
    times = torch.linspace(0, 1, 25)
    tracks = (times * torch.pi).sin()[:, None, None].expand(-1, 10, 3)
    keys = key_frames(tracks, times, 0.02)
    assert keys[0] == 0 and keys[-1] == 24 and 5 <= len(keys) <= 13
    between = np.interp(times, times[keys], tracks[keys, 0, 0])
    assert np.abs(between - tracks[:, 0, 0].numpy()).max() <= 0.02
    straight = times[:, None, None].expand(-1, 10, 3)
    assert key_frames(straight, times, 1e-4) == [0, 24]
    assert key_frames(tracks, times, 1e-9) == list(range(25))


def test_a_motion_that_comes_back_closes_its_loop() -> None:
    mesh = moving_ball(9)
    there = torch.cat((mesh.tracks, mesh.tracks.flip(0)[1:]))
    mesh = replace(mesh, tracks=there, times=torch.linspace(0, 1, 17))
    file = Glb(glb_bytes(mesh)[0])
    seconds, weights = file.weights()
    assert (weights[0] == 0).all() and (weights[-1] == 0).all() and seconds[0] == 0 and seconds[-1] == 2


def test_a_loops_last_key_is_its_first() -> None:
    """A sway that is at none of its ends, nor at rest, where time begins: a loop that the file must close itself."""
    scene = exact_scene("cone", lambda points, times: sway(points, times + 0.1))
    scene.deformation.config = replace(scene.deformation.config, loop=True)
    options = ExportOptions(9, surface=SurfaceOptions(24, 30.0, 600))
    mesh = scene_mesh(scene, options).mesh
    assert torch.equal(mesh.tracks[0], mesh.tracks[-1]) and mesh.times.tolist() == torch.linspace(0, 1, 9).tolist()
    file = Glb(glb_bytes(mesh)[0])
    seconds, weights = file.weights()
    assert np.array_equal(weights[0], weights[-1]) and seconds[-1] == 2
    assert np.array_equal(file.at(0.0), file.at(2.0)) and np.abs(file.at(1.0) - file.at(0.0)).max() > 0.2
    scene.canonical = None  # it is refused before any of the surface is looked at
    with pytest.raises(MeshError, match="first and last moment are one, so 2 moments show nothing"):
        scene_mesh(scene, replace(options, n_times=2))


def test_bouncing_plays_forwards_and_back() -> None:
    file = Glb(glb_bytes(moving_ball(), GltfOptions(bounce=True))[0])
    seconds, weights = file.weights()
    assert seconds[-1] == 4 and (np.diff(seconds) > 0).all() and np.allclose(weights, weights[::-1])


def test_what_does_not_move_is_not_written() -> None:
    mesh = moving_ball(3, 40)
    half = mesh.vertices[:, 2] < 0.4
    tracks = torch.where(half[:, None], mesh.tracks[0], mesh.tracks)
    sparse, whole = (glb_bytes(replace(mesh, tracks=t))[0] for t in (tracks, mesh.tracks))
    assert len(sparse) < 0.75 * len(whole)
    file = Glb(sparse)
    assert any("sparse" in entry for entry in file.tree["accessors"])
    assert np.abs(file.at(2.0) - y_up(tracks[-1]).numpy()).max() < 1e-4
    still = Glb(glb_bytes(replace(mesh, tracks=mesh.tracks[:1].expand(3, -1, -1)))[0])
    assert "animations" not in still.tree and "targets" not in still.primitive


def test_24_moments_of_30000_vertices_stay_small() -> None:
    mesh = moving_ball(24, 174)
    assert len(mesh.vertices) > 30_000
    for quantize, most in ((True, 11e6), (False, 20e6)):
        data, n_keys = glb_bytes(mesh, GltfOptions(error=1e-6, quantize=quantize))
        assert n_keys == 24 and len(data) < most


def test_seams_of_a_texture_have_one_normal() -> None:
    mesh = ball(12)
    order = torch.cat((torch.arange(len(mesh.vertices)), torch.tensor([30, 31, 32])))
    doubled = mesh.vertices[order]
    faces = mesh.faces.clone()
    faces[:40] = torch.where(faces[:40] == 30, len(mesh.vertices), faces[:40])
    normals = vertex_normals(doubled, faces)
    assert torch.equal(normals[30], normals[len(mesh.vertices)])
    assert torch.allclose(normals[30], mesh.normals[30], atol=1e-5)


@pytest.mark.parametrize("form", ["obj", "ply", "stl"])
def test_still_formats_hold_the_mesh(tmp_path, form: str) -> None:
    mesh, path = ball(8), tmp_path / f"ball.{form}"
    save_mesh(path, mesh, form)
    data = path.read_bytes()
    if form == "obj":
        lines = [line.split() for line in data.decode().splitlines()]
        places = np.array([line[1:7] for line in lines if line[0] == "v"], float)
        faces = np.array([[corner.split("/")[0] for corner in line[1:]] for line in lines if line[0] == "f"], int) - 1
        assert np.abs(places[:, :3] - y_up(mesh.vertices).numpy()).max() < 1e-5
        assert np.abs(places[:, 3:] - mesh.colors.numpy()).max() < 1e-3
    elif form == "ply":
        header, body = data.split(b"end_header\n", 1)
        assert b"element vertex 64" in header and b"property uchar red" in header
        rows = np.frombuffer(body[: 64 * 27], np.dtype([("place", "<f4", 6), ("color", "u1", 3)]))
        assert np.allclose(rows["place"][:, :3], mesh.vertices.numpy())
        faces = np.frombuffer(body[64 * 27 :], np.dtype([("n", "u1"), ("at", "<i4", 3)]))["at"]
    else:
        n = struct.unpack_from("<I", data, 80)[0]
        rows = np.frombuffer(data[84:], np.dtype([("normal", "<f4", 3), ("at", "<f4", (3, 3)), ("end", "<u2")]))
        assert n == len(rows) == len(mesh.faces) and np.allclose(rows["at"], mesh.vertices[mesh.faces].numpy())
        return
    assert (faces == mesh.faces.numpy()).all()


def test_a_texture_goes_along(tmp_path) -> None:
    mesh = ball(8)
    mesh = replace(
        mesh, colors=None, uv=torch.rand(64, 2, generator=torch.Generator().manual_seed(0)), texture=torch.ones(4, 4, 3)
    )
    file = Glb(glb_bytes(mesh)[0])
    assert file.view(file.tree["images"][0]["bufferView"])[0].startswith(b"\x89PNG")
    assert np.allclose(file.read(file.primitive["attributes"]["TEXCOORD_0"]), mesh.uv.numpy())
    save_mesh(tmp_path / "ball.obj", mesh, "obj")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ball.mtl", "ball.obj", "ball.png"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vertices": torch.zeros(3, 2)}, "vertices must have the shape"),
        ({"vertices": torch.full((576, 3), torch.nan)}, "vertices must be finite"),
        ({"faces": torch.tensor([[0, 1, 576]])}, "faces must name vertices 0 to 575"),
        ({"tracks": torch.zeros(2, 576, 3)}, "times must have the shape"),
        ({"colors": torch.zeros(5, 3)}, "colors must have the shape"),
    ],
)
def test_meshes_that_are_none(change: dict, said: str) -> None:
    with pytest.raises(MeshError, match=said):
        replace(ball(), **change)


def test_a_mesh_without_faces_is_refused() -> None:
    with pytest.raises(MeshError, match="without faces"):
        glb_bytes(replace(ball(), faces=torch.zeros(0, 3, dtype=torch.int64)))


# ---- from a scene ------------------------------------------------------------------------------------------------

SMALL = ExportOptions(n_times=7, surface=SurfaceOptions(resolution=40, n_faces=1500))


@pytest.fixture
def libraries() -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    pytest.importorskip("fast_simplification", reason="fast-simplification is not installed")


@pytest.mark.usefixtures("libraries")
def test_a_moving_scene_becomes_a_moving_mesh(tmp_path) -> None:
    shares: list[float] = []
    report = export_scene(exact_scene("cube", jump), tmp_path / "cube.glb", SMALL, on_progress=shares.append)
    file = Glb((tmp_path / "cube.glb").read_bytes())
    assert report.n_keys >= 3 and report.n_bytes == (tmp_path / "cube.glb").stat().st_size
    rise = file.at(1.0)[:, 1].mean() - file.at(0.0)[:, 1].mean()
    assert rise == pytest.approx(0.3, abs=0.01)
    assert shares == sorted(shares) and shares[-1] == 1.0


@pytest.mark.usefixtures("libraries")
def test_one_moment_of_a_moving_scene(tmp_path) -> None:
    options = replace(SMALL, time=0.5)
    export_scene(exact_scene("cube", jump), tmp_path / "cube.stl", options)
    rows = np.frombuffer(
        (tmp_path / "cube.stl").read_bytes()[84:], np.dtype([("n", "<f4", 3), ("at", "<f4", (3, 3)), ("e", "<u2")])
    )
    assert rows["at"][..., 2].min() == pytest.approx(-0.15, abs=0.03) and rows["at"][..., 2].max() == pytest.approx(
        0.75, abs=0.03
    )


@pytest.mark.usefixtures("libraries")
def test_a_still_scene_has_no_animation(tmp_path) -> None:
    report = export_scene(exact_scene("cone"), tmp_path / "cone.glb", SMALL)
    assert report.n_keys == 0 and report.made.tracks is None
    assert "animations" not in Glb((tmp_path / "cone.glb").read_bytes()).tree


@pytest.mark.usefixtures("libraries")
def test_a_texture_of_a_moving_scene(tmp_path) -> None:
    pytest.importorskip("xatlas", reason="xatlas is not installed")
    report = export_scene(exact_scene("sphere", sway), tmp_path / "ball.glb", replace(SMALL, texture=64))
    mesh = report.made.mesh
    assert mesh.texture.shape == (64, 64, 3) and len(mesh.vertices) > len(report.made.surface.mesh.vertices)
    _, same = torch.unique(mesh.vertices, dim=0, return_inverse=True)  # the seams stay closed in all moments
    for places in mesh.tracks:
        first = torch.zeros(int(same.max()) + 1, 3).index_copy(0, same, places)
        assert torch.equal(first[same], places)


@pytest.mark.parametrize(
    ("module", "said", "options"),
    [
        ("xatlas", "textures need xatlas", replace(SMALL, texture=64)),
        ("fast_simplification", "fewer faces need fast-simplification", SMALL),
        ("skimage.measure", "meshes need scikit-image", SMALL),
    ],
)
def test_a_missing_library_is_named_before_the_work(tmp_path, monkeypatch, module, said, options) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    shares: list[float] = []
    with pytest.raises(MeshError, match=rf"{said}: pip install \"dream4d\[mesh\]\""):
        export_scene(exact_scene("cube"), tmp_path / "cube.glb", options, on_progress=shares.append)
    assert not shares, "the surface was not looked for"


def test_a_name_without_a_format_is_refused(tmp_path) -> None:
    with pytest.raises(MeshError, match="glb, obj, ply, stl"):
        export_scene(exact_scene("cube"), tmp_path / "cube.fbx", SMALL)


@pytest.mark.parametrize("change", [{"n_times": 0}, {"time": 1.5}, {"texture": 3}])
def test_options_out_of_range(change: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} must lie in"):
        ExportOptions(**change)


# ---- judged by others --------------------------------------------------------------------------------------------


def test_the_validator_has_nothing_to_say(tmp_path) -> None:
    if reason := why_no_module("gltf-validator"):
        pytest.skip(reason)
    moving, big = moving_ball(), moving_ball(3, 260)
    half = replace(moving, tracks=torch.where(moving.vertices[:, 2:] < 0.4, moving.tracks[0], moving.tracks))
    uv = torch.rand(576, 2, generator=torch.Generator().manual_seed(0))
    meshes = {"still": ball(), "moving": moving, "sparse": half, "indices of 32 bits": big}
    meshes |= {"turned": turned_ball(180, 0.2), "far": turned_ball(20, 7.0), "far and turned": turned_ball(180, 7.0)}
    meshes["texture"] = replace(
        moving, colors=None, uv=uv, texture=torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(1))
    )
    for name, mesh in meshes.items():
        for options in (GltfOptions(), GltfOptions(quantize=False, lit=True, bounce=True)):
            path = tmp_path / f"{name}.glb"
            path.write_bytes(glb_bytes(mesh, options)[0])
            issues = issues_of(path)
            assert issues["numErrors"] == issues["numWarnings"] == 0, (name, issues["messages"])
