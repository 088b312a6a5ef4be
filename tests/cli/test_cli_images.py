"""The commands that start from an image, as people use them, and every mistake answered by one line."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import RESULTS, SMALL, fails, finish, start, tensors_of, wait_for
from PIL import Image

from dream4d_engine import assets
from dream4d_engine.cameras import make_cameras
from dream4d_engine.cli.parsing import parse
from dream4d_engine.toyworld.world import render_caption
from dream4d_engine.training.config import IMAGE_RECIPES, MOTION_RECIPES, STATIC_RECIPES

PROMPT = "a red cube is jumping"
TINY = [*SMALL, "--static.reference.phases.0.size", "16", "--static.reference.phases.1.size", "24"]


@pytest.fixture(scope="module")
def priors(tmp_path_factory) -> list[str]:
    """Flags that name tiny untrained models."""
    from dream4d_engine.toyworld.models import ToySize, build_prior, save_prior

    folder, flags = tmp_path_factory.mktemp("priors"), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind in ("novel_view", "pixel", "video"):
            save_prior(build_prior(kind, ToySize((8, 8, 16), (1, 1, 2))), kind, folder / kind)
            flags += [f"--{kind.replace('_', '-')}-prior", str(folder / kind)]
    return flags


def write_image(path: Path, caption: str = "a red cube", size: int = 48) -> Path:
    """An image of the toy world, cut out, as the recipe's camera sees it."""
    cameras = make_cameras(0.0, 0.0, 3.0, math.radians(40), 0.0, size, size)
    seen = render_caption(caption, cameras)
    pixels = torch.cat((seen.rgb, seen.mask), -1)[0, 0]
    Image.fromarray((pixels.numpy() * 255).round().astype(np.uint8)).save(path)
    return path


def test_image_to_4d_stopped_and_resumed(tmp_path, priors):
    """A whole run, and one that was stopped with Ctrl-C in between: the same bits."""
    image, whole, broken = write_image(tmp_path / "cube.png"), tmp_path / "whole", tmp_path / "broken"
    words = [str(image), "--prompt", PROMPT, *priors, *TINY, "--steps", "9", "--motion-steps", "5"]
    output = finish(start("image-to-4d", *words, "--out", str(whole)))
    assert {path.name for path in whole.iterdir()} == RESULTS | {"reference.png"}
    assert "the subject" in output and "reference view" in output
    scene, provenance = assets.load_scene(whole / "scene.safetensors")
    assert scene.deformation is not None
    assert (provenance.recipe, provenance.parent.recipe, provenance.parent.steps) == ("toy", "toy-image", 9)
    record = json.loads((whole / "run.json").read_text())
    assert record["command"] == "image-to-4d" and record["prepared"].startswith("the subject")
    measures = json.loads((whole / "metrics.json").read_text())
    assert measures["reference"]["psnr"] > 3 and 0 <= measures["reference"]["iou"] <= 1
    shown = np.asarray(Image.open(whole / "reference.png"))
    assert shown.shape == (48, 48, 3) and (shown[0, 0] == 255).all()

    process = start("image-to-4d", *words, "--out", str(broken))
    wait_for(broken / "unfinished" / "static.checkpoint", process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    kept = image.read_bytes()
    write_image(image, "a blue cube")
    process = start("image-to-4d", "--resume", str(broken))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "is not the one any more that this run began with" in errors
    image.write_bytes(kept)
    finish(start("image-to-4d", "--resume", str(broken)))
    ours, theirs = tensors_of(broken / "scene.safetensors"), tensors_of(whole / "scene.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_image_to_3d_without_a_prompt_and_with_every_map(tmp_path, priors):
    image, out = write_image(tmp_path / "cube.png"), tmp_path / "out"
    grey = np.full((48, 48), 128, np.uint8)
    Image.fromarray(np.tile(np.linspace(0, 255, 48).astype(np.uint8), (48, 1))).save(tmp_path / "depth.png")
    Image.fromarray(np.stack((grey, grey, grey + 127), -1)).save(tmp_path / "normals.png")
    Image.fromarray(np.asarray(Image.open(image))[..., 3]).save(tmp_path / "mask.png")
    maps = [*("--depth-map", str(tmp_path / "depth.png"), "--static.reference.relative-depth", "1")]
    maps += ["--normal-map", str(tmp_path / "normals.png"), "--static.reference.normal", "1"]
    maps += ["--mask", str(tmp_path / "mask.png"), "--static.regularizers.normal-smoothness-2d", "1"]
    flags = list(zip(TINY[::2], TINY[1::2], strict=True))
    static = [word for flag in flags for word in flag if "motion" not in flag[0] and "deformation" not in flag[0]]
    words = [str(image), *priors[:2], *static, *maps, "--static.guidance.1.weight", "0", "--steps", "4"]
    output = finish(start("image-to-3d", *words, "--out", str(out)))
    assert {path.name for path in out.iterdir()} == (RESULTS - {"video.mp4"}) | {"reference.png"}
    assert "by its mask" in output
    assert json.loads((out / "run.json").read_text())["prompt"] is None
    assert assets.load_scene(out / "scene.safetensors")[1].prompt == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["image-to-3d", "--out", "OUT"], "which image to start from"),
        (["image-to-4d", "--out", "OUT"], "which image to start from"),
        (["image-to-3d", "none.png"], "does not exist"),
        (["image-to-3d", "."], "is a folder"),
        (
            ["image-to-3d", "text.png"],
            "text.png could not be read as an image: it is damaged",
        ),
        (
            ["image-to-3d", "cube.png"],
            "say it with --prompt, or leave that model out with --static.guidance.1.weight 0",
        ),
        (["image-to-3d", "cube.png", "--prompt", " "], "--prompt is empty"),
        (["image-to-4d", "cube.png"], "--prompt is empty"),
        (["image-to-3d", "cube.png", "--prompt", "a green dog"], "does not know 'dog'"),
        (["image-to-3d", "opaque.png", "--prompt", PROMPT], "no alpha and no mask was given"),
        (["image-to-3d", "empty.png", "--prompt", PROMPT], "no subject: its alpha is empty"),
        (["image-to-3d", "full.png", "--prompt", PROMPT], "no subject: its alpha covers all of it"),
        (["image-to-3d", "opaque.png", "--mask", "small.png"], "the mask has 24x24 pixels, the image 48x48"),
        (
            ["image-to-3d", "cube.png", "--depth-map", "small.png"],
            "the depth map small.png has 24x24 pixels, the image 48x48",
        ),
        (["image-to-3d", "cube.png", "--normal-map", "none.png"], "the normal map none.png does not exist"),
        (["image-to-3d", "cube.png", "--depth-map", "ramp.png"], "a depth map was given, but its weight is 0"),
        (["image-to-3d", "cube.png", "--depth-map", "opaque.png"], "the depth map opaque.png is coloured"),
        (["image-to-3d", "cube.png", "--normal-map", "opaque.png"], "the normal map opaque.png holds no unit vectors"),
        (
            ["image-to-3d", "noise.png", "--mask", "half.png"],
            "with mask_shows (on the command line --mask-shows)",
        ),
        (["image-to-3d", "cube.png", "--mask-shows", "background"], "but no mask was given"),
        (["image-to-3d", "cube.png", "--mask", "faint.png"], "the largest value of the mask faint.png is 90 ("),
        (["image-to-3d", "cube.png", "--static.reference.depth", "1"], "weighs a depth map, but none was given"),
        (["image-to-3d", "cube.png", "--static.reference.rgb", "-1"], "static.reference.rgb must be at least 0"),
        (["image-to-3d", "cube.png", "--static.reference.fill", "0.9", "0.2"], "static.reference.fill must keep to"),
        (
            ["image-to-3d", "cube.png", "--recipe", "image-to-3d-orbit"],
            "SV3D, which is read in ComfyUI alone, by the node",
        ),
        (["image-to-3d", "cube.png", "--recipe", "text-to-3d"], "starts from a sentence: use dream4d text-to-3d"),
        (["image-to-3d", "cube.png", "--prompt", "x", "--recipe", "image-to-3d"], "--novel-view-prior MODEL"),
        (["text-to-3d", "x", "--recipe", "toy-image"], "starts from an image: use dream4d image-to-3d"),
        (["text-to-3d", "a cube", "--sd-view", "145"], "'toy' has no image prior"),
        (["text-to-3d", "a cube", "--recipe", "text-to-3d", "--sd-view", "0"], "--sd-view must lie in [0.1, 180]"),
        (["image-to-3d", "cube.png", "--prompt", PROMPT], "say where the results go: --out FOLDER"),
    ],
)
def test_mistakes_get_one_line(words, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(Path("cube.png"))
    write_image(Path("small.png"), size=24)
    rgba = Image.open("cube.png")
    rgba.convert("RGB").save("opaque.png")
    for name, alpha in (("empty.png", 0), ("full.png", 255)):
        changed = rgba.copy()
        changed.putalpha(alpha)
        changed.save(name)
    Path("text.png").write_text("no image")
    ramp = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (48, 1))
    Image.fromarray(ramp).save("ramp.png")
    Image.fromarray((ramp * 0.355).astype(np.uint8)).save("faint.png")
    Image.fromarray((ramp > 127).astype(np.uint8) * 255).save("half.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)).save("noise.png")
    assert expected in fails(capsys, *words)
    assert not Path("OUT").exists()


def test_recipes_and_shorthands_arrive():
    call = parse("image-to-4d", ["x.png", "--recipe", "image-to-3d", "--hifa-steps", "4", "--steps", "7", "--loop"])
    assert call.motion.deformation.loop and not call.options.loop, "the recipe alone says it"
    assert call.static.reference == IMAGE_RECIPES["image-to-3d"].reference and call.static.steps == 7
    assert call.motion.name == "zeroscope-144x80"
    assert (call.motion.guidance[0].distillation.loss, call.motion.guidance[0].distillation.n_steps) == ("multistep", 4)
    call = parse("image-to-3d", ["x.png", "--static.reference.elevation-deg", "12", "--static.reference.normal", "3"])
    assert (call.static.reference.elevation_deg, call.static.reference.normal) == (12, 3)
    motion = parse("animate", ["s", "x", "--hifa-steps", "2", "--loop"]).motion
    assert motion.guidance[0].distillation.n_steps == 2 and motion.deformation.loop
    for words, frames in ((["--gradient-frames", "3"], 3), (["--gradient-frames", "0"], None), ([], None)):
        assert parse("animate", ["s", "x", *words]).motion.gradient_frames == frames
    assert parse("text-to-4d", ["x", "--gradient-frames", "4"]).motion.gradient_frames == 4
    call = parse("text-to-4d", ["x", "--recipe", "personalised-3d", "--sd-view", "145"])
    assert [term.distillation.max_azimuth_deg for term in call.static.guidance] == [180, 145]
    assert call.motion == MOTION_RECIPES["zeroscope-144x80"]
    assert parse("text-to-4d", ["x", "--recipe", "toy-personalised"]).motion == MOTION_RECIPES["toy"]
    for name, recipe in IMAGE_RECIPES.items():
        assert parse("image-to-3d", ["x.png", "--recipe", name]).static == recipe
    for name, recipe in STATIC_RECIPES.items():
        assert parse("text-to-3d", ["x", "--recipe", name]).static == recipe
    with pytest.raises(ValueError, match=r"--hifa-steps must lie in \[1, 1000\], got 0"):
        parse("animate", ["s", "x", "--hifa-steps", "0"])
