"""Models in one file: the checkpoints of Stable Diffusion, MVDream and Zero123, and networks under diffusers' names.

A checkpoint in latent diffusion's layout says by its shapes what it is. What shapes leave open comes from the model's
own configuration (the .json or .yaml that it was trained by), given by hand or lying beside the file under its name:

    linear_start, linear_end, timesteps, scale_factor, parameterization ("eps" or "v"), image_size (in latents),
    unet_config.params.num_head_channels or num_heads

A file of networks under diffusers' names (`unet.*`, `vae.*`) needs a configuration:

    {"unet": {arguments}, "vae": {arguments}, "scheduler": {arguments}, "dream4d": {see folders.py}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import clip_keys, ldm_keys
from .checkpoints import Checkpoint, open_checkpoint, read_config
from .configurations import schedule_of
from .errors import PriorError
from .folders import check_kind
from .sources import Device, Facts, PriorKind, filled_encoder, filled_network, frozen
from .text import CLIP_TOKENS, END, Tokenizer, clip_tokenizer

# the settings of every model of this family
LINEAR_START, LINEAR_END, TIMESTEPS, SCALE_FACTOR = 0.00085, 0.0120, 1000, 0.18215

_LATENTS = {"image": 64, "multiview": 32, "novel_view": 32}
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}
_INPUTS = {"image": 4, "multiview": 4, "novel_view": 8}


def find_config(path: Path, config: Mapping[str, Any] | Path | str | None) -> dict[str, Any]:
    """Return the configuration that is given, or lies beside the file, or {}; of LDM's the model's `params`."""
    if config is None:
        beside = (path.with_suffix(suffix) for suffix in (".json", ".yaml", ".yml"))
        found = next((p for p in beside if p.is_file()), None)
        content = {} if found is None else read_config(found)
    else:
        content = dict(config) if isinstance(config, Mapping) else read_config(Path(config))
    return content.get("model", content).get("params", content.get("model", content))


def ldm_kind(file: Checkpoint) -> PriorKind | None:
    """Say what a checkpoint in latent diffusion's layout is; None for other files. PriorError for its other uses."""
    first = file.shapes.get(f"{ldm_keys.UNET}input_blocks.0.0.weight")
    if first is None:
        return None
    if f"{ldm_keys.UNET}label_emb.0.0.weight" in file.shapes:
        raise PriorError(f"{file.path} is a Stable Diffusion XL or unCLIP model: Stable Diffusion 1 and 2 can be used")
    if f"{ldm_keys.PROJECTION}weight" in file.shapes:
        kind: PriorKind = "novel_view"
    else:
        kind = "multiview" if f"{ldm_keys.UNET}camera_embed.0.weight" in file.shapes else "image"
    if first[1] != _INPUTS[kind]:
        raise PriorError(
            f"{file.path}: its UNet has {first[1]} input channels, not {_INPUTS[kind]}: models for inpainting, depth "
            "or editing can't be used"
        )
    return kind


@dataclass(frozen=True, eq=False)
class LdmSource:
    """A checkpoint in latent diffusion's layout (see sources.Source and ldm_keys.py)."""

    path: Path
    config: Mapping[str, Any]

    @cached_property
    def file(self) -> Checkpoint:
        """The tensors."""
        return open_checkpoint(self.path)

    @cached_property
    def unet_config(self) -> dict[str, Any]:
        """The arguments of UNet2DConditionModel."""
        params = self.config.get("unet_config", {}).get("params", {})
        return ldm_keys.unet_config(self.file.under(ldm_keys.UNET), params, self._latents(self._kind()))

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The arguments of AutoencoderKL."""
        shapes = self.file.under(ldm_keys.VAE)
        if not shapes:
            raise PriorError(f"{self.path} has no autoencoder ({ldm_keys.VAE}*)")
        return ldm_keys.vae_config(shapes, self.vae_scaling())

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """The configuration of a diffusers scheduler; the file's own schedule, if it has one that is another."""
        parameterization = self.config.get("parameterization") or self._declared_parameterization()
        if parameterization not in _PREDICTIONS:
            raise PriorError(f"{self.path}: unknown parameterization {parameterization!r}: eps and v can be used")
        config = {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": self.config.get("timesteps", TIMESTEPS),
            "beta_start": self.config.get("linear_start", LINEAR_START),
            "beta_end": self.config.get("linear_end", LINEAR_END),
            "beta_schedule": "scaled_linear",
            "prediction_type": _PREDICTIONS[parameterization],
            "clip_sample": False,
            "steps_offset": 1,
        }
        if "betas" in self.file.shapes:
            betas = self.file.tensor("betas").double()
            alphas_bar = schedule_of(config)[0].double()
            if alphas_bar.shape != betas.shape or not torch.allclose((1 - betas).cumprod(0), alphas_bar, rtol=1e-3):
                config |= {"trained_betas": betas.tolist(), "num_train_timesteps": len(betas)}
        return config

    def _declared_parameterization(self) -> str:
        """What a .safetensors header may say (the standard of stability.ai's modelspec)."""
        return "v" if self.file.extra.get("modelspec.prediction_type") == "v" else "eps"

    def _kind(self) -> PriorKind:
        kind = ldm_kind(self.file)
        if kind is None:
            raise PriorError(f"{self.path} is no checkpoint of Stable Diffusion, MVDream or Zero123")
        return kind

    def _latents(self, kind: PriorKind) -> int:
        return int(self.config.get("image_size", _LATENTS[kind]))

    def facts(self, kind: PriorKind | None = None) -> Facts:
        """Say what the model is."""
        own = self._kind()
        kind = kind or own
        check_kind(kind, self.path)
        if kind != own:
            raise PriorError(f"{self.path} is a model of kind {own!r} and can't be used as {kind!r}")
        size = self._latents(kind) * 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        grouped = kind == "multiview"
        return Facts(
            name=self.path.stem,
            kind=kind,
            image_size=(size, size),
            n_frames=4 if grouped else None,
            vector="camera" if grouped else None,
            group_attention=grouped,
        )

    def schedule(self) -> tuple[Tensor, str]:
        """Return (alphas_bar [T], prediction_type)."""
        return schedule_of(self.scheduler_config)

    def unet(self, dtype: torch.dtype, device: Device) -> nn.Module:
        """Build the UNet of the checkpoint's tensors; of their running means, where it keeps those too."""
        keys = self.file.under(ldm_keys.UNET)
        averaged = all(ldm_keys.ema_name(key) in self.file.shapes for key in keys)
        sources = {key: ldm_keys.ema_name(key) if averaged else ldm_keys.UNET + key for key in keys}
        names = ldm_keys.unet_names(keys)
        state = {names[key]: self._tensor(source, dtype, device) for key, source in sources.items()}
        return filled_network("UNet2DConditionModel", self.unet_config, state, f"{self.path}: its UNet", device)

    def vae(self, dtype: torch.dtype, device: Device) -> nn.Module | None:
        """Build the autoencoder; what are 1x1 convolutions there are linear layers in diffusers."""
        names = ldm_keys.vae_names(self.file.under(ldm_keys.VAE))
        state = {}
        for key, name in names.items():
            tensor = self._tensor(ldm_keys.VAE + key, dtype, device)
            flat = "attentions" in name and tensor.ndim == 4
            state[name] = tensor.flatten(1) if flat else tensor
        return filled_network("AutoencoderKL", self.vae_config, state, f"{self.path}: its autoencoder", device)

    def vae_scaling(self) -> float | None:
        """Return what the autoencoder's latents are multiplied by."""
        return float(self.config.get("scale_factor", SCALE_FACTOR))

    def encoder_layout(self) -> clip_keys.EncoderLayout | None:
        """Say which encoder of the condition the checkpoint has, if any."""
        return clip_keys.encoder_layout(self.file.under(ldm_keys.CONDITION))

    def text_encoder(self, dtype: torch.dtype, device: Device) -> tuple[Tokenizer, nn.Module]:
        """Build CLIP's text encoder; its tokenizer comes with this package."""
        from transformers import CLIPTextConfig, CLIPTextModel

        shapes, layout = self.file.under(ldm_keys.CONDITION), self.encoder_layout()
        if layout not in ("open_clip", "transformers"):
            raise PriorError(f"{self.path} has no text encoder: prompts can't be encoded with it")
        config = clip_keys.text_config(shapes, layout)
        pieces = clip_keys.text_pieces(shapes, layout)
        encoder = self._encoder(CLIPTextModel, CLIPTextConfig(**config), pieces, dtype, device)
        return clip_tokenizer(self.pad_token(), min(config["max_position_embeddings"], CLIP_TOKENS)), encoder

    def pad_token(self) -> str:
        """Return what the text encoder's prompts were padded with."""
        return "!" if self.encoder_layout() == "open_clip" else END

    def image_encoder(self, dtype: torch.dtype, device: Device) -> nn.Module:
        """Build CLIP's image encoder."""
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        shapes = self.file.under(ldm_keys.CONDITION)
        if self.encoder_layout() != "clip_image":
            raise PriorError(f"{self.path} has no image encoder: pictures can't be encoded with it")
        config = CLIPVisionConfig(**clip_keys.vision_config(shapes))
        return self._encoder(CLIPVisionModelWithProjection, config, clip_keys.vision_pieces(shapes), dtype, device)

    def _encoder(
        self, model_class: Any, config: Any, pieces: Mapping[str, clip_keys.Piece], dtype: torch.dtype, device: Device
    ) -> nn.Module:
        state = {
            name: piece.take(lambda key: self._tensor(ldm_keys.CONDITION + key, dtype, "cpu"))
            for name, piece in pieces.items()
        }
        return frozen(filled_encoder(model_class, config, state, f"{self.path}: its encoder").to(dtype), device)

    def projection(self, device: Device) -> tuple[Tensor, Tensor]:
        """Return (weight, bias), float32, of Zero123's pose projection."""
        weight, bias = (self._tensor(ldm_keys.PROJECTION + part, torch.float32, device) for part in ("weight", "bias"))
        return weight, bias

    def _tensor(self, name: str, dtype: torch.dtype, device: Device) -> Tensor:
        if name not in self.file.shapes:
            raise PriorError(f"{self.path} is not complete: {name} is missing")
        return self.file.tensor(name).to(device, dtype)


# ---- Networks under diffusers' names -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class NetworksSource:
    """A file with the tensors of a UNet, and perhaps an autoencoder, under diffusers' names (see sources.Source)."""

    path: Path
    config: Mapping[str, Any]

    @cached_property
    def file(self) -> Checkpoint:
        """The tensors."""
        return open_checkpoint(self.path)

    def _unet_config(self) -> dict[str, Any]:
        config = self.config.get("unet")
        if not isinstance(config, Mapping):
            raise PriorError(
                f"{self.path} holds networks without their configuration: give config={{'unet': ..., 'scheduler': "
                f"...}}, or put it beside the file as {self.path.stem}.json"
            )
        return {key: value for key, value in config.items() if not key.startswith("_")}

    def _has_vae(self) -> bool:
        return "vae" in self.config and any(name.startswith("vae.") for name in self.file.shapes)

    def facts(self, kind: PriorKind | None = None) -> Facts:
        """Say what the model is."""
        unet, ours = self._unet_config(), self.config.get("dream4d", {})
        kind = kind or ours.get("kind") or self._guess(unet)
        check_kind(kind, self.path)
        size = unet.get("sample_size") or 64
        factor = 2 ** (len(self.config["vae"]["block_out_channels"]) - 1) if self._has_vae() else 1
        grouped = kind == "multiview"
        return Facts(
            name=ours.get("name", self.path.stem),
            kind=kind,
            image_size=tuple(ours.get("image_size", (size * factor,) * 2)),
            n_frames=ours.get("n_frames", {"multiview": 4, "video": 16}.get(kind)),
            vector=ours.get("vector", "camera" if grouped else None),
            group_attention=ours.get("group_attention", grouped),
        )

    def _guess(self, unet: dict[str, Any]) -> PriorKind:
        if self._is_3d(unet):
            return "video"
        if unet.get("class_embed_type") == "projection":
            return "multiview"
        return "image" if self._has_vae() else "pixel"

    @staticmethod
    def _is_3d(unet: dict[str, Any]) -> bool:
        return any("3D" in name for name in unet.get("down_block_types", ()))

    def schedule(self) -> tuple[Tensor, str]:
        """Return (alphas_bar [T], prediction_type)."""
        if "scheduler" not in self.config:
            raise PriorError(f"{self.path}: its configuration has no 'scheduler'")
        return schedule_of(dict(self.config["scheduler"]))

    def unet(self, dtype: torch.dtype, device: Device) -> nn.Module:
        """Build the UNet."""
        config = self._unet_config()
        name = "UNet3DConditionModel" if self._is_3d(config) else "UNet2DConditionModel"
        return filled_network(name, config, self._state("unet.", dtype, device), f"{self.path}: its UNet", device)

    def vae(self, dtype: torch.dtype, device: Device) -> nn.Module | None:
        """Build the autoencoder, if there is one."""
        if not self._has_vae():
            return None
        config = {key: value for key, value in self.config["vae"].items() if not key.startswith("_")}
        state = self._state("vae.", dtype, device)
        return filled_network("AutoencoderKL", config, state, f"{self.path}: its autoencoder", device)

    def vae_scaling(self) -> float | None:
        """Return what the autoencoder's latents are multiplied by."""
        return self.config["vae"].get("scaling_factor", SCALE_FACTOR) if self._has_vae() else None

    def _state(self, prefix: str, dtype: torch.dtype, device: Device) -> dict[str, Tensor]:
        names = [name for name in self.file.shapes if name.startswith(prefix)]
        if not names and prefix == "unet.":  # the UNet alone, without a prefix
            names, prefix = list(self.file.shapes), ""
        return {name.removeprefix(prefix): self.file.tensor(name).to(device, dtype) for name in names}

    def text_encoder(self, dtype: torch.dtype, device: Device) -> tuple[Tokenizer, nn.Module]:
        """There is none."""
        raise PriorError(f"{self.path} has no text encoder: prompts can't be encoded with it")

    def image_encoder(self, dtype: torch.dtype, device: Device) -> nn.Module:
        """There is none."""
        raise PriorError(f"{self.path} has no image encoder: pictures can't be encoded with it")

    def projection(self, device: Device) -> tuple[Tensor, Tensor]:
        """There is none."""
        raise PriorError(f"{self.path} has no pose projection: pictures can't be encoded with it")
