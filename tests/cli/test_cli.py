"""The commands as people use them: whole runs in processes of their own, and every mistake answered by one line."""

from __future__ import annotations

import ast
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cli_runs import PROMPT, RESULTS, SMALL, fails, finish, start, tensors_of, wait_for
from places import DATA, ROOT
from scene_cases import CONFIG, tiny_scene

from dream4d_engine import assets
from dream4d_engine.cli import main
from dream4d_engine.cli.command import FILES, find_command
from dream4d_engine.cli.parsing import parse
from dream4d_engine.cli.progress import Lines, clock_text, patient
from dream4d_engine.cli.run_folder import sweep
from dream4d_engine.export import read_video
from dream4d_engine.surface import MotionReadout, measure_motion
from dream4d_engine.training.config import IMAGE_RECIPES, MOTION_RECIPES, STATIC_RECIPES


@pytest.fixture(scope="module")
def run(tmp_path_factory, priors) -> tuple[Path, str]:
    """The folder and the output of one whole text-to-4d."""
    folder = tmp_path_factory.mktemp("run") / "demo"
    output = finish(
        start("text-to-4d", PROMPT, "--out", str(folder), *priors, *SMALL, "--steps", "9", "--motion-steps", "7")
    )
    return folder, output


def test_text_to_4d_makes_what_it_says(run):
    folder, output = run
    assert {path.name for path in folder.iterdir()} == RESULTS
    orbit, video = read_video(folder / "orbit.mp4"), read_video(folder / "video.mp4")
    assert orbit.frames.shape == (4, 16, 16, 3)
    assert video.frames.shape == (8 * 2, 16, 16, 3)
    assert video.fps == pytest.approx(24)
    assert video.title == PROMPT
    scene, provenance = assets.load_scene(folder / "scene.safetensors")
    assert scene.deformation is not None
    assert (provenance.prompt, provenance.recipe, provenance.steps, provenance.seed) == (PROMPT, "toy", 7, 0)
    assert (provenance.parent.prompt, provenance.parent.steps) == (PROMPT, 9)
    for line in ("static: step 9/9", "motion: step 7/7", "loss"):
        assert line in output


def test_record_and_measures_of_a_run(run):
    from PIL import Image

    folder, _ = run
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["command"], record["prompt"], record["seed"]) == (
        "finished",
        "text-to-4d",
        PROMPT,
        0,
    )
    assert record["settings"]["static"]["steps"] == 9
    assert record["settings"]["motion"]["name"] == "toy"
    assert {"dream4d", "python", "torch", "diffusers", "transformers"} == set(record["versions"])
    assert {"static", "motion", "orbit", "video"} <= set(record["seconds"])
    assert 0 < record["peak_memory_bytes"] < 4 * 2**30
    measures = json.loads((folder / "metrics.json").read_text())
    assert measures["truth"]["caption"] == PROMPT
    assert 0 <= measures["truth"]["iou"] <= 1
    assert measures["scene"]["deformation_scale"] == 1
    width, height = Image.open(folder / "contact.png").size
    assert width > 5 * 96 and height > 4 * 96


def test_stopped_and_killed_runs_end_like_an_unbroken_one(run, tmp_path, priors):
    """Ctrl-C in stage 1, SIGKILL at a random moment of what follows, then to the end: the same bits."""
    folder = tmp_path / "broken"
    words = [PROMPT, "--out", str(folder), *priors, *SMALL, "--steps", "9", "--motion-steps", "7"]
    process = start("text-to-4d", *words)
    wait_for(folder / "unfinished" / "static.checkpoint", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"resume with: dream4d text-to-4d --resume {folder}" in errors
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"

    process = start("text-to-4d", "--resume", str(folder))
    while json.loads((folder / "run.json").read_text())["status"] != "running":
        time.sleep(0.02)
    seconds = json.loads((run[0] / "run.json").read_text())["seconds"]
    moment = random.SystemRandom().uniform(0, sum(seconds[name] for name in ("load models", "static", "motion")))
    time.sleep(moment)
    process.kill()
    process.communicate()

    finish(start("text-to-4d", "--resume", str(folder)))
    assert {path.name for path in folder.iterdir()} == RESULTS
    ours, theirs = tensors_of(folder / "scene.safetensors"), tensors_of(run[0] / "scene.safetensors")
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"after a kill {moment:.2f} s into the resumed run"


def test_two_stages_one_by_one(run, tmp_path, priors, capsys):
    """text-to-3d and animate give what text-to-4d gives."""
    still, moving = tmp_path / "still", tmp_path / "moving"
    flags = list(zip(SMALL[::2], SMALL[1::2], strict=True))
    static = [word for flag in flags for word in flag if "motion" not in flag[0] and "deformation" not in flag[0]]
    motion = [word for flag in flags for word in flag if "static" not in flag[0]]
    threads = torch.get_num_threads()
    assert main(["text-to-3d", PROMPT, "--out", str(still), *priors[:2], *static, "--steps", "9"]) == 0
    assert {path.name for path in still.iterdir()} == RESULTS - {"video.mp4"}
    scene = str(still / "scene.safetensors")
    assert main(["animate", scene, PROMPT, "--out", str(moving), *priors[2:], *motion, "--steps", "7"]) == 0
    assert {path.name for path in moving.iterdir()} == RESULTS - {"orbit.mp4"}
    ours, theirs = tensors_of(moving / "scene.safetensors"), tensors_of(run[0] / "scene.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    torch.set_num_threads(threads)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["text-to-5d", "x"], "unknown command 'text-to-5d'"),
        (["text-to-4d", "", "--out", "OUT"], "empty"),
        (["text-to-4d", "  ", "--out", "OUT"], "empty"),
        (["text-to-4d", "--out", "OUT"], "empty"),
        (
            ["text-to-3d", PROMPT, "--recipe", "grand", "--out", "OUT"],
            "unknown recipe 'grand': choose one of toy, text-to-3d",
        ),
        (["text-to-4d", PROMPT, "--motion-recipe", "grand", "--out", "OUT"], "unknown recipe 'grand'"),
        (["text-to-3d", PROMPT, "--out", "OUT", "--sed", "3"], "perhaps you meant --seed"),
        (["text-to-3d", PROMPT, "--out", "OUT", "--seed", "x"], "--seed"),
        (["text-to-3d", PROMPT, "--out", "OUT", "--static.cameras.distance", "3", "2"], "lower bound first"),
        (["text-to-3d", PROMPT, "--out", "OUT", "--recipe", "text-to-3d"], "--multiview-prior MODEL"),
        (["text-to-3d", PROMPT, "--out", "OUT", "--multiview-prior", "OUT/none"], "no model folder"),
        (["text-to-3d", PROMPT, "--out", "OUT", "--device", "quantum"], "unknown device 'quantum'"),
        (["text-to-3d", PROMPT, "--out", "OUT", "--size", "0"], "--size"),
        (["text-to-3d", PROMPT, "--out", "OUT", "--threads", "0"], "--threads"),
        (["text-to-4d", "--resume", "OUT"], "no run to resume"),
        (["animate", "--out", "OUT"], "which scene"),
        (["animate", "OUT/none.safetensors", PROMPT, "--out", "OUT"], "does not exist"),
        (["text-to-3d", PROMPT, "--out", "OUT", "--size", "100000"], "--size must lie in [1, 8192], got 100000"),
        (["text-to-4d", PROMPT, "--out", "OUT", "--frames", "24"], "perhaps you meant --motion-frames"),
        (["animate", "OUT/s", PROMPT, "--out", "OUT", "--motion-frames", "24"], "perhaps you meant --frames"),
        (["text-to-3d", PROMPT, "--out", "OUT", "--static.steps", "0"], "static.steps = 0"),
        (["text-to-3d", PROMPT, "--out", "OUT", "--threads", "1000000"], "--threads must lie in [1, "),
        (["text-to-3d", PROMPT, "--out", "OUT", "--seed", "9223372036854775808"], "--seed must lie in [0, 92233720"),
        (["text-to-3d", "a red \udcff cube", "--out", "OUT"], "is no text in UTF-8: set the terminal to UTF-8"),
        (["text-to-3d", "cube " * 20000, "--out", "OUT"], "the prompt has 100,000 letters, more than 65,536"),
        (["text-to-4d", PROMPT, "--object-prompt", "\udcff", "--out", "OUT"], "is no text in UTF-8"),
        (["bench", "--variants"], "nothing to measure"),
        (["import", "OUT/none.ckpt", "--out", "OUT/s.safetensors", "--device", "quantum"], "unknown device 'quantum'"),
        (["text-to-3d", PROMPT, "--out", "OUT", "--samples", "0"], "--samples must lie in"),
        (["text-to-3d", PROMPT, "--out", "OUT", "--seed", "-1"], "--seed must lie in"),
        (["text-to-3d", PROMPT, "--out", "OUT", "--static.optimizer.lr-grid", "nan"], "lr_grid must be a finite"),
        (["text-to-4d", PROMPT, "--out", "OUT", "--motion-steps", "0"], "--motion-steps must lie in [1, "),
        (["text-to-4d", PROMPT, "--out", "OUT", "--deformation-scale", "nan"], "--deformation-scale must lie in"),
        (
            ["text-to-4d", PROMPT, "--out", "OUT", "--motion_recipe", "zeroscope-72x40", "--steps", "0"],
            "--steps must lie in",
        ),
        (["render", "OUT/none.safetensors"], "does not exist"),
        (["render"], "SCENE"),
        (["export", "OUT/none.safetensors"], "does not exist"),
        (["export", "OUT/none.safetensors", "--out", "OUT/mesh.fbx"], "names no format for meshes"),
        (["info", "OUT/none"], "does not exist"),
        (["info", "."], "no run's folder, it has no run.json: name one that has, or a file"),
        (["import", "OUT/none.ckpt", "--out", "OUT/s.safetensors"], "does not exist"),
        (["bench", "--recipes", "grand"], "unknown recipe 'grand'"),
        (["bench", "--recipes", "static:grand"], "unknown recipe 'grand'"),
    ],
)
def test_mistakes_get_one_line(words, expected, tmp_path, capsys, priors):
    out = tmp_path / "out"
    words = [word.replace("OUT", str(out)) for word in words]
    if "-prior MODEL" not in expected and "--multiview-prior" not in words and "--resume" not in words:
        words += {"text-to-3d": priors[:2], "text-to-4d": priors}.get(words[0], [])
    assert expected in fails(capsys, *words)
    assert not out.exists()


def test_unknown_words_are_said_before_training(tmp_path, capsys, priors):
    line = fails(capsys, "text-to-4d", "a red dragon is jumping", "--out", str(tmp_path / "out"), *priors)
    assert "'dragon'" in line and "cube" in line
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be_written(tmp_path, capsys, monkeypatch, priors):
    (tmp_path / "file").write_text("x")
    words = ["text-to-3d", PROMPT, *priors[:2], "--out"]
    assert "is a file" in fails(capsys, *words, str(tmp_path / "file"))
    assert "can't write into" in fails(capsys, *words, str(tmp_path / "file" / "below"))
    assert "--out FOLDER" in fails(capsys, *words[:-1])
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**20})())
    assert "1 MiB left" in fails(capsys, *words, str(tmp_path / "full"))
    assert not list((tmp_path / "full").iterdir())


def test_too_little_memory_is_said_before_training(tmp_path, capsys, priors):
    size = ["--static.phases.0.height", "40000", "--static.phases.0.width", "40000"]
    line = fails(capsys, "text-to-3d", PROMPT, "--out", str(tmp_path / "out"), *priors[:2], *size)
    assert "GiB" in line and "lower --static.phases" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_on_the_way(error, tmp_path, capsys, monkeypatch, priors):
    def train(*_args, **_settings):
        raise error

    monkeypatch.setattr("dream4d_engine.cli.stages.train", train)
    out = tmp_path / "out"
    words = ["text-to-3d", PROMPT, "--out", str(out), *priors[:2]]
    assert "out of memory: lower" in fails(capsys, *words)
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    assert [path.name for path in out.iterdir()] == ["run.json"]
    assert "out of memory" in fails(capsys, *words)  # nothing was made: the folder may be used again


def test_results_are_not_overwritten(run, tmp_path, capsys, priors):
    before = {path.name: path.read_bytes() for path in run[0].iterdir()}
    line = fails(capsys, "text-to-4d", PROMPT, "--out", str(run[0]), *priors)
    assert "already holds" in line and "--overwrite" in line
    unfinished = tmp_path / "u"
    (unfinished / "unfinished").mkdir(parents=True)
    (unfinished / "run.json").write_text('{"command": "text-to-4d", "status": "failed"}')
    assert "--resume" in fails(capsys, "text-to-4d", PROMPT, "--out", str(unfinished), *priors)
    assert main(["text-to-4d", "--resume", str(run[0])]) == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in run[0].iterdir()}


def test_overwriting_waits_until_the_numbers_are_known_to_be_good(run, tmp_path, capsys, priors):
    folder = shutil.copytree(run[0], tmp_path / "demo")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for flags in (["--steps", "0"], ["--motion.optimizer.factor", "inf"], ["--static.phases.0.width", "0"]):
        fails(capsys, "text-to-4d", PROMPT, "--out", str(folder), "--overwrite", *priors, *flags)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def doors(monkeypatch, run, tmp_path):
    """Commands end where the work would begin; the fixture is a function that says how: what was refused, or None."""
    from dream4d_engine import cli
    from dream4d_engine.cli import batch, bench, export, import_scene, motion, render, results, runs, stages

    class Begun(Exception):
        pass

    def begin(*_args, **_given):
        raise Begun

    monkeypatch.setattr(runs, "start_run", begin)
    monkeypatch.setattr(stages, "prior_handles", lambda *_: {})
    monkeypatch.setattr(batch, "read_list", begin)
    monkeypatch.setattr(bench, "_measure", begin)
    monkeypatch.setattr(results, "measure_range", begin)
    monkeypatch.setattr(render, "check_folder", lambda *_: None)
    monkeypatch.setattr(export, "export_scene", begin)
    monkeypatch.setattr(import_scene, "read_model", begin)
    monkeypatch.setattr(motion, "load_scene", begin)
    said: list[str] = []
    monkeypatch.setattr(cli, "report", lambda error, **_: said.append(f"{type(error).__name__}: {error}") or 2)
    places = {"SCENE": str(run[0] / "scene.safetensors"), "OUT": str(tmp_path / "out")}

    def refused(*words: str) -> str | None:
        said.clear()
        assert main([places.get(word, word) for word in words]) == 2
        (line,) = said
        return None if line.startswith("Begun: ") else line

    return refused


NUMBERS = {
    ("text-to-3d", PROMPT, "--out", "OUT"): {
        **{"--seed": "0", "--steps": "", "--size": "", "--orbit-frames": "", "--part-frames": "", "--fps": ""},
        **{"--samples": "", "--threads": "", "--image-lora-strength": "0 -1"},
    },
    ("text-to-3d", PROMPT, "--recipe", "toy-personalised", "--out", "OUT"): {"--sd-view": ""},
    ("text-to-4d", PROMPT, "--out", "OUT"): {
        **{"--motion-steps": "", "--hifa-steps": "", "--deformation-scale": "", "--motion-strength": ""},
        **{"--motion-frames": ""},
    },
    ("animate", "SCENE", PROMPT, "--out", "OUT"): {
        **{"--seed": "0", "--steps": "", "--hifa-steps": "", "--rigidity": "0", "--gradient-frames": "0"},
        **{"--motion-strength": ""},
    },
    ("import", "mesh.glb", "--out", "OUT.safetensors"): {"--seed": "0", "--time": "0", "--fill": ""},
    ("bench",): {"--steps": "", "--warmup": "0"},
    ("batch", "prompts.jsonl", "--out", "OUT"): {"--workers": "", "--retries": "0"},
    ("motion", "SCENE", "--out", "OUT.safetensors", "--ping-pong"): {
        "--motion-strength": "0",
        "--freeze-border": "",
        "--speed": "",
    },
    ("export", "SCENE", "--out", "OUT", "--format", "glb"): {
        **{"--times": "", "--time": "0", "--resolution": "", "--faces": "0", "--threshold": "", "--smoothing": "0"},
        **{"--texture": "0", "--duration": "", "--error": ""},
    },
    ("render", "SCENE", "--out", "OUT"): {
        **{"--frames": "", "--fps": "", "--distance": "", "--fov-y-deg": "", "--samples": "", "--size": ""},
        **{"--azimuth-deg": "0 -1", "--elevation-deg": "0 -1", "--time": "0"},
    },
}
"""The flags that take a number, and which of 0 and -1 they take."""
ANY_BILLION = {"--seed", "--steps", "--motion-steps", "--warmup", "--rigidity"}


@pytest.mark.parametrize("command", NUMBERS, ids=[words[0] + str(len(words)) for words in NUMBERS])
def test_every_number_is_checked_where_it_is_typed(command, doors):
    assert doors(*command) is None, "without the flags the work begins"
    for flag, allowed in NUMBERS[command].items():
        twice = command[0] == "render" and flag == "--size"
        others = ("inf", "-inf", "99999999999999999999", "", "1e400") if flag in ("--fps", "--hifa-steps") else ()
        for value in ("nan", "-1", "0", "1000000000", "x", *others):
            line = doors(*command, flag, value, *([value] if twice else []))
            if (value and value in allowed.split()) or (value == "1000000000" and flag in ANY_BILLION):
                assert line is None, f"{flag} {value}: {line}"
                continue
            assert line is not None, f"{flag} {value!r} went through"
            assert flag.lstrip("-").replace("-", "_") in line.replace("-", "_"), line
            if not value:
                assert f"{flag} is empty: give it a value, or leave it away" in line
                continue
            assert "must lie in [" in line or "must be a " in line or "takes whole numbers" in line, line
            assert not any(raw in line for raw in ("literal", "convert", "instantiated", "Tuple", "Error parsing")), (
                line
            )


def test_no_flag_of_a_number_is_left_out():
    """The walk above names the flags: a new one must be added there."""
    from typing import get_args, get_type_hints

    def numbers(kind: type) -> set[str]:
        found = set()
        for name, hint in get_type_hints(kind).items():
            if is_dataclass(hint):
                found |= numbers(hint) if hint.__module__.startswith("dream4d_engine.cli.") else set()
            elif {int, float} & {hint, *get_args(hint)}:
                found.add(name)
        return found

    walked = {flag.lstrip("-").replace("-", "_") for flags in NUMBERS.values() for flag in flags}
    for name in FILES:
        assert numbers(find_command(name).options) <= walked, name


def leaves(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The places of all floats in a tree of dataclasses and tuples."""
    if isinstance(value, float):
        yield path
    elif is_dataclass(value):
        for f in fields(value):
            yield from leaves(getattr(value, f.name), (*path, f.name))
    elif isinstance(value, tuple):
        for index, part in enumerate(value):
            yield from leaves(part, (*path, index))


def changed(value: object, path: tuple, new: float) -> object:
    """The tree with another number at one place."""
    if not path:
        return new
    first, *rest = path
    if isinstance(value, tuple):
        return tuple(changed(part, rest, new) if index == first else part for index, part in enumerate(value))
    return replace(value, **{first: changed(getattr(value, first), rest, new)})


@pytest.mark.parametrize("recipe", [STATIC_RECIPES["toy"], MOTION_RECIPES["toy"], IMAGE_RECIPES["toy-image"]])
def test_no_number_of_a_recipe_may_be_none_at_all(recipe):
    """All of them are flags too."""
    from dream4d_engine.training.validate import check_recipe

    places = list(leaves(recipe))
    assert len(places) > 40
    for path in places:
        for value in (math.nan, math.inf, -math.inf):
            with pytest.raises(ValueError) as caught:
                check_recipe(changed(recipe, path, value), "static")
            names = [name for name in path if isinstance(name, str)]
            assert any(name in str(caught.value) for name in names), f"{path} {value}: {caught.value}"
            assert "literal" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu:x", "unknown device 'cpu:x': a number stands behind the colon, here cpu:0"),
        ("cpu:", "a number stands behind the colon"),
        ("cpu:-1", "a number stands behind the colon"),
        ("cpu:\u0663", "a number stands behind the colon"),
        ("cpu:0:0", "a number stands behind the colon"),
        ("cpu:1", "device 'cpu:1' is not there: this machine has cpu:0"),
        ("cpu:99999999999", "a number stands behind the colon"),
        ("", "--device is empty: give it a value, or leave it away"),
        ("auto:0", "unknown device 'auto:0': choose auto, cuda, mps or cpu"),
        ("CPU", "unknown device 'CPU'"),
        ("cu\x1b[2Jda", "unknown device"),
        ("x" * 15000, "unknown device 'xxx"),
        ("xla:0", "unknown device 'xla:0'"),
    ],
)
def test_devices_that_are_not_there(device, expected, tmp_path, capsys):
    line = fails(capsys, "text-to-3d", PROMPT, "--out", str(tmp_path / "out"), "--device", device)
    assert expected in line and len(line) < 200 and "\x1b" not in line
    assert not (tmp_path / "out").exists()


def test_devices_by_number(monkeypatch):
    from dream4d_engine.machine import pick_device

    assert pick_device("cpu:0") == torch.device("cpu:0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert pick_device() == torch.device("cuda") and pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("mps:0") == torch.device("mps:0")
    for wish, there in (("cuda:99", "cuda:0 to cuda:1"), ("cuda:2", "cuda:0 to cuda:1"), ("mps:3", "mps:0")):
        with pytest.raises(ValueError, match=f"device '{wish}' is not there: this machine has {there}$"):
            pick_device(wish)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda:0' is not available here"):
        pick_device("cuda:0")


# ---- what reaches the terminal ---------------------------------------------------------------------------------------

STRANGE = "a red\ttruck \x1b[31mcube\x07\nis \u202ejumping\u2066 \x9b2J 立方体 \udcff"
SEEN = "a red truck \ufffd[31mcube\ufffd is \ufffdjumping\ufffd \ufffd2J 立方体 \ufffd"


def test_only_one_place_writes_to_the_terminal():
    """So that nothing gets there raw."""
    folder = Path(assets.__file__).parent / "cli"
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            raw = called == "print" or called.endswith((".stdout.write", ".stderr.write", "print_exc"))
            assert not raw or path.name == "terminal.py", f"{path.name}:{node.lineno}"


def test_what_is_said_is_printable(capsys):
    from rich.progress import Progress

    from dream4d_engine.cli.progress import Bars, make_progress
    from dream4d_engine.cli.terminal import say, say_json

    say(STRANGE, "second")
    say(STRANGE, error=True)
    make_progress().say(STRANGE)
    captured = capsys.readouterr()
    assert captured.out == f"{SEEN}\nsecond\n{SEEN}\n" and captured.err == f"{SEEN}\n"
    bars = Bars(Progress())
    bars._bars.console.width = 200
    bars.say(STRANGE)
    assert SEEN in capsys.readouterr().out
    tree = {"prompt": STRANGE + "\x7f\U000e0001\U0001f680", "at": [1, 2.5, None]}
    say_json(tree)
    text = capsys.readouterr().out
    assert json.loads(text) == tree, "JSON keeps the true text"
    assert all(letter.isprintable() or letter == "\n" for letter in text)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_the_terminals_encoding_stops_nothing(run, encoding):
    """As on Windows, and where LANG is C: letters that aren't there are written as their numbers."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    code = (
        f"import sys; from dream4d_engine.cli.terminal import *; prepare(); say({STRANGE!r}); say_json([{STRANGE!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    first, _, rest = done.stdout.decode(encoding).partition("\n")
    assert first.startswith("a red truck ") and b"\x1b" not in done.stdout
    assert json.loads(rest) == [STRANGE]


def test_prompts_that_would_color_a_terminal(run, tmp_path, capsys):
    """In a scene that came from elsewhere, an error, a file's name: nothing reaches the terminal raw."""
    scene, provenance = assets.load_scene(run[0] / "scene.safetensors")
    prompt = STRANGE.replace("\udcff", "")
    path = tmp_path / "evil\x1b[2J.safetensors"
    assets.save_scene(path, scene, replace(provenance, prompt=prompt))
    assert main(["info", str(path)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text and SEEN.rstrip("\ufffd ") in text
    assert main(["info", str(path), "--json"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and json.loads(text)["provenance"]["prompt"] == prompt
    assert main(["render", str(path), "--out", str(tmp_path / "r\x1b[2J"), "--frames", "1", "--size", "8", "8"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert "\x1b" not in fails(capsys, "render", str(tmp_path / "none\x1b[2J.safetensors"))
    assert "\x1b" not in fails(capsys, "text-to-3d", "a red \x1b[31mdragon\n", "--out", str(tmp_path / "out"))
    assert read_video(next(tmp_path.glob("r*")) / "orbit_rgb.mp4").title == SEEN.rstrip("\ufffd ")


def test_warnings_are_lines_of_the_terminal_too():
    code = "import logging; from dream4d_engine.cli.terminal import prepare; prepare(); "
    code += "logging.getLogger('dream4d_engine.x').warning('a \x1b[2J line'); logging.getLogger('x').info('not this')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
    )
    assert done.stderr.decode("utf-8").splitlines() == ["a \ufffd[2J line"]


def test_flags_may_have_underscores():
    call = parse("text-to-4d", [PROMPT, "--motion_recipe=zeroscope-72x40", "--out", "x"])
    assert call.motion == MOTION_RECIPES["zeroscope-72x40"]
    assert call == parse("text-to-4d", [PROMPT, "--motion-recipe", "zeroscope-72x40", "--out", "x"])


def test_half_written_files_of_a_killed_run_go(tmp_path):
    half, other = tmp_path / ".video.mp4.123.tmp", tmp_path / ".mine.tmp"
    for path in (half, other):
        path.write_bytes(b"half")
    sweep(tmp_path, ["video.mp4"])
    assert not half.exists() and other.exists()


def test_render_refuses_numbers_before_it_makes_a_folder(run, tmp_path, capsys):
    out = tmp_path / "r"
    words = ["render", str(run[0] / "scene.safetensors"), "--out", str(out)]
    for flags, name in [
        (["--fps", "nan"], "--fps"),
        (["--azimuth-deg", "inf"], "--azimuth-deg"),
        (["--samples", "100000000"], "--samples"),
        (["--size", "100000", "100000"], "--size must lie in [1, 8192], got 100000"),
    ]:
        assert name in fails(capsys, *words, *flags)
    assert not out.exists()


def test_resume_refuses_other_settings(run, tmp_path, capsys):
    folder = tmp_path / "again"
    folder.mkdir()
    record = json.loads((run[0] / "run.json").read_text()) | {"status": "interrupted"}
    (folder / "run.json").write_text(json.dumps(record))
    base = ["text-to-4d", "--resume", str(folder)]
    for words, name in [
        (["a blue cube is jumping"], "prompt"),
        (["--recipe", "text-to-3d"], "recipe"),
        (["--seed", "1"], "seed"),
        (["--steps", "10"], "static.steps"),
        (["--motion.guidance.0.distillation.guidance-scale", "7"], "guidance_scale"),
    ]:
        line = fails(capsys, *base, *words)
        assert name in line and "resume with the same settings" in line
    assert "text-to-4d" in fails(capsys, "text-to-3d", "--resume", str(folder))
    assert "leave --out" in fails(capsys, *base, "--out", str(tmp_path / "other"))
    (folder / "run.json").write_text("{")
    assert "run.json is not valid JSON" in fails(capsys, *base)
    (folder / "run.json").write_text(json.dumps(record | {"settings": {"options": {}}}))
    assert "can't be used to resume" in fails(capsys, *base)


def test_damaged_and_foreign_files(run, tmp_path, capsys):
    from safetensors.torch import save_file

    whole = (run[0] / "scene.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.safetensors").write_text("no scene at all")
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    newer = whole.replace(b'"format_version":"1"', b'"format_version":"9"')
    assert newer != whole
    (tmp_path / "newer.safetensors").write_bytes(newer)
    for name, expected in [("cut", "readable"), ("text", "readable"), ("foreign", "not a dream4d"), ("newer", "newer")]:
        path = str(tmp_path / f"{name}.safetensors")
        assert expected in fails(capsys, "render", path, "--out", str(tmp_path / "r"))
        assert expected in fails(capsys, "info", path)
        assert expected in fails(capsys, "animate", path, PROMPT, "--out", str(tmp_path / "r"))
    assert "not a readable checkpoint" in fails(
        capsys, "import", str(tmp_path / "text.safetensors"), "--out", str(tmp_path / "s.safetensors")
    )
    assert not (tmp_path / "r").exists() and not (tmp_path / "s.safetensors").exists()


def test_render_every_pass(run, tmp_path, capsys):
    scene, out = str(run[0] / "scene.safetensors"), tmp_path / "r"
    passes = ["rgb", "depth", "normals", "opacity", "displacement"]
    words = ["render", scene, "--out", str(out), "--path", "fixed", "--frames", "3", "--size", "24", "16", "--png"]
    assert main([*words, "--passes", *passes]) == 0
    for name in passes:
        assert read_video(out / f"fixed_{name}.mp4").frames.shape == (3, 16, 24, 3)
        assert sorted(p.name for p in (out / f"fixed_{name}").iterdir()) == ["0000.png", "0001.png", "0002.png"]
    assert "exists" in fails(capsys, *words)
    assert main([*words, "--overwrite"]) == 0
    assert main(["render", scene, "--out", str(out), "--frames", "2", "--size", "8", "8", "--path", "final"]) == 0
    assert read_video(out / "final_rgb.mp4").frames.shape == (16, 8, 8, 3)
    assert "--time" in fails(capsys, "render", scene, "--out", str(out), "--time", "2")
    assert "--frames" in fails(capsys, "render", scene, "--out", str(out), "--frames", "0")


def test_info_says_what_a_file_holds(run, tmp_path, capsys):
    path = run[0] / "scene.safetensors"
    assert main(["info", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "moving scene"
    assert found["bytes"] == path.stat().st_size
    assert found["provenance"]["prompt"] == PROMPT
    assert found["config"]["n_samples"] == 24
    held = tensors_of(path)
    assert {name: tensor["shape"] for name, tensor in found["tensors"].items()} == {
        name: list(tensor.shape) for name, tensor in held.items()
    }
    assert main(["info", str(path)]) == 0
    text = capsys.readouterr().out
    first, motion, *told, last = text.splitlines()
    assert first == f"{path}: moving scene, zoom 1.00, {path.stat().st_size / 2**20:.2f} MiB"
    assert motion == "motion: --motion measures it" and told == assets.read_info(path).provenance.lines
    assert f"prompt: {PROMPT}" in told and "made from:" in told
    n_numbers = sum(tensor.numel() for tensor in held.values())
    assert last == f"{len(held)} tensors, {n_numbers:,} numbers: --all names them, and every setting"
    assert main(["info", str(path), "--all"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (PROMPT, "canonical.grid.table", "n_samples: 24", "torch: ", *held))


def test_a_run_and_info_say_how_much_the_scene_moves(run, tmp_path, capsys):
    folder, output = run
    written = json.loads((folder / "metrics.json").read_text())["motion"]
    found = measure_motion(assets.load_scene(folder / "scene.safetensors")[0])
    assert MotionReadout(**written).line == found.line and found.line in output
    assert main(["info", str(folder)]) == 0
    assert f"motion: {found.line}\n" in capsys.readouterr().out
    assert main(["info", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["motion"] == written
    path = tmp_path / "scene.safetensors"
    assets.save_scene(path, tiny_scene())
    assert main(["info", str(path), "--motion", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["motion"]
    assert MotionReadout(**told).line == measure_motion(tiny_scene()).line and told["moving_share"] > 0.5
    assets.save_scene(path, tiny_scene(replace(CONFIG, deformation=None)))
    assert main(["info", str(path), "--motion"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "motion: still"


def test_what_takes_longer_than_it_should_tells_how_far_it_is(monkeypatch):
    written: list[str] = []
    told = patient(Lines(written.append), "measures")
    told(0.5)
    assert not written
    monkeypatch.setattr("dream4d_engine.cli.progress.PATIENCE", -1.0)
    told(0.75)
    told(1.0)
    assert written == ["measures: step 75/100", "measures: step 100/100"]


def test_info_measures_the_motion_of_scenes_alone(run, tmp_path, capsys):
    assert "name one, for example" in fails(capsys, "info", str(run[0]), "--motion")
    assert "--motion is for scene files" in fails(capsys, "info", "--motion", "--kernels")
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    for text, said in (
        ("{", "metrics.json"),
        ('{"motion": {"strain": 1}}', "lacks 'n_points'"),
        ('{"motion": 3}', "object"),
    ):
        (folder / "metrics.json").write_text(text)
        assert said in fails(capsys, "info", str(folder))
    for text in ("{}", '{"motion": null}'):
        (folder / "metrics.json").write_text(text)
        assert main(["info", str(folder)]) == 0
        assert not any(line.startswith("motion:") for line in capsys.readouterr().out.splitlines())


def test_info_says_which_kernels_are_in_use(run, capsys):
    assert main(["info", "--kernels", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    best = "numba" if find_spec("numba") else "torch"
    assert f"kernels on cpu: {best}" in text and "not usable: they need a CUDA device" in text
    assert main(["info", str(run[0] / "scene.safetensors"), "--kernels", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "moving scene" and found["kernels"]["used"] == best
    assert [status["usable"] for status in found["kernels"]["backends"]][-1] is True
    assert "--kernels" in fails(capsys, "info")


def test_import_of_a_checkpoint(tmp_path, capsys):
    found = sorted((DATA).rglob("stage2.ckpt"))
    if not found:
        pytest.skip("tests/data has no stage2.ckpt")
    out = tmp_path / "imported.safetensors"
    assert main(["import", str(found[0]), "--out", str(out)]) == 0
    assert assets.load_scene(out)[0].deformation is not None
    assert "exists" in fails(capsys, "import", str(found[0]), "--out", str(out))


def test_bench_measures(tmp_path, capsys, priors):
    out = tmp_path / "bench.json"
    words = ["bench", "--recipes", "static:toy", "motion:toy", "--steps", "2", "--warmup", "1", "--out", str(out)]
    assert main([*words, *priors]) == 0
    text = capsys.readouterr().out
    found = json.loads(out.read_text())["recipes"]
    assert [entry["recipe"] for entry in found] == ["static:toy", "motion:toy"]
    assert all(entry["seconds_per_step"] > 0 and entry["peak_memory_bytes"] > 2**20 for entry in found)
    for entry in found:  # a cloud in the middle: more than one on each ray through it, fewer than a ray has
        n_images, width, height = map(int, re.findall("[0-9]+", entry["images"]))
        rays = n_images * width * height
        assert rays / 4 < entry["samples"] < 64 * rays and f"{entry['samples']:,}" in text
    assert "static:toy" in text and "GiB" in text


def test_help_and_version(capsys):
    from dream4d_engine import __version__

    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert all(name in text for name in FILES)
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    for name in FILES:
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert name in text and "--static.scene" not in text
    assert main(["text-to-4d", "--help-all", "--recipe", "text-to-3d"]) == 0
    text = capsys.readouterr().out
    assert "--static.scene.radiance.grid.n-levels" in text and "--motion.guidance.0.weight" in text
    assert "10000" in text


def test_help_of_all_commands_brings_no_torch_in():
    code = "import sys; from dream4d_engine.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0


def test_every_file_of_a_command_is_registered():
    folder = Path(assets.__file__).parent / "cli"
    of_commands = {path.stem for path in folder.glob("*.py") if "\nCOMMAND = " in path.read_text(encoding="utf-8")}
    assert of_commands == set(FILES.values())


def test_every_number_of_a_recipe_is_a_flag():
    words = [
        "x",
        "--static.scene.radiance.grid.n-levels",
        "5",
        "--static.guidance.0.distillation.min-noise.last",
        "0.3",
    ]
    call = parse("text-to-3d", [*words, "--steps", "7", "--static.scene.background.color", "0.1", "0.2", "0.3"])
    assert call.static.scene.radiance.grid.n_levels == 5
    assert call.static.guidance[0].distillation.min_noise.last == 0.3
    assert call.static.scene.background.color == (0.1, 0.2, 0.3)
    assert call.static.steps == 7
    assert call.static.cameras == STATIC_RECIPES["toy"].cameras


@pytest.mark.parametrize("name", sorted(MOTION_RECIPES))
def test_recipes_arrive_unchanged(name):
    call = parse("text-to-4d", ["x", "--recipe", "text-to-3d", "--motion-recipe", name])
    assert call.static == STATIC_RECIPES["text-to-3d"]
    assert call.motion == MOTION_RECIPES[name]


def test_lines_come_every_few_seconds_and_at_the_end():
    now, lines = [0.0], []
    progress = Lines(lines.append, lambda: now[0])
    progress.begin("static", 100)
    for step in range(1, 101):
        now[0] = step * 0.5
        progress.update("static", step, loss=2.0, remaining=(100 - step) * 0.5)
    assert lines[0] == "static: step 1/100, loss 2, 50 s left"
    assert lines[-1] == "static: step 100/100, loss 2"
    assert 9 <= len(lines) <= 12
    assert [clock_text(s) for s in (8, 125, 3723, None)] == ["8 s", "2:05", "1:02:03", ""]


@pytest.mark.parametrize(
    "words",
    [
        ["text-to-3d", PROMPT, "--out", ""],
        ["text-to-4d", "--resume", ""],
        ["text-to-3d", PROMPT, "--out="],
        ["text-to-3d", PROMPT, "--tiny-vae", ""],
        ["render", "a.safetensors", "--out", ""],
        ["convert", "a.ckpt", "--overwrite", "--out", ""],
        ["info", ""],
        ["animate", "", PROMPT, "--out", "q"],
        ["image-to-3d", "", "--prompt", PROMPT, "--out", "q"],
    ],
)
def test_an_empty_name_is_not_the_folder_we_are_in(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "empty" in fails(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_a_shorter_film_leaves_no_frames_of_a_longer_one(run, tmp_path, capsys):
    out = tmp_path / "r"
    words = ["render", str(run[0] / "scene.safetensors"), "--out", str(out), "--size", "8", "8", "--png", "--overwrite"]
    assert main([*words, "--frames", "3"]) == 0
    (out / "orbit_rgb" / "mine.png").write_bytes(b"")
    assert main([*words, "--frames", "1"]) == 0
    assert sorted(path.name for path in (out / "orbit_rgb").iterdir()) == ["0000.png", "mine.png"]


def test_files_and_folders_in_each_others_place_are_named_before_the_work(run, tmp_path, capsys):
    scene = str(run[0] / "scene.safetensors")
    (tmp_path / "a" / "orbit_rgb.mp4").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "orbit_rgb").write_bytes(b"")
    for name, kind in (("a", "is a folder where a file belongs"), ("b", "is a file where a folder belongs")):
        assert kind in fails(capsys, "render", scene, "--out", str(tmp_path / name), "--png", "--overwrite")
    assert "is a folder where a file belongs" in fails(capsys, "import", scene, "--out", str(tmp_path), "--overwrite")
