"""Meshes in a real ComfyUI server: out of scenes, through core's own nodes, and into files that move."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from browsers import why_no_module
from comfy_harness import REPOSITORY, Server, motion_nodes, node, why_no_meshes
from glb import Glb, issues_of
from PIL import Image
from safetensors import safe_open
from server_runs import ended, output_files, steps_in

from dream4d_engine.assets import Provenance, load_scene, save_scene
from dream4d_engine.export import ExportOptions, glb_bytes, scene_mesh
from dream4d_engine.export.gltf import y_up
from dream4d_engine.fields.encodings import HashGridConfig
from dream4d_engine.fields.radiance import RadianceConfig
from dream4d_engine.kernels import select_kernels
from dream4d_engine.mesh import Mesh
from dream4d_engine.meshes import MeshOrigin, Placement, place, read_model
from dream4d_engine.meshes.color import srgb_to_linear
from dream4d_engine.scene import SceneConfig, build_scene
from dream4d_engine.surface import SurfaceOptions

pytestmark = pytest.mark.server
MOVING, STILL = "jumping_cube.safetensors [example]", "red_cube.safetensors [example]"
MESH = "red_cube.glb [example]"
EXAMPLES = REPOSITORY / "nodes" / "examples"
SIZES = {"resolution": 32, "faces": 2000, "texture": 0, "threshold": 7.9, "smoothing": 2}
MOTION = {"times": 5, "duration": 2.0, "bounce": False, "lit": False}


@pytest.fixture(scope="module")
def meshes(server) -> Server:
    """The server, where its Python has what meshes need."""
    if reason := why_no_meshes():
        pytest.skip(reason)
    return server


def load(file: str) -> dict:
    return node("Dream4DLoadScene", file=file)


def extract(scene: list, time: float = 0.0, **changes) -> dict:
    return node("Dream4DExtractMesh", scene=scene, time=time, **(SIZES | changes))


def export(scene: list, prefix: str = "meshes/moving", **changes) -> dict:
    given = MOTION | SIZES | {"filename_prefix": prefix} | changes
    return node("Dream4DExportAnimatedGLB", scene=scene, **given)


@pytest.fixture(scope="module")
def made(meshes) -> dict:
    """One graph through all of core's nodes: what its output nodes gave, and the lines of text on the others."""
    graph = {
        "1": load(MOVING),
        "2": load(STILL),
        "low": extract(["1", 0]),
        "high": extract(["1", 0], 0.5),
        "painted": extract(["2", 0], texture=64),
        "info": node("GetMeshInfo", mesh=["high", 0]),
        "fewer": node("DecimateMesh", mesh=["info", 0], target_face_count=500, placement_mode="midpoint"),
        "file": node("MeshToFile3D", mesh=["fewer", 0]),
        "moving": export(["1", 0]),
        "still": export(["2", 0], "meshes/still"),
        "player": node("Preview3D", model_file=["moving", 0]),
    }
    for name, source in {"low": "low", "high": "high", "painted": "painted", "fewer": "file"}.items():
        graph[f"save {name}"] = node("SaveGLB", mesh=[source, 0], filename_prefix=f"meshes/{name}")
    with meshes.listen() as listener:
        prompt = meshes.queue(graph, listener.client)
        events = listener.until(ended, 200)
    assert events[-1][0] == "execution_success", events[-1]
    outputs = meshes.wait(prompt)["outputs"]
    found = {name.removeprefix("save "): output_files(meshes, o, "3d")[0] for name, o in outputs.items() if "3d" in o}
    found["player"] = meshes.base / "output" / outputs["player"]["result"][0]
    return found | {"texts": [text for kind, text in events if kind == "text"], "info": outputs["info"]["text"][0]}


def places(path) -> np.ndarray:
    file = Glb(path.read_bytes())
    return file.read(file.primitive["attributes"]["POSITION"])


def test_a_mesh_goes_through_cores_nodes_as_the_engine_made_it(made):
    # by the kernels of the server's environment: others round otherwise, and thin triangles turn over
    scene, _ = load_scene(EXAMPLES / MOVING.split()[0], kernels=select_kernels("cpu", "torch"))
    options = SurfaceOptions(SIZES["resolution"], SIZES["threshold"], SIZES["faces"], SIZES["smoothing"])
    with torch.no_grad():
        mesh = scene_mesh(scene, ExportOptions(1, 0.5, surface=options), False).mesh
    file = Glb(made["high"].read_bytes())
    seen = {name: file.read(index) for name, index in file.primitive["attributes"].items()}
    assert seen.keys() == {"POSITION", "NORMAL", "COLOR_0"}
    assert np.abs(seen["POSITION"] - y_up(mesh.vertices).numpy()).max() < 1e-5
    assert np.abs(seen["NORMAL"] - y_up(mesh.normals).numpy()).max() < 1e-4
    assert np.abs(seen["COLOR_0"] - srgb_to_linear(mesh.colors).numpy()).max() < 1e-4, "amounts of light"
    assert (file.read(file.primitive["indices"]).reshape(-1, 3) == mesh.faces.numpy()).all()
    assert "KHR_materials_unlit" in file.tree["materials"][0]["extensions"]
    assert f"Vertices:   {len(mesh.vertices):,}\nFaces:      2,000" in made["info"]
    assert "vertex_colors, normals" in made["info"]


def test_up_is_y(made):
    rise = places(made["high"]).mean(0) - places(made["low"]).mean(0)
    assert rise[1] > 0.2 and np.abs(rise[[0, 2]]).max() < 0.05, "the cube jumps"


def test_fewer_faces_keep_the_shape_and_its_colours(made):
    few, all_ = Glb(made["fewer"].read_bytes()), places(made["high"])
    assert 300 < few.tree["accessors"][few.primitive["indices"]]["count"] / 3 <= 500
    assert np.abs(places(made["fewer"]).max(0) - all_.max(0)).max() < 0.03
    red = few.read(few.primitive["attributes"]["COLOR_0"]).mean(0)
    assert red[0] > 0.5 and red[1:].max() < 0.1


def test_a_texture_comes_with_its_coordinates(made):
    file = Glb(made["painted"].read_bytes())
    assert "TEXCOORD_0" in file.primitive["attributes"] and "COLOR_0" not in file.primitive["attributes"]
    from io import BytesIO

    from PIL import Image

    image = Image.open(BytesIO(file.view(file.tree["images"][0]["bufferView"])[0]))
    assert image.size == (64, 64)
    uv = file.read(file.primitive["attributes"]["TEXCOORD_0"])
    assert uv.min() >= 0 and uv.max() <= 1
    texels = np.asarray(image)[(uv[:, 1] * 63).round().astype(int), (uv[:, 0] * 63).round().astype(int)]
    assert np.median(texels, 0)[0] > 180 and np.median(texels, 0)[1:].max() < 40, "red where the surface is"


def test_the_exported_file_moves_as_the_scene_does(made):
    """Halfway it is where the surface of that moment, which nobody followed there, is found."""
    file = Glb(made["moving"].read_bytes())
    for second, name in ((0.0, "low"), (1.0, "high")):
        there, alone = file.at(second), places(made[name])
        for side in (np.min, np.max):
            assert np.abs(side(there, 0) - side(alone, 0)).max() < 0.06, "a cell of the lattice is 0.04"
    assert file.weights()[0][-1] == 2.0
    assert made["player"].read_bytes() == made["moving"].read_bytes(), "the viewer gets the same file"


def test_a_still_scene_makes_a_still_file_and_is_told_so(made):
    assert "animations" not in Glb(made["still"].read_bytes()).tree
    assert any(text.startswith("meshes/still") and "the scene is still: no animation" in text for text in made["texts"])


def test_the_nodes_say_what_they_made(made):
    line = next(text for text in made["texts"] if text.startswith(f"meshes/{made['moving'].name}"))
    assert "2,000 faces" in line and "surface at density 7.9" in line and "5 key frames" in line


def test_the_validator_finds_nothing(made):
    if reason := why_no_module("gltf-validator"):
        pytest.skip(reason)
    for name in ("moving", "still"):
        issues = issues_of(made[name])
        assert issues["numErrors"] == issues["numWarnings"] == 0, issues["messages"]
    for name in ("high", "painted", "fewer"):  # as core writes them
        assert issues_of(made[name])["numErrors"] == 0


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texture": 7}, "texture is 7: it must be 0 (colours at the vertices) or at least 16"),
        ({"texture": 9000}, "texture is 9000: it must lie between 0 and 8192"),
        ({"resolution": 1000}, "resolution is 1000: it must lie between 16 and 512"),
        ({"filename_prefix": "../out"}, "leads out of the output folder"),
        ({"faces": -1}, "faces is -1"),
        ({"times": 1}, "Value 1 smaller than min of 2"),
        ({"duration": 0.0}, "Value 0.0 smaller than min of 0.01"),
    ],
)
def test_numbers_that_no_mesh_has_are_refused_before_anything_runs(meshes, changes, message):
    assert message in meshes.refused({"1": load(MOVING), "2": export(["1", 0], **changes)})


@pytest.mark.parametrize(
    ("blob", "message"),
    [((-1e4, 1e4), "the scene is empty"), ((1e4, 1e4), "the scene's field fills its box")],
)
def test_scenes_without_a_surface_are_said_to_have_none(meshes, blob, message):
    grid = HashGridConfig(n_levels=2, log2_entries=6, base_resolution=2, growth=2.0)
    config = SceneConfig(radiance=RadianceConfig(grid, blob_scale=blob[0], blob_std=blob[1]), n_samples=32)
    scene = build_scene(config, torch.Generator().manual_seed(0))
    scene.refresh_occupancy()
    save_scene(meshes.base / "input" / "strange.safetensors", scene, Provenance("nothing"))
    graph = {"1": load("strange.safetensors"), "2": export(["1", 0], "meshes/none", threshold=0.0)}
    assert message in meshes.error(graph)
    assert not list((meshes.base / "output" / "meshes").glob("none*"))


def test_where_nothing_can_be_written_is_said_before_the_work(meshes):
    (meshes.base / "output" / "a_file").write_bytes(b"")
    graph = {"1": load(MOVING), "2": export(["1", 0], ["3", 0], times=900), "3": value('"a_file/moving"')}
    with meshes.listen() as listener:
        meshes.queue(graph, listener.client)
        events = listener.until(ended, 30)
    assert events[-1][0] == "execution_error"
    assert "'a_file' in filename_prefix is a file, not a folder" in events[-1][1]["exception_message"]
    states = [content["nodes"].get("2", {}) for kind, content in events if kind == "progress_state"]
    assert not any(state.get("value") for state in states), "nothing was counted"


def test_an_export_can_be_cancelled_and_leaves_nothing(meshes):
    graph = {"1": load(MOVING), "2": export(["1", 0], "meshes/cancelled", times=900)}
    with meshes.listen() as listener:
        meshes.queue(graph, listener.client)
        listener.until(
            lambda kind, content: kind == "progress_state" and content["nodes"].get("2", {}).get("value", 0) > 25
        )
        meshes.interrupt()
        events = listener.until(ended, 30)
    assert events[-1][0] == "execution_interrupted"
    assert not list((meshes.base / "output" / "meshes").glob("*cancelled*"))


# ---- meshes of others --------------------------------------------------------------------------------------------


def mesh_file(file: str = MESH) -> dict:
    return node("Dream4DLoadMesh", file=file)


def fit(model: list, steps: int = 20, **changes) -> dict:
    given = {"recipe": "mesh-quick", "recipe__steps": steps, "up": "y", "front": "automatic", "clip": "", "time": 0.0}
    given |= {"seed": 0, "resume": "resume automatically", "preview_seconds": 0.0}
    return node("Dream4DMeshToScene", model_3d=model, **(given | changes))


def value(name: str) -> dict:
    """A mesh or a file that is in some way wrong."""
    return node("GuardValue", value=name)


@pytest.fixture(scope="module")
def small(meshes) -> Server:
    """The server, whose fits look at meshes from few places at few pixels."""
    meshes.post("/dream4d_test/small_meshes", {})
    return meshes


def saved_header(path) -> dict:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_mesh_becomes_a_scene_that_remembers_it(small):
    """From a file, from a file in memory and from a MESH of the graph."""
    graph = {
        "1": mesh_file(),
        "2": fit(["1", 0], 60, preview_seconds=0.1),
        "3": node("Dream4DSaveScene", scene=["2", 0], filename_prefix="meshes/fitted"),
        "4": node("Dream4DSceneInfo", scene=["2", 0]),
        "5": load(STILL),
        "6": extract(["5", 0]),
        "12": node("DecimateMesh", mesh=["6", 0], target_face_count=500, placement_mode="midpoint"),
        "7": fit(["12", 0], 5),
        "8": node("Dream4DSceneInfo", scene=["7", 0]),
        "9": node("MeshToFile3D", mesh=["6", 0]),
        "10": fit(["9", 0], 5),
        "11": node("Dream4DSceneInfo", scene=["10", 0]),
    }
    with small.listen() as listener:
        prompt = small.queue(graph, listener.client)
        events = listener.until(ended, 200)
    assert events[-1][0] == "execution_success", events[-1]
    outputs = small.wait(prompt)["outputs"]
    assert "a mesh: red_cube.glb\nrecipe mesh-quick, 60 steps, seed 0" in outputs["4"]["text"][0]
    assert "a mesh: mesh\n" in outputs["8"]["text"][0] and "a mesh: model.glb\n" in outputs["11"]["text"][0]
    lines = [content for kind, content in events if kind == "text"]
    assert any(
        "red_cube.glb: 294 vertices, 432 faces\nits middle (0, 0, 0) put into the box's\n0.9798 times" in x
        for x in lines
    )
    assert any("seen from 50% of its sides" in line for line in lines)
    assert steps_in(events, "mesh")[-1] == 5 and 60 in steps_in(events, "mesh")
    images = [content for kind, content in events if kind == "image"]
    assert images and all(image.startswith(b"\xff\xd8") for image in images), "live previews"

    (path,) = output_files(small, outputs["3"], "scenes")
    scene, provenance = load_scene(path)
    assert provenance.mesh == MeshOrigin(
        read_model(EXAMPLES / MESH.split()[0]).source, place(read_model(EXAMPLES / MESH.split()[0]))
    )
    inside, outside = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.9, 0.9, 0.9], [-0.8, 0.0, 0.0]])
    with torch.no_grad():
        dense, thin = (scene.density(points, torch.zeros(len(points))) for points in (inside, outside))
    assert dense.min() > 10 * thin.max(), "solid where the cube is"


LID = "3d/lid.glb [input]"


@pytest.fixture(scope="module")
def moving_cube(small) -> str:
    """A moving scene that says it was made from a lid of the cube: motion without minutes of training."""
    x, y = torch.meshgrid(*[torch.linspace(0, 1, 5)] * 2, indexing="ij")
    corners = [row * 5 + column for row in range(4) for column in range(4)]
    faces = [side for k in corners for side in ((k, k + 5, k + 6), (k, k + 6, k + 1))]
    uv, generator = torch.stack((x, y), -1).reshape(-1, 2), torch.Generator().manual_seed(0)
    places = torch.stack((x - 0.5, y - 0.5, torch.full_like(x, 0.45)), -1).reshape(-1, 3)
    lid = Mesh(places, torch.tensor(faces), uv=uv, texture=torch.rand(8, 8, 3, generator=generator))
    path = small.base / "input" / LID.split()[0]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(glb_bytes(lid)[0])
    upright = Placement(((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)), (0.0, 0.0, 0.0), 0.98)
    scene, provenance = load_scene(EXAMPLES / MOVING.split()[0])
    parent = replace(provenance.parent or Provenance(), mesh=MeshOrigin(read_model(path).source, upright))
    save_scene(small.base / "input" / "from_mesh.safetensors", scene, replace(provenance, parent=parent))
    return "from_mesh.safetensors"


def test_the_motion_is_written_into_the_users_own_file(small, moving_cube):
    graph = {
        "1": load(moving_cube),
        "2": mesh_file(LID),
        "3": export(["1", 0], "meshes/own", own_mesh=["2", 0], times=5),
        "4": node("Preview3D", model_file=["3", 0]),
    }
    with small.listen() as listener:
        prompt = small.queue(graph, listener.client)
        events = listener.until(ended, 60)
    assert events[-1][0] == "execution_success", events[-1]
    (path,) = output_files(small, small.wait(prompt)["outputs"]["3"], "3d")
    own, made = Glb((small.base / "input" / LID.split()[0]).read_bytes()), Glb(path.read_bytes())
    assert made.binary.startswith(own.binary), "what was there stays byte for byte"
    assert made.tree["materials"] == own.tree["materials"] and made.tree["images"] == own.tree["images"]
    for name in ("POSITION", "TEXCOORD_0"):
        assert (made.read(made.primitive["attributes"][name]) == own.read(own.primitive["attributes"][name])).all()
    rest, top = made.at(0.0), made.at(1.0)
    rise = (top - rest).mean(0)
    assert rise[1] > 0.15 and np.abs(rise[[0, 2]]).max() < 0.08, "up, in the file's frame and units"
    sides = (top.std(0) / rest.std(0).clip(1e-9))[[0, 2]]
    assert 0.85 < sides.min() and sides.max() < 1.15, "as large as it was"
    if why_no_module("gltf-validator") is None:
        issues = issues_of(path)
        assert issues["numErrors"] == issues["numWarnings"] == 0, issues["messages"]
    text = next(text for kind, text in events if kind == "text" and text.startswith("meshes/own"))
    assert "lid.glb: 25 vertices, 32 faces" in text and "key frames" in text


def test_a_mesh_that_was_saved_again_gets_the_motion_that_was_trained_before(small):
    """Its scene has the same numbers, so a finished run is taken up; it comes from the new file all the same."""
    folder = small.base / "input" / "3d"
    folder.mkdir(exist_ok=True)
    data = (EXAMPLES / MESH.split()[0]).read_bytes()
    (folder / "first.glb").write_bytes(data)
    (folder / "again.glb").write_bytes(data + bytes(4))
    events = {}
    for name in ("first", "again"):
        graph = {"1": mesh_file(f"3d/{name}.glb [input]"), "2": fit(["1", 0], 5)} | motion_nodes(3, seed=61)
        graph |= {
            "5": export(["4", 0], f"meshes/{name}", own_mesh=["1", 0]),
            "6": node("Dream4DSceneInfo", scene=["4", 0]),
        }
        with small.listen() as listener:
            prompt = small.queue(graph, listener.client)
            events[name] = listener.until(ended, 120)
        assert events[name][-1][0] == "execution_success", events[name][-1]
        assert f"a mesh: {name}.glb" in small.wait(prompt)["outputs"]["6"]["text"][0]
    assert steps_in(events["first"], "motion") and not steps_in(events["again"], "motion"), "it was not trained again"


def test_a_texture_that_was_painted_anew_is_seen(small):
    """The model's own file stays as it was; only what it names has changed."""
    folder = small.base / "input" / "3d"
    folder.mkdir(exist_ok=True)
    corners, sides = ("0 0 0", "1 0 0", "0 1 0", "0 0 1"), ("1/1 3/3 2/2", "1/1 2/2 4/3", "1/1 4/3 3/2", "2/1 3/2 4/3")
    lines = ["mtllib painted.mtl", *(f"v {corner}" for corner in corners), "vt 0 0", "vt 1 0", "vt 0 1", "usemtl paint"]
    (folder / "painted.obj").write_text("\n".join([*lines, *(f"f {side}" for side in sides)]))
    (folder / "painted.mtl").write_text("newmtl paint\nmap_Kd painted.png\n")
    graph = {"1": mesh_file("3d/painted.obj [input]"), "2": fit(["1", 0], 3)}
    graph["3"] = node("Dream4DSaveScene", scene=["2", 0], filename_prefix="meshes/painted")
    saved = []
    for color in ("lime", "lime", "blue"):
        if color != "lime" or not saved:
            Image.new("RGB", (8, 8), color).save(folder / "painted.png")
        saved.append(output_files(small, small.run(graph)["3"], "scenes")[0])
    assert saved[0] == saved[1] != saved[2], "what is as it was is not done again"
    assert saved[0].read_bytes() != saved[2].read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="names of files are text there")
def test_names_of_files_that_are_no_utf_8_end_nothing(small):
    """ComfyUI's worker would end for good where it logs an error that says such a name."""
    folder = small.base / "input" / "3d"
    folder.mkdir(exist_ok=True)
    good, bad = (os.fsdecode(name) for name in (b"caf\xe9.glb", b"caf\xe9_cut.glb"))
    data = (EXAMPLES / MESH.split()[0]).read_bytes()
    (folder / good).write_bytes(data)
    (folder / bad).write_bytes(data[:-100])
    info = {"3": node("Dream4DSceneInfo", scene=["2", 0])}
    said = small.error({"1": mesh_file(f"3d/{bad} [input]"), "2": fit(["1", 0], 3)} | info)
    assert said.startswith("caf\ufffd_cut.glb: the header says")
    outputs = small.run({"1": mesh_file(f"3d/{good} [input]"), "2": fit(["1", 0], 3)} | info)
    assert "a mesh: caf\ufffd.glb" in outputs["3"]["text"][0]
    for name in (good, bad):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"2": load(STILL), "3": extract(["2", 0])},
            "is not the mesh that the scene was made from, which is lid.glb",
        ),
        ({"1": load(MOVING)}, "the scene was not made from a mesh, so its motion has no way into one"),
        ({"3": value("mesh batch")}, "own_mesh: the mesh is a batch of 2: one mesh is needed"),
        ({"3": value("5")}, "the socket own_mesh takes MESH"),
    ],
)
def test_a_mesh_that_is_not_the_scenes_is_refused(small, moving_cube, change, message):
    graph = {"1": load(moving_cube), "3": mesh_file(LID)} | change
    graph["4"] = export(["1", 0], "meshes/wrong", own_mesh=["3", 0])
    assert message in small.error(graph)
    assert not list((small.base / "output" / "meshes").glob("wrong*"))


def test_a_still_scene_has_no_motion_to_give_to_a_mesh(small):
    graph = {"1": mesh_file(), "2": fit(["1", 0], 5), "3": export(["2", 0], "meshes/none", own_mesh=["1", 0])}
    assert "the scene doesn't move, so there is no motion to give the mesh" in small.error(graph)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mesh batch", "the mesh is a batch of 2: one mesh is needed"),
        ("mesh without faces", "the mesh has 3 vertices and 0 faces"),
        ("mesh of nothing", "the mesh has 0 vertices and 0 faces"),
        ("mesh with nan", "a mesh's vertices must be finite numbers"),
        ("mesh beyond", "a mesh's faces must name vertices 0 to 2"),
        ("mesh of lists", "the mesh's vertices must have the shape [1, N, 3]"),
        ("mesh of a point", "is 0 long: it has no size to scale by"),
        ("fbx", "a 3D file of the format 'fbx' came: take one of glb, gltf, obj, ply, stl"),
        ("broken glb", "model.glb"),
        ("gone", "there is no file /nowhere/model.glb"),
        ("5", "the socket model_3d takes MESH"),
    ],
)
def test_meshes_that_cannot_be_used_are_said_to_be_so(small, name, message):
    graph = {"1": value(name), "2": fit(["1", 0]), "3": node("Dream4DSceneInfo", scene=["2", 0])}
    said = small.error(graph)
    assert message in said and "\n" not in said.strip()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"front": "-y"}, "front is -y and up is y, the same axis: choose another front"),
        ({"front": "+w"}, "front is '+w': choose one of automatic, +x"),
        ({"up": "x"}, "up is 'x': choose one of automatic, y, z"),
        ({"time": -1.0}, "time is -1.0: it must lie between"),
        ({"recipe": "grand"}, "unknown recipe: choose one of automatic, mesh, mesh-quick"),
    ],
)
def test_fits_refused_before_anything_runs(small, changes, message):
    graph = {"1": mesh_file(), "2": fit(["1", 0], **changes), "3": node("Dream4DSceneInfo", scene=["2", 0])}
    assert message in small.refused(graph)


def test_clips_are_taken_from_files_alone_and_by_name(small):
    graph = {"1": mesh_file(), "2": fit(["1", 0], clip="run"), "3": node("Dream4DSceneInfo", scene=["2", 0])}
    assert "run" in small.error(graph)
    graph["1"] = value("mesh")
    assert "a mesh of the graph has no clips: leave clip empty" in small.error(graph)


def test_only_files_of_the_folders_are_meshes(small, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "model.glb"
    outside.write_bytes((EXAMPLES / MESH.split()[0]).read_bytes())
    folder = small.base / "input" / "3d"
    folder.mkdir(exist_ok=True)
    (folder / "link.glb").symlink_to(outside)
    (folder / "Mine.GLB").write_bytes(outside.read_bytes())
    listed = small.get("/object_info/Dream4DLoadMesh")["Dream4DLoadMesh"]["input"]["required"]["file"][1]["options"]
    assert "3d/Mine.GLB [input]" in listed and MESH in listed and not any("link" in name for name in listed)
    assert not any(name.endswith(".safetensors [example]") for name in listed)
    for file, message in {
        "3d/link.glb": "does not lie in the input folder",
        str(outside): "does not lie in the input folder",
        "3d/missing.glb": "there is no file",
        "red_cube.safetensors [example]": "is no file of a mesh: its name must end in .glb",
    }.items():
        assert message in small.refused({"1": mesh_file(file), "2": node("Preview3D", model_file=["1", 0])}), file
    shown = small.run({"1": mesh_file("3d/Mine.GLB [input]"), "2": node("Preview3D", model_file=["1", 0])})
    assert (small.base / "output" / shown["2"]["result"][0]).read_bytes() == outside.read_bytes()


def test_a_fit_can_be_cancelled_and_goes_on(small):
    def graph(preview: float) -> dict:
        saved = node("Dream4DSaveScene", scene=["2", 0], filename_prefix="meshes/resumed")
        return {"1": mesh_file(), "2": fit(["1", 0], 400, seed=7, preview_seconds=preview), "3": saved}

    with small.listen() as listener:
        prompt = small.queue(graph(0.0), listener.client)
        listener.until(lambda kind, content: max(steps_in([(kind, content)], "mesh"), default=0) >= 10)
        small.interrupt()
        assert listener.until(ended)[-1][0] == "execution_interrupted"
        small.wait(prompt)
        (checkpoint,) = small.runs.glob("*.checkpoint")
        stopped_at = int(saved_header(checkpoint)["step"])
        assert 10 <= stopped_at < 400
        small.queue(graph(600.0), listener.client)
        events = listener.until(lambda kind, content: bool(steps_in([(kind, content)], "mesh")))
        assert stopped_at < steps_in(events, "mesh")[0] <= stopped_at + 2, "it goes on"
        small.interrupt()
        listener.until(ended)
    for path in small.runs.glob("*.checkpoint"):
        path.unlink()
