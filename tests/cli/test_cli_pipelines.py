"""Runs with folders of today's models."""

from __future__ import annotations

import json

import pytest
from cli_runs import SMALL
from pipeline_folders import pipeline_folder

from dream4d_engine.assets import load_scene
from dream4d_engine.cli import main

PROMPT = "a red cube is jumping"
GRIDS = ["--static.scene.radiance.grid.log2-entries", "12", "--motion.deformation.grid.log2-entries", "12"]
TO_4D = ["text-to-4d", PROMPT, "--recipe", "model-image", "--image-prior", "sdxl", "--video-prior", "wan"]
SIZES = [flag for i in (1, 2) for side in ("height", "width") for flag in (f"--static.phases.{i}.{side}", "16")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return {name: str(pipeline_folder(name, place)[1]) for name in ("sdxl", "wan")}


def test_both_stages_by_models_of_today(folders, tmp_path, capsys):
    out = tmp_path / "run"
    models = ["--image-prior", folders["sdxl"], "--video-prior", folders["wan"]]
    steps = ["--recipe", "model-image", "--steps", "2", "--motion-steps", "2", "--device", "cpu"]
    assert main(["text-to-4d", PROMPT, *steps, *models, "--out", str(out), *SMALL, *SIZES, *GRIDS, "--size", "8"]) == 0
    said = capsys.readouterr().err
    assert "sdxl (Stable Diffusion XL) is asked for 64x64; trained at 1024x1024" in said
    assert "wan (Wan) is asked for 9 frames of 48x32" in said
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert settings["options"]["motion_recipe"] == "model-video", "it goes with model-image"
    assert settings["motion"]["n_frames"] == 9, "as many as the autoencoder takes"
    scene, _ = load_scene(out / "scene.safetensors")
    assert scene.deformation is not None


def test_a_number_of_frames_that_fits_is_taken(folders, tmp_path):
    """As many as the model makes, whoever says it: the recipe, the command, or the record of a run of longer takes."""
    for more in (
        ["--motion.n-frames", "9"],
        ["--motion-frames", "17"],
        ["--motion-frames", "17", "--motion.n-frames", "9"],
    ):
        words = [folders.get(word, word) for word in [*TO_4D, *more]]
        assert main([*words, "--out", str(tmp_path / "out"), "--device", "cpu", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["text-to-4d", PROMPT, "--video-prior", "wan"], "give --motion-recipe model-video"),
        (["text-to-3d", PROMPT, "--image-prior", "sdxl"], "asks no model of kind 'image', --image-prior would be left"),
        (
            ["text-to-3d", PROMPT, "--recipe", "model-image", "--image-prior", "wan"],
            "of the kind 'video' and not 'image'",
        ),
        (
            ["text-to-3d", PROMPT, "--recipe", "model-image", "--image-prior", "sdxl", "--image-lora", "toy"],
            "take a LoRA in ComfyUI only",
        ),
        (
            [*TO_4D, "--motion.n-frames", "21"],
            "--motion.n-frames is 21, and wan makes takes of 9 frames: leave it away; --motion-frames asks",
        ),
    ],
)
def test_what_does_not_go_together_is_said_before_the_run(words, said, folders, tmp_path, capsys):
    words = [folders.get(word, word) for word in words]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    *notes, last = capsys.readouterr().err.splitlines()
    assert last.startswith("dream4d: error: ") and said in last
    assert all(line.startswith("note: ") for line in notes), "what a model is asked for is said by then"
    assert not (tmp_path / "out").exists()
