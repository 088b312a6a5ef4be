"""A checkpoint in latent diffusion's layout as a folder in diffusers' format, with .safetensors weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...documents import first_line
from ..errors import PriorError
from ..networks.text import CLIP_TOKENS, write_clip_tokenizer
from . import clip_keys, ldm_keys
from .finite import check_finite
from .folders import ENCODER, INDEX, NETWORK
from .identify import open_loader
from .loaders import Metadata, PriorKind
from .single_file import LdmLoader, usable

_ROOM = 2**20  # bytes for what is no weights


@dataclass(frozen=True)
class Converted:
    """What was written."""

    folder: Path
    kind: PriorKind
    parts: tuple[str, ...]  # the folder's
    n_bytes: int  # of all files
    notes: tuple[str, ...] = ()  # on what was assumed of the model


def convert(
    path: Path | str,
    folder: Path | str,
    kind: PriorKind | None = None,
    *,
    config: Mapping[str, Any] | Path | str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Converted:
    """Convert the checkpoint `path` into `folder`, which is there as a whole or not at all.

    Args:
        kind: what it must be; None: whatever it is. config: see single_file.py.
        dtype: of the weights; None: as they are.
    """
    folder = Path(folder)
    if folder.exists() and (not overwrite or not folder.is_dir()):
        raise PriorError(f"{folder} is there already: choose another folder, or overwrite it")
    _check_replaceable(folder, Path(path))
    loader = open_loader(path, config)
    if not isinstance(loader, LdmLoader):
        raise PriorError(
            f"{path} is no checkpoint of Stable Diffusion, MVDream or Zero123: there is nothing to convert"
        )
    metadata = loader.metadata(kind)
    stored = usable(loader.file, f"{ldm_keys.UNET}input_blocks.0.0.weight").dtype
    dtype = dtype or (stored if stored.itemsize > 1 else torch.float16)  # eight bits are not enough for all layers
    # beside the folder, so that it is renamed within one file system
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        _check_room(unfinished, loader, dtype)
        parts = _write(loader, metadata, unfinished, dtype)
        _put_in_place(unfinished, folder)
    except PriorError:
        raise
    except Exception as error:  # OSError, and what the writers of weights make of one
        why = getattr(error, "strerror", None) or first_line(error)
        raise PriorError(f"can't write {folder}: {why}; free some room, or choose another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    n_bytes = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return Converted(folder, metadata.kind, parts, n_bytes, metadata.notes)


def _check_replaceable(folder: Path, source: Path) -> None:
    """Refuse to replace a folder that is no model's: whatever is in it would be lost."""
    if not folder.exists():
        return
    if source.resolve().is_relative_to(folder.resolve()):
        raise PriorError(f"{source} lies in {folder}, which would be replaced: choose another folder")
    held = next(iter(sorted(folder.iterdir())), None)
    if held is not None and not (folder / INDEX).is_file():
        raise PriorError(f"{folder} holds {held.name} and is no model's folder: choose another folder")


def _put_in_place(unfinished: Path, folder: Path) -> None:
    """Rename the finished folder; one that it replaces is removed when the new one is there."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    try:
        unfinished.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_room(folder: Path, loader: LdmLoader, dtype: torch.dtype) -> None:
    kept = (ldm_keys.UNET, ldm_keys.VAE, ldm_keys.CONDITION)
    numbers = sum(torch.Size(shape).numel() for name, shape in loader.file.shapes.items() if name.startswith(kept))
    need, free = numbers * dtype.itemsize + _ROOM, shutil.disk_usage(folder).free
    if free < need:
        raise PriorError(f"{folder.parent} has {free / 1e9:.1f} GB left, the folder needs {need / 1e9:.1f} GB")


def _save(network: Any, folder: Path) -> None:  # of diffusers: torch's stubs know none of a module's own calls
    network.save_pretrained(folder, safe_serialization=True)


def _write(loader: LdmLoader, metadata: Metadata, folder: Path, dtype: torch.dtype) -> tuple[str, ...]:
    """Write the parts one after the other, so that only one is in memory; return their names."""
    pipeline = "StableDiffusionPipeline" if metadata.kind == "image" else "DiffusionPipeline"
    index: dict[str, Any] = {"_class_name": pipeline}
    _save(loader.unet(dtype, "cpu"), folder / "unet")
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    _save(loader.vae(dtype, "cpu"), folder / "vae")
    index["vae"] = ["diffusers", "AutoencoderKL"]
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", loader.scheduler_config)
    index["scheduler"] = ["diffusers", "DDPMScheduler"]
    layout = loader.encoder_layout()
    if layout in ("open_clip", "transformers"):
        config, pieces = loader.text_parts()
        loader.text_encoder(dtype, "cpu")  # PriorError where its tensors don't fit
        said = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **config}
        _write_encoder(loader, folder / "text_encoder", pieces, said, dtype)
        n_tokens = min(config["max_position_embeddings"], CLIP_TOKENS)
        write_clip_tokenizer(folder / "tokenizer", loader.pad_token(), n_tokens)
        index["text_encoder"] = ["transformers", "CLIPTextModel"]
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    if layout == "clip_image":
        config, pieces = loader.image_parts()
        loader.image_encoder(dtype, "cpu")
        said = {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model", **config}
        _write_encoder(loader, folder / "image_encoder", pieces, said, dtype)
        index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    if metadata.kind == "novel_view":
        _write_projection(loader, folder)
        index["clip_camera_projection"] = ["dream4d_engine", "CLIPCameraProjection"]
    if metadata.kind == "image":  # diffusers' own pipeline asks for these, too
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    parts = tuple(name for name, value in index.items() if isinstance(value, list) and value[0])
    index["dream4d"] = {
        "name": metadata.name,
        "kind": metadata.kind,
        "image_size": list(metadata.image_size),
        "n_frames": metadata.n_frames,
        "vector": metadata.vector,
        "group_attention": metadata.group_attention,
        "image_resize": metadata.image_resize,
    }
    _write_json(folder / INDEX, index)
    return parts


def _write_encoder(
    loader: LdmLoader,
    folder: Path,
    pieces: Mapping[str, clip_keys.Piece],
    config: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    """Write an encoder under its published names, which every version of transformers reads."""
    from safetensors.torch import save_file

    folder.mkdir()
    read = loader.file.tensor
    state = {
        # a copy, since thirds of one matrix share its memory
        name: piece.take(lambda key: read(ldm_keys.CONDITION + key)).to(dtype, copy=True).contiguous()
        for name, piece in pieces.items()
    }
    check_finite(state, f"{loader.path}: its encoder")
    save_file(state, str(folder / f"{ENCODER}.safetensors"), {"format": "pt"})
    _write_json(folder / "config.json", config)


def _write_projection(loader: LdmLoader, folder: Path) -> None:
    from safetensors.torch import save_file

    place = folder / "clip_camera_projection"
    place.mkdir()
    weight, bias = loader.projection("cpu")
    check_finite({"weight": weight, "bias": bias}, f"{loader.path}: its pose projection")
    state = {"proj.weight": weight.contiguous().clone(), "proj.bias": bias.contiguous().clone()}
    save_file(state, str(place / f"{NETWORK}.safetensors"), {"format": "pt"})
    width = weight.shape[1] - 4
    _write_json(
        place / "config.json",
        {"_class_name": "CLIPCameraProjection", "embedding_dim": width, "additional_embeddings": 4},
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
