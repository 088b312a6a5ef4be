"""Nodes for the full-size models the recipes were made for: one loader for each kind, and a LoRA.

A model is chosen by a name that means the same on every machine, an id of the table in priors/weights.py, or from the
files in ComfyUI's models folders. Nothing is fetched unless the switch on the node says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import folder_paths
from comfy_api.latest import io

from ..dream4d_engine.priors.errors import PriorError
from ..dream4d_engine.priors.files import (
    PriorFiles,
    digest,
    list_files,
    model_files,
    prior_files,
    read_metadata,
    toy_subject,
)
from ..dream4d_engine.priors.formats.lora_files import holds_lora, lora_files, read_lora
from ..dream4d_engine.priors.formats.tiny_vae import TinyDecoder
from ..dream4d_engine.priors.formats.weights import WEIGHTS, find_weights, human_size
from ..dream4d_engine.priors.handle import PriorHandle, PriorKind
from ..dream4d_engine.priors.lora import check_strength
from .checks import check_ranges
from .doors import DoorError, check_choice
from .priors import model_roots, models, not_there, say_notes, tiny_autoencoders
from .session import RunError, say_on_node
from .sockets import CATEGORY, PriorPort

NO_TINY, TOY_SUBJECT = "none", "toy subject"
MOST_STRENGTH = 4.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w./-]+)?")


@dataclass(frozen=True)
class KindOfLoader:
    """What sets one loader apart from the others."""

    kind: PriorKind
    node_id: str
    display_name: str
    makes: str
    aliases: tuple[str, ...]

    @property
    def known(self) -> list[str]:
        """The ids of the table that are of this kind."""
        return [weights.id for weights in WEIGHTS if weights.kind == self.kind]


KINDS = (
    KindOfLoader(
        "multiview",
        "Dream4DLoadMultiviewPrior",
        "Load Multi-View Prior",
        "MVDream: four views of one object at once, for Optimize Static Scene. Its checkpoint or a converted folder",
        ("mvdream", "multi view diffusion"),
    ),
    KindOfLoader(
        "image",
        "Dream4DLoadImagePrior",
        "Load Image Prior",
        "Stable Diffusion 1 or 2: single images, for Optimize Static Scene. A folder in diffusers' format or a "
        "checkpoint",
        ("stable diffusion", "sd 2.1"),
    ),
    KindOfLoader(
        "novel_view",
        "Dream4DLoadNovelViewPrior",
        "Load Novel-View Prior",
        "Zero123: another view of a given image, for scenes from images. Its checkpoint or a folder",
        ("zero123", "novel view"),
    ),
    KindOfLoader(
        "pixel",
        "Dream4DLoadPixelPrior",
        "Load Pixel Prior",
        "DeepFloyd IF, stage I: small images without an autoencoder, for scenes from images. A folder",
        ("deepfloyd", "if"),
    ),
    KindOfLoader(
        "video",
        "Dream4DLoadVideoPrior",
        "Load Video Prior",
        "ZeroScope or ModelScope: short videos, for Animate Scene. A folder in diffusers' format",
        ("zeroscope", "modelscope", "text to video"),
    ),
)


def kind_loader(of: KindOfLoader) -> type[io.ComfyNode]:
    """Make the node that loads one kind of model."""

    class Loader(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            """Say what the node takes and gives."""
            return io.Schema(
                node_id=of.node_id,
                display_name=of.display_name,
                category=f"{CATEGORY}/priors",
                description=f"{of.makes}. Nothing is downloaded unless the switch says so.",
                search_aliases=["dream4d model", *of.aliases],
                inputs=_inputs(of),
                outputs=[
                    PriorPort.Output("prior", display_name="prior", tooltip="The model, loaded when it is needed.")
                ],
                hidden=[io.Hidden.unique_id],
            )

        @classmethod
        def validate_inputs(
            cls, model: str | None = None, hub_id: str | None = None, download: bool | None = None
        ) -> bool | str:
            """Refuse what is not here and is not to be downloaded, with all that is needed to get it."""
            if model is None or hub_id is None or download is None:  # comes from another node
                return True
            try:
                asked = wanted(of, check_choice("model", model, None), hub_id)
                if not download:
                    find_model(asked)
            except (PriorError, DoorError) as error:
                return str(error)
            return True

        @classmethod
        def fingerprint_inputs(cls, model: str | None = None, hub_id: str | None = None, **_) -> str:
            """Run again when a file of the model has changed."""
            try:
                return digest(model_files(find_model(wanted(of, model or "", hub_id or ""))))
            except PriorError:
                return ""

        @classmethod
        def execute(
            cls, model: str, hub_id: str, download: bool, tiny_vae: str = NO_TINY, tiny_decoder_only: bool = False
        ) -> io.NodeOutput:
            """Find the model, fetch it if that was asked for, and look at what it is."""
            node_id = cls.hidden.unique_id
            path = find_model(wanted(of, model, hub_id), download, lambda text: say_on_node(text, node_id))
            metadata = read_metadata(path)
            if metadata.kind != of.kind:
                raise RunError(
                    f"{path.name} is a model of the kind {metadata.kind!r}, {of.display_name} takes {of.kind!r}"
                )
            if metadata.notes:
                say_on_node(say_notes(metadata), node_id)
            if tiny_decoder_only and tiny_vae == NO_TINY:
                raise PriorError(
                    "tiny_decoder_only is on and tiny_vae is none: choose a tiny autoencoder, or turn it off"
                )
            tiny = None if tiny_vae == NO_TINY else _tiny(tiny_vae)
            part = TinyDecoder(tiny) if tiny is not None and tiny_decoder_only else tiny
            prior = replace(prior_files(path), tiny_vae=part)
            prior.check_added()
            return io.NodeOutput(prior)

    Loader.__name__ = Loader.__qualname__ = of.node_id
    Loader.__doc__ = f"{of.display_name}."
    return Loader


def _inputs(of: KindOfLoader) -> list[io.Input]:
    sizes = "; ".join(f"{w.id}: {human_size(w.download)}, {w.license}" for w in WEIGHTS if w.kind == of.kind)
    inputs: list[io.Input] = [
        io.Combo.Input(
            "model",
            options=[*of.known, *models()],
            tooltip=f"A known model ({sizes}), or one of ComfyUI's folders models/diffusers and models/checkpoints.",
        ),
        io.Boolean.Input(
            "download",
            default=False,
            label_on="if it is missing",
            label_off="never",
            tooltip="Fetch the model from its hub when it isn't on this machine; the node says size and licence first.",
        ),
        io.String.Input(
            "hub_id",
            default="",
            advanced=True,
            placeholder="OWNER/NAME or OWNER/NAME:FILE",
            tooltip="Another repository on the hub instead of the model above.",
        ),
    ]
    if of.kind != "pixel":  # it has no autoencoder
        inputs.append(
            io.Combo.Input(
                "tiny_vae",
                options=[NO_TINY, *tiny_autoencoders()],
                default=NO_TINY,
                advanced=True,
                tooltip="A folder below models/diffusers with an AutoencoderTiny, to be used instead of the model's "
                "own autoencoder: less memory and faster, coarser images.",
            )
        )
    if of.kind == "video":  # the only one whose recipes compare colours
        inputs.append(
            io.Boolean.Input(
                "tiny_decoder_only",
                default=False,
                optional=True,
                advanced=True,
                label_on="decode only",
                label_off="encode and decode",
                tooltip="Let the tiny autoencoder make only the images that colours are compared with: the model's own "
                "encodes, and what the model wants is as exact as without it.",
            )
        )
    return inputs


def wanted(of: KindOfLoader, model: str, hub_id: str) -> str | Path:
    """Return the place of the model that the widgets ask for, or its name where it may be elsewhere than in ComfyUI's
    folders. PriorError where it is none."""
    hub_id = hub_id.strip()
    if hub_id and (not _HUB_ID.fullmatch(hub_id) or ".." in hub_id):
        raise PriorError(f"{hub_id!r} is no repository: write OWNER/NAME, or OWNER/NAME:FILE for one file of it")
    name = hub_id or model
    listed = models().get(name)
    if listed is None and not hub_id and model not in of.known:
        raise PriorError(not_there(model))
    return listed or name


def find_model(model: str | Path, download: bool = False, say: Callable[[str], None] = lambda text: None) -> Path:
    """Return where a model is: the place itself, or one in the hub's cache by its name. Raises PriorError."""
    return find_weights(model, download=download, folders=model_roots(), say=say)


def _tiny(name: str) -> Path:
    found = tiny_autoencoders().get(name)
    if found is None:
        raise PriorError(f"{name!r} is not among the tiny autoencoders: put its folder into models/diffusers")
    return found


class ApplyLora(io.ComfyNode):
    """A personal subject or a style for an image prior."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="Dream4DApplyLora",
            display_name="Apply LoRA to Prior",
            category=f"{CATEGORY}/priors",
            description="Adds a LoRA to an image prior, for example a subject learned by DreamBooth: its word (sks) in "
            "the prompt is told to this prior alone, with the recipe personalised-3d.",
            search_aliases=["dreambooth", "personal subject", "sks", "lora", "dream4d"],
            inputs=[
                PriorPort.Input("prior", tooltip="A prior of the kind image."),
                io.Combo.Input(
                    "lora",
                    options=list(loras()),
                    tooltip="A file of models/loras, in any of diffusers' formats, peft's (a folder too) or kohya's; "
                    "or the toy subject.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-MOST_STRENGTH,
                    max=MOST_STRENGTH,
                    step=0.05,
                    tooltip="How much of it: 1 is what it was trained for, 0 nothing.",
                ),
            ],
            outputs=[PriorPort.Output("changed_prior", display_name="prior", tooltip="The prior with the LoRA.")],
        )

    @classmethod
    def validate_inputs(cls, lora: str | None = None, strength: float | None = None) -> bool | str:
        """Refuse what is not in the folder, and strengths out of the range."""
        in_range = check_ranges(cls, strength=strength)
        if in_range is not True:
            return in_range
        return True if lora is None or lora in list(loras()) else f"{lora!r} is not among the files in models/loras"

    @classmethod
    def fingerprint_inputs(cls, lora: str | None = None, **_) -> str:
        """Run again when the file has changed."""
        found = loras().get(lora or "")
        return "" if found is None else digest([list_files(file) for file in lora_files(found)])

    @classmethod
    def execute(cls, prior: PriorHandle, lora: str, strength: float) -> io.NodeOutput:
        """Note the file after a look into it; it is added when the prior is loaded."""
        if prior.kind != "image":
            raise RunError(f"a LoRA is for an image prior, {prior.name!r} is of the kind {prior.kind!r}")
        if not isinstance(prior, PriorFiles):
            raise RunError(f"{prior.name!r} comes from ComfyUI's own nodes: put its LoRA before it, with Load LoRA")
        if prior.lora is not None:
            raise RunError(f"{prior.name!r} has the LoRA {prior.lora.name} already: one prior takes one")
        path = loras().get(lora)
        if path is None:
            raise PriorError(f"{lora!r} is not among the files in models/loras")
        check_strength(strength)
        read_lora(path)
        added = replace(prior, lora=path, lora_strength=strength)
        added.check_added()
        return io.NodeOutput(added)


def loras() -> dict[str, Path]:
    """Names and places of the LoRAs: files of ComfyUI's folder and folders that peft wrote, then the toy subject's."""
    found: dict[str, Path] = {}
    for name in folder_paths.get_filename_list("loras"):
        path = folder_paths.get_full_path("loras", name)
        if path is not None:
            found[name] = Path(path)
    return found | _peft_folders(found) | {TOY_SUBJECT: toy_subject()}


def _peft_folders(files: Mapping[str, Path]) -> dict[str, Path]:
    """The folders of such files, or those with a folder for each network: two files that belong together."""
    found: dict[str, Path] = {}
    for name, path in files.items():
        parents = zip(PurePosixPath(name.replace(os.sep, "/")).parents, path.parents, strict=False)
        for folder, place in list(parents)[:2] if path.stem == "adapter_model" else []:
            if folder.name and holds_lora(place):
                found[str(folder)] = place
    return found


LOADERS = [kind_loader(kind) for kind in KINDS]
