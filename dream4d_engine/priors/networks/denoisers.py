"""Any diffusers UNet, seen as `denoise(x, sigma, conditions) -> x0`.

The letters are those of guidance/denoiser.py: x = z + sigma * eps. A diffusers model wants the variance preserving
x_t = x / sqrt(1 + sigma^2) and an integer timestep, and predicts eps, v or z; a flow wants its own mixture of image and
noise, and its time. The conversions are done in float32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ...guidance.denoiser import Conditions, split_conditions
from ...guidance.execution import Execution
from ...guidance.noise import NoiseSchedule
from .execution import (
    PLAIN,
    Capture,
    Runtime,
    bring_back,
    can_compile,
    compile_blocks,
    in_slices,
    offload,
    without_autocast,
)
from .frozen import fuse_gates, speed_up

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
FLOW_TIMESTEPS = 1000
"""What flows are told of t = 1."""


def flow_input(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """What a rectified flow (2209.03003) sees of x = z + sigma * eps [B, ...], and what it is told of its time [B].

    (1 - t) z + t eps with t = sigma / (1 + sigma), and 1000 t, in float32.
    """
    sigma = sigma.to(x.device).float()
    return x.float() / (1 + sigma).reshape(-1, *[1] * (x.ndim - 1)), FLOW_TIMESTEPS * sigma / (1 + sigma)


def predicted_clean(output: Tensor, x: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """Turn a model's output into its guess of z; output and x [B, ...], sigma [B].

    With alpha_bar = 1 / (1 + sigma^2): eps-models give x - sigma * eps; v = sqrt(alpha_bar) * eps -
    sqrt(1 - alpha_bar) * z (2202.00512) gives x / (1 + sigma^2) - v * sigma / sqrt(1 + sigma^2). A flow's velocity
    eps - z (2209.03003) gives (x - sigma * velocity) / (1 + sigma).
    """
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    if prediction_type == "epsilon":
        return x - sigma * output
    if prediction_type == "v_prediction":
        variance = 1 + sigma**2
        return x / variance - output * sigma * variance.rsqrt()
    if prediction_type == "flow":
        return (x - sigma * output) / (1 + sigma)
    return output


@dataclass(frozen=True, eq=False)
class UNetDenoiser:
    """A frozen UNet2DConditionModel or UNet3DConditionModel as a Denoiser (see guidance/denoiser.py).

    Args:
        unet: the network, in eval mode. A UNet3DConditionModel gets whole groups [B, c, F, h, w]; its tokens are
            those of a group's first frame.
        noise: of T timesteps, or a flow's. prediction_type: what the network's output means.
        device: where the work is done (the weights may wait elsewhere).
        image_size: (height, width) in pixels. n_frames: views or frames of a group, None for single images.
        vae: an AutoencoderKL (or one with the same calls: Any, for torch's stubs know none of a module's own), or
            None where z = 2 * image - 1 is the image itself.
        group_attention: the UNet2DConditionModel's self-attention runs over a group (see view_attention.py).
        execution, capture: how much runs at once, and how; they change memory and time, nothing else.
    """

    unet: nn.Module
    noise: NoiseSchedule
    prediction_type: PredictionType
    image_size: tuple[int, int]
    n_frames: int | None = None
    vae: Any = None
    group_attention: bool = False
    execution: Execution = field(default_factory=Execution)
    capture: Capture = PLAIN
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(f"prediction_type must be one of {get_args(PredictionType)}, got {self.prediction_type!r}")
        if (self.prediction_type == "flow") != (self.noise.n_levels is None):
            raise ValueError("a flow's velocity goes with a flow's noise: one of the two is of another kind of model")

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def images_apart(self) -> bool:
        """A UNet of videos has the autoencoder of a UNet of images."""
        return True

    def encode(self, images: Tensor, carried: Tensor | None = None) -> Tensor:
        """Encode [B, F, 3, H, W] in [0, 1]; differentiable. With a VAE: the mean, times its scaling factor."""
        if self.vae is None:
            return 2 * images - 1
        with without_autocast(self.device):
            each = None if carried is None else carried.flatten()
            z = in_slices(self._encode, images.flatten(0, 1), self.execution, self.capture, each)
        return z.unflatten(0, images.shape[:2])

    def _encode(self, images: Tensor) -> Tensor:
        """Encode [n, 3, H, W] in [0, 1]."""
        z = self.vae.encode((2 * images - 1).to(_dtype_of(self.vae))).latent_dist.mode()
        return z.float() * self.vae.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Decode to [B, F, 3, H, W] in [0, 1] (not clamped); differentiable."""
        if self.vae is None:
            return z / 2 + 0.5
        with without_autocast(self.device):
            images = in_slices(self._decode, z.flatten(0, 1), self.execution, self.capture)
        return images.unflatten(0, z.shape[:2])

    def _decode(self, z: Tensor) -> Tensor:
        """Decode [n, c, h, w]."""
        scaled = (z / self.vae.config.scaling_factor).to(_dtype_of(self.vae))
        return self.vae.decode(scaled).sample.float() / 2 + 0.5

    def run_as(self, execution: Execution) -> UNetDenoiser:
        """Return the denoiser run in another way; its weights move to or from main memory if that asks for it."""
        if execution.offload != self.execution.offload:
            move = offload if execution.offload else bring_back
            move(self.unet, self.device)
        return replace(self, execution=execution)

    def forget(self) -> None:
        """Drop the graphs that were captured with the weights' old places."""
        self.capture.forget()

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Predict z [B, F, c, h, w] from x = z + sigma * eps of the same shape; sigma [B]."""
        at_once = self.execution.groups_at_once or len(x)
        with without_autocast(self.device):
            pieces = zip(x.split(at_once), sigma.split(at_once), split_conditions(conditions, at_once), strict=True)
            parts = [self._denoise(*piece) for piece in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        x, sigma = x.float(), sigma.to(x.device).float()
        if self.noise.n_levels is None:
            noisy, timestep = flow_input(x, sigma)
        else:
            timestep = (self.noise.share_of(sigma) * self.noise.n_levels).round().long()
            noisy = x * (1 + sigma**2).rsqrt()[:, None, None, None, None]
        if conditions.concat is not None:
            noisy = torch.cat((noisy, conditions.concat.to(noisy)), 2)
        inputs = [noisy.to(self.dtype), timestep, conditions.tokens.to(self.dtype)]
        if conditions.vector is not None:
            inputs.append(conditions.vector.to(self.dtype))
        # a network whose weights come and go can't be captured
        run = PLAIN if self.execution.offload else self.capture
        output = run(self._forward, *inputs).float()
        # models with a learned variance (IF) have it in further channels
        return predicted_clean(output[:, :, : x.shape[2]], x, sigma, self.prediction_type)

    def _forward(self, noisy: Tensor, timestep: Tensor, tokens: Tensor, vector: Tensor | None = None) -> Tensor:
        """Run the network. noisy [B, F, c, h, w], timestep [B], tokens [B, F, L, D], vector [B, F, K] or None."""
        n_groups, n_frames = noisy.shape[:2]
        if is_3d(self.unet):
            output = self.unet(noisy.transpose(1, 2), timestep, tokens[:, 0], return_dict=False)[0]
            return output.transpose(1, 2)
        vector = None if vector is None else vector.flatten(0, 1)
        added = None
        if vector is not None and _config(self.unet).get("addition_embed_type") == "text_time":  # Stable Diffusion XL
            # (height, width) of the original, its cut-out's corner, and the target's size: 2307.01952, section 2.2.
            # Filled in, not copied: a CUDA graph can't copy from the CPU.
            sizes = [noisy.new_full((len(vector), 1), float(n)) for n in (*self.image_size, 0, 0, *self.image_size)]
            added, vector = {"text_embeds": vector, "time_ids": torch.cat(sizes, 1)}, None
        output = self.unet(
            noisy.flatten(0, 1),
            timestep.repeat_interleave(n_frames),
            tokens.flatten(0, 1),
            class_labels=vector,
            added_cond_kwargs=added,
            cross_attention_kwargs={"n_views": n_frames} if self.group_attention else None,
            return_dict=False,
        )[0]
        return output.unflatten(0, (n_groups, n_frames))


def _config(network: nn.Module) -> Mapping[str, Any]:
    """What a network of diffusers was built with; nothing for another one."""
    config = getattr(network, "config", {})
    return config if isinstance(config, Mapping) else {}


def is_3d(unet: nn.Module) -> bool:
    """Whether the network wants [B, c, F, h, w]: its first convolution does not tell, its class does."""
    return type(unet).__name__ == "UNet3DConditionModel"


def _dtype_of(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def prepared(denoiser: UNetDenoiser, runtime: Runtime) -> UNetDenoiser:
    """Return the denoiser as it is to run."""
    return accelerated(denoiser, runtime.capture, runtime.compiled) if runtime.accelerated else denoiser


WORTH_COMPILING = 10**8
"""Parameters of a UNet from which on compiling takes less time than it saves."""


def accelerated(denoiser: UNetDenoiser, capture: Capture = PLAIN, compiled: bool = True) -> UNetDenoiser:
    """Return the denoiser running fast on a GPU; its networks are changed in place and keep their weights.

    `capture`: to be shared by the denoisers of a run. `compiled`: also compile the transformer blocks of
    large UNets.
    """
    speed_up(denoiser.unet)
    if denoiser.vae is not None:
        speed_up(denoiser.vae)
    n_parameters = sum(p.numel() for p in denoiser.unet.parameters())
    if compiled and n_parameters >= WORTH_COMPILING and can_compile(denoiser.device):
        compile_blocks(denoiser.unet)
    else:
        fuse_gates(denoiser.unet)
    torch.backends.cudnn.benchmark = True  # shapes don't change from step to step
    return replace(denoiser, capture=capture)
