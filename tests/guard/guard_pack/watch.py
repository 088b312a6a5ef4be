"""Watches runs by models of the graph: the gradient of every step, memory, and what comes of too little of it."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import comfy.model_management as management
import psutil
import torch
from aiohttp import web
from server import PromptServer

routes = PromptServer.instance.routes


@dataclass
class Watch:
    """What was seen since the last order. `shortage_after`: encodings that go well, before the memory runs out."""

    shortage_after: int | None = None
    encodings: int = 0
    pending: list[float] = field(default_factory=list)  # norms of the gradient on images since the last step
    steps: list[float] = field(default_factory=list)  # their sums, for each step
    moments: list[float] = field(default_factory=list)  # when each was taken, seconds


_watch = Watch()
_most = 0  # bytes of the card that were taken at once since the last reading


@routes.post("/dream4d_test/watch")
async def watch(request):
    """Begin anew, and tell what was seen before."""
    encoder = module("nodes.graph_encoder").Encoder
    if not hasattr(encoder.encode, "plain"):
        encoder.encode = _watched(encoder.encode)
        torch.optim.AdamW.step = _counted(torch.optim.AdamW.step)
    seen = {"encodings": _watch.encodings, "steps": _watch.steps, "shortage": _watch.shortage_after is not None}
    seen["moments"] = _watch.moments
    _watch.__init__(shortage_after=(await request.json()).get("shortage_after"))
    return web.json_response(seen)


@routes.post("/dream4d_test/encoder")
async def encoder(request):
    """Let priors of the graph encode by core's own layers from now on (`own`), or as they do."""
    room = module("nodes.graph_encoder")
    if not hasattr(room, "plain"):
        room.plain = room.fused_encoder
    room.fused_encoder = (lambda *_: None) if (await request.json())["own"] else room.plain
    return web.json_response({"cudnn.benchmark": torch.backends.cudnn.benchmark})


@routes.get("/dream4d_test/memory")
async def memory(request):
    """Bytes that are taken once all rubbish is gone: of the card, of PyTorch's there, of the process.

    And the most since the last reading: "peak" of PyTorch's, "card_most" of the card.
    """
    global _most
    gc.collect()
    management.soft_empty_cache()
    found = {"process": psutil.Process().memory_info().rss}
    if torch.cuda.is_available() and management.get_torch_device().type == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {
            "card": total - free,
            "torch": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
        }
        found |= {"peak": torch.cuda.max_memory_allocated(), "card_most": max(_most, total - free)}
        torch.cuda.reset_peak_memory_stats()
        _most = 0
        if not any(thread.name == _WATCHER for thread in threading.enumerate()):
            threading.Thread(target=_watch_card, name=_WATCHER, daemon=True).start()
    return web.json_response(found)


_WATCHER = "watches the card"


def _watch_card() -> None:
    global _most
    while True:
        free, total = torch.cuda.mem_get_info()
        _most = max(_most, total - free)
        time.sleep(0.005)


def module(name: str):
    """A module of the pack."""
    import nodes

    pack = nodes.NODE_CLASS_MAPPINGS["Dream4DRender"].__module__.rpartition(".nodes")[0]
    return sys.modules[f"{pack}.{name}"]


def _watched(plain):
    def encode(self, pixels, *how):
        _watch.encodings += 1
        if pixels.requires_grad:
            pixels.register_hook(lambda gradient: _watch.pending.append(float(gradient.norm())))
        if _watch.shortage_after is not None and _watch.encodings > _watch.shortage_after:
            with _filled(pixels.device):
                return plain(self, pixels, *how)
        return plain(self, pixels, *how)

    encode.plain = plain
    return encode


def _counted(plain):
    def step(self, *given, **named):
        _watch.steps.append(sum(_watch.pending))
        _watch.moments.append(time.monotonic())
        _watch.pending.clear()
        return plain(self, *given, **named)

    return step


@contextlib.contextmanager
def _filled(device: torch.device) -> Iterator[None]:
    """Leave nothing free on a GPU, so that the next allocation fails; elsewhere, say that one has failed."""
    if device.type != "cuda":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB (simulated)")
    kept = []
    torch.cuda.empty_cache()
    for size in (2**30, 2**27, 2**24, 2**21, 2**18, 2**15, 2**12, 2**9):  # the last ones: what small models need
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                kept.append(torch.empty(size, dtype=torch.uint8, device=device))
    try:
        yield
    finally:
        kept.clear()
        torch.cuda.empty_cache()
