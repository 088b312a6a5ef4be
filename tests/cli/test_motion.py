"""motion, and the flags of render and export that change how a scene moves."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from exact_scene import exact_scene, jump
from glb import Glb
from scene_cases import CONFIG, PROVENANCE, tiny_scene

from dream4d_engine.assets import load_scene, save_scene
from dream4d_engine.cli import main
from dream4d_engine.export import ExportOptions, read_video, save_image, scene_mesh
from dream4d_engine.fields.edit import Box, MotionEdit, TimeMap
from dream4d_engine.surface import SurfaceOptions


def fails(capsys, *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


@pytest.fixture
def scene(tmp_path) -> Path:
    save_scene(tmp_path / "moving.safetensors", tiny_scene(), PROVENANCE)
    return tmp_path / "moving.safetensors"


def test_a_changed_scene_is_written(scene, tmp_path, capsys) -> None:
    out, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    words = ["motion", str(scene), "--out", str(out), "--motion-strength", "0.5", "--freeze", "-1,-1,-1,1,1,-0.5"]
    assert main([*words, "--freeze=0,0,0,1,1,1", "--freeze-border", "0.2", "--speed", "2", "--remap", "0:1,1:0"]) == 0
    assert "motion x 0.5; frozen from -1,-1,-1 to 1,1,-0.5 (border 0.2)" in capsys.readouterr().out
    changed, said = load_scene(out)
    boxes = Box((-1, -1, -1), (1, 1, -0.5), 0.2), Box((0, 0, 0), (1, 1, 1), 0.2)
    assert changed.edit == MotionEdit(0.5, boxes, times=(TimeMap(2.0, False, ((0.0, 1.0), (1.0, 0.0))),))
    assert "exists" in fails(capsys, *words)
    assert main(["motion", str(out), "--out", str(again), "--ping-pong"]) == 0
    capsys.readouterr()
    twice, told = load_scene(again)
    assert twice.edit == changed.edit.then(MotionEdit(times=(TimeMap(ping_pong=True),)))
    assert told.edits == (*said.edits, "there and back") and replace(told, edits=()) == PROVENANCE
    assert main(["info", str(again), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["deformation"]["edit"]["strength"] == 0.5 and len(found["provenance"]["edits"]) == 2


def test_render_shows_the_changed_motion(scene, tmp_path) -> None:
    still = tiny_scene().edited(MotionEdit(0.0))
    save_scene(tmp_path / "still.safetensors", still)
    words = ["--path", "fixed", "--frames", "2", "--size", "16", "16", "--overwrite", "--out"]
    assert main(["render", str(scene), *words, str(tmp_path / "r")]) == 0
    as_trained = read_video(tmp_path / "r" / "fixed_rgb.mp4").frames
    assert main(["render", str(scene), *words, str(tmp_path / "r"), "--motion-strength", "0"]) == 0
    by_flag = read_video(tmp_path / "r" / "fixed_rgb.mp4").frames
    assert main(["render", str(tmp_path / "still.safetensors"), *words, str(tmp_path / "s")]) == 0
    assert torch.equal(by_flag, read_video(tmp_path / "s" / "fixed_rgb.mp4").frames)
    assert not torch.equal(by_flag, as_trained)


def test_export_writes_the_changed_motion(scene, tmp_path, capsys) -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    words = ["--times", "3", "--resolution", "8", "--faces", "0", "--threshold", "0.5", "--overwrite"]
    out = tmp_path / "a.glb"
    assert main(["export", str(scene), "--out", str(out), *words]) == 0
    assert Glb(out.read_bytes()).tree.get("animations")
    assert main(["export", str(scene), "--out", str(out), *words, "--motion-strength", "0"]) == 0
    assert not Glb(out.read_bytes()).tree.get("animations")
    moves, still = (line for line in capsys.readouterr().out.splitlines() if line.startswith(str(out)))
    assert "key frames" in moves and ", which does not move, " in still


def test_a_loops_two_moments_are_refused_by_their_flag(tmp_path, capsys) -> None:
    loop = replace(CONFIG, deformation=replace(CONFIG.deformation, loop=True))
    save_scene(tmp_path / "loop.safetensors", tiny_scene(loop))
    line = fails(capsys, "export", tmp_path / "loop.safetensors", "--times", "2")
    assert "--times: the motion is a loop" in line and "follow it through 3 or more" in line


def test_a_freeze_that_holds_all_or_nothing_is_said(scene, tmp_path, capsys) -> None:
    cases = {"-9,-9,-9,9,9,9": "all of the surface is frozen", "0.98,0.98,0.98,1,1,1": "what was frozen holds nothing"}
    for box, said in cases.items():
        words = ["motion", str(scene), "--out", str(tmp_path / "a.safetensors"), "--overwrite", "--freeze", box]
        words += ["--freeze-border", "0.001"]
        assert main(words) == 0 and said in capsys.readouterr().out.splitlines()[-1]


def test_what_images_cut_off_is_said(tmp_path, capsys, monkeypatch) -> None:
    """A cube jumps by 0.3: at twice the strength it goes through the box's top."""
    for name in ("motion", "render"):
        monkeypatch.setattr(import_module(f"dream4d_engine.cli.{name}"), "load_scene", lambda *_: (high, PROVENANCE))
    monkeypatch.setattr(import_module("dream4d_engine.cli.motion"), "save_scene", lambda *_: None)
    high = exact_scene("cube", jump)
    (tmp_path / "s").write_bytes(b"")
    line = "of the surface's places in time lie outside of the scene's box, where images cut them off"
    words = ["--frames", "1", "--size", "8", "8", "--path", "fixed", "--overwrite", "--samples", "8"]
    for strength, expected in (("2", True), ("1.1", False)):
        dial = ["--motion-strength", strength]
        assert main(["motion", str(tmp_path / "s"), "--out", str(tmp_path / "a.safetensors"), *dial]) == 0
        assert (line in capsys.readouterr().out) == expected
        assert main(["render", str(tmp_path / "s"), "--out", str(tmp_path / "r"), *words, *dial]) == 0
        assert (line in capsys.readouterr().out) == expected
    made = scene_mesh(high.edited(MotionEdit(2.0)), ExportOptions(5, surface=SurfaceOptions(16, 30.0, 200)))
    assert line.replace("surface", "vertices").replace("the vertices's", "the vertices'") in made.notes[-1]


def test_a_mask_is_read_from_an_image(scene, tmp_path, capsys) -> None:
    image = torch.zeros(16, 32, 3)
    image[8:] = 1
    save_image(tmp_path / "mask.png", image)
    words = ["motion", str(scene), "--out", str(tmp_path / "a.safetensors"), "--freeze-mask"]
    assert main([*words, str(tmp_path / "mask.png")]) == 0
    (mask,) = load_scene(tmp_path / "a.safetensors")[0].edit.masks
    above, below = mask.moves(torch.tensor([[0.0, 0.0, 0.8], [0.0, 0.0, -0.8]]))
    assert mask.aspect == 2 and above > 0.99 and below < 0.01
    save_image(tmp_path / "black.png", image * 0)
    assert "the mask is black" in fails(capsys, *words, tmp_path / "black.png", "--overwrite")
    assert "does not exist" in fails(capsys, *words, tmp_path / "none.png", "--overwrite")
    save_image(tmp_path / "long.png", torch.ones(2, 82, 3))
    line = fails(capsys, *words, tmp_path / "long.png", "--overwrite")
    assert f"--freeze-mask {tmp_path / 'long.png'}: a mask of 82x2 pixels is no front view" in line
    save_image(tmp_path / "red.png", image * torch.tensor([1.0, 0, 0]))
    assert main([*words, str(tmp_path / "red.png"), "--overwrite"]) == 0
    assert "red.png holds one colour, #ff0000, which was taken for white" in capsys.readouterr().out


def test_boxes_add_up_to_as_many_as_can_be(scene, tmp_path, capsys) -> None:
    forty = ["--freeze=0,0,0,1,1,1"] * 40
    assert main(["motion", str(scene), "--out", str(tmp_path / "a.safetensors"), *forty]) == 0
    line = fails(capsys, "render", tmp_path / "a.safetensors", "--out", tmp_path / "r", *forty)
    assert "already has 40 frozen boxes, and with 40 it would have 80, more than 64: freeze one large box" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing to change: give --motion-strength, --freeze, --freeze-mask, --speed"),
        (("--remap", " "), "nothing to change: give"),
        (("--freeze=0,0,0,1,1,1",) * 65, "--freeze: 65 frozen boxes are more than 64: freeze one large box"),
        (("--motion-strength", "2.5"), "--motion-strength must lie in [0, 2.0], got 2.5"),
        (("--freeze", "0,0,0,1,1,-1"), "--freeze: a box must have its lower corner first, got z from 0 to -1"),
        (("--freeze", "0,0,0,1,1"), "--freeze: a box is six numbers x0,y0,z0,x1,y1,z1, got '0,0,0,1,1'"),
        (("--freeze", "0,0,nan,1,1,1"), "--freeze: a box's z must lie in"),
        (("--freeze-border", "0.5"), "--freeze-border means nothing without --freeze or --freeze-mask"),
        (("--remap", "0:0,0:1"), "--remap: a remap's first numbers must grow from key to key"),
        (("--remap", "0:0,1:nan"), "--remap: a remap's times must lie in"),
        (("--remap", "fast"), "--remap: a remap is pairs of times out:in"),
    ],
)
def test_changes_that_can_not_be(scene, tmp_path, capsys, words, said) -> None:
    assert said in fails(capsys, "motion", scene, "--out", tmp_path / "a.safetensors", *words)
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("name", ["x.glb", "x"])
def test_a_scene_is_not_written_under_a_meshs_name(scene, tmp_path, capsys, name) -> None:
    line = fails(capsys, "motion", scene, "--out", tmp_path / name, "--ping-pong")
    assert f"--out {tmp_path / name} can't be: a scene is written here, so end it in .safetensors" in line
    assert not (tmp_path / name).exists()
    assert main(["motion", str(scene), "--out", str(tmp_path / "x.SafeTensors"), "--ping-pong"]) == 0


@pytest.mark.parametrize("words", [("--motion.n-frames", "24"), ("--motion.n-frames", "12", "F", "24")])
def test_frames_that_the_prior_can_not_see_are_said_before_the_run(scene, tmp_path, capsys, words) -> None:
    n, out = words[1], tmp_path / "run"
    for begin, flag in (
        (["animate", scene, "a red cube is jumping"], "--frames"),
        (["text-to-4d", "a red cube is jumping"], "--motion-frames"),
    ):
        asked = [flag if word == "F" else word for word in words]
        line = fails(capsys, *begin, *asked, "--out", out, "--dry-run")
        assert f"motion.n_frames is {n}, and the toy video prior sees 8 frames at most at once" in line
        assert f"by its number of frames ({flag})" in line
    fails(capsys, "animate", scene, "a red cube is jumping", *[w.replace("F", "--frames") for w in words], "--out", out)
    assert not out.exists()
    assert main(["animate", str(scene), "a red cube is jumping", "--frames", "24", "--out", str(out), "--dry-run"]) == 0


def test_a_scene_that_does_not_move_and_one_that_moves_enough(scene, tmp_path, capsys) -> None:
    save_scene(tmp_path / "still.safetensors", tiny_scene(replace(CONFIG, deformation=None)))
    line = fails(capsys, "render", tmp_path / "still.safetensors", "--out", tmp_path / "r", "--speed", "2")
    assert "the scene doesn't move, so there is no motion to change: animate it first" in line
    strong = tmp_path / "strong.safetensors"
    assert main(["motion", str(scene), "--out", str(strong), "--motion-strength", "2"]) == 0
    line = fails(capsys, "render", strong, "--out", tmp_path / "r", "--motion-strength", "1.5")
    assert "already has 2 times its strength" in line and "ask for 1 at most" in line
