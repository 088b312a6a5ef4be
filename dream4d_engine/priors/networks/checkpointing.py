"""Activation checkpointing (1604.06174) of encoders: less memory in the backward pass, one forward pass more."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

# parts of the class names of an encoder's blocks: what they are given is kept, what they compute is computed again
_BLOCKS = ("Resnet", "ResBlock", "ResidualBlock", "Downsample", "Resample", "SpaceToDepth", "AttnBlock")
_TINY = ("Block", "MemBlock")  # the whole names of tiny autoencoders' blocks


@contextmanager
def checkpointing(network: nn.Module, wanted: bool = True) -> Iterator[None]:
    """While inside, compute an encoder's activations again in the backward pass instead of keeping them."""
    changed = list(_pieces(network)) if wanted else []
    for module in changed:
        module.forward = _computed_again(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _pieces(network: nn.Module) -> Iterator[nn.Module]:
    """The modules whose calls are each computed again as a whole."""
    encoder = getattr(network, "encoder", network)
    if "feat_cache" in inspect.signature(encoder.forward).parameters:
        # Wan's is called for a few frames at a time: a call is small enough
        yield encoder
        return

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            name = type(child).__name__
            if name in _TINY or any(word in name for word in _BLOCKS):
                yield child
            else:
                yield from walk(child)

    yield from walk(encoder)


def _computed_again(module: nn.Module) -> Callable:
    """A module's forward, checkpointed, whose second computation finds what the first one found.

    Encoders that take some frames after the other hand features on, from one call to the next: in lists among the
    arguments, which they change in place (Wan, HunyuanVideo), or inside of modules, by thread (LTX-Video: and the
    backward pass may run in another one).
    """
    plain = module.forward
    states = (getattr(one, "temporal_cache_state", None) for one in module.modules())
    holders = [state for state in states if isinstance(state, dict)]

    def forward(*given: Any, **named: Any) -> Any:
        held = [holder.get(get_ident()) for holder in holders]
        lists = _lists(given, named)
        found = {name: list(value) for name, value in lists.items()}
        left: dict[Any, list] = {}
        # nothing that outlives this call may refer to what it has computed: through the graph, which refers to
        # `piece`, that would be a circle that no garbage collector sees
        rest = [None if i in lists else value for i, value in enumerate(given)]
        named_rest = {name: value for name, value in named.items() if name not in lists}

        def piece() -> Any:
            second = bool(left)
            before = _put(holders, held)
            fresh = {name: list(value) for name, value in found.items()}
            try:
                out = plain(
                    *(fresh.get(i, value) for i, value in enumerate(rest)),
                    **named_rest,
                    **{name: value for name, value in fresh.items() if isinstance(name, str)},
                )
            finally:
                if second:  # may be left early, once all that was wanted is there
                    _put(holders, before)
            if not second:
                left.update(fresh, done=[])
            return out

        out = checkpoint(piece, use_reentrant=False)
        for name, value in lists.items():
            value[:] = left.pop(name)
        return out

    return forward


def _lists(given: tuple, named: dict[str, Any]) -> dict[Any, list]:
    return {name: value for name, value in (*enumerate(given), *named.items()) if isinstance(value, list)}


def _put(holders: list[dict], states: list[Any]) -> list[Any]:
    """Let this thread find these states in the modules' dictionaries (None: nothing); return what was there."""
    thread = get_ident()
    before = [holder.pop(thread, None) for holder in holders]
    for holder, state in zip(holders, states, strict=True):
        if state is not None:
            holder[thread] = state
    return before
