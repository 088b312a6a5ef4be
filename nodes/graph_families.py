"""Which families the models are of that ComfyUI's loaders give, with which noise, and what is refused of them.

Read from the live objects (classes of `comfy.model_base`, `comfy.model_sampling`), so that whatever stands before us in
the graph (a LoRA, another model sampling, another precision) is taken as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import comfy.model_sampling as sampling
import torch

from ..dream4d_engine.guidance.noise import NoiseSchedule, log_spaced, rectified_flow, variance_preserving
from ..dream4d_engine.priors import families
from ..dream4d_engine.priors.errors import PriorError
from ..dream4d_engine.priors.families import Family
from ..dream4d_engine.priors.handle import PriorKind

FAMILIES: dict[str, Family] = {
    "BaseModel": families.STABLE_DIFFUSION,
    "SDXL": families.SDXL,
    "SD3": families.SD3,
    "Flux": families.FLUX,
    "Stable_Zero123": families.STABLE_ZERO123,
    "SV3D_u": families.SV3D_U,
    "SV3D_p": families.SV3D_P,
    "WAN21": families.WAN,
    "WAN22": families.WAN22_5B,
    "LTXV": families.LTX,
    "HunyuanVideo": families.HUNYUAN,
}
_VAE_PLACES = {
    families.WAN: "comfy.ldm.wan",
    families.WAN22_5B: "comfy.ldm.wan",
    families.LTX: "comfy.ldm.lightricks",
}
"""Where the classes of autoencoders are; comfy.ldm.models those of the other families."""
_NODES = {
    "image": "Image Prior from Model",
    "novel_view": "Novel-View Prior from Model",
    "video": "Video Prior from Model",
}
_MADE = {"image": "images", "novel_view": "novel views", "video": "videos"}
_NOT_SO = {
    "SDXLRefiner": "a refiner, which only finishes images of another model",
    "SD15_instructpix2pix": "made for editing images",
    "SDXL_instructpix2pix": "made for editing images",
    "Lotus": "a model of depth",
    "SVD_img2vid": "made to continue an image, and is told no words",
    "HunyuanVideoI2V": "made to continue an image",
    "HunyuanVideoSkyreelsI2V": "made to continue an image",
    "SD21UNCLIP": "told images, not words",
    "SD_X4Upscaler": "an upscaler",
    "LTXAV": "a model of sound and video together",
}


def family_of(model: Any, kind: PriorKind) -> Family:
    """Return the family of a MODEL that makes priors of this kind. PriorError with the reason where none does."""
    base = getattr(model, "model", None)
    if base is None or not hasattr(base, "model_sampling") or not hasattr(base, "latent_format"):
        wrapper = type(base if base is not None else model).__name__
        raise PriorError(
            f"the model comes in a wrapper ({wrapper}) that doesn't say its noise levels (model_sampling) or its "
            "latents (latent_format): load it with one of ComfyUI's own loaders"
        )
    _require_parts("model", model, _PATCHER, ", so ComfyUI can't sample with it as with its own")
    name = type(base).__name__
    known = ", ".join(f.name for f in FAMILIES.values() if f.kind == kind)
    if name in _NOT_SO:
        raise PriorError(f"the model ({name}) is {_NOT_SO[name]}: connect one of {known}")
    family = FAMILIES.get(name)
    if family is None:
        raise PriorError(
            f"models of the class {name} are not among those that have been tried as {kind} priors: connect one of "
            f"{known}"
        )
    if family.kind != kind:
        raise PriorError(
            f"{family.name} makes {_MADE[family.kind]}: connect it to {_NODES[family.kind]}, and a model of "
            f"{_MADE[kind]} here"
        )
    control = _control(model)
    if control:
        raise PriorError(
            f"the model carries an image that controls it ({control}), of one view and one size: training looks from "
            "all around, remove it"
        )
    if model.model_options.get("context_handler") is not None:
        raise PriorError(
            "the model takes long videos apart for a sampler (context windows), which training does by itself: remove "
            "that node, and ask Animate Scene for more frames"
        )
    more = _more_channels(base)
    if more and kind != "novel_view":
        raise PriorError(
            f"the model ({name}) reads {more} channels beside the noisy latents (inpainting, editing, control or image "
            "to video): connect one that is told words alone"
        )
    return family


def _require_parts(what: str, given: Any, parts: Iterable[str], so: str = "") -> None:
    """PriorError where a wrapper lacks some of what ComfyUI's own class has; `so`: what follows from that."""
    missing = [part for part in parts if not hasattr(given, part)]
    if missing:
        raise PriorError(
            f"the {what} comes in a wrapper ({type(given).__name__}) without {' and '.join(missing)}{so}: load it with "
            "one of ComfyUI's own loaders"
        )


_PATCHER: tuple[str, ...] = ("get_model_object", "model_options", "patches", "patches_uuid", "model_size", "pre_run")
_PATCHER += ("cleanup", "object_patches", "injections")
"""What of ComfyUI's ModelPatcher is asked for."""
_CONTROLS = ("Cnet", "ControlNet", "ControlPatch", "LLLite", "MultiTalk", "UsoStyle")
"""Parts of the class names of patches that carry an image or a sound of one result."""


def _control(model: Any) -> str:
    """The class of a patch that carries an image to control a model by; "" where there is none."""
    options = model.model_options.get("transformer_options", {})
    hung = [one for group in options.get("patches", {}).values() for one in group]
    names = (type(getattr(one, "__self__", one)).__name__ for one in hung)
    return next((name for name in names if any(word in name for word in _CONTROLS)), "")


def _more_channels(base: Any) -> int:
    """How many channels a network reads beside the noisy latents."""
    known = getattr(getattr(base, "model_config", None), "unet_config", {})
    read = known.get("in_channels", known.get("in_dim"))
    return 0 if read is None else max(0, read - base.latent_format.latent_channels)


def noise_schedule(model: Any) -> NoiseSchedule:
    """Return the noise levels of a MODEL as shares of its own schedule; PriorError where they have another form."""
    levels = model.get_model_object("model_sampling")
    if isinstance(levels, sampling.CONST):
        if getattr(levels, "noise_scale", 1.0) != 1.0:
            raise PriorError(
                f"the model's noise is scaled by {levels.noise_scale:g}, which has not been tried: remove Model Noise "
                "Scale, or set it to 1"
            )
        if isinstance(levels, sampling.ModelSamplingAV):
            raise PriorError(
                "the model has noise levels for sound and video together, which has not been tried: remove the model "
                "sampling node, or connect a model of videos alone"
            )
        if isinstance(levels, sampling.ModelSamplingFlux):
            # e^mu / (e^mu + 1 / t - 1) is the shift by e^mu
            return rectified_flow(math.exp(levels.shift))
        if isinstance(levels, sampling.ModelSamplingDiscreteFlow):
            return rectified_flow(levels.shift)
    others = sampling.StableCascadeSampling | sampling.EDM | sampling.IMG_TO_IMG
    known = isinstance(levels, sampling.ModelSamplingDiscrete) and isinstance(levels, sampling.EPS)
    if known and not isinstance(levels, others):
        return variance_preserving(1 / (1 + levels.sigmas.detach().clone().double().cpu() ** 2))
    family = FAMILIES.get(type(model.model).__name__)
    if family is not None and family.orbit is not None:  # v at any level; others of its kind have not been tried
        own = isinstance(levels, sampling.ModelSamplingContinuousEDM) and isinstance(levels, sampling.V_PREDICTION)
        if own and not isinstance(levels, others | sampling.ModelSamplingContinuousV):
            return log_spaced(float(levels.sigma_min), float(levels.sigma_max))
    raise PriorError(
        f"the model's noise levels are of the class {_class_of(levels)}: known are those of discrete eps and v "
        "models, of rectified flows, and SV3D's own: remove the model sampling node, or connect another model"
    )


def _class_of(levels: Any) -> str:
    """What noise levels are; the classes that ComfyUI's nodes put together have all one name."""
    kind = type(levels)
    made_of = kind.__bases__ if kind.__name__ == "ModelSamplingAdvanced" else (kind,)
    return " and ".join(one.__name__ for one in made_of)


WHOLE, HIGH, LOW = "all noise", "high noise", "low noise"
"""What a model is asked at: everywhere, or in its half of a pair's range."""


def in_its_range(noise: NoiseSchedule, family: Family, part: str) -> NoiseSchedule:
    """Return the levels that an expert of a pair was trained on; shares are then those of its own range."""
    if part == WHOLE:
        return noise
    if family.switch is None:
        raise PriorError(f"{family.name} is one model for all noise, not a pair: choose {WHOLE!r}")
    middle = float(noise.share_of(torch.tensor(family.switch / (1 - family.switch))))
    low, high = (middle, 1.0) if part == HIGH else (0.0, middle)
    return replace(
        noise,
        sigma_of=lambda share: noise.sigma_of(low + (high - low) * share),
        share_of=lambda sigma: (noise.share_of(sigma) - low) / (high - low),
    )


def check_pair(model: Any, second: Any, family: Family, part: str) -> None:
    """Refuse what can't be the expert for low noise beside a model for high noise."""
    if family.switch is None:
        raise PriorError(f"{family.name} is one model for all noise: leave model_low_noise empty")
    if part != WHOLE:
        raise PriorError(f"there are both experts, so all noise is asked: choose {WHOLE!r} for noise, not {part!r}")
    if second.model is model.model and second.patches_uuid == model.patches_uuid:
        raise PriorError("model and model_low_noise are the same model: connect the pair's other one, or none")
    other = family_of(second, family.kind)
    if other is not family:
        raise PriorError(f"model_low_noise is {other.name}, model is {family.name}: connect the two of one pair")
    shares = torch.linspace(0.1, 0.9, 5)
    first, levels = (noise_schedule(one).sigma_of(shares) for one in (model, second))
    if not torch.allclose(first, levels):
        raise PriorError(
            "model and model_low_noise have other noise levels (another shift): put the same model sampling before both"
        )


def is_flow(model: Any) -> bool:
    """Whether the model sees (1 - t) z + t eps, at times t = sigma / (1 + sigma)."""
    return isinstance(model.get_model_object("model_sampling"), sampling.CONST)


_ANY_FAMILY = ("comfy.taesd", "comfy.pixel_space_convert")
"""Where the autoencoders are that are made for several families, and that of models that work on pixels."""
_VAE: tuple[str, ...] = ("latent_channels", "latent_dim", "downscale_ratio", "vae_dtype", "process_input")
_VAE += ("process_output", "output_channels")
"""What of ComfyUI's VAE is asked for."""


def check_vae(model: Any, vae: Any, family: Family) -> None:
    """Refuse an autoencoder that another family's latents are for, with what is wrong."""
    latents = model.model.latent_format
    if getattr(vae, "first_stage_model", None) is None:
        raise PriorError("the VAE holds no autoencoder: connect the one that belongs to the model")
    _require_parts("VAE", vae, _VAE)
    channels, dimensions = latents.latent_channels, latents.latent_dimensions
    if vae.latent_channels != channels or (vae.latent_dim == 3) != (dimensions == 3):
        what = {2: "images", 3: "videos"}
        raise PriorError(
            f"the VAE ({type(vae.first_stage_model).__name__}) has {vae.latent_channels} channels for "
            f"{what.get(vae.latent_dim, 'something else')}, {family.name} reads {channels} for {what[dimensions]}: "
            "connect the VAE that belongs to the model"
        )
    ratio = vae.downscale_ratio[1] if isinstance(vae.downscale_ratio, tuple) else vae.downscale_ratio
    if ratio != latents.spacial_downscale_ratio:
        raise PriorError(
            f"the VAE makes images {ratio} times smaller, {family.name} reads latents that are "
            f"{latents.spacial_downscale_ratio} times smaller: connect the VAE that belongs to the model"
        )
    place = type(vae.first_stage_model).__module__
    if not place.startswith((_VAE_PLACES.get(family, "comfy.ldm.models"), *_ANY_FAMILY)):
        raise PriorError(
            f"the VAE ({type(vae.first_stage_model).__name__} of {place.removeprefix('comfy.ldm.')}) belongs to "
            f"another family than {family.name}: connect the VAE that belongs to the model"
        )
    if place.startswith("comfy.taesd"):
        _check_tiny(vae.first_stage_model, latents, family)


_ROUNDING = 0.01
"""Of a tiny autoencoder's scale, which is kept in half precision."""


def _check_tiny(network: Any, latents: Any, family: Family) -> None:
    """Refuse a tiny autoencoder whose latents have another scale: the networks of several families are alike."""
    scale = getattr(network, "vae_scale", None)
    if scale is not None:  # of images: what ComfyUI's loader knows by the file's name
        has, wanted = (float(scale), float(network.vae_shift)), (latents.scale_factor, _shift(latents))
        if any(abs(one - other) > _ROUNDING * max(abs(other), 0.1) for one, other in zip(has, wanted, strict=True)):
            raise PriorError(
                f"the tiny autoencoder's latents have the scale {has[0]:.4g} (shift {has[1]:.4g}), those of "
                f"{family.name} {wanted[0]:.4g} (shift {wanted[1]:.4g}): connect the tiny one that belongs to the model"
            )
        return
    form = getattr(network, "latent_format", None)
    read_as = "HunyuanVideo" if form is not None and "Hunyuan" in form.__name__ else None
    if (read_as is None) == (family.name == "HunyuanVideo"):
        # a file's number format is all that ComfyUI tells them apart by
        raise PriorError(
            f"ComfyUI reads this tiny autoencoder as {read_as or 'one of raw latents (lighttaew)'}, which has another "
            f"scale than {family.name}: Wan takes lighttaew2_1 (taew2_1 is not told from HunyuanVideo's), "
            "HunyuanVideo takes taehv in fp16, or connect the model's own VAE"
        )


def _shift(latents: Any) -> float:
    return float(getattr(latents, "shift_factor", 0.0))


def check_clip(model: Any, clip: Any, family: Family) -> None:
    """Refuse a text encoder of another family."""
    if family.kind == "novel_view":
        width = (getattr(clip, "config", None) or {}).get("projection_dim")
        encoder, wanted = ("ViT-L", 768) if family.orbit is None else ("ViT-H", 1024)
        if width != wanted:
            raise PriorError(
                f"{family.name} is told an image by CLIP {encoder}, {wanted} numbers, not by one of {width}: connect "
                "the CLIP vision of its own checkpoint (Image Only Checkpoint Loader)"
            )
        return
    wanted = model.model.model_config.clip_target({}).tokenizer
    if type(clip.tokenizer) is not wanted:  # those of other models are derived from that of the first
        raise PriorError(
            f"the CLIP splits words for another model ({type(clip.tokenizer).__name__}), {family.name} reads those "
            f"of {wanted.__name__}: connect the CLIP that belongs to the model, loaded with its type"
        )
    if family is families.SDXL and not hasattr(clip.cond_stage_model, "clip_l"):
        raise PriorError(
            f"the CLIP ({type(clip.cond_stage_model).__name__}) is the refiner's, or one of {family.name}'s two: "
            "connect that of the model's own checkpoint, or both files by DualCLIPLoader (type sdxl)"
        )
    if clip.use_clip_schedule or clip.apply_hooks_to_conds is not None:
        raise PriorError(
            "the CLIP changes over the steps of a sampler (hooks), which training has none of: remove them"
        )
