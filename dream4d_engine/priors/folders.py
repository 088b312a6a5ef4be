"""Models in diffusers' format: a folder with a model_index.json and a folder for each part.

Beside the usual entries, `model_index.json` may hold one of ours that says what the other files leave open:

    "dream4d": {"kind": "multiview", "n_frames": 4, "image_size": [32, 32], "vector": "camera",
                "group_attention": true, "known_words": [...], "negative_prompt": "", "license": "Apache-2.0"}

Without it the kind is guessed from the networks' configurations, the other values from the kind and the name.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .checkpoints import open_checkpoint
from .errors import PriorError
from .sources import Device, Facts, PriorKind, VectorKind, frozen, no_progress_bars
from .text import Tokenizer, read_tokenizer

NETWORK, ENCODER = "diffusion_pytorch_model", "model"
_WEIGHTS = {
    "unet": NETWORK,
    "vae": NETWORK,
    "text_encoder": ENCODER,
    "image_encoder": ENCODER,
    "clip_camera_projection": NETWORK,
}
_FRAMES: dict[str, int] = {"multiview": 4, "video": 16}
# ZeroScope's folder repeats ModelScope's picture size; what it was trained on is in its description only
_ZEROSCOPE, _ZEROSCOPE_SIZE, _ZEROSCOPE_FRAMES = "zeroscope", (320, 576), 24


@dataclass(frozen=True)
class FolderSource:
    """A folder in diffusers' format (see sources.Source)."""

    path: Path

    def facts(self, kind: PriorKind | None = None) -> Facts:
        """Say what the model is, by its files of text alone."""
        index, unet = read_json(self.path, "model_index.json"), read_json(self.path, "unet/config.json")
        ours = index.get("dream4d", {})
        kind = kind or ours.get("kind") or guess_kind(self.path, unet)
        check_kind(kind, self.path)
        vector = ours.get("vector", "camera" if kind == "multiview" else None)
        if vector is not None and vector not in get_args(VectorKind):
            raise PriorError(f"{self.path}: unknown vector {vector!r}; known are {', '.join(get_args(VectorKind))}")
        words = ours.get("known_words")
        n_frames = _ZEROSCOPE_FRAMES if kind == "video" and self._is_zeroscope(unet) else _FRAMES.get(kind)
        return Facts(
            name=ours.get("name", self._own_name()),
            kind=kind,
            image_size=self._image_size(ours, unet, kind),
            n_frames=ours.get("n_frames", n_frames),
            vector=vector,
            group_attention=bool(ours.get("group_attention", kind == "multiview")),
            known_words=None if words is None else frozenset(words),
            negative_prompt=ours.get("negative_prompt"),
            license=ours.get("license", "unknown"),
            picture_resize=ours.get("picture_resize", "antialiased" if ours else "corners"),
        )

    def _own_name(self) -> str:
        """The folder's name; in the hub's cache, where that is a number, the repository's."""
        path = self.path.resolve()
        return path.parents[1].name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name

    def _is_zeroscope(self, unet: dict[str, Any]) -> bool:
        names = (*self.path.resolve().parts[-4:], str(unet.get("_name_or_path", "")))
        return any(_ZEROSCOPE in name.lower() for name in names)

    def _image_size(self, ours: dict[str, Any], unet: dict[str, Any], kind: PriorKind) -> tuple[int, int]:
        """Return (height, width) in pixels: as declared, else the UNet's sample size times the autoencoder's factor."""
        if "image_size" in ours:
            height, width = ours["image_size"]
            return int(height), int(width)
        if kind == "video" and self._is_zeroscope(unet):
            return _ZEROSCOPE_SIZE
        size = unet.get("sample_size") or 64
        height, width = (size, size) if isinstance(size, int) else size
        factor = 1
        if (self.path / "vae").is_dir():
            factor = 2 ** (len(read_json(self.path, "vae/config.json").get("block_out_channels", "1234")) - 1)
        return height * factor, width * factor

    def check(self) -> None:
        """Raise PriorError, which names the file, unless all parts that the folder's index lists are there."""
        index = read_json(self.path, "model_index.json")
        for part in ("scheduler", "tokenizer", *_WEIGHTS):
            listed = index.get(part)
            if not (isinstance(listed, list) and any(listed)) and part not in ("scheduler", "unet"):
                continue
            if part == "tokenizer":
                if not (self.path / part).is_dir():
                    raise PriorError(f"{self.path} is not a complete diffusers folder: {part}/ is missing")
            elif part == "scheduler":
                read_json(self.path, "scheduler/scheduler_config.json")
            else:
                if part != "clip_camera_projection":
                    read_json(self.path, f"{part}/config.json")
                weights_variant(self.path, part, _WEIGHTS[part])

    def schedule(self) -> tuple[Tensor, str]:
        """Return (alphas_bar [T], prediction_type)."""
        return read_schedule(self.path)

    def unet(self, dtype: torch.dtype, device: Device) -> nn.Module:
        """Load the UNet."""
        self.check()
        config = read_json(self.path, "unet/config.json")
        name = config.get("_class_name", "UNet2DConditionModel")
        if name not in ("UNet2DConditionModel", "UNet3DConditionModel"):
            raise PriorError(
                f"{self.path}/unet is a {name}; UNet2DConditionModel and UNet3DConditionModel can be used "
                "(from the model's original checkpoint, dream4d convert makes such a folder)"
            )
        return _load_network(self.path, "unet", name, dtype, device)

    def vae(self, dtype: torch.dtype, device: Device) -> nn.Module | None:
        """Load the autoencoder, if the folder has one."""
        return _load_network(self.path, "vae", "AutoencoderKL", dtype, device) if (self.path / "vae").is_dir() else None

    def vae_scaling(self) -> float | None:
        """Return what the autoencoder's latents are multiplied by."""
        if not (self.path / "vae").is_dir():
            return None
        return read_json(self.path, "vae/config.json").get("scaling_factor", 0.18215)

    def text_encoder(self, dtype: torch.dtype, device: Device) -> tuple[Tokenizer, nn.Module]:
        """Load CLIP's or T5's text encoder, as the folder's configuration names it."""
        from transformers import CLIPTextModel, T5EncoderModel

        architecture = read_json(self.path, "text_encoder/config.json").get("architectures", ["CLIPTextModel"])[0]
        tokenizer = read_tokenizer(self.path / "tokenizer")
        encoder_class = T5EncoderModel if architecture.startswith("T5") else CLIPTextModel
        return tokenizer, self._encoder("text_encoder", encoder_class, dtype, device)

    def image_encoder(self, dtype: torch.dtype, device: Device) -> nn.Module:
        """Load CLIP's image encoder."""
        from transformers import CLIPVisionModelWithProjection

        read_json(self.path, "image_encoder/config.json")
        return self._encoder("image_encoder", CLIPVisionModelWithProjection, dtype, device)

    def _encoder(self, part: str, encoder_class: type, dtype: torch.dtype, device: Device) -> nn.Module:
        variant = weights_variant(self.path, part, ENCODER)
        try:
            with no_progress_bars():
                encoder = encoder_class.from_pretrained(
                    self.path / part, dtype=dtype, variant=variant, local_files_only=True
                )
        except Exception as error:  # whatever transformers and safetensors raise for damaged files
            raise PriorError(f"cannot load {self.path / part}: {error}") from error
        return frozen(encoder, device, self.path / part)

    def projection(self, device: Device) -> tuple[Tensor, Tensor]:
        """Return (weight, bias), float32, of Zero123's pose projection."""
        part = "clip_camera_projection"
        variant = weights_variant(self.path, part, NETWORK)
        stem = self.path / part / (NETWORK if variant is None else f"{NETWORK}.{variant}")
        path = next(p for p in (stem.with_name(f"{stem.name}{end}") for end in (".safetensors", ".bin")) if p.is_file())
        file = open_checkpoint(path)
        if not {"proj.weight", "proj.bias"} <= file.shapes.keys():
            raise PriorError(f"{path} holds {sorted(file.shapes)}, not proj.weight and proj.bias")
        return file.tensor("proj.weight").float().to(device), file.tensor("proj.bias").float().to(device)


def check_kind(kind: object, path: Path) -> None:
    """Refuse a kind of prior that there is not."""
    if kind not in get_args(PriorKind):
        raise PriorError(f"{path}: unknown kind of prior {kind!r}; known are {', '.join(get_args(PriorKind))}")


def read_schedule(folder: Path) -> tuple[Tensor, str]:
    """Return (alphas_bar [T], prediction_type) of the folder's scheduler."""
    return schedule_of(read_json(folder, "scheduler/scheduler_config.json"))


def schedule_of(config: dict[str, Any]) -> tuple[Tensor, str]:
    """Return (alphas_bar [T], prediction_type) of a diffusers scheduler's configuration."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(config)
    return scheduler.alphas_cumprod.float(), config.get("prediction_type", "epsilon")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read one of the folder's JSON files; PriorError where it is missing or broken."""
    path = Path(folder) / name
    if not Path(folder).is_dir():
        raise PriorError(f"there is no model folder {folder}")
    if not path.is_file():
        raise PriorError(f"{folder} is not a complete diffusers folder: {name} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PriorError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise PriorError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def guess_kind(folder: Path, unet_config: dict[str, Any]) -> PriorKind:
    """Return the kind that the networks' configurations suggest, for folders that don't say it themselves."""
    if unet_config.get("_class_name") == "UNet3DConditionModel":
        return "video"
    if (folder / "image_encoder").is_dir() and not (folder / "text_encoder").is_dir():
        return "novel_view"
    if unet_config.get("class_embed_type") == "projection":
        return "multiview"
    return "image" if (folder / "vae").is_dir() else "pixel"


def weights_variant(folder: Path, part: str, stem: str) -> str | None:
    """Return which of the published names the weights of a part have: None (plain) or "fp16".

    PriorError names the file that is missing, be it one of several that together hold the weights.
    """
    names = {path.name for path in (folder / part).glob("*")}
    stems = (stem, "pytorch_model") if stem == ENCODER else (stem,)
    for variant, infix in ((None, ""), ("fp16", ".fp16")):
        for name in stems:
            whole = {f"{name}{infix}.safetensors", f"{name}{infix}.bin"}
            if whole & names:
                return variant
            lists = [n for n in names if n.startswith(name) and n.endswith(f".index{infix}.json")]
            if lists:
                _check_shards(folder, part, lists[0], names)
                return variant
    raise PriorError(f"{folder} is not a complete diffusers folder: {part}/{stem}.safetensors is missing")


def _check_shards(folder: Path, part: str, name: str, names: set[str]) -> None:
    """Refuse a part whose list of files names one that is not there."""
    shards = read_json(folder, f"{part}/{name}").get("weight_map", {})
    missing = sorted(set(shards.values()) - names)
    if missing:
        raise PriorError(f"{folder} is not a complete diffusers folder: {part}/{missing[0]} is missing")


def _load_network(folder: Path, part: str, class_name: str, dtype: torch.dtype, device: Device) -> nn.Module:
    """Load a frozen diffusers network from one of the folder's parts."""
    import diffusers

    read_json(folder, f"{part}/config.json")
    variant = weights_variant(folder, part, NETWORK)
    try:
        network = getattr(diffusers, class_name).from_pretrained(
            folder / part,
            torch_dtype=dtype,
            variant=variant,
            local_files_only=True,
            low_cpu_mem_usage=importlib.util.find_spec("accelerate") is not None,
        )
    except Exception as error:  # whatever diffusers and safetensors raise for damaged files
        raise PriorError(f"cannot load {folder / part}: {error}") from error
    return frozen(network, device, folder / part)
