"""Any diffusers UNet, seen as `denoise(x, sigma, conditions) -> x0`.

The letters are those of guidance/denoiser.py: x = z + sigma * eps. A diffusers model wants the variance preserving
x_t = x / sqrt(1 + sigma^2) and an integer timestep, and predicts eps, v or z; the conversions are done in float32
whatever the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..guidance.denoiser import Conditions, timestep_of_sigma

PredictionType = Literal["epsilon", "v_prediction", "sample"]


def predicted_clean(output: Tensor, x: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """Turn a model's output into its guess of z; output and x [B, ...], sigma [B].

    With alpha_bar = 1 / (1 + sigma^2): eps-models give x - sigma * eps; v = sqrt(alpha_bar) * eps -
    sqrt(1 - alpha_bar) * z (2202.00512) gives x / (1 + sigma^2) - v * sigma / sqrt(1 + sigma^2).
    """
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    if prediction_type == "epsilon":
        return x - sigma * output
    if prediction_type == "v_prediction":
        variance = 1 + sigma**2
        return x / variance - output * sigma * variance.rsqrt()
    return output


@dataclass(frozen=True, eq=False)
class UNetDenoiser:
    """A frozen UNet2DConditionModel or UNet3DConditionModel as a Denoiser (see guidance/denoiser.py).

    Args:
        unet: the network, in eval mode. A UNet3DConditionModel gets whole groups [B, c, F, h, w]; its tokens are
            those of a group's first frame.
        alphas_bar: [T] of the training schedule. prediction_type: what the network's output means.
        image_size: (height, width) in pixels. n_frames: views or frames of a group, None for single pictures.
        vae: an AutoencoderKL (or one with the same calls), or None where z = 2 * picture - 1 is the picture itself.
        group_attention: the UNet2DConditionModel's self-attention runs over a group (see view_attention.py).
    """

    unet: nn.Module
    alphas_bar: Tensor
    prediction_type: PredictionType
    image_size: tuple[int, int]
    n_frames: int | None = None
    vae: nn.Module | None = None
    group_attention: bool = False

    def __post_init__(self) -> None:
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(f"prediction_type must be one of {get_args(PredictionType)}, got {self.prediction_type!r}")

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def encode(self, pictures: Tensor) -> Tensor:
        """Encode [B, F, 3, H, W] in [0, 1]; differentiable. With a VAE: the mean, times its scaling factor."""
        signed = 2 * pictures - 1
        if self.vae is None:
            return signed
        flat = signed.flatten(0, 1).to(next(self.vae.parameters()).dtype)
        z = self.vae.encode(flat).latent_dist.mode().float() * self.vae.config.scaling_factor
        return z.unflatten(0, pictures.shape[:2])

    def decode(self, z: Tensor) -> Tensor:
        """Decode to [B, F, 3, H, W] in [0, 1] (not clamped); differentiable."""
        if self.vae is None:
            return z / 2 + 0.5
        flat = (z.flatten(0, 1) / self.vae.config.scaling_factor).to(next(self.vae.parameters()).dtype)
        return (self.vae.decode(flat).sample.float() / 2 + 0.5).unflatten(0, z.shape[:2])

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Predict z [B, F, c, h, w] from x = z + sigma * eps of the same shape; sigma [B]."""
        x, sigma = x.float(), sigma.to(x.device).float()
        timestep = timestep_of_sigma(sigma, self.alphas_bar.to(x.device))
        noisy = x * (1 + sigma**2).rsqrt()[:, None, None, None, None]
        if conditions.concat is not None:
            noisy = torch.cat((noisy, conditions.concat.to(noisy)), 2)
        output = self._forward(noisy.to(self.dtype), timestep, conditions).float()
        # models with a learned variance (IF) have it in further channels
        return predicted_clean(output[:, :, : x.shape[2]], x, sigma, self.prediction_type)

    def _forward(self, noisy: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """Run the network. noisy [B, F, c, h, w], timestep [B]; returns [B, F, c', h, w]."""
        n_groups, n_frames = noisy.shape[:2]
        tokens = conditions.tokens.to(noisy.dtype)
        if is_3d(self.unet):
            output = self.unet(noisy.transpose(1, 2), timestep, tokens[:, 0], return_dict=False)[0]
            return output.transpose(1, 2)
        vector = None if conditions.vector is None else conditions.vector.to(noisy.dtype).flatten(0, 1)
        output = self.unet(
            noisy.flatten(0, 1),
            timestep.repeat_interleave(n_frames),
            tokens.flatten(0, 1),
            class_labels=vector,
            cross_attention_kwargs={"n_views": n_frames} if self.group_attention else None,
            return_dict=False,
        )[0]
        return output.unflatten(0, (n_groups, n_frames))


def is_3d(unet: nn.Module) -> bool:
    """Whether the network wants [B, c, F, h, w]: its first convolution does not tell, its class does."""
    return type(unet).__name__ == "UNet3DConditionModel"
