"""import and export of meshes: there and back, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gltf_files import Builder, arm
from scene_cases import CONFIG, PROVENANCE, tiny_scene

from dream4d_engine.assets import load_scene, read_info, save_scene
from dream4d_engine.cli import main
from dream4d_engine.cli.results import measure
from dream4d_engine.meshes import MeshOrigin, place, read_model
from dream4d_engine.surface import track_own_vertices
from dream4d_engine.training import config as recipes


def fails(capsys, *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


@pytest.fixture
def quick(monkeypatch) -> None:
    """The quick recipe in no time."""
    recipe = recipes.MESH_QUICK
    scene = replace(recipe.scene, radiance=CONFIG.radiance, occupancy_resolution=8, n_samples=32)
    tiny = replace(recipe, steps=2, scene=scene, n_views=4, view_size=24)
    monkeypatch.setitem(recipes.MESH_RECIPES, "mesh-quick", tiny)


@pytest.fixture
def moved(tmp_path) -> tuple[Path, Path]:
    """A model, and a moving scene that was made from it."""
    path = arm(Builder()).save(tmp_path / "arm.glb")
    model = read_model(path, "go", 1.0)
    still = replace(PROVENANCE, parent=None, mesh=MeshOrigin(model.source, place(model)))
    save_scene(tmp_path / "moving.safetensors", tiny_scene(), replace(PROVENANCE, parent=still))
    return path, tmp_path / "moving.safetensors"


@pytest.mark.usefixtures("quick")
def test_a_mesh_becomes_a_scene_that_remembers_it(tmp_path, capsys) -> None:
    path, out = arm(Builder()).save(tmp_path / "arm.glb"), tmp_path / "still.safetensors"
    words = ["import", str(path), "--out", str(out), "--clip", "go", "--time", "0.5", "--front", "+x", "--fill", "0.5"]
    assert main([*words, "--recipe", "mesh-quick"]) == 0
    said = capsys.readouterr().out
    assert "its skin was posed at 0.5 s of the clip go" in said and "a still scene" in said
    model, found = read_model(path, "go", 0.5), read_info(out).provenance
    assert found.first_mesh == MeshOrigin(model.source, place(model, "y", "+x", 0.5)) and found.recipe == "mesh-quick"
    assert load_scene(out)[0].deformation is None
    assert "exists" in fails(capsys, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("a.glb", "--up", "x"), "up"),
        (("a.glb", "--front", "+y"), "front +y and up y are one axis"),
        (("a.glb", "--clip", "walk"), "has no clip 'walk': it has go"),
        (("a.glb", "--time", "1"), "needs the clip's name: it has go"),
        (("a.glb", "--clip", "go", "--time", "nan"), "--time must lie in [0, 1000000]"),
        (("a.glb", "--fill", "1.5"), "--fill must lie in [0.01, 1]"),
        (("a.glb", "--fill", "nan"), "--fill must lie in [0.01, 1]"),
        (("a.glb", "--seed", "-1"), "--seed must lie in"),
        (("a.glb", "--recipe", "toy"), "unknown recipe 'toy': choose one of mesh, mesh-quick"),
        (("none.glb",), "does not exist"),
        (("a.ckpt", "--up", "z"), "--up is for meshes (.glb, .gltf, .obj, .ply, .stl), and a.ckpt is none"),
        (("a.fbx",), "does not exist"),
    ],
)
def test_imports_that_can_not_be(tmp_path, capsys, words: tuple[str, ...], said: str) -> None:
    arm(Builder()).save(tmp_path / "a.glb")
    path, *rest = words
    assert said in fails(capsys, "import", tmp_path / path, "--out", tmp_path / "s.safetensors", *rest)
    assert not (tmp_path / "s.safetensors").exists()


def test_a_mesh_is_no_scene_to_export(tmp_path, capsys) -> None:
    path = arm(Builder()).save(tmp_path / "arm.glb")
    before = path.read_bytes()
    assert "dream4d import" in fails(capsys, "export", path, "--overwrite")
    assert path.read_bytes() == before


def test_the_motion_goes_into_the_mesh(tmp_path, capsys, moved) -> None:
    path, scene = moved
    words = ["export", str(scene), "--mesh", str(path), "--times", "5", "--error", "1e-5", "--duration", "3"]
    assert main([*words, "--bounce"]) == 0
    out = tmp_path / "arm_moving.glb"
    said = capsys.readouterr().out
    assert f"{out}: 6 vertices of arm.glb, 5 key frames" in said and "its skin was left out" in said
    found, provenance = load_scene(scene)
    model = read_model(path, "go", 1.0)
    tracks = track_own_vertices(found, model, provenance.first_mesh.placement, torch.linspace(0, 1, 5))
    for k, second in ((0, 0.0), (2, 1.5), (4, 3.0), (0, 6.0)):
        again = read_model(out, "dream4d", second)
        assert (again.mesh.vertices - tracks.positions[k]).abs().max() < 1e-4
    assert "exists" in fails(capsys, *words)


def test_motion_is_not_for_just_any_mesh(tmp_path, capsys, moved) -> None:
    path, scene = moved
    other = arm(Builder())
    other.tree["animations"] = []  # not even the clip that the scene was made at
    other.save(tmp_path / "other.glb")
    said = fails(capsys, "export", scene, "--mesh", tmp_path / "other.glb")
    assert "other.glb (SHA-256" in said and "which is arm.glb" in said
    save_scene(tmp_path / "plain.safetensors", tiny_scene(), PROVENANCE)
    said = fails(capsys, "export", tmp_path / "plain.safetensors", "--mesh", path)
    assert "was not made from a mesh" in said
    origin = read_info(scene).provenance.first_mesh
    save_scene(
        tmp_path / "still.safetensors", tiny_scene(replace(CONFIG, deformation=None)), replace(PROVENANCE, mesh=origin)
    )
    assert "animate it first" in fails(capsys, "export", tmp_path / "still.safetensors", "--mesh", path)
    assert "--texture means nothing with --mesh" in fails(capsys, "export", scene, "--mesh", path, "--texture", "64")
    assert "is written as GLB" in fails(capsys, "export", scene, "--mesh", path, "--out", tmp_path / "a.obj")
    assert "is the mesh itself" in fails(capsys, "export", scene, "--mesh", path, "--out", path, "--overwrite")
    assert "times" in fails(capsys, "export", scene, "--mesh", path, "--times", "1")
    assert "does not exist" in fails(capsys, "export", scene, "--mesh", tmp_path / "none.glb")


def test_a_mesh_is_not_judged_by_the_truth_of_a_toy() -> None:
    scene = tiny_scene()
    assert "truth" in measure(scene, "a red cube")[0]
    found, lines = measure(scene, "a red cube", of_a_mesh=True)
    assert "truth" not in found and "covers" in lines[0]
