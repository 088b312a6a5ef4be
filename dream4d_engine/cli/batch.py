"""Make the scenes of a list: one on each GPU, on a Ray cluster, or as parts of an array job."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..documents import describe
from ..locks import InUse
from ..machine import check_folder, pick_device
from ..training.processes import is_launched
from . import options as shared
from .batch_job import Ended, Job, begun
from .batch_list import read_list
from .batch_ray import RayPool
from .batch_report import Board, counted, table, write_summary
from .batch_work import LocalPool, Pool, places_here, run_all
from .command import Command
from .errors import UsageError
from .interrupts import Stopped, stop_on_interrupt
from .progress import make_progress, patient
from .terminal import say

NOT_ALL = 1
"""The exit code of a batch of which not every scene is done."""


@dataclass(frozen=True)
class Batch:
    list: Annotated[shared.Positional[Path | None], shared.optional("PROMPTS.jsonl")] = None
    """The scenes: a line of JSON for each, with the flags of its command, as {"prompt": "a red cube is jumping",
    "seed": 1, "name": "cube"}; "command" is text-to-4d unless the line says another one."""
    out: Annotated[Path | None, shared.FOLDER] = None
    """Folder for the scenes' folders and the summary; made if needed (default: the list's name without its ending)."""
    workers: Annotated[int | None, shared.INT] = None
    """Scenes at a time (default: one for each GPU, without a GPU one; on a Ray cluster as many as it has room for)."""
    ray: Annotated[str | None, shared.optional("ADDRESS")] = None
    """Run on the Ray cluster at this address: auto, ray://HOST:PORT, HOST:PORT, or local for one on this machine."""
    only: Annotated[str | None, shared.optional("I/N")] = None
    """Run only part I of N, counted from 1: of an array job, say."""
    retries: int = 2
    """How many times a scene whose process was killed, or whose machine went away, is gone on with."""
    dry_run: bool = False
    """Check every line, say what there is to do, and stop."""
    machine: shared.Machine = shared.MachineOptions()

    def __post_init__(self) -> None:
        shared.check_numbers(self)
        _part(self.only)


def run(options: Batch) -> int:
    """Make what isn't made yet."""
    path = options.list
    if path is None:
        raise UsageError("say which scenes: dream4d batch PROMPTS.jsonl --out FOLDER")
    if is_launched():
        raise UsageError("a batch starts a process for each GPU by itself: start it without torchrun")
    out = path.with_suffix("") if options.out is None else options.out
    if out == path or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out} is a file: choose a folder for the scenes with --out")
    out = out.absolute()
    with make_progress() as progress:
        jobs = read_list(path, out, options.ray is not None, patient(progress, "checking"))
    index, n_parts = _part(options.only)
    mine = jobs[index::n_parts]
    waiting = [job for job in mine if not _is_done(job)]
    part = f" of part {options.only}" if options.only else ""
    scenes = "1 scene" if len(mine) == 1 else f"{len(mine)} scenes"
    say(f"{scenes}{part}: {len(mine) - len(waiting)} done before, {len(waiting)} to do")
    if options.dry_run:
        return 0
    check_folder(out, 0)
    ended, stopped = _work(options, waiting) if waiting else ({}, None)
    rows, names = write_summary(out, jobs, ended)
    ours = {job.name for job in mine}
    shown = [row for row in rows if row.name in ours]
    say(*table(shown), f"{counted(shown)}; {out}: {', '.join(names)}")
    if stopped is not None:
        raise Stopped("stopped; what is done is saved; the same command goes on", stopped)
    return 0 if all(row.state == "done" for row in shown) else NOT_ALL


def _part(only: str | None) -> tuple[int, int]:
    """Which lines a part takes: every n-th from an index on."""
    if only is None:
        return 0, 1
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", only)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--only must be I/N with I from 1 to N, as 1/4 to 4/4, got {describe(only)}")
    return int(found[1]) - 1, int(found[2])


def _is_done(job: Job) -> bool:
    try:
        return begun(job) == "done"
    except InUse:
        return False


def _work(options: Batch, jobs: Sequence[Job]) -> tuple[dict[str, Ended], int | None]:
    """Run the scenes; return what became of those that were begun, and the exit code if a signal stopped them."""
    pool = _pool(options)
    try:
        with stop_on_interrupt(pool.kill) as should_stop, make_progress() as progress:
            try:
                board = Board(progress, len(jobs))
                ended = run_all(jobs, pool, options.retries, board.watch(), should_stop)
            except BaseException:
                pool.stop()  # they save, and end without us
                raise
        return ended, should_stop.code if should_stop() else None
    finally:
        pool.close()


def _pool(options: Batch) -> Pool:
    """Where the scenes run; its processes are told on what device, so that none falls back to another."""
    machine = options.machine
    more = [] if machine.threads is None else ["--threads", str(machine.threads)]
    more += ["--debug"] if machine.debug else []
    if options.ray is None:
        device = pick_device(machine.device)
        places = places_here(device, options.workers, machine.threads)
        return LocalPool(places, ["--device", device.type, *more])
    if ":" in machine.device:
        raise UsageError(f"on a Ray cluster each scene is given a GPU: say --device cuda, not {machine.device}")
    return RayPool(options.ray, machine.device, more, options.workers, machine.threads or 1)


COMMAND = Command(Batch, run)
