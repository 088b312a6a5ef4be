"""Lists of scenes: what is refused before the first one starts, and batches that stop, go on and fail."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import SMALL, fails, stop_after
from PIL import Image
from places import ROOT

from dream4d_engine import locks
from dream4d_engine.cli import batch_work, main
from dream4d_engine.cli.batch_job import Ended, Job, progress_of, row_of
from dream4d_engine.cli.batch_list import COMMANDS, read_list
from dream4d_engine.cli.batch_report import table, write_summary
from dream4d_engine.cli.batch_work import LocalPool, Watch, places_here, run_all
from dream4d_engine.cli.command import find_command
from dream4d_engine.cli.parsing import parse
from dream4d_engine.cli.run_folder import LOCK
from dream4d_engine.export import pick_frames, read_video, write_video

QUICK = {"command": "text-to-3d", "static.scene.n-samples": 24, "static.loop.checkpoint_steps": 1}
QUICK |= {
    flag.removeprefix("--"): float(value) if "." in value else int(value)
    for flag, value in zip(SMALL[::2], SMALL[1::2], strict=True)
    if not any(word in flag for word in ("motion", "deform", "part", "n-samples", "checkpoint", "threads"))
}


def written(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def run_batch(*words: object) -> tuple[int, str]:
    """The exit code of a batch and what it said."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main(["batch", *map(str, words)])
    return code, output.getvalue()


def state_of(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"]


def tiles_of(sheet: Path, n_rows: int) -> np.ndarray:
    """The images on a sheet, [n_rows * 6, 96, 96, 3]."""
    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    assert n_rows * 102 < pixels.shape[0] < (n_rows + 1) * 102 and pixels.shape[1] > 6 * 102
    pixels = pixels[-102 * n_rows :, -102 * 6 :]
    return np.stack([pixels[102 * i :, 102 * k :][:96, :96] for i in range(n_rows) for k in range(6)])


@cache
def frames_of(film: Path) -> torch.Tensor:
    return read_video(film).frames


def shown(film: Path, index: int) -> np.ndarray:
    """A frame of a film as a sheet shows it."""
    frame = Image.fromarray(frames_of(film)[index].numpy())
    return np.asarray(frame.resize((96, 96), Image.Resampling.BICUBIC))


# ---- real scenes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, priors):
    """A folder with a list of one scene, which a run of the same words has begun and was stopped in, and one of two."""
    folder = tmp_path_factory.mktemp("batch")
    scene = QUICK | {"multiview_prior": priors[1], "prompt": "cube", "steps": 2, "name": "cube"}
    written(folder / "one.jsonl", scene)
    written(folder / "two.jsonl", scene, scene | {"name": "torus", "prompt": "torus", "memory-budget": "10GiB"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # of the scenes' processes
        patch.setenv("OMP_NUM_THREADS", "1")
        (job,) = read_list(folder / "one.jsonl", folder / "one", False, lambda share: None)
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            pytest.MonkeyPatch.context() as stopping,
        ):
            stop_after(stopping, "static", 1)
            assert main([job.command, *job.words, "--out", str(job.folder), "--device", "cpu"]) == 130
        yield folder


@pytest.fixture(scope="module")
def gone_on(place):
    """Gone on with by two workers of Ray, beside a scene that fails."""
    if find_spec("ray") is None:
        pytest.skip("ray is not installed")
    return run_batch(place / "two.jsonl", "--out", place / "one", "--ray", "local", "--workers", "2")


def test_ray_goes_on_where_a_scene_was_stopped_and_past_one_that_fails(place, gone_on):
    code, said = gone_on
    assert code == 1, said
    assert "2 scenes: 0 done before, 2 to do" in said and "cube: handed to Ray" in said
    folder = place / "one"
    assert state_of(folder / "cube") == "finished"
    resumed = json.loads((folder / "cube" / "run.json").read_text())["resumed"]
    assert [one["after"] for one in resumed] == ["interrupted"]
    assert json.loads((folder / "cube" / "run.json").read_text())["fits"]["static"]["resumed_from"] == 1
    rows = json.loads((folder / "summary.json").read_text())
    assert [(row["name"], row["state"]) for row in rows] == [("cube", "done"), ("torus", "failed")]
    why = "--memory-budget is for GPUs, and the work is done on cpu"
    assert why in rows[1]["error"] and any(
        line.startswith("torus  failed") and why in line for line in said.split("\n")
    )


def test_summary_holds_seconds_and_measures(place, gone_on):
    folder = place / "one"
    (row,) = [one for one in json.loads((folder / "summary.json").read_text()) if one["name"] == "cube"]
    assert row["metrics"] == json.loads((folder / "cube" / "metrics.json").read_text())
    seconds = json.loads((folder / "cube" / "run.json").read_text())["seconds"]
    assert row["seconds"] == pytest.approx(sum(seconds.values()), abs=0.01) and row["seconds"] > 0.5
    with open(folder / "summary.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == ["cube", "torus"]
    assert float(lines[0]["scene.coverage"]) == row["metrics"]["scene"]["coverage"] and lines[1]["scene.coverage"] == ""


def test_sheet_shows_the_scenes_that_are_done(place, gone_on):
    assert np.array_equal(tiles_of(place / "one" / "contact.png", 1)[0], shown(place / "one" / "cube" / "orbit.mp4", 0))


def test_what_is_done_is_skipped(place, gone_on):
    before = (place / "one" / "cube" / "scene.safetensors").stat().st_mtime_ns
    code, said = run_batch(place / "one.jsonl")
    assert code == 0 and "1 done before, 0 to do" in said and "started" not in said and "handed" not in said
    assert (place / "one" / "cube" / "scene.safetensors").stat().st_mtime_ns == before


def test_another_run_in_a_scene_s_folder_is_neither_skipped_nor_gone_on_with(place, tmp_path, capsys):
    scene = json.loads((place / "one.jsonl").read_text())
    for change, said in (
        ({"seed": 5}, "holds another run (seed is 5, the run there has 0)"),
        ({"steps": 7}, "static.steps is 7, the run there has 2"),
        ({"prompt": "a blue cube"}, "prompt is 'a blue cube'"),
        ({"command": "text-to-4d", "size": 16}, "holds a run of 'text-to-3d'"),
    ):
        line = {key: value for key, value in scene.items() if key not in ("command",)} | change
        if "command" not in change:
            line["command"] = "text-to-3d"
        path = written(tmp_path / "other.jsonl", line)
        found = fails(capsys, "batch", str(path), "--out", str(place / "one"))
        assert said in found and 'give the scene another "name"' in found


# ---- the door ----------------------------------------------------------------------------------------------------

CUBE = '{"prompt": "a red cube"}'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty: write a line for each scene"),
        (b"\xef\xbb\xbf\r\n \n", "is empty: write a line for each scene"),
        (b'{"prompt": "a red cube"}\n{"prompt": \n', ", line 2 is not valid JSON"),
        (b'\n\n{"prompt": "a red cube", "prompt": "a cone"}', "line 3: 'prompt' is given twice"),
        (b'["a red cube"]', "line 1 must hold an object"),
        (b'{"prompt": "a red \xe9 cube"}', "line 1 is no text in UTF-8"),
        (CUBE.encode("utf-16"), "line 1 is no text in UTF-8: save it in this encoding (not in UTF-16"),
        (CUBE.encode("utf-16-le"), "line 1 is no text in UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b'{"seed": 1}', 'line 1: there is no "prompt": add it, text-to-4d needs one'),
        (b'{"promt": "a red cube"}', "line 1: Unrecognized options: --promt"),
        (
            b'{"command": "text-to-3d", "prompt": "a red cube", "sed": 1}',
            "line 1: Unrecognized options: --sed, 1; perhaps you meant --seed",
        ),
        (b'{"prompt": "  "}', "line 1: the prompt is empty"),
        (b'{"prompt": 3}', "line 1: prompt must be text, got 3"),
        (b'{"prompt": "--overwrite"}', "would be taken for a flag"),
        (b'{"command": "text-to-3d", "prompt": "a red cube", "seed": "1 2"}', "--seed must be a whole number"),
        (b'{"command": "text-to-3d", "prompt": "a red cube", "seed": -1}', "--seed must lie in [0,"),
        (b'{"prompt": "a red cube", "fps": NaN}', "--fps must be a finite number"),
        (b'{"prompt": "a red cube", "seed": {"a": 1}}', "--seed must be a text, a number"),
        (b'{"prompt": "a red cube", "static.cameras.distance": [3, "--overwrite"]}', "would be taken for a flag"),
        (b'{"prompt": "a red cube", "static.cameras.distance": []}', "is an empty list"),
        (b'{"command": "text-to-3d", "prompt": "a red cube", "static.cameras.distance": [3, 2]}', "lower bound first"),
        (b'{"prompt": "a red cube", "motion-steps": 3, "motion_steps": 4}', "--motion-steps is given twice"),
        (b'{"prompt": "a red cube", "lop": true}', "Unrecognized options: --lop"),
        (b'{"prompt": "a red cube", "help": true}', "is no flag"),
        (b'{"prompt": "a red cube", "a b": 1}', "is no flag"),
        (b'{"prompt": "a red cube", "overwrite": true}', "'overwrite' is for the whole batch"),
        (b'{"prompt": "a red cube", "out": "x"}', "'out' is for the whole batch"),
        (b'{"command": "text-to-3d", "prompt": "a red cube", "device": "cpu"}', "'device' is for the whole batch"),
        (b'{"prompt": "a red cube", "command": "render"}', "unknown command 'render': a batch runs text-to-4d"),
        (b'{"prompt": "a red cube", "command": ["x"]}', "unknown command ['x']"),
        (b'{"prompt": "a red cube", "recipe": "grand"}', "unknown recipe 'grand'"),
        (b'{"command": "text-to-3d", "prompt": "a red cube", "memory-budget": "10GiB"}', "--memory-budget is for GPUs"),
        (b'{"command": "text-to-3d", "prompt": "a red cube", "multiview-prior": "none"}', "no model folder"),
        (b'{"prompt": "a green house"}', "does not know 'house'"),
        (b'{"prompt": "cube", "command": "image-to-3d"}', 'there is no "image"'),
        (b'{"prompt": "cube", "command": "image-to-3d", "image": "none.png"}', "none.png"),
        (b'{"prompt": "cube", "command": "animate", "scene": "none.safetensors"}', "does not exist"),
        (b'{"command": "text-to-3d", "prompt": "a red cube", "name": "../x"}', "leads out of the batch's folder"),
        (b'{"prompt": "a red cube", "name": "a\\\\b"}', "leads out of the batch's folder"),
        (b'{"command": "text-to-3d", "prompt": "a red cube", "name": ".."}', "is no name for a folder"),
        (b'{"command": "text-to-3d", "prompt": "a red cube", "name": ""}', "is no name for a folder"),
        (b'{"command": "text-to-3d", "prompt": "a red cube", "name": "nul"}', "is the name of a device on Windows"),
        (b'{"command": "text-to-3d", "prompt": "a red cube", "name": "a:b"}', "holds ':'"),
        (b'{"command": "text-to-3d", "prompt": "a red cube", "name": "a."}', "ends in '.'"),
        (b'{"command": "text-to-3d", "prompt": "a red cube", "name": 3}', "name must be text"),
        (CUBE.encode() + b"\n" + CUBE.encode(), "line 2: the name 'a-red-cube' is taken by line 1"),
        (b'{"prompt": "a red cube", "name": "Cube"}\n{"prompt": "a blue cube", "name": "cube"}', "is taken by line 1"),
    ],
)
def test_lists_that_are_refused_before_anything_starts(content, said, tmp_path, capsys):
    path = tmp_path / "list.jsonl"
    path.write_bytes(content)
    assert said in fails(capsys, "batch", str(path))
    assert [one.name for one in tmp_path.iterdir()] == ["list.jsonl"], "nothing was made"


def test_all_faults_of_a_list_are_said_at_once(tmp_path, capsys):
    path = written(tmp_path / "l.jsonl", {"prompt": "a red cube"}, {"prompt": ""}, {"prompt": "a red cube", "seed": -1})
    assert main(["batch", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "line 2: the prompt is empty" in lines[0] and "line 3: --seed" in lines[1]
    assert "2 of the 3 lines" in lines[2] and "nothing was started" in lines[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say which scenes"),
        (["none.jsonl"], "none.jsonl can't be read: No such file"),
        (["LIST", "--only", "0/4"], "--only must be I/N with I from 1 to N, as 1/4 to 4/4, got '0/4'"),
        (["LIST", "--only", "5/4"], "--only must be I/N"),
        (["LIST", "--workers", "0"], "--workers must lie in [1, 1024], got 0"),
        (["LIST", "--retries", "-1"], "--retries must lie in [0, 100], got -1"),
        (["LIST", "--out", "LIST"], "is a file: choose a folder for the scenes with --out"),
        (["LIST", "--device", "quantum"], "unknown device 'quantum'"),
        (["LIST", "--ray", "local", "--device", "cuda:1"], "say --device cuda, not cuda:1"),
    ],
)
def test_batches_that_make_no_sense(words, said, tmp_path, capsys):
    path = str(written(tmp_path / "list.jsonl", {"prompt": "a red cube"}))
    if "cuda:1" in words and not torch.cuda.is_available():
        said = "not available here"
    assert said in fails(capsys, "batch", *(path if word == "LIST" else word for word in words))


def test_an_address_where_no_cluster_is(tmp_path, capsys):
    pytest.importorskip("ray", reason="ray is not installed")
    path = written(tmp_path / "list.jsonl", {"prompt": "a red cube"})
    with socket.socket() as nobody:  # bound, and nobody listens
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        for one in (address, f"ray://{address}"):
            assert f"no Ray cluster answers at '{one}'" in fails(capsys, "batch", str(path), "--ray", one)


def test_a_folder_that_can_take_no_run_is_refused(tmp_path, capsys):
    path = written(tmp_path / "list.jsonl", {"prompt": "a red cube"})
    (tmp_path / "list" / "a-red-cube" / "scene.safetensors").mkdir(parents=True)
    assert "is a folder where a file belongs" in fails(capsys, "batch", str(path))


def test_lines_become_the_words_of_the_command(tmp_path, monkeypatch):
    """With a mark at the beginning, CRLF, blank lines, letters that break lines elsewhere, and true, false and null."""
    lines = [
        {"prompt": "a red\u2028cube is jumping", "loop": True, "compile": False, "seed": 7, "fps": 12.5, "lora": None},
        {"prompt": "a red cube", "command": "text-to-3d", "name": "立方体", "loop": None, "compile": True},
        {"prompt": "a cone", "static.cameras.distance": [2, 3], "loop": False, "motion_steps": 9},
    ]
    path = tmp_path / "list.jsonl"
    text = "\r\n\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    jobs = read_list(path, tmp_path / "out", False, lambda share: None)
    assert [job.name for job in jobs] == ["a-red-cube-is-jumping-7", "立方体", "a-cone"]
    assert [job.number for job in jobs] == [1, 3, 5]
    assert [job.folder for job in jobs] == [tmp_path / "out" / job.name for job in jobs]
    assert jobs[0].words == (
        *(lines[0]["prompt"], "--seed", "7", "--fps", "12.5"),
        *("--loop", "--no-compile"),
    )
    assert jobs[1].words == ("a red cube",) and jobs[1].command == "text-to-3d"
    call = parse(jobs[2].command, jobs[2].words)
    assert call.static.cameras.distance == (2, 3) and call.motion.steps == 9 and not call.options.loop
    assert jobs[2].stages[1] == ("motion", 9)


def test_every_command_of_a_batch_can_be_checked_without_running():
    for name in COMMANDS:
        assert find_command(name).options().folders.dry_run is False


def test_a_run_can_be_checked_without_being_made(tmp_path, capsys):
    words = ["text-to-3d", "a red cube", "--out", str(tmp_path / "new"), "--dry-run"]
    assert main(words) == 0
    assert "nothing was made" in capsys.readouterr().out and not (tmp_path / "new").exists()
    assert "is a file" in fails(capsys, *words[:3], str(written(tmp_path / "file", {})), "--dry-run")


def test_only_a_part_of_the_list(tmp_path, capsys):
    path = written(
        tmp_path / "list.jsonl", *({"command": "text-to-3d", "prompt": "cube", "seed": seed} for seed in range(3))
    )
    for part, n in (("1/2", 2), ("2/2", 1)):
        code, said = run_batch(path, "--only", part, "--dry-run")
        assert code == 0 and f"scene{'s' * (n > 1)} of part {part}: 0 done before, {n} to do" in said


# ---- processes ---------------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, pathlib, signal, sys, time
folder, = pathlib.Path(sys.argv[-1]),
print("static: step 3/9, loss 1.5, 0:20 left", flush=True)
def status(s): (folder / "run.json").write_text(json.dumps({"status": s, "seconds": {"static": 2.5}}))
tries = folder / "tries"
tries.write_text(tries.read_text() + "x" if tries.exists() else "x") if "count" in sys.argv else None
def stop(*signal): status("interrupted"); sys.exit(143)
if "wait" in sys.argv or "a red torus" in sys.argv: signal.signal(15, stop); status("running"); time.sleep(60)
if "die" in sys.argv and len(tries.read_text()) < 3: status("running"); os.kill(os.getpid(), 9)
if "fail" in sys.argv: print("dream4d: error: it is so", file=sys.stderr); sys.exit(2)
(folder / "gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "") + " " + sys.argv[-2])
status("finished")
"""


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """Jobs whose processes run the script above instead of dream4d: it does at once what its words say."""
    monkeypatch.setattr(batch_work, "PROGRAM", (sys.executable, "-S", "-c", SCRIPT))

    def job(name: str, *words: str) -> Job:
        return Job(1, name, "text-to-3d", words, tmp_path / name, "a cube", 0, (("static", 9),))

    return job


def ran(jobs: list[Job], places=((({}, "cpu"),) * 2), retries: int = 2, stop=lambda: False):
    """What became of the jobs, and what was told on the way."""
    told: list[tuple] = []
    watch = Watch(
        lambda job, where: told.append(("start", job.name, where)),
        lambda job, ended: told.append(("end", job.name)),
        lambda job, ended, left: told.append(("retry", job.name, left)),
        lambda: None,
    )
    pool = LocalPool(places, ["--device", "cpu"])
    return run_all(jobs, pool, retries, watch, stop), told


def test_a_killed_scene_is_gone_on_with_and_a_failed_one_is_not(scripted):
    jobs = [scripted("dies", "count", "die"), scripted("fails", "count", "fail"), scripted("fine")]
    found, told = ran(jobs)
    assert found == {"dies": Ended("done"), "fails": Ended("failed", "it is so"), "fine": Ended("done")}
    assert [one for one in told if one[0] == "retry"] == [("retry", "dies", 1), ("retry", "dies", 0)]
    assert (jobs[0].folder / "gpu").read_text().split() == ["--resume"], "the third process went on"
    assert (jobs[1].folder / "tries").read_text() == "x"
    assert (jobs[2].folder / "gpu").read_text().split() == ["--out"]


def test_retries_come_to_an_end(scripted):
    found, _ = ran([scripted("dies", "count", "die")], retries=1)
    assert found["dies"].state == "killed" and "signal 9" in found["dies"].error


def test_each_process_sees_a_gpu_of_its_own(scripted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    monkeypatch.setattr(batch_work, "n_cores", lambda: 12)
    device = torch.device("cuda")
    places = places_here(device, None, None)
    assert [words for _, words in places] == ["GPU 5", "GPU GPU-7"]
    assert [variables["OMP_NUM_THREADS"] for variables, _ in places] == ["6", "6"]
    assert [words for _, words in places_here(device, 3, None)] == ["GPU 5", "GPU GPU-7", "GPU 5"]
    assert places_here(torch.device("cuda", 1), None, 4) == [({"CUDA_VISIBLE_DEVICES": "GPU-7"}, "GPU GPU-7")]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [words for _, words in places_here(device, None, None)] == ["GPU 0", "GPU 1"]
    assert places_here(torch.device("cpu"), None, 1) == [({}, "cpu")]
    assert [variables for variables, _ in places_here(torch.device("cpu"), 4, None)] == [{"OMP_NUM_THREADS": "3"}] * 4
    jobs = [scripted(name) for name in "abcd"]
    _, told = ran(jobs, places)
    where = {name: words for what, name, *rest in told if what == "start" for words in rest}
    assert where["a"] == "started on GPU 5" and where["b"] == "started on GPU GPU-7"
    for job in jobs:
        assert f"started on GPU {(job.folder / 'gpu').read_text().split()[0]}" == where[job.name]


def test_two_batches_never_run_one_scene_at_once(scripted):
    taken, free = scripted("taken"), scripted("free")
    taken.folder.mkdir()
    held = locks.take(taken.folder / LOCK, taken.folder)
    try:
        found, _ = ran([taken, free])
        assert found["free"].state == "done"
        assert found["taken"].state == "running" and f"process {os.getpid()}" in found["taken"].error
        assert not (taken.folder / "log.txt").exists(), "no process was started"
        assert row_of(taken, found["taken"]).state == "running"
    finally:
        held.release()


def test_a_scene_that_another_batch_finished_meanwhile_is_done(scripted):
    job = scripted("fine")
    ran([job])
    before = (job.folder / "log.txt").read_bytes()
    assert ran([job])[0] == {"fine": Ended("done")} and (job.folder / "log.txt").read_bytes() == before


def test_a_stop_reaches_what_runs_and_starts_nothing_more(scripted):
    jobs = [scripted("waits", "wait"), scripted("never")]
    began = time.monotonic()
    found, _ = ran(jobs, places=(({}, "cpu"),), stop=lambda: (jobs[0].folder / "run.json").exists())
    assert found == {"waits": Ended("stopped")} and time.monotonic() - began < 30
    assert [row_of(job, found.get(job.name)).state for job in jobs] == ["stopped", "waiting"]


def test_ctrl_c_lets_the_scenes_save_and_the_same_command_goes_on(scripted, tmp_path, monkeypatch):
    path = written(tmp_path / "list.jsonl", {"prompt": "a red torus", "name": "long"}, {"prompt": "a red cube"})
    wait, before = LocalPool.wait, signal.getsignal(signal.SIGINT)

    def wait_and_press(pool):
        if (tmp_path / "list" / "long" / "run.json").exists():
            monkeypatch.setattr(LocalPool, "wait", wait)
            os.kill(os.getpid(), signal.SIGINT)
        return wait(pool)

    monkeypatch.setattr(LocalPool, "wait", wait_and_press)
    code, said = run_batch(path)
    assert code == 130 and "the same command goes on" in said and "long: stopped" in said
    assert [row["state"] for row in json.loads((tmp_path / "list" / "summary.json").read_text())] == [
        "stopped",
        "waiting",
    ]
    assert state_of(tmp_path / "list" / "long") == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before


def test_what_the_folders_say_of_scenes_of_before(scripted):
    job = scripted("cube")
    assert row_of(job).state == "waiting" and row_of(job).seconds is None
    job.folder.mkdir()
    job.log.write_text("dream4d: error: no room\n")
    assert (row_of(job).state, row_of(job).error) == ("failed", "no room")
    for status, state in (("running", "killed"), ("interrupted", "stopped"), ("failed", "failed")):
        (job.folder / "run.json").write_text(json.dumps({"status": status, "seconds": {"static": 1.5, "orbit": 2}}))
        assert (row_of(job).state, row_of(job).seconds) == (state, 3.5)
    (job.folder / "run.json").write_text("{")
    assert row_of(job).state == "failed" and "not valid JSON" in row_of(job).error
    (job.folder / "run.json").write_text(json.dumps({"status": "finished"}))
    (job.folder / "metrics.json").write_text(json.dumps({"scene": {"coverage": 0.25}, "truth": {"iou": 0.5}}))
    done = row_of(job)
    assert done.state == "done" and done.metrics["truth"] == {"iou": 0.5}
    lines = table([replace(done, name="立方体", seconds=125.0), replace(done, state="failed", error="why\x1b[2J")])
    assert lines == [
        "scene   state   time",
        "立方体  done    2:05  covers 25%, IoU 0.50",
        "cube    failed        why\x1b[2J",
    ]


def test_sheets_show_moments_or_views(scripted, tmp_path, capsys):
    names = ("moves", "stands", "形", "broken", "failed")
    jobs = [replace(scripted(name), number=i) for i, name in enumerate(names, 1)]
    for job in jobs:
        job.folder.mkdir()
        (job.folder / "run.json").write_text(json.dumps({"status": "failed" if job.name == "failed" else "finished"}))
    grey = [torch.full((32, 32, 3), i / 100) for i in range(96)]
    write_video(jobs[0].folder / "video.mp4", grey)  # 8 parts of 12
    write_video(jobs[0].folder / "orbit.mp4", grey[::-1])
    write_video(jobs[1].folder / "orbit.mp4", grey[:24])
    write_video(jobs[2].folder / "video.mp4", grey[:8])  # a moment each
    (jobs[3].folder / "video.mp4").write_bytes(b"none")
    rows, files = write_summary(tmp_path, jobs, {})
    assert [row.line for row in rows] == [1, 2, 3, 4, 5] and files == ["summary.json", "summary.csv", "contact.png"]
    assert "broken is not on the sheet" in capsys.readouterr().err
    tiles = tiles_of(tmp_path / "contact.png", 3)
    for first, film, indices in ((0, "video", (0, 2, 4, 7, 9, 11)), (6, "orbit", (0, 4, 8, 12, 16, 20))):
        for tile, index in zip(tiles[first:], indices, strict=False):
            assert np.array_equal(tile, shown(jobs[first // 6].folder / f"{film}.mp4", index)), (film, index)
    assert all(np.array_equal(tile, tiles[12]) for tile in tiles[12:])


def test_progress_is_read_from_the_log(scripted):
    job = replace(scripted("cube"), stages=(("static", 10), ("motion", 20)))
    job.folder.mkdir()
    job.log.write_text("static: step 9/10\n")
    start = job.log.stat().st_size
    for line, expected in (
        ("note: something", (0, "")),
        ("static: step 4/10, loss 1.5, 0:20 left", (4, "static, 0:20 left")),
        ("motion: step 5/20, loss 1e-05", (15, "motion")),
        ("video: step 3/16, 2 s left", (30, "video 3/16")),
    ):
        with open(job.log, "a") as file:
            file.write(line + "\n")
        assert progress_of(job, start) == expected


def test_some_frames_of_a_film(tmp_path):
    path = tmp_path / "film.mp4"
    write_video(path, [torch.full((16, 16, 3), i / 10) for i in range(10)])
    found = pick_frames(path, lambda n: [0, n // 2, 0])
    whole = read_video(path).frames
    assert torch.equal(found, whole[[0, 5, 0]])
    with pytest.raises(ValueError, match="holds fewer frames"):
        pick_frames(path, lambda n: [n])
    path.write_bytes(b"none")
    with pytest.raises(ValueError, match="can't be read as a video"):
        pick_frames(path, lambda n: [0])
