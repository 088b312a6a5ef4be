"""What people see of a batch: how it goes, a table of all scenes, a sheet of images."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.cells import cell_len
from torch import Tensor

from ..documents import document_bytes, printable, shortened
from ..export import contact_sheet, pick_frames, save_image
from ..machine import write_atomically
from .batch_job import Ended, Job, Row, progress_of, row_of
from .batch_work import Watch
from .progress import Progress, clock_text
from .results import FINAL_PARTS
from .runs import ORBIT, VIDEO
from .terminal import say

SUMMARY_JSON, SUMMARY_CSV, SHEET = "summary.json", "summary.csv", "contact.png"
N_FRAMES, TILE = 6, 96
_MOST_ROWS = 200
"""Scenes on one sheet: many programs show no image of more than 32,767 lines."""
_MOST_BARS = 32  # of scenes that nothing is known of yet: a cluster may be handed thousands
_SHOWN = 32  # letters of a name
_LATIN = 0x180  # behind the last of its letters
_ALL = "all"
_LOOK = 0.5


class Board:
    """Tells how a batch goes: bars of what runs on a terminal, a line for what begins and ends everywhere."""

    def __init__(self, progress: Progress, n_jobs: int) -> None:
        self._progress, self._n_jobs, self._n_ended = progress, n_jobs, 0
        self._live = sys.stdout.isatty()
        self._running: dict[Job, int] = {}  # where its own words begin in its log
        self._looked = 0.0
        if self._live:
            progress.begin(_ALL, n_jobs)

    def watch(self) -> Watch:
        """What a batch tells."""
        return Watch(self._start, self._end, self._retry, self._moment)

    def _start(self, job: Job, how: str) -> None:
        self._running[job] = job.log.stat().st_size if job.log.exists() else 0
        if not self._live:
            self._progress.say(f"{job.name}: {how}")
        elif len(self._running) <= _MOST_BARS:  # of the others one appears when something happens
            self._progress.begin(_label(job.name), job.n_steps)

    def _end(self, job: Job, ended: Ended) -> None:
        self._n_ended += 1
        self._close(job)
        took = clock_text(row_of(job, ended).seconds)
        parts = [f"{job.name}: {ended.state}", f" in {took}" if took and ended.state == "done" else ""]
        parts += [f": {ended.error}" if ended.error else "", f" ({self._n_ended} of {self._n_jobs})"]
        self._progress.say("".join(parts))

    def _retry(self, job: Job, ended: Ended, left: int) -> None:
        self._close(job)
        self._progress.say(
            f"{job.name}: {ended.state}: {ended.error}; goes on from what it had saved (retries left: {left})"
        )

    def _close(self, job: Job) -> None:
        self._running.pop(job, None)
        if self._live:
            self._progress.end(_label(job.name))
            self._progress.update(_ALL, self._n_ended)

    def _moment(self) -> None:
        now = time.monotonic()
        if not self._live or now - self._looked < _LOOK:
            return
        self._looked = now
        for job, start in self._running.items():
            step, doing = progress_of(job, start)
            if not doing:
                continue
            self._progress.begin(_label(job.name), job.n_steps)
            self._progress.update(_label(job.name), step, warning=doing)


def _label(name: str) -> str:
    return shortened(name, _SHOWN)


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines for people, with a head."""
    cells = [("scene", "state", "time", "")]
    cells += [(_label(row.name), row.state, clock_text(row.seconds), _result(row)) for row in rows]
    widths = [max(cell_len(printable(line[i])) for line in cells) for i in range(3)]
    found = []
    for line in cells:
        padded = [
            text + " " * (width - cell_len(printable(text))) for text, width in zip(line[:3], widths, strict=True)
        ]
        found.append("  ".join([*padded, line[3]]).rstrip())
    return found


def _result(row: Row) -> str:
    """What came of a scene, in short."""
    if row.state != "done" or row.error:
        return row.error
    parts = []
    number = _numbers_of(row.metrics)
    for name, text in (
        ("scene.coverage", "covers {:.0%}"),
        ("truth.iou", "IoU {:.2f}"),
        ("truth.clip_iou", "over the clip {:.2f}"),
        ("truth.motion_correlation", "correlation {:.2f}"),
        ("truth.motion_amplitude", "amplitude {:.2f}"),
        ("motion.mean_displacement", "moves {:.2f} of its size"),
        ("reference.psnr", "reference view {:.1f} dB"),
    ):
        if name in number:
            parts.append(text.format(number[name]))
    return ", ".join(parts)


def _numbers_of(tree: Mapping[str, Any], above: str = "") -> dict[str, float]:
    """The single numbers of a tree, by their names with dots; lists are left out."""
    found: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _numbers_of(value, f"{above}{name}.")
        elif isinstance(value, int | float):
            found[f"{above}{name}"] = value
    return found


def counted(rows: Sequence[Row]) -> str:
    """How many scenes are in which state."""
    counts = Counter(row.state for row in rows)
    return ", ".join(f"{n} {state}" for state, n in counts.most_common())


def write_summary(out: Path, jobs: Sequence[Job], ended: Mapping[str, Ended]) -> tuple[list[Row], list[str]]:
    """Write the summary of all scenes of the list and the sheet of those that are done; return rows and files' names.

    What other processes did of the list counts as well: of those the folders tell.
    """
    rows = [row_of(job, ended.get(job.name)) for job in jobs]
    write_atomically(out / SUMMARY_JSON, document_bytes([asdict(row) for row in rows]))
    write_atomically(out / SUMMARY_CSV, _csv(rows))
    sheets = _write_sheets(out, [row for row in rows if row.state == "done"])
    return rows, [SUMMARY_JSON, SUMMARY_CSV, *sheets]


def _csv(rows: Sequence[Row]) -> bytes:
    """A line a scene: what the table says, and every single number of its measures."""
    numbers = [_numbers_of(row.metrics) for row in rows]
    measured = list(dict.fromkeys(name for found in numbers for name in found))
    about = ["line", "name", "state", "seconds", "command", "prompt", "seed", "error", "folder"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*about, *measured])
    for row, found in zip(rows, numbers, strict=True):
        writer.writerow([*(getattr(row, name) for name in about), *(found.get(name) for name in measured)])
    return text.getvalue().encode()


def _write_sheets(out: Path, rows: Sequence[Row]) -> list[str]:
    """Write frames of every scene, a row each; a very long list takes several sheets. Returns their names."""
    found: list[tuple[str, Tensor]] = []
    names: list[str] = []
    for row in rows:
        try:
            # the images' font draws a box for what it doesn't know
            label = _label(row.name) if max(map(ord, row.name)) < _LATIN else f"line {row.line}"
            found.append((label, _frames_of(Path(row.folder))))
        except (ValueError, OSError) as error:  # the scene is there, and may be filmed again
            say(f"{row.name} is not on the sheet: {error}", error=True)
    for number, begin in enumerate(range(0, len(found), _MOST_ROWS), 1):
        part = found[begin : begin + _MOST_ROWS]
        name = SHEET if number == 1 else f"{Path(SHEET).stem}_{number}.png"
        images = torch.stack([frames for _, frames in part])
        save_image(out / name, contact_sheet(images, [label for label, _ in part], [""] * N_FRAMES))
        names.append(name)
    return names


def _frames_of(folder: Path) -> Tensor:
    """Moments of a run's animation, or views of its still object, uint8 [N_FRAMES, TILE, TILE, 3]."""
    import numpy as np
    from PIL import Image

    if (folder / VIDEO).exists():
        frames = pick_frames(folder / VIDEO, _moments)
    else:
        frames = pick_frames(folder / ORBIT, lambda n: [n * i // N_FRAMES for i in range(N_FRAMES)])
    images = [Image.fromarray(frame.numpy()).resize((TILE, TILE), Image.Resampling.BICUBIC) for frame in frames]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def _moments(n_frames: int) -> list[int]:
    """The frames of the final video's first part, which plays the animation once from the front."""
    last = max(1, n_frames // FINAL_PARTS) - 1
    return [round(last * i / (N_FRAMES - 1)) for i in range(N_FRAMES)]
