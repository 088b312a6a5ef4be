"""The state of an unfinished run: one safetensors file, replaced as a whole.

It holds the scene, the optimiser's moments, the random generator and the step, so that a run that was killed
anywhere goes on as if nothing had happened. The header names the settings the state belongs to.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..machine import write_atomically

_FORMAT = "dream4d-checkpoint"
_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that can't be used, and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after `step` steps. `identity`: the settings (a JSON tree) that the run was started with."""

    step: int
    identity: dict
    tensors: dict[str, Tensor]


def pack_state(
    scene: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Tensor]:
    """Gather everything that the next step depends on, as named tensors on the CPU."""
    tensors = {f"scene.{name}": value for name, value in scene.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    tensors["generator"] = generator.get_state()
    if scaler is not None and scaler.is_enabled():
        state = scaler.state_dict()
        tensors["scaler"] = torch.tensor([state["scale"], float(state["_growth_tracker"])])
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def unpack_state(
    tensors: dict[str, Tensor],
    scene: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Put a packed state back where it came from."""
    scene.load_state_dict({n.removeprefix("scene."): v for n, v in tensors.items() if n.startswith("scene.")})
    packed = optimizer.state_dict()
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": states, "param_groups": packed["param_groups"]})
    generator.set_state(tensors["generator"])
    if scaler is not None and scaler.is_enabled() and "scaler" in tensors:
        scale, tracker = tensors["scaler"].tolist()
        scaler.load_state_dict({**scaler.state_dict(), "scale": scale, "_growth_tracker": int(tracker)})


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that at every moment either the old or the new one is whole."""
    from safetensors.torch import save

    header = {
        "format": _FORMAT,
        "format_version": str(_VERSION),
        "step": str(checkpoint.step),
        "identity": json.dumps(checkpoint.identity),
    }
    write_atomically(path, save(checkpoint.tensors, metadata=header))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, or raise a CheckpointError that says what is wrong with the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise CheckpointError(f"{path} is no checkpoint of a dream4d run")
            if int(header["format_version"]) > _VERSION:
                raise CheckpointError(f"{path} was written by a newer version of dream4d: update to resume it")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Checkpoint(int(header["step"]), json.loads(header["identity"]), tensors)
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} can't be read as a checkpoint ({error}): start over without --resume") from error


def first_difference(ours: object, theirs: object, path: str = "") -> str | None:
    """Return a sentence about the first place where two JSON trees differ, or None."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            found = first_difference(ours.get(key), theirs.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return next((d for i, (a, b) in pairs if (d := first_difference(a, b, f"{path}[{i}]"))), None)
    return None if ours == theirs else f"{path} is {ours!r}, the unfinished run has {theirs!r}"
