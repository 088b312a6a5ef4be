"""Nodes that choose a diffusion model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

import folder_paths
from comfy_api.latest import io

from ..dream4d_engine.priors.loading import PriorError, PriorKind, guess_kind, read_json, toy_folder
from .sockets import CATEGORY, PriorPort, PriorSource

_FROM_FOLDER = "as the folder says"
_NOTHING = "(no diffusers folders found)"
_FOLDERS = "diffusers"  # ComfyUI's own name of the folders with models in diffusers' format
_KINDS = list(get_args(PriorKind))
_DEEPEST = 4  # folders below folders, so that links in a circle come to an end


class LoadToyPrior(io.ComfyNode):
    """One of the small models that come with the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="Dream4DLoadToyPrior",
            display_name="Load Toy Prior",
            category=f"{CATEGORY}/priors",
            description="A small diffusion model that comes with Dream4D: it knows coloured shapes and six motions, "
            "runs on any CPU and needs no download.",
            search_aliases=["dream4d toy model", "embedded prior", "demo model"],
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=_KINDS,
                    default="multiview",
                    tooltip="multiview: four views of a still object, for Optimize Static Scene. video: eight frames, "
                    "for Animate Scene. image and pixel: single pictures. novel_view: another view of a picture.",
                ),
            ],
            outputs=[PriorPort.Output("prior", display_name="prior", tooltip="The model, loaded when it is needed.")],
        )

    @classmethod
    def execute(cls, kind: str) -> io.NodeOutput:
        """Point at the model's folder."""
        return io.NodeOutput(_source(toy_folder(kind), kind))


class LoadPrior(io.ComfyNode):
    """A full-size model from ComfyUI's models folders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="Dream4DLoadPrior",
            display_name="Load Prior",
            category=f"{CATEGORY}/priors",
            description="A diffusion model in diffusers' format from the folder models/diffusers. Nothing is ever "
            "downloaded: put the model's whole folder there.",
            search_aliases=["dream4d model", "diffusers folder", "zeroscope", "mvdream", "stable diffusion"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=list(model_folders()) or [_NOTHING],
                    tooltip="A folder with a model_index.json below models/diffusers.",
                ),
                io.Combo.Input(
                    "kind",
                    options=[_FROM_FOLDER, *_KINDS],
                    default=_FROM_FOLDER,
                    advanced=True,
                    tooltip="What the model makes; only to be set where the folder is taken for something else.",
                ),
            ],
            outputs=[PriorPort.Output("prior", display_name="prior", tooltip="The model, loaded when it is needed.")],
        )

    @classmethod
    def validate_inputs(cls, folder: str) -> bool | str:
        """Refuse what is not in the models folders."""
        if folder in model_folders():
            return True
        return f"{folder!r} is not among the models: put a model in diffusers' format into models/diffusers"

    @classmethod
    def fingerprint_inputs(cls, folder: str | None = None, kind: str | None = None) -> str:
        """Run again when a file of the folder has changed."""
        found = model_folders().get(folder or "")
        return "" if found is None else PriorSource(found.name, "image", found).fingerprint()

    @classmethod
    def execute(cls, folder: str, kind: str) -> io.NodeOutput:
        """Point at the model's folder after a look at its description."""
        found = model_folders().get(folder)
        if found is None:
            raise PriorError(f"{folder!r} is not among the models: put it into models/diffusers")
        return io.NodeOutput(_source(found, None if kind == _FROM_FOLDER else kind))


def model_folders() -> dict[str, Path]:
    """Names and places of the folders in diffusers' format below ComfyUI's models folders; links are followed."""
    found: dict[str, Path] = {}
    for root in folder_paths.get_folder_paths(_FOLDERS):
        for place, below, files in os.walk(root, followlinks=True):
            name = os.path.relpath(place, root).replace(os.sep, "/")
            if "model_index.json" in files:
                found.setdefault(name, Path(place))
            if "model_index.json" in files or name.count("/") >= _DEEPEST:
                below.clear()
    return found


def _source(folder: Path, kind: PriorKind | None) -> PriorSource:
    index, unet = read_json(folder, "model_index.json"), read_json(folder, "unet/config.json")
    ours = index.get("dream4d", {})
    kind = kind or ours.get("kind") or guess_kind(folder, unet)
    if kind not in _KINDS:
        raise PriorError(f"{folder.name}: unknown kind of prior {kind!r}; known are {', '.join(_KINDS)}")
    return PriorSource(ours.get("name", folder.name), kind, folder)
