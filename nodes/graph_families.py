"""Which families the models are of that ComfyUI's loaders give, with which noise, and what is refused of them.

Read from the live objects (classes of `comfy.model_base`, `comfy.model_sampling`), so that whatever stands before us in
the graph (a LoRA, another model sampling, another precision) is taken as it is.
"""

from __future__ import annotations

import math
from typing import Any

import comfy.model_sampling as sampling

from ..dream4d_engine.guidance.noise import NoiseSchedule, rectified_flow, variance_preserving
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
    "SV3D_u": "a model of orbits around an object, which has not been tried",
    "SV3D_p": "a model of orbits around an object, which has not been tried",
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
    name = type(base).__name__
    if name in _NOT_SO:
        raise PriorError(f"the model ({name}) is {_NOT_SO[name]}")
    family = FAMILIES.get(name)
    if family is None:
        known = ", ".join(f.name for f in FAMILIES.values() if f.kind == kind)
        raise PriorError(
            f"models of the class {name} are not among those that have been tried as {kind} priors: {known}"
        )
    if family.kind != kind:
        raise PriorError(
            f"{family.name} makes {_MADE[family.kind]}: connect it to {_NODES[family.kind]}, and a model of "
            f"{_MADE[kind]} here"
        )
    more = _more_channels(base)
    if more and kind != "novel_view":
        raise PriorError(
            f"the model ({name}) reads {more} channels beside the noisy latents (inpainting, editing, control or image "
            "to video): connect one that is told words alone"
        )
    return family


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
            raise PriorError(f"the model's noise is scaled by {levels.noise_scale:g}: that has not been tried")
        if isinstance(levels, sampling.ModelSamplingAV):
            raise PriorError("the model has noise levels for sound and video together: that has not been tried")
        if isinstance(levels, sampling.ModelSamplingFlux):
            # e^mu / (e^mu + 1 / t - 1) is the shift by e^mu
            return rectified_flow(math.exp(levels.shift))
        if isinstance(levels, sampling.ModelSamplingDiscreteFlow):
            return rectified_flow(levels.shift)
    others = sampling.StableCascadeSampling | sampling.EDM | sampling.IMG_TO_IMG
    known = isinstance(levels, sampling.ModelSamplingDiscrete) and isinstance(levels, sampling.EPS)
    if known and not isinstance(levels, others):
        return variance_preserving(1 / (1 + levels.sigmas.detach().clone().double().cpu() ** 2))
    raise PriorError(
        f"the model's noise levels are of the class {type(levels).__name__}: known are those of discrete eps and v "
        "models and of rectified flows"
    )


def is_flow(model: Any) -> bool:
    """Whether the model sees (1 - t) z + t eps, at times t = sigma / (1 + sigma)."""
    return isinstance(model.get_model_object("model_sampling"), sampling.CONST)


def check_vae(model: Any, vae: Any, family: Family) -> None:
    """Refuse an autoencoder that another family's latents are for, with what is wrong."""
    latents = model.model.latent_format
    if getattr(vae, "first_stage_model", None) is None:
        raise PriorError("the VAE holds no autoencoder: connect the one that belongs to the model")
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
    if not place.startswith((_VAE_PLACES.get(family, "comfy.ldm.models"), "comfy.taesd")):
        raise PriorError(
            f"the VAE ({type(vae.first_stage_model).__name__} of {place.removeprefix('comfy.ldm.')}) belongs to "
            f"another family than {family.name}: connect the VAE that belongs to the model"
        )


def check_clip(model: Any, clip: Any, family: Family) -> None:
    """Refuse a text encoder of another family."""
    if family.kind == "novel_view":
        width = getattr(clip, "config", {}).get("projection_dim")
        if width != 768:
            raise PriorError(
                f"{family.name} is told an image by CLIP ViT-L, 768 numbers, not by one of {width}: connect the CLIP "
                "vision of its own checkpoint (Image Only Checkpoint Loader)"
            )
        return
    wanted = model.model.model_config.clip_target({}).tokenizer
    if type(clip.tokenizer) is not wanted:  # those of other models are derived from that of the first
        raise PriorError(
            f"the CLIP splits words for another model ({type(clip.tokenizer).__name__}), {family.name} reads those "
            f"of {wanted.__name__}: connect the CLIP that belongs to the model, loaded with its type"
        )
    if clip.use_clip_schedule or clip.apply_hooks_to_conds is not None:
        raise PriorError(
            "the CLIP changes over the steps of a sampler (hooks), which training has none of: remove them"
        )
