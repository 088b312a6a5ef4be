"""A private copy of a graph's autoencoder, through which gradients go in bounded memory.

ComfyUI makes weights in inference mode, which no gradient passes; `vae.encode` falls back to tiles, and loses the
gradient, where memory runs out. So the networks are copied and called themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_BLOCKS = ("Resnet", "ResBlock", "ResidualBlock", "Downsample", "Resample", "SpaceToDepth", "AttnBlock")
"""Parts of the class names of an encoder's blocks: what they are given is kept, what they compute is computed again."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """An autoencoder whose latents are those that the model reads."""

    network: nn.Module
    vae: Any  # of the graph: its sizes and how pixels are scaled
    latents: Any  # the model's latent format: how latents are scaled

    @staticmethod
    def copied(vae: Any, latents: Any) -> Encoder:
        """Copy a VAE's network so that gradients can pass it; its dtype stays."""
        with torch.inference_mode(False):
            network = copy.deepcopy(vae.first_stage_model)
            for module in network.modules():
                for name, value in module._parameters.items():
                    if value is not None:
                        module._parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=False)
                for name, value in module._buffers.items():
                    if value is not None:
                        module._buffers[name] = value.detach().clone()
            scaling = copy.copy(latents)
            for name, value in vars(latents).items():
                if isinstance(value, Tensor):
                    setattr(scaling, name, value.detach().clone())
        if hasattr(network, "parallel"):  # a tiny autoencoder of videos: frame after frame would cut the gradient
            network.parallel = True
        return Encoder(network.eval(), vae, scaling)

    @property
    def of_videos(self) -> bool:
        """Whether frames are encoded together, several into one."""
        return self.vae.latent_dim == 3

    @property
    def _place(self) -> tuple[torch.device, torch.dtype]:
        weight = next(self.network.parameters())
        return weight.device, weight.dtype

    def latent_shape(self, size: tuple[int, int], n_frames: int | None) -> tuple[int, ...]:
        """The shape [1, c, (f,) h, w] of what is encoded from so many pixels and frames."""
        ratio = self.vae.downscale_ratio
        if not self.of_videos:
            return (1, self.vae.latent_channels, size[0] // ratio, size[1] // ratio)
        in_time, *in_space = ratio
        return (1, self.vae.latent_channels, in_time(n_frames), size[0] // in_space[0], size[1] // in_space[1])

    def encode(self, pixels: Tensor, checkpointed: bool = False) -> Tensor:
        """Encode [n, 3, (F,) H, W] in [0, 1]; differentiable. `checkpointed`: in less memory, with more work."""
        device, dtype = self._place
        scaled = self.vae.process_input(pixels).to(device, dtype)
        with torch.autocast(device.type, enabled=False), _checkpointing(self.network, checkpointed):
            z = self.network.encode(scaled)
        return self.latents.process_in(z.float())

    def decode(self, z: Tensor) -> Tensor:
        """Decode [n, c, (f,) h, w] to [n, 3, (F,) H, W] in [0, 1]."""
        device, dtype = self._place
        with torch.autocast(device.type, enabled=False):
            images = self.network.decode(self.latents.process_out(z).to(device, dtype))
        return images.float() / 2 + 0.5


@contextmanager
def _checkpointing(network: nn.Module, wanted: bool) -> Iterator[None]:
    """While inside, compute an encoder's activations again in the backward pass instead of keeping them."""
    if not wanted:
        yield
        return
    changed = list(_with_cache(network)) or list(_blocks(network))
    for module, forward in changed:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in changed:
            del module.forward


def _with_cache(network: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    """Encoders that are called for a few frames at a time and hand features on in a list (Wan): each call is one piece.

    The list is changed in place, so what a call finds in it has to be given to the computation, and what it leaves be
    taken from it: then the second computation finds what the first one found.
    """
    encoder = getattr(network, "encoder", None)
    if encoder is None or not hasattr(encoder, "conv1") or not type(network).__name__.startswith("WanVAE"):
        return
    plain = encoder.forward

    def forward(x: Tensor, feat_cache: list | None = None, feat_idx: list | None = None, **given: Any):
        def piece(x: Tensor, *found: Any) -> tuple:
            cache = list(found) if feat_cache is not None else None
            out = plain(x, feat_cache=cache, feat_idx=[0], **given)
            return (out, *(cache or ()))

        out, *left = checkpoint(piece, x, *(feat_cache or ()), use_reentrant=False)
        if feat_cache is not None:
            feat_cache[:] = left
        return out

    yield encoder, forward


def _blocks(network: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    """The outermost blocks of an encoder."""
    encoder = getattr(network, "encoder", network)

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if any(word in type(child).__name__ for word in _BLOCKS):
                yield child
            else:
                yield from walk(child)

    for block in walk(encoder):
        plain = block.forward
        yield block, lambda *given, plain=plain, **named: checkpoint(plain, *given, use_reentrant=False, **named)
