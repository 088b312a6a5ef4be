"""Runs whose folder, disk, names or saved state are not as they should be, and runs that are stopped or watched."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_changes import TABLE, drop, filled, put, rewritten, say
from cli_runs import PROMPT, SMALL, fails, start, stop_after, tensors_of, wait_for
from places import ROOT

from dream4d_engine import locks
from dream4d_engine.assets import AssetError, Provenance, check_header
from dream4d_engine.cli import main
from dream4d_engine.cli.run_folder import LOCK, UNFINISHED
from dream4d_engine.documents import document_bytes
from dream4d_engine.machine import WriteError, check_folder, replacing, write_atomically
from dream4d_engine.scene import SceneConfig

FLAGS = [flag for flag in zip(SMALL[::2], SMALL[1::2], strict=True) if not ("motion" in flag[0] or "deform" in flag[0])]
STILL = [word for flag in FLAGS for word in flag]
STEPS = ["--steps", "6"]


def still(folder, priors, *more: str) -> list[str]:
    """The words of a small text-to-3d."""
    return ["text-to-3d", PROMPT, "--out", str(folder), *priors[:2], *STILL, *STEPS, *more]


def _without_its_library(name: str, *_: object) -> None:
    if name == "av":
        raise ImportError("libavcodec.so.61: cannot open")


def test_what_can_not_be_filmed_is_not_begun(tmp_path, priors, monkeypatch, capsys):
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "av", None)
        said = fails(capsys, *still(folder, priors))
    assert "of av" in said and "pip install" in said
    broken = SimpleNamespace(find_spec=_without_its_library)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "av", raising=False)
        patch.setattr(sys, "meta_path", [broken, *sys.meta_path])
        said = fails(capsys, *still(folder, priors))
    assert "PyAV can't be loaded (libavcodec.so.61: cannot open): reinstall the package av" in said
    monkeypatch.setattr("dream4d_engine.export.video._CODECS", ("none such",))
    assert "none of the encoders none such: reinstall the package av" in fails(capsys, *still(folder, priors))
    assert not folder.exists()


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, priors):
    """A whole text-to-3d."""
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    assert main(still(folder, priors)) == 0
    return folder


@pytest.fixture
def stopped(tmp_path, priors, monkeypatch, capsys):
    """The same, stopped after 4 of its 6 steps."""
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, "static", 4)
        assert main(still(folder, priors)) == 130
    capsys.readouterr()
    return folder


def assert_same_bits(ours: Path, theirs: Path) -> None:
    first, second = tensors_of(ours / "scene.safetensors"), tensors_of(theirs / "scene.safetensors")
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


# ---- what was saved is damaged -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(TABLE, filled(math.nan)), "holds numbers that are not finite"),
        (say(step="100"), "it is at step 100 of a run of 6"),
        (drop("optimizer."), "the optimiser's moments are missing"),
        (None, "is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_kept_aside_and_the_stage_can_start_over(stopped, unbroken, capsys, change, said):
    path = stopped / "unfinished" / "static.checkpoint"
    if change is None:
        path.write_bytes(path.read_bytes()[:5000])
    else:
        rewritten(path, path, change)
    damaged = path.read_bytes()
    line = fails(capsys, "text-to-3d", "--resume", str(stopped))
    assert said in line and "static.checkpoint.damaged" in line and f"--resume {stopped} starts this stage over" in line
    assert record_of(stopped)["status"] == "failed"
    assert (stopped / "unfinished" / "static.checkpoint.damaged").read_bytes() == damaged
    assert main(["text-to-3d", "--resume", str(stopped)]) == 0
    assert_same_bits(stopped, unbroken)
    assert record_of(stopped)["status"] == "finished" and "error" not in record_of(stopped)


@pytest.mark.parametrize("damage", ["cut", "NaN", "other settings"])
def test_a_damaged_result_of_a_stage_is_made_again(tmp_path, priors, monkeypatch, capsys, unbroken, damage):
    folder = tmp_path / "both"
    words = ["text-to-4d", PROMPT, "--out", str(folder), *priors, *SMALL, *STEPS, "--motion-steps", "4"]
    with monkeypatch.context() as patch:
        stop_after(patch, "motion", 2)
        assert main(words) == 130
    path = folder / "unfinished" / "static.safetensors"
    good = tensors_of(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "NaN":
        rewritten(path, path, put("canonical.grid.table", filled(math.nan)))
    else:
        rewritten(path, path, lambda t, h: h.update(provenance=h["provenance"].replace('"seed": 0', '"seed": 5')))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        stop_after(patch, "motion", 1)
        assert main(["text-to-4d", "--resume", str(folder)]) == 130
    text = capsys.readouterr().out
    assert "(it is kept as static.safetensors.damaged): the stage static is done again" in text
    assert all(torch.equal(value, good[name]) for name, value in tensors_of(path).items())
    assert main(["text-to-4d", "--resume", str(folder)]) == 0


RECORDS = {
    "cut": b'{"status": "interr',
    "a list": b"[1, 2]",
    "nothing": b"",
    "no text": b"\xff\xfe\x00\x00",
    "a page": b"<!DOCTYPE html><html></html>",
    "deep": b'{"settings": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "not that deep": b'{"settings": ' + b"[" * 100 + b"]" * 100 + b"}",
    "null": b"null",
}
FIELDS = [
    ("settings", None),
    ("settings", "text"),
    ("settings", {"options": []}),
    ("settings", {"options": {"prompt": {"a": 1}}}),
    ("command", 5),
    ("command", "text-to-5d\x1b[2J"),
    ("source", {"sha256": "ab"}),
    ("reference", 5),
]
NOTES = [
    ("status", ["running"]),
    ("seconds", 3),
    ("seconds", {"static": "long", "load models": 2.5}),
    ("resumed", {"at": 1}),
    ("fits", []),
    ("fits", {"static": 1}),
    ("peak_memory_bytes", "much"),
    ("nonfinite", 0.5),
    ("step", "four\x1b[2J"),
]


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_a_sentence(name, stopped, capsys):
    (stopped / "run.json").write_bytes(RECORDS[name])
    line = fails(capsys, "text-to-3d", "--resume", str(stopped))
    assert "run.json" in line and "start over with another --out" in line


@pytest.mark.parametrize(("name", "value"), FIELDS)
def test_a_record_of_wrong_types_is_a_sentence(name, value, stopped, capsys):
    record = record_of(stopped) | {name: value}
    (stopped / "run.json").write_text(json.dumps(record))
    line = fails(capsys, "text-to-3d", "--resume", str(stopped))
    assert name in line or "holds a run of" in line
    assert line.isprintable()


@pytest.mark.parametrize(("name", "value"), NOTES)
def test_damaged_notes_of_a_record_stop_no_run_whose_checkpoint_is_good(name, value, stopped, unbroken, capsys):
    record = record_of(stopped) | {name: value}
    (stopped / "run.json").write_text(json.dumps(record))
    assert main(["info", str(stopped)]) == 0
    assert capsys.readouterr().err == "", "looking on repairs nothing"
    assert main(["text-to-3d", "--resume", str(stopped)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {stopped / 'run.json'}: {name}") and line.endswith(": it begins anew")
    assert "must be" in line and line.isprintable()
    assert_same_bits(stopped, unbroken)
    record = record_of(stopped)
    assert record["status"] == "finished" and record["seconds"]["static"] > 0 and record["peak_memory_bytes"] > 0
    if isinstance(value, dict) and "load models" in value:
        assert record["seconds"]["load models"] > 2.5, "what is good of a table is kept"


def test_a_stopped_run_and_its_checkpoint_are_told_by_what_is_known(stopped, capsys):
    (checkpoint,) = (stopped / UNFINISHED).iterdir()
    record = record_of(stopped)
    for path in (stopped, checkpoint):
        assert main(["info", str(path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"prompt: {record['prompt']}" in lines and f"step: {record['step']}" in lines
        assert not any(line.endswith("None") for line in lines), "when it ended isn't known yet"


@pytest.mark.parametrize("name", RECORDS)
def test_who_only_looks_at_a_damaged_record_is_not_told_to_start_over(name, stopped, capsys):
    (stopped / "run.json").write_bytes(RECORDS[name])
    line = fails(capsys, "info", str(stopped))
    assert "run.json" in line and "--out" not in line and "name one of the files beside it instead" in line


def test_a_record_with_a_mark_at_its_beginning_is_read(stopped, unbroken, capsys):
    path = stopped / "run.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert main(["text-to-3d", "--resume", str(stopped)]) == 0
    assert_same_bits(stopped, unbroken)


# ---- two at once, and the end ------------------------------------------------------------------------------------


def test_a_run_that_is_alive_is_left_alone(stopped, priors, capsys):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    held = locks.take(stopped / LOCK, stopped)
    for words in (
        ["text-to-3d", "--resume", str(stopped)],
        still(stopped, priors, "--overwrite"),
        still(stopped, priors),
    ):
        line = fails(capsys, *words)
        assert f"{stopped} is being worked on by process {os.getpid()} on" in line and "stop it first" in line
    assert main(["info", str(stopped)]) == 0
    assert f"run, running (process {os.getpid()}" in capsys.readouterr().out
    held.release()
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    assert main(["text-to-3d", "--resume", str(stopped)]) == 0
    assert not (stopped / LOCK).exists()


def test_a_run_that_another_one_was_quicker_than_touches_nothing(tmp_path, priors, monkeypatch, capsys):
    """Both have looked at an empty folder; the other one is done when this one gets the lock."""
    from dream4d_engine.cli import run_folder

    take, out = locks.take, tmp_path / "out"

    def late(path, what):
        (out / "scene.safetensors").write_bytes(b"theirs")
        (out / "run.json").write_text('{"status": "finished"}')
        return take(path, what)

    monkeypatch.setattr(run_folder.locks, "take", late)
    assert "already holds run.json, scene.safetensors" in fails(capsys, *still(out, priors))
    assert (out / "scene.safetensors").read_bytes() == b"theirs" and not (out / LOCK).exists()


def test_sigterm_saves_first_and_a_killed_run_is_known_to_be_dead(tmp_path, priors, unbroken, capsys):
    folder = tmp_path / "out"
    process = start(*still(folder, priors, "--static.loop.checkpoint-steps", "1"))
    wait_for(folder / "unfinished" / "static.checkpoint", process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # batch systems say it more than once
    _, errors = process.communicate(timeout=120)
    if process.returncode == 0:  # it was done by then
        pytest.skip("the run was quicker than the signal")
    assert process.returncode == 143 and f"resume with: dream4d text-to-3d --resume {folder}" in errors
    assert record_of(folder)["status"] == "interrupted" and not (folder / LOCK).exists()

    process = start("text-to-3d", "--resume", str(folder))
    wait_for(folder / LOCK, process)
    while record_of(folder)["status"] != "running":
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert record_of(folder)["status"] == "running", "it could say nothing any more"
    assert main(["info", str(folder)]) == 0
    assert "run, killed" in capsys.readouterr().out
    assert "holds an unfinished run: go on with dream4d text-to-3d --resume" in fails(capsys, *still(folder, priors))
    assert main(["text-to-3d", "--resume", str(folder)]) == 0
    assert f"the run in {folder} was killed" in capsys.readouterr().out
    assert [entry["after"] for entry in record_of(folder)["resumed"]] == ["interrupted", "killed"]
    assert_same_bits(folder, unbroken)


# ---- folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["record", "unfinished", "encode"])
def test_a_failure_before_the_first_record_leaves_a_folder_that_can_be_used(
    tmp_path,
    priors,
    monkeypatch,
    capsys,
    failing,
):
    from dream4d_engine.cli import run_folder

    def refuse(*_args, **_options):
        raise {"encode": ValueError("that can't be written")}.get(failing, OSError(5, "Input/output error"))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        if failing == "unfinished":
            patch.setattr(Path, "mkdir", lambda self, **o: refuse() if self.name == "unfinished" else os.makedirs(self))
        else:
            patch.setattr(run_folder, {"record": "write_atomically", "encode": "document_bytes"}[failing], refuse)
        fails(capsys, *still(out, priors))
    assert list(out.iterdir()) == []
    assert main(still(out, priors, "--steps", "1")) == 0


def test_what_a_kill_before_the_first_record_leaves_is_no_obstacle(tmp_path, priors, capsys):
    out = tmp_path / "out"
    (out / "unfinished").mkdir(parents=True)
    (out / "unfinished" / ".static.checkpoint.12.tmp").write_bytes(b"half")
    (out / LOCK).write_text("process 1 on elsewhere")
    (out / ".run.json.12.tmp").write_bytes(b"half")
    assert main(still(out, priors, "--steps", "1")) == 0
    assert not [path for path in out.iterdir() if path.name.startswith(".") or path.name == LOCK]


def test_what_lies_in_the_way_is_named(tmp_path, priors, capsys):
    for name, folder in [("unfinished", False), ("run.json", True), ("scene.safetensors", True), (LOCK, True)]:
        out = tmp_path / name
        out.mkdir()
        (out / name).mkdir() if folder else (out / name).write_text("x")
        for more in ([], ["--overwrite"]):
            line = fails(capsys, *still(out, priors, *more))
            assert f"{out / name} is a {'folder' if folder else 'file'} where a" in line and "move it away" in line
        assert [path.name for path in out.iterdir()] == [name]


def test_an_unfinished_run_without_its_record_is_not_thrown_away(stopped, priors, capsys):
    (stopped / "run.json").unlink()
    assert "as its run.json is gone" in fails(capsys, *still(stopped, priors))
    assert "there is no run.json in it" in fails(capsys, "text-to-3d", "--resume", str(stopped))
    assert (stopped / "unfinished" / "static.checkpoint").exists()
    assert main(still(stopped, priors, "--overwrite", "--steps", "1")) == 0


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path, priors, capsys):
    tmp_path.chmod(0o500)
    assert f"can't write into {tmp_path / 'out'}" in fails(capsys, *still(tmp_path / "out", priors))


# ---- names -------------------------------------------------------------------------------------------------------

NO_TEXT = os.fsdecode(b"caf\xe9")
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names that are no text")


def in_a_plain_terminal(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run a command where nothing but ASCII is known."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-m", "dream4d_engine", *words]
    return subprocess.run(words, capture_output=True, env=environment, timeout=300, cwd=cwd)


@ON_LINUX
@pytest.mark.parametrize("flag", ["--out", "--resume", "--multiview-prior", "prompt", "render", "info", "import"])
def test_words_that_are_no_text_are_refused_before_anything_is_made(tmp_path, priors, flag):
    strange = str(tmp_path / NO_TEXT)
    words = {
        "--out": still(strange, priors),
        "--resume": ["text-to-3d", "--resume", strange],
        "--multiview-prior": still(tmp_path / "out", [priors[0], strange]),
        "prompt": ["text-to-3d", os.fsdecode(b"a red \xff cube"), "--out", str(tmp_path / "out"), *priors[:2]],
        "render": ["render", f"{strange}/scene.safetensors"],
        "info": ["info", strange],
        "import": ["import", f"{strange}/a.ckpt", "--out", str(tmp_path / "out" / "s.safetensors")],
    }[flag]
    done = in_a_plain_terminal(*words)
    assert done.returncode == 2 and done.stdout == b""
    assert b"is no text in UTF-8: set the terminal to UTF-8" in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@ON_LINUX
def test_a_place_whose_name_is_no_text_is_no_obstacle_from_inside(tmp_path, priors, unbroken):
    (tmp_path / NO_TEXT).mkdir()
    done = in_a_plain_terminal(*still("out", priors), cwd=tmp_path / NO_TEXT)
    assert done.returncode == 0, done.stderr
    shutil.move(tmp_path / NO_TEXT / "out", tmp_path / "out")
    assert_same_bits(tmp_path / "out", unbroken)


@ON_LINUX
def test_no_run_begins_where_its_files_could_not_be_read_back(tmp_path):
    with pytest.raises(ValueError, match="caf.udce9' is no text in UTF-8: rename it, or choose another --out"):
        check_folder(tmp_path / NO_TEXT, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_is_no_text_is_refused_at_the_door(tmp_path, priors, capsys):
    for prompt in ("a red cube \ud800", "\udcff", "a \udc80 cube"):
        line = fails(capsys, "text-to-3d", prompt, "--out", str(tmp_path / "out"), *priors[:2])
        assert "is no text in UTF-8" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 2**63 + 1}, "provenance.seed is out of range"),
        ({"seed": 2**70}, "provenance.seed is out of range"),
        ({"seed": 1.5}, "provenance.seed must be of type int, got 1.5"),
        ({"seed": True}, "provenance.seed must be of type int"),
        ({"steps": 10**400}, "provenance.steps is out of range"),
        ({"prompt": "a \udcff cube"}, r"the prompt holds what is no text in UTF-8: 'a \udcff cube'"),
        ({"prompt": None}, "prompt"),
        ({"parent": Provenance(seed=2**64)}, "provenance.parent.seed is out of range"),
        ({"parent": Provenance(prompt="\ud800")}, "the prompt holds what is no text"),
        ({"versions": {"torch": 2}}, "provenance.versions.torch must be of type str"),
    ],
)
def test_what_could_not_be_read_back_is_refused_before_it_is_made(changes, said):
    with pytest.raises(AssetError) as caught:
        check_header(SceneConfig(), replace(Provenance("a cube", "toy", 0, 1), **changes))
    assert said in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize(("name", "value"), [("radius", math.nan), ("radius", math.inf), ("n_samples", 2**64)])
def test_a_configuration_that_could_not_be_read_back(name, value):
    with pytest.raises(ValueError):
        check_header(replace(SceneConfig(), **{name: value}), Provenance())
    check_header(SceneConfig(), Provenance("é 立方体", "toy", 2**63 - 1, 10, {"torch": "2"}, Provenance("x")))


# ---- a full disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 6 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave: int = 0) -> Path:
    """Use up a disk's room, but for some bytes."""
    ballast = place / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
        file.truncate(max(0, file.tell() - leave))
    return ballast


@pytest.mark.parametrize("leave", [0, 300_000])
def test_a_disk_that_fills_up_in_training(small_disk, priors, unbroken, monkeypatch, capsys, leave):
    from dream4d_engine.cli import runs

    monkeypatch.setattr(runs, "disk_bytes", lambda *_: 0)
    control, ballast = runs.Session.control, []

    def filling(session, stage):
        made = control(session, stage)

        def on_step(report, scene):
            if report.step == 3:
                ballast.append(fill(small_disk, leave))

        return replace(made, on_step=on_step)

    out = small_disk / "out"
    with monkeypatch.context() as patch:
        patch.setattr(runs.Session, "control", filling)
        line = fails(capsys, *still(out, priors))
    checkpoint = out / "unfinished" / "static.checkpoint"
    assert f"{checkpoint} can't be written: No space left on device (the disk is full" in line
    assert f"what was saved before is kept: dream4d text-to-3d --resume {out} goes on" in line
    assert record_of(out)["status"] == "failed" and not (out / LOCK).exists()
    assert [path.name for path in (out / "unfinished").iterdir()] == ["static.checkpoint"]
    ballast[0].unlink()
    assert main(["text-to-3d", "--resume", str(out)]) == 0
    assert_same_bits(out, unbroken)


@pytest.mark.parametrize("writer", ["save_scene", "save_scene_video", "save_contact_sheet", "measure"])
def test_a_disk_that_is_full_when_results_are_written(small_disk, priors, unbroken, monkeypatch, capsys, writer):
    from dream4d_engine.cli import results, runs, stages

    monkeypatch.setattr(runs, "disk_bytes", lambda *_: 0)
    place = stages if writer == "save_scene" else results
    plain, out = getattr(place, writer), small_disk / "out"

    def full(*args, **options):
        ballast = fill(small_disk)
        found = plain(*args, **options)
        if writer == "measure":
            return found
        raise AssertionError(f"{writer} wrote on a full disk: {ballast}")

    with monkeypatch.context() as patch:
        patch.setattr(place, writer, full)
        line = fails(capsys, *still(out, priors))
    name = {"save_scene": "scene.safetensors", "save_scene_video": "orbit.mp4", "measure": "metrics.json"}
    assert f"{out / name.get(writer, 'contact.png')} can't be written: No space left on device" in line
    assert "what was saved before is kept" in line and not [p for p in out.iterdir() if p.suffix == ".tmp"]
    assert record_of(out)["status"] == "failed"
    (small_disk / "ballast").unlink()
    assert main(["text-to-3d", "--resume", str(out)]) == 0
    assert_same_bits(out, unbroken)


def test_a_file_that_may_not_grow_is_named(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "file"
    write_atomically(path, b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(WriteError, match=r"file can't be written: File too large \(files may not grow.*is kept"):
            write_atomically(path, b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_error_inside_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_our_documents_are_json_whatever_is_in_them():
    tree = {"a": math.nan, "b": [math.inf, 1.5], "c": "é", "d": {"e": (1, 2)}}
    assert json.loads(document_bytes(tree)) == {"a": None, "b": [None, 1.5], "c": "é", "d": {"e": [1, 2]}}
    assert "é".encode() in document_bytes(tree)
    assert json.loads(document_bytes({"name": "\udce9"})) == {"name": "\udce9"}
