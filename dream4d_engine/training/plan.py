"""Keeping a run within a budget of GPU memory: the fastest way to run the models that fits, found by trying."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from ..division import Division
from ..guidance.distillation import Guidance
from ..guidance.execution import Execution
from ..machine import has_own_allocator, limit_memory
from ..priors.handle import PriorKind
from ..randomness import Draw
from ..supervision import Supervision, gather, heaviest, rendered, views_of
from .control import RunControl
from .prefetch import Prefetch
from .stages import GuidanceOf, Stage

logger = logging.getLogger(__name__)

_UNITS = {"": 1, "b": 1, "mib": 2**20, "gib": 2**30, "mb": 10**6, "gb": 10**9}
SHARE = 0.94
"""Of the budget that a trial may take: what is solid in a scene, and so the samples on its rays, changes in a run."""


@dataclass(frozen=True)
class Plan:
    """How a step is taken."""

    execution: Execution = Execution()
    rays_at_once: int | None = None  # see RenderOptions
    prefetch: bool = True  # the next step's samples are looked for before this one is done, see prefetch.py

    @property
    def prefetches(self) -> bool:
        """Not where activations are checkpointed: the samples are found again in the backward pass."""
        return self.prefetch and self.rays_at_once is None

    def describe(self) -> str:
        """The plan in words."""
        if self.rays_at_once is None:
            return self.execution.describe() + ("" if self.prefetch else ", samples found when they are needed")
        models = "" if self.execution == Execution() else f"{self.execution.describe()}, "
        return f"{models}{self.rays_at_once} rays at once, activations checkpointed"


LADDER = (
    Plan(),
    Plan(Execution(images_at_once=8)),
    Plan(Execution(images_at_once=8, images_kept=16)),
    Plan(Execution(images_at_once=8, images_kept=16), prefetch=False),
    Plan(Execution(images_at_once=8, images_kept=16), 2**17),
    Plan(Execution(images_at_once=8, images_kept=8), 2**17),
    Plan(Execution(images_at_once=4, images_kept=4), 2**17),
    Plan(Execution(images_at_once=2, images_kept=0), 2**17),
    Plan(Execution(images_at_once=2, images_kept=0, groups_at_once=1), 2**17),
    Plan(Execution(images_at_once=1, images_kept=0, groups_at_once=1), 2**16),
    Plan(Execution(images_at_once=1, images_kept=0, groups_at_once=1, offload=True), 2**15),
)
"""From the fastest to the one that needs least memory."""


def parse_bytes(text: str) -> int:
    """Read an amount of memory: "10GiB", "800 MiB", "8e9"."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    number, unit = found.groups() if found else ("", "")
    try:
        n_bytes = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"{text!r} is no amount of memory: write it like 10GiB") from None
    if n_bytes < 2**20:
        raise ValueError(f"a memory budget must be at least 1 MiB, got {text!r}: write it like 10GiB")
    return n_bytes


def plan_of(guidance: GuidanceOf, execution: Execution) -> dict[PriorKind, Guidance]:
    """The guidance run in another way; what was captured for the old one is forgotten."""

    for one in guidance.values():
        one.denoiser.forget()
    return {kind: replace(one, denoiser=one.denoiser.run_as(execution)) for kind, one in guidance.items()}


def divided(guidance: GuidanceOf, division: Division) -> dict[PriorKind, Guidance]:
    """The guidance whose work is divided among processes."""
    return {kind: replace(one, division=division) for kind, one in guidance.items()}


def choose_plan(
    guidance: GuidanceOf, fits: Callable[[GuidanceOf, Plan], bool], ladder: Sequence[Plan] = LADDER
) -> tuple[dict[PriorKind, Guidance], Plan] | None:
    """Return the first plan of the ladder (fastest first) that fits, or None."""
    for plan in ladder:
        planned = plan_of(guidance, plan.execution)
        if fits(planned, plan):
            return planned, plan
    return None


def plan_steps(stage: Stage, guidance: GuidanceOf, control: RunControl) -> tuple[tuple[Supervision, ...], bool]:
    """Return what a stage's steps minimise, run in the fastest way that keeps the process within the control's memory
    budget, and whether the next step's samples may be looked for ahead.

    Every phase is tried on the scene as it is, forward and backward; the budget stays in force afterwards. Stops where
    the control asks for it before a way is tried. Raises a ValueError where even the smallest way does not fit.
    """
    budget, scene, device = control.memory_budget, stage.scene, stage.scene.device
    division = control.processes.division
    if budget is None:
        return stage.supervisions(divided(guidance, division), None), True
    alone = division.rehearsal()  # each process finds its own way; where one has no room the others don't wait for it
    if device.type != "cuda":
        raise ValueError(f"a memory budget is for GPUs, and the work is done on {device.type}: leave it away")
    # the optimiser's two moments are not there yet
    coming = 2 * sum(p.numel() * p.element_size() for _, parameters, _ in stage.groups for p in parameters)
    limit = budget - control.memory_beside
    beside = f"the graph's models take {control.memory_beside / 2**30:.1f} GiB beside what PyTorch counts"
    if limit <= 0:
        raise ValueError(f"the memory budget of {budget / 2**30:.1f} GiB is too small, {beside}: raise it, or set none")
    allowed, exact = SHARE * limit - coming, has_own_allocator()
    if exact:
        # let memory that was freed in small pieces be taken again as large ones; where the system can't, it stays
        newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        with suppress(RuntimeError, ValueError):
            (newer or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")

    def fits(planned: GuidanceOf, plan: Plan) -> bool:
        control.stop_if_asked(stage.name)
        _give_back(device)
        before = torch.cuda.memory_reserved(device)
        limit_memory(device, allowed, of=limit)
        try:
            trial = stage.supervisions(divided(planned, alone), plan.rays_at_once)
            reason = _why_not(trial, plan.prefetches, stage, alone, None if exact else allowed)
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or "captur" in str(error)):  # of a graph
                raise
            reason = "out of memory"
        finally:
            scene.zero_grad(set_to_none=True)
        held, most = before / 2**30, torch.cuda.max_memory_reserved(device) / 2**30
        verdict = reason or "fits"
        logger.info("%s: %s (%.2f GiB before, at most %.2f GiB)", plan.describe(), verdict, held, most)
        return not reason

    found = choose_plan(guidance, fits)
    limit_memory(device, limit)
    _give_back(device)
    if found is None:
        why = f" ({beside})" * (limit < budget)
        raise ValueError(
            f"a step of this recipe doesn't fit into {budget / 2**30:.1f} GiB{why} in any way: raise the memory "
            "budget, or lower the phases' images"
        )
    planned, plan = found
    if control.on_plan is not None:
        control.on_plan(f"memory budget {budget / 2**30:.1f} GiB: {plan.describe()}")
    return stage.supervisions(divided(planned, division), plan.rays_at_once), plan.prefetches


def _give_back(device: torch.device) -> None:
    """Return to the GPU what nobody holds."""
    gc.collect()  # the graphs of a plan that failed hang together in circles
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def _why_not(
    supervisions: Sequence[Supervision], prefetches: bool, stage: Stage, division: Division, most: float | None
) -> str:
    """Why steps of the phases don't run smoothly; "" where they do.

    `most`: bytes that an allocator may hold which has no limit but for what is asked of it.
    """
    scene, draw = stage.scene, Draw(0)
    for start in stage.starts:
        stage.begin(start)
        prefetch = Prefetch(scene, half=True, enabled=prefetches)
        for attempt in range(2):  # the first one may have to ask for memory, the second is as all others will be
            if most is not None:  # nor does what trying convolutions out has taken count
                _give_back(scene.device)
            retries = torch.cuda.memory_stats(scene.device)["num_alloc_retries"]
            views = prefetch.take() or views_of(supervisions, scene, start, draw, division)
            views = {key: heaviest(view) for key, view in views.items()}
            with torch.autocast("cuda", dtype=torch.float16):
                seen = rendered(supervisions, scene, views)
                terms = gather([one.loss(scene, output, view, start, draw) for one, view, output in seen])
                loss = sum(terms.losses.values(), start=torch.zeros((), device=scene.device))
            if prefetch.enabled:
                prefetch.begin(views_of(supervisions, scene, start, draw, division))
            if loss.requires_grad:  # of several processes one may have none of the images that are looked at
                loss.backward()
            scene.zero_grad(set_to_none=True)
            torch.cuda.synchronize(scene.device)
            if attempt and torch.cuda.memory_stats(scene.device)["num_alloc_retries"] > retries:
                return "memory in pieces"  # the allocator had to give memory back and ask again
            if attempt and most is not None and torch.cuda.max_memory_reserved(scene.device) > most:
                return "more than is asked for is held"
    return ""
