"""Diffusion models from folders and files.

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

from .errors import PriorError
from .formats.identify import open_loader
from .formats.loaders import ImageResize, Loader, VectorKind
from .formats.lora_files import read_lora
from .formats.tiny_vae import TinyDecoder, TinyDecoderVAE, check_tiny_vae, folder_of, load_tiny_vae
from .handle import PriorKind
from .lora import TextLora, add_layers, add_text_loras, check_strength
from .networks.denoisers import UNetDenoiser
from .networks.text import encode_prompts
from .networks.view_attention import attend_across_views


@dataclass(frozen=True, eq=False)
class LoadedPrior:
    """A frozen diffusion model with what must be known to condition it (see loaders.Metadata)."""

    name: str
    kind: PriorKind
    loader: Loader  # of the folder or file that it came from
    denoiser: UNetDenoiser
    vector: VectorKind | None = None
    known_words: frozenset[str] | None = None
    negative_prompt: str | None = None
    license: str = "unknown"
    image_resize: ImageResize = "corners"
    text_loras: tuple[TextLora, ...] = ()  # added to the text encoder whenever it is loaded

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
    tiny_vae: Path | str | TinyDecoder | None = None,
    image_size: tuple[int, int] | None = None,
    n_frames: int | None = None,
) -> LoadedPrior:
    """Load the denoiser (and the autoencoder) of a model.

    Args:
        path: a folder in diffusers' format, a checkpoint of Stable Diffusion 1 or 2, MVDream or Zero123, or a file of
            networks under diffusers' names.
        kind: overrides what the files say of themselves.
        config: for files, the model's configuration or where it is; None: the .json or .yaml of the file's name
            beside it, if there is one (see single_file.py).
        tiny_vae: folder of an AutoencoderTiny that takes the autoencoder's place, or its decoder's alone.
        image_size, n_frames: (height, width) of the model's images, frames of its videos, instead of its own.
    """
    loader = open_loader(path, config)
    metadata = loader.metadata(kind)
    metadata = metadata if image_size is None else replace(metadata, image_size=image_size)
    metadata = metadata if n_frames is None else replace(metadata, n_frames=n_frames)
    noise, prediction_type = loader.schedule()
    unet = loader.unet(dtype, device)
    if metadata.group_attention:
        attend_across_views(unet)
    denoiser = UNetDenoiser(
        unet=unet,
        noise=noise,
        device=torch.device(device),
        prediction_type=prediction_type,
        image_size=metadata.image_size,
        n_frames=metadata.n_frames,
        vae=_load_vae(loader, tiny_vae, dtype, device),
        group_attention=metadata.group_attention,
    )
    return LoadedPrior(
        name=metadata.name,
        kind=metadata.kind,
        loader=loader,
        denoiser=denoiser,
        vector=metadata.vector,
        known_words=metadata.known_words,
        negative_prompt=metadata.negative_prompt,
        license=metadata.license,
        image_resize=metadata.image_resize,
    )


def apply_lora(prior: LoadedPrior, path: Path | str, strength: float = 1.0) -> LoadedPrior:
    """Add a LoRA to a prior's own UNet, and to its text encoder whenever that is loaded; return the prior.

    Nothing is changed where the LoRA does not fit one of the two: PriorError names the layers. A second LoRA adds to
    the first, and the same one with the negative strength takes it away again (up to rounding).
    """
    check_strength(strength)
    parts = read_lora(path)
    text = TextLora(Path(path), parts["text_encoder"], strength)
    if text.layers:
        _, encoder = prior.loader.text_encoder(prior.denoiser.dtype, prior.denoiser.device)
        add_text_loras(encoder, (*prior.text_loras, text))  # a trial, for what it says
        del encoder
    add_layers(prior.denoiser.unet, parts["unet"], strength, f"{path} does not fit the model {prior.name!r}")
    return replace(prior, text_loras=(*prior.text_loras, text)) if text.layers else prior


def _load_vae(
    loader: Loader, tiny_vae: Path | str | TinyDecoder | None, dtype: torch.dtype, device: torch.device | str
):
    full = loader.vae(dtype, device) if tiny_vae is None or isinstance(tiny_vae, TinyDecoder) else None
    if tiny_vae is None:
        return full
    scaling, latents = loader.vae_scaling(), loader.latents()
    if scaling is None or latents is None:
        raise PriorError(f"{loader.path} works on pixels: there is no autoencoder that a tiny one could replace")
    folder = folder_of(tiny_vae)
    check_tiny_vae(folder, latents, loader.path)
    tiny = load_tiny_vae(folder, scaling, dtype, device)
    return tiny if full is None else TinyDecoderVAE(full, tiny)
