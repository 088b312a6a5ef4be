"""Checkpoints of Dream-in-4D as scenes: sizes from tensors' shapes, the rest from the run's settings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .assets import AssetError, Provenance, fill, first_words, head_of
from .documents import as_object, describe, printable, read_document
from .documents import field as read_field
from .fields.background import BackgroundConfig
from .fields.deformation import DeformationConfig
from .fields.encodings import HashGridConfig
from .fields.radiance import RadianceConfig, blob_named
from .kernels import Kernels
from .priors.errors import PriorError
from .priors.formats.checkpoints import open_tensors, shown
from .scene import Scene, SceneConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class ImportOptions:
    """What a checkpoint's tensors do not say. None: from the settings file beside it, else the published value."""

    settings: Path | None = None  # that file, where it stands elsewhere
    base_resolution: int | None = None  # of the canonical field's grid
    growth: float | None = None
    deformation_base_resolution: int | None = None  # of the deformation's grid
    deformation_growth: float | None = None
    deformation_scale: float | None = None  # see DeformationConfig.scale


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
        raise AssetError(f"{path} cannot be imported: {first_words(error)}") from error
    fill(scene, tensors, str(path))
    return scene, Provenance(prompt=settings.prompt, recipe="imported from Dream-in-4D", steps=step)


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], int]:
    """Return the tensors that a scene is made of, and the step."""
    head_of(path)
    try:
        file = open_tensors(path)
        if _GRID not in file.shapes:
            raise AssetError(f"{path} holds weights, but is not a checkpoint of Dream-in-4D ({_GRID} is missing)")
        state = {name: file.tensor(name) for name in file.shapes if name.startswith(_PARTS)}
    except PriorError as error:
        raise AssetError(f"not a readable checkpoint: {error}") from error
    if file.passed_over:
        some, rest = ", ".join(shown(name) for name in file.passed_over[:4]), len(file.passed_over) - 4
        more = f" and {rest} more" if rest > 0 else ""
        logger.warning("%s: not read, as no scene needs it: %s%s", file.path, some, more)
    step = file.extra.get("global_step", 0)
    if not isinstance(step, int) or not 0 <= step < 2**62:
        raise AssetError(f"{path} is damaged: global_step is {describe(step)}, not a step's number")
    return state, int(step)


class _SettingsError(AssetError):
    """Settings with a field that can't be meant; the message begins with the file."""


@dataclass(frozen=True)
class _Settings:
    """A run's settings, and the file that they are from."""

    content: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    path: tuple[str, ...] = ()  # of this section in the file

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


def _of_its_name(path: Path) -> list[Path]:
    return [path.with_suffix(".json"), path.with_suffix(".yaml")]


def settings_beside(path: Path) -> list[Path]:
    """The files that may hold the settings of the run that a checkpoint comes from, those that are there."""
    named = [path.parent / "parsed.yaml", path.parent.parent / "configs" / "parsed.yaml"]
    return [place for place in (*_of_its_name(path), *named) if place.is_file()]


def _read_settings(path: Path, options: ImportOptions) -> _Settings:
    """Return the run's settings, none where there are none. Files beside that speak of other things are passed over."""
    if options.settings and not options.settings.is_file():
        raise AssetError(f"{options.settings} does not exist")
    for place in [options.settings] if options.settings else settings_beside(path):
        content = read_document(place, AssetError)
        is_settings = isinstance(content, Mapping) and any(name in content for name in _SETTINGS)
        if place in _of_its_name(path) and not is_settings:  # of a checkpoint's name, but about something else
            logger.warning("%s was passed over: it has none of a run's settings", place)
            continue
        found = _Settings(as_object(content, f"the settings {place}", AssetError), str(place))
        try:
            return found.section("system") if "system" in found.content else found
        except _SettingsError as error:
            raise AssetError(f"the settings {error}") from error
    return _Settings()


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
    weights: list[Tensor] = []
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
    for log2_entries in range(3, 25):  # only the table's size isn't said, and it follows from the parameters
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
        blob=blob_named(bias.removeprefix("blob_")),
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
    return DeformationConfig(grid, **_hidden(network), scale=scale, loop=False, edit=None)


def _imported_background(state: Mapping[str, Tensor], settings: _Settings) -> BackgroundConfig:
    if f"{_NETWORKS['background.mlp']}.layers.0.weight" in state:
        return BackgroundConfig(color=None, **_hidden(_network(state, _NETWORKS["background.mlp"])))
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
        # coarse to fine: one level more every so many steps
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
