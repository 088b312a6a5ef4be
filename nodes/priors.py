"""Nodes that choose a diffusion model."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, get_args

import folder_paths
from comfy_api.latest import io

from ..dream4d_engine.priors.errors import PriorError
from ..dream4d_engine.priors.files import digest, model_files, prior_files, read_metadata, toy_prior
from ..dream4d_engine.priors.formats.checkpoints import SUFFIXES
from ..dream4d_engine.priors.formats.identify import identify
from ..dream4d_engine.priors.formats.loaders import Metadata
from ..dream4d_engine.priors.handle import PriorKind
from .sockets import CATEGORY, PriorPort

logger = logging.getLogger(__name__)

_FROM_FOLDER: Final = "as the folder says"
_NOTHING = "(no models found)"
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
                    "for Animate Scene. image and pixel: single images. novel_view: another view of an image.",
                ),
            ],
            outputs=[PriorPort.Output("prior", display_name="prior", tooltip="The model, loaded when it is needed.")],
        )

    @classmethod
    def execute(cls, kind: PriorKind) -> io.NodeOutput:
        """Point at the model's folder."""
        return io.NodeOutput(toy_prior(kind))


class LoadPrior(io.ComfyNode):
    """A full-size model from ComfyUI's models folders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="Dream4DLoadPrior",
            display_name="Load Prior",
            category=f"{CATEGORY}/priors",
            description="A full-size diffusion model: a folder in diffusers' format below models/diffusers, or a "
            "checkpoint of Stable Diffusion 1 or 2, MVDream or Zero123 below models/checkpoints. Nothing is ever "
            "downloaded.",
            search_aliases=["dream4d model", "diffusers folder", "zeroscope", "mvdream", "zero123", "stable diffusion"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=list(models()) or [_NOTHING],
                    tooltip="A folder with a model_index.json below models/diffusers, or a file of models/checkpoints.",
                ),
                io.Combo.Input(
                    "kind",
                    options=[_FROM_FOLDER, *_KINDS],
                    default=_FROM_FOLDER,
                    advanced=True,
                    tooltip="What the model makes; only to be set where it is taken for something else.",
                ),
            ],
            outputs=[PriorPort.Output("prior", display_name="prior", tooltip="The model, loaded when it is needed.")],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None) -> bool | str:
        """Refuse what is not in the models folders; None comes from another node."""
        return True if folder is None or folder in list(models()) else not_there(folder)

    @classmethod
    def fingerprint_inputs(cls, folder: str | None = None, kind: str | None = None) -> str:
        """Run again when a file of the folder has changed."""
        found = models().get(folder or "")
        return "" if found is None else digest(model_files(found))

    @classmethod
    def execute(cls, folder: str, kind: PriorKind | Literal["as the folder says"]) -> io.NodeOutput:
        """Point at the model after a look at its description."""
        found = models().get(folder)
        if found is None:
            raise PriorError(not_there(folder))
        chosen = None if kind == _FROM_FOLDER else kind
        say_notes(read_metadata(found, chosen))
        return io.NodeOutput(prior_files(found, chosen))


def model_roots() -> list[Path]:
    """ComfyUI's folders for models in diffusers' format."""
    return [Path(root) for root in folder_paths.get_folder_paths("diffusers")]


def _folders_with(file: str) -> Iterator[tuple[str, Path]]:
    """Yield (name, place) of the folders below `model_roots` that hold such a file, not looking into them."""
    for root in model_roots():
        for place, below, files in os.walk(root, followlinks=True):
            name = os.path.relpath(place, root).replace(os.sep, "/")
            if file in files:
                yield name, Path(place)
            if file in files or name.count("/") >= _DEEPEST:
                below.clear()


def models() -> dict[str, Path]:
    """Names and places of the models that ComfyUI's folders hold: diffusers folders first, then checkpoints."""
    found: dict[str, Path] = {}
    for name, place in _folders_with("model_index.json"):
        found.setdefault(name, place)
    for name in folder_paths.get_filename_list("checkpoints"):
        path = folder_paths.get_full_path("checkpoints", name)
        if path is not None and name.lower().endswith(SUFFIXES):
            found.setdefault(name.replace(os.sep, "/"), Path(path))
    return found


def tiny_autoencoders() -> dict[str, Path]:
    """Names and places of the folders with an AutoencoderTiny."""
    found: dict[str, Path] = {}
    for name, place in _folders_with("config.json"):
        with contextlib.suppress(Exception):  # one bad folder is no reason not to show the others
            if identify(place).layout == "tiny autoencoder":
                found.setdefault(name, place)
    return found


def say_notes(metadata: Metadata) -> str:
    """Log what was assumed of a model; return it as the text of a node."""
    for note in metadata.notes:
        logger.warning("%s", note)
    return "\n".join(metadata.notes)


def not_there(name: str) -> str:
    """What to say of a name that is none of `models`."""
    return f"{name!r} is not among the models: put a folder into models/diffusers, or a file into models/checkpoints"
