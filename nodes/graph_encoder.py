"""A private copy of a graph's autoencoder, through which gradients go in bounded memory.

ComfyUI makes weights in inference mode, which no gradient passes; `vae.encode` falls back to tiles, and loses the
gradient, where memory runs out. So the networks are copied and called themselves.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dream4d_engine.guidance.execution import Execution
from ..dream4d_engine.priors.networks.checkpointing import checkpointing
from .graph_fused import encode_fused, fused_encoder

_ORDERS = ("comfy_cast_weights", "weight_function", "bias_function", "model_loaded_weight_memory")


@dataclass(frozen=True, eq=False)
class Encoder:
    """An autoencoder whose latents are those that the model reads."""

    network: Any  # an nn.Module of one of ComfyUI's classes, with encode and decode
    vae: Any  # of the graph: its sizes and how pixels are scaled
    latents: Any  # the model's latent format: how latents are scaled
    fused: Any = None  # the encoder, where diffusers' class of it runs faster; the network has none then

    @staticmethod
    def copied(vae: Any, latents: Any, device: torch.device | None = None, accelerated: bool = False) -> Encoder:
        """Copy a VAE's network so that gradients can pass it, in the dtype it works in.

        `device`: where to; None leaves it there. With dynamic memory weights keep their file's dtype until they are
        used: half precision, which a scaled gradient is too large for. `accelerated`: with the encoder's layers
        fused, where they are known.
        """
        with torch.inference_mode(False):
            network = _without_traces(vae.first_stage_model)
            for module in network.modules():
                for name, value in module._parameters.items():
                    if value is not None:
                        module._parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=False)
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = buffer.detach().clone()
            scaling = copy.copy(latents)
            for name, value in vars(latents).items():
                if isinstance(value, Tensor):
                    setattr(scaling, name, value.detach().clone())
        if hasattr(network, "parallel"):  # a tiny autoencoder of videos: frame after frame would cut the gradient
            network.parallel = True
        # a VAE that waits for its turn lies in main memory
        network = network.eval().to(device, vae.vae_dtype)
        fused = fused_encoder(network, vae.output_channels) if accelerated else None
        if fused is not None:  # its weights are once on the GPU, not twice
            network.encoder = None
        return Encoder(network, vae, scaling, fused)

    @property
    def networks(self) -> tuple[Any, ...]:
        """All that takes memory."""
        return (self.network,) if self.fused is None else (self.network, self.fused)

    @property
    def of_videos(self) -> bool:
        """Whether frames are encoded together, several into one."""
        return self.vae.latent_dim == 3

    @property
    def _place(self) -> tuple[torch.device, torch.dtype]:
        weight = next(self.network.parameters())
        return weight.device, weight.dtype

    def latent_shape(self, size: tuple[int, int], n_frames: int | None) -> tuple[int, ...]:
        """The shape [1, c, (f,) h, w] of what is encoded from so many pixels and frames; of an orbit [f, c, h, w]."""
        ratio = self.vae.downscale_ratio
        if not self.of_videos:
            return (n_frames or 1, self.vae.latent_channels, size[0] // ratio, size[1] // ratio)
        in_time, *in_space = ratio
        return (1, self.vae.latent_channels, in_time(n_frames), size[0] // in_space[0], size[1] // in_space[1])

    def encode(self, pixels: Tensor, execution: Execution | None = None, frames: range | None = None) -> Tensor:
        """Encode [n, 3, (F,) H, W] in [0, 1]; differentiable. `execution`: of videos, in less memory with more work.

        `frames`: those of a video that a gradient is asked for; None: all.
        """
        device, dtype = self._place
        scaled, way = self.vae.process_input(self._whole(pixels)).to(device, dtype), execution or Execution()
        with torch.autocast(device.type, enabled=False):
            if self.fused is not None:
                z = encode_fused(self.fused, scaled, way, frames)
            else:
                with checkpointing(self.network, way.images_kept is not None, frames):
                    z = self.network.encode(scaled)
        return self.latents.process_in(z.float())

    def _whole(self, pixels: Tensor) -> Tensor:
        """Pixels with what a VAE reads beside their colours: opacity, filled up as `vae.encode` does."""
        lacking = self.vae.output_channels - pixels.shape[1]
        if lacking <= 0:
            return pixels
        filled = self.vae.pad_channel_value or 0.0
        return torch.cat((pixels, pixels.new_full((len(pixels), lacking, *pixels.shape[2:]), filled)), 1)

    def decode(self, z: Tensor) -> Tensor:
        """Decode [n, c, (f,) h, w] to [n, 3, (F,) H, W] in [0, 1]."""
        device, dtype = self._place
        with torch.autocast(device.type, enabled=False):
            images = self.network.decode(self.latents.process_out(z).to(device, dtype))[:, :3].float().to(z.device)
        # as the VAE scales its images, without the clamping: most have them in [-1, 1], some tiny ones in [0, 1]
        zero, half = (float(self.vae.process_output(torch.full((1,), value))) for value in (0.0, 0.5))
        return images * ((half - zero) / 0.5) + zero


def _without_traces(network: Any) -> Any:
    """Copy deeply, but none of what ComfyUI's memory management hangs on modules.

    Those are handles of its own allocator, which can't be copied, and orders to fetch weights from elsewhere.
    """

    def traces(module: nn.Module) -> list[str]:
        return [n for n in vars(module) if n.startswith(("dynamic_", "_v", "_pin", "prev_comfy")) or n in _ORDERS]

    memo: dict[int, Any] = {}
    for module in network.modules():
        for name in traces(module):
            value = vars(module)[name]
            if value is not None and not isinstance(value, bool | int | float | str):
                memo[id(value)] = ()  # stands for it in the copy
    copied = copy.deepcopy(network, memo)
    for module in copied.modules():
        for name in traces(module):
            delattr(module, name)
        for name in ("weight_function", "bias_function"):
            if hasattr(module, name):
                setattr(module, name, [])
    return copied
