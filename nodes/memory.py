"""The diffusion models of a run under ComfyUI's memory management.

ComfyUI decides what lies on the GPU through `comfy.model_management`: whoever wants room asks it, and it takes the
room from models that were registered there. A run registers its models for as long as it lasts, each prior (its UNet
and autoencoder together) as one `ModelPatcher`. So

- what other nodes have left on the GPU makes room before the run, and the report of used memory counts ours;
- whoever asks for more room in the middle of a run (another pack's thread, say) gets that of our models, too, as soon
  as the step under way is done; they come back before the next one;
- after the run the models are dropped, with nothing kept for the next one but the files.

The plain `ModelPatcher` is used, not the "dynamic" one that newer versions take for their own models: that one, and
moving single layers, needs layers that fetch their weights themselves (`comfy.ops`), which diffusers' are not. Ours is
on the GPU as a whole or not at all. Checked against ComfyUI 0.33.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..dream4d_engine.machine import has_own_allocator, limit_memory
from ..dream4d_engine.priors.handle import Prior


def make_room(n_bytes: float, device: torch.device, kept: Sequence[Any] = ()) -> None:
    """Let ComfyUI unload models until so many bytes of a device are free; none of the `kept` ModelPatchers.

    In inference mode, as nodes are run. Weights that were made in it and are moved outside of it have no version
    counter anymore, and PyTorch takes no views of them.
    """
    loaded = [one for one in management.current_loaded_models if any(one.model is patcher for patcher in kept)]
    with torch.inference_mode():
        management.free_memory(n_bytes, device, loaded)


def _dynamic_bytes(patcher: Any) -> int:
    """Bytes that a model's weights take in dynamic memory, where they have the dtype that they are used in."""
    n_bytes = int(patcher.model_size())
    for module in patcher.model.modules():
        for name, weight in module.named_parameters(recurse=False):
            dtype = getattr(module, f"{name}_comfy_model_dtype", None)
            if dtype is not None and type(weight.detach()) is torch.Tensor:  # quantized ones stay as they are
                n_bytes += weight.numel() * (dtype.itemsize - weight.dtype.itemsize)
    return n_bytes


class _Networks(nn.Module):
    """The networks of one prior, with the notes that ComfyUI keeps about a model: they are there already."""

    def __init__(self, networks: Iterable[nn.Module], device: torch.device) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.device = device
        self.model_loaded_weight_memory = management.module_size(self)


class _Turns:
    """A lock whose holder now and then lets all go first who wait for it. The holder may take it again."""

    def __init__(self) -> None:
        self._lock, self._counting, self._waiting = threading.RLock(), threading.Lock(), 0
        self.runner: int | None = None  # the thread that a run is in

    def __enter__(self) -> None:
        with self._counting:
            self._waiting += 1
        self._lock.acquire()
        with self._counting:
            self._waiting -= 1

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def let_others(self) -> None:
        """Give the lock away for as long as others wait."""
        self._lock.release()
        while self._waiting:
            time.sleep(0.001)
        self._lock.acquire()


class _WholePatcher(ModelPatcher):
    """A model whose layers can't be told to stay elsewhere one by one, and none while a step is under way."""

    turns: _Turns
    missed = False  # ComfyUI counts it no longer, though it stayed

    def detach(self, unpatch_all=True):
        """Take the model off its device.

        Not for a model of the same run (a graph's own MODEL makes room before it is asked): a step may be under way.
        """
        if unpatch_all and threading.get_ident() == self.turns.runner:
            self.missed = True
            return
        with self.turns:
            super().detach(unpatch_all)

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        """Load everything, however little room was offered."""
        return super().partially_load(device_to, 1e32, force_patch_weights)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        """Give back nothing: ComfyUI then unloads the whole."""
        return 0


class HeldPriors:
    """The priors of one run, registered from `hold` to `release`.

    `room`: bytes that training takes beside the models' weights. `budget`: bytes that the whole process may take.
    `models`: MODELs of the graph that the priors ask.
    """

    def __init__(self, device: torch.device, room: int, budget: int | None = None, models: Sequence[Any] = ()) -> None:
        self._device, self._room, self._models = device, room, models
        self._budget = budget if device.type == "cuda" else None
        self._priors: list[Prior] = []
        self._patchers: list[_WholePatcher] = []
        self._turns = _Turns()

    def make_room(self, n_bytes: int) -> None:
        """Before loading: have so many bytes for the models, and the room for training, made free on a GPU.

        With a budget everything is: what other nodes left there would count.
        """
        if self._budget is not None:
            self._unload_others()
        else:
            self._free(n_bytes)

    def hold(self, prior: Prior) -> None:
        """Register a prior that was just loaded onto the device. Nobody takes it away until the next `bring_back`."""
        if not self._priors:
            self._turns.__enter__()
            self._turns.runner = threading.get_ident()
        self._priors.append(prior)
        if not prior.networks:  # it sees to its memory itself
            return
        away = management.unet_offload_device()
        patcher = _WholePatcher(_Networks(prior.networks, self._device), self._device, away)
        patcher.turns = self._turns
        self._patchers.append(patcher)
        self._load()

    @cached_property
    def beside(self) -> int:
        """Bytes that the graph's models may take beside PyTorch's allocator: those in ComfyUI's dynamic memory."""
        dynamic = {id(model.model): model for model in self._models if model.is_dynamic()}
        return sum(map(_dynamic_bytes, dynamic.values())) if self._device.type == "cuda" else 0

    def settle(self) -> None:
        """Once the models know their prompts: with a budget, unload what the run doesn't ask again, text encoders."""
        if self._budget is not None:
            self._unload_others()

    def _free(self, n_bytes: float) -> None:
        """Have so many bytes for models, and the room for training, free on a GPU."""
        if self._device.type != "cpu":
            make_room(n_bytes + self._room + management.minimum_inference_memory(), self._device, self._patchers)

    def _unload_others(self) -> None:
        others = [more for m in self._models for more in (*m.model_patches_models(), *m.get_nested_additional_models())]
        make_room(1e30, self._device, [*self._patchers, *self._models, *others])
        management.soft_empty_cache()

    def bring_back(self) -> bool:
        """Between two steps: let others unload the models, and load them again; return whether any were unloaded.

        Their weights are elsewhere then: what was captured with them (CUDA graphs) has to be forgotten.
        """
        if not self._priors:  # nothing of this run is registered
            return False
        self._turns.let_others()
        gone = any(patcher.loaded_size() < patcher.model_size() for patcher in self._patchers)
        if gone or any(patcher.missed for patcher in self._patchers):
            self._load()
        return gone

    def give_back(self, step: int) -> None:
        """Return memory that ComfyUI's usual allocator has taken from the GPU and keeps, beside what a step holds.

        After the first steps, and ever more rarely, what trying convolutions out has taken: cuDNN is offered all that
        is free then, and others would find none: other programs, and ComfyUI's own dynamic memory. And what is more
        than a budget: that allocator is told what may be asked of it, not what it may keep.
        """
        if self._device.type != "cuda" or has_own_allocator():
            return
        tried = torch.backends.cudnn.benchmark and step & (step - 1) == 0  # 1, 2, 4, 8, ...
        over = self._budget is not None and torch.cuda.memory_reserved(self._device) > self._budget - self.beside
        if tried or over:
            torch.cuda.empty_cache()
        if tried:
            torch.cuda.reset_peak_memory_stats(self._device)

    def release(self) -> None:
        """Drop the models and the limit; nothing of them stays on the device once nobody else holds them."""
        if self._budget is not None:
            limit_memory(self._device, None)
        self._turns.runner = None
        if self._priors:
            self._turns.__exit__()
        for prior in self._priors:
            prior.release()
        self._priors.clear()
        self._patchers.clear()
        gc.collect()  # networks may refer to themselves
        management.soft_empty_cache()

    def _load(self) -> None:
        for patcher in self._patchers:
            patcher.missed = False
        # what ComfyUI would free by itself, which then finds enough
        self._free(1.1 * sum(patcher.model_size() - patcher.loaded_size() for patcher in self._patchers))
        management.load_models_gpu(self._patchers, memory_required=self._room, force_full_load=True)
