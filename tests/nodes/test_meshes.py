"""Meshes in a real ComfyUI server: out of scenes, through core's own nodes, and into files that move."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
import torch
from browsers import why_no_module
from comfy_harness import REPOSITORY, Server, find_comfyui, find_python, node
from glb import Glb, issues_of
from server_runs import ended, output_files

from dream4d_engine.assets import Provenance, load_scene, save_scene
from dream4d_engine.export import ExportOptions, scene_mesh
from dream4d_engine.export.gltf import y_up
from dream4d_engine.fields.encodings import HashGridConfig
from dream4d_engine.fields.radiance import RadianceConfig
from dream4d_engine.meshes.color import srgb_to_linear
from dream4d_engine.scene import SceneConfig, build_scene
from dream4d_engine.surface import SurfaceOptions

pytestmark = pytest.mark.server
MOVING, STILL = "jumping_cube.safetensors [example]", "red_cube.safetensors [example]"
SIZES = {"resolution": 32, "faces": 2000, "texture": 0, "threshold": 7.9, "smoothing": 2}
MOTION = {"times": 5, "duration": 2.0, "bounce": False, "lit": False}


@pytest.fixture(scope="module")
def meshes(server) -> Server:
    """The server, where its Python has what meshes need."""
    for module in ("skimage", "fast_simplification", "xatlas"):
        words = [find_python(find_comfyui()), "-c", f"import {module}"]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip(f"ComfyUI's Python lacks {module}")
    return server


def load(file: str) -> dict:
    return node("Dream4DLoadScene", file=file)


def extract(scene: list, time: float = 0.0, **changes) -> dict:
    return node("Dream4DExtractMesh", scene=scene, time=time, **(SIZES | changes))


def export(scene: list, prefix: str = "meshes/moving", **changes) -> dict:
    return node("Dream4DExportAnimatedGLB", scene=scene, filename_prefix=prefix, **(MOTION | SIZES | changes))


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
    scene, _ = load_scene(REPOSITORY / "nodes" / "examples" / MOVING.split()[0])
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
    [((-1e4, 0.5), "the scene is empty"), ((1e4, 1e4), "the scene's field fills its box")],
)
def test_scenes_without_a_surface_are_said_to_have_none(meshes, blob, message):
    grid = HashGridConfig(n_levels=2, log2_entries=6, base_resolution=2, growth=2.0)
    config = SceneConfig(radiance=RadianceConfig(grid, blob_scale=blob[0], blob_std=blob[1]))
    scene = build_scene(config, torch.Generator().manual_seed(0))
    scene.refresh_occupancy()
    save_scene(meshes.base / "input" / "strange.safetensors", scene, Provenance("nothing"))
    graph = {"1": load("strange.safetensors"), "2": export(["1", 0], "meshes/none", threshold=0.0)}
    assert message in meshes.error(graph)
    assert not list((meshes.base / "output" / "meshes").glob("none*"))


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
