"""A pack for the test server alone: looks into the process, and makes things go wrong on demand."""

import gc
import json
import sys
import threading
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management as management
import torch
from aiohttp import web
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import Types
from server import PromptServer

from .watch import module


class Value:
    """Sends any value through a link, as nodes of other packs may: JSON, or one that JSON doesn't have."""

    RETURN_TYPES = ("*",)
    FUNCTION = "send"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        """What it sends."""
        return {"required": {"value": ("STRING", {})}}

    def send(self, value):
        """Send it."""
        made = {"surrogate": "\ud800", "no pixels": torch.zeros(0, 8, 8, 3), "nan pixels": torch.zeros(1, 8, 8, 3)}
        made["nan pixels"][0, 3, 3] = float("nan")
        made |= _meshes()
        return (made[value] if value in made else json.loads(value),)


def _meshes():
    """A triangle as core has it, and what is wrong with others of its kind."""
    places, face = torch.eye(3)[None], torch.tensor([[[0, 1, 2]]])
    return {
        "mesh": Types.MESH(places, face),
        "mesh batch": Types.MESH(places.expand(2, -1, -1), face.expand(2, -1, -1)),
        "mesh without faces": Types.MESH(places, face[:, :0]),
        "mesh of nothing": Types.MESH(places[:, :0], face[:, :0]),
        "mesh with nan": Types.MESH(places / 0 * 0, face),
        "mesh beyond": Types.MESH(places, face + 1),
        "mesh of lists": Types.MESH([[0.0, 0.0, 0.0]], [[0, 1, 2]]),
        "mesh of a point": Types.MESH(places * 0, face),
        "fbx": Types.File3D(BytesIO(b"Kaydara FBX Binary"), "fbx"),
        "broken glb": Types.File3D(BytesIO(b"glTF" + bytes(40)), "glb"),
        "gone": Types.File3D("/nowhere/model.glb"),
    }


class SmallClip:
    """A text encoder of a family that ComfyUI's loaders know at its full size only, cut small; and what isn't one."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        """Whose."""
        return {"required": {"family": (["wan", "ltx", "none"],)}}

    def make(self, family):
        """Make it."""
        if family == "none":
            return (None,)
        import graph_models  # of tests/nodes

        return ({"wan": graph_models.wan_clip, "ltx": graph_models.ltx_clip}[family](),)


class SmallClipVision:
    """An image encoder that ComfyUI's loaders know at its full size only, cut small."""

    RETURN_TYPES = ("CLIP_VISION",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        """Nothing."""
        return {"required": {}}

    def make(self):
        """Make it."""
        import graph_models

        return (graph_models.clip_vision(),)


sys.path.append(str(Path(__file__).resolve().parents[2] / "nodes"))
NODE_CLASS_MAPPINGS = {"GuardValue": Value, "GuardSmallClip": SmallClip}
NODE_CLASS_MAPPINGS["GuardSmallClipVision"] = SmallClipVision
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


@routes.post("/dream4d_test/small_recipes")
async def small_recipes(request):
    """Give the recipes for any model the toy recipes' sizes, which a CPU can bear; the guidance stays theirs."""
    config, train = module("dream4d_engine.training.config"), module("nodes.train")
    image, video = config.MODEL_IMAGE, config.MODEL_VIDEO
    image = replace(config.TOY_STATIC, name=image.name, steps=image.steps, guidance=image.guidance)
    video = replace(config.TOY_MOTION, name=video.name, steps=video.steps, guidance=video.guidance)
    train.STILL_RECIPES[image.name] = config.STATIC_RECIPES[image.name] = image
    config.MOTION_RECIPES[video.name] = video
    return web.json_response({})


@routes.post("/dream4d_test/checkpoint_steps")
async def checkpoint_steps(request):
    """Let still scenes by the toy recipe keep their state after every so many steps."""
    config, train = module("dream4d_engine.training.config"), module("nodes.train")
    toy = config.TOY_STATIC
    toy = replace(toy, loop=replace(toy.loop, checkpoint_steps=(await request.json())["steps"]))
    train.STILL_RECIPES[toy.name] = config.STATIC_RECIPES[toy.name] = toy
    return web.json_response({})


@routes.post("/dream4d_test/small_meshes")
async def small_meshes(request):
    """Let fits to meshes look from few places at few pixels, in few rays."""
    recipes = module("dream4d_engine.training.config").MESH_RECIPES
    for name, recipe in recipes.items():
        phases = tuple(replace(phase, n_rays=256, n_points=1024) for phase in recipe.phases)
        recipes[name] = replace(recipe, n_views=12, view_size=48, phases=phases)
    return web.json_response({})


NUMBERS = [float("nan"), float("inf"), -float("inf"), 10**30, -(10**30), 2**63, 2**64, True, "7", None, [1], 1j]
TEXTS = [None, 5, 1.5, ["a"], "a\0b", "\ud800", "x" * 100_000]
CHOICES = [None, 5, {"a": 1}, ["a"], "no choice at all"]
BOOLEANS = [None, 2, "yes", float("nan")]
PIXELS = [None, 5, torch.zeros(0, 8, 8, 3), torch.zeros(8), torch.full((1, 8, 8, 3), float("nan"))]
PIXELS += [torch.zeros(1, 8, 8, 3, dtype=torch.long)]


@routes.get("/dream4d_test/doors")
async def doors(request):
    """Call every node of the pack with one bad input after the other; tell what each call raised."""
    import nodes

    return web.json_response(
        [row for name, node in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("Dream4D") for row in _walk(node)]
    )


def _walk(node):
    made = SimpleNamespace(
        scene=module("nodes.sockets").SceneValue(None, None),
        prior=module("dream4d_engine.priors.files").PriorFiles("none", "image", None),
    )
    clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    good, bad = {}, []
    for group, inputs in node.INPUT_TYPES().items():
        for name, (kind, *rest) in inputs.items() if group != "hidden" else ():
            good[name], found = _values(kind, rest[0] if rest else {}, name, made)
            bad += [
                (place, value, change) for place, value, change in found if value is not None or group == "required"
            ]
    for place, value, change in bad:
        try:
            clone.EXECUTE_NORMALIZED(**(good | change))
            raised, text = "", ""
        except BaseException as error:
            raised, text = type(error).__name__, str(error)
        yield {
            "node": node.GET_SCHEMA().node_id,
            "input": place,
            "value": repr(value)[:80],
            "raised": raised,
            "text": text,
        }


def _values(kind, options, name, made):
    """A good value for an input, and (place, bad value, change of the inputs) of bad ones."""
    if kind == "COMFY_DYNAMICCOMBO_V3":
        choice = next(c for c in options["options"] if c["inputs"].get("required"))
        below = {n: (k, r[0] if r else {}) for n, (k, *r) in choice["inputs"]["required"].items()}
        inner = {n: _values(k, o, n, made) for n, (k, o) in below.items()}
        good = {name: choice["key"], **{n: value for n, (value, _) in inner.items()}}
        bad = [(f"{name}.{p}", v, {name: good | c}) for _, found in inner.values() for p, v, c in found]
        return good, bad + [(name, v, {name: v}) for v in (None, "toy", 5)] + [(name, 5, {name: good | {name: 5}})]
    if isinstance(kind, list) or kind == "COMBO":
        choices = kind if isinstance(kind, list) else options.get("options")
        return (options.get("default") or (choices or ["none"])[0]), [(name, v, {name: v}) for v in CHOICES]
    known = {
        "INT": (options.get("default", 1), [*NUMBERS, 1.5]),
        "FLOAT": (options.get("default", 1.0), NUMBERS),
        "STRING": ("a red cube", TEXTS),
        "BOOLEAN": (False, BOOLEANS),
        "IMAGE": (torch.zeros(1, 8, 8, 3), PIXELS),
        "MASK": (torch.zeros(1, 8, 8), PIXELS),
        "DREAM4D_SCENE": (made.scene, [None, 5, "scene"]),
        "DREAM4D_PRIOR": (made.prior, [None, 5, "prior"]),
        "LOAD3D_CAMERA": ({}, [5, "camera", [1]]),
        "MODEL": (SimpleNamespace(model=None), [None, 5, "model"]),
        "CLIP_VISION": (SimpleNamespace(encode_image=None), [None, 5, "clip"]),
        "CLIP": (SimpleNamespace(tokenizer=None), [None, 5, "clip"]),
        "VAE": (SimpleNamespace(first_stage_model=None), [None, 5, "vae"]),
    }
    if kind.startswith("MESH,"):
        kind, known["MESH,"] = "MESH,", (_meshes()["mesh"], [None, 5, "mesh", [1]])
    good, bad = known[kind]
    edges = [options[e] + d for e, d in (("min", -1), ("max", 1)) if e in options]
    return good, [(name, v, {name: v}) for v in [*bad, *edges]]


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
