"""Two processes with a recipe are one process with twice its camera groups."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import distributed_worker
import pytest
import torch
from places import TESTS

from dream4d_engine.randomness import Draw, draw_rows
from dream4d_engine.training.processes import SINGLE, join_processes


def together(words: list[str], n: int = 2) -> tuple[list[int], list[str], list[str]]:
    """Run a command in n processes, told what torchrun tells; return their exit codes, outputs and errors."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    common = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "WORLD_SIZE": str(n)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]
    try:
        said = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], [out for out, _ in said], [err for _, err in said]


needs_gloo = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")


@needs_gloo
def test_two_processes_are_one_with_twice_the_groups(tmp_path):
    codes, _, errors = together([str(TESTS / "distributed_worker.py"), str(tmp_path)])
    assert codes == [0, 0], errors
    for stage in ("static", "motion"):
        expected, _ = distributed_worker.train(2, stage, SINGLE, tmp_path / "alone")
        first, second = (torch.load(tmp_path / stage / r / "result.pt", weights_only=True) for r in ("0", "1"))
        for name, value in expected.state_dict().items():
            assert torch.equal(first["scene"][name], second["scene"][name]), f"the processes disagree about {name}"
            torch.testing.assert_close(first["scene"][name], value, rtol=1e-4, atol=1e-6, msg=name)
        assert first["steps"] == [1, 2, 3, 4, 5, 6] and second["steps"] == [], "one speaks"
        written = [(tmp_path / stage / rank / "run.checkpoint").exists() for rank in ("0", "1")]
        assert written == [True, False], "one writes"


@needs_gloo
def test_the_command_line_in_two_processes_writes_once(tmp_path):
    out = tmp_path / "out"
    words = ["text-to-3d", "a red cube", "--steps", "2", "--size", "16", "--orbit-frames", "2", "--samples", "16"]
    codes, outputs, errors = together(["-m", "dream4d_engine.cli", *words, "--out", str(out), "--device", "cpu"])
    assert codes == [0, 0], errors
    assert (out / "scene.safetensors").exists() and (out / "orbit.mp4").exists()
    assert not (out / "unfinished").exists()
    assert "scene.safetensors" in outputs[0] and not outputs[1], "one speaks"


@needs_gloo
def test_a_mistake_in_two_processes_is_said_once_and_ends_both(tmp_path):
    (tmp_path / "file").write_text("x")
    words = ["text-to-3d", "a red cube", "--device", "cpu", "--out", str(tmp_path / "file")]
    codes, outputs, errors = together(["-m", "dream4d_engine.cli", *words])
    assert codes == [2, 0], "the second has nothing to do"
    assert "is a file" in errors[0] and "error" not in errors[1] and not any(outputs)


def test_shares_of_a_draw_make_up_the_whole():
    whole = draw_rows(torch.rand, (6, 2), Draw(4, 7).groups("rays", 6))
    parts = [draw_rows(torch.rand, (2, 2), Draw(4, 7, rank).groups("rays", 2)) for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole) and whole.unique().numel() == 12


def test_what_is_no_part_of_the_batch_is_the_same_for_all():
    drawn = [torch.randn(3, generator=Draw(4, 7, rank).for_("background")) for rank in range(3)]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_draws_differ_by_seed_step_purpose_and_group_and_by_nothing_else():
    def first(draw, purpose="rays", group=0):
        return torch.rand(1, generator=draw.for_(purpose, group)).item()

    others = [first(Draw(1, 2), "noise"), first(Draw(1, 2), group=1), first(Draw(1, 2), group=None)]
    others += [first(Draw(2, 2)), first(Draw(1, 3)), first(Draw(12, 2)), first(Draw(1, 22))]
    assert len({first(Draw(1, 2)), *others}) == 8
    assert first(Draw(1, 2, rank=5)) == first(Draw(1, 2)), "a group is one of the whole batch"


def test_a_process_by_itself_needs_no_team(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_processes(torch.device("cpu")) == (SINGLE, torch.device("cpu"))
    assert SINGLE.any(True) and not SINGLE.any(False)
    tensor = torch.ones(2)
    SINGLE.average([tensor])
    assert torch.equal(tensor, torch.ones(2))


def test_a_device_that_cannot_be_shared_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="not mps"):
        join_processes(torch.device("mps"))
