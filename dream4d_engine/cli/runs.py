"""The commands that train: text-to-3d, image-to-3d, animate, text-to-4d, image-to-4d."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..assets import AssetError, Provenance, check_header, load_scene, save_scene
from ..cameras import CameraBatch
from ..documents import document_bytes, first_line
from ..export import save_image
from ..machine import WriteError, check_memory, pick_device, versions, write_atomically
from ..priors.networks.execution import Runtime
from ..scene import Scene, SceneConfig
from ..training.checkpoint import CheckpointError, set_aside
from ..training.config import MotionRecipe, StaticRecipe
from ..training.estimate import disk_bytes, film_bytes, memory_bytes
from ..training.guidance import Handles, active_terms, explain_silence, load_guidance, runtime_for
from ..training.loop import FitSummary, Interrupted, PriorSilent, ResumeMismatch, RunControl, StepReport
from ..training.motion import check_scale, train_motion
from ..training.plan import parse_bytes
from ..training.processes import SINGLE, Processes, join_processes, leave_processes
from ..training.reference import Reference, check_reference, load_reference
from ..training.static import train_static
from ..training.validate import check_recipe
from . import results
from .arguments import (
    Animate,
    AnimateCall,
    GpuOptions,
    ImageTo3DCall,
    ImageTo4D,
    ImageTo4DCall,
    TextTo3DCall,
    TextTo4D,
    TextTo4DCall,
)
from .interrupts import Stopped, stop_on_interrupt
from .models import prior_handles
from .parsing import RECORD, UsageError, comparable, read_record, settings_tree
from .progress import Progress, Quiet, clock_text, make_progress
from .run_folder import (
    REFERENCE,
    RunFolder,
    check_alone,
    check_out,
    follow_run,
    resume_run,
    resuming,
    start_run,
)
from .terminal import say

SCENE, ORBIT, VIDEO, CONTACT, METRICS = "scene.safetensors", "orbit.mp4", "video.mp4", "contact.png", "metrics.json"
RESULTS = (RECORD, SCENE, REFERENCE, ORBIT, VIDEO, CONTACT, METRICS)

Call = TextTo3DCall | ImageTo3DCall | AnimateCall | TextTo4DCall | ImageTo4DCall
Made = tuple[Scene, Provenance]


@dataclass(frozen=True)
class Session:
    """What the stages of a run share."""

    call: Call
    run: RunFolder
    progress: Progress
    should_stop: Callable[[], bool]
    processes: Processes = SINGLE

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return self.run.device

    def runtime(self, recipe: StaticRecipe | MotionRecipe) -> Runtime:
        """How the recipe's models run."""
        return runtime_for(recipe, self.device, compiled=self.call.options.gpu.compile)

    def control(self, stage: str) -> RunControl:
        """How the training of a stage reports, saves and stops."""

        def on_step(report: StepReport, _scene: Scene) -> None:
            self.progress.update(stage, report.step, report.loss, report.remaining, report.warning)
            if report.nonfinite:
                self.run.record.setdefault("nonfinite", {})[stage] = report.nonfinite

        sources = {name: self.run.record.get(name) for name in ("source", "reference")}
        identity = {"stage": stage, **comparable(self.call), **sources}
        path = self.run.unfinished / f"{stage}.checkpoint"
        asked = self.call.options.gpu.memory_budget
        budget = None if asked is None else parse_bytes(asked)
        return RunControl(
            path,
            identity,
            on_step,
            self.should_stop,
            processes=self.processes,
            memory_budget=budget,
            on_plan=self.progress.say,
        )

    def pause(self, stage: str, alone: bool = False) -> None:
        """Stop here if Ctrl-C was pressed; `alone`: the other processes aren't here."""
        if self.should_stop() if alone else self.processes.any(self.should_stop()):
            raise Interrupted(stage, 0, None)


# ---- the commands ------------------------------------------------------------------------------------------


def text_to_3d(call: TextTo3DCall) -> int:
    """Stage 1 alone."""
    options, recipe = call.options, call.static
    prompt = _said(options.prompt, "the prompt")
    handles = prior_handles(recipe, options, prompt)

    def work(session: Session) -> None:
        scene, provenance = static_stage(session, recipe, handles, prompt, session.run.path / SCENE)
        film(session, ORBIT, scene, results.orbit_cameras(options.images), prompt)
        show(session, scene, prompt)

    return _carry_out(call, (recipe,), recipe.scene, work)


def image_to_3d(call: ImageTo3DCall) -> int:
    """Stage 1 alone, from an image."""
    options, recipe = call.options, call.static
    reference = _reference(call)
    prompt = _object_prompt(recipe, options.prompt, "--prompt")
    handles = prior_handles(recipe, options, prompt)

    def work(session: Session) -> None:
        keep_reference(session, reference)
        scene, provenance = static_stage(session, recipe, handles, prompt, session.run.path / SCENE, reference)
        film(session, ORBIT, scene, results.orbit_cameras(options.images), prompt)
        show(session, scene, prompt, reference, scene)

    return _carry_out(call, (recipe,), recipe.scene, work)


def animate(call: AnimateCall) -> int:
    """Stage 2 on a scene from a file."""
    options, recipe = call.options, call.motion
    if options.scene is None:
        raise UsageError("say which scene to animate: dream4d animate SCENE PROMPT --out FOLDER")
    prompt = _said(options.prompt, "the prompt")
    still, parent = load_scene(options.scene)
    source = hashlib.sha256(Path(options.scene).read_bytes()).hexdigest()
    handles = prior_handles(recipe, options, prompt)

    def work(session: Session) -> None:
        if session.run.record.setdefault("source", source) != source:
            raise ResumeMismatch(f"{options.scene} is not the scene any more that this run began with: start over")
        scene, provenance = motion_stage(session, recipe, handles, prompt, still, parent)
        film(session, VIDEO, scene, results.final_cameras(options.images), prompt)
        show(session, scene, prompt)

    return _carry_out(call, (recipe,), still.config, work)


def text_to_4d(call: TextTo4DCall) -> int:
    """Both stages."""
    return _both_stages(call, None)


def image_to_4d(call: ImageTo4DCall) -> int:
    """Both stages, the first one from an image."""
    return _both_stages(call, _reference(call))


def _both_stages(call: TextTo4DCall | ImageTo4DCall, reference: Reference | None) -> int:
    options = call.options
    prompt = _said(options.prompt, "the prompt" if reference is None else "--prompt")
    object_prompt = prompt if options.object_prompt is None else _said(options.object_prompt, "--object-prompt")
    static_handles = prior_handles(call.static, options, object_prompt)
    motion_handles = prior_handles(call.motion, options, prompt)

    def work(session: Session) -> None:
        if reference is not None:
            keep_reference(session, reference)
        session.progress.begin("static", call.static.steps)
        session.progress.begin("motion", call.motion.steps)
        still_file = session.run.unfinished / "static.safetensors"
        still, parent = static_stage(session, call.static, static_handles, object_prompt, still_file, reference)
        scene, provenance = motion_stage(session, call.motion, motion_handles, prompt, still, parent)
        film(session, ORBIT, still, results.orbit_cameras(options.images), prompt)
        film(session, VIDEO, scene, results.final_cameras(options.images), prompt)
        show(session, scene, prompt, reference, still)

    return _carry_out(call, (call.static, call.motion), call.static.scene, work)


def _reference(call: ImageTo3DCall | ImageTo4DCall) -> Reference:
    """Read and check the image that a run starts from."""
    options, recipe = call.options, call.static
    if options.image is None:
        raise UsageError(f"say which image to start from: dream4d {command_of(call)} IMAGE --out FOLDER")
    check_recipe(recipe, "static")
    maps = options.maps
    reference = load_reference(
        options.image,
        recipe.reference,
        mask=maps.mask,
        depth=maps.depth_map,
        normals=maps.normal_map,
        mask_shows=maps.mask_shows,
    )
    check_reference(recipe, reference)
    return reference


def _object_prompt(recipe: StaticRecipe, prompt: str | None, name: str) -> str:
    """The prompt; empty only where no model of the recipe reads it."""
    readers = [term.prior for term in active_terms(recipe) if term.prior != "novel_view"]
    if not readers and prompt is None:
        return ""
    if prompt is None:
        index = [term.prior for term in recipe.guidance].index(readers[0])
        raise UsageError(
            f"the {readers[0]} model wants to know what the image shows: say it with {name}, or leave that model "
            f"out with --static.guidance.{index}.weight 0"
        )
    return _said(prompt, name)


def _said(prompt: str | None, name: str) -> str:
    """The prompt, if there is one."""
    if prompt is None or not prompt.strip():
        raise UsageError(f"{name} is empty: say what to make, for example 'a red cube is jumping'")
    return prompt.strip()


# ---- the frame of a run ------------------------------------------------------------------------------------------


def command_of(call: Call) -> str:
    """The command's name."""
    names = {
        TextTo3DCall: "text-to-3d",
        ImageTo3DCall: "image-to-3d",
        AnimateCall: "animate",
        TextTo4DCall: "text-to-4d",
        ImageTo4DCall: "image-to-4d",
    }
    return names[type(call)]


def _carry_out(
    call: Call,
    recipes: tuple[StaticRecipe | MotionRecipe, ...],
    scene: SceneConfig,
    work: Callable[[Session], None],
) -> int:
    """Check what can be checked, then do the work in its folder; return the exit code."""
    device = pick_device(call.options.machine.device)
    _check_budget(call.options.gpu, device)
    processes, device = join_processes(device)
    try:
        return _carry_out_in(processes, call, recipes, scene, device, work)
    finally:
        leave_processes()


def _carry_out_in(
    processes: Processes,
    call: Call,
    recipes: tuple[StaticRecipe | MotionRecipe, ...],
    scene: SceneConfig,
    device: torch.device,
    work: Callable[[Session], None],
) -> int:
    with stop_on_interrupt() as should_stop:
        run = _open_together(processes, call, recipes, scene, device)
        if run is None:
            return 0
        began = time.monotonic()
        try:
            with make_progress() if processes.is_main else Quiet() as progress:
                work(Session(call, run, progress, should_stop, processes))
            run.finish()
        except Interrupted as stop:
            if not processes.is_main:  # the first process says it
                return should_stop.code
            run.end("interrupted", stage=stop.stage, step=stop.step or None)
            where = f"{stop.stage}, step {stop.step}" if stop.step else stop.stage
            hint = resuming(run.record, run.path)
            text = f"stopped in {where}; what is done is saved; resume with: {hint}"
            raise Stopped(text, should_stop.code) from stop
        except BaseException as error:
            run.end("failed", error=first_line(error))
            if processes.is_main and isinstance(error, WriteError | AssetError | CheckpointError):
                raise type(error)(f"{error}; {_way_on(run, error)}") from error
            raise
        finally:
            run.release()
    if processes.is_main:
        _say_finished(run, time.monotonic() - began)
    return 0


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


def _check_budget(gpu: GpuOptions, device: torch.device) -> None:
    if gpu.memory_budget is None:
        return
    parse_bytes(gpu.memory_budget)
    if device.type != "cuda":
        raise UsageError(f"--memory-budget is for GPUs, and the work is done on {device.type}: leave it away")


def _open_together(
    processes: Processes,
    call: Call,
    recipes: tuple[StaticRecipe | MotionRecipe, ...],
    scene: SceneConfig,
    device: torch.device,
) -> RunFolder | None:
    """Let the first process open the run's folder and the others look into it; None where there is nothing to do."""
    if processes.is_main:
        run = None
        try:
            run = _open_run(call, recipes, scene, device)
        finally:
            processes.any(run is None)  # so that nobody waits for a run that isn't made
        return run
    if processes.any(False):
        return None
    folders = call.options.folders
    return follow_run(Path(folders.resume or folders.out), device)


def _check_numbers(call: Call, recipes: tuple[StaticRecipe | MotionRecipe, ...], scene: SceneConfig) -> None:
    """Refuse numbers that no run can be made with, or whose result could not be read, before anything is touched."""
    for recipe in recipes:
        check_recipe(recipe, recipe.stage)
    scale = getattr(call.options, "deformation_scale", None)
    if scale is not None:
        check_scale(scale)
    for recipe in recipes:
        for prompt in (call.options.prompt, getattr(call.options, "object_prompt", None)):
            check_header(
                recipe.trained(scene),
                Provenance(prompt or "", recipe.name, call.options.seed, recipe.steps, versions()),
            )


def _open_run(
    call: Call, recipes: tuple[StaticRecipe | MotionRecipe, ...], scene: SceneConfig, device: torch.device
) -> RunFolder | None:
    """Start or resume the run's folder; None where the run is finished already."""
    folders = call.options.folders
    _check_numbers(call, recipes, scene)
    if folders.resume is None:
        check_out(folders.out and Path(folders.out), RESULTS, folders.overwrite)
    elif read_record(Path(folders.resume)).get("status") == "finished":
        say(f"the run in {folders.resume} is finished: there is nothing to resume")
        return None
    else:
        check_alone(Path(folders.resume))
    if device.type == "cpu":
        for recipe in recipes:
            way_out = (
                f"lower --{recipe.stage}.phases.N.height and .width, the scene's n-samples or its grids' log2-entries"
            )
            check_memory(memory_bytes(recipe, scene), f"training by the recipe {recipe.name!r}", way_out)
    size = call.options.images.size
    check_memory(film_bytes(size, size), f"filming at --size {size}", "lower --size")
    room = disk_bytes(recipes, scene)
    if folders.resume is not None:
        run = resume_run(Path(folders.resume), RESULTS, device, room)
        if run.record["resumed"][-1]["after"] == "killed":
            say(f"the run in {run.path} was killed: going on from what it had saved")
        return run
    record = {
        "command": command_of(call),
        "prompt": call.options.prompt,
        "seed": call.options.seed,
        "settings": settings_tree(call),
    }
    return start_run(Path(folders.out), RESULTS, record, device, room, folders.overwrite)


def _say_finished(run: RunFolder, seconds: float) -> None:
    files = ", ".join(name for name in RESULTS if (run.path / name).exists())
    peak = run.record["peak_memory_bytes"] / 2**30
    say(f"{run.path}: {files} ({clock_text(seconds)}, peak memory {peak:.1f} GiB)")


# ---- stages ------------------------------------------------------------------------------------------------------


def keep_reference(session: Session, reference: Reference) -> None:
    """Say and show what was made of the image; a resumed run must go on with the same one."""
    run, name = session.run, reference.fingerprint()
    if run.record.setdefault("reference", name) != name:
        raise ResumeMismatch(
            f"{session.call.options.image} (or its mask or map) is not the one any more that this run began with: "
            "start over"
        )
    session.progress.say(reference.statement)
    save_image(run.path / REFERENCE, reference.over())
    run.save(prepared=reference.statement)


def static_stage(
    session: Session,
    recipe: StaticRecipe,
    handles: Handles,
    prompt: str,
    path: Path,
    reference: Reference | None = None,
) -> Made:
    """Stage 1, unless its result is there already."""
    session.progress.begin("static", recipe.steps)
    seed = session.call.options.seed

    def train() -> tuple[Scene, FitSummary]:
        with session.run.timed("load models"):
            guidance = load_guidance(recipe, handles, prompt, session.runtime(recipe), reference)
        session.pause("static")
        with session.run.timed("static"), _explained(session, recipe, handles):
            return train_static(
                recipe,
                guidance,
                seed=seed,
                device=session.device,
                control=session.control("static"),
                reference=reference,
            )

    return _stage(session, "static", Provenance(prompt, recipe.name, seed, recipe.steps, versions()), path, train)


def motion_stage(
    session: Session, recipe: MotionRecipe, handles: Handles, prompt: str, still: Scene, parent: Provenance
) -> Made:
    """Stage 2, unless its result is there already."""
    session.progress.begin("motion", recipe.steps)
    options: Animate | TextTo4D | ImageTo4D = session.call.options

    def train() -> tuple[Scene, FitSummary]:
        with session.run.timed("load models"):
            guidance = load_guidance(recipe, handles, prompt, session.runtime(recipe))
        session.pause("motion")
        with session.run.timed("motion"), _explained(session, recipe, handles):
            return train_motion(
                still,
                recipe,
                guidance,
                seed=options.seed,
                device=session.device,
                control=session.control("motion"),
                deformation_scale=options.deformation_scale,
            )

    provenance = Provenance(prompt, recipe.name, options.seed, recipe.steps, versions(), parent)
    return _stage(session, "motion", provenance, session.run.path / SCENE, train)


def _stage(
    session: Session,
    stage: str,
    provenance: Provenance,
    path: Path,
    train: Callable[[], tuple[Scene, FitSummary]],
) -> Made:
    """Train and save a scene. It is read back, so that a resumed run goes on from the very same one."""
    made = _made_before(session, stage, provenance, path)
    if session.processes.any(made is None):
        scene, summary = train()
        if session.processes.is_main:
            save_scene(path, scene, provenance)
        fits = session.run.record.setdefault("fits", {})
        fits[stage] = asdict(summary)
        session.run.save()
        session.processes.wait()  # until it is written
        made = load_scene(path, session.device)
    session.progress.update(stage, provenance.steps)
    session.processes.wait()  # until all have it: what is unfinished is removed at the end
    return made


def _made_before(session: Session, stage: str, provenance: Provenance, path: Path) -> Made | None:
    """The result of a stage from before a resume; one that can't be used is set aside, and the stage done again."""
    if not path.exists():
        return None
    try:
        scene, found = load_scene(path, session.device)
        if replace(found, versions={}, parent=None) == replace(provenance, versions={}, parent=None):
            return scene, found
        why = f"{path} is the result of other settings"
    except AssetError as error:
        why = str(error)
    session.processes.wait()  # until all have seen it
    if session.processes.is_main:
        kept = set_aside(path)
        name = f" (it is kept as {kept.name})" if kept else ""
        session.progress.say(f"{why}{name}: the stage {stage} is done again")
    session.processes.wait()
    return None


@contextmanager
def _explained(session: Session, recipe: StaticRecipe | MotionRecipe, handles: Handles) -> Iterator[None]:
    """Say which file a prior is that gives no finite answer, and which flag may help."""
    try:
        yield
    except PriorSilent as error:
        way = f"--{recipe.stage}.loop.precision full runs it in full precision, in a new run"
        raise explain_silence(error, recipe, handles, session.runtime(recipe), way) from error


def film(session: Session, name: str, scene: Scene, cameras: CameraBatch, title: str) -> None:
    """Make a video, unless it is there already."""
    if not session.processes.is_main:
        return
    path, images, stage = session.run.path / name, session.call.options.images, name.partition(".")[0]
    n_frames = cameras.shape[1]
    session.progress.begin(stage, n_frames)
    if path.exists():
        session.progress.update(stage, n_frames)
        return
    began = time.monotonic()

    def on_frame(done: int) -> None:
        session.pause(stage, alone=True)
        session.progress.update(stage, done, None, (time.monotonic() - began) / done * (n_frames - done))

    with session.run.timed(stage):
        results.save_scene_video(path, scene, cameras, images.fps, images.samples, title, on_frame)


def show(
    session: Session, scene: Scene, prompt: str, reference: Reference | None = None, still: Scene | None = None
) -> None:
    """Make the sheet of images and the measures; those of an image are the `still` scene's."""
    if not session.processes.is_main:
        return
    with session.run.timed("measures"):
        results.save_contact_sheet(session.run.path / CONTACT, scene, prompt, session.call.options.images.samples)
        session.pause("measures", alone=True)
        measures, line = results.measure(scene, prompt)
        if reference is not None:
            found = results.measure_reference(still, reference, session.call.static.reference)
            measures["reference"] = found
            line += f", reference view {found['psnr']:.1f} dB"
        write_atomically(session.run.path / METRICS, document_bytes(measures))
    session.progress.say(line)


COMMANDS = {
    "text-to-3d": text_to_3d,
    "image-to-3d": image_to_3d,
    "animate": animate,
    "text-to-4d": text_to_4d,
    "image-to-4d": image_to_4d,
}
"""The commands of this module by name."""
