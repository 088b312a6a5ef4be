"""The folder of a run: its record run.json, its unfinished state, and what may be written there."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from .. import locks
from ..documents import as_object, document_bytes, field, read_document
from ..machine import check_folder, peak_memory, versions, write_atomically
from .errors import UsageError
from .options import Recipe, RunOptions
from .terminal import say

RECORD, UNFINISHED, LOCK, REFERENCE = "run.json", "unfinished", "run.lock", "reference.png"
_MEANT: dict[str, type] = {"command": str, "settings": dict, "source": str, "reference": str}
"""Fields of run.json without which a run isn't the same any more."""
_NOTED = {"status": str, "error": str, "stage": str, "step": int, "resumed": list, "peak_memory_bytes": int}
_TABLES: dict[str, type] = {"seconds": float, "fits": dict, "nonfinite": dict}
"""Fields that only say how far it came: where they are damaged they begin anew. Of tables, what an entry is."""


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes."""

    path: Path
    record: dict  # what run.json holds; saved at the beginning and after every stage
    device: torch.device
    writes: bool = True  # not in the processes beside the one that writes
    lock: locks.Lock | None = None  # of the one that writes

    @property
    def unfinished(self) -> Path:
        """Checkpoints and results in between; removed when the run is finished."""
        return self.path / UNFINISHED

    def save(self, status: str | None = None, **news: object) -> None:
        """Write run.json with the news. Raises WriteError."""
        if not self.writes:
            return
        self.record.update(news)
        if status is not None:
            self.record["status"] = status
        self.record["peak_memory_bytes"] = max(self.record.get("peak_memory_bytes") or 0, peak_memory(self.device) or 0)
        write_atomically(self.path / RECORD, document_bytes(self.record))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent inside to those of a stage (over all resumes) and save the record."""
        began = time.monotonic()
        try:
            yield
        except BaseException:
            self._count(stage, began)  # what comes of the error saves it
            raise
        self._count(stage, began)
        self.save()

    def _count(self, stage: str, began: float) -> None:
        seconds = self.record["seconds"]
        seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - began, 3)

    def end(self, status: str, **news: object) -> None:
        """Say how the run ended before its time, as far as anything can be written; raises nothing.

        If nothing was saved yet, a new run may begin in its place.
        """
        if not self.writes:
            return
        with contextlib.suppress(OSError):
            if not any(self.unfinished.iterdir()):
                self.unfinished.rmdir()  # its presence is what makes a run one to be resumed
        try:
            self.save(status, **news)
        except OSError:
            # on a full disk a change of as many bytes, where they lie, takes no room
            running, failed = b'"status": "running"', b'"status": "failed" '
            with contextlib.suppress(OSError), open(self.path / RECORD, "r+b") as file:
                place = file.read().find(running)
                if place >= 0:
                    file.seek(place)
                    file.write(failed)

    def release(self) -> None:
        """Let other processes work here."""
        if self.lock is not None:
            self.lock.release()

    def finish(self) -> None:
        """Remove what only resuming needs and mark the run as finished."""
        if self.writes:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        self.save("finished", finished=_now())  # last: a run that is killed before is resumed, and finds all made


def settings_tree(options: RunOptions, *recipes: Recipe) -> dict:
    """A command's settings as JSON holds them."""
    tree = {"options": asdict(options)} | {recipe.stage: asdict(recipe) for recipe in recipes}
    return json.loads(json.dumps(tree))  # as they will be read again: tuples are lists then


def comparable(settings: dict) -> dict:
    """The settings that a resumed run must share with its beginning."""
    options = {key: value for key, value in settings["options"].items() if key not in ("folders", "gpu", "machine")}
    # how the models came here makes no difference
    options["priors"] = {key: value for key, value in options["priors"].items() if key != "download"}
    return settings | {"options": options}


def read_record(
    folder: Path,
    way_on: str = "start over with another --out",
    on_repair: Callable[[str], None] = lambda text: None,
) -> dict:
    """Read a run folder's run.json; what this program reads of it has the right types, or is missing.

    `way_on`: what to do where it can't be read, in words. `on_repair` is told in a line of what only says how far the
    run came, and had a wrong type: it is left out.
    """
    path = folder / RECORD
    if not path.exists():
        raise UsageError(f"{folder} holds no run to resume: there is no {RECORD} in it")
    try:
        record = as_object(read_document(path, UsageError), path, UsageError)
        for name in (*_MEANT, *_NOTED, *_TABLES):
            if record.get(name) is None:
                record.pop(name, None)
        for name, kind in _MEANT.items():
            field(record, name, kind, path, UsageError, kind())
    except UsageError as error:
        raise UsageError(f"{error}; {way_on}") from error
    _drop_damaged(record, _NOTED | dict.fromkeys(_TABLES, dict), path, on_repair)
    for name, kind in _TABLES.items():
        table = record.get(name, {})
        _drop_damaged(table, dict.fromkeys(table, kind), f"{path}: {name}", on_repair)
    return record


def _drop_damaged(tree: dict, kinds: dict[str, type], where: object, on_repair: Callable[[str], None]) -> None:
    """Leave out what has not the type that `kinds` says."""
    for name in kinds.keys() & tree.keys():
        try:
            tree[name] = field(tree, name, kinds[name], where, UsageError, kinds[name]())
        except UsageError as error:
            del tree[name]
            on_repair(f"{error}: it begins anew")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def check_out(folder: Path | None, names: Sequence[str], overwrite: bool) -> None:
    """Make sure that a new run may write files of these names into `folder`; nothing is touched."""
    if folder is None:
        raise UsageError("say where the results go: --out FOLDER (or --resume FOLDER)")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose another --out")
    check_alone(folder)
    _check_free(folder, names, overwrite)


def check_alone(folder: Path) -> None:
    """Raise InUse where another process works in the folder of a run."""
    who = locks.holder(folder / LOCK)  # nobody, where its process is gone
    if who is not None:
        raise locks.InUse(locks.in_use(folder, who))


def _check_free(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    _check_kinds(folder, names)
    if overwrite or not folder.is_dir():
        return
    present = [name for name in names if (folder / name).exists()]
    record, unfinished = read_record(folder) if RECORD in present else {}, folder / UNFINISHED
    status = record.get("status")
    if record and status != "finished" and (unfinished.exists() or status in ("running", "interrupted")):
        raise UsageError(f"{folder} holds an unfinished run: go on with {resuming(record, folder)}, or --overwrite it")
    if not record and unfinished.exists() and any(path.suffix != ".tmp" for path in unfinished.iterdir()):
        raise UsageError(
            f"{folder} holds an unfinished run that can't be gone on with --resume, as its {RECORD} is gone: choose "
            "another --out, or --overwrite it"
        )
    if status == "failed" and set(present) <= {RECORD, REFERENCE}:  # it failed before it made anything
        return
    if present:
        raise UsageError(f"{folder} already holds {', '.join(present)}: choose another --out, or --overwrite")


def _check_kinds(folder: Path, names: Sequence[str]) -> None:
    """Refuse a folder where a file belongs, and a file where a folder belongs."""
    for name in (*names, LOCK):
        if (folder / name).is_dir():
            raise UsageError(f"{folder / name} is a folder where a file belongs: move it away, or choose another --out")
    if (folder / UNFINISHED).exists() and not (folder / UNFINISHED).is_dir():
        raise UsageError(
            f"{folder / UNFINISHED} is a file where a folder belongs: move it away, or choose another --out"
        )


def resuming(record: dict, folder: Path) -> str:
    """The command that goes on with a run."""
    return f"dream4d {record.get('command', '...')} --resume {shlex.quote(str(folder))}"


@contextmanager
def _locked(folder: Path) -> Iterator[locks.Lock]:
    """Keep other processes out of the folder of a run; where what is done inside fails they may come in again."""
    try:
        held = locks.take(folder / LOCK, folder)
    except OSError as error:
        raise UsageError(
            f"can't write into {folder} ({LOCK}: {error.strerror or error}); choose another --out"
        ) from error
    try:
        yield held
    except BaseException:
        held.release()
        raise


def start_run(
    folder: Path, names: Sequence[str], record: dict, device: torch.device, n_bytes: int, overwrite: bool = False
) -> RunFolder:
    """Prepare the folder of a new run: old results go, run.json says what is coming. The folder is locked from now on.

    What fails here leaves nothing behind that a later run would stumble over.
    """
    check_folder(folder, n_bytes)
    now = {"started": _now(), "finished": None, "versions": versions(), "device": str(device), "seconds": {}}
    with _locked(folder) as held:
        _check_free(folder, names, overwrite)  # another run may have been quicker
        run = RunFolder(folder, {"status": "running", **record, **now}, device, lock=held)
        document_bytes(run.record)  # raises for what can't be written, before anything is lost
        shutil.rmtree(run.unfinished, ignore_errors=True)
        sweep(folder, names)
        for name in names:
            (folder / name).unlink(missing_ok=True)
        run.unfinished.mkdir(exist_ok=True)
        try:
            run.save()
        except BaseException:
            run.unfinished.rmdir()
            raise
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
    """Take up the run in `folder` again. The folder is locked from now on."""
    check_folder(folder, n_bytes)
    _check_kinds(folder, names)
    with _locked(folder) as held:
        record = read_record(folder, on_repair=lambda text: say(f"note: {text}", error=True))
        if record.get("status") == "finished":
            raise UsageError(f"the run in {folder} was finished by another process just now")
        sweep(folder, names)
        sweep(folder / UNFINISHED, ["*"])  # no other process writes here: the lock is ours
        record.setdefault("seconds", {})
        record.pop("error", None)  # it was the last attempt's
        run = RunFolder(folder, record, device, lock=held)
        run.unfinished.mkdir(exist_ok=True)
        now = {"at": _now(), "after": state_of(record, None), "versions": versions(), "device": str(device)}
        run.save("running", resumed=[*record.get("resumed", []), now])
        return run


def state_of(record: dict, who: str | None) -> str:
    """The state of a run in words, by its record and who holds its lock."""
    status = record.get("status", "unknown")
    if who is not None:
        return f"running ({who})"
    return "killed" if status == "running" else status  # a killed process couldn't say so itself
