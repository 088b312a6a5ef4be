"""The commands, run in a process of their own or in this one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from places import ROOT

from dream4d_engine.cli import main

PROMPT = "a red cube is jumping"
RESULTS = {"run.json", "scene.safetensors", "orbit.mp4", "video.mp4", "contact.png", "metrics.json"}
SMALL = [
    *("--size", "16", "--orbit-frames", "4", "--part-frames", "2", "--threads", "1"),
    *("--static.scene.n-samples", "24", "--static.scene.occupancy-resolution", "16"),
    *("--static.scene.radiance.blob-std", "0.2", "--deformation-scale", "1"),  # a small object is quick to render
    *("--static.phases.0.height", "16", "--static.phases.0.width", "16"),
    *("--motion.phases.0.height", "16", "--motion.phases.0.width", "16"),
    *("--static.loop.checkpoint-steps", "2", "--motion.loop.checkpoint-steps", "2"),
]


def start(*words: str) -> subprocess.Popen:
    """`dream4d WORDS` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "dream4d_engine", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} doesn't appear"
        time.sleep(0.02)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def fails(capsys, *words: str) -> str:
    """Run a command that must fail with exit code 2 and one line; return the line."""
    capsys.readouterr()
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("dream4d: error: ")
    assert "Traceback" not in captured.err and "defect" not in lines[0]
    return lines[0]


def stop_after(monkeypatch, name: str, step: int) -> None:
    """Let a stage of the next run be stopped after a step, as Ctrl-C does."""
    from dream4d_engine.cli import runs

    control = runs.Session.control

    def stopping(session, stage):
        made, seen = control(session, stage), []
        on_step = made.on_step

        def count(report, scene):
            on_step(report, scene)
            seen.append(report.step)

        stop = (lambda: len(seen) >= step) if stage == name else (lambda: False)
        return replace(made, on_step=count, should_stop=stop)

    monkeypatch.setattr(runs.Session, "control", stopping)
