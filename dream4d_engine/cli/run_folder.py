"""The folder of a run: its record run.json, its unfinished state, and what may be written there."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..machine import check_folder, peak_memory, versions, write_atomically
from .parsing import RECORD, UsageError, read_record

UNFINISHED = "unfinished"


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes. `record` is what run.json holds; it is saved at the beginning and after every stage.

    `writes` is false in the processes beside the one that writes.
    """

    path: Path
    record: dict
    device: torch.device
    writes: bool = True

    @property
    def unfinished(self) -> Path:
        """Checkpoints and results in between; removed when the run is finished."""
        return self.path / UNFINISHED

    def save(self, status: str | None = None, **news: object) -> None:
        """Write run.json with the news."""
        if not self.writes:
            return
        self.record.update(news)
        if status is not None:
            self.record["status"] = status
        self.record["peak_memory_bytes"] = max(self.record.get("peak_memory_bytes") or 0, peak_memory(self.device) or 0)
        write_atomically(self.path / RECORD, (json.dumps(self.record, indent=2, ensure_ascii=False) + "\n").encode())

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent inside to those of a stage (over all resumes) and save the record."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = self.record["seconds"]
            seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - began, 3)
            self.save()

    def fail(self, why: str) -> None:
        """Mark the run as failed; if nothing was saved yet, a new one may begin in its place."""
        if self.writes and not any(self.unfinished.iterdir()):
            self.unfinished.rmdir()
        self.save("failed", error=why.splitlines()[0])

    def finish(self) -> None:
        """Remove what only resuming needs and mark the run as finished."""
        if self.writes:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        self.save("finished", finished=_now())


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def check_out(folder: Path | None, names: Sequence[str], overwrite: bool) -> None:
    """Make sure that a new run may write files of these names into `folder`; nothing is touched."""
    if folder is None:
        raise UsageError("say where the results go: --out FOLDER (or --resume FOLDER)")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose another --out")
    if overwrite or not folder.is_dir():
        return
    if (folder / UNFINISHED).is_dir():
        raise UsageError(f"{folder} holds an unfinished run: go on with --resume {folder}, or --overwrite it")
    present = [name for name in names if (folder / name).exists()]
    if (folder / RECORD).exists() and read_record(folder).get("status") == "failed" and present == [RECORD]:
        return
    if present:
        raise UsageError(f"{folder} already holds {', '.join(present)}: choose another --out, or --overwrite")


def start_run(folder: Path, names: Sequence[str], record: dict, device: torch.device, n_bytes: int) -> RunFolder:
    """Prepare the folder of a new run (see `check_out`): old results go, run.json says what is coming."""
    check_folder(folder, n_bytes)
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    sweep(folder, names)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    now = {"started": _now(), "finished": None, "versions": versions(), "device": str(device), "seconds": {}}
    run = RunFolder(folder, {"status": "running", **record, **now}, device)
    run.unfinished.mkdir(exist_ok=True)
    run.save()
    return run


def follow_run(folder: Path, device: torch.device) -> RunFolder:
    """Look into the folder of a run that another process writes."""
    record = read_record(folder)
    record.setdefault("seconds", {})
    return RunFolder(folder, record, device, writes=False)


def sweep(folder: Path, names: Sequence[str]) -> None:
    """Remove the half-written files that a killed run left beside those of these names."""
    for name in names:
        for half in folder.glob(f".{name}.*.tmp"):
            half.unlink(missing_ok=True)


def resume_run(folder: Path, names: Sequence[str], device: torch.device, n_bytes: int) -> RunFolder:
    """Take up the run in `folder` again."""
    check_folder(folder, n_bytes)
    sweep(folder, names)
    sweep(folder / UNFINISHED, ["*"])
    record = read_record(folder)
    record.setdefault("seconds", {})
    run = RunFolder(folder, record, device)
    run.unfinished.mkdir(exist_ok=True)
    again = [*record.get("resumed", []), {"at": _now(), "versions": versions(), "device": str(device)}]
    run.save("running", resumed=again)
    return run
