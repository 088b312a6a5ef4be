"""Measure seconds a step and peak memory of recipes, in each of their phases; under torchrun, of several processes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch

from ..documents import document_bytes
from ..guidance.distillation import Guidance, distill, guided_prediction, resize_images
from ..machine import (
    WriteError,
    check_folder,
    failing_allocations,
    lacks_main_memory,
    lacks_memory,
    limit_memory,
    peak_memory,
    pick_device,
    versions,
    write_atomically,
)
from ..priors.architectures import BY_FLAG, Architecture, VaeKind, architecture_for, random_guidance
from ..priors.files import PriorFiles
from ..priors.handle import PriorKind
from ..profiling import Profile, Profiler
from ..randomness import Draw
from ..rendering import RenderOptions, count_samples, prepare_view
from ..scene import Scene, build_scene
from ..training.config import (
    IMAGE_RECIPES,
    MOTION_RECIPES,
    STATIC_RECIPES,
    MotionRecipe,
    Phase,
    StaticRecipe,
    find_recipe,
    is_toy,
)
from ..training.guidance import active_terms, load_guidance, runtime_for
from ..training.loop import RunControl, StepReport
from ..training.motion import train_motion
from ..training.plan import parse_bytes
from ..training.processes import SINGLE, Processes, Share, join_processes, leave_processes
from ..training.reference import Reference
from ..training.static import train_static
from .command import Command
from .errors import UsageError
from .interrupts import stop_on_interrupt
from .models import prior_handles
from .options import FILE, MODEL, Machine, MachineOptions, PriorOptions, Priors, Recipe, check_numbers
from .progress import Progress, Quiet, make_progress
from .terminal import say

_STAGES: dict[str, dict[str, StaticRecipe] | dict[str, MotionRecipe]] = {
    "static": STATIC_RECIPES,
    "image": IMAGE_RECIPES,
    "motion": MOTION_RECIPES,
}
_PROMPT = "a red cube is jumping"
_TINY = {"tiny": "tiny_vae", "tiny-decoder": "tiny_decoder"}
"""Variants with a tiny autoencoder, and the option that gives it for models of one's own."""
_KINDS = ("fast", "plain", *_TINY)
PROFILED = 3
"""Steps that are looked into."""
REPEATS = 5
"""Times that the priors alone are asked, after a first one that isn't counted."""


@dataclass(frozen=True)
class Bench:
    recipes: tuple[str, ...] = ("static:toy", "motion:toy")
    """Recipes as STAGE:NAME, for example static:text-to-3d, image:image-to-3d or motion:zeroscope-144x80; or all."""
    models: tuple[str, ...] = ("toy",)
    """toy: the small models unless folders are given; full: the published models' architectures with random weights,
    built on the device; or names of today's models (sdxl, wan-1.3b, ltx-2b), built likewise, each with the recipe for
    any model of its kind."""
    variants: tuple[str, ...] = ("fast",)
    """fast; plain: PyTorch without our changes; tiny: fast with the tiny autoencoder; tiny-decoder: with its decoder
    alone. @10GiB behind one keeps to a memory budget."""
    steps: int = 20
    """Steps that are measured."""
    warmup: int = 3
    """Steps before them that are not."""
    profile: bool = False
    """Look into some more steps: which work takes longest, and how often the CPU waits for the GPU."""
    share: Share = "cameras"
    """What the processes of torchrun share, as in the commands that train."""
    multiview_prior: Annotated[str | None, MODEL] = None
    """Multi-view model."""
    image_prior: Annotated[str | None, MODEL] = None
    """Text-to-image model."""
    novel_view_prior: Annotated[str | None, MODEL] = None
    """Novel-view model."""
    pixel_prior: Annotated[str | None, MODEL] = None
    """Text-to-pixels model."""
    video_prior: Annotated[str | None, MODEL] = None
    """Text-to-video model."""
    out: Annotated[Path | None, FILE] = None
    """Write the results as JSON into this file too."""
    priors: Priors = PriorOptions()
    machine: Machine = MachineOptions()

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class Variant:
    """A way to run a recipe."""

    name: str  # as it was asked for
    kind: str  # fast, plain, tiny or tiny-decoder
    budget: int | None  # bytes of GPU memory, None for all


@dataclass(frozen=True)
class Measured:
    """A phase of a recipe in one way."""

    recipe: str  # STAGE:NAME
    variant: str
    models: dict[str, str]  # by prior: where it is, or what was built
    images: str  # of a step: "4 of 64x64"
    steps: int  # that were measured
    seconds_per_step: float | None = None  # median after the warm-up; None where it failed, see `error`
    guidance_seconds: float | None = None
    """Of that, asking the priors about images that are there already, forward and backward."""
    preparing_seconds: float | None = None  # of the first step: networks are compiled, tuned and captured in it
    peak_memory_bytes: int | None = None
    """The GPU's in the measured steps (see machine.peak_memory), or the whole process's so far on a CPU."""
    reserved_bytes: int | None = None  # what the process took of the GPU in all
    samples: int | None = None
    """Of a step's images in the scene as the last step left it, opaque enough to count: rendering costs as much."""
    plan: str | None = None  # how the memory budget is kept to, and what several processes share
    gradient_cosine: float | None = None
    """Of a step's gradient on the images through the tiny autoencoder with that through the full one, same images,
    timestep and noise; only for trained models: random weights say nothing about their likeness."""
    parts: dict[str, float] | None = None
    """Of a model that was named: seconds that its parts take alone (see _Parts), and what is left of the step."""
    profile: Profile | None = None  # where the time of steps after the measured ones goes, if it was asked for
    error: str | None = None


@dataclass(frozen=True)
class _Subject:
    """What is measured, in every way: a recipe, with a model that was named or with those of its own."""

    name: str  # as it was asked for
    recipe: Recipe
    architecture: Architecture | None = None
    handles: Mapping[str, Mapping[PriorKind, PriorFiles]] = field(default_factory=dict)
    """Models that are loaded, by the kind of variant; empty for those that are built."""


@dataclass(frozen=True)
class _Job:
    """What is measured: a recipe in one way, with its models."""

    recipe: Recipe
    variant: Variant
    guidance: dict[PriorKind, Guidance]
    options: Bench
    device: torch.device
    named: bool = False  # the model was
    processes: Processes = SINGLE

    def fitted(self, phase: Phase) -> Recipe:
        """The recipe with one phase all the time, and as many views or frames as its models take."""
        recipe, options = self.recipe, self.options
        counts = [g.denoiser.n_frames for g in self.guidance.values() if g.denoiser.n_frames]
        changes: dict[str, Any] = {recipe.group_field: counts[0]} if counts else {}
        if recipe.reference is not None:  # the last and largest size of the image all the time
            last = replace(recipe.reference.phases[-1], start=0.0)
            changes["reference"] = replace(recipe.reference, phases=(last,))
        if recipe.stage == "motion":
            changes["least_motion"] = 0.0  # so few steps move little: that is no reason to take it back, and to say so
        steps = options.warmup + options.steps + PROFILED * options.profile
        return replace(recipe, steps=steps, phases=(replace(phase, start=0.0),), **changes)


def run(options: Bench) -> int:
    """Measure the recipes and print a table; the exit code is 1 where a recipe failed."""
    if not options.recipes or not options.variants:
        raise UsageError("nothing to measure: name at least one of --recipes and of --variants")
    if options.out is not None:
        if options.out.is_dir():
            raise UsageError(f"{options.out} is a folder: --out names the file for the results")
        check_folder(options.out.parent, 2**16)
    device = pick_device(options.machine.device)
    subjects, variants = _subjects(options), [_variant(name, device) for name in options.variants]
    processes, device = join_processes(device)
    try:
        # a GPU's driver counts as its own what is no main memory
        with failing_allocations() if device.type == "cpu" else nullcontext():
            return _run_together(options, subjects, variants, processes, device)
    finally:
        leave_processes()


def _run_together(
    options: Bench, subjects: list[_Subject], variants: list[Variant], processes: Processes, device: torch.device
) -> int:
    """Measure all, where the processes work; the first of them says what it took."""
    measured: list[Measured] = []
    unsaved: WriteError | None = None
    if options.models == ("toy",):  # one that is missing is missed before another is measured for an hour
        kinds = dict.fromkeys(variant.kind for variant in variants)
        subjects = [replace(s, handles={kind: _handles(s.recipe, kind, options) for kind in kinds}) for s in subjects]
    try:
        with stop_on_interrupt() as should_stop, make_progress() if processes.is_main else Quiet() as progress:
            for subject in subjects:
                for variant in variants:
                    found = _measure(subject, variant, options, processes, device, progress, should_stop)
                    measured += found
                    try:
                        if processes.is_main:
                            _save(options.out, measured, device)
                        unsaved = None
                    except WriteError as error:  # what was measured is still shown at the end
                        unsaved = error
                    if any(m.error for m in found):
                        progress.say(f"{subject.name} {variant.name}: {next(m.error for m in found if m.error)}")
    finally:  # where it is stopped, or a later model can't be had, too: measuring may have taken an hour
        if measured and processes.is_main:
            say(*table(measured, device))
    if unsaved is not None:
        raise unsaved
    return 1 if any(m.error for m in measured) else 0


def _save(path: Path | None, measured: list[Measured], device: torch.device) -> None:
    if path is not None:
        found = {"device": _device_name(device), "versions": versions(), "recipes": [asdict(m) for m in measured]}
        write_atomically(path, document_bytes(found))


def _subjects(options: Bench) -> list[_Subject]:
    """What is to be measured, in order."""
    groups, asked = ("toy", "full"), dict.fromkeys(options.models)
    if asked and not set(asked) & set(groups):
        if options.recipes != Bench.recipes:
            raise UsageError("models that are named have recipes of their own: leave --recipes away")
        return [_named(name) for name in asked]
    if len(asked) != 1:
        raise UsageError(f"--models takes toy, full, or names of models ({', '.join(BY_FLAG)}): one of these three")
    names = list(options.recipes)
    if options.recipes == ("all",):
        pairs = [(stage, recipe) for stage, recipes in _STAGES.items() for recipe in recipes.values()]
        # toy recipes have no models of full size
        names = [f"{stage}:{r.name}" for stage, r in pairs if options.models == ("toy",) or not is_toy(r)]
    return [_Subject(name, _find(name)) for name in names]


def _named(name: str) -> _Subject:
    """A model of today with the recipe for any model of its kind."""
    if name not in BY_FLAG:
        raise UsageError(f"unknown model {name!r}: write toy, full, or some of {', '.join(BY_FLAG)}")
    architecture = BY_FLAG[name]
    recipe = _find("motion:model-video" if architecture.kind == "video" else "static:model-image")
    return _Subject(name, recipe, architecture)


def _find(name: str) -> Recipe:
    stage, _, recipe = name.partition(":")
    if stage not in _STAGES or not recipe:
        raise UsageError(f"unknown recipe {name!r}: write STAGE:NAME with a stage of {', '.join(_STAGES)}, or all")
    return find_recipe(recipe, _STAGES[stage])


def _variant(name: str, device: torch.device) -> Variant:
    kind, limited, budget = name.partition("@")
    if kind not in _KINDS or (limited and not budget):
        raise UsageError(f"unknown variant {name!r}: write one of {', '.join(_KINDS)}, with @10GiB for a memory budget")
    if budget and device.type != "cuda":
        raise UsageError(f"{name!r} has a memory budget, which is for GPUs; the device is {device.type}")
    return Variant(name, kind, parse_bytes(budget) if budget else None)


# ---- measuring ---------------------------------------------------------------------------------------------------


def _measure(
    subject: _Subject,
    variant: Variant,
    options: Bench,
    processes: Processes,
    device: torch.device,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> list[Measured]:
    """Measure every phase of a recipe in one way; a failure is noted and ends the recipe.

    One of several processes ends all: the others would wait for it.
    """
    if device.type == "cuda":
        limit_memory(device, None)  # the variant before may have kept to a budget
    name, recipe = subject.name, subject.recipe
    try:
        guidance, models = _guidance(subject, variant, options, device)
    except (RuntimeError, MemoryError) as error:
        if processes.world_size > 1 or not lacks_memory(error):
            raise
        return [Measured(name, variant.name, {}, "", options.steps, error=_shown(error, "the weights don't fit: "))]
    job = _Job(recipe, variant, guidance, options, device, subject.architecture is not None, processes)
    found: list[Measured] = []
    for number, phase in enumerate(recipe.phases):
        fitted = job.fitted(phase)
        n_images = phase.n_groups * getattr(fitted, fitted.group_field)
        blank = Measured(name, variant.name, models, f"{n_images} of {phase.width}x{phase.height}", options.steps)
        label = f"{name} {variant.name}" + (f" {number + 1}" if len(recipe.phases) > 1 else "")
        progress.begin(label, fitted.steps)

        def show(report: StepReport, label: str = label) -> None:
            progress.update(label, report.step, report.loss, report.remaining)

        try:
            found.append(_measure_phase(blank, job, fitted, show, should_stop))
        except (RuntimeError, ValueError, MemoryError) as error:  # of memory, of CUDA, of a network
            if should_stop() or processes.world_size > 1:
                raise
            found.append(replace(blank, error=_shown(error, f"{type(error).__name__}: ")))
            break
    del guidance, job  # the next models need the room
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _shown(error: BaseException, what: str) -> str:
    """A failure on one line; of main memory with the way out."""
    if lacks_main_memory(error):
        return "it needs more main memory than is free: measure it on a GPU, or on a machine that has more"
    return " ".join(f"{what}{error}".split())[:500]


def _measure_phase(
    blank: Measured, job: _Job, recipe: Recipe, show: Callable[[StepReport], None], should_stop: Callable[[], bool]
) -> Measured:
    """Train for some steps of one phase; `blank` with what was found."""
    options, device, guidance = job.options, job.device, job.guidance
    clock, last = _Clock(device), options.warmup + options.steps
    plans: list[str] = []
    profiler = Profiler(device) if options.profile else None
    profiles: list[Profile] = []

    def on_step(report: StepReport, _scene: Scene) -> None:
        clock.tick()
        if report.step == options.warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # what compiling and tuning took is not a step's
        if report.step == last and profiler is not None:
            profiler.start()  # only now: what looks on takes time itself
        if report.step == recipe.steps and profiler is not None:
            profiles.append(profiler.stop(PROFILED))  # before what ends a run, which is no step's
        show(report)

    control = RunControl(
        on_step=on_step,
        should_stop=should_stop,
        processes=job.processes,
        share=options.share,
        memory_budget=job.variant.budget,
        on_plan=plans.append,
    )
    clock.tick()
    if recipe.stage == "static":
        scene, _ = train_static(recipe, guidance, seed=0, device=device, control=control, reference=_reference(recipe))
    else:
        config = STATIC_RECIPES["toy" if is_toy(recipe) else "text-to-3d"].scene
        still = build_scene(config, torch.Generator().manual_seed(0)).to(device)
        scene, _ = train_motion(still, recipe, guidance, seed=0, device=device, control=control)
    if not job.processes.is_main:  # the first one has looked at the clock
        return blank
    alone = job.processes.world_size == 1
    seconds, peak = clock.between(), peak_memory(device)  # before the priors are asked alone
    compares = job.variant.kind in _TINY and options.models == ("toy",)  # with random weights that says nothing
    a_step = median(seconds[options.warmup : last])
    return replace(
        blank,
        seconds_per_step=a_step,
        # asked for all images at once they may not keep to a budget
        guidance_seconds=_guidance_seconds(job, recipe) if alone and not job.variant.budget else None,
        preparing_seconds=seconds[0],
        peak_memory_bytes=peak,
        reserved_bytes=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        samples=_samples(scene, recipe),
        plan="; ".join(plans) or None,
        gradient_cosine=_gradient_cosine(job, recipe) if compares else None,
        parts=_parts(job, recipe, a_step) if alone and job.named and not job.variant.budget else None,
        profile=profiles[0] if profiles else None,
    )


def _samples(scene: Scene, recipe: Recipe) -> int:
    """How many samples the images of a step have that are looked at with gradient."""
    cameras = recipe.sample_cameras(recipe.phases[0], torch.Generator().manual_seed(0))
    return count_samples(scene, prepare_view(scene, cameras, RenderOptions()))


class _Clock:
    """Moments of a device's own time: on a GPU the run isn't held up to take them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moments: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def tick(self) -> None:
        """Take a moment."""
        if self._device.type != "cuda":
            self._moments.append(time.monotonic())
            return
        event = torch.cuda.Event(enable_timing=True)  # the GPU notes it when it gets there
        event.record()
        self._events.append(event)

    def between(self) -> list[float]:
        """Seconds between the moments."""
        if self._device.type != "cuda":
            return [after - before for before, after in pairwise(self._moments)]
        torch.cuda.synchronize(self._device)
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(self._events)]


class _Distilled:
    """Distilling random images of a phase's size, which are there already, forward and backward."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        phase, generator = recipe.phases[0], torch.Generator().manual_seed(0)
        self.cameras = recipe.sample_cameras(phase, generator).to(device)
        shape = self.cameras.shape
        # coarse and fine structure, as images have it; [B, F, 3, H, W]
        coarse = torch.rand(*shape, 3, 4, 4, generator=generator).flatten(0, 1)
        coarse = torch.nn.functional.interpolate(coarse, (phase.height, phase.width), mode="bilinear")
        fine = torch.rand(*shape, 3, phase.height, phase.width, generator=generator)
        self.images = (0.9 * coarse.view_as(fine) + 0.1 * fine).to(device)

    def gradient(self, guidance: Mapping[PriorKind, Guidance]) -> torch.Tensor:
        """The gradient on the images; timesteps and noise are the same every time."""
        images = self.images.clone().requires_grad_()
        losses = [distill(g, images, self.cameras, 0.0, Draw(1)).loss for g in guidance.values()]
        sum(losses[1:], losses[0]).backward()
        assert images.grad is not None  # the losses are of them
        return images.grad


def _guidance_seconds(job: _Job, recipe: Recipe) -> float:
    """Median seconds of asking the priors alone."""
    distilled = _Distilled(recipe, job.device)
    return _median_seconds(lambda: distilled.gradient(job.guidance), job.device)


def _parts(job: _Job, recipe: Recipe, a_step: float) -> dict[str, float]:
    """Median seconds of a prior's parts alone: encode (forward and backward), denoise (all conditions), decode where
    the recipe compares colours, and the rest: the scene's rendering and what trains it."""
    (guidance,) = job.guidance.values()
    distilled, denoiser = _Distilled(recipe, job.device), guidance.denoiser
    images, cameras = distilled.images, distilled.cameras
    if denoiser.n_frames is None:
        images, cameras = images.flatten(0, 1)[:, None], cameras.reshape(-1, 1)
    images = resize_images(images, denoiser.image_size)
    with torch.no_grad():
        z = denoiser.encode(images)
    sigma = torch.ones(len(z), device=z.device)
    predict = guided_prediction(guidance, cameras)

    def encode() -> None:
        given = images.clone().requires_grad_()
        torch.autograd.grad(denoiser.encode(given).sum(), given)

    works: dict[str, Callable[[], Any]] = {"encode": encode, "denoise": lambda: predict(z, sigma)}
    if guidance.config.color_weight:
        works["decode"] = torch.no_grad()(lambda: denoiser.decode(z))
    found = {name: _median_seconds(work, job.device) for name, work in works.items()}
    return {**found, "rest": max(0.0, a_step - sum(found.values()))}


def _median_seconds(work: Callable[[], Any], device: torch.device) -> float:
    clock = _Clock(device)
    clock.tick()
    for _ in range(REPEATS + 1):
        work()
        clock.tick()
    return median(clock.between()[1:])  # the first time memory is taken


def _gradient_cosine(job: _Job, recipe: Recipe) -> float:
    """How alike the gradients through the tiny and through the full autoencoder are: 1 the same direction."""
    full, _ = _guidance(_Subject("", recipe), Variant("plain", "plain", None), job.options, job.device)
    distilled = _Distilled(recipe, job.device)
    ours, theirs = (distilled.gradient(g).flatten().double() for g in (job.guidance, full))
    return torch.nn.functional.cosine_similarity(ours, theirs, 0).item()


# ---- what is measured --------------------------------------------------------------------------------------------


def _guidance(
    subject: _Subject, variant: Variant, options: Bench, device: torch.device
) -> tuple[dict[PriorKind, Guidance], dict[str, str]]:
    """Load or build a recipe's models for a variant; also say which they are."""
    recipe = subject.recipe
    runtime = runtime_for(recipe, device, accelerate=variant.kind != "plain")
    if options.models == ("toy",):
        handles = subject.handles.get(variant.kind) or _handles(recipe, variant.kind, options)
        loaded = load_guidance(recipe, handles, _PROMPT, runtime, _reference(recipe))
        return loaded, {kind: str(handle.path) for kind, handle in handles.items()}
    guidance: dict[PriorKind, Guidance] = {}
    models: dict[str, str] = {}
    vae: VaeKind = variant.kind if variant.kind in _TINY else "full"  # type: ignore[assignment]
    for term in active_terms(recipe):
        architecture = subject.architecture or architecture_for(term.prior, getattr(recipe, "n_frames", None))
        guidance[term.prior] = random_guidance(architecture, term.distillation, runtime, vae)
        models[term.prior] = f"{architecture.name}, random weights"
    return guidance, models


def _handles(recipe: Recipe, kind: str, options: Bench) -> dict[PriorKind, PriorFiles]:
    """The models of one's own, or of the package, for a kind of variant; errors as `prior_handles`."""
    asked = _TINY.get(kind)
    if asked is not None and getattr(options.priors, asked) is None:
        flag = f"--{asked.replace('_', '-')}"
        raise UsageError(f"the variant {kind} needs {flag} FOLDER and models of your own, or --models full")
    whole, decoder = (getattr(options.priors, n) if n == asked else None for n in ("tiny_vae", "tiny_decoder"))
    given = replace(options, priors=replace(options.priors, tiny_vae=whole, tiny_decoder=decoder))
    return prior_handles(recipe, given, toys=True)


def _reference(recipe: Recipe) -> Reference | None:
    """A grey disc, for recipes that look at an image."""
    if recipe.reference is None:
        return None
    size = max(phase.size for phase in recipe.reference.phases)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    disc = ((axis[:, None] ** 2 + axis**2) < 0.64).float()[..., None]
    return Reference(torch.full((size, size, 3), 0.6), disc, "a grey disc")


# ---- the table ---------------------------------------------------------------------------------------------------


def table(measured: list[Measured], device: torch.device) -> list[str]:
    """The measurements as lines of text."""
    wide = max([12, *(len(m.variant) + 2 for m in measured)])
    head = f"{'recipe':<26}{'variant':<{wide}}{'images':<16}{'seconds a step':>15}{'guidance':>10}{'samples':>12}"
    head += f"{'peak memory':>14}"
    lines = [f"{head}   ({_device_name(device)})"]
    for m in measured:
        peak = "unknown" if m.peak_memory_bytes is None else f"{m.peak_memory_bytes / 2**30:.2f} GiB"
        start = f"{m.recipe:<26}{m.variant:<{wide}}{m.images:<16}"
        if m.seconds_per_step is None:
            lines.append(f"{start}{'failed: ' + (m.error or '')}")
            continue
        guidance = "" if m.guidance_seconds is None else f"{m.guidance_seconds:.3f}"
        notes = [m.plan] if m.plan else []
        notes += [", ".join(f"{name} {seconds:.3f}" for name, seconds in (m.parts or {}).items())] if m.parts else []
        notes += [] if m.gradient_cosine is None else [f"gradient's cosine with the full one's {m.gradient_cosine:.3f}"]
        samples = "" if m.samples is None else f"{m.samples:,}"
        numbers = f"{m.seconds_per_step:>15.3f}{guidance:>10}{samples:>12}{peak:>14}"
        lines.append(f"{start}{numbers}   {'; '.join(notes)}".rstrip())
    if device.type != "cuda":
        lines.append("(median over the steps; peak memory is that of the whole process so far)")
    for m in measured:
        if m.profile is not None:
            lines += ["", f"a step of {m.recipe}, {m.variant}, {m.images}:", *(f"  {x}" for x in m.profile.lines())]
    return lines


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


COMMAND = Command(Bench, run)
