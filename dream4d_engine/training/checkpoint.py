"""The state of an unfinished run: one safetensors file, replaced as a whole.

It holds the scene, the optimiser's moments and the step, from whose number all that is random in it follows, so that a
run that was killed anywhere goes on as if nothing had happened. The header names the settings the state belongs to.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..documents import as_object, describe, disguise, first_line, parse_document, printable, shortened
from ..machine import write_atomically

_FORMAT = "dream4d-checkpoint"
_VERSION = 2  # 1 held a generator
_ADAM = ("step", "exp_avg", "exp_avg_sq")
DAMAGED = "damaged"
KEPT_DAMAGED = 3
"""Files that could not be gone on from, in one folder."""


class CheckpointError(ValueError):
    """A checkpoint that can't be used, and why; `path`: the file, where it will never be of use."""

    def __init__(self, text: str, path: Path | None = None) -> None:
        super().__init__(text)
        self.path = path


@dataclass(frozen=True)
class Checkpoint:
    """A run's state."""

    step: int  # steps done
    identity: dict  # the settings (a JSON tree) that the run was started with
    tensors: dict[str, Tensor]  # see `pack_state`
    parts: int | None = None  # how many tensors there were when it was written, None where the file doesn't say


def pack_state(
    scene: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Tensor]:
    """Gather everything that the next step depends on, as named tensors on the CPU."""
    tensors = {f"scene.{name}": value for name, value in scene.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    if scaler is not None and scaler.is_enabled():
        state = scaler.state_dict()
        tensors["scaler"] = torch.tensor([state["scale"], float(state["_growth_tracker"])])
    # clones: on a CPU the tensors would go on changing
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def unpack_state(
    tensors: dict[str, Tensor],
    scene: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Put a packed state back where it came from; `check_state` says whether it fits."""
    scene.load_state_dict({n.removeprefix("scene."): v for n, v in tensors.items() if n.startswith("scene.")})
    packed = optimizer.state_dict()
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            states.setdefault(int(index), {})[key] = value
    # rates and the like follow from the settings, so the groups stay as they are
    optimizer.load_state_dict({"state": states, "param_groups": packed["param_groups"]})
    if scaler is not None and scaler.is_enabled() and "scaler" in tensors:
        scale, tracker = tensors["scaler"].tolist()
        scaler.load_state_dict({**scaler.state_dict(), "scale": scale, "_growth_tracker": int(tracker)})


def check_state(
    saved: Checkpoint,
    path: Path,
    steps: int,
    scene: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Raise a CheckpointError that names the first part from which a run of `steps` steps can't go on."""
    complaint = _complaint(saved, steps, scene, optimizer)
    if complaint is not None:
        raise CheckpointError(f"{path} can't be gone on from: {complaint}", path)


def _complaint(saved: Checkpoint, steps: int, scene: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    tensors = saved.tensors
    if not 0 <= saved.step <= steps:
        return f"it is at step {saved.step} of a run of {steps}"
    wanted = {f"scene.{name}": value for name, value in scene.state_dict().items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = {name.split(".")[1] for name in tensors if name.startswith("optimizer.") and name.count(".") == 2}
    for index, parameter in enumerate(parameters):
        if str(index) in trained:  # one without a gradient so far has no moments
            likes = (torch.zeros(()), parameter, parameter)
            wanted |= {f"optimizer.{index}.{key}": like for key, like in zip(_ADAM, likes, strict=True)}
    if "scaler" in tensors:
        wanted["scaler"] = torch.zeros(2)
    for name, like in wanted.items():
        if name not in tensors:
            return f"{name} is missing"
        if tensors[name].shape != like.shape:
            return f"{name} has the shape {list(tensors[name].shape)}, the run needs {list(like.shape)}"
        if tensors[name].dtype != like.dtype:
            return f"{name} has the type {tensors[name].dtype}, the run needs {like.dtype}"
    if unknown := sorted(set(tensors) - set(wanted)):
        return f"the run knows no {shortened(printable(unknown[0]), 80)}"
    strange = _strange_number(saved, scene)
    # fewer parts than were written: some of them are gone
    if strange is None and (saved.parts not in (None, len(tensors)) or (saved.step and not trained)):
        return "the optimiser's moments are missing, or some of them"
    return strange


def _strange_number(saved: Checkpoint, scene: nn.Module) -> str | None:
    """Say which part holds numbers that no run writes; all are there, with their shapes and types."""
    tensors = saved.tensors
    broken = not_finite(tensors)
    if broken is not None:
        return f"{broken} holds numbers that are not finite"
    for name, value in tensors.items():
        if name.endswith(".exp_avg_sq") and bool((value < 0).any()):
            return f"{name} holds squares below 0"
        if name.startswith("optimizer.") and name.endswith(".step") and not 0 <= float(value) <= saved.step:
            return f"{name} counts {float(value):g} steps, the run has {saved.step} behind it"
        if value.dtype == torch.bool and bool((value.view(torch.uint8) > 1).any()):
            return f"{name} holds what is neither true nor false"
    deformation = getattr(scene, "deformation", None)
    if deformation is not None:
        active, n_levels = int(tensors["scene.deformation.active_levels"]), deformation.config.grid.n_levels
        if not 0 <= active <= n_levels:
            return f"scene.deformation.active_levels is {active}, there are {n_levels}"
    if "scaler" in tensors and not (tensors["scaler"][0] > 0 and tensors["scaler"][1] >= 0):
        return f"scaler holds {tensors['scaler'].tolist()}"
    return None


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor with a number that is not finite, or None."""
    return next((n for n, v in tensors.items() if v.is_floating_point() and not bool(v.isfinite().all())), None)


def set_aside(path: Path) -> Path | None:
    """Rename a file that can't be used, so that it is kept but in nobody's way; return its new name, None if it's gone.

    Of such files the latest KEPT_DAMAGED stay in the folder.
    """
    free = (path.with_name(f"{path.name}.{n}{DAMAGED}") for n in ("", *(f"{i}." for i in range(2, 1000))))
    kept = next(place for place in free if not place.exists())
    try:
        path.rename(kept)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        kept.touch()
        for place in sorted(path.parent.glob(f"*.{DAMAGED}"), key=lambda p: p.stat().st_mtime_ns)[:-KEPT_DAMAGED]:
            place.unlink()
    return kept


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that at every moment either the old or the new one is whole. Raises WriteError."""
    from safetensors.torch import save

    header = {
        "format": _FORMAT,
        "format_version": str(_VERSION),
        "step": str(checkpoint.step),
        "parts": str(len(checkpoint.tensors)),
        "identity": json.dumps(checkpoint.identity),
    }
    write_atomically(path, save(checkpoint.tensors, metadata=header))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, or raise a CheckpointError that says what is wrong with the file.

    Whether a run can go on from it is for `check_state` to say.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise CheckpointError(f"{path} is no checkpoint of a dream4d run", path)
            version, step, parts = (_number(path, header, name) for name in ("format_version", "step", "parts"))
            if version is None or step is None:
                raise CheckpointError(f"{path} is damaged: its header does not say its version or its step", path)
            where = f"{path}: identity"
            identity = as_object(
                parse_document(header.get("identity", ""), where, CheckpointError), where, CheckpointError
            )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except CheckpointError as error:
        raise CheckpointError(str(error), path) from error
    except Exception as error:  # whatever the library raises
        raise CheckpointError(f"{path} {_disguise(path) or f'is damaged: {first_line(error)}'}", path) from error
    if version < _VERSION:
        raise CheckpointError(
            f"{path} was written by an older version of dream4d, whose steps drew other random numbers: "
            "no run can go on from it; start over",
            path,
        )
    if version > _VERSION:  # nothing is wrong with the file, so it stays where it is
        raise CheckpointError(f"{path} was written by a newer version of dream4d: update to resume it")
    return Checkpoint(step, identity, tensors, parts)


def _disguise(path: Path) -> str | None:
    if path.is_dir():
        return "is a folder, no checkpoint"
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError:
        return None
    return disguise(head) if head else "is empty: what was in it is lost"  # nobody has downloaded it


def _number(path: Path, header: dict[str, str], name: str) -> int | None:
    text = header.get(name)
    if text is None:
        return None
    try:
        number = int(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {name} in its header is {describe(text)}", path) from error
    if abs(number) >= 2**63:
        raise CheckpointError(f"{path} is damaged: {name} in its header is {describe(text)}", path)
    return number


def first_difference(ours: object, theirs: object, path: str = "") -> str | None:
    """Return a sentence about the first place where two JSON trees differ, or None.

    What the run knows nothing of was off then, and may be off now: it was begun by a version of before.
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            mine = ours.get(key) if key in theirs else ours[key] or None
            found = first_difference(mine, theirs.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return next((d for i, (a, b) in pairs if (d := first_difference(a, b, f"{path}[{i}]"))), None)
    if ours == theirs:
        return None
    return f"{shortened(printable(path), 80)} is {describe(ours)}, the run there has {describe(theirs)}"
