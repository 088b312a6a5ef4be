"""A scene as one file.

An asset is a .safetensors file: its tensors are the scene's state_dict, its header says `format` ("dream4d"),
`format_version`, `config` (SceneConfig as JSON) and `provenance` (Provenance as JSON). Nothing in it is executed.
"""

from __future__ import annotations

import json
import logging
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from .documents import describe, disguise, first_line, parse_document, shortened
from .kernels import Kernels
from .machine import WriteError, write_atomically
from .meshes import READ_FORMATS, MeshOrigin
from .priors.formats.checkpoints import shown
from .scene import Scene, SceneConfig

logger = logging.getLogger(__name__)

FORMAT = "dream4d"
FORMAT_VERSION = 1
_MOST_HEADER = 2**25
_MOST_EDITS = 8  # that are told in words


class _Dataclass(Protocol):
    """Any dataclass's value."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


T = TypeVar("T", bound=_Dataclass)


class AssetError(ValueError):
    """A file cannot be read as a scene, or a scene cannot be written; the message says why in one line."""


@dataclass(frozen=True)
class Provenance:
    """Where a scene comes from."""

    prompt: str = ""
    recipe: str = ""  # its name
    seed: int | None = None
    steps: int | None = None
    versions: dict[str, str] = field(default_factory=dict)  # of what it was made with, by package
    parent: Provenance | None = None  # of the static scene that a moving one was made from
    mesh: MeshOrigin | None = None  # that a static scene was made from
    edits: tuple[str, ...] = ()  # of its motion after it was trained, in words, in their order

    @property
    def first_mesh(self) -> MeshOrigin | None:
        """The mesh that this scene, or one that it was made from, began as."""
        return self.mesh if self.mesh is not None or self.parent is None else self.parent.first_mesh

    @property
    def lines(self) -> list[str]:
        """The same in words; of many edits the latest."""
        parts = [f"recipe {self.recipe}"] if self.recipe else []
        parts += [f"{self.steps} steps"] if self.steps is not None else []
        parts += [f"seed {self.seed}"] if self.seed is not None else []
        mesh = None if self.mesh is None else f"a mesh: {self.mesh.source.name}"
        told = [mesh or f"prompt: {self.prompt or '(unknown)'}", ", ".join(parts) or "(no recipe known)"]
        before, latest = self.edits[:-_MOST_EDITS], self.edits[-_MOST_EDITS:]
        told += [f"motion changed: {len(before):,} times, then"] if before else []
        told += [f"motion changed: {edit}" for edit in latest]
        return told if self.parent is None else [*told, "made from:", *(f"  {line}" for line in self.parent.lines)]


@dataclass(frozen=True)
class AssetInfo:
    """An asset's header, and the shapes of its tensors."""

    format_version: int
    config: SceneConfig
    provenance: Provenance
    shapes: dict[str, tuple[int, ...]]  # by the state_dict's names


# ---- configuration trees from plain data -------------------------------------------------------------------------


def config_from_dict(cls: type[T], data: Any, where: str = "config") -> T:
    """Rebuild the dataclass `cls` from what `dataclasses.asdict` made of it and JSON of that.

    Field types lead: dataclasses, int, float, bool, str, None, Literal, X | None, tuple[...], dict[str, X]. Raises
    ValueError naming the place of an unknown key, a missing one or a wrong type.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be an object, got {describe(data)}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"{where} has an unknown key {describe(unknown[0])} (known: {', '.join(known)})")
    for name, f in known.items():
        if name not in data and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where} lacks {name!r}")
    values = {name: _value(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _value(kind: Any, data: Any, where: str) -> Any:
    """Check that `data` is of the type `kind` and convert it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _value(inner, data, where)
    if isinstance(kind, type) and is_dataclass(kind):
        return config_from_dict(kind, data, where)
    if origin is Literal:
        if data not in arguments or not isinstance(data, str):
            raise ValueError(f"{where} must be one of {', '.join(map(str, arguments))}, got {describe(data)}")
        return data
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise ValueError(f"{where} must be a list, got {describe(data)}")
        inner = [arguments[0]] * len(data) if arguments[-1] is Ellipsis else arguments
        if len(inner) != len(data):
            raise ValueError(f"{where} must have {len(inner)} entries, got {len(data)}")
        return tuple(_value(k, d, f"{where}[{i}]") for i, (k, d) in enumerate(zip(inner, data, strict=True)))
    if origin is dict:
        if not isinstance(data, Mapping):
            raise ValueError(f"{where} must be an object, got {describe(data)}")
        return {_value(str, k, where): _value(arguments[1], v, f"{where}.{shown(k)}") for k, v in data.items()}
    return _plain(kind, data, where)


def _plain(kind: type[int | float | bool | str], data: Any, where: str) -> int | float | bool | str:
    is_number = isinstance(data, int | float) and not isinstance(data, bool)
    if kind in (int, float) and is_number and not (math.isfinite(data) if isinstance(data, float) else True):
        raise ValueError(f"{where} must be a finite number, got {data}")
    if kind in (int, float) and is_number and abs(data) > 2**63:
        raise ValueError(f"{where} is out of range")
    if kind is float and is_number:
        return float(data)
    if type(data) is not kind:
        raise ValueError(f"{where} must be of type {kind.__name__}, got {describe(data)}")
    return data


# ---- writing -----------------------------------------------------------------------------------------------------


def check_header(config: SceneConfig, provenance: Provenance) -> None:
    """Raise an AssetError where a scene of this configuration and origin could be written, but not be read back.

    To be asked before the work that a scene costs.
    """
    for one in _ancestry(provenance):
        for name, text in (("prompt", one.prompt), ("recipe's name", one.recipe)):
            try:
                str(text).encode()
            except UnicodeEncodeError as error:
                raise AssetError(f"the {name} holds what is no text in UTF-8: {ascii(text)[:60]}") from error
    try:
        for cls, value in ((SceneConfig, config), (Provenance, provenance)):
            name = cls.__name__.removeprefix("Scene").lower()
            again = config_from_dict(cls, json.loads(json.dumps(asdict(value), allow_nan=False)), name)
            if again != value:
                raise ValueError(f"{name} is not the same any more when it is read back")
    except (ValueError, TypeError, RecursionError) as error:
        raise AssetError(f"the scene could not be read back once it is made: {first_words(error)}") from error


def _ancestry(provenance: Provenance | None) -> list[Provenance]:
    return [] if provenance is None else [provenance, *_ancestry(provenance.parent)]


def save_scene(
    path: Path | str, scene: Scene, provenance: Provenance | None = None, notes: Mapping[str, str] | None = None
) -> Path:
    """Write an asset: first to a temporary file in the same folder, then renamed, so no reader sees half of it.

    `notes` are further entries of the header, which reading passes over.
    """
    from safetensors.torch import save

    path = Path(path)
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in scene.state_dict().items()}
    _require_finite(tensors, "the scene")
    header = {
        **(notes or {}),
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(asdict(scene.config), allow_nan=False),
        "provenance": json.dumps(asdict(provenance or Provenance()), allow_nan=False),
    }
    try:
        write_atomically(path, save(tensors, header))
    except WriteError as error:
        raise AssetError(str(error)) from error
    return path


def _require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise AssetError(f"{where} has numbers that are not finite in {name}")


# ---- reading -----------------------------------------------------------------------------------------------------


def read_info(path: Path | str) -> AssetInfo:
    """Read an asset's header, checked as `load_scene` does, without its tensors' numbers."""
    path = Path(path)
    with opened(path) as file:
        return _info(path, file)


def load_scene(
    path: Path | str, device: torch.device | str = "cpu", kernels: Kernels | None = None
) -> tuple[Scene, Provenance]:
    """Read an asset. Everything the header says is checked before memory is taken for it."""
    path = Path(path)
    with opened(path) as file:
        info = _info(path, file)
        tensors = {}
        for name in info.shapes:
            try:
                tensors[name] = file.get_tensor(name)
            except Exception as error:
                raise AssetError(f"{path} is damaged: {name} cannot be read ({first_words(error)})") from error
    scene = Scene(info.config, kernels)
    fill(scene, tensors, str(path))
    return scene.to(device), info.provenance


def opened(path: Path):
    """Open a .safetensors file. AssetError where it is none, with what it is."""
    from safetensors import safe_open

    head = head_of(path)
    strange = disguise(head)
    # eight bytes of length, then JSON; a zip archive begins with PK, a pickle with 0x80
    if strange is None and head[8:9] != b"{" and head.startswith((b"PK\x03\x04", b"\x80")):
        strange = (
            "is not a readable .safetensors file but one of torch's, or an archive (dream4d import makes a scene of a "
            "checkpoint of Dream-in-4D)"
        )
    if strange is None and head[8:9] != b"{" and path.suffix.lower().removeprefix(".") in READ_FORMATS:
        strange = "is a mesh, not a scene: dream4d import makes a scene of it"
    if strange is None and _MOST_HEADER < int.from_bytes(head[:8], "little") < path.stat().st_size:
        strange = "has a header too large to be meant"
    if strange is not None:
        raise AssetError(f"{path} {strange}")
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except Exception as error:
        raise AssetError(
            f"{path} is not a readable .safetensors file ({first_words(error)}): is it complete?"
        ) from error


def head_of(path: Path) -> bytes:
    """The first bytes of a file that must be there."""
    if not path.is_file():
        raise AssetError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    try:
        with open(path, "rb") as file:
            return file.read(512)
    except OSError as error:
        raise AssetError(f"{path} can't be read: {error.strerror or error}") from error


def _info(path: Path, file) -> AssetInfo:
    header = file.metadata() or {}
    if header.get("format") != FORMAT:
        raise AssetError(f"{path} is a .safetensors file, but not a dream4d scene")
    try:
        version = int(header.get("format_version", ""))
    except ValueError as error:
        raise AssetError(f"{path} does not say the version of its format") from error
    if version > FORMAT_VERSION:
        raise AssetError(f"{path} has format version {describe(version)}, newer than {FORMAT_VERSION}: update dream4d")
    if version < 1:
        raise AssetError(f"{path} has the unknown format version {describe(version)}")
    try:
        config = config_from_dict(SceneConfig, parse_document(header.get("config", ""), "config", ValueError))
        said = parse_document(header.get("provenance", "{}"), "provenance", ValueError)
        provenance = config_from_dict(Provenance, said, "provenance")
    except ValueError as error:
        raise AssetError(f"{path} has a header that cannot be understood: {first_words(error)}") from error
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    info = AssetInfo(version, config, provenance, shapes)
    _check_shapes(path, info)
    return info


def _check_shapes(path: Path, info: AssetInfo) -> None:
    with torch.device("meta"):  # shapes without memory
        expected = {name: tuple(value.shape) for name, value in Scene(info.config).state_dict().items()}
    if missing := sorted(set(expected) - set(info.shapes)):
        raise AssetError(f"{path} lacks the tensor {missing[0]}")
    if extra := sorted(set(info.shapes) - set(expected)):
        raise AssetError(f"{path} has the tensor {shown(extra[0])}, which its configuration does not know")
    for name, shape in expected.items():
        if info.shapes[name] != shape:
            raise AssetError(f"{path}: {name} has shape {info.shapes[name]}, its configuration needs {shape}")


def fill(scene: Scene, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into a scene after checking types and values."""
    for name, target in scene.state_dict().items():
        if tensors[name].dtype != target.dtype:
            raise AssetError(f"{where}: {name} has type {tensors[name].dtype}, expected {target.dtype}")
    _require_finite(tensors, where)
    # a damaged file can hold booleans that are neither 0 nor 1
    clean = {n: t.view(torch.uint8).ne(0) if t.dtype == torch.bool else t for n, t in tensors.items()}
    if scene.deformation is not None:
        active, n_levels = int(clean["deformation.active_levels"]), scene.deformation.config.grid.n_levels
        if not 0 <= active <= n_levels:
            raise AssetError(f"{where}: active_levels must lie in [0, {n_levels}], got {active}")
    scene.load_state_dict(clean)


def first_words(error: BaseException) -> str:
    """The first line of an error's message."""
    return shortened(first_line(error), 300)
