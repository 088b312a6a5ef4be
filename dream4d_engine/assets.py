"""A scene as one file, and the import of Dream-in-4D's checkpoints.

An asset is a .safetensors file: its tensors are the scene's state_dict, its header says `format` ("dream4d"),
`format_version`, `config` (SceneConfig as JSON) and `provenance` (Provenance as JSON). Nothing in it is executed.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from .fields.background import BackgroundConfig
from .fields.deformation import DeformationConfig
from .fields.encodings import HashGridConfig
from .fields.radiance import RadianceConfig
from .kernels import Kernels
from .machine import WriteError, write_atomically
from .scene import Scene, SceneConfig

FORMAT = "dream4d"
FORMAT_VERSION = 1

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
        raise ValueError(f"{where} must be an object, got {_shown(data)}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"{where} has an unknown key {unknown[0]!r} (known: {', '.join(known)})")
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
            raise ValueError(f"{where} must be one of {', '.join(map(str, arguments))}, got {_shown(data)}")
        return data
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise ValueError(f"{where} must be a list, got {_shown(data)}")
        inner = [arguments[0]] * len(data) if arguments[-1] is Ellipsis else arguments
        if len(inner) != len(data):
            raise ValueError(f"{where} must have {len(inner)} entries, got {len(data)}")
        return tuple(_value(k, d, f"{where}[{i}]") for i, (k, d) in enumerate(zip(inner, data, strict=True)))
    if origin is dict:
        if not isinstance(data, Mapping):
            raise ValueError(f"{where} must be an object, got {_shown(data)}")
        return {_value(str, k, where): _value(arguments[1], v, f"{where}.{k}") for k, v in data.items()}
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
        raise ValueError(f"{where} must be of type {kind.__name__}, got {_shown(data)}")
    return data


def _shown(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else text[:57] + "..."


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
    with _opened(path) as file:
        return _info(path, file)


def load_scene(
    path: Path | str, device: torch.device | str = "cpu", kernels: Kernels | None = None
) -> tuple[Scene, Provenance]:
    """Read an asset. Everything the header says is checked before memory is taken for it."""
    path = Path(path)
    with _opened(path) as file:
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


def _opened(path: Path):
    """Open a safetensors file; its library raises its own kinds of errors, all turned into one."""
    from safetensors import safe_open

    if not path.exists():
        raise AssetError(f"{path} does not exist")
    if not path.is_file():
        raise AssetError(f"{path} is not a file")
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except Exception as error:
        raise AssetError(f"{path} is not a readable .safetensors file ({_line(error)})") from error


def _info(path: Path, file) -> AssetInfo:
    header = file.metadata() or {}
    if header.get("format") != FORMAT:
        raise AssetError(f"{path} is a .safetensors file, but not a dream4d scene")
    try:
        version = int(header.get("format_version", ""))
    except ValueError as error:
        raise AssetError(f"{path} does not say the version of its format") from error
    if version > FORMAT_VERSION:
        raise AssetError(f"{path} has format version {version}, newer than {FORMAT_VERSION}: update dream4d")
    if version < 1:
        raise AssetError(f"{path} has the unknown format version {version}")
    try:
        config = config_from_dict(SceneConfig, json.loads(header.get("config", "")))
        provenance = config_from_dict(Provenance, json.loads(header.get("provenance", "{}")), "provenance")
    except (ValueError, RecursionError) as error:
        raise AssetError(f"{path} has a header that cannot be understood: {_line(error)}") from error
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return AssetInfo(version, config, provenance, shapes)


def _check_shapes(path: Path, info: AssetInfo) -> None:
    with torch.device("meta"):  # shapes without memory
        expected = {name: tuple(value.shape) for name, value in Scene(info.config).state_dict().items()}
    if missing := sorted(set(expected) - set(info.shapes)):
        raise AssetError(f"{path} lacks the tensor {missing[0]}")
    if extra := sorted(set(info.shapes) - set(expected)):
        raise AssetError(f"{path} has the tensor {extra[0]}, which its configuration does not know")
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
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


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
    `parsed.yaml` beside the checkpoint or in the neighbouring folder `configs`.
    """
    path, options = Path(path), options or ImportOptions()
    state, step = _read_checkpoint(path)
    settings = _read_settings(path, options)
    try:
        config = _imported_config(state, settings, options)
        scene = Scene(config, kernels)
        _fill(scene, _imported_tensors(scene, state, settings, step), str(path))
    except AssetError:
        raise
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:  # whatever its tensors are
        raise AssetError(f"{path} cannot be imported: {_line(error)}") from error
    prompt = settings.get("prompt_processor", {}).get("prompt", "")
    return scene, Provenance(prompt=str(prompt), recipe="imported from Dream-in-4D", steps=step)


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], int]:
    if not path.is_file():
        raise AssetError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = _line(error)
        if type(error).__name__ == "UnpicklingError":  # its own message tells how to let the file run code
            why = "it is damaged, or holds more than tensors and plain values, and nothing in it is ever executed"
        raise AssetError(f"{path} is not a readable checkpoint ({why})") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or _GRID not in state:
        raise AssetError(f"{path} is a torch file, but not a checkpoint of Dream-in-4D ({_GRID} is missing)")
    step = content.get("global_step", 0)
    if not isinstance(step, int):
        raise AssetError(f"{path} is damaged: global_step is {_shown(step)}, not a whole number")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}, step


def _read_settings(path: Path, options: ImportOptions) -> dict[str, Any]:
    """Return the run's settings as plain data, {} where there are none."""
    beside = [path.with_suffix(".json"), path.with_suffix(".yaml"), path.parent / "parsed.yaml"]
    places = [options.settings] if options.settings else [*beside, path.parent.parent / "configs" / "parsed.yaml"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        if options.settings:
            raise AssetError(f"{options.settings} does not exist")
        return {}
    try:
        if found.suffix == ".json":
            data = json.loads(found.read_text(encoding="utf-8"))
        else:
            import yaml

            data = yaml.safe_load(found.read_text(encoding="utf-8"))
    except Exception as error:
        raise AssetError(f"the settings {found} cannot be read ({_line(error)})") from error
    if not isinstance(data, dict):
        raise AssetError(f"the settings {found} are not a table of names and values")
    return data.get("system", data)


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
        weights.append(state[key])
    if not weights:
        raise AssetError(f"the checkpoint lacks the network {name}")
    return weights


def _hidden(weights: list[Tensor]) -> dict[str, int]:
    return {"hidden_width": weights[0].shape[0] if len(weights) > 1 else 1, "hidden_layers": len(weights) - 1}


def _imported_grid(
    n_parameters: int, n_inputs: int, n_dims: int, said: Mapping[str, Any], base: int | None, growth: float | None
) -> HashGridConfig:
    """Find the grid that has this number of parameters and of network inputs; `said` are its settings."""
    published = HashGridConfig() if n_dims == 3 else DeformationConfig().grid
    n_features = int(said.get("n_features_per_level", published.n_features))
    base = int(base or said.get("base_resolution", published.base_resolution))
    growth = float(growth or said.get("per_level_scale", published.growth))
    for log2_entries in range(3, 25):
        grid = HashGridConfig(n_inputs // n_features, n_features, log2_entries, base, growth)
        if grid.layout(n_dims).n_parameters == n_parameters:
            return grid
    raise AssetError(
        f"no grid of {n_inputs // n_features} levels with base resolution {base} and growth {growth} has "
        f"{n_parameters} parameters: give the run's own base resolution and growth, or its settings file"
    )


def _imported_config(state: Mapping[str, Tensor], settings: Mapping[str, Any], options: ImportOptions) -> SceneConfig:
    geometry = settings.get("geometry", {})
    density = _network(state, _NETWORKS["canonical.density_mlp"])
    grid = _imported_grid(
        state[_GRID].numel(),
        density[0].shape[1],
        3,
        geometry.get("pos_encoding_config", {}),
        options.base_resolution,
        options.growth,
    )
    bias = str(geometry.get("density_bias", "blob_magic3d"))
    radiance = RadianceConfig(
        grid,
        **_hidden(density),
        blob=bias.removeprefix("blob_"),
        blob_scale=float(geometry.get("density_blob_scale", 10.0)),
        blob_std=float(geometry.get("density_blob_std", 0.5)),
    )
    occupancy = state.get("renderer.estimator.binaries")
    return SceneConfig(
        radius=float(state["geometry.bbox"].abs().max()) if "geometry.bbox" in state else 1.0,
        radiance=radiance,
        deformation=_imported_deformation(state, geometry, options),
        background=_imported_background(state, settings),
        occupancy_resolution=32 if occupancy is None else occupancy.shape[-1],
        n_samples=int(settings.get("renderer", {}).get("num_samples_per_ray", 512)),
    )


def _imported_deformation(
    state: Mapping[str, Tensor], geometry: Mapping[str, Any], options: ImportOptions
) -> DeformationConfig | None:
    if _DEFORMATION_GRID not in state:
        return None
    network = _network(state, _NETWORKS["deformation.mlp"])
    grid = _imported_grid(
        state[_DEFORMATION_GRID].numel(),
        network[0].shape[1],
        4,
        geometry.get("time_encoding_config", {}),
        options.deformation_base_resolution,
        options.deformation_growth,
    )
    scale = float(options.deformation_scale or geometry.get("deformation_scale", 1.0))
    return DeformationConfig(grid, **_hidden(network), scale=scale)


def _imported_background(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> BackgroundConfig:
    if f"{_NETWORKS['background.mlp']}.layers.0.weight" in state:
        return BackgroundConfig(**_hidden(_network(state, _NETWORKS["background.mlp"])))
    if "neural" in str(settings.get("background_type", "")):
        raise AssetError(f"the checkpoint lacks the network {_NETWORKS['background.mlp']}, which its settings ask for")
    color = settings.get("background", {}).get("color", (1.0, 1.0, 1.0))
    red, green, blue = (float(c) for c in color)
    return BackgroundConfig(color=(red, green, blue))


def _imported_tensors(
    scene: Scene, state: Mapping[str, Tensor], settings: Mapping[str, Any], step: int
) -> dict[str, Tensor]:
    """Return the state_dict of `scene` with the checkpoint's numbers."""
    tensors = {"canonical.grid.table": state[_GRID]}
    if scene.deformation is not None:
        said = settings.get("geometry", {}).get("time_encoding_config", {})
        first, every = int(said.get("start_level", 4)), max(1, int(said.get("update_steps", 500)))
        woken = first + max(0, step - int(said.get("start_step", 0))) // every
        active = min(woken, scene.deformation.config.grid.n_levels)
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
