"""The full-size diffusion models' architectures with random weights, built on a device without any file.

A diffusion model takes as long with random weights as with trained ones, so speed and memory can be measured and
every recipe tried without the weights. Text encoders are left out: their embeddings are random too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..cameras import CameraBatch
from ..guidance.denoiser import Conditions
from ..guidance.distillation import DistillationConfig, Guidance
from ..guidance.noise import rectified_flow, variance_preserving
from .conditioning import camera_vector
from .errors import PriorError
from .formats.tiny_vae import TinyDecoderVAE, TinyVAE
from .handle import PriorKind
from .networks.denoisers import PredictionType, UNetDenoiser, prepared
from .networks.execution import Runtime
from .networks.transformers import TransformerDenoiser, prepared_transformer
from .networks.view_attention import attend_across_views

VaeKind = Literal["full", "tiny", "tiny-decoder"]

_SD_CHANNELS = (320, 640, 1280, 1280)
_SD21 = {
    "sample_size": 64,
    "block_out_channels": _SD_CHANNELS,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
_VIDEO = {"block_out_channels": _SD_CHANNELS, "attention_head_dim": 64, "cross_attention_dim": 1024}
_IF = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (704, 1408, 2112, 2816),
    "layers_per_block": 3,
    "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    "act_fn": "gelu",
    "attention_head_dim": 64,
    "cross_attention_dim": 2816,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 4096,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "resnet_time_scale_shift": "scale_shift",
}
_SD_VAE: dict[str, Any] = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_SCALING = 0.18215
_SD_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class Architecture:
    """A diffusion model without its weights."""

    name: str
    kind: PriorKind
    unet: Mapping[str, Any]  # the configuration of `unet_class`, as the published folder has it
    image_size: tuple[int, int]  # (height, width), pixels
    token_width: int  # of the text or image embedding
    n_tokens: int = 77
    n_frames: int | None = None  # of a group; None for single images
    unet_class: str = "UNet2DConditionModel"
    has_vae: bool = True  # it works on latents: those of Stable Diffusion's VAE, or of `vae_class`
    n_concat: int = 0  # further input channels
    vector_width: int = 0  # of pooled words
    vae_class: str | None = None  # of a flow's autoencoder of videos, with its own defaults
    noise: Mapping[str, Any] = field(default_factory=lambda: _SD_NOISE)
    prediction_type: PredictionType = "epsilon"


MVDREAM = Architecture(
    name="MVDream",
    kind="multiview",
    unet={**_SD21, "sample_size": 32, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 16},
    image_size=(256, 256),
    token_width=1024,
    n_frames=4,
)
STABLE_DIFFUSION = Architecture("Stable Diffusion 2.1 base", "image", _SD21, (512, 512), 1024)
ZERO123_XL = Architecture(
    name="Zero123-XL",
    kind="novel_view",
    unet={"sample_size": 32, "in_channels": 8, "attention_head_dim": 8, "cross_attention_dim": 768},
    image_size=(256, 256),
    token_width=768,
    n_tokens=1,
    n_concat=4,
)
IF_XL = Architecture(
    name="DeepFloyd IF-I-XL",
    kind="pixel",
    unet=_IF,
    image_size=(64, 64),
    token_width=4096,
    has_vae=False,
    noise={"beta_schedule": "squaredcos_cap_v2"},
)
ZEROSCOPE_V2 = Architecture(
    name="ZeroScope v2 576w",
    kind="video",
    unet={**_VIDEO, "sample_size": 32},
    image_size=(320, 576),
    token_width=1024,
    n_frames=24,
    unet_class="UNet3DConditionModel",
)
MODELSCOPE_17B = replace(ZEROSCOPE_V2, name="ModelScope 1.7b", image_size=(256, 256), n_frames=16)

SDXL = Architecture(
    name="Stable Diffusion XL",
    kind="image",
    unet={
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    image_size=(512, 512),
    token_width=2048,
    vector_width=1280,
)
WAN_13B = Architecture(
    name="Wan 2.1 1.3B",
    kind="video",
    unet={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    image_size=(320, 576),
    token_width=4096,
    n_tokens=512,
    n_frames=17,
    unet_class="WanTransformer3DModel",
    vae_class="AutoencoderKLWan",
    noise={"shift": 8.0},
)
LTX_2B = Architecture(
    name="LTX-Video 2B",
    kind="video",
    unet={},
    image_size=(320, 576),
    token_width=4096,
    n_tokens=128,
    n_frames=25,
    unet_class="LTXVideoTransformer3DModel",
    vae_class="AutoencoderKLLTXVideo",
    noise={"shift": 2.37},
)
BY_FLAG = {"sdxl": SDXL, "wan-1.3b": WAN_13B, "ltx-2b": LTX_2B}
"""Of today's models, by what `bench --models` calls them."""

ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (MVDREAM, STABLE_DIFFUSION, SDXL, ZERO123_XL, IF_XL, ZEROSCOPE_V2, MODELSCOPE_17B, WAN_13B, LTX_2B)
}
_OF_KIND = {a.kind: a for a in (MVDREAM, STABLE_DIFFUSION, ZERO123_XL, IF_XL, ZEROSCOPE_V2)}


def architecture_for(kind: PriorKind, n_frames: int | None = None) -> Architecture:
    """Return the published model of a kind; for videos the one with so many frames."""
    if kind == "video" and n_frames == MODELSCOPE_17B.n_frames:
        return MODELSCOPE_17B
    if kind not in _OF_KIND:
        raise PriorError(f"no full-size architecture of kind {kind!r}; known are {', '.join(_OF_KIND)}")
    return _OF_KIND[kind]


@contextmanager
def _building(device: torch.device, dtype: torch.dtype):
    """Make new parameters on `device` in `dtype`, and leave no global state behind."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def random_network(class_name: str, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Build a frozen diffusers network from its configuration, initialised at random where it is to run."""
    import diffusers

    # the networks draw their weights from the global generators: those shall not notice
    with _building(device, dtype), torch.random.fork_rng([device] if device.type == "cuda" else []):
        network = getattr(diffusers, class_name)(**config)
        # some layers begin at zero, which would make a step's numbers trivial
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return nn.Module.to(network, device, dtype).eval().requires_grad_(False)


def random_vae(kind: VaeKind, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Build Stable Diffusion's VAE, the tiny one that was distilled from it, or the first with the second's decoder,
    with random weights."""

    def full() -> nn.Module:
        return random_network("AutoencoderKL", _SD_VAE, device, dtype)

    if kind == "full":
        return full()
    channels = _SD_VAE["block_out_channels"]
    tiny = TinyVAE(random_network("AutoencoderTiny", {}, device, dtype), _SCALING, channels)
    return tiny if kind == "tiny" else TinyDecoderVAE(full(), tiny)


def random_denoiser(
    architecture: Architecture, device: torch.device, dtype: torch.dtype, vae: VaeKind = "full"
) -> UNetDenoiser | TransformerDenoiser:
    """Build a denoiser of this architecture with random weights."""
    if architecture.vae_class is not None:
        if vae != "full":
            raise PriorError(f"{architecture.name} has no tiny autoencoder here: measure it with its own")
        return _random_flow(architecture, device, dtype)
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    unet = random_network(architecture.unet_class, architecture.unet, device, dtype)
    if architecture.kind == "multiview":
        attend_across_views(unet)
    alphas_bar = DDPMScheduler(**architecture.noise).alphas_cumprod
    return UNetDenoiser(
        unet=unet,
        noise=variance_preserving(alphas_bar),
        device=device,
        prediction_type=architecture.prediction_type,
        image_size=architecture.image_size,
        n_frames=architecture.n_frames,
        vae=random_vae(vae, device, dtype) if architecture.has_vae else None,
        group_attention=architecture.kind == "multiview",
    )


def _random_flow(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> TransformerDenoiser:
    # flows are made for bfloat16: in half precision their activations overflow
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    assert architecture.vae_class is not None and architecture.n_frames is not None  # a flow's, and it is of videos
    return TransformerDenoiser(
        transformer=random_network(architecture.unet_class, architecture.unet, device, dtype),
        vae=random_network(architecture.vae_class, {}, device, dtype),
        noise=rectified_flow(**architecture.noise),
        image_size=architecture.image_size,
        n_frames=architecture.n_frames,
        device=device,
    )


def random_conditions(
    architecture: Architecture, denoiser: UNetDenoiser | TransformerDenoiser, seed: int = 0
) -> Callable[[CameraBatch], tuple[Conditions, Conditions]]:
    """Return what gives (text, negative) conditions of the right shapes, random, the same for every camera."""
    generator = torch.Generator().manual_seed(seed)
    width, (height, wide) = architecture.token_width, architecture.image_size
    tokens = torch.randn(2, architecture.n_tokens, width, generator=generator).to(denoiser.device)
    pooled = None
    if architecture.vector_width:
        pooled = torch.randn(architecture.vector_width, generator=generator).to(denoiser.device)
    beside = None
    if architecture.n_concat:
        beside = torch.randn(architecture.n_concat, height // 8, wide // 8, generator=generator).to(denoiser.device)

    def conditions(cameras: CameraBatch) -> tuple[Conditions, Conditions]:
        vector = camera_vector(cameras).to(denoiser.device) if architecture.kind == "multiview" else None
        # a take is told what its first frame is: no need to say it of every one
        shape = cameras.shape if architecture.vae_class is None else (len(cameras.azimuth), 1)
        concat = None if beside is None else beside.expand(*shape, -1, -1, -1)
        if pooled is not None:
            vector = pooled.expand(*shape, -1)
        mask = None
        if architecture.vae_class is not None:
            mask = torch.ones(*shape, architecture.n_tokens, device=denoiser.device)

        def told(row: Tensor) -> Conditions:
            return Conditions(row.expand(*shape, -1, -1), vector, concat, mask)

        return told(tokens[0]), told(tokens[1])

    return conditions


def random_guidance(
    architecture: Architecture,
    config: DistillationConfig,
    runtime: Runtime,
    vae: VaeKind = "full",
) -> Guidance:
    """Return the guidance by a model of this architecture with random weights and embeddings."""
    denoiser = random_denoiser(architecture, runtime.device, runtime.dtype, vae)
    conditions = random_conditions(architecture, denoiser)
    if isinstance(denoiser, UNetDenoiser):
        denoiser = prepared(denoiser, runtime)
    else:
        denoiser = prepared_transformer(denoiser, runtime)
    return Guidance(architecture.name, denoiser, conditions, config)
