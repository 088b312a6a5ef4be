"""Nodes that make priors of the graph's own MODEL, CLIP and VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..dream4d_engine.documents import describe
from ..dream4d_engine.priors.errors import PriorError
from ..dream4d_engine.priors.families import fitting_frames, fitting_size
from ..dream4d_engine.priors.handle import PriorKind
from .checks import check_ranges
from .graph_families import (
    FAMILIES,
    HIGH,
    LOW,
    WHOLE,
    check_clip,
    check_pair,
    check_vae,
    family_of,
    in_its_range,
    noise_schedule,
)
from .graph_prior import GraphPrior
from .session import RunError, say_on_node
from .sockets import CATEGORY, PriorPort

_MOST_SIDE, _MOST_FRAMES = 2048, 257
_HAVE = {
    "model": "model",
    "model_low_noise": "model",
    "clip": "tokenizer",
    "clip_vision": "encode_image",
    "vae": "first_stage_model",
}
"""What each input is known by; its class may be another pack's."""


def _known(kind: PriorKind) -> str:
    return ", ".join(family.name for family in FAMILIES.values() if family.kind == kind)


def _sockets(kind: PriorKind) -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip=f"Of {_known(kind)}; with whatever LoRA or model sampling stands before it."),
        io.ClipVision.Input("clip_vision", tooltip="The image encoder of the model's checkpoint.")
        if kind == "novel_view"
        else io.Clip.Input("clip", tooltip="The text encoder that belongs to the model. It encodes the prompts once."),
        io.Vae.Input("vae", tooltip="The autoencoder that belongs to the model, or a tiny one of its latents."),
    ]


def _sides(names: Sequence[str] = ("width", "height")) -> list[io.Input]:
    return [
        io.Int.Input(
            name,
            default=0,
            min=0,
            max=_MOST_SIDE,
            step=8,
            advanced=True,
            tooltip=f"{name.capitalize()} in pixels that the model sees; 0 chooses one that today's cards can bear. "
            "The nearest that the model takes is used, and said.",
        )
        for name in names
    ]


def _schema(
    kind: PriorKind, node_id: str, display_name: str, use: str, aliases: list[str], more: Sequence[io.Input] = ()
) -> io.Schema:
    """What the three have in common. `use`: which node and recipe take such a prior."""
    made = f"{'an' if kind == 'image' else 'a'} {kind.replace('novel_view', 'novel-view')}"
    return io.Schema(
        node_id=node_id,
        display_name=display_name,
        category=f"{CATEGORY}/priors",
        description=f"Makes {made} prior of a model that ComfyUI has loaded ({_known(kind)}), for {use}.",
        search_aliases=["dream4d model", *aliases, "native model"],
        inputs=[*_sockets(kind), *_sides(), *more],
        outputs=[PriorPort.Output("prior", display_name="prior", tooltip="The model as a prior.")],
        hidden=[io.Hidden.unique_id],
    )


def _make(
    kind: PriorKind,
    model: Any,
    clip: Any,
    vae: Any,
    shown: tuple[int, int, int],
    node_id: str | None,
    low_noise: Any = None,
    noise: str = WHOLE,
) -> io.NodeOutput:
    """Look at what is connected, and say what is made of it. `shown`: width, height and frames that were asked for."""
    given = {"model": model, "clip_vision" if kind == "novel_view" else "clip": clip, "vae": vae}
    if low_noise is not None:
        given["model_low_noise"] = low_noise
    for name, value in given.items():
        if not hasattr(value, _HAVE[name]):
            raise RunError(f"{name} is {describe(value)}: it must be what one of ComfyUI's loaders has given")
    try:
        family = family_of(model, kind)
        in_its_range(noise_schedule(model), family, noise)
        if low_noise is not None:
            check_pair(model, low_noise, family, noise)
        check_vae(model, vae, family)
        check_clip(model, clip, family)
    except PriorError as error:
        raise RunError(str(error)) from None
    width, height, frames = shown
    size, n_frames = fitting_size(family, height, width), fitting_frames(family, frames)
    prior = GraphPrior(family, model, clip, vae, size, n_frames, low_noise, noise)
    say_on_node(_statement(prior), node_id)
    return io.NodeOutput(prior)


def _statement(prior: GraphPrior) -> str:
    """What a model sees, and which of a pair is asked where."""
    family = prior.family
    what = "frames" if prior.orbit is None else "views at once"
    shown = f"{prior.size[1]}x{prior.size[0]}" + ("" if prior.n_frames is None else f", {prior.n_frames} {what}")
    said = f"{family.name} sees {shown} (it was trained on {family.trained_at})"
    if prior.low_noise is not None:
        return f"{said}; model is asked at times from {family.switch} of the noise on, model_low_noise below"
    if prior.part != WHOLE:
        return f"{said}; it is asked at times {'from' if prior.part == HIGH else 'below'} {family.switch} of the noise"
    return said


class ImagePriorFromModel(io.ComfyNode):
    """An image prior of the graph's models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return _schema(
            "image",
            "Dream4DImagePriorFromModel",
            "Image Prior from Model",
            "Optimize Static Scene: recipe model-image, or beside a multi-view prior in text-to-3d",
            ["sdxl prior", "flux prior"],
        )

    @classmethod
    def validate_inputs(cls, width: int | None = None, height: int | None = None) -> bool | str:
        """Refuse sizes out of the range."""
        return check_ranges(cls, width=width, height=height)

    @classmethod
    def execute(cls, model: Any, clip: Any, vae: Any, width: int, height: int) -> io.NodeOutput:
        """Wrap the three."""
        return _make("image", model, clip, vae, (width, height, 0), cls.hidden.unique_id)


class VideoPriorFromModel(io.ComfyNode):
    """A video prior of the graph's models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return _schema(
            "video",
            "Dream4DVideoPriorFromModel",
            "Video Prior from Model",
            "Animate Scene: recipe model-video",
            ["wan prior", "ltx prior"],
            [
                io.Int.Input(
                    "frames",
                    default=0,
                    min=0,
                    max=_MOST_FRAMES,
                    advanced=True,
                    tooltip="Frames of a take; 0 chooses a number that today's cards can bear. The nearest that the "
                    "autoencoder takes (4n+1, or 8n+1) is used, and said.",
                ),
                io.Model.Input(
                    "model_low_noise",
                    optional=True,
                    tooltip="The second of Wan 2.2 14B's two models, that for low noise; model is then that for high "
                    "noise. Each is asked in its own range.",
                ),
                io.Combo.Input(
                    "noise",
                    options=[WHOLE, HIGH, LOW],
                    default=WHOLE,
                    optional=True,
                    advanced=True,
                    tooltip="Where the model is asked. Of Wan 2.2 14B with one of its two models: the range it was "
                    "trained on. With both, and for all other models: all noise.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, width: int | None = None, height: int | None = None, frames: int | None = None
    ) -> bool | str:
        """Refuse sizes out of the range."""
        return check_ranges(cls, width=width, height=height, frames=frames)

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        width: int,
        height: int,
        frames: int,
        model_low_noise: Any = None,
        noise: str = WHOLE,
    ) -> io.NodeOutput:
        """Wrap the three, or four."""
        shown = (width, height, frames)
        return _make("video", model, clip, vae, shown, cls.hidden.unique_id, model_low_noise, noise)


class NovelViewPriorFromModel(io.ComfyNode):
    """A novel-view prior of the graph's models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return _schema(
            "novel_view",
            "Dream4DNovelViewPriorFromModel",
            "Novel-View Prior from Model",
            "Optimize Static Scene: recipe image-to-3d, beside a pixel prior; of SV3D recipe image-to-3d-orbit",
            ["stable zero123 prior", "sv3d prior"],
        )

    @classmethod
    def validate_inputs(cls, width: int | None = None, height: int | None = None) -> bool | str:
        """Refuse sizes out of the range."""
        return check_ranges(cls, width=width, height=height)

    @classmethod
    def execute(cls, model: Any, clip_vision: Any, vae: Any, width: int, height: int) -> io.NodeOutput:
        """Wrap the three."""
        return _make("novel_view", model, clip_vision, vae, (width, height, 0), cls.hidden.unique_id)
