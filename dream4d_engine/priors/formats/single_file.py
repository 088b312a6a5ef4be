"""Models in one file: the checkpoints of Stable Diffusion, MVDream and Zero123, and networks under diffusers' names.

A checkpoint in latent diffusion's layout says by its shapes what it is. What shapes leave open comes from the model's
own configuration (the .json or .yaml that it was trained by), given by hand or lying beside the file under its name:

    linear_start, linear_end, timesteps, scale_factor, parameterization ("eps" or "v"), image_size (in latents),
    unet_config.params.num_head_channels or num_heads, cond_stage_config.params.layer

Without one, what was assumed is in `Metadata.notes`. A file of networks under diffusers' names (`unet.*`, `vae.*`)
needs a configuration:

    {"unet": {arguments}, "vae": {arguments}, "scheduler": {arguments}, "dream4d": {see folders.py}}

What lies beside a file and has none of these fields (a gallery's notes on the model) is passed over, and noted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...documents import as_object, describe, field, read_document
from ...guidance.noise import NoiseSchedule
from ..errors import PriorError
from ..networks.denoisers import PredictionType
from ..networks.text import CLIP_TOKENS, END, Tokenizer, clip_tokenizer
from . import clip_keys, ldm_keys
from .checkpoints import Checkpoint, shown
from .configurations import built, noise_of, schedule_of
from .loaders import (
    FRAMES,
    ORBITS,
    Device,
    Metadata,
    PriorKind,
    check_kind,
    declared,
    encoder_state,
    filled,
    filled_network,
    frozen,
    latents_of,
)

T = TypeVar("T")

# the settings of every model of this family
LINEAR_START, LINEAR_END, TIMESTEPS, SCALE_FACTOR = 0.00085, 0.0120, 1000, 0.18215

_LATENTS = {"image": 64, "multiview": 32, "novel_view": 32}  # their side: images of 512 and 256 pixels
_V_LATENTS = 96  # Stable Diffusion 2's v-models were trained at 768 pixels, its others at 512
# Of the biases that ldm_keys.prediction_mark names: the training for v at 768 pixels went on from the one for noise and
# moved them. Other loaders of these checkpoints tell the published models apart at the same value.
_V_SPREAD = 0.09
_MOST_STEPS, _MOST_LATENTS = 10_000, 512
_PREDICTIONS = {"eps": "epsilon", "epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_INPUTS = {"image": 4, "multiview": 4, "novel_view": 8}  # channels: latents, of Zero123 the reference's beside them


# ---- Their configuration -----------------------------------------------------------------------------------------

_LDM_FIELDS = (
    *("linear_start", "linear_end", "timesteps", "scale_factor", "parameterization", "image_size"),
    *("unet_config", "cond_stage_config", "first_stage_config"),
)
_FIELDS = {*_LDM_FIELDS, "unet", "scheduler", "dream4d"}  # not "vae" alone: galleries note a file's name under it


@dataclass(frozen=True, eq=False)
class Configuration:
    """A model's configuration, of LDM's the model's `params`."""

    content: Mapping[str, Any]
    where: str  # the file that it is from, as messages name it
    notes: tuple[str, ...] = ()  # on what was passed over, for Metadata
    beside: Path | None = None  # where it was found beside the model's file

    def section(self, *names: str) -> dict[str, Any]:
        """An object in it, by the names that lead there; {} where one is missing or null."""
        found: dict[str, Any] = dict(self.content)
        for i, name in enumerate(names):
            inner = found.get(name)
            found = {} if inner is None else as_object(inner, f"{self.where}: {'.'.join(names[: i + 1])}", PriorError)
        return found


def configs_beside(path: Path) -> list[Path]:
    """The files of a checkpoint's name that may hold its configuration, those that are there."""
    places = (path.with_suffix(suffix) for suffix in (".json", ".yaml", ".yml"))
    return [place for place in places if place.is_file()]


def configs_read(path: Path) -> list[Path]:
    """The one of them that says what the model is; all where that can't be told. A gallery's notes are none."""
    try:
        beside = find_config(path, None).beside
    except PriorError:  # said where the model is loaded
        return configs_beside(path)
    return [] if beside is None else [beside]


def find_config(path: Path, config: Mapping[str, Any] | Path | str | None) -> Configuration:
    """Return the configuration that is given, or lies beside the file, or an empty one."""
    if config is not None:
        if isinstance(config, Mapping):
            content, where = dict(config), "the given configuration"
        else:
            content, where = as_object(read_document(config, PriorError), config, PriorError), str(config)
        inner = _settings_in(content)
        if inner is None and content:
            raise PriorError(f"{where} has none of a model's settings ({', '.join(sorted(_FIELDS))})")
        return Configuration(inner or {}, where)
    notes: tuple[str, ...] = ()
    for place in configs_beside(path):
        try:
            content = read_document(place, PriorError)
        except PriorError as error:
            raise PriorError(f"{error}. It lies beside {path.name}: mend it, or move it away") from error
        inner = _settings_in(content)
        if inner is not None:
            return Configuration(inner, f"{place} (beside {path.name}: mend it, or move it away)", notes, place)
        notes = (*notes, f"{place} was passed over: it has none of a model's settings")
    return Configuration({}, "the model's configuration", notes)


def _settings_in(content: object) -> dict[str, Any] | None:
    """What a document says of a model, wherever it stands in it; None where it speaks of other things."""
    found = None
    # the innermost that holds a known field, as in {"model": {"params": {...}}}; a gallery's file has a "model" too
    for name in ("model", "params", None):
        if isinstance(content, Mapping):
            found = dict(content) if _FIELDS & content.keys() else found
            content = content[name] if isinstance(content.get(name), Mapping) else content
    return found


@dataclass(frozen=True)
class LdmSettings:
    """What a configuration of latent diffusion says, checked; None: nothing."""

    timesteps: int
    linear_start: float  # the first beta, and below the last: their roots lie on a line ("scaled linear")
    linear_end: float
    scale_factor: float  # what the autoencoder's latents are multiplied by
    parameterization: str | None  # what the UNet predicts, a key of _PREDICTIONS
    image_size: int | None  # the latents' side


def ldm_settings(config: Configuration) -> LdmSettings:
    """Read a configuration of latent diffusion. PriorError names the field that can't be meant."""

    def number(name: str, default: float, low: float, high: float) -> float:
        value = field(config.content, name, type(default), config.where, PriorError, default)
        if not low <= value <= high:
            raise PriorError(f"{config.where}: {name} must lie in [{low}, {high}], got {describe(value)}")
        return value

    said = config.content.get("image_size") is not None
    start = number("linear_start", LINEAR_START, 1e-6, 0.999)
    return LdmSettings(
        timesteps=int(number("timesteps", TIMESTEPS, 2, _MOST_STEPS)),
        linear_start=start,
        linear_end=number("linear_end", max(LINEAR_END, start), start, 0.999),
        scale_factor=number("scale_factor", SCALE_FACTOR, 1e-3, 1e3),
        parameterization=field(config.content, "parameterization", str, config.where, PriorError, "") or None,
        image_size=int(number("image_size", 64, 1, _MOST_LATENTS)) if said else None,
    )


# ---- Latent diffusion's layout -----------------------------------------------------------------------------------


def ldm_kind(file: Checkpoint) -> PriorKind | None:
    """Say what a checkpoint in latent diffusion's layout is; None for other files. PriorError for its other uses."""
    first = file.shapes.get(f"{ldm_keys.UNET}input_blocks.0.0.weight")
    if first is None:
        return None
    if any(name.startswith(ldm_keys.UNET) and ".time_stack." in name for name in file.shapes):
        raise PriorError(f"{file.path} is {ORBITS}")
    if f"{ldm_keys.UNET}label_emb.0.0.weight" in file.shapes:
        raise PriorError(f"{file.path} is a Stable Diffusion XL or unCLIP model: Stable Diffusion 1 and 2 can be used")
    if f"{ldm_keys.PROJECTION}weight" in file.shapes:
        kind: PriorKind = "novel_view"
    else:
        kind = "multiview" if f"{ldm_keys.UNET}camera_embed.0.weight" in file.shapes else "image"
    n_inputs = first[1] if len(first) == 4 else 0
    if n_inputs != _INPUTS[kind]:
        raise PriorError(
            f"{file.path}: its UNet has {n_inputs} input channels, not {_INPUTS[kind]}: models for inpainting, depth "
            "or editing can't be used"
        )
    return kind


@dataclass(frozen=True, eq=False)
class LdmLoader:
    """A checkpoint in latent diffusion's layout (see ldm_keys.py); loaders.Loader says what each method gives."""

    file: Checkpoint
    config: Configuration

    @property
    def path(self) -> Path:
        return self.file.path

    @cached_property
    def settings(self) -> LdmSettings:
        return ldm_settings(self.config)

    @cached_property
    def unet_config(self) -> dict[str, Any]:
        """The arguments of UNet2DConditionModel."""
        params = self.config.section("unet_config", "params")
        shapes = self.file.under(ldm_keys.UNET)
        return self._naming_file(lambda: ldm_keys.unet_config(shapes, params, self._latents()))

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The arguments of AutoencoderKL."""
        shapes = self.file.under(ldm_keys.VAE)
        if not shapes:
            raise PriorError(f"{self.path} has no autoencoder ({ldm_keys.VAE}*)")
        return self._naming_file(lambda: ldm_keys.vae_config(shapes, self.vae_scaling()))

    def _naming_file(self, make: Callable[[], T]) -> T:
        """Name the file in what is wrong with its tensors or its configuration."""
        try:
            return make()
        except PriorError as error:
            if str(error).startswith("the checkpoint"):
                raise PriorError(f"{self.path}: {error}") from error
            raise PriorError(str(error).replace("the model's configuration", self.config.where, 1)) from error

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """The configuration of a diffusers scheduler; the file's own schedule, if it has one that is another."""
        config = {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": self.settings.timesteps,
            "beta_start": self.settings.linear_start,
            "beta_end": self.settings.linear_end,
            "beta_schedule": "scaled_linear",
            "prediction_type": self._prediction[0],
            "clip_sample": False,
            "steps_offset": 1,
        }
        betas = self._own_betas()
        if betas is not None:
            # within 1e-3 it is the same schedule, stored in less precision
            alphas_bar = schedule_of(config)[0].double()
            if alphas_bar.shape != betas.shape or not torch.allclose((1 - betas).cumprod(0), alphas_bar, rtol=1e-3):
                config |= {"trained_betas": betas.tolist(), "num_train_timesteps": len(betas)}
        return config

    def _own_betas(self) -> Tensor | None:
        """The noise schedule that the file itself holds, [T], float64."""
        shape = self.file.shapes.get("betas")
        if shape is None:
            return None
        if len(shape) != 1 or not 2 <= shape[0] <= _MOST_STEPS:
            raise PriorError(f"{self.path}: betas has shape {shape}, not one of 2 to {_MOST_STEPS:,} steps")
        betas = self._tensor("betas", torch.float64, "cpu")
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise PriorError(f"{self.path}: betas holds numbers that don't lie between 0 and 1")
        return betas

    @cached_property
    def _prediction(self) -> tuple[str, str | None]:
        """What the UNet predicts, in diffusers' word; and of which tensor that was told, None where it is said.

        In this order: the configuration, the header (`modelspec.prediction_type`), the mark that trainers leave for
        v-models (a tensor `v_pred`), the weights; noise where nothing tells.
        """
        for said in (self.settings.parameterization, self.file.extra.get("modelspec.prediction_type")):
            if said:
                if said not in _PREDICTIONS:
                    raise PriorError(f"{self.path}: unknown parameterization {describe(said)}: eps and v can be used")
                return _PREDICTIONS[said], None
        if "v_pred" in self.file.shapes:
            return "v_prediction", None
        mark = self._mark
        if mark is None:
            return "epsilon", None
        spread = float(self._tensor(ldm_keys.UNET + mark, torch.float32, "cpu").std(correction=0))
        return "v_prediction" if spread > _V_SPREAD else "epsilon", mark

    @cached_property
    def _mark(self) -> str | None:
        """The tensor that tells Stable Diffusion 2's two sorts of models apart; None in all other models."""
        if self._kind != "image":
            return None
        shapes = self.file.under(ldm_keys.UNET)
        mark = self._naming_file(lambda: ldm_keys.prediction_mark(shapes))
        return mark if mark is not None and len(shapes[mark]) == 1 else None

    def _notes(self) -> Iterable[str]:
        """What was assumed of the model, one sentence each."""
        yield from self.config.notes
        predicted, mark = self._prediction
        name = self.path.name
        says = f'if that is wrong, say "parameterization": "eps" or "v" in a {self.path.stem}.json or .yaml beside it'
        if mark is not None:
            sort = "a v-model" if predicted == "v_prediction" else "a model that predicts noise (eps)"
            yield f"{name} does not say what its UNet predicts; by its weights ({mark}) it was taken for {sort}; {says}"
        if self._mark is not None and self._declared_latents() is None:
            size = self._latents()
            yield f"{name} does not say its image size: {8 * size} pixels were assumed (image_size: {size} in latents)"

    @cached_property
    def _kind(self) -> PriorKind:
        kind = ldm_kind(self.file)
        if kind is None:
            raise PriorError(f"{self.path} is no checkpoint of Stable Diffusion, MVDream or Zero123")
        return kind

    def _declared_latents(self) -> int | None:
        """The latents' side that the configuration gives, or the header, where that speaks of a square."""
        if self.settings.image_size is not None:
            return self.settings.image_size
        found = re.fullmatch(r"(\d{2,4})x(\d{2,4})", str(self.file.extra.get("modelspec.resolution", "")))
        side = int(found[1]) if found and found[1] == found[2] else 0
        return side // 8 if side and side % 64 == 0 and side // 8 <= _MOST_LATENTS else None

    def _latents(self) -> int:
        declared = self._declared_latents()
        if declared is not None:
            return declared
        is_v = self._mark is not None and self._prediction[0] == "v_prediction"
        return _V_LATENTS if is_v else _LATENTS[self._kind]

    def metadata(self, kind: PriorKind | None = None) -> Metadata:
        """Say what the model is, after a look at all that says how its networks are built."""
        kind = kind or self._kind
        check_kind(kind, self.path)
        if kind != self._kind:
            raise PriorError(f"{self.path} is a model of kind {self._kind!r} and can't be used as {kind!r}")
        # latents' side times the autoencoder's factor
        size = self._latents() * self.latents()[1]
        _ = self.unet_config, self.scheduler_config  # PriorError where they make no sense
        if self.encoder_layout() in ("open_clip", "transformers"):
            self.text_parts()
        grouped = kind == "multiview"
        return Metadata(
            name=self.path.stem,
            kind=kind,
            image_size=(size, size),
            n_frames=FRAMES.get(kind),
            vector="camera" if grouped else None,
            group_attention=grouped,
            notes=tuple(self._notes()),
        )

    def schedule(self) -> tuple[NoiseSchedule, PredictionType]:
        return noise_of(self.scheduler_config)

    def unet(self, dtype: torch.dtype, device: Device) -> nn.Module:
        """Build the UNet of the checkpoint's tensors; of their running means, where it keeps those too."""
        keys = self.file.under(ldm_keys.UNET)
        # a running mean of a part of them only belongs to another training
        averaged = all(ldm_keys.ema_name(key) in self.file.shapes for key in keys)
        sources = {key: ldm_keys.ema_name(key) if averaged else ldm_keys.UNET + key for key in keys}
        names, config = self._naming_file(lambda: ldm_keys.unet_names(keys)), self.unet_config
        state = {names[key]: self._tensor(source, dtype, device) for key, source in sources.items()}
        return filled_network("UNet2DConditionModel", config, state, f"{self.path}: its UNet", device)

    def vae(self, dtype: torch.dtype, device: Device) -> nn.Module:
        """Build the autoencoder; what are 1x1 convolutions there are linear layers in diffusers."""
        keys, config = self.file.under(ldm_keys.VAE), self.vae_config
        names = self._naming_file(lambda: ldm_keys.vae_names(keys))
        state = {}
        for key, name in names.items():
            tensor = self._tensor(ldm_keys.VAE + key, dtype, device)
            flat = "attentions" in name and tensor.ndim > 2 and tensor[0, 0].numel() == 1
            state[name] = tensor.flatten(1) if flat else tensor
        return filled_network("AutoencoderKL", config, state, f"{self.path}: its autoencoder", device)

    def latents(self) -> tuple[int, int]:
        config = self.vae_config
        return config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)

    def vae_scaling(self) -> float:
        return self.settings.scale_factor

    def encoder_layout(self) -> clip_keys.EncoderLayout | None:
        """Say which encoder of the condition the checkpoint has, if any."""
        prefer: clip_keys.EncoderLayout = "clip_image" if self._kind == "novel_view" else "open_clip"
        return clip_keys.encoder_layout(self.file.under(ldm_keys.CONDITION), prefer)

    def text_parts(self) -> tuple[dict[str, Any], dict[str, clip_keys.Piece]]:
        """Return the arguments of CLIPTextConfig and where CLIPTextModel's tensors are."""
        shapes, layout = self.file.under(ldm_keys.CONDITION), self.encoder_layout()
        if layout not in ("open_clip", "transformers"):
            held = sorted({".".join(name.split(".")[:2]) for name in shapes})[:3]
            what = f"{ldm_keys.CONDITION}* is {', '.join(map(shown, held))}" if held else f"no {ldm_keys.CONDITION}*"
            raise PriorError(f"{self.path} has no text encoder ({what}): prompts can't be encoded with it")
        condition = self.config.section("cond_stage_config", "params")
        config = self._naming_file(lambda: clip_keys.text_config(shapes, layout, condition))
        width, read = config["hidden_size"], self.unet_config["cross_attention_dim"]
        if width != read:
            raise PriorError(f"{self.path}: its text encoder gives {width} numbers a token, its UNet reads {read}")
        return config, self._naming_file(lambda: clip_keys.text_pieces(shapes, layout, condition))

    def text_encoder(self, dtype: torch.dtype, device: Device) -> tuple[Tokenizer, nn.Module]:
        """Build CLIP's text encoder; its tokenizer comes with this package."""
        from transformers import CLIPTextConfig, CLIPTextModel

        config, pieces = self.text_parts()
        encoder = self._encoder(CLIPTextModel, CLIPTextConfig(**config), pieces, dtype, device)
        return clip_tokenizer(self.pad_token(), min(config["max_position_embeddings"], CLIP_TOKENS)), encoder

    def pad_token(self) -> str:
        """Return what the text encoder's prompts were padded with."""
        return END if self.text_parts()[0]["pad_token_id"] else "!"

    def image_parts(self) -> tuple[dict[str, Any], dict[str, clip_keys.Piece]]:
        """Return the arguments of CLIPVisionConfig and where CLIPVisionModelWithProjection's tensors are."""
        shapes = self.file.under(ldm_keys.CONDITION)
        if self.encoder_layout() != "clip_image":
            raise PriorError(f"{self.path} has no image encoder: images can't be encoded with it")
        return self._naming_file(lambda: (clip_keys.vision_config(shapes), clip_keys.vision_pieces(shapes)))

    def image_encoder(self, dtype: torch.dtype, device: Device) -> nn.Module:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        config, pieces = self.image_parts()
        return self._encoder(CLIPVisionModelWithProjection, CLIPVisionConfig(**config), pieces, dtype, device)

    def _encoder(
        self, model_class: Any, config: Any, pieces: Mapping[str, clip_keys.Piece], dtype: torch.dtype, device: Device
    ) -> nn.Module:
        state = {
            name: piece.take(lambda key: self._tensor(ldm_keys.CONDITION + key, dtype, "cpu"))
            for name, piece in pieces.items()
        }
        what = f"{self.path}: its encoder"
        encoder = built(lambda: model_class(config), model_class.__name__, what)
        return frozen(filled(encoder, encoder_state(encoder, state), what).to(dtype), device, what)

    def projection(self, device: Device) -> tuple[Tensor, Tensor]:
        weight, bias = (self._tensor(ldm_keys.PROJECTION + part, torch.float32, device) for part in ("weight", "bias"))
        return weight, bias

    def _tensor(self, name: str, dtype: torch.dtype, device: Device) -> Tensor:
        if name not in self.file.shapes:
            raise PriorError(f"{self.path} is not complete: {shown(name)} is missing")
        return usable(self.file, name).to(device, dtype)


def usable(file: Checkpoint, name: str) -> Tensor:
    """Read a tensor that must be one of weights: what is stored as whole numbers means something else."""
    tensor = file.tensor(name)
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise PriorError(f"{file.path}: {shown(name)} is stored as {kind}: quantized weights can't be used")
    return tensor


# ---- Networks under diffusers' names -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class NetworksLoader:
    """A file with the tensors of a UNet, and perhaps an autoencoder, under diffusers' names."""

    file: Checkpoint
    config: Configuration

    @property
    def path(self) -> Path:
        return self.file.path

    def _unet_config(self) -> dict[str, Any]:
        if self.config.content.get("unet") is None:
            raise PriorError(
                f"{self.path} holds networks without their configuration: give config={{'unet': ..., 'scheduler': "
                f"...}}, or put it beside the file as {self.path.stem}.json"
            )
        return self._network_config("unet")

    def _network_config(self, name: str) -> dict[str, Any]:
        config = {key: value for key, value in self.config.section(name).items() if not key.startswith("_")}
        _refuse_large(config, len(self.file.shapes), f"{self.config.where}: {name}")
        return config

    def _has_vae(self) -> bool:
        return bool(self.config.section("vae")) and any(name.startswith("vae.") for name in self.file.shapes)

    def metadata(self, kind: PriorKind | None = None) -> Metadata:
        unet, ours, where = self._unet_config(), self.config.section("dream4d"), f"{self.config.where}: dream4d"
        kind = check_kind(kind or field(ours, "kind", str, where, PriorError, "") or self._guess(unet), self.path)
        assumed = Metadata(
            name=self.path.stem,
            kind=kind,
            image_size=self._image_size(unet, ours, where),
            n_frames=FRAMES.get(kind),
            vector="camera" if kind == "multiview" else None,
            group_attention=kind == "multiview",
            notes=self.config.notes,
        )
        return declared(ours, where, assumed)

    def _image_size(self, unet: Mapping[str, Any], ours: Mapping[str, Any], where: str) -> tuple[int, int]:
        """Return (height, width) in pixels: as declared, else the UNet's sample size times the autoencoder's factor."""
        latents = self.latents()
        factor = 1 if latents is None else latents[1]
        size = unet.get("sample_size") or 64
        said = ours.get("image_size") or [n * factor if type(n) is int else n for n in _pair(size)]
        if len(_pair(said)) != 2 or not all(type(n) is int and 8 <= n <= 8 * _MOST_LATENTS for n in _pair(said)):
            raise PriorError(f"{where}.image_size must be [height, width] in pixels, got {describe(said)}")
        height, width = _pair(said)
        return height, width

    def _guess(self, unet: dict[str, Any]) -> PriorKind:
        if self._is_3d(unet):
            return "video"
        if unet.get("class_embed_type") == "projection":
            return "multiview"
        return "image" if self._has_vae() else "pixel"

    @staticmethod
    def _is_3d(unet: dict[str, Any]) -> bool:
        blocks = unet.get("down_block_types")
        return isinstance(blocks, list | tuple) and any("3D" in str(name) for name in blocks)

    def schedule(self) -> tuple[NoiseSchedule, PredictionType]:
        if self.config.content.get("scheduler") is None:
            raise PriorError(f"{self.path}: its configuration has no 'scheduler'")
        config, where = self.config.section("scheduler"), f"{self.config.where}: scheduler"
        return noise_of(config, where)

    def unet(self, dtype: torch.dtype, device: Device) -> nn.Module:
        config = self._unet_config()
        name = "UNet3DConditionModel" if self._is_3d(config) else "UNet2DConditionModel"
        return filled_network(name, config, self._state("unet.", dtype, device), f"{self.path}: its UNet", device)

    def vae(self, dtype: torch.dtype, device: Device) -> nn.Module | None:
        if not self._has_vae():
            return None
        state, config = self._state("vae.", dtype, device), self._network_config("vae")
        return filled_network("AutoencoderKL", config, state, f"{self.path}: its autoencoder", device)

    def latents(self) -> tuple[int, int] | None:
        if not self._has_vae():
            return None
        # without a word of its levels an AutoencoderKL has one
        return latents_of({"block_out_channels": [0], **self._network_config("vae")}, f"{self.config.where}: vae")

    def vae_scaling(self) -> float | None:
        if not self._has_vae():
            return None
        where = f"{self.config.where}: vae"
        return field(self.config.section("vae"), "scaling_factor", float, where, PriorError, SCALE_FACTOR)

    def _state(self, prefix: str, dtype: torch.dtype, device: Device) -> dict[str, Tensor]:
        names = [name for name in self.file.shapes if name.startswith(prefix)]
        if not names and prefix == "unet.":  # a UNet alone, as save_pretrained writes it: without a prefix
            names, prefix = list(self.file.shapes), ""
        return {name.removeprefix(prefix): usable(self.file, name).to(device, dtype) for name in names}

    def text_encoder(self, dtype: torch.dtype, device: Device) -> tuple[Tokenizer, nn.Module]:
        raise PriorError(f"{self.path} has no text encoder: prompts can't be encoded with it")

    def image_encoder(self, dtype: torch.dtype, device: Device) -> nn.Module:
        raise PriorError(f"{self.path} has no image encoder: images can't be encoded with it")

    def projection(self, device: Device) -> tuple[Tensor, Tensor]:
        raise PriorError(f"{self.path} has no pose projection: images can't be encoded with it")


def _pair(size: Any) -> list[Any]:
    """A size as [height, width]."""
    return list(size) if isinstance(size, list | tuple) else [size, size]


def _refuse_large(config: Mapping[str, Any], n_tensors: int, where: str) -> None:
    """Refuse a configuration that asks for more layers than the file has tensors, before any is built."""
    for name, value in config.items():
        numbers = value if isinstance(value, list | tuple) else [value]
        if len(numbers) > ldm_keys.MOST_LEVELS:
            raise PriorError(f"{where}.{name} has {len(numbers):,} entries, more than {ldm_keys.MOST_LEVELS}")
        layers = [n for n in numbers if type(n) in (int, float)] if "layers" in name else []
        if any(not 0 <= n <= n_tensors for n in layers):
            raise PriorError(f"{where}.{name} is {describe(value)}; the file has {n_tensors:,} tensors in all")
