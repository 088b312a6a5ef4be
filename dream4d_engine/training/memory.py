"""Keeping a run within a budget of GPU memory: the fastest way to run the models that fits, found by trying."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..guidance.distillation import Guidance
from ..machine import has_own_allocator, limit_memory
from ..priors.denoisers import with_execution
from ..priors.execution import Execution
from ..priors.loading import PriorKind
from ..scene import Scene
from .lookahead import LookAhead
from .loop import Objective, ParameterGroup

logger = logging.getLogger(__name__)

_UNITS = {"": 1, "b": 1, "mib": 2**20, "gib": 2**30, "mb": 10**6, "gb": 10**9}
SHARE = 0.94
"""Of the budget that a trial may take: what is solid in a scene, and so the samples on its rays, changes in a run."""

GuidanceOf = Mapping[PriorKind, Guidance]


@dataclass(frozen=True)
class Plan:
    """How a step is taken: how the models are run, how many rays at once are rendered (see RenderOptions), and whether
    the next step's samples are looked for before this one is done (see lookahead.py)."""

    execution: Execution = Execution()
    rays_at_once: int | None = None
    looks_ahead: bool = True

    def describe(self) -> str:
        """The plan in words."""
        if self.rays_at_once is None:
            return self.execution.describe() + ("" if self.looks_ahead else ", samples found when they are needed")
        models = "" if self.execution == Execution() else f"{self.execution.describe()}, "
        return f"{models}{self.rays_at_once} rays at once, rendered twice"


LADDER = (
    Plan(),
    Plan(Execution(pictures_at_once=8)),
    Plan(Execution(pictures_at_once=8, pictures_kept=16)),
    Plan(Execution(pictures_at_once=8, pictures_kept=16), looks_ahead=False),
    Plan(Execution(pictures_at_once=8, pictures_kept=16), 2**17),
    Plan(Execution(pictures_at_once=8, pictures_kept=8), 2**17),
    Plan(Execution(pictures_at_once=4, pictures_kept=4), 2**17),
    Plan(Execution(pictures_at_once=2, pictures_kept=0), 2**17),
    Plan(Execution(pictures_at_once=2, pictures_kept=0, groups_at_once=1), 2**17),
    Plan(Execution(pictures_at_once=1, pictures_kept=0, groups_at_once=1), 2**16),
    Plan(Execution(pictures_at_once=1, pictures_kept=0, groups_at_once=1, offload=True), 2**15),
)
"""From the fastest to the one that needs least memory."""


def parse_bytes(text: str) -> int:
    """Read an amount of memory: "10GiB", "800 MiB", "8e9"."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    try:
        n_bytes = int(float(found[1]) * _UNITS[found[2]])
    except (TypeError, KeyError, ValueError, OverflowError):
        raise ValueError(f"{text!r} is no amount of memory: write it like 10GiB") from None
    if n_bytes < 2**20:
        raise ValueError(f"a memory budget must be at least 1 MiB, got {text!r}: write it like 10GiB")
    return n_bytes


def plan_of(guidance: GuidanceOf, execution: Execution) -> dict[PriorKind, Guidance]:
    """The guidance run in another way; what was recorded for the old one is forgotten."""

    def changed(one: Guidance) -> Guidance:
        if not hasattr(one.denoiser, "execution"):
            return one
        one.denoiser.recorder.forget()
        return replace(one, denoiser=with_execution(one.denoiser, execution, one.denoiser.recorder))

    return {kind: changed(one) for kind, one in guidance.items()}


def choose_plan(
    guidance: GuidanceOf, fits: Callable[[GuidanceOf, Plan], bool], ladder: Sequence[Plan] = LADDER
) -> tuple[dict[PriorKind, Guidance], Plan] | None:
    """Return the first plan of the ladder (fastest first) that fits, or None."""
    for plan in ladder:
        planned = plan_of(guidance, plan.execution)
        if fits(planned, plan):
            return planned, plan
    return None


def fit_into(
    budget: int,
    guidance: GuidanceOf,
    objective_of: Callable[[GuidanceOf, int | None], Objective],
    scene: Scene,
    groups: Sequence[ParameterGroup],
    starts: Sequence[float],
    on_plan: Callable[[str], None] | None = None,
    give_up: Callable[[], None] | None = None,
) -> Objective:
    """Return the objective run in the fastest way that keeps the whole process within `budget` bytes of GPU memory.

    Every phase (`starts`: their progress) is tried on the scene as it is, forward and backward; the budget stays in
    force afterwards. `objective_of`: (guidance, rays at once) -> objective. `give_up` is called before each way is
    tried, and may raise. Raises a ValueError where even the smallest way does not fit.
    """
    device = scene.device
    if device.type != "cuda":
        raise ValueError(f"a memory budget is for GPUs, and the work is done on {device.type}: leave it away")
    # the optimiser's two moments are not there yet
    coming = 2 * sum(p.numel() * p.element_size() for _, parameters, _ in groups for p in parameters)
    allowed = SHARE * budget - coming
    _use_whole_segments()

    def objective_for(planned: GuidanceOf, plan: Plan) -> Objective:
        objective = objective_of(planned, plan.rays_at_once)
        return replace(objective, looks_ahead=objective.looks_ahead and plan.looks_ahead)

    def fits(planned: GuidanceOf, plan: Plan) -> bool:
        if give_up is not None:
            give_up()
        _give_back(device)
        before = torch.cuda.memory_reserved(device)
        limit_memory(device, allowed)
        try:
            reason = _why_not(objective_for(planned, plan), scene, starts)
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
    limit_memory(device, budget)
    _give_back(device)
    if found is None:
        raise ValueError(
            f"a step of this recipe doesn't fit into {budget / 2**30:.1f} GiB in any way: raise the memory budget, or "
            "lower the phases' pictures"
        )
    planned, plan = found
    if on_plan is not None:
        on_plan(f"memory budget {budget / 2**30:.1f} GiB: {plan.describe()}")
    return objective_for(planned, plan)


def _give_back(device: torch.device) -> None:
    """Return to the GPU what nobody holds; the graphs of a plan that failed hang together in circles."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def _use_whole_segments() -> None:
    """Let memory that was freed in small pieces be taken again as large ones; where the system can't, it stays."""
    if not has_own_allocator():
        return
    newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    with suppress(RuntimeError, ValueError):
        (newer or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def _why_not(objective: Objective, scene: Scene, starts: Sequence[float]) -> str:
    """Why steps of the phases don't run smoothly: the allocator has to give memory back and ask again. "": they do."""
    generator = torch.Generator().manual_seed(0)
    for start in starts:
        ahead = LookAhead(scene, generator, half=True, enabled=objective.looks_ahead)
        begin = partial(objective.prepare, scene, start, generator)
        for attempt in range(2):
            retries = torch.cuda.memory_stats(scene.device)["num_alloc_retries"]
            views = ahead.views(begin)
            with torch.autocast("cuda", dtype=torch.float16):
                loss, _ = objective.loss(scene, views, start, generator)
            ahead.begin(begin)
            loss.backward()
            scene.zero_grad(set_to_none=True)
            torch.cuda.synchronize(scene.device)
            if attempt and torch.cuda.memory_stats(scene.device)["num_alloc_retries"] > retries:
                return "memory in pieces"
    return ""
