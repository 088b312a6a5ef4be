"""import and export of meshes: there and back, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_runs import tensors_of
from exact_scene import exact_scene
from gltf_files import Builder, arm
from scene_cases import CONFIG, PROVENANCE, tiny_scene

from dream4d_engine import locks
from dream4d_engine.assets import load_scene, read_info, save_scene
from dream4d_engine.cli import import_scene, main
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
    tiny = replace(recipe, steps=4, scene=scene, n_views=4, view_size=24)
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


def stop_after(monkeypatch, n_steps: int) -> None:
    """Let the next fit be stopped after so many steps, as Ctrl-C does."""
    fit = import_scene.fit_mesh

    def stopping(*given, control, **named):
        done = []
        told = replace(control, on_step=lambda *step: done.append(step), should_stop=lambda: len(done) >= n_steps)
        return fit(*given, control=told, **named)

    monkeypatch.setattr(import_scene, "fit_mesh", stopping)


@pytest.fixture
def stopped(quick, tmp_path, monkeypatch, capsys) -> list[str]:
    """The words of an import that was stopped after 2 of its 4 steps."""
    words = ["import", str(arm(Builder()).save(tmp_path / "arm.glb")), "--out", str(tmp_path / "a.safetensors")]
    words += ["--recipe", "mesh-quick"]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert main(words) == 130
    said = capsys.readouterr().err
    assert "stopped in mesh, step 2" in said and "the same command goes on from there" in said
    assert not (tmp_path / "a.safetensors").exists()
    return words


def test_an_import_that_was_stopped_goes_on_bit_for_bit(tmp_path, capsys, stopped) -> None:
    assert main(stopped) == 0
    assert "going on from step 2" in capsys.readouterr().out
    other = tmp_path / "other"
    assert main([*stopped[:3], str(other / "b.safetensors"), *stopped[4:]]) == 0
    found, whole = (tensors_of(path) for path in (tmp_path / "a.safetensors", other / "b.safetensors"))
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in found)
    assert [path.name for path in other.iterdir()] == ["b.safetensors"]  # nothing is left of either
    assert {path.name for path in tmp_path.iterdir()} == {"arm.glb", "a.safetensors", "other"}


def test_what_an_import_does_not_go_on_from(tmp_path, capsys, stopped, monkeypatch) -> None:
    folder = tmp_path / "a.safetensors.unfinished"
    state = folder / "mesh.checkpoint"
    said = fails(capsys, *stopped, "--seed", "1")
    assert "seed is 1, the run there has 0" in said and "--overwrite" in said and state.exists()
    held = locks.take(folder / "run.lock", "a test")
    assert "is being worked on by process" in fails(capsys, *stopped)
    held.release()
    with monkeypatch.context() as patch:
        stop_after(patch, 0)  # while the views are drawn, before a step more
        assert main(stopped) == 130
    assert "what is done is saved" in capsys.readouterr().err and state.exists()
    state.write_bytes(state.read_bytes()[:1000])
    assert main(stopped) == 0
    said = capsys.readouterr()
    assert "it is kept as mesh.checkpoint.damaged, and the fit starts over" in said.err
    assert "going on" not in said.out and not folder.exists()


def test_overwrite_starts_an_unfinished_import_over(tmp_path, capsys, stopped) -> None:
    assert main([*stopped, "--seed", "1", "--overwrite"]) == 0
    assert "going on" not in capsys.readouterr().out
    assert read_info(tmp_path / "a.safetensors").provenance.seed == 1
    assert not (tmp_path / "a.safetensors.unfinished").exists()


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


@pytest.mark.parametrize("file", ["a.glb", "a.ckpt"])
def test_a_scene_of_a_mesh_is_not_written_under_a_meshs_name(tmp_path, capsys, file: str) -> None:
    arm(Builder()).save(tmp_path / "a.glb")
    line = fails(capsys, "import", tmp_path / file, "--out", tmp_path / "s.glb")
    assert f"--out {tmp_path / 's.glb'} can't be: a scene is written here, so end it in .safetensors" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.glb"]


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


def test_a_motion_that_cannot_be_followed_costs_no_other_measure() -> None:
    broken = exact_scene("sphere", lambda points, times: points / (times < 0.5)[:, None].float())
    found, lines = measure(broken, "a fox")
    assert found["motion"] is None and found["scene"]["coverage"] > 0
    assert len(lines) == 2 and "can't be told: the scene's deformation is not a finite number" in lines[1]
