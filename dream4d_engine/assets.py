"""A scene as one file, and the import of Dream-in-4D's checkpoints.

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
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from .documents import as_object, describe, disguise, first_line, parse_document, printable, read_document, shortened
from .documents import field as read_field
from .fields.background import BackgroundConfig
from .fields.deformation import DeformationConfig
from .fields.encodings import HashGridConfig
from .fields.radiance import RadianceConfig
from .kernels import Kernels
from .machine import WriteError, write_atomically
from .priors.checkpoints import Checkpoint, open_tensors, shown
from .priors.errors import PriorError
from .scene import Scene, SceneConfig

logger = logging.getLogger(__name__)

FORMAT = "dream4d"
FORMAT_VERSION = 1
_MOST_HEADER = 2**25

T = TypeVar("T")


class AssetError(ValueError):
    """A file cannot be read as a scene, or a scene cannot be written; the message says why in one line."""


@dataclass(frozen=True)
class Provenance:
    """Where a scene comes from. `parent` is the static scene that a moving one was made from."""

    prompt: str = ""
    recipe: str = ""
    seed: int | None = None
    steps: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    parent: Provenance | None = None


@dataclass(frozen=True)
class AssetInfo:
    """An asset's header, and the shapes of its tensors."""

    format_version: int
    config: SceneConfig
    provenance: Provenance
    shapes: dict[str, tuple[int, ...]]


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
    if is_dataclass(kind):
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


def _plain(kind: type, data: Any, where: str) -> int | float | bool | str:
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
        raise AssetError(f"the scene could not be read back once it is made: {_line(error)}") from error


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
    """Read an asset's header without its tensors."""
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
        _check_shapes(path, info)
        tensors = {}
        for name in info.shapes:
            try:
                tensors[name] = file.get_tensor(name)
            except Exception as error:
                raise AssetError(f"{path} is damaged: {name} cannot be read ({_line(error)})") from error
    scene = Scene(info.config, kernels)
    _fill(scene, tensors, str(path))
    return scene.to(device), info.provenance


def opened(path: Path):
    """Open a .safetensors file. AssetError where it is none, with what it is."""
    from safetensors import safe_open

    head = _head(path)
    strange = disguise(head)
    if strange is None and head[8:9] != b"{" and head.startswith((b"PK\x03\x04", b"\x80")):
        strange = (
            "is not a readable .safetensors file but one of torch's, or an archive (dream4d import makes a scene of a "
            "checkpoint of Dream-in-4D)"
        )
    if strange is None and _MOST_HEADER < int.from_bytes(head[:8], "little") < path.stat().st_size:
        strange = "has a header too large to be meant"
    if strange is not None:
        raise AssetError(f"{path} {strange}")
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except Exception as error:
        raise AssetError(f"{path} is not a readable .safetensors file ({_line(error)})") from error


def _head(path: Path) -> bytes:
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
        raise AssetError(f"{path} has a header that cannot be understood: {_line(error)}") from error
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return AssetInfo(version, config, provenance, shapes)


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


def _fill(scene: Scene, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into a scene after checking types and values."""
    for name, target in scene.state_dict().items():
        if tensors[name].dtype != target.dtype:
            raise AssetError(f"{where}: {name} has type {tensors[name].dtype}, expected {target.dtype}")
    _require_finite(tensors, where)
    # A damaged file can hold booleans that are neither 0 nor 1.
    clean = {n: t.view(torch.uint8).ne(0) if t.dtype == torch.bool else t for n, t in tensors.items()}
    if scene.deformation is not None:
        active, n_levels = int(clean["deformation.active_levels"]), scene.config.deformation.grid.n_levels
        if not 0 <= active <= n_levels:
            raise AssetError(f"{where}: active_levels must lie in [0, {n_levels}], got {active}")
    scene.load_state_dict(clean)


def _line(error: BaseException) -> str:
    """The first line of an error's message."""
    return shortened(first_line(error), 300)


# ---- Dream-in-4D's checkpoints -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImportOptions:
    """What a checkpoint's tensors do not say. None: from the settings file beside it, else the published value."""

    settings: Path | None = None
    base_resolution: int | None = None
    growth: float | None = None
    deformation_base_resolution: int | None = None
    deformation_growth: float | None = None
    deformation_scale: float | None = None


def import_checkpoint(
    path: Path | str, options: ImportOptions | None = None, kernels: Kernels | None = None
) -> tuple[Scene, Provenance]:
    """Turn a checkpoint of Dream-in-4D (either stage) into a scene.

    Sizes come from the tensors' shapes; the rest from the run's settings, a .json or .yaml file of the same name or
    `parsed.yaml` beside the checkpoint or in the neighbouring folder `configs`. What the checkpoint holds beside
    tensors is not read, and named in the log.
    """
    path, options = Path(path), options or ImportOptions()
    state, step = _read_checkpoint(path)
    settings = _read_settings(path, options)
    try:
        config = _imported_config(state, settings, options)
        scene = Scene(config, kernels)
        tensors = _imported_tensors(scene, state, settings, step)
    except _SettingsError as error:
        raise AssetError(f"the settings {error}") from error
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:  # whatever its tensors are
        raise AssetError(f"{path} cannot be imported: {_line(error)}") from error
    _fill(scene, tensors, str(path))
    return scene, Provenance(prompt=settings.prompt, recipe="imported from Dream-in-4D", steps=step)


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], int]:
    """Return the tensors that a scene is made of, and the step."""
    _head(path)
    try:
        file = open_tensors(path)
        if _GRID not in file.shapes:
            raise AssetError(f"{path} holds weights, but is not a checkpoint of Dream-in-4D ({_GRID} is missing)")
        state = {name: file.tensor(name) for name in file.shapes if name.startswith(_PARTS)}
    except PriorError as error:
        raise AssetError(f"not a readable checkpoint: {error}") from error
    _say_unread(file)
    step = file.extra.get("global_step", 0)
    if not isinstance(step, int) or not 0 <= step < 2**62:
        raise AssetError(f"{path} is damaged: global_step is {describe(step)}, not a step's number")
    return state, int(step)


def _say_unread(file: Checkpoint) -> None:
    if file.passed_over:
        some, rest = ", ".join(shown(name) for name in file.passed_over[:4]), len(file.passed_over) - 4
        more = f" and {rest} more" if rest > 0 else ""
        logger.warning("%s: not read, as no scene needs it: %s%s", file.path, some, more)


class _SettingsError(AssetError):
    """Settings with a field that can't be meant; the message begins with the file."""


@dataclass(frozen=True)
class _Settings:
    """A run's settings, and the file that they are from."""

    content: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    path: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The place in the file, for messages."""
        return f"{self.file}: {'.'.join(self.path)}" if self.path else self.file

    def section(self, *names: str) -> _Settings:
        """The settings below some names; none where one is missing or null."""
        found = self
        for name in names:
            inner, below = found.content.get(name), _Settings({}, self.file, (*found.path, name))
            found = below if inner is None else replace(below, content=as_object(inner, below.where, _SettingsError))
        return found

    def get(self, name: str, default: T) -> T:
        """A value of the default's kind; the default where it is missing or null."""
        return read_field(self.content, name, type(default), self.where, _SettingsError, default)

    @property
    def prompt(self) -> str:
        """What the run was told."""
        return printable(self.section("prompt_processor").get("prompt", ""))


def _read_settings(path: Path, options: ImportOptions) -> _Settings:
    """Return the run's settings, none where there are none. Files beside that speak of other things are passed over."""
    beside = [path.with_suffix(".json"), path.with_suffix(".yaml")]
    named = [path.parent / "parsed.yaml", path.parent.parent / "configs" / "parsed.yaml"]
    if options.settings and not options.settings.is_file():
        raise AssetError(f"{options.settings} does not exist")
    for place in [options.settings] if options.settings else [*beside, *named]:
        if not place.is_file():
            continue
        content = read_document(place, AssetError)
        if place in beside and not _is_settings(content):
            logger.warning("%s was passed over: it has none of a run's settings", place)
            continue
        found = _Settings(as_object(content, f"the settings {place}", AssetError), str(place))
        try:
            return found.section("system") if "system" in found.content else found
        except _SettingsError as error:
            raise AssetError(f"the settings {error}") from error
    return _Settings()


def _is_settings(content: object) -> bool:
    return isinstance(content, Mapping) and any(name in content for name in _SETTINGS)


_SETTINGS = ("system", "geometry", "renderer", "background", "background_type", "prompt_processor")
_PARTS = ("geometry.", "background.", "renderer.")
_GRID = "geometry.encoding.encoding.encoding.params"
_DEFORMATION_GRID = "geometry.deformation_encoding.encoding.encoding.params"
_NETWORKS = {
    "canonical.density_mlp": "geometry.density_network",
    "canonical.color_mlp": "geometry.feature_network",
    "deformation.mlp": "geometry.deformation_network",
    "background.mlp": "background.network",
}


def _network(state: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """The weights of a network, in order; every second of its layers is an activation."""
    weights = []
    while (key := f"{name}.layers.{2 * len(weights)}.weight") in state:
        if state[key].ndim != 2 or 0 in state[key].shape:
            raise AssetError(f"{key} has shape {tuple(state[key].shape)}, a layer has two dimensions")
        weights.append(state[key])
    if not weights:
        raise AssetError(f"the checkpoint lacks the network {name}")
    return weights


def _hidden(weights: list[Tensor]) -> dict[str, int]:
    return {"hidden_width": weights[0].shape[0] if len(weights) > 1 else 1, "hidden_layers": len(weights) - 1}


def _imported_grid(
    n_parameters: int, n_inputs: int, n_dims: int, said: _Settings, base: int | None, growth: float | None
) -> HashGridConfig:
    """Find the grid that has this number of parameters and of network inputs; `said` are its settings."""
    published = HashGridConfig() if n_dims == 3 else DeformationConfig().grid
    n_features = said.get("n_features_per_level", published.n_features)
    if n_features < 1:
        raise _SettingsError(f"{said.where}: n_features_per_level must be 1 or more, got {describe(n_features)}")
    base = base or said.get("base_resolution", published.base_resolution)
    growth = growth or said.get("per_level_scale", published.growth)
    for log2_entries in range(3, 25):
        grid = HashGridConfig(n_inputs // n_features, n_features, log2_entries, base, growth)
        if grid.layout(n_dims).n_parameters == n_parameters:
            return grid
    raise AssetError(
        f"no grid of {n_inputs // n_features} levels with base resolution {base} and growth {growth} has "
        f"{n_parameters} parameters: give the run's own base resolution and growth, or its settings file"
    )


def _imported_config(state: Mapping[str, Tensor], settings: _Settings, options: ImportOptions) -> SceneConfig:
    geometry = settings.section("geometry")
    density = _network(state, _NETWORKS["canonical.density_mlp"])
    grid = _imported_grid(
        state[_GRID].numel(),
        density[0].shape[1],
        3,
        geometry.section("pos_encoding_config"),
        options.base_resolution,
        options.growth,
    )
    bias = geometry.get("density_bias", "blob_magic3d")
    radiance = RadianceConfig(
        grid,
        **_hidden(density),
        blob=bias.removeprefix("blob_"),
        blob_scale=geometry.get("density_blob_scale", 10.0),
        blob_std=geometry.get("density_blob_std", 0.5),
    )
    occupancy = state.get("renderer.estimator.binaries")
    return SceneConfig(
        radius=float(state["geometry.bbox"].abs().max()) if "geometry.bbox" in state else 1.0,
        radiance=radiance,
        deformation=_imported_deformation(state, geometry, options),
        background=_imported_background(state, settings),
        occupancy_resolution=32 if occupancy is None else _occupancy_resolution(occupancy),
        n_samples=settings.section("renderer").get("num_samples_per_ray", 512),
    )


def _occupancy_resolution(binaries: Tensor) -> int:
    """R of the occupied cells, [..., R, R, R]."""
    resolution = round(binaries.numel() ** (1 / 3))
    if resolution < 1 or resolution**3 != binaries.numel():
        raise AssetError(f"renderer.estimator.binaries has shape {tuple(binaries.shape)}, which is no cube")
    return resolution


def _imported_deformation(
    state: Mapping[str, Tensor], geometry: _Settings, options: ImportOptions
) -> DeformationConfig | None:
    if _DEFORMATION_GRID not in state:
        return None
    network = _network(state, _NETWORKS["deformation.mlp"])
    grid = _imported_grid(
        state[_DEFORMATION_GRID].numel(),
        network[0].shape[1],
        4,
        geometry.section("time_encoding_config"),
        options.deformation_base_resolution,
        options.deformation_growth,
    )
    scale = float(options.deformation_scale or geometry.get("deformation_scale", 1.0))
    return DeformationConfig(grid, **_hidden(network), scale=scale)


def _imported_background(state: Mapping[str, Tensor], settings: _Settings) -> BackgroundConfig:
    if f"{_NETWORKS['background.mlp']}.layers.0.weight" in state:
        return BackgroundConfig(**_hidden(_network(state, _NETWORKS["background.mlp"])))
    if "neural" in settings.get("background_type", ""):
        raise AssetError(f"the checkpoint lacks the network {_NETWORKS['background.mlp']}, which its settings ask for")
    said = settings.section("background")
    color = said.get("color", [1.0, 1.0, 1.0])
    numbers = [c for c in color if isinstance(c, int | float) and not isinstance(c, bool)]
    if len(color) != 3 or len(numbers) != 3:
        raise _SettingsError(f"{said.where}: color must be three numbers, got {describe(color)}")
    red, green, blue = map(float, numbers)
    return BackgroundConfig(color=(red, green, blue))


def _imported_tensors(scene: Scene, state: Mapping[str, Tensor], settings: _Settings, step: int) -> dict[str, Tensor]:
    """Return the state_dict of `scene` with the checkpoint's numbers."""
    tensors = {"canonical.grid.table": state[_GRID]}
    if scene.deformation is not None:
        said = settings.section("geometry", "time_encoding_config")
        first, every = said.get("start_level", 4), max(1, said.get("update_steps", 500))
        woken = first + max(0, step - said.get("start_step", 0)) // every
        active = max(0, min(woken, scene.deformation.config.grid.n_levels))
        tensors["deformation.grid.table"] = state[_DEFORMATION_GRID]
        tensors["deformation.active_levels"] = torch.tensor(active)
    for ours, theirs in _NETWORKS.items():
        if any(name.startswith(ours) for name in scene.state_dict()):
            tensors |= {f"{ours}.layers.{i}": weight for i, weight in enumerate(_network(state, theirs))}
    fresh = scene.occupancy.state_dict()
    occupied, values = state.get("renderer.estimator.binaries"), state.get("renderer.estimator.occs")
    if occupied is not None and values is not None and bool(occupied.any()):  # else pruning was off: all is occupied
        fresh = {"values": values.view_as(fresh["values"]), "occupied": occupied.view_as(fresh["occupied"])}
    tensors |= {f"occupancy.{name}": value for name, value in fresh.items()}
    return _checked_shapes(scene, {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()})


def _checked_shapes(scene: Scene, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, target in scene.state_dict().items():
        if name not in tensors:
            raise AssetError(f"the checkpoint has nothing for {name}")
        if tensors[name].shape != target.shape:
            shapes = f"{tuple(tensors[name].shape)} in the checkpoint, not {tuple(target.shape)}"
            raise AssetError(f"{name} has shape {shapes}")
    return tensors
