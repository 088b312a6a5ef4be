"""What a path is: a model of which kind, a LoRA, a tiny autoencoder. Weights are not read for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import PriorError
from .checkpoints import SUFFIXES, Checkpoint, open_checkpoint, shown
from .folders import INDEX, FolderLoader, read_json
from .loaders import Loader, PriorKind
from .lora_files import holds_lora
from .lora_names import is_lora
from .pipelines import open_pipeline
from .single_file import LdmLoader, NetworksLoader, find_config, ldm_kind

Layout = Literal["diffusers folder", "checkpoint", "networks", "LoRA", "tiny autoencoder"]
_LORA_ALONE = "{} is a LoRA: it is added to a model, it is none by itself"
_DEEPEST = 16  # folders below folders, so that links in a circle come to an end


@dataclass(frozen=True)
class Identity:
    """What a path holds."""

    path: Path
    layout: Layout
    kind: PriorKind | None  # None for what is no model by itself (LoRA, tiny autoencoder)


def identify(path: Path | str, config: Mapping[str, Any] | Path | str | None = None) -> Identity:
    """Say what a folder or a file is. PriorError where it is nothing that can be used, or can't be read."""
    path = Path(path).expanduser()
    if path.is_dir():
        if (path / INDEX).is_file():
            folder = open_pipeline(path) or FolderLoader(path)
            return Identity(path, "diffusers folder", folder.metadata().kind)
        if holds_lora(path):
            return Identity(path, "LoRA", None)
        if (path / "config.json").is_file() and read_json(path, "config.json").get("_class_name") == "AutoencoderTiny":
            return Identity(path, "tiny autoencoder", None)
        raise PriorError(f"{path} is not a model folder in diffusers' format: {INDEX} is missing")
    file = open_checkpoint(path)
    if is_lora(file.shapes):  # asked first: no error, since lists of LoRAs are made by this
        return Identity(path, "LoRA", None)
    loader = _loader_of(file, config)
    return Identity(path, "checkpoint" if isinstance(loader, LdmLoader) else "networks", loader.metadata(None).kind)


def identify_all(folder: Path | str) -> list[Identity]:
    """Find what can be used below a folder, in the order of names; what can't be read is passed over, whatever it is.

    A model's own folders are not looked into.
    """
    found: list[Identity] = []
    _collect(Path(folder).expanduser(), found)
    return found


def _collect(place: Path, found: list[Identity], depth: int = 0) -> None:
    try:
        inside = sorted(place.iterdir()) if place.is_dir() and depth <= _DEEPEST else []
    except OSError:  # not ours to read
        return
    for path in inside:
        try:
            if path.is_dir() or path.suffix.lower() in SUFFIXES:
                found.append(identify(path))
        except Exception:  # one bad file is no reason not to show the others
            if path.is_dir():
                _collect(path, found, depth + 1)


def open_loader(path: Path | str, config: Mapping[str, Any] | Path | str | None = None) -> Loader:
    """Return a model's parts to be loaded, from a folder or a file of any of the kinds that are understood."""
    path = Path(path).expanduser()
    # what is not there and doesn't look like a file is missed as a folder
    if path.is_dir() or (not path.is_file() and path.suffix.lower() not in SUFFIXES):
        if not (path / INDEX).is_file() and holds_lora(path):
            raise PriorError(_LORA_ALONE.format(path))
        pipeline = open_pipeline(path)
        if pipeline is not None:
            raise PriorError(f"{path} is a {pipeline.class_name}: it is loaded as a whole (priors.files.prior_files)")
        return FolderLoader(path)
    return _loader_of(open_checkpoint(path), config)


def _loader_of(file: Checkpoint, config: Mapping[str, Any] | Path | str | None) -> LdmLoader | NetworksLoader:
    settings = find_config(file.path, config)
    if ldm_kind(file) is not None:
        return LdmLoader(file, settings)
    if is_lora(file.shapes):
        raise PriorError(_LORA_ALONE.format(file.path))
    # networks of several kinds in one file, or a UNet alone
    if any(name.startswith(("unet.", "down_blocks.")) for name in file.shapes):
        return NetworksLoader(file, settings)
    first = ", ".join(shown(name) for name in sorted(file.shapes)[:3]) or "nothing"
    raise PriorError(
        f"{file.path} is no model of a known kind: it holds {first}{', ...' if len(file.shapes) > 3 else ''}"
    )
