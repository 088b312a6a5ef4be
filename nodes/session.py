"""A training run inside ComfyUI: gradients, progress, stopping, resuming, memory.

ComfyUI executes nodes in inference mode, where no graph can be recorded: training leaves it. A run's unfinished
state and its result are kept in output/dream4d/runs under a name made from the settings and inputs.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import comfy.model_management as management
import folder_paths
import torch

from ..dream4d_engine import locks
from ..dream4d_engine.assets import AssetError, Provenance, check_header, load_scene, save_scene
from ..dream4d_engine.documents import printable
from ..dream4d_engine.guidance.distillation import Guidance
from ..dream4d_engine.machine import WriteError, check_folder, check_memory, peak_memory, versions
from ..dream4d_engine.priors.files import digest
from ..dream4d_engine.priors.handle import Prior, PriorHandle, PriorKind
from ..dream4d_engine.scene import Scene, SceneConfig
from ..dream4d_engine.training.checkpoint import CheckpointError, set_aside
from ..dream4d_engine.training.config import (
    IMAGE_RECIPES,
    MOTION_RECIPES,
    ORBIT_RECIPES,
    STATIC_RECIPES,
    MeshRecipe,
    MotionRecipe,
    StaticRecipe,
)
from ..dream4d_engine.training.estimate import disk_bytes, memory_bytes
from ..dream4d_engine.training.guidance import active_terms, explain_silence, load_guidance, runtime_for
from ..dream4d_engine.training.loop import (
    FitSummary,
    Interrupted,
    PriorSilent,
    ResumeMismatch,
    RunControl,
    StepReport,
)
from ..dream4d_engine.training.reference import Reference
from ..dream4d_engine.training.validate import check_recipe
from .graph_prior import models_of
from .images import small_image
from .memory import HeldPriors
from .preview import LivePreview
from .sockets import SceneValue

AUTOMATIC, START_OVER = "resume automatically", "start over"
KEPT_RESULTS = 16
_SECONDS_BETWEEN_REPORTS = 0.1
_CHOICES = ("gradient_frames", "orbit", "last_guidance_scale")
"""What a recipe may say and didn't always know."""


def _said(recipe: list[tuple[str, Any]]) -> dict[str, Any]:
    """What a recipe says, of it or of a part of it.

    What is left as it was before there was a choice is of no run: those from then are found again.
    """
    return {name: value for name, value in recipe if value is not None or name not in _CHOICES}


class RunError(ValueError):
    """Something a person has to change before the run can go on."""


@dataclass(frozen=True)
class RunFiles:
    """The files of one run; `lock` is held by the process that works on it."""

    checkpoint: Path
    result: Path
    lock: Path

    def sweep(self) -> None:
        """Remove what a killed server left half-written."""
        for path in (self.checkpoint, self.result):
            for half in path.parent.glob(f".{path.name}.*.tmp"):
                half.unlink(missing_ok=True)


def runs_folder() -> Path:
    """Where unfinished and finished runs are kept."""
    folder = Path(folder_paths.get_output_directory()) / "dream4d" / "runs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"can't write into {folder}: {error.strerror or error}; {_ANOTHER_PLACE}") from error
    return folder


_ANOTHER_PLACE = "start ComfyUI with another --output-directory"


def check_runs_folder(n_bytes: int) -> None:
    """ValueError where a run of so many bytes can't be kept."""
    check_folder(runs_folder(), n_bytes, _ANOTHER_PLACE)


@contextmanager
def alone(files: RunFiles, stage: str) -> Iterator[None]:
    """Keep other servers that have the same output folder from working on the same run."""
    try:
        held = locks.take(files.lock, f"this run ({stage}, {files.checkpoint.stem})")
    except locks.InUse as error:
        raise RunError(f"{error}, and queue again; or change the seed") from error
    except OSError as error:
        raise RunError(f"can't write {files.lock}: {error.strerror or error}; {_ANOTHER_PLACE}") from error
    try:
        files.sweep()
        yield
    finally:
        held.release()


def run_files(identity: dict) -> RunFiles:
    """Return the files of the run with these settings and inputs."""
    folder, name = runs_folder(), digest(identity)[:24]
    return RunFiles(folder / f"{name}.checkpoint", folder / f"{name}.safetensors", folder / f"{name}.lock")


class _Convolutions:
    """While inside, how cuDNN chooses convolutions may change, for the whole process; the last one out puts it back."""

    def __init__(self) -> None:
        self._counting, self._inside, self._before = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self._counting:
            if not self._inside:
                self._before = torch.backends.cudnn.benchmark
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._counting:
            self._inside -= 1
            if not self._inside:
                torch.backends.cudnn.benchmark = self._before


_CONVOLUTIONS = _Convolutions()


@contextmanager
def gradients() -> Iterator[None]:
    """Leave ComfyUI's inference mode; what is made inside can be trained and shared.

    How cuDNN chooses convolutions, which fast priors change, is as before afterwards: samplers would see other shapes.
    """
    with _CONVOLUTIONS, torch.inference_mode(False), torch.enable_grad():
        yield


def interrupt_if_asked() -> None:
    """Stop the node here if Cancel was pressed."""
    management.throw_exception_if_processing_interrupted()


@contextmanager
def steps_end_first() -> Iterator[None]:
    """Let Cancel wait for the end of a step, where the run looks for it.

    ComfyUI's layers look each time they are called, and raise: inside of a graph's own model that would be in the
    middle of a step, when nothing can be saved that a run could go on from.
    """
    look = management.throw_exception_if_processing_interrupted
    management.throw_exception_if_processing_interrupted = lambda: None
    try:
        yield
    finally:
        management.throw_exception_if_processing_interrupted = look


def say_on_node(text: str, node_id: str | None) -> None:
    """Put lines of text on a node."""
    from server import PromptServer

    if node_id is not None and PromptServer.instance is not None:
        lines = map(printable, text.split("\n"))  # names of files, which stand in many, needn't be UTF-8
        PromptServer.instance.send_progress_text("\n".join(lines), node_id)


def show_taken(text: str, image: torch.Tensor, node_id: str | None) -> None:
    """Say, on the node and in the log, and show what was taken from an image, before anything is counted there."""
    from comfy_execution.progress import get_progress_state

    logging.info("[Dream4D] %s", text)
    say_on_node(text, node_id)
    if node_id is not None:
        get_progress_state().update_progress(node_id, 0, 1, ("JPEG", small_image(image), None))


class Reporter:
    """A node's progress bar, its line of text and its live preview."""

    def __init__(self, node_id: str | None, stage: str, preview_seconds: float) -> None:
        self._node_id, self._stage = node_id, stage
        self.value = self._most = 0
        self._latest = -1.0
        self._began = time.monotonic()
        self._note = ""
        self._preview = LivePreview(self._send_image, preview_seconds if node_id is not None else 0)

    def say(self, text: str) -> None:
        """Put a line on the node."""
        say_on_node(text, self._node_id)

    def note(self, text: str) -> None:
        """Put a line into the log, and on the node for as long as the run lasts."""
        logging.warning("[Dream4D] %s", text)
        self._note = f"\n{text}"
        self.say(text)

    def plan(self, text: str) -> None:
        """Tell how the memory budget is kept to."""
        logging.info("[Dream4D] %s", text)
        self.say(text)

    def step(self, report: StepReport, scene: Scene, device: torch.device) -> None:
        """Show a step."""
        self.value, self._most = report.step, report.steps
        self._preview.offer(scene)
        now = time.monotonic()
        if report.step < report.steps and now - self._latest < _SECONDS_BETWEEN_REPORTS:
            return
        self._latest = now
        self._progress(None)
        self.say(progress_line(report, peak_memory(device)) + self._note)

    def close(self) -> None:
        """End the preview and note in the log what it took."""
        self._preview.close()
        cost, seconds = self._preview.cost, time.monotonic() - self._began
        if cost.made:
            share = (cost.rendering + cost.showing) / max(seconds, 1e-9)
            logging.info("[Dream4D] %d live previews took %.1f %% of %.0f s", cost.made, 100 * share, seconds)

    def _send_image(self, image) -> None:
        self._progress(("JPEG", image, None))

    def _progress(self, image) -> None:
        # not comfy.utils.ProgressBar: its hook raises when Cancel was pressed, before the state is saved
        from comfy_execution.progress import get_progress_state

        if self._node_id is not None:
            get_progress_state().update_progress(self._node_id, self.value, self._most, image)


def progress_line(report: StepReport, memory: int | None) -> str:
    """One step as text: stage, step, loss, speed, time left, memory, what a prior's answers lack."""
    pace = report.seconds_per_step
    speed = f"{1 / pace:.1f} it/s" if pace < 1 else f"{pace:.1f} s/it"
    minutes, seconds = divmod(round(report.remaining), 60)
    parts = [f"{report.stage} {report.step}/{report.steps}", f"loss {report.loss:.4g}", speed]
    parts.append(f"{minutes}:{seconds:02} left")
    if memory is not None:
        parts.append(f"{memory / 2**30:.1f} GiB at most")
    if report.warning:
        parts.append(report.warning)
    return " · ".join(parts)


def needed_priors(recipe: StaticRecipe | MotionRecipe) -> list[PriorKind]:
    """The kinds of prior that a recipe asks, each once."""
    return list(dict.fromkeys(term.prior for term in active_terms(recipe)))


def missing_prior(recipe: StaticRecipe | MotionRecipe, kind: PriorKind) -> str:
    """What to say where the socket of a prior is empty."""
    made_by = "a Load Toy Prior or Load Prior node of that kind"
    if kind == "novel_view" and recipe.orbit is not None:
        made_by = "a Novel-View Prior from Model node, with SV3D,"
    return (
        f"the recipe {recipe.name!r} needs a prior of the kind {kind!r}: connect {made_by} to the socket {kind}_prior"
    )


def pick_priors(
    recipe: StaticRecipe | MotionRecipe, given: Mapping[PriorKind, PriorHandle | None]
) -> dict[PriorKind, PriorHandle]:
    """Return the models that the recipe's terms need, or say which socket is empty or holds another kind."""
    found: dict[PriorKind, PriorHandle] = {}
    for kind in needed_priors(recipe):
        prior = given.get(kind)
        if prior is None:
            raise RunError(missing_prior(recipe, kind))
        if prior.kind != kind:
            raise RunError(
                f"the socket {kind}_prior holds the {prior.kind} prior {prior.name!r}: connect one of the kind {kind!r}"
            )
        found[kind] = prior
    return found


class Work(Protocol):
    """What is trained, as `carry_out` has to know it."""

    @property
    def stage(self) -> str:
        """Its name in reports and messages."""

    @property
    def recipe(self) -> StaticRecipe | MotionRecipe | MeshRecipe:
        """Its numbers."""

    @property
    def priors(self) -> Mapping[PriorKind, PriorHandle]:
        """The models that it asks."""

    @property
    def memory_budget(self) -> int | None:
        """Bytes of GPU memory, which change no result."""

    def statement(self) -> str:
        """What is said beside the loading of the models; ""."""

    def needed_bytes(self) -> int:
        """What training takes at the least, beside the models."""

    def ways_to_less(self) -> str:
        """What takes less memory, as the end of "lower ..."."""

    def check(self) -> None:
        """Refuse what no run can be made with, or whose result could not be read back."""

    def provenance(self) -> Provenance:
        """Where the result comes from."""

    def identity(self, device: torch.device) -> dict:
        """The tree that a checkpoint is recognised by, as JSON gives it back."""

    def guidance(self, device: torch.device, on_prior: Callable[[Prior], None]) -> dict[PriorKind, Guidance]:
        """Load the models, telling of each."""

    def silenced(self, error: PriorSilent, device: torch.device) -> str:
        """Why a prior may have given no answers."""


@dataclass(frozen=True)
class Run:
    """One stage to be trained from priors.

    `settings`: all that its result depends on beside the other fields. `start`: the configuration of the scene that
    training starts from. `memory_budget`: bytes of GPU memory, which change no result.
    """

    stage: str
    recipe: StaticRecipe | MotionRecipe
    priors: Mapping[PriorKind, PriorHandle]
    prompt: str
    negative: str
    seed: int
    settings: dict
    start: SceneConfig
    parent: Provenance | None = None
    reference: Reference | None = None
    memory_budget: int | None = None

    def needed_bytes(self) -> int:
        """What training takes at the least, beside the models."""
        return memory_bytes(self.recipe, self.start)

    def statement(self) -> str:
        """What was taken from an image, or how a long animation is seen."""
        if self.recipe.windows is not None:
            return self.recipe.windows.describe()
        return "" if self.reference is None else self.reference.statement

    def ways_to_less(self) -> str:
        """Smaller recipes of the same family, or the models."""
        families = (STATIC_RECIPES, IMAGE_RECIPES, ORBIT_RECIPES, MOTION_RECIPES)
        family = next(known for known in families if self.recipe.name in known)
        smaller = [r.name for r in family.values() if memory_bytes(r, self.start) < self.needed_bytes()]
        if self.recipe.windows is not None:
            return "the frames that are asked for"
        if smaller:
            return f"the recipe (smaller ones: {', '.join(smaller)})"
        return "the sizes of the models (load smaller priors)"

    def check(self) -> None:
        """Refuse what no run can be made with, or whose result could not be read back."""
        config = self.recipe.trained(self.start)
        try:
            if isinstance(self.seed, int) and not 0 <= self.seed < 2**63:
                raise ValueError(f"seed must lie in [0, 2^63), got {self.seed}")
            for words in (self.prompt, self.negative):
                check_header(config, self._provenance(words))
            check_recipe(self.recipe, self.stage)
            check_runs_folder(disk_bytes((self.recipe,), config))
        except ValueError as error:
            raise RunError(str(error)) from error

    def provenance(self) -> Provenance:
        """Where the result comes from."""
        return self._provenance(self.prompt)

    def _provenance(self, words: str) -> Provenance:
        return Provenance(words, self.recipe.name, self.seed, self.recipe.steps, versions(), self.parent)

    def identity(self, device: torch.device) -> dict:
        """The tree that a checkpoint is recognised by, as JSON gives it back."""
        from dataclasses import asdict

        tree = {
            "stage": self.stage,
            "recipe": asdict(self.recipe, dict_factory=_said),
            "prompt": self.prompt,
            "negative": self.negative,
            "seed": self.seed,
            "priors": {kind: prior.fingerprint() for kind, prior in self.priors.items()},
            "reference": None if self.reference is None else self.reference.fingerprint(),
            "device": device.type,
            **self.settings,
        }
        return json.loads(json.dumps(tree))

    def guidance(self, device: torch.device, on_prior: Callable[[Prior], None]) -> dict[PriorKind, Guidance]:
        """Load the models, telling of each."""
        runtime = runtime_for(self.recipe, device)
        return load_guidance(self.recipe, self.priors, self.prompt, runtime, self.reference, self.negative, on_prior)

    def silenced(self, error: PriorSilent, device: torch.device) -> str:
        """Why a prior may have given no answers."""
        way = "another file of this model, or of its autoencoder, may bear it"
        return str(explain_silence(error, self.recipe, self.priors, runtime_for(self.recipe, device), way))


Trainer = Callable[..., tuple[Scene, FitSummary]]
"""(guidance, device=, control=) -> (scene, summary); see train_static."""


def carry_out(run: Work, train: Trainer, *, node_id: str | None, resume: str, preview_seconds: float) -> SceneValue:
    """Train, or take up what is there already, and return the scene on the CPU.

    When Cancel is pressed, the state is saved after the current step and ComfyUI's own exception is raised.
    """
    device = management.get_torch_device()
    run.check()
    identity = run.identity(device)
    files = run_files(identity)
    with alone(files, run.stage):
        if resume == START_OVER:
            files.checkpoint.unlink(missing_ok=True)
            files.result.unlink(missing_ok=True)
        reporter = Reporter(node_id, run.stage, preview_seconds)
        held = HeldPriors(device, run.needed_bytes(), run.memory_budget, models_of(run.priors.values()))
        with gradients():
            try:
                return _finished(files, run) or _train(run, train, device, identity, files, reporter, held)
            except Interrupted as stop:
                logging.info("[Dream4D] %s", stop)
                traceback.clear_frames(stop.__traceback__)  # they hold the models
                interrupt_if_asked()
                raise management.InterruptProcessingException() from stop
            except PriorSilent as error:
                traceback.clear_frames(error.__traceback__)
                raise RunError(run.silenced(error, device)) from error
            except (WriteError, AssetError) as error:
                traceback.clear_frames(error.__traceback__)
                kept = "what was saved before is kept" if files.checkpoint.exists() else "nothing was saved before"
                raise RunError(f"{error}; {kept}: queue again to go on once that is mended") from error
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, MemoryError) or management.is_oom(error):
                    traceback.clear_frames(error.__traceback__)
                    raise RunError(out_of_memory(run, reporter, files.checkpoint.exists())) from error
                raise
            finally:
                reporter.close()
                held.release()


def out_of_memory(run: Work, reporter: Reporter, kept: bool) -> str:
    """What to say when the memory was too small: where it happened, what is kept, what can be done."""
    where = f"after step {reporter.value} of {run.recipe.steps}" if reporter.value else "before the first step was done"
    state = "The checkpoint is kept" if kept else "There is no checkpoint yet"
    return (
        f"out of memory in the stage {run.stage!r}, {where}. {state}: make room (close other programs, press ComfyUI's "
        f"'Unload Models') and queue again to go on; or lower {run.ways_to_less()}, which starts another run. Fewer "
        "steps or another seed don't help."
    )


def _finished(files: RunFiles, run: Work) -> SceneValue | None:
    """Return the result of a finished run, if it can be read.

    It comes from where this run's scene does: another one can have the same numbers, as that of a mesh has which was
    saved again with another normal map.
    """
    if not files.result.exists():
        return None
    try:
        scene, provenance = load_scene(files.result)
    except AssetError as error:
        kept = set_aside(files.result)
        name = f"it is kept as {kept.name}, and " if kept else ""
        logging.warning("[Dream4D] a finished run can't be used (%s): %sthe run is done again", error, name)
        return None
    files.result.touch()
    return SceneValue(scene, replace(run.provenance(), versions=provenance.versions))


def _train(
    run: Work,
    train: Trainer,
    device: torch.device,
    identity: dict,
    files: RunFiles,
    reporter: Reporter,
    held: HeldPriors,
) -> SceneValue:
    if device.type == "cpu":
        check_memory(run.needed_bytes(), f"training by the recipe {run.recipe.name!r}", "close other programs")
    held.make_room(sum(prior.n_bytes() for prior in run.priors.values()))
    beginning = f"{run.stage}: loading the models" if run.priors else run.stage
    reporter.say("\n".join(filter(None, (beginning, run.statement()))))

    def on_prior(prior: Prior) -> None:
        interrupt_if_asked()
        held.hold(prior)

    def on_step(report: StepReport, scene: Scene) -> None:
        reporter.step(report, scene, device)
        held.give_back(report.step)
        if held.bring_back():
            for one in guidance.values():
                one.denoiser.forget()

    guidance = run.guidance(device, on_prior)
    held.settle()
    control = RunControl(
        files.checkpoint,
        identity,
        on_step,
        management.processing_interrupted,
        memory_budget=run.memory_budget,
        memory_beside=held.beside,
        on_plan=reporter.plan,
    )
    try:
        with steps_end_first():
            scene, _ = train(guidance, device=device, control=control)
    except (CheckpointError, ResumeMismatch) as error:
        if isinstance(error, CheckpointError) and error.path is None:  # nothing is wrong with the file
            raise RunError(f"{error}; or choose {START_OVER!r}") from error
        kept = set_aside(files.checkpoint)
        if kept is None:
            raise RunError(f"{error}; it can't be renamed either: remove it, or choose {START_OVER!r}") from error
        other = f"{files.checkpoint} belongs to other settings"
        why = other if isinstance(error, ResumeMismatch) else str(error)
        reporter.note(f"{why}: it is kept as {kept.name}, and the run starts over")
        with steps_end_first():
            scene, _ = train(guidance, device=device, control=control)
    save_scene(files.result, scene, run.provenance())
    files.checkpoint.unlink(missing_ok=True)
    _keep_latest(files.result.parent)
    return SceneValue(*load_scene(files.result))


def _keep_latest(folder: Path) -> None:
    """Of the results of finished runs, keep the latest ones."""
    results = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in results[KEPT_RESULTS:]:
        path.unlink(missing_ok=True)
