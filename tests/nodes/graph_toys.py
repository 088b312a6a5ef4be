"""The package's toy priors as the objects that ComfyUI's loaders give: MODEL, CLIP and VAE of its real classes.

Run inside ComfyUI's Python. No loader of ComfyUI knows these networks (diffusers' UNet2DConditionModel on pixels), so
they are put into its classes here: BaseModel with its model sampling and ModelPatcher, CLIP, and the VAE of pixels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import torch
from graph_models import Three
from torch import Tensor, nn


class ToyNetwork(nn.Module):
    """A toy's UNet with the calls of ComfyUI's networks; takes know their frames' times by their places."""

    dtype = torch.float32

    def __init__(self, loaded: Any, times: Any) -> None:
        super().__init__()
        self.unet, self.times = loaded.denoiser.unet, times

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, transformer_options: dict, **_: Any) -> Tensor:
        """Predict v; x [n, 3, h, w] or [n, 3, F, h, w]."""
        if x.ndim == 4:
            return self.unet(x, timesteps, context).sample
        n, frames = len(x), x.shape[2]
        vector = self.times(torch.linspace(0, 1, frames).expand(n, -1))
        answer = self.unet(
            x.movedim(2, 1).flatten(0, 1),
            timesteps.repeat_interleave(frames),
            context.repeat_interleave(frames, 0),
            class_labels=vector.flatten(0, 1),
            cross_attention_kwargs={"n_views": frames},
        ).sample
        return answer.unflatten(0, (n, frames)).movedim(1, 2)


class PixelVideos(comfy.latent_formats.ChromaRadiance):
    """Pixels of videos; nothing is scaled."""

    latent_dimensions = 3


class ToyTokenizer:
    """Texts stay texts until they are encoded."""

    def __init__(self, embedding_directory=None, tokenizer_data=None) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> str:
        """Nothing to do."""
        return text


class ToyText(nn.Module):
    """The toy's text encoder behind the calls of ComfyUI's."""

    dtypes = (torch.float32,)

    def __init__(self, loaded: Any) -> None:
        super().__init__()
        self.encode = loaded.encode_text
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)

    def set_clip_options(self, options: dict) -> None:
        """It has none."""

    def reset_clip_options(self) -> None:
        """It has none."""

    def encode_token_weights(self, text: str) -> tuple[Tensor, None]:
        """Tokens [1, L, D] and no pooled output."""
        return self.encode([text]), None


def toy(folder: Any, load_prior: Any, times: Any) -> Three:
    """MODEL, CLIP and VAE of the toy in a folder. `load_prior`, `times`: the package's own functions."""
    loaded = load_prior(folder)
    moving = loaded.kind == "video"
    target = comfy.supported_models_base.ClipTarget(ToyTokenizer, lambda dtype, device, model_options: ToyText(loaded))

    class Config(comfy.supported_models_base.BASE):
        unet_config: ClassVar[dict] = {}
        latent_format = PixelVideos if moving else comfy.latent_formats.ChromaRadiance

        def clip_target(self, state_dict: dict) -> Any:
            return target

    v = comfy.model_base.ModelType.V_PREDICTION
    kind = comfy.model_base.WAN21 if moving else comfy.model_base.BaseModel  # of the family whose node takes it
    config = Config({})
    base = comfy.model_base.BaseModel(config, v, unet_model=lambda **_: ToyNetwork(loaded, times))
    base.__class__ = type(kind.__name__, (comfy.model_base.BaseModel,), {})
    base.model_sampling.set_sigmas(loaded.denoiser.noise.sigmas)
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(base, cpu, cpu)
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    if moving:
        vae.latent_dim, vae.downscale_ratio = 3, (lambda n: n, 1, 1)
    return Three(model, comfy.sd.CLIP(target), vae)
