"""The frame of a run: its folder is opened, the work done in it, and what became of it said and saved."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..assets import AssetError, Provenance, check_header
from ..division import ProcessLost
from ..documents import first_line
from ..export.video import pick_codec
from ..machine import WriteError, check_memory, pick_device, versions
from ..scene import Scene, SceneConfig
from ..training.checkpoint import CheckpointError, set_aside
from ..training.estimate import disk_bytes, film_bytes, memory_bytes
from ..training.loop import Interrupted, RunControl, StepReport
from ..training.motion import check_scale
from ..training.plan import parse_bytes
from ..training.processes import SINGLE, Processes, is_launched, join_processes, leave_processes, speaks
from ..training.validate import check_recipe
from .errors import UsageError
from .interrupts import Stopped, stop_on_interrupt
from .options import Recipe, RunOptions
from .progress import Progress, Quiet, clock_text, make_progress
from .run_folder import (
    RECORD,
    REFERENCE,
    RunFolder,
    check_alone,
    check_out,
    comparable,
    follow_run,
    read_record,
    resume_run,
    resuming,
    settings_tree,
    start_run,
)
from .terminal import say

SCENE, ORBIT, VIDEO, CONTACT, METRICS = "scene.safetensors", "orbit.mp4", "video.mp4", "contact.png", "metrics.json"
RESULTS = (RECORD, SCENE, REFERENCE, ORBIT, VIDEO, CONTACT, METRICS)


@dataclass(frozen=True)
class Session:
    """What the stages of a run share."""

    options: RunOptions
    identity: dict  # the settings that a checkpoint must have been made with
    run: RunFolder
    progress: Progress
    should_stop: Callable[[], bool]
    processes: Processes = SINGLE

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return self.run.device

    def control(self, stage: str) -> RunControl:
        """How the training of a stage reports, saves and stops."""

        def on_step(report: StepReport, _scene: Scene) -> None:
            self.progress.update(stage, report.step, report.loss, report.remaining, report.warning)
            if report.nonfinite:
                self.run.record.setdefault("nonfinite", {})[stage] = report.nonfinite

        asked = self.options.gpu.memory_budget
        return RunControl(
            checkpoint=self.run.unfinished / f"{stage}.checkpoint",
            # what a run starts from belongs to it, too: another image or scene of the same name is another run
            identity={"stage": stage, **self.identity, **{n: self.run.record.get(n) for n in ("source", "reference")}},
            on_step=on_step,
            should_stop=self.should_stop,
            processes=self.processes,
            share=self.options.gpu.share,
            memory_budget=None if asked is None else parse_bytes(asked),
            on_plan=self.progress.say,
        )

    def pause(self, stage: str, alone: bool = False) -> None:
        """Stop here if Ctrl-C was pressed; `alone`: the other processes aren't here."""
        if self.should_stop() if alone else self.processes.any(self.should_stop()):
            raise Interrupted(stage, 0, None)


class Checked(SystemExit):
    """The end of a run that was only to be checked: nothing was found wrong with it."""

    def __init__(self, settings: dict) -> None:
        super().__init__(0)
        self.settings = settings  # as its record would hold them


@contextmanager
def open_run(command: str, options: RunOptions, recipes: tuple[Recipe, ...], scene: SceneConfig) -> Iterator[Session]:
    """Check what can be checked, then open the run's folder for the work inside; ends the command if there is none.

    Raises Checked where no more than that was asked for.
    """
    device = pick_device(options.machine.device)
    if options.gpu.memory_budget is not None:
        parse_bytes(options.gpu.memory_budget)
        if device.type != "cuda":
            raise UsageError(f"--memory-budget is for GPUs, and the work is done on {device.type}: leave it away")
    if options.gpu.share != "cameras" and not is_launched():
        say(
            f"note: --share {options.gpu.share} is for several processes of torchrun: this is one, which does all",
            error=True,
        )
    settings = settings_tree(options, *recipes)
    if options.folders.dry_run:
        _check_settings(options, recipes, scene)
        if options.folders.out is not None:
            check_out(Path(options.folders.out), RESULTS, options.folders.overwrite)
        if speaks():
            say("nothing was found wrong with this run; nothing was made")
        raise Checked(settings)
    head = {"command": command, "prompt": options.prompt, "seed": options.seed, "settings": settings}
    processes, device = join_processes(device)
    try:
        with stop_on_interrupt() as should_stop:
            run = _open_together(processes, options, recipes, scene, head, device)
            began = time.monotonic()  # the wall clock may be set in the meantime
            try:
                with make_progress() if processes.is_main else Quiet() as progress:
                    yield Session(options, comparable(settings), run, progress, should_stop, processes)
                run.finish()
            except Interrupted as stop:
                if not processes.is_main:  # the first process says it
                    sys.exit(should_stop.code)
                run.end("interrupted", stage=stop.stage, step=stop.step or None)  # 0: before its first step
                where = f"{stop.stage}, step {stop.step}" if stop.step else stop.stage
                hint = resuming(run.record, run.path)
                text = f"stopped in {where}; what is done is saved; resume with: {hint}"
                raise Stopped(text, should_stop.code) from stop
            except BaseException as error:
                run.end("failed", error=first_line(error))
                # that another is lost all say, as it may be the first one
                told = processes.is_main or isinstance(error, ProcessLost)
                if told and isinstance(error, WriteError | AssetError | CheckpointError | ProcessLost):
                    raise type(error)(f"{error}; {_way_on(run, error)}") from error
                raise
            finally:
                run.release()
        if processes.is_main:
            files = ", ".join(name for name in RESULTS if (run.path / name).exists())
            peak = run.record["peak_memory_bytes"] / 2**30
            say(f"{run.path}: {files} ({clock_text(time.monotonic() - began)}, peak memory {peak:.1f} GiB)")
    finally:
        leave_processes()


def _way_on(run: RunFolder, error: Exception) -> str:
    """How to go on after a file couldn't be written or used."""
    hint = resuming(run.record, run.path)
    if isinstance(error, CheckpointError) and error.path is not None:
        kept = set_aside(error.path)
        name = f"it is kept as {kept.name}, and " if kept else ""
        return f"{name}{hint} starts this stage over, with what the stages before it made"
    if run.unfinished.exists() or (run.path / SCENE).exists():
        return f"what was saved before is kept: {hint} goes on from there"
    return "nothing was saved before: start again once that is mended"


def _open_together(
    processes: Processes,
    options: RunOptions,
    recipes: tuple[Recipe, ...],
    scene: SceneConfig,
    head: dict,
    device: torch.device,
) -> RunFolder:
    """Let the first process open the run's folder and the others look into it."""
    if not processes.is_main:
        if processes.any(False):  # the first process says why
            sys.exit(0)
        return follow_run(Path(options.folders.resume or options.folders.out), device)
    run = None
    try:
        run = _open(options, recipes, scene, head, device)
    finally:
        processes.any(run is None)  # so that nobody waits for a run that isn't made
    return run


def _open(
    options: RunOptions, recipes: tuple[Recipe, ...], scene: SceneConfig, head: dict, device: torch.device
) -> RunFolder:
    """Start the run, or resume it; nothing is touched before all that can be refused was looked at.

    `head`: how the record of a new run begins.
    """
    folders = options.folders
    _check_settings(options, recipes, scene)  # with --overwrite a folder's results go: not for a run that can't be made
    if folders.resume is None:
        check_out(folders.out and Path(folders.out), RESULTS, folders.overwrite)
    elif read_record(Path(folders.resume)).get("status") == "finished":
        say(f"the run in {folders.resume} is finished: there is nothing to resume")
        sys.exit(0)
    else:
        check_alone(Path(folders.resume))
    if device.type == "cpu":  # a GPU says itself where its memory ends; a CPU would swap, or be killed
        for recipe in recipes:
            way_out = (
                f"lower --{recipe.stage}.phases.N.height and .width, the scene's n-samples or its grids' log2-entries"
            )
            windows = getattr(recipe, "windows", None)
            if windows is not None:
                way_out = f"ask for fewer than {windows.n_frames} frames; or {way_out}"
            check_memory(memory_bytes(recipe, scene), f"training by the recipe {recipe.name!r}", way_out)
    size = options.images.size
    check_memory(film_bytes(size, size), f"filming at --size {size}", "lower --size")
    room = disk_bytes(recipes, scene)
    if folders.resume is None:
        return start_run(Path(folders.out), RESULTS, head, device, room, folders.overwrite)
    run = resume_run(Path(folders.resume), RESULTS, device, room)
    if run.record["resumed"][-1]["after"] == "killed":
        say(f"the run in {run.path} was killed: going on from what it had saved")
    return run


def _check_settings(options: RunOptions, recipes: tuple[Recipe, ...], scene: SceneConfig) -> None:
    """Refuse what no run can be made with, or whose result could not be read or filmed, before anything is touched."""
    pick_codec()
    scale = getattr(options, "deformation_scale", None)
    if scale is not None:
        check_scale(scale, "--deformation-scale")
    for recipe in recipes:
        check_recipe(recipe, recipe.stage)
    for recipe in recipes:
        for prompt in (options.prompt, getattr(options, "object_prompt", None)):
            provenance = Provenance(prompt or "", recipe.name, options.seed, recipe.steps, versions())
            check_header(recipe.trained(scene), provenance)
