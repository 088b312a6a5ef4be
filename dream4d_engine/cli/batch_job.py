"""A scene of a batch: its command line, its folder, and what the folder says of how far it is."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import locks
from ..documents import as_object, first_line, read_document
from .errors import UsageError
from .run_folder import LOCK, RECORD, check_out, read_record
from .runs import METRICS, RESULTS

LOG = "log.txt"
"""In the folder of a scene's run: all that its processes said, one after another."""
_TAIL = 8192  # bytes of a log in which its last word stands
_ERROR = "dream4d: error: "
_STEP = re.compile(r"(\w+): step (\d+)/(\d+)(?:, loss [^,]+)?(?:, (\S[^,]*) left)?")

State = Literal["done", "failed", "stopped", "killed", "running", "waiting"]


@dataclass(frozen=True)
class Job:
    """A scene of the list."""

    number: int  # of its line, from 1
    name: str
    command: str
    words: tuple[str, ...]  # of the command line; where it goes and what it takes of the machine stand elsewhere
    folder: Path  # of its run, absolute
    prompt: str
    seed: int
    stages: tuple[tuple[str, int], ...]  # names and steps of what is trained

    @property
    def log(self) -> Path:
        """What its processes said."""
        return self.folder / LOG

    @property
    def n_steps(self) -> int:
        """Training steps in all."""
        return sum(steps for _, steps in self.stages)


@dataclass(frozen=True)
class Ended:
    """What became of a scene's process; `killed`: it, or its machine, went away without a word."""

    state: State
    error: str = ""


@dataclass(frozen=True)
class Row:
    """A scene as the summary shows it."""

    line: int  # in the list
    name: str
    state: State
    seconds: float | None  # of work, over all resumes
    command: str
    prompt: str
    seed: int
    error: str
    folder: str
    metrics: dict[str, Any] = field(default_factory=dict)  # the run's metrics.json


def begun(job: Job) -> Literal["new", "resume", "done"]:
    """How the scene is to be begun.

    Raises InUse where another process works on it, and UsageError where its folder can take no run.
    """
    try:
        check_out(job.folder, RESULTS, overwrite=False)
    except UsageError as error:
        if not (job.folder / RECORD).is_file():
            raise UsageError(f'{error}; or give the scene another "name"') from error
        return "done" if read_record(job.folder).get("status") == "finished" else "resume"
    return "new"  # also where a run failed before it made anything


def row_of(job: Job, ended: Ended | None = None) -> Row:
    """What the folder says of a scene; `ended`: what is known of its last process, where that was ours."""
    record: dict = {}
    if (job.folder / RECORD).is_file():
        try:
            record = read_record(job.folder)
        except UsageError as error:
            return _row(job, {}, Ended("failed", str(error)))
    who = locks.holder(job.folder / LOCK)
    status = record.get("status")
    if who is not None:
        return _row(job, record, Ended("running", f"worked on by {who}"))
    if status == "finished":
        return _row(job, record, Ended("done"))
    if ended is not None:
        return _row(job, record, ended)
    last = last_error(job.log)
    states: dict[object, State] = {"interrupted": "stopped", "running": "killed", "failed": "failed"}
    state = states.get(status, "failed" if last else "waiting")
    return _row(job, record, Ended(state, record.get("error") or last if state == "failed" else ""))


def _row(job: Job, record: dict, ended: Ended) -> Row:
    metrics: dict[str, Any] = {}
    if ended.state == "done" and (job.folder / METRICS).is_file():
        try:
            metrics = as_object(read_document(job.folder / METRICS, UsageError), job.folder / METRICS, UsageError)
        except UsageError as error:  # all else of the run is there
            ended = Ended("done", str(error))
    spent = record.get("seconds") or {}
    seconds = round(sum(spent.values()), 3) if spent else None
    about = (job.command, job.prompt, job.seed, ended.error, str(job.folder))
    return Row(job.number, job.name, ended.state, seconds, *about, metrics)


def last_error(log: Path, start: int = 0) -> str:
    """The error that the last process ended with, by its log from a byte on; "" where it says none."""
    lines = _last_lines(log, start)
    found = next((line for line in reversed(lines) if line.startswith(_ERROR)), "")
    return first_line(found.removeprefix(_ERROR)) if found else ""


def last_words(log: Path, start: int = 0) -> str:
    """The last line of a log from a byte on."""
    return next((line for line in reversed(_last_lines(log, start)) if line.strip()), "")


def _last_lines(log: Path, start: int) -> list[str]:
    try:
        with open(log, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start, size - _TAIL))
            return file.read(_TAIL).decode("utf-8", "replace").splitlines()
    except OSError:
        return []


def progress_of(job: Job, start: int) -> tuple[int, str]:
    """Training steps done and what is going on, by the log from a byte on."""
    lines = [found for line in _last_lines(job.log, start) if (found := _STEP.match(line))]
    if not lines:
        return 0, ""
    stage, step, steps, left = lines[-1].groups()
    before = 0
    for name, n_steps in job.stages:
        if name == stage:
            return before + min(int(step), n_steps), f"{stage}, {left} left" if left else stage
        before += n_steps
    return job.n_steps, f"{stage} {step}/{steps}"  # what comes after training
