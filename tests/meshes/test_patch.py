"""Motion in the user's own file: read back by the reader that poses are tested with, and by the Khronos validator."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from browsers import HERE, find_browser, why_no_browser, why_no_module
from gltf_files import ASSETS, SQUARE, Builder, arm, parsed, png
from PIL import Image

from dream4d_engine.cameras import make_cameras
from dream4d_engine.mesh import MeshError
from dream4d_engine.meshes import GltfOptions, Model, model_from_tensors, moving_glb, place, read_model
from dream4d_engine.meshes.look import look_at, surface_of

TIMES = torch.linspace(0, 1, 9)
EXACT = GltfOptions(error=1e-6, quantize=False)


def bent(model: Model, times: torch.Tensor = TIMES, start: float = 0.0) -> torch.Tensor:
    """Tracks that bend a model more and more, a function of place alone."""
    places = model.mesh.vertices
    middle, size = places.mean(0), model.mesh.size
    tracks = []
    for t in times.tolist():
        p = (places - middle) / size
        angle = (t + start) * (0.8 * p[:, 0] + 0.5)
        x = angle.cos() * p[:, 0] - angle.sin() * p[:, 1]
        y = angle.sin() * p[:, 0] + angle.cos() * p[:, 1]
        tracks.append(torch.stack((x, y, p[:, 2] + 0.2 * t * p[:, 0] ** 2), -1) * size + middle)
    return torch.stack(tracks)


def read_back(path: Path, data: bytes, seconds: float) -> Model:
    path.write_bytes(data)
    return read_model(path, "dream4d", seconds)


def validated(path: Path) -> dict:
    if reason := why_no_module("gltf-validator"):
        pytest.skip(reason)
    done = subprocess.run(["node", HERE / "validate.mjs", path], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def rich(lines_too: bool = True) -> Builder:
    """Nodes that turn, mirror and scale; a mesh shown twice; an own target; lines; a texture; a camera."""
    b = Builder()
    uv = b.add([[0, 0], [1, 0], [1, 1], [0, 1]])
    box = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 2)], "f4")
    sides = [0, 1, 3, 0, 3, 2, 4, 6, 7, 4, 7, 5, 0, 4, 5, 0, 5, 1, 2, 3, 7, 2, 7, 6, 0, 2, 6, 0, 6, 4, 1, 5, 7, 1, 7, 3]
    first = b.mesh(normals=True, TEXCOORD_0=uv) | {"material": 0}
    lines = {"attributes": {"POSITION": first["attributes"]["POSITION"]}, "mode": 3}
    target = b.add([[0, 0, 1]] * 4, bounds=True)
    for primitive in (first, lines):
        primitive["targets"] = [{"POSITION": target}]
    image = b.view(png((200, 100, 50)))
    return b.scene(
        {"mesh": 0, "rotation": [0, 0.6, 0, 0.8], "scale": [40, 20, -30], "children": [1], "weights": [0.5]},
        {"mesh": 1, "translation": [1, 2, 3], "name": "inner"},
        {"mesh": 1, "scale": [0.01, 0.02, 0.01], "translation": [0, 50, 0]},
        {"camera": 0},
        meshes=[
            {"primitives": [first, lines][: 1 + lines_too], "weights": [0.0], "extras": {"targetNames": ["up"]}},
            {"primitives": [b.mesh(box, sides) | {"material": 1}]},
        ],
        materials=[
            {
                "name": "paint",
                "pbrMetallicRoughness": {"baseColorTexture": {"index": 0}},
                "doubleSided": True,
                "extras": {"a": 1},
            },
            {"doubleSided": True},
        ],
        images=[{"bufferView": image, "mimeType": "image/png"}],
        textures=[{"source": 0, "sampler": 0}],
        samplers=[{"wrapS": 33071}],
        cameras=[{"type": "perspective", "perspective": {"yfov": 1.0, "znear": 0.1}}],
    )


@pytest.mark.parametrize("quantize", [True, False])
def test_the_motion_is_read_again(tmp_path, quantize: bool) -> None:
    model = read_model(rich().save(tmp_path / "a.glb"))
    tracks = bent(model, start=0.3)  # at the first moment it is somewhere else already
    made = moving_glb(model, tracks, TIMES, GltfOptions(error=1e-5, quantize=quantize, duration=4.0))
    assert made.n_keys == 9
    for k in (0, 3, 8):
        again = read_back(tmp_path / "moving.glb", made.data, 4 * float(TIMES[k]))
        assert (again.mesh.vertices - tracks[k]).abs().max() < 3e-5 * model.mesh.size
        assert torch.equal(again.mesh.faces, model.mesh.faces) and torch.equal(again.mesh.uv, model.mesh.uv)
    # at rest it is what it was
    assert torch.allclose(read_model(tmp_path / "moving.glb").mesh.vertices, model.mesh.vertices)
    issues = validated(tmp_path / "moving.glb")
    assert issues["numErrors"] == issues["numWarnings"] == 0, issues["messages"]


def test_between_key_frames_the_bound_holds_for_every_vertex(tmp_path) -> None:
    model = read_model(rich().save(tmp_path / "a.glb"))
    tracks, times = bent(model, torch.linspace(0, 1, 25)), torch.linspace(0, 1, 25)
    made = moving_glb(model, tracks, times, GltfOptions(error=0.01))
    assert made.n_keys < 25
    worst = 0.0
    for k in range(25):
        again = read_back(tmp_path / "moving.glb", made.data, 2 * float(times[k]))
        worst = max(worst, float((again.mesh.vertices - tracks[k]).norm(dim=-1).max()))
    assert 0.001 < worst / model.mesh.size < 0.0101


def test_all_that_was_there_stays(tmp_path) -> None:
    path = rich().save(tmp_path / "a.glb")
    model = read_model(path)
    tree, data = parsed(path.read_bytes())
    moved, more = parsed(moving_glb(model, bent(model), TIMES).data)
    n = tree["buffers"][0]["byteLength"]
    assert more[:n] == data[:n]
    for kind in ("materials", "images", "textures", "samplers", "cameras", "scenes", "asset"):
        assert moved[kind] == tree[kind]
    for kind in ("bufferViews", "accessors"):
        assert moved[kind][: len(tree[kind])] == tree[kind]
    for before, after in zip(tree["nodes"], moved["nodes"], strict=True):
        assert {k: v for k, v in before.items() if k not in ("mesh", "weights")}.items() <= after.items()
    first, own = moved["meshes"][0]["primitives"][0], tree["meshes"][0]["primitives"][0]
    assert first["attributes"] == own["attributes"] and first["targets"][0] == own["targets"][0]
    assert moved["meshes"][0]["weights"][0] == 0.5 and moved["meshes"][0]["extras"]["targetNames"][0] == "up"
    assert {node["mesh"] for node in moved["nodes"] if "mesh" in node} == {0, 1, 2}  # each of two moves on its own


def test_a_still_part_is_left_alone(tmp_path) -> None:
    model = read_model(rich().save(tmp_path / "a.glb"))
    tracks = model.mesh.vertices.expand(9, -1, -1).clone()
    part = model.parts[1]
    tracks[:, part.first : part.first + part.count, 1] += 5 * TIMES[:, None]
    tree, _ = parsed(moving_glb(model, tracks, TIMES).data)
    assert [channel["target"]["node"] for channel in tree["animations"][0]["channels"]] == [1]
    made = moving_glb(model, tracks[:1].expand(9, -1, -1), TIMES)
    assert made.n_keys == 0 and "animations" not in parsed(made.data)[0]


def test_normals_turn_with_the_surface(tmp_path) -> None:
    b = Builder()
    b.scene({"mesh": 0, "scale": [100, 100, 100]}, meshes=[{"primitives": [b.mesh(normals=True)]}])
    model = read_model(b.save(tmp_path / "a.glb"))
    angle = TIMES * 1.2
    x, y, _ = model.mesh.vertices.unbind(-1)
    tracks = torch.stack([torch.stack((a.cos() * x, y, a.sin() * x), -1) for a in angle])
    for quantize in (True, False):
        made = moving_glb(model, tracks, TIMES, GltfOptions(error=1e-5, quantize=quantize))
        tree, _ = parsed(made.data)
        primitive = tree["meshes"][0]["primitives"][0]
        (tmp_path / "b.glb").write_bytes(made.data)
        file = read_model(tmp_path / "b.glb", "dream4d", 2.0).file
        turned = file.accessor(primitive["targets"][-1]["NORMAL"], "NORMAL", ("VEC3",))
        sampler = tree["animations"][0]["samplers"][0]
        weights = file.accessor(sampler["output"], "weights", ("SCALAR",)).reshape(9, -1)
        wanted = np.array([-np.sin(1.2), 0, np.cos(1.2)]) - [0, 0, 1]
        assert np.abs(turned * weights[-1, -1] - wanted).max() < 0.01


def test_a_skin_is_left_out_and_its_pose_kept(tmp_path) -> None:
    model = read_model(arm(Builder()).save(tmp_path / "a.glb"), "go", 0.5)
    tracks = bent(model)
    made = moving_glb(model, tracks, TIMES, EXACT)
    for k in (0, 4, 8):
        again = read_back(tmp_path / "moving.glb", made.data, 2 * float(TIMES[k]))
        assert (again.mesh.vertices - tracks[k]).abs().max() < 1e-5
    tree, _ = parsed(made.data)
    assert "skin" not in str(tree["nodes"]) and "mesh" not in tree["nodes"][0] and tree["nodes"][3]["name"] == "arm"
    assert set(tree["meshes"][0]["primitives"][0]["attributes"]) == {"POSITION", "NORMAL"}
    assert torch.allclose(read_model(tmp_path / "moving.glb").mesh.vertices, model.mesh.vertices, atol=1e-6)
    file = read_model(tmp_path / "moving.glb").file
    normals = file.accessor(tree["meshes"][0]["primitives"][0]["attributes"]["NORMAL"], "NORMAL", ("VEC3",))
    assert np.allclose(normals, [0, 0, 1], atol=1e-6)  # it bends in its own plane
    assert any("skin was left out" in note for note in made.notes) and any("(go)" in note for note in made.notes)
    issues = validated(tmp_path / "moving.glb")
    assert issues["numErrors"] == issues["numWarnings"] == 0, issues["messages"]


def test_a_mirrored_skin_keeps_its_outside(tmp_path) -> None:
    b = arm(Builder())
    b.tree["nodes"][1]["scale"] = [1, 1, -1]
    model = read_model(b.save(tmp_path / "a.glb"))
    again = read_back(tmp_path / "moving.glb", moving_glb(model, bent(model), TIMES, EXACT).data, 0.0)
    assert torch.equal(again.mesh.faces, model.mesh.faces)
    assert torch.allclose(again.mesh.vertices, model.mesh.vertices, atol=1e-6)


@pytest.mark.parametrize("embedded", [False, True])
def test_gltf_becomes_glb(tmp_path, embedded: bool) -> None:
    b = rich()
    (tmp_path / "paint.png").write_bytes(png((9, 8, 7)))
    b.tree["images"] = [{"uri": "paint.png"}]
    model = read_model(b.save_gltf(tmp_path / "a.gltf", embedded))
    made = moving_glb(model, bent(model), TIMES, EXACT)
    again = read_back(tmp_path / "moving.glb", made.data, 2.0)
    assert (again.mesh.vertices - bent(model)[-1]).abs().max() < 1e-5 * model.mesh.size
    tree, data = parsed(made.data)
    view = tree["bufferViews"][tree["images"][0]["bufferView"]]
    assert data[view["byteOffset"] :][: view["byteLength"]] == png((9, 8, 7))
    assert data[: len(b.data)] == bytes(b.data) and len(tree["buffers"]) == 1 and "uri" not in tree["buffers"][0]
    issues = validated(tmp_path / "moving.glb")
    assert issues["numErrors"] == issues["numWarnings"] == 0, issues["messages"]


def test_several_buffers_become_one(tmp_path) -> None:
    b = Builder()
    b.scene({"mesh": 0}, meshes=[{"primitives": [b.mesh()]}])
    n = len(b.data)
    (tmp_path / "one.bin").write_bytes(bytes(b.data[:47]))  # cut within the first view's last byte
    (tmp_path / "two.bin").write_bytes(bytes(b.data))
    b.tree["bufferViews"][0]["buffer"] = 1
    b.tree["bufferViews"][1]["buffer"] = 1
    buffers = [{"byteLength": 47, "uri": "one.bin"}, {"byteLength": n, "uri": "two.bin"}]
    (tmp_path / "a.gltf").write_text(json.dumps(b.tree | {"buffers": buffers}))
    model = read_model(tmp_path / "a.gltf")
    again = read_back(tmp_path / "moving.glb", moving_glb(model, bent(model), TIMES, EXACT).data, 0.0)
    assert torch.allclose(again.mesh.vertices, torch.from_numpy(SQUARE), atol=1e-6)
    assert validated(tmp_path / "moving.glb")["numErrors"] == 0


@pytest.mark.parametrize("name", ["fox", "robot", "greenman"])
def test_real_files(tmp_path, name: str) -> None:
    if not (ASSETS / f"{name}.glb").is_file():
        pytest.skip("the animated test models are not here (DREAM4D_ASSETS)")
    path = ASSETS / f"{name}.glb"
    model = read_model(path)
    tracks = bent(model)
    made = moving_glb(model, tracks, TIMES, GltfOptions(error=1e-5))
    again = read_back(tmp_path / "moving.glb", made.data, 2.0)
    assert (again.mesh.vertices - tracks[-1]).norm(dim=-1).max() < 3e-5 * model.mesh.size
    (tree, data), (moved, more) = parsed(path.read_bytes()), parsed(made.data)
    n = tree["buffers"][0]["byteLength"]
    assert more[:n] == data[:n] and all(moved.get(k) == tree.get(k) for k in ("materials", "images", "textures"))
    before, after = validated(path), validated(tmp_path / "moving.glb")
    assert after["numErrors"] == 0 and after["numWarnings"] <= before["numWarnings"]


# ---- files made for models of other formats ----------------------------------------------------------------------


def painted() -> Model:
    places = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 2, 0], [0, 2, 0], [0, 0, 1]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3], [0, 4, 1], [3, 4, 0], [1, 4, 2], [2, 4, 3]])
    uv = torch.rand(5, 2, generator=torch.Generator().manual_seed(0)) * 3 - 1
    return model_from_tensors(places, faces, uv, torch.full((5, 3), 0.5), torch.rand(4, 6, 3), "painted")


@pytest.mark.parametrize("quantize", [True, False])
def test_a_model_without_a_file_gets_one(tmp_path, quantize: bool) -> None:
    model = painted()
    tracks = bent(model)
    made = moving_glb(model, tracks, TIMES, GltfOptions(error=1e-5, quantize=quantize), place(model))
    again = read_back(tmp_path / "a.glb", made.data, 2.0)
    assert (again.mesh.vertices - tracks[-1]).abs().max() < 1e-4 and torch.equal(again.mesh.faces, model.mesh.faces)
    assert torch.allclose(again.mesh.uv, model.mesh.uv) and torch.allclose(
        again.mesh.colors, model.mesh.colors, atol=1e-4
    )
    assert torch.equal(again.materials[0].image, model.materials[0].image)
    issues = validated(tmp_path / "a.glb")
    assert issues["numErrors"] == issues["numWarnings"] == 0, issues["messages"]


@pytest.mark.parametrize("front", ["+x", "-x", "+y", "-y"])
def test_what_is_z_up_is_turned_upright(tmp_path, front: str) -> None:
    model = painted()
    placement = place(model, "z", front)
    again = read_back(tmp_path / "a.glb", moving_glb(model, bent(model), TIMES, EXACT, placement).data, 0.0)
    world = placement.to_world(model.mesh.vertices) / placement.scale
    shown = again.mesh.vertices - again.mesh.vertices.mean(0)
    assert torch.allclose(shown, (world - world.mean(0))[:, [1, 2, 0]], atol=1e-5)


def test_materials_become_primitives(tmp_path) -> None:
    model = painted()
    second = replace(model.materials[0], name="red", color=(1.0, 0.0, 0.0, 1.0), image=None, alpha_cutoff=0.3)
    model = replace(model, materials=(*model.materials, second), face_material=torch.tensor([0, 0, 1, 1, 0, 1]))
    again = read_back(tmp_path / "a.glb", moving_glb(model, bent(model), TIMES, EXACT).data, 1.0)
    assert again.face_material.tolist() == [0, 0, 0, 1, 1, 1] and again.materials[1].color == (1, 0, 0, 1)
    assert again.materials[1].alpha_cutoff == pytest.approx(0.3) and len(again.mesh.vertices) in (5, 10)
    assert validated(tmp_path / "a.glb")["numErrors"] == 0


def test_tracks_that_are_none() -> None:
    model = painted()
    with pytest.raises(MeshError, match="two times or more"):
        moving_glb(model, model.mesh.vertices[None], TIMES[:1])
    with pytest.raises(MeshError, match="two times or more"):
        moving_glb(model, bent(model)[:, :3], TIMES)
    with pytest.raises(MeshError, match="not a finite number"):
        moving_glb(model, bent(model) * torch.nan, TIMES)


def test_somebody_elses_reader(tmp_path) -> None:
    trimesh = pytest.importorskip("trimesh", reason="trimesh is not installed")
    model = painted()
    (tmp_path / "a.glb").write_bytes(moving_glb(model, bent(model), TIMES).data)
    other = trimesh.load(tmp_path / "a.glb", process=False, force="mesh")
    assert np.allclose(other.vertices, model.mesh.vertices) and (other.faces == model.mesh.faces.numpy()).all()
    assert np.allclose(other.visual.uv[:, 1], 1 - model.mesh.uv[:, 1])  # it counts from the lower edge


@pytest.mark.parametrize("make", [lambda: rich(lines_too=False), lambda: arm(Builder())], ids=["nodes", "skin"])
def test_three_plays_it(tmp_path, make) -> None:
    if reason := why_no_browser() or why_no_module("three"):
        pytest.skip(reason)
    model = read_model(make().save(tmp_path / "a.glb"))
    tracks, size, seconds = bent(model), 128, (0.0, 0.75, 1.75)  # at 2 it begins anew
    placement = place(model, size=0.45)
    (tmp_path / "moving.glb").write_bytes(moving_glb(model, tracks, TIMES, GltfOptions(error=1e-3), placement).data)
    camera = make_cameras(0.7, 0.4, 3.0, 0.7, 0.0, size, size)
    matrix = torch.eye(4)
    matrix[:3, :3] = torch.tensor(placement.rotation).mT @ camera.c2w[0, 0, :3, :3]
    matrix[:3, 3] = placement.from_world(camera.c2w[0, 0, :3, 3])
    shot = {"matrix": matrix.mT.flatten().tolist(), "fov": float(torch.rad2deg(camera.fov_y))}
    shots = [shot | {"seconds": at, "near": 0.1 / placement.scale, "far": 9 / placement.scale} for at in seconds]
    command = [
        "node",
        HERE / "gltf.mjs",
        find_browser(),
        tmp_path / "moving.glb",
        tmp_path,
        str(size),
        json.dumps(shots),
    ]
    done = subprocess.run([*command, '{"bare": true}'], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and json.loads(done.stdout) == {"clips": [2], "errors": []}, done.stderr
    for number, at in enumerate(seconds):
        moved = replace(model, mesh=replace(model.mesh, vertices=tracks[round(at * 4)]))
        wanted = look_at(surface_of(moved, placement), camera).mask[0, 0, ..., 0] > 0.5
        shown = torch.from_numpy(np.array(Image.open(tmp_path / f"{number}.png").convert("RGBA")))[..., 3] > 127
        assert wanted.sum() > 300 and (shown & wanted).sum() / (shown | wanted).sum() > 0.93


@pytest.mark.parametrize("weights", [None, [None]])
def test_weights_that_are_null_are_none(tmp_path, weights: list | None) -> None:
    b = Builder()
    primitive = b.mesh() | {"targets": [{"POSITION": b.add([[0, 0, 1]] * 4, bounds=True)}]}
    path = b.scene({"mesh": 0}, meshes=[{"primitives": [primitive], "weights": weights}]).save(tmp_path / "a.glb")
    model = read_model(path)
    made = moving_glb(model, bent(model), TIMES)
    assert read_back(path, made.data, 0.0).mesh.vertices == pytest.approx(model.mesh.vertices, abs=1e-6)


@pytest.mark.parametrize("form", ["obj", "glb"])
def test_vertices_that_no_face_names_say_nothing(tmp_path, form: str) -> None:
    path = tmp_path / f"a.{form}"
    if form == "obj":
        path.write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nv 1e6 0 0\nf 1 2 3\n")
    else:
        b = Builder()
        b.scene({"mesh": 0}, meshes=[{"primitives": [b.mesh(np.concatenate((SQUARE, [[1e6, 0, 0]])))]}]).save(path)
    model = read_model(path)
    assert model.mesh.size == 1
    tracks = model.mesh.vertices.repeat(3, 1, 1)
    tracks[1, model.mesh.faces.unique()] += 0.5
    assert moving_glb(model, tracks, TIMES[:3]).n_keys == 3
