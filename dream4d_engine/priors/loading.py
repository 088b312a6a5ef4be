"""Diffusion models from folders and files, as priors.

Nothing is ever downloaded here (weights.py does that, where it is asked for): a folder has everything or the error
says which file is missing. Files of all kinds are loaded by the same code, the toy folders too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..guidance.noise import variance_preserving
from .errors import PriorError
from .formats.folders import guess_kind, read_json, read_schedule
from .formats.identify import open_loader
from .formats.loaders import ImageResize, Loader, PriorKind, VectorKind, no_progress_bars
from .formats.tiny_vae import load_tiny_vae
from .lora import TextLora, add_text_loras, apply_lora
from .networks.denoisers import UNetDenoiser
from .networks.text import encode_prompts
from .networks.view_attention import attend_across_views

__all__ = [
    "Prior",
    "PriorError",
    "PriorExtras",
    "PriorKind",
    "check_prompt",
    "guess_kind",
    "load_prior",
    "load_prior_with",
    "no_progress_bars",
    "read_json",
    "read_schedule",
    "split_words",
    "toy_folder",
    "toy_subject",
]


@dataclass(frozen=True, eq=False)
class Prior:
    """A frozen diffusion model with what must be known to condition it.

    Args:
        kind: how it is conditioned. folder: the folder or file that it came from; loader: the same, to read.
        vector: what its class embedding reads, None where it has none.
        known_words: the whole vocabulary of a toy model, None where any prompt will do.
        negative_prompt: the one to use where nobody asks for another; None means the recipes' usual one.
        image_resize: see conditioning.clip_pixels.
        text_loras: what is added to the text encoder whenever it is loaded (see lora.apply_lora).
    """

    name: str
    kind: PriorKind
    folder: Path
    loader: Loader
    denoiser: UNetDenoiser
    vector: VectorKind | None = None
    known_words: frozenset[str] | None = None
    negative_prompt: str | None = None
    license: str = "unknown"
    image_resize: ImageResize = "corners"
    text_loras: tuple[TextLora, ...] = ()

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Return the text encoder's last hidden states [n, L, D], float32, on the denoiser's device.

        The encoder is loaded for this call and freed afterwards: it is not needed again in a run.
        """
        tokenizer, encoder = self.loader.text_encoder(self.denoiser.dtype, self.denoiser.device)
        add_text_loras(encoder, self.text_loras)
        hidden = encode_prompts(tokenizer, encoder, prompts)
        del encoder
        if self.denoiser.device.type == "cuda":
            torch.cuda.empty_cache()
        return hidden


def load_prior(
    path: Path | str,
    kind: PriorKind | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    config: Mapping[str, Any] | Path | str | None = None,
    tiny_vae: Path | str | None = None,
    image_size: tuple[int, int] | None = None,
    n_frames: int | None = None,
) -> Prior:
    """Load the denoiser (and the autoencoder) of a model.

    Args:
        path: a folder in diffusers' format, a checkpoint of Stable Diffusion 1 or 2, MVDream or Zero123, or a file of
            networks under diffusers' names.
        kind: overrides what the files say of themselves.
        config: for files, the model's configuration or where it is; None: the .json or .yaml of the file's name
            beside it, if there is one (see single_file.py).
        tiny_vae: folder of an AutoencoderTiny that takes the autoencoder's place.
        image_size, n_frames: (height, width) of the model's images, frames of its videos, instead of its own.
    """
    loader = open_loader(path, config)
    metadata = loader.metadata(kind)
    metadata = metadata if image_size is None else replace(metadata, image_size=image_size)
    metadata = metadata if n_frames is None else replace(metadata, n_frames=n_frames)
    alphas_bar, prediction_type = loader.schedule()
    unet = loader.unet(dtype, device)
    if metadata.group_attention:
        attend_across_views(unet)
    denoiser = UNetDenoiser(
        unet=unet,
        noise=variance_preserving(alphas_bar),
        device=torch.device(device),
        prediction_type=prediction_type,
        image_size=metadata.image_size,
        n_frames=metadata.n_frames,
        vae=_load_vae(loader, tiny_vae, dtype, device),
        group_attention=metadata.group_attention,
    )
    return Prior(
        name=metadata.name,
        kind=metadata.kind,
        folder=loader.path,
        loader=loader,
        denoiser=denoiser,
        vector=metadata.vector,
        known_words=metadata.known_words,
        negative_prompt=metadata.negative_prompt,
        license=metadata.license,
        image_resize=metadata.image_resize,
    )


@dataclass(frozen=True)
class PriorExtras:
    """What is added to a run's models, or put in place of their parts.

    Args:
        image_lora: a LoRA file for the text-to-image model, and its strength.
        tiny_vae: folder of an AutoencoderTiny for all models that encode images.
    """

    image_lora: Path | str | None = None
    image_lora_strength: float = 1.0
    tiny_vae: Path | str | None = None


def load_prior_with(
    path: Path | str, kind: PriorKind, device: torch.device | str, dtype: torch.dtype, extras: PriorExtras
) -> Prior:
    """Load a model with the extras that are for its kind."""
    tiny_vae = extras.tiny_vae if open_loader(path).vae_scaling() is not None else None
    prior = load_prior(path, kind, device, dtype, tiny_vae=tiny_vae)
    if kind == "image" and extras.image_lora is not None:
        prior = apply_lora(prior, extras.image_lora, extras.image_lora_strength)
    return prior


def _load_vae(loader: Loader, tiny_vae: Path | str | None, dtype: torch.dtype, device: torch.device | str):
    if tiny_vae is None:
        return loader.vae(dtype, device)
    scaling = loader.vae_scaling()
    if scaling is None:
        raise PriorError(f"{loader.path} works on pixels: there is no autoencoder that a tiny one could replace")
    return load_tiny_vae(tiny_vae, scaling, dtype, device)


def toy_folder(kind: PriorKind) -> Path:
    """Where the toy prior of this kind lies inside the package."""
    return Path(__file__).parent / "toy" / kind


def toy_subject() -> Path:
    """Where the LoRA of the toy image prior's personal subject, "a sks snowman", lies inside the package."""
    return Path(__file__).parent / "toy" / "subject"


def check_prompt(prior: Prior, prompt: str) -> None:
    """Raise PriorError for an empty prompt or, with a toy prior, one with words that it was not taught."""
    if not prompt.strip():
        raise PriorError("the prompt is empty: say what to make, for example 'a red cube is jumping'")
    if prior.known_words is None:
        return
    unknown = [word for word in split_words(prompt) if word not in prior.known_words]
    if unknown:
        raise PriorError(
            f"the {prior.name} prior does not know {', '.join(repr(w) for w in dict.fromkeys(unknown))}; "
            f"its words are: {', '.join(sorted(prior.known_words - {','}))}"
        )


def split_words(prompt: str) -> list[str]:
    """The words of a prompt as the toy tokenizers see them: lower case, commas on their own."""
    return prompt.lower().replace(",", " , ").split()
