"""The training loop, in the open: one for both stages.

A step is: look at the scene, let the supervisions judge it, step the optimiser, report, save. What is random in a step
follows from its number (see randomness.py), so a run is a function of its settings. On a GPU nothing here waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median

import torch
from torch import Tensor

from ..randomness import Draw
from ..scene import Scene
from ..schedules import milestones
from ..supervision import gather, rendered, views_of
from .checkpoint import (
    Checkpoint,
    check_state,
    first_difference,
    load_checkpoint,
    not_finite,
    pack_state,
    save_checkpoint,
    unpack_state,
)
from .config import OptimizerConfig
from .control import FitSummary, Interrupted, PriorSilent, ResumeMismatch, RunControl, StepReport, TrainingDiverged
from .history import History, all_answered, found
from .plan import plan_steps
from .prefetch import Prefetch
from .processes import Processes
from .stages import GuidanceOf, ParameterGroup, Stage

__all__ = ["train", "make_optimizer", "RunControl", "StepReport", "FitSummary"]
__all__ += ["Interrupted", "PriorSilent", "ResumeMismatch", "TrainingDiverged"]

ALL_CELLS_UNTIL = 256
"""Updates of the occupancy look at every cell before this step, then at a random quarter."""


def train(stage: Stage, guidance: GuidanceOf, seed: int, control: RunControl) -> FitSummary:
    """Train a stage's scene in place until its recipe's steps are done.

    Raises Interrupted when asked to stop (after saving), TrainingDiverged after `loop.max_bad_steps` steps in a row
    without a finite gradient, PriorSilent after a few without a prior's answer (what was saved stays), ResumeMismatch,
    CheckpointError or WriteError of the checkpoint, and a ValueError where the memory budget is too small for any way.
    """
    scene, recipe, loop = stage.scene, stage.recipe, stage.recipe.loop
    steps, on_gpu = recipe.steps, scene.device.type == "cuda"
    if steps < 1:
        raise ValueError(f"a run needs at least one step, got {steps}")
    control = _sharing(control, recipe.least_images)
    processes, division = control.processes, control.processes.division
    supervisions, prefetches = plan_steps(stage, guidance, control)
    optimizer = make_optimizer(stage.groups, recipe.optimizer)
    scaler = torch.amp.GradScaler(scene.device.type, enabled=loop.precision == "half" and on_gpu)
    prefetch = Prefetch(scene, scaler.is_enabled(), prefetches and on_gpu)
    start = _resume(control, steps, scene, optimizer, scaler)
    history = History(stage.name, loop.max_bad_steps, lag=1 if on_gpu else 0)
    durations: deque[float] = deque(maxlen=50)
    began = saved_at = control.clock()
    if start == 0:  # else the checkpoint holds it
        _update_occupancy(scene, seed, 0)

    for step in range(start, steps):
        step_began, progress, draw = control.clock(), step / steps, Draw(seed, step, processes.place)
        rate = milestones(progress, recipe.optimizer.milestones, recipe.optimizer.factor)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        stage.begin(progress)
        optimizer.zero_grad(set_to_none=True)

        # forward: views that several supervisions look at are rendered once
        views = prefetch.take() or views_of(supervisions, scene, progress, draw, division)
        with torch.autocast(scene.device.type, dtype=torch.float16, enabled=scaler.is_enabled()):
            seen = rendered(supervisions, scene, views)
            terms = gather([one.loss(scene, output, view, progress, draw) for one, view, output in seen])
            loss = sum(terms.losses.values(), start=torch.zeros((), device=scene.device))

        # prefetch, while the GPU works; first of all what is known of empty space is brought up to date for it
        done = step + 1
        occupancy_due = done < steps and done % loop.occupancy_every == 0
        if occupancy_due and prefetches:
            _update_occupancy(scene, seed, done)
        if prefetch.enabled and done < steps:
            ahead = Draw(seed, done, processes.place)
            prefetch.begin(views_of(supervisions, scene, done / steps, ahead, division))

        # backward: NaN, where the loss is not finite or lacks a prior's part
        answered = all_answered(terms, loss.device)
        if loss.requires_grad:
            scaler.scale(_nan_unless(loss.detach().isfinite() & answered, loss)).backward()

        # step, where everything is finite
        changed = _step(optimizer, scaler, answered, processes)
        if occupancy_due and not prefetches:  # the backward pass may have had to find the samples again
            _update_occupancy(scene, seed, done)

        # report, a step late on a GPU
        history.add(step, found(loss, changed, terms))
        now = control.clock()
        durations.append(now - step_began)
        if control.on_step is not None and processes.is_main:
            control.on_step(history.report(done, steps, fmean(durations)), scene)

        # save, and stop if asked; nothing new is worth saving while a prior is silent
        stop = processes.any(done < steps and control.should_stop is not None and control.should_stop())
        due = done % loop.checkpoint_steps == 0 or now - saved_at > loop.checkpoint_seconds
        if stop or (due and not history.silent):
            _save(control, stage, done, optimizer, scaler)
            saved_at = control.clock()
        if stop:
            raise Interrupted(stage.name, done, control.checkpoint)

    history.finish(one_must_be_good=start == 0 and not scaler.is_enabled())  # a short run may end before its scale fits
    if start < steps:
        _save(control, stage, steps, optimizer, scaler)
    pace, took = median(durations) if durations else 0.0, control.clock() - began
    stage.finish()
    return FitSummary(steps, took, pace, history.bad_steps, start, history.loss, history.nonfinite)


def _sharing(control: RunControl, n_images: int) -> RunControl:
    """The control with processes that know what they share in steps of so many images."""
    processes = control.processes
    if processes.world_size == 1:
        return control
    processes = processes.sharing(control.share, n_images)
    if control.on_plan is not None:
        control.on_plan(processes.describe(control.share, n_images))
    return replace(control, processes=processes)


def _update_occupancy(scene: Scene, seed: int, step: int) -> None:
    # without a rank: every process has the same grid
    scene.update_occupancy(Draw(seed, step).for_("occupancy"), all_cells=step < ALL_CELLS_UNTIL)


def make_optimizer(groups: Sequence[ParameterGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build Adam or AdamW with one group per kind of parameter; empty groups are left out."""
    filled = [group for group in groups if group[1]]
    if not filled:
        raise ValueError("nothing to train: every parameter group is empty")
    listed = [{"name": n, "params": params, "lr": rate, "initial_lr": rate} for n, params, rate in filled]
    # fused: one kernel for all, and one that leaves everything alone where a gradient was not finite
    fused, betas, eps = filled[0][1][0].is_cuda or None, config.betas, config.eps
    if config.name == "adam":
        return torch.optim.Adam(listed, betas=betas, eps=eps, fused=fused)
    return torch.optim.AdamW(listed, betas=betas, eps=eps, weight_decay=config.weight_decay, fused=fused)


def _nan_unless(good: Tensor, loss: Tensor) -> Tensor:
    """The loss where `good` [] (bool) holds, else NaN: then no finite gradient is left behind."""
    return loss * torch.where(good, 1.0, float("nan"))  # decided on the device: nobody waits for the answer


def _step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, answered: Tensor, processes: Processes
) -> Tensor:
    """Change the parameters where their gradient is finite, on all processes alike; return whether it is."""
    gradients = processes.combine([p for group in optimizer.param_groups for p in group["params"]])
    if not gradients:
        return torch.zeros((), device=answered.device)
    # norms, not sums: Adam squares what it is given
    finite = torch.isfinite(torch.stack([torch.linalg.vector_norm(g) for g in gradients])).all()
    if scaler.is_enabled():  # the scaler looks for infinities itself and skips the step
        one = torch.ones((), device=answered.device)
        scale = scaler.scale(one)
        scaler.step(optimizer)
        scaler.update()
        scaler.update(torch.where(answered, scaler.scale(one), scale))  # no prior's silence is about the scale
    elif answered.device.type == "cuda":  # what the scaler tells a fused optimiser, so that the CPU needn't know
        # the stubs lack what GradScaler sets
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]  # likewise
    elif finite:
        optimizer.step()
    return finite.float()


def _resume(control: RunControl, steps: int, scene: Scene, optimizer, scaler) -> int:
    """Load the unfinished state if there is one; return the number of steps it has behind it."""
    if control.checkpoint is None or not control.checkpoint.exists():
        return 0
    saved = load_checkpoint(control.checkpoint)
    difference = first_difference(control.identity, saved.identity)
    if difference:
        raise ResumeMismatch(f"{difference}: resume with the same settings, or start over in another folder")
    check_state(saved, control.checkpoint, steps, scene, optimizer)
    unpack_state(saved.tensors, scene, optimizer, scaler)
    return saved.step


def _save(control: RunControl, stage: Stage, done: int, optimizer, scaler) -> None:
    if control.checkpoint is None or not control.processes.is_main:
        return
    state = pack_state(stage.scene, optimizer, scaler)
    broken = not_finite(state)
    if broken is not None:  # no run could go on from it
        raise TrainingDiverged(
            f"{stage.name}: {broken} is not finite after step {done}: lower the learning rates or the guidance scale"
        )
    save_checkpoint(control.checkpoint, Checkpoint(done, control.identity, state))
