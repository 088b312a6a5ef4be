"""The scenes of a batch, each in a process of its own: as many at a time as there are places."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Protocol

import torch

from ..documents import first_line
from ..locks import InUse
from .batch_job import Ended, Job, begun, last_error, last_words
from .errors import UsageError
from .interrupts import INTERRUPTED

PROGRAM = (sys.executable, "-m", "dream4d_engine")
_PAUSE = 0.1
_STOPPED = (INTERRUPTED, 128 + signal.SIGTERM)
_STOP = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM)  # the one that a process on Windows can heed
_WINDOWS_GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)


class Pool(Protocol):
    """What runs scenes."""

    def has_place(self) -> bool:
        """Whether one more may be started."""
        ...

    def start(self, job: Job) -> str:
        """Start a scene, or hand it over to be started; return in words what was done."""
        ...

    def wait(self) -> list[tuple[Job, Ended]]:
        """Wait a moment; return what ended since."""
        ...

    def stop(self) -> None:
        """Ask all to save and stop."""
        ...

    def kill(self) -> None:
        """End all at once."""
        ...

    def close(self) -> None:
        """Leave the place where they ran."""
        ...


@dataclass(frozen=True)
class Watch:
    """Who is told how a batch goes."""

    on_start: Callable[[Job, str], None]  # what was done with it
    on_end: Callable[[Job, Ended], None]
    on_retry: Callable[[Job, Ended, int], None]  # how many more are left
    on_moment: Callable[[], None]


def run_all(
    jobs: Sequence[Job], pool: Pool, retries: int, watch: Watch, should_stop: Callable[[], bool]
) -> dict[str, Ended]:
    """Run all scenes; return by name what became of those that were begun.

    A scene whose process was killed, or whose machine went away, goes on from what it had saved, `retries` times at
    most. One that failed by itself would fail again.
    """
    waiting, n_running, tries = deque(jobs), 0, Counter[str]()
    found: dict[str, Ended] = {}
    stopping = False
    while waiting or n_running:
        if should_stop() and not stopping:
            stopping = True
            waiting.clear()
            pool.stop()
        while waiting and pool.has_place():
            job = waiting.popleft()
            n_running += 1
            watch.on_start(job, pool.start(job))
        for job, ended in pool.wait():
            n_running -= 1
            tries[job.name] += 1
            if ended.state == "killed" and tries[job.name] <= retries and not stopping:
                watch.on_retry(job, ended, retries - tries[job.name])
                waiting.append(job)
                continue
            found[job.name] = ended
            watch.on_end(job, ended)
        watch.on_moment()
    return found


@dataclass(eq=False)
class Child:
    """The process of a scene."""

    job: Job
    process: subprocess.Popen
    log_start: int  # where its own words begin
    place: Mapping[str, str] = field(default_factory=dict)
    stopping: bool = False

    def stop(self) -> None:
        """Ask it to save and stop; a second time means nothing else."""
        if not self.stopping and self.process.poll() is None:
            self.stopping = True
            with contextlib.suppress(OSError):
                self.process.send_signal(_STOP)

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(OSError):
            self.process.kill()

    def ended(self) -> Ended | None:
        """What became of it; None while it runs."""
        code = self.process.poll()
        return None if code is None else _ended(self.job, code, self.log_start, self.stopping)


def launch(job: Job, machine: Sequence[str], place: Mapping[str, str]) -> Child | Ended:
    """Begin a scene, or go on with it, in a process of its own; Ended where there is nothing to do for one.

    machine: the words that say what it takes of the machine. place: what is put into its environment.
    """
    try:
        how = begun(job)
        if how == "done":  # by another batch, just now
            return Ended("done")
        job.folder.mkdir(parents=True, exist_ok=True)
        with open(job.log, "ab") as log:
            start = log.seek(0, 2)
            process = subprocess.Popen(
                [*PROGRAM, job.command, *job.words, *machine, "--resume" if how == "resume" else "--out", job.folder],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **place},
                start_new_session=True,  # Ctrl-C reaches the batch alone, which tells each process once
                creationflags=_WINDOWS_GROUP,
            )
    except InUse as error:
        return Ended("running", str(error))
    except UsageError as error:
        return Ended("failed", str(error))
    except OSError as error:
        return Ended("failed", f"can't be started: {error.filename or job.folder}: {error.strerror or error}")
    return Child(job, process, start, place)


def _ended(job: Job, code: int, log_start: int, stopping: bool) -> Ended:
    """What became of a scene whose process ended: its folder knows better than the exit code."""
    said = last_error(job.log, log_start)
    try:
        if begun(job) == "done":  # if not by this process, then by one that was quicker
            return Ended("done")
    except InUse as error:
        return Ended("running", str(error))
    except UsageError as error:
        return Ended("failed", said or str(error))
    if stopping or code in _STOPPED:
        return Ended("stopped")
    if code < 0:
        return Ended("killed", f"the process was ended by signal {-code}")
    return Ended("failed", said or first_line(last_words(job.log, log_start) or f"exit code {code}"))


class LocalPool:
    """Processes on this machine; each has a place: what is put into its environment, and words for people."""

    def __init__(self, places: Sequence[tuple[Mapping[str, str], str]], machine: Sequence[str]) -> None:
        self._free, self._machine = deque(places), machine
        self._running: list[tuple[Child, tuple[Mapping[str, str], str]]] = []
        self._ended: list[tuple[Job, Ended]] = []

    def has_place(self) -> bool:
        return bool(self._free)

    def start(self, job: Job) -> str:
        place = self._free.popleft()
        child = launch(job, self._machine, place[0])
        if isinstance(child, Ended):
            self._free.appendleft(place)
            self._ended.append((job, child))
        else:
            self._running.append((child, place))
        return f"started on {place[1]}"

    def wait(self) -> list[tuple[Job, Ended]]:
        if not self._ended:
            time.sleep(_PAUSE)
        found, self._ended = self._ended, []
        for one in list(self._running):
            child, place = one
            ended = child.ended()
            if ended is not None:
                self._running.remove(one)
                self._free.append(place)
                found.append((child.job, ended))
        return found

    def stop(self) -> None:
        for child, _ in self._running:
            child.stop()

    def kill(self) -> None:
        for child, _ in self._running:
            child.kill()

    def close(self) -> None:
        pass


def n_cores() -> int:
    """CPU cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def places_here(device: torch.device, workers: int | None, threads: int | None) -> list[tuple[dict[str, str], str]]:
    """The places of this machine: one for each GPU, or, without any, as many as are wished for.

    Each sees its own GPU alone, and shares the cores with the others.
    """
    shown: list[tuple[dict[str, str], str]]
    if device.type == "cuda":
        # what this process sees as 0, 1, ... may be others of the machine's, or parts of one
        asked = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        every = range(torch.cuda.device_count()) if device.index is None else [device.index]
        gpus = [asked[index] if index < len(asked) else str(index) for index in every]
        one_by_one = islice(cycle(gpus), workers or len(gpus))
        shown = [({"CUDA_VISIBLE_DEVICES": name}, f"GPU {name}") for name in one_by_one]
    else:
        shown = [({}, device.type)] * (workers or 1)
    if threads is not None or "OMP_NUM_THREADS" in os.environ:
        return shown
    share = {"OMP_NUM_THREADS": str(max(1, n_cores() // len(shown)))}
    return [(variables | share, words) for variables, words in shown]
