"""Today's models in diffusers' format: folders of Wan, LTX-Video, HunyuanVideo, Stable Diffusion XL, 3 and Flux.

They differ from the older ones (folders.py) in their networks, in several text encoders and in the noise that they were
trained on. What a folder leaves open is its family's (families.py), unless the entry `dream4d` of its model_index.json
says another `image_size` or `n_frames`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ...documents import describe, field
from ...guidance.noise import NoiseSchedule, rectified_flow, variance_preserving
from .. import families
from ..errors import PriorError
from ..families import Family, fitting_frames, fitting_size
from ..networks.denoisers import PredictionType
from ..networks.text import Tokenizer, read_tokenizer
from .configurations import FLOW_SCHEDULER, SHIFTS, schedule_of
from .folders import (
    ENCODER,
    INDEX,
    MOST_PIXELS,
    NETWORK,
    load_encoder,
    load_network,
    part_config,
    read_json,
    weight_files,
)
from .loaders import Device, Metadata, PriorKind, declared

TextKind = Literal["clip", "clip projection", "t5", "umt5", "llama"]
_CLASSES: dict[TextKind, tuple[str, str]] = {
    "clip": ("CLIPTextModel", "CLIPTextConfig"),
    "clip projection": ("CLIPTextModelWithProjection", "CLIPTextConfig"),
    "t5": ("T5EncoderModel", "T5Config"),
    "umt5": ("UMT5EncoderModel", "UMT5Config"),
    "llama": ("LlamaModel", "LlamaConfig"),
}
_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
_SHARED_SCHEDULERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")  # of flows where they say so


@dataclass(frozen=True)
class Layout:
    """What the folder of one pipeline holds."""

    family: Family
    network: str  # the class of the denoiser
    vae: str  # the class of the autoencoder
    texts: Mapping[str, TextKind]  # the parts that encode prompts
    optional: tuple[str, ...] = ()  # of those, what a folder may lack

    @property
    def part(self) -> str:
        """The folder of the denoiser."""
        return "unet" if self.network.startswith("UNet") else "transformer"


LAYOUTS = {
    "WanPipeline": Layout(families.WAN, "WanTransformer3DModel", "AutoencoderKLWan", {"text_encoder": "umt5"}),
    "LTXPipeline": Layout(families.LTX, "LTXVideoTransformer3DModel", "AutoencoderKLLTXVideo", {"text_encoder": "t5"}),
    "HunyuanVideoPipeline": Layout(
        families.HUNYUAN,
        "HunyuanVideoTransformer3DModel",
        "AutoencoderKLHunyuanVideo",
        {"text_encoder": "llama", "text_encoder_2": "clip"},
    ),
    "StableDiffusionXLPipeline": Layout(
        families.SDXL,
        "UNet2DConditionModel",
        "AutoencoderKL",
        {"text_encoder": "clip", "text_encoder_2": "clip projection"},
    ),
    "StableDiffusion3Pipeline": Layout(
        families.SD3,
        "SD3Transformer2DModel",
        "AutoencoderKL",
        {"text_encoder": "clip projection", "text_encoder_2": "clip projection", "text_encoder_3": "t5"},
        ("text_encoder_3",),
    ),
    "FluxPipeline": Layout(
        families.FLUX, "FluxTransformer2DModel", "AutoencoderKL", {"text_encoder": "clip", "text_encoder_2": "t5"}
    ),
}
_NOT_SO = {
    "HunyuanVideoImageToVideoPipeline": "it is made to continue an image",
    "HunyuanSkyreelsImageToVideoPipeline": "it is made to continue an image",
    "HunyuanVideoFramepackPipeline": "it is made to continue images",
    "HunyuanVideo15Pipeline": "HunyuanVideo 1.5 is another model, which is not known here",
    "HunyuanVideo15ImageToVideoPipeline": "it is made to continue an image",
    "WanImageToVideoPipeline": "it is made to continue an image",
    "LTXImageToVideoPipeline": "it is made to continue an image",
    "LTXConditionPipeline": "it is made to continue images",
    "StableDiffusionXLInpaintPipeline": "it is made to fill holes in images",
    "StableDiffusionXLImg2ImgPipeline": "it is a refiner, which only finishes images of another model",
    "FluxFillPipeline": "it is made to fill holes in images",
    "FluxKontextPipeline": "it is made to edit images",
    "FluxControlPipeline": "it is made to follow another image",
}


def open_pipeline(path: Path) -> PipelineFolder | None:
    """Return what is in a folder of one of these pipelines; None where it is none of them. PriorError where it can't
    be used and the reason is known."""
    if not (path / INDEX).is_file():
        return None
    name = read_json(path, INDEX).get("_class_name")
    if not isinstance(name, str):
        return None
    if name in _NOT_SO:
        raise PriorError(f"{path / INDEX}: a {name} can't be used, as {_NOT_SO[name]}")
    return PipelineFolder(path, name) if name in LAYOUTS else None


@dataclass(frozen=True)
class PipelineFolder:
    """A folder of one of LAYOUTS. Networks come frozen, in eval mode."""

    path: Path
    class_name: str

    @property
    def layout(self) -> Layout:
        """What it should hold."""
        return LAYOUTS[self.class_name]

    @property
    def family(self) -> Family:
        """Its family; Wan's two autoencoders are of two families."""
        family = self.layout.family
        if family == families.WAN and self.config("vae").get("z_dim") == 48:
            return families.WAN22_5B
        return family

    def config(self, part: str) -> dict[str, Any]:
        """A part's configuration."""
        return part_config(self.path, part)[0]

    def metadata(self, kind: PriorKind | None = None) -> Metadata:
        """Say what the model is, by its files of text alone; `kind`: what it is wanted for."""
        family, where = self.family, f"{self.path / INDEX}: dream4d"
        if kind is not None and kind != family.kind:
            raise PriorError(f"{self.path} is a model of {family.name}, of the kind {family.kind!r} and not {kind!r}")
        ours = field(read_json(self.path, INDEX), "dream4d", dict, self.path / INDEX, PriorError, {})
        size = _size(ours["image_size"], family, where) if ours.get("image_size") is not None else family.size
        path = self.path.resolve()
        name = path.parents[1].name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name
        found = declared(ours, where, Metadata(name, family.kind, size, family.n_frames))
        if found.n_frames != (None if found.n_frames is None else fitting_frames(family, found.n_frames)):
            raise PriorError(
                f"{where}: n_frames is {found.n_frames}; {family.name} makes takes of a multiple of "
                f"{family.frame_step} and one more"
            )
        n_frames = None if family.n_frames is None else found.n_frames or family.n_frames
        notes = (f"{found.name} ({family.name}) is asked for {_asked(size, n_frames)}; trained at {family.trained_at}",)
        return replace(found, n_frames=n_frames, notes=notes)

    def check(self) -> None:
        """Raise PriorError, which names the file, unless all parts that are needed are there and fit together."""
        index = read_json(self.path, INDEX)
        if index.get("transformer_2", [None])[0] is not None and index.get("boundary_ratio"):
            raise PriorError(
                f"{self.path / INDEX}: the model has two experts (transformer_2), and a folder is asked as one: load "
                "them in ComfyUI and connect one to Video Prior from Model"
            )
        self._class(self.layout.part, self.layout.network)
        self._class("vae", self.layout.vae)
        self.noise()
        for part in (self.layout.part, "vae"):
            weight_files(self.path, part, NETWORK)
        for part in self.texts:
            part_config(self.path, part)
            weight_files(self.path, part, ENCODER)
            if not (self.path / _TOKENIZERS[part]).is_dir():
                raise PriorError(f"{self.path} is not a complete diffusers folder: {_TOKENIZERS[part]}/ is missing")
        self._check_widths()

    @property
    def texts(self) -> dict[str, TextKind]:
        """The parts that encode prompts, without what this folder may lack and does."""
        index, layout = read_json(self.path, INDEX), self.layout

        def there(part: str) -> bool:
            listed = index.get(part)
            return part not in layout.optional or (isinstance(listed, list) and any(listed))

        return {part: kind for part, kind in layout.texts.items() if there(part)}

    def _class(self, part: str, wanted: str) -> None:
        config, where = part_config(self.path, part)
        name = field(config, "_class_name", str, where, PriorError, wanted)
        if name != wanted:
            raise PriorError(f"{where}: _class_name is {describe(name)}; a {self.class_name} has a {wanted}")

    def _check_widths(self) -> None:
        """Refuse a denoiser that reads other latents or other words than it will get."""
        network, where = part_config(self.path, self.layout.part)
        vae, place = part_config(self.path, "vae")
        if network.get("image_condition_type") is not None:  # of HunyuanVideo
            raise PriorError(
                f"{where}: image_condition_type is {describe(network['image_condition_type'])}: a model for continuing "
                "images can't be used"
            )
        latents = vae.get("z_dim", vae.get("latent_channels"))
        packed = 4 if self.family == families.FLUX else 1  # squares of 2x2 places are one token
        read = network.get("in_channels")
        if isinstance(latents, int) and isinstance(read, int) and read != packed * latents:
            raise PriorError(
                f"{where}: in_channels is {read}, but {place} gives {packed * latents}: a model for inpainting, "
                "editing or continuing images can't be used"
            )
        names = ("text_dim", "caption_channels", "joint_attention_dim", "text_embed_dim")
        wide = next((n for n in names if n in network), None)
        for part, kind in self.texts.items():
            encoder, origin = part_config(self.path, part)
            made = encoder.get("hidden_size" if kind == "llama" else "d_model")
            if "clip" not in kind and wide and isinstance(made, int) and made != network[wide]:
                raise PriorError(
                    f"{where}: {wide} is {describe(network[wide])}, {origin} says that the text encoder's tokens are "
                    f"{made} wide: they are not of one model"
                )

    def prediction(self) -> PredictionType:
        """What the denoiser's output means."""
        return self._unet_schedule()[1] if self.layout.part == "unet" else "flow"

    def noise(self) -> NoiseSchedule:
        """The noise levels that the model was trained on, at the size that it is asked for."""
        if self.layout.part == "unet":
            return variance_preserving(self._unet_schedule()[0])
        name = "scheduler/scheduler_config.json"
        return rectified_flow(flow_shift(read_json(self.path, name), self._n_tokens(), self.path / name))

    def _unet_schedule(self) -> tuple[torch.Tensor, PredictionType]:
        name = "scheduler/scheduler_config.json"
        return schedule_of(read_json(self.path, name), self.path / name)

    def _n_tokens(self) -> int:
        """How many tokens the denoiser makes of what it is asked for."""
        metadata, vae = self.metadata(), self.config("vae")
        if self.layout.family == families.LTX:
            (height, width), frames = metadata.image_size, metadata.n_frames or 1
            return ((frames - 1) // 8 + 1) * (height // 32) * (width // 32)
        side = 2 ** (len(vae.get("block_out_channels") or [0] * 4) - 1) * 2  # the autoencoder's, then squares of 2x2
        return (metadata.image_size[0] // side) * (metadata.image_size[1] // side)

    def network(self, dtype: torch.dtype, device: Device) -> nn.Module:
        """Load the denoiser."""
        self.check()
        network = load_network(self.path, self.layout.part, self.layout.network, dtype, device)
        wide = getattr(type(network), "_keep_in_fp32_modules", None) or ()  # the library keeps them so, too
        for name, parameter in network.named_parameters():
            if set(name.split(".")) & set(wide):
                parameter.data = parameter.data.float()
        return network

    def vae(self, dtype: torch.dtype, device: Device) -> nn.Module:
        """Load the autoencoder; what overflows in half precision in bfloat16."""
        if dtype == torch.float16 and self.config("vae").get("force_upcast"):
            dtype = torch.bfloat16
        vae = load_network(self.path, "vae", self.layout.vae, dtype, device)
        if self.family == families.HUNYUAN:  # over 16 frames the library would encode overlapping parts and blend them
            vae.use_framewise_encoding = False  # type: ignore[assignment]
        return vae

    def text_encoder(self, part: str, dtype: torch.dtype, device: Device) -> tuple[Tokenizer, nn.Module]:
        """Load one of the tokenizers and its text encoder."""
        tokenizer = read_tokenizer(self.path / _TOKENIZERS[part])
        return tokenizer, load_encoder(self.path, part, *_CLASSES[self.texts[part]], dtype, device)


def flow_shift(config: Mapping[str, Any], n_tokens: int, where: object) -> float:
    """Return how far a flow's times were moved towards noise (noise.rectified_flow), by a scheduler's configuration.

    Args:
        n_tokens: of what is asked for; where the shift depends on the size it follows from it. That the last steps of a
            sampler are stretched (`shift_terminal`) is of sampling alone and is left out.
    """
    name = field(config, "_class_name", str, where, PriorError, FLOW_SCHEDULER)
    flows = name == FLOW_SCHEDULER or (name in _SHARED_SCHEDULERS and config.get("use_flow_sigmas"))
    if not flows:
        raise PriorError(
            f"{where} describes a {describe(name)}; of flows {', '.join((FLOW_SCHEDULER, *_SHARED_SCHEDULERS))} with "
            "use_flow_sigmas are known"
        )
    if field(config, "use_dynamic_shifting", bool, where, PriorError, False):
        known = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
        low, high, few, many = (field(config, n, float, where, PriorError, float(v)) for n, v in known.items())
        if few == many:
            raise PriorError(f"{where}: base_image_seq_len and max_image_seq_len are both {few:g}: they must differ")
        mu = low + (high - low) * (n_tokens - few) / (many - few)
        # the time t becomes e^mu / (e^mu + 1 / t - 1), or with mu itself: 2403.03206, section 5.3.2
        linear = field(config, "time_shift_type", str, where, PriorError, "exponential") == "linear"
        shift = mu if linear else math.exp(min(mu, 100.0))
    else:
        shift = field(config, "flow_shift" if "flow_shift" in config else "shift", float, where, PriorError, 1.0)
    if not SHIFTS[0] <= shift <= SHIFTS[1]:
        raise PriorError(f"{where}: the shift is {shift:g}; {SHIFTS[0]:g} to {SHIFTS[1]:g} can be meant")
    return shift


def _size(size: Any, family: Family, where: str) -> tuple[int, int]:
    plain = isinstance(size, list) and len(size) == 2 and all(type(s) is int and 1 <= s <= MOST_PIXELS for s in size)
    if not plain or fitting_size(family, *size) != tuple(size):
        raise PriorError(
            f"{where}: image_size must be height and width, multiples of {family.multiple} up to {MOST_PIXELS}, got "
            f"{describe(size)}"
        )
    return size[0], size[1]


def _asked(size: tuple[int, int], n_frames: int | None) -> str:
    plain = f"{size[1]}x{size[0]}"
    return plain if n_frames is None else f"{n_frames} frames of {plain}"
