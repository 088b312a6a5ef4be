"""The diffusion models of a run under ComfyUI's memory management.

ComfyUI decides what lies on the GPU through `comfy.model_management`: whoever wants room asks it, and it takes the
room from models that were registered there. A run registers its models for as long as it lasts, each prior (its UNet
and autoencoder together) as one `ModelPatcher`. So

- what other nodes have left on the GPU makes room before the run, and the report of used memory counts ours;
- whoever asks for more room in the middle of a run (another pack's thread, say) gets that of our models, too; they
  come back before the next step;
- after the run the models are dropped, with nothing kept for the next one but the files.

The plain `ModelPatcher` is used, not the "dynamic" one that newer versions take for their own models: that one, and
moving single layers, needs layers that fetch their weights themselves (`comfy.ops`), which diffusers' are not. Ours is
on the GPU as a whole or not at all. Checked against ComfyUI 0.33.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..dream4d_engine.machine import limit_memory
from ..dream4d_engine.priors.loading import Prior


class _Networks(nn.Module):
    """The networks of one prior, with the notes that ComfyUI keeps about a model: they are there already."""

    def __init__(self, networks: Iterable[nn.Module], device: torch.device) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.device = device
        self.model_loaded_weight_memory = management.module_size(self)


class _WholePatcher(ModelPatcher):
    """A model whose layers can't be told to stay elsewhere one by one."""

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        """Load everything, however little room was offered."""
        return super().partially_load(device_to, 1e32, force_patch_weights)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        """Give back nothing: ComfyUI then unloads the whole."""
        return 0


class HeldPriors:
    """The priors of one run, registered from `hold` to `release`.

    `room`: bytes that training takes beside the models' weights. `budget`: bytes that the whole process may take.
    """

    def __init__(self, device: torch.device, room: int, budget: int | None = None) -> None:
        self._device, self._room = device, room
        self._limited = budget is not None and device.type == "cuda"
        self._patchers: list[_WholePatcher] = []

    def make_room(self, n_bytes: int) -> None:
        """Before loading: have so many bytes for the models, and the room for training, made free on a GPU.

        With a budget everything is: what other nodes left there would count.
        """
        if self._limited:
            management.free_memory(1e30, self._device)
            management.soft_empty_cache()
        elif self._device.type != "cpu":
            management.free_memory(n_bytes + self._room + management.minimum_inference_memory(), self._device)

    def hold(self, prior: Prior) -> None:
        """Register a prior that was just loaded onto the device."""
        networks = [network for network in (prior.denoiser.unet, prior.denoiser.vae) if network is not None]
        away = management.unet_offload_device()
        self._patchers.append(_WholePatcher(_Networks(networks, self._device), self._device, away))
        self._load()

    def bring_back(self) -> bool:
        """Between two steps: have models that were unloaded since loaded again; return whether there were any.

        Their weights are elsewhere then: what was recorded with them (CUDA graphs) has to be forgotten.
        """
        gone = any(patcher.loaded_size() < patcher.model_size() for patcher in self._patchers)
        if gone:
            self._load()
        return gone

    def release(self) -> None:
        """Drop the models and the limit; nothing of them stays on the device once nobody else holds them."""
        if self._limited:
            limit_memory(self._device, None)
        self._patchers.clear()
        gc.collect()  # networks may refer to themselves
        management.soft_empty_cache()

    def _load(self) -> None:
        management.load_models_gpu(self._patchers, memory_required=self._room, force_full_load=True)
