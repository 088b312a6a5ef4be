"""Activation checkpointing (1604.06174) of encoders: less memory in the backward pass, one forward pass more."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_BLOCKS = ("Resnet", "ResBlock", "ResidualBlock", "Downsample", "Resample", "SpaceToDepth", "AttnBlock")
"""Parts of the class names of an encoder's blocks: what they are given is kept, what they compute is computed again."""


@contextmanager
def checkpointing(network: nn.Module, wanted: bool = True) -> Iterator[None]:
    """While inside, an autoencoder's encoder keeps no activations within its pieces: blocks, or calls with a cache."""
    encoder = getattr(network, "encoder", network)
    changed: list[tuple[nn.Module, Callable]] = []
    if wanted:
        has_cache = "feat_cache" in inspect.signature(encoder.forward).parameters
        changed = [(encoder, _with_cache(encoder.forward))] if has_cache else list(_blocks(encoder))
    for module, forward in changed:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in changed:
            del module.forward  # the class's own shows again


def _with_cache(plain: Callable) -> Callable:
    """For encoders that are called for a few frames at a time and hand features on in a list (Wan): a call is a piece.

    The list is changed in place. So what a call finds in it is given to the computation, and what it leaves is taken
    from there: the second computation then finds what the first one found.
    """

    def forward(x: Tensor, feat_cache: list | None = None, feat_idx: list | None = None, **given: Any):
        def piece(x: Tensor, *found: Any) -> tuple:
            cache = None if feat_cache is None else list(found)
            return (plain(x, feat_cache=cache, feat_idx=[0], **given), *(cache or ()))

        out, *left = checkpoint(piece, x, *(feat_cache or ()), use_reentrant=False)
        if feat_cache is not None:
            feat_cache[:] = left
        return out

    return forward


def _blocks(encoder: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    """The outermost blocks, each with what is to be called in the place of its forward pass."""
    for child in encoder.children():
        if any(word in type(child).__name__ for word in _BLOCKS):
            yield (
                child,
                lambda *given, plain=child.forward, **named: checkpoint(plain, *given, use_reentrant=False, **named),
            )
        else:
            yield from _blocks(child)
