"""A pack for the test server alone: looks into the process, and makes things go wrong on demand."""

import gc
import sys
import threading

import comfy.model_management as management
import torch
from aiohttp import web
from comfy.model_patcher import ModelPatcher
from server import PromptServer

NODE_CLASS_MAPPINGS = {}
routes = PromptServer.instance.routes
_steps_to_go: list[int] = []
_step = torch.optim.AdamW.step


def _failing_step(self, *args, **options):
    if _steps_to_go:
        _steps_to_go[0] -= 1
        if _steps_to_go[0] < 0:
            _steps_to_go.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB (simulated)")
    return _step(self, *args, **options)


torch.optim.AdamW.step = _failing_step


@routes.post("/dream4d_test/out_of_memory")
async def out_of_memory(request):
    """Raise torch's error in an optimiser's step after so many good ones."""
    _steps_to_go[:] = [(await request.json())["after"]]
    return web.json_response({})


_at_work: set[torch.nn.Module] = set()  # UNets in the middle of their forward pass
_disturbed: list[bool] = []  # for each unloading, whether one was


def _begin(module, _):
    if type(module).__name__ == "UNet2DConditionModel":
        _at_work.add(module)


def _end(module, *_):
    _at_work.discard(module)


def _detach(self, *arguments, **options):
    _disturbed.append(bool(_at_work))
    return _plain_detach(self, *arguments, **options)


torch.nn.modules.module.register_module_forward_pre_hook(_begin)
torch.nn.modules.module.register_module_forward_hook(_end, always_call=True)
_plain_detach, ModelPatcher.detach = ModelPatcher.detach, _detach


@routes.post("/dream4d_test/evict")
async def evict(request):
    """Take all models off the device, as a pack that needs room does; tell whether one of them was at work."""
    _disturbed.clear()
    worker = threading.Thread(target=management.unload_all_models)
    worker.start()
    worker.join()
    return web.json_response({"disturbed": list(_disturbed)})


@routes.get("/dream4d_test/inside")
async def inside(request):
    """Tell which libraries are loaded, which networks are alive, and what ComfyUI counts as loaded."""
    gc.collect()
    networks = [type(x).__name__ for x in gc.get_objects() if _is_network(x)]
    held = [x.model.model.__class__.__name__ for x in management.current_loaded_models if x.model is not None]
    libraries = sorted({name.partition(".")[0] for name in sys.modules})
    return web.json_response({"libraries": libraries, "networks": networks, "held": held})


def _is_network(thing) -> bool:
    module = getattr(type(thing), "__module__", None)
    return (
        isinstance(module, str)
        and module.startswith(("diffusers.models", "transformers.models"))
        and isinstance(thing, torch.nn.Module)
    )
