"""Activation checkpointing (1604.06174) of encoders: less memory in the backward pass, one forward pass more."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# parts of the class names of an encoder's blocks: what they are given is kept, what they compute is computed again
_BLOCKS = ("Resnet", "ResBlock", "ResidualBlock", "Downsample", "Resample", "SpaceToDepth", "AttnBlock")
_TINY = ("Block", "MemBlock")  # the whole names of tiny autoencoders' blocks


@contextmanager
def checkpointing(network: nn.Module, wanted: bool = True, frames: range | None = None) -> Iterator[None]:
    """While inside, compute an encoder's activations again in the backward pass instead of keeping them.

    `frames`: those of a video that a gradient is asked for; None: all. Of an encoder that is called for a few frames at
    a time the calls before keep nothing. Those after hand the gradient on, as their features depend on what was before:
    they are computed again even where that is not `wanted`, as are calls that have some other frames, too.
    """
    asked = frames if _goes_on(network) else None
    changed = list(_pieces(network)) if wanted or asked is not None else []
    for module in changed:
        again = _computed_again(module)
        module.forward = again if asked is None else _asked_for(asked, again if wanted else module.forward, again)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def frames_asked_for(carried: Tensor | None, n_groups: int) -> list[range | None]:
    """Of each of so many takes, the span of frames of `carried` [B, F] bool; None: all of them."""
    if carried is None:
        return [None] * n_groups
    each = [row.nonzero().flatten().tolist() for row in carried]
    return [range(found[0], found[-1] + 1) if found else range(carried.shape[1], carried.shape[1]) for found in each]


def _encoder(network: Any) -> Any:
    return getattr(network, "encoder", network)


def _goes_on(network: Any) -> bool:
    """Whether an encoder is called for a few frames at a time, and hands features on in a list: Wan's."""
    return "feat_cache" in inspect.signature(_encoder(network).forward).parameters


def _asked_for(frames: range, plain: Callable, again: Callable) -> Callable:
    """The forward of an encoder that goes on from call to call: `plain` where a call has none but these frames, `again`
    where it has others and after them, without gradient before."""
    seen = 0

    def forward(x: Tensor, *given: Any, **named: Any) -> Any:
        nonlocal seen
        begin, seen = seen, seen + x.shape[2]
        with torch.set_grad_enabled(torch.is_grad_enabled() and seen > frames.start):
            inside = frames.start <= begin and seen <= frames.stop
            return (plain if inside else again)(x, *given, **named)

    return forward


def _pieces(network: nn.Module) -> Iterator[nn.Module]:
    """The modules whose calls are each computed again as a whole."""
    encoder = _encoder(network)
    if _goes_on(network):  # a call is small enough
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
