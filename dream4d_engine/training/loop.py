"""The training loop, in the open: one for both stages.

A step is: refresh what is known of empty space now and then, ask the objective for the loss, step the optimiser,
report, save. Everything random comes from one generator, so a run is a function of its settings.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from ..scene import Scene
from ..schedules import milestones
from .checkpoint import Checkpoint, first_difference, load_checkpoint, pack_state, save_checkpoint, unpack_state
from .config import LoopConfig, OptimizerConfig

Terms = dict[str, Tensor]
Objective = Callable[[Scene, float, torch.Generator], tuple[Tensor, Terms]]
"""(scene, progress in [0, 1), generator) -> (loss to minimise, its parts for people to read)."""


class Interrupted(RuntimeError):
    """A run that was asked to stop, after `step` steps; its state is in `checkpoint` if it has one."""

    def __init__(self, stage: str, step: int, checkpoint: Path | None) -> None:
        where = f"saved in {checkpoint}" if checkpoint else "not saved"
        super().__init__(f"{stage} stopped after step {step}, {where}")
        self.stage, self.step, self.checkpoint = stage, step, checkpoint


class TrainingDiverged(RuntimeError):
    """Too many steps in a row gave no finite gradient."""


class ResumeMismatch(ValueError):
    """An unfinished run was started with other settings than the present ones."""


@dataclass(frozen=True)
class StepReport:
    """What is known after a step. Seconds are wall-clock; `remaining` is an estimate from the latest steps."""

    stage: str
    step: int
    steps: int
    loss: float
    terms: dict[str, float]
    seconds_per_step: float
    remaining: float
    bad_steps: int


@dataclass(frozen=True)
class RunControl:
    """How a run talks to the outside.

    `checkpoint`: file for the unfinished state (None: nothing is saved); if it exists, the run goes on from it
    when its identity equals `identity`, else a ResumeMismatch is raised. `on_step` is called after every step with
    the report and the scene in training (not to be changed); `should_stop` is asked after every step.
    """

    checkpoint: Path | None = None
    identity: dict = field(default_factory=dict)
    on_step: Callable[[StepReport, Scene], None] | None = None
    should_stop: Callable[[], bool] | None = None
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class FitSummary:
    """`seconds_per_step` is the median of the steps taken now (not those before a resume)."""

    steps: int
    seconds: float
    seconds_per_step: float
    bad_steps: int
    resumed_from: int
    final_loss: float


ParameterGroup = tuple[str, list[nn.Parameter], float]
"""(name, parameters, learning rate)."""


def make_optimizer(groups: list[ParameterGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build Adam or AdamW with one group per kind of parameter; empty groups are left out."""
    listed = [{"name": n, "params": params, "lr": rate, "initial_lr": rate} for n, params, rate in groups if params]
    if not listed:
        raise ValueError("nothing to train: every parameter group is empty")
    if config.name == "adam":
        return torch.optim.Adam(listed, betas=config.betas, eps=config.eps)
    return torch.optim.AdamW(listed, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


def _set_rates(optimizer: torch.optim.Optimizer, config: OptimizerConfig, progress: float) -> None:
    factor = milestones(progress, config.milestones, config.factor)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _gradients_finite(optimizer: torch.optim.Optimizer) -> bool:
    sums = [p.grad.sum() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(torch.isfinite(torch.stack(sums)).all()) if sums else True


def _take_step(
    scene: Scene,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: float,
    generator: torch.Generator,
) -> tuple[float, dict[str, float], bool]:
    """Return (loss, terms, whether the parameters were changed)."""
    device_type = scene.device.type
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device_type, dtype=torch.float16, enabled=scaler.is_enabled()):
        loss, terms = objective(scene, progress, generator)
    if loss.requires_grad:
        scaler.scale(loss).backward()
    good = bool(torch.isfinite(loss)) and loss.requires_grad
    if scaler.is_enabled():  # the scaler looks for infinities itself and skips the step
        if good:
            scaler.step(optimizer)
        scaler.update()
    else:
        good = good and _gradients_finite(optimizer)
        if good:
            optimizer.step()
    return float(loss.detach()), {name: float(value) for name, value in terms.items()}, good


def _resume(control: RunControl, scene: Scene, optimizer, generator, scaler) -> int:
    """Load the unfinished state if there is one; return the number of steps it has behind it."""
    if control.checkpoint is None or not control.checkpoint.exists():
        return 0
    saved = load_checkpoint(control.checkpoint)
    difference = first_difference(control.identity, saved.identity)
    if difference:
        raise ResumeMismatch(f"{difference}: resume with the same settings, or start over in another folder")
    unpack_state(saved.tensors, scene, optimizer, generator, scaler)
    return saved.step


def fit(
    scene: Scene,
    objective: Objective,
    groups: list[ParameterGroup],
    *,
    stage: str,
    steps: int,
    optimizer_config: OptimizerConfig,
    loop: LoopConfig,
    generator: torch.Generator,
    control: RunControl,
) -> FitSummary:
    """Minimise the objective over the parameters of `groups`, in place.

    Raises Interrupted when asked to stop (after saving), TrainingDiverged after `loop.max_bad_steps` steps in a
    row without a finite gradient, ResumeMismatch when the checkpoint belongs to other settings.
    """
    if steps < 1:
        raise ValueError(f"a run needs at least one step, got {steps}")
    device = scene.device
    optimizer = make_optimizer(groups, optimizer_config)
    scaler = torch.amp.GradScaler(device.type, enabled=loop.precision == "half" and device.type == "cuda")
    start = _resume(control, scene, optimizer, generator, scaler)
    clock, durations, bad_steps, bad_run = control.clock, deque(maxlen=50), 0, 0
    began = saved_at = clock()
    loss = float("nan")

    def save(done: int) -> None:
        if control.checkpoint is not None:
            state = pack_state(scene, optimizer, generator, scaler)
            save_checkpoint(control.checkpoint, Checkpoint(done, control.identity, state))

    for step in range(start, steps):
        step_began = clock()
        progress = step / steps
        _set_rates(optimizer, optimizer_config, progress)
        if step % loop.occupancy_every == 0:
            scene.update_occupancy(step, generator)
        loss, terms, good = _take_step(scene, objective, optimizer, scaler, progress, generator)
        bad_steps, bad_run = bad_steps + (not good), 0 if good else bad_run + 1
        if bad_run > loop.max_bad_steps:
            raise TrainingDiverged(
                f"{stage}: {bad_run} steps in a row gave no finite gradient (step {step}, loss {loss}): "
                "lower the learning rates or the guidance scale"
            )
        done, now = step + 1, clock()
        durations.append(now - step_began)
        if control.on_step is not None:
            pace = sum(durations) / len(durations)
            control.on_step(StepReport(stage, done, steps, loss, terms, pace, pace * (steps - done), bad_steps), scene)
        stop = done < steps and control.should_stop is not None and control.should_stop()
        if stop or done % loop.checkpoint_steps == 0 or now - saved_at > loop.checkpoint_seconds:
            save(done)
            saved_at = clock()
        if stop:
            raise Interrupted(stage, done, control.checkpoint)
    if start < steps:
        save(steps)
    pace = median(durations) if durations else 0.0
    return FitSummary(steps, clock() - began, pace, bad_steps, start, loss)
