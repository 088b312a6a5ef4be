"""Files of tensors that others made: .safetensors, and torch's own .pt, .ckpt, .bin without trusting them.

A torch file is a pickle, which can run any program when it is read. Here it is only ever read by torch's unpickler for
weights, which builds tensors and plain containers and refuses the rest. The checkpoints of PyTorch Lightning name the
classes of its callbacks beside the weights; for those names alone there are powerless stand-ins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..documents import first_line, shortened
from .errors import PriorError

Shapes = Mapping[str, tuple[int, ...]]

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

_LIGHTNING = ("pytorch_lightning.", "lightning.", "lightning_fabric.")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The named tensors of a file; each is read when it is asked for.

    Args:
        shapes: of every tensor. extra: what else the file says (text of a header, a step count).
    """

    path: Path
    shapes: Shapes
    read: Callable[[str], Tensor]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, on the CPU."""
        return self.read(name)

    def under(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors whose names begin so, without that beginning."""
        return {name.removeprefix(prefix): shape for name, shape in self.shapes.items() if name.startswith(prefix)}


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a file of tensors. PriorError says what is wrong with one that can't be read, or mustn't be."""
    path = Path(path)
    if not path.is_file():
        raise PriorError(f"there is no file {path}" if not path.exists() else f"{path} is a folder, not a file")
    if path.suffix not in SUFFIXES:
        raise PriorError(f"{path}: a file of weights ends in one of {', '.join(SUFFIXES)}")
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)


def _open_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(str(path), "pt")  # stays open as long as it is used
    except (SafetensorError, OSError) as error:
        raise PriorError(f"{path} is not a readable .safetensors file ({shortened(first_line(error), 200)})") from error
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return Checkpoint(path, shapes, file.get_tensor, file.metadata() or {})


def _open_torch(path: Path) -> Checkpoint:
    content = _load_torch(path)
    inner = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(inner, dict):
        raise PriorError(f"{path} holds no table of weights but {type(content).__name__}")
    tensors = {name: value for name, value in inner.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise PriorError(f"{path} holds no weights")
    extra = {key: value for key, value in content.items() if isinstance(value, int | float | str)}
    return Checkpoint(path, {name: tuple(t.shape) for name, t in tensors.items()}, tensors.__getitem__, extra)


def _load_torch(path: Path) -> Any:
    """Read a torch file by the unpickler for weights; tensors are mapped from the disk where the format allows it."""
    zipped = _is_zip(path)
    try:
        with _stand_ins(path) if zipped else nullcontext():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # whatever torch raises for files that are damaged
        if type(error).__name__ == "UnpicklingError":
            raise PriorError(_refusal(path, str(error))) from error
        raise PriorError(f"{path} can't be read ({_first_line(error)}): is the download complete?") from error


def _refusal(path: Path, reason: str) -> str:
    """What to say of a file that the unpickler for weights turned down."""
    named = _foreign_names(path)
    what = f"it wants to run {', '.join(named)}" if named else _first_line(reason)
    return (
        f"{path} was not opened: it is a pickle that holds more than weights ({what}), and reading it could run any "
        "program on this computer. Get the model as .safetensors, or have it converted by someone you trust"
    )


def _foreign_names(path: Path) -> list[str]:
    """The names in a file that are none of torch's own, as far as torch can tell."""
    list_names = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    if list_names is None or not _is_zip(path):
        return []
    try:
        return sorted(list_names(path))
    except Exception:  # what can't be listed is refused by the unpickler anyway
        return []


class _StandIn:
    """Takes the place of a class that is not needed: keeps nothing and does nothing."""

    def __new__(cls, *_: object, **__: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _stand_ins(path: Path) -> AbstractContextManager:
    """Let the unpickler for weights pass over Lightning's classes, if the file names any and nothing worse."""
    names = _foreign_names(path)
    if not names or not all(name.startswith(_LIGHTNING) for name in names):
        return nullcontext()
    return torch.serialization.safe_globals([(_stand_in(name), name) for name in names])


def _stand_in(name: str) -> type:
    module, _, plain = name.rpartition(".")
    return type(plain, (_StandIn,), {"__module__": module})


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def read_config(path: Path) -> dict[str, Any]:
    """Read a .json or .yaml file that must hold a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            import yaml

            content = yaml.safe_load(text)
        else:
            content = json.loads(text)
    except Exception as error:  # whatever the parsers raise
        raise PriorError(f"{path} can't be read: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise PriorError(f"{path} must hold a mapping, got {type(content).__name__}")
    return content
