"""The tiny autoencoder (diffusers' AutoencoderTiny) in the place of the full one, or of its decoder alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...documents import printable, shortened
from ..errors import PriorError
from .folders import load_network, read_json
from .loaders import Device, latents_of


@dataclass(frozen=True)
class TinyDecoder:
    """The folder of an AutoencoderTiny of which the decoder alone is taken."""

    folder: Path


def folder_of(tiny: Path | str | TinyDecoder) -> Path:
    """Where the AutoencoderTiny lies of which all is taken, or the decoder alone."""
    return tiny.folder if isinstance(tiny, TinyDecoder) else Path(tiny)


class TinyVAE(nn.Module):
    """An AutoencoderTiny with AutoencoderKL's calls, as far as they are used here.

    The tiny one gives latents that are scaled already; this one undoes it, so that whoever multiplies by
    `config.scaling_factor`, or leaves it away as Zero123 does, gets the same as with the full one.
    """

    def __init__(self, tiny: nn.Module, scaling_factor: float, block_out_channels: tuple[int, ...]):
        super().__init__()
        self.tiny: Any = tiny  # torch's stubs know none of a module's own calls
        self.config = SimpleNamespace(scaling_factor=scaling_factor, block_out_channels=block_out_channels)

    def encode(self, images: Tensor) -> Any:
        """Encode images in [-1, 1]; `.latent_dist.mode()` of the result are the latents, not scaled."""
        latents = self.tiny.encode(images).latents / self.config.scaling_factor  # it has no distribution: all of it
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))

    def decode(self, latents: Tensor) -> Any:
        """Decode latents that are not scaled; `.sample` of the result are images in [-1, 1]."""
        return self.tiny.decode(latents * self.config.scaling_factor)


class TinyDecoderVAE(nn.Module):
    """An AutoencoderKL whose latents a tiny one shows: images are encoded by the full one alone.

    No gradient goes through a decoder, it only makes the images that a colour term compares with
    (guidance/distillation.py): so gradients on latents stay the full autoencoder's.
    """

    def __init__(self, full: nn.Module, tiny: TinyVAE):
        super().__init__()
        self.full: Any = full
        self.tiny = tiny
        self.config: Any = full.config
        for unasked in ("decoder", "post_quant_conv"):  # their memory is free
            setattr(full, unasked, None)

    def encode(self, images: Tensor) -> Any:
        """See AutoencoderKL."""
        return self.full.encode(images)

    def decode(self, latents: Tensor) -> Any:
        """See TinyVAE."""
        return self.tiny.decode(latents)


def tiny_config(folder: Path | str) -> tuple[Path, dict[str, Any]]:
    """Where an AutoencoderTiny lies, the folder itself or vae/ in it, and its configuration; PriorError for others."""
    folder = Path(folder).expanduser()
    if folder.is_file():
        raise PriorError(f"{folder} is no AutoencoderTiny: give the folder with its config.json and weights")
    if not (folder / "config.json").is_file() and (folder / "vae").is_dir():  # of a whole model's folder
        folder = folder / "vae"
    config = read_json(folder, "config.json")
    name = str(config.get("_class_name"))
    if name != "AutoencoderTiny":
        raise PriorError(f"{folder} holds a {shortened(printable(name), 60)}, not an AutoencoderTiny")
    return folder, config


def check_tiny_vae(folder: Path | str, latents: tuple[int, int], of: object) -> None:
    """Raise PriorError unless an AutoencoderTiny makes a model's kind of latents.

    Args:
        latents: the channels that `of`, the model, reads, and how many times smaller than images they are.
    """
    folder, config = tiny_config(folder)
    made = latents_of(config, folder / "config.json", "encoder_block_out_channels")
    if made != latents:
        (has, times), (wanted, factor) = made, latents
        raise PriorError(
            f"the tiny autoencoder {folder} has latents of {has} channels, {times} times smaller than images; {of} "
            f"reads {wanted} channels, {factor} times smaller: choose one that was made for that model"
        )


def load_tiny_vae(folder: Path | str, scaling_factor: float, dtype: torch.dtype, device: Device) -> TinyVAE:
    """Load an AutoencoderTiny from its folder (config.json and weights), or one that holds it as vae/.

    Args:
        scaling_factor: of the full autoencoder that it replaces.
    """
    folder, _ = tiny_config(folder)
    tiny: Any = load_network(folder, ".", "AutoencoderTiny", dtype, device)  # the folder itself is the part
    return TinyVAE(tiny, scaling_factor, tuple(tiny.config.encoder_block_out_channels))
