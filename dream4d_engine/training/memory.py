"""Keeping a run within a budget of GPU memory: the fastest way to run the models that fits, found by trying."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ..guidance.distillation import Guidance
from ..machine import limit_memory
from ..priors.denoisers import with_execution
from ..priors.execution import LADDER, PLAIN, Execution, GraphRecorder
from ..priors.loading import PriorKind
from ..scene import Scene
from .loop import Objective, ParameterGroup

_UNITS = {"": 1, "b": 1, "mib": 2**20, "gib": 2**30, "mb": 10**6, "gb": 10**9}
SHARE = 0.94
"""Of the budget that a trial may take: what is solid in a scene, and so the samples on its rays, changes in a run."""

GuidanceOf = Mapping[PriorKind, Guidance]


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
    """The guidance run in another way; what was recorded for the old one is left behind."""
    recorders = [g.denoiser.recorder for g in guidance.values() if hasattr(g.denoiser, "recorder")]
    graphs = next((r for r in recorders if isinstance(r, GraphRecorder)), None)
    fresh = PLAIN if graphs is None else graphs.fresh()

    def changed(one: Guidance) -> Guidance:
        if not hasattr(one.denoiser, "execution"):
            return one
        return replace(one, denoiser=with_execution(one.denoiser, execution, fresh))

    return {kind: changed(one) for kind, one in guidance.items()}


def choose_plan(
    guidance: GuidanceOf, fits: Callable[[GuidanceOf], bool], ladder: Sequence[Execution] = LADDER
) -> tuple[dict[PriorKind, Guidance], Execution] | None:
    """Return the first plan of the ladder (fastest first) that fits, or None."""
    for execution in ladder:
        planned = plan_of(guidance, execution)
        if fits(planned):
            return planned, execution
    return None


def fit_into(
    budget: int,
    guidance: GuidanceOf,
    objective_of: Callable[[GuidanceOf], Objective],
    scene: Scene,
    groups: Sequence[ParameterGroup],
    starts: Sequence[float],
    on_plan: Callable[[str], None] | None = None,
) -> dict[PriorKind, Guidance]:
    """Return the guidance run in the fastest way that keeps the whole process within `budget` bytes of GPU memory.

    Every phase (`starts`: their progress) is tried on the scene as it is, forward and backward; the budget stays in
    force afterwards. Raises a ValueError where even the smallest way does not fit.
    """
    device = scene.device
    if device.type != "cuda":
        raise ValueError(f"a memory budget is for GPUs, and the work is done on {device.type}: leave it away")
    # the optimiser's two moments are not there yet
    coming = 2 * sum(p.numel() * p.element_size() for _, parameters, _ in groups for p in parameters)
    allowed = SHARE * budget - coming

    def fits(planned: GuidanceOf) -> bool:
        torch.cuda.empty_cache()
        limit_memory(device, allowed)
        try:
            return _runs_smoothly(objective_of(planned), scene, starts)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "captur" in str(error):  # of a graph
                return False
            raise
        finally:
            scene.zero_grad(set_to_none=True)

    found = choose_plan(guidance, fits)
    limit_memory(device, budget)
    torch.cuda.empty_cache()
    if found is None:
        raise ValueError(
            f"a step of this recipe doesn't fit into {budget / 2**30:.1f} GiB in any way: raise the memory budget, or "
            "lower the phases' pictures"
        )
    planned, execution = found
    if on_plan is not None:
        on_plan(f"memory budget {budget / 2**30:.1f} GiB: {execution.describe()}")
    return planned


def _runs_smoothly(objective: Objective, scene: Scene, starts: Sequence[float]) -> bool:
    """Whether steps of every phase run without the allocator having to give memory back and ask again."""
    generator = torch.Generator().manual_seed(0)
    for start in starts:
        for attempt in range(2):
            retries = torch.cuda.memory_stats(scene.device)["num_alloc_retries"]
            with torch.autocast("cuda", dtype=torch.float16):
                loss, _ = objective(scene, start, generator)
            loss.backward()
            scene.zero_grad(set_to_none=True)
            torch.cuda.synchronize(scene.device)
            if attempt and torch.cuda.memory_stats(scene.device)["num_alloc_retries"] > retries:
                return False
    return True
