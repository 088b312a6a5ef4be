"""Small models with random weights in the layouts of real checkpoints, loaded by ComfyUI's own loaders.

Run inside ComfyUI's Python, after its options are parsed. Depth and width are cut as far as the loaders still recognise
the family; text encoders are of the real classes, cut by the options that ComfyUI has for that.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.clip_vision
import comfy.ldm.flux.model
import comfy.ldm.hunyuan_video.model
import comfy.ldm.lightricks.model
import comfy.ldm.lightricks.vae.causal_video_autoencoder as ltx_vae
import comfy.ldm.models.autoencoder as kl
import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.ldm.modules.diffusionmodules.openaimodel as unet
import comfy.ldm.wan.model
import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.lora
import comfy.memory_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models_base
import comfy.taesd.taehv
import comfy.taesd.taesd
import comfy.text_encoders.flux
import comfy.text_encoders.hunyuan_video
import comfy.text_encoders.lt
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.wan
import torch
from comfy import sd1_clip, sdxl_clip
from torch import Tensor, nn

WORDS = "a red cube is jumping front view side view back view overhead view ugly bad low quality"
OPS = comfy.ops.disable_weight_init
UNET_PREFIX = "model.diffusion_model."
POOL = 1_000_003  # prime: rows of a matrix differ


@dataclass(frozen=True)
class Three:
    """What core loader nodes give."""

    model: Any
    clip: Any
    vae: Any


def random_weights(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """Weights of the size that keeps activations near one."""
    generator, found = torch.Generator().manual_seed(seed), {}
    pool = torch.randn(POOL, generator=generator)  # drawn once and read at other places: quick for large networks

    def normal(shape: torch.Size) -> Tensor:
        start = int(torch.randint(POOL, (), generator=generator))
        turned = torch.roll(pool, start)
        return turned.repeat(-(-shape.numel() // POOL))[: shape.numel()].reshape(shape)

    for name, value in network.state_dict().items():
        if not value.is_floating_point():
            found[name] = value
        elif value.ndim > 1:
            found[name] = normal(value.shape) / max(1, value[0].numel()) ** 0.5
        elif "bias" in name:
            found[name] = normal(value.shape) * 0.02
        else:
            found[name] = 1 + normal(value.shape) * 0.02
    return found


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same under a prefix."""
    return {prefix + name: value for name, value in state.items()}


# ---- networks in their checkpoints' layouts ----------------------------------------------------------------------


def sd15_unet(in_channels: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Stable Diffusion 1.5, two levels of one block."""
    network = unet.UNetModel(
        image_size=32,
        in_channels=in_channels,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[1, 1],
        channel_mult=[1, 1],
        transformer_depth=[1, 0],
        transformer_depth_output=[1, 1, 0, 0],
        transformer_depth_middle=1,
        context_dim=768,
        num_heads=8,
        use_spatial_transformer=True,
        legacy=False,
        operations=OPS,
    )
    return random_weights(network, seed)


def full_sd15_unet(seed: int = 0) -> dict[str, Tensor]:
    """Stable Diffusion 1.5 at its real size."""
    network = unet.UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[2, 2, 2, 2],
        channel_mult=[1, 2, 4, 4],
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        transformer_depth_middle=1,
        context_dim=768,
        num_heads=8,
        use_spatial_transformer=True,
        legacy=False,
        operations=OPS,
    )
    return random_weights(network, seed)


def sdxl_unet(seed: int = 0) -> dict[str, Tensor]:
    """Stable Diffusion XL with all depths of its way down, which it is recognised by, as narrow as can be."""
    network = unet.UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[2, 2, 2],
        channel_mult=[1, 1, 1],
        transformer_depth=[0, 0, 2, 2, 10, 10],
        transformer_depth_output=[0, 0, 0, 1, 1, 1, 1, 1, 1],
        transformer_depth_middle=10,
        context_dim=2048,
        num_heads=-1,
        num_head_channels=64,
        use_linear_in_transformer=True,
        use_spatial_transformer=True,
        adm_in_channels=2816,
        num_classes="sequential",
        legacy=False,
        operations=OPS,
    )
    return random_weights(network, seed)


SV3D_LEVELS = (1, 5, 2)
"""Blocks of each level on the way down: the first six, which have attention, are what SV3D is recognised by."""


def sv3d_unet(told: int, seed: int = 0) -> dict[str, Tensor]:
    """SV3D as narrow as can be, without attention on the way up. `told`: numbers beside the time, 256 or 1280."""
    network = unet.UNetModel(
        image_size=32,
        in_channels=8,
        out_channels=4,
        model_channels=320,
        num_res_blocks=list(SV3D_LEVELS),
        channel_mult=[1, 1, 1],
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_output=[0] * 11,
        transformer_depth_middle=1,
        context_dim=1024,
        num_heads=-1,
        num_head_channels=64,
        use_linear_in_transformer=True,
        use_spatial_transformer=True,
        adm_in_channels=told,
        num_classes="sequential",
        use_temporal_resblock=True,
        use_temporal_attention=True,
        extra_ff_mix_layer=True,
        use_spatial_context=True,
        merge_strategy="learned_with_images",
        merge_factor=0.0,
        video_kernel_size=[3, 1, 1],
        legacy=False,
        operations=OPS,
    )
    return random_weights(network, seed)


def wan22_vae(seed: int = 1, dim: int = 16) -> Any:
    """The autoencoder of Wan 2.2 5B; the loader knows one width, so its network is cut and put into its place.

    `dim`: of its encoder; the real one's is 160.
    """
    network = comfy.ldm.wan.vae2_2.WanVAE(
        dim=dim, dec_dim=16, z_dim=48, temperal_downsample=[False, True, True], dropout=0.0
    )
    network.load_state_dict(random_weights(network, seed))
    vae = comfy.sd.VAE(sd=wan_vae(seed))
    vae.first_stage_model = network.eval().to(vae.vae_dtype)
    vae.patcher = comfy.model_patcher.ModelPatcher(network, vae.patcher.load_device, vae.patcher.offload_device)
    vae.latent_channels = 48
    vae.downscale_ratio = (vae.downscale_ratio[0], 16, 16)
    vae.upscale_ratio = (vae.upscale_ratio[0], 16, 16)
    vae.downscale_index_formula = vae.upscale_index_formula = (4, 16, 16)
    return vae


def wan_transformer(seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    """Wan 2.1, one head and two layers."""
    given = {"model_type": "t2v", "in_dim": 16, "out_dim": 16, "text_dim": 4096, "freq_dim": 256}
    given |= {"dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 2} | changes
    network = comfy.ldm.wan.model.WanModel(operations=OPS, **given)
    return random_weights(network, seed)


def ltx_transformer(seed: int = 0) -> dict[str, Tensor]:
    """LTX-Video, 32 heads of 4 and two layers."""
    network = comfy.ldm.lightricks.model.LTXVModel(
        cross_attention_dim=128, attention_head_dim=4, num_layers=2, operations=OPS
    )
    return random_weights(network, seed)


_HUNYUAN_NAMES = (  # of ComfyUI's network -> of the files
    (r"(mod|modulation)\.lin\.", r"\1.linear."),
    (r"_attn\.(qkv|proj)\.", r"_attn_\1."),
    (r"_attn\.norm\.(\w)\w+_norm\.", r"_attn_\1_norm."),
    (r"\.norm\.(\w)\w+_norm\.", r".\1_norm."),
    (r"c_embedder\.in_layer\.", "c_embedder.linear_1."),
    (r"c_embedder\.out_layer\.", "c_embedder.linear_2."),
    (r"mlp\.0\.", "mlp.fc1."),
    (r"mlp\.2\.", "mlp.fc2."),
    (r"(time_in|guidance_in|t_embedder)\.in_layer\.", r"\1.mlp.0."),
    (r"(time_in|guidance_in|t_embedder)\.out_layer\.", r"\1.mlp.2."),
)


def hunyuan_transformer(seed: int = 0, in_channels: int = 16) -> dict[str, Tensor]:
    """HunyuanVideo, one head, one block of either kind."""
    network = comfy.ldm.hunyuan_video.model.HunyuanVideo(
        in_channels=in_channels,
        out_channels=16,
        vec_in_dim=768,
        context_in_dim=4096,
        hidden_size=128,
        mlp_ratio=4.0,
        num_heads=1,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[16, 56, 56],
        theta=256,
        patch_size=[1, 2, 2],
        qkv_bias=True,
        guidance_embed=True,
        byt5=False,
        meanflow=False,
        use_cond_type_embedding=False,
        vision_in_dim=None,
        meanflow_sum=False,
        operations=OPS,
    )
    state = random_weights(network, seed)
    for ours, theirs in _HUNYUAN_NAMES:
        state = {re.sub(ours, theirs, name): value for name, value in state.items()}
    return state


def sd3_transformer(seed: int = 0) -> dict[str, Tensor]:
    """Stable Diffusion 3, two heads and two blocks."""
    network = comfy.ldm.modules.diffusionmodules.mmdit.MMDiT(
        input_size=None,
        in_channels=16,
        depth=2,
        adm_in_channels=2048,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}},
        num_patches=192 * 192,
        pos_embed_max_size=192,
        operations=OPS,
    )
    return random_weights(network, seed)


def flux_transformer(seed: int = 0, in_channels: int = 16) -> dict[str, Tensor]:
    """Flux, one head, one block of either kind."""
    network = comfy.ldm.flux.model.Flux(
        in_channels=in_channels,
        out_channels=16,
        patch_size=2,
        vec_in_dim=768,
        context_in_dim=4096,
        hidden_size=128,
        mlp_ratio=4.0,
        num_heads=1,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[16, 56, 56],
        theta=10000,
        qkv_bias=True,
        guidance_embed=True,
        txt_ids_dims=[],
        operations=OPS,
    )
    return random_weights(network, seed)


def _kl_sizes(channels: int, ch: int = 128) -> dict:
    sizes = {"double_z": True, "z_channels": channels, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": ch}
    return sizes | {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}


def kl_vae(channels: int = 4, quantised: bool = True, seed: int = 1) -> dict[str, Tensor]:
    """The autoencoder of the image families; its width can only be cut on the way out."""
    sizes = _kl_sizes(channels)
    if quantised:
        return random_weights(
            kl.AutoencoderKL(ddconfig=sizes, embed_dim=channels, decoder_ddconfig=sizes | {"ch": 32}), seed
        )
    return _engine(sizes, "diffusionmodules.model.Decoder", sizes | {"ch": 32}, seed)


def _engine(encoder: dict, decoder: str, of_decoder: dict, seed: int) -> dict[str, Tensor]:
    network = kl.AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Encoder", "params": encoder},
        decoder_config={"target": f"comfy.ldm.modules.{decoder}", "params": of_decoder},
    )
    return random_weights(network, seed)


def temporal_vae(seed: int = 1) -> dict[str, Tensor]:
    """The autoencoder of SV3D: its decoder looks at time, too."""
    sizes = _kl_sizes(4)
    of_time = {"video_kernel_size": [3, 1, 1], "alpha": 0.0}
    return _engine(sizes, "temporal_ae.VideoDecoder", sizes | of_time, seed)


def hunyuan_vae(seed: int = 1) -> Any:
    """The autoencoder of HunyuanVideo; the loader knows one width, so its network is cut and put into its place."""
    sizes = _kl_sizes(16, 32)
    sizes |= {"conv3d": True, "time_compress": 4}
    config = {"params": {"ddconfig": sizes, "embed_dim": 16}}
    vae = comfy.sd.VAE(sd=random_weights(kl.AutoencoderKL(**config["params"]), seed), config=config)
    vae.latent_channels, vae.latent_dim = 16, 3
    vae.downscale_ratio = (lambda n: max(0, (n + 3) // 4), 8, 8)
    vae.upscale_ratio = (lambda n: max(0, n * 4 - 3), 8, 8)
    vae.downscale_index_formula = vae.upscale_index_formula = (4, 8, 8)
    vae.memory_used_encode = lambda shape, dtype: 1000
    return vae


def wan_vae(seed: int = 1, dim: int = 16, channels: int = 3) -> dict[str, Tensor]:
    """The autoencoder of Wan 2.1, narrow; the real one has a `dim` of 96. `channels`: 4 with opacity."""
    sizes = {"dim": dim, "z_dim": 16, "temperal_downsample": [False, True, True]}
    network = comfy.ldm.wan.vae.WanVAE(image_channels=channels, conv_out_channels=channels, **sizes)
    return random_weights(network, seed)


LTX_VAE = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 128,
    "encoder_base_channels": 16,
    "decoder_base_channels": 16,
    "blocks": [["res_x", 1], ["compress_all", 1], ["res_x_y", 1], ["compress_all", 1], ["compress_all", 1]],
    "norm_layer": "pixel_norm",
    "patch_size": 4,
    "latent_log_var": "uniform",
    "use_quant_conv": False,
    "causal_decoder": False,
}
LTX_VAE["blocks"] = [*LTX_VAE["blocks"], ["res_x", 1]]


def ltx_vae_state(
    seed: int = 1, version: int | None = None, width: int = 8
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The autoencoder of LTX-Video, narrow, and the metadata that says so, as its files carry it.

    `version`: with all layers of 0.9 (0), 0.9.1 (1) or 0.9.5 and later (2), its encoder `width` wide, where
    the real one is 128; None: with few.
    """
    config: dict[str, Any] = LTX_VAE
    if version is not None:
        config = ltx_vae.VideoVAE.get_default_config(None, version)
        config |= {"encoder_base_channels": width, "decoder_base_channels": 16, "timestep_conditioning": False}
    state = random_weights(ltx_vae.VideoVAE(config=config), seed)
    return state, {"config": json.dumps({"vae": config})}


TINY_SCALES = {"taesd": (4, 0.18215, 0.0), "taesdxl": (4, 0.13025, 0.0), "taesd3": (16, 1.5305, 0.0609)}
TINY_SCALES["taef1"] = (16, 0.3611, 0.1159)


def tiny_image_vae(name: str = "taesd", seed: int = 1) -> dict[str, Tensor]:
    """A tiny autoencoder of images, with the scale that ComfyUI's loader gives a file of this name."""
    channels, scale, shift = TINY_SCALES[name]
    state = random_weights(comfy.taesd.taesd.TAESD(latent_channels=channels), seed)
    return state | {"vae_scale": torch.tensor(scale), "vae_shift": torch.tensor(shift)}


def tiny_video_vae(channels: int = 16, seed: int = 1) -> dict[str, Tensor]:
    """lighttaew2_1, or in fp16 what ComfyUI takes for taehv; of 48 channels lighttaew2_2, of 128 taeltx_2."""
    return random_weights(comfy.taesd.taehv.TAEHV(latent_channels=channels, latent_format=None), seed)


# ---- text encoders -----------------------------------------------------------------------------------------------

CUT: dict[str, dict] = {
    "clip_l_model_config": {"num_hidden_layers": 3, "intermediate_size": 64},
    "clip_g_model_config": {"num_hidden_layers": 3, "intermediate_size": 64},
    "t5xxl_model_config": {"num_layers": 1, "d_ff": 64, "num_heads": 2, "d_kv": 32},
    "umt5xxl_model_config": {"num_layers": 1, "d_ff": 64, "num_heads": 2, "d_kv": 32, "vocab_size": 256},
    "llama_model_config": {
        "num_hidden_layers": 4,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 128320,
    },
}


def _clip(tokenizer: type, model: type, data: dict | None = None) -> Any:
    target = comfy.supported_models_base.ClipTarget(tokenizer, model)
    options = {**CUT, "dtype": torch.float16}
    # with dynamic memory layers have no weights until a file is loaded
    with mock.patch.object(comfy.memory_management, "aimdo_enabled", False):
        clip = comfy.sd.CLIP(target, tokenizer_data=data or {}, model_options=options, disable_dynamic=True)
    generator = torch.Generator().manual_seed(2)
    for parameter in clip.cond_stage_model.parameters():
        large = parameter.numel() > 2**22  # an embedding: the few words there are need not many random numbers
        scale = 0.1 if parameter.ndim < 2 or large else parameter.shape[-1] ** -0.5
        rows = torch.randn(min(parameter.numel(), 2**22), generator=generator)
        parameter.data.copy_(rows.repeat(-(-parameter.numel() // len(rows)))[: parameter.numel()].view_as(parameter))
        parameter.data.mul_(scale)
        if parameter.ndim == 1 and parameter.numel() > 1:
            parameter.data.add_(0.5)
    return clip


def sd15_clip() -> Any:
    return _clip(sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel)


def sdxl_clips() -> Any:
    return _clip(sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel)


def refiner_clip() -> Any:
    """The refiner's, or what a loader makes of one of SDXL's two files."""
    return _clip(sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLRefinerClipModel)


def sd3_clips() -> Any:
    models = comfy.text_encoders.sd3_clip
    return _clip(models.SD3Tokenizer, models.sd3_clip(clip_l=True, clip_g=True, t5=False))


def flux_clips() -> Any:
    models = comfy.text_encoders.flux
    return _clip(models.FluxTokenizer, models.flux_clip())


def ltx_clip() -> Any:
    models = comfy.text_encoders.lt
    return _clip(models.LTXVT5Tokenizer, models.ltxv_te())


class _Words:
    """Takes the place of a tokenizer whose large file is missing from a checkout: a number for each word."""

    @classmethod
    def from_pretrained(cls, path: str, **_: Any) -> _Words:
        return cls()

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [128000, *(1000 + sum(map(ord, word)) % 1000 for word in text.split())]}

    def get_vocab(self) -> dict[str, int]:
        return {}


def hunyuan_clips() -> Any:
    models = comfy.text_encoders.hunyuan_video
    folder = Path(models.__file__).parent / "llama_tokenizer"
    if not (folder / "tokenizer.json").exists():
        models.LlamaTokenizerFast = _Words
    return _clip(models.HunyuanVideoTokenizer, models.hunyuan_video_clip())


def clip_vision(n_numbers: int = 768) -> Any:
    """CLIP ViT-L for images, two layers."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes |= {
        "projection_dim": n_numbers,
        "image_size": 224,
        "patch_size": 14,
        "num_channels": 3,
        "layer_norm_eps": 1e-5,
    }
    model = comfy.clip_vision.ClipVisionModel(sizes | {"hidden_act": "quick_gelu", "model_type": "clip_vision_model"})
    model.load_sd(random_weights(model.model, 4))
    return model


def zero123() -> Three:
    """Stable Zero123, as its checkpoint's loader gives it."""
    layer = random_weights(nn.Linear(772, 768), 5)
    model = checkpoint_model(sd15_unet(in_channels=8), **prefixed(layer, "cc_projection."))
    return Three(model, clip_vision(), vae(kl_vae()))


def sv3d(told: int) -> Three:
    """SV3D_u (256) or SV3D_p (1280), as its checkpoint's loader gives it: the autoencoder is a part of that."""
    state = prefixed(sv3d_unet(told), UNET_PREFIX) | prefixed(kl_vae(), "conditioner.embedders.1.encoder.")
    model, _, autoencoder, _ = comfy.sd.load_state_dict_guess_config(state, output_vae=True, output_clip=False)
    return Three(model, clip_vision(1024), autoencoder)


def wan_clip() -> Any:
    """UMT5, with a vocabulary of its own: the real one comes with the weights."""
    import sentencepiece

    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 50),
        model_writer=buffer,
        vocab_size=64,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    pieces = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    models = comfy.text_encoders.wan
    return _clip(models.WanT5Tokenizer, models.te(), {"spiece_model": pieces})


# ---- families ----------------------------------------------------------------------------------------------------


def diffusion_model(state: dict[str, Tensor]) -> Any:
    """What UNETLoader gives."""
    return comfy.sd.load_diffusion_model_state_dict(dict(state))


def checkpoint_model(state: dict[str, Tensor], **others: Tensor) -> Any:
    """What CheckpointLoaderSimple gives as MODEL."""
    state = prefixed(state, UNET_PREFIX) | others
    return comfy.sd.load_state_dict_guess_config(state, output_vae=False, output_clip=False)[0]


def vae(state: dict[str, Tensor], metadata: dict | None = None) -> Any:
    """What VAELoader gives."""
    return comfy.sd.VAE(sd=dict(state), metadata=metadata)


def scaled_fp8(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as the files that are called fp8_scaled have it: matrices of the blocks in fp8, a scale beside each."""
    found = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, value in state.items():
        if value.ndim == 2 and "blocks" in name and min(value.shape) >= 64:
            scale = value.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            found[name] = (value / scale).to(torch.float8_e4m3fn)
            found[f"{name.removesuffix('.weight')}.scale_weight"] = scale
        else:
            found[name] = value
    return found


def attention_lora(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """A LoRA of a model's attention, in the layout that trainers save."""
    keys, state = comfy.lora.model_lora_keys_unet(model.model, {}), model.model.state_dict()
    found, generator = {}, torch.Generator().manual_seed(seed)
    for name, place in keys.items():
        weight = state.get(place) if isinstance(place, str) else None
        if name.startswith("lora_unet") and weight is not None and weight.ndim == 2 and "attn" in name:
            found[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=generator) * 0.3
            found[f"{name}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=generator) * 0.3
            found[f"{name}.alpha"] = torch.tensor(2.0)
    return found


FAMILIES: dict[str, Callable[[], Three]] = {
    "sd15": lambda: Three(checkpoint_model(sd15_unet()), sd15_clip(), vae(kl_vae())),
    "sdxl": lambda: Three(checkpoint_model(sdxl_unet()), sdxl_clips(), vae(kl_vae())),
    "zero123": zero123,
    "sv3d_u": lambda: sv3d(256),
    "sv3d_p": lambda: sv3d(1280),
    "sd3": lambda: Three(checkpoint_model(sd3_transformer()), sd3_clips(), vae(kl_vae(16, False))),
    "flux": lambda: Three(diffusion_model(flux_transformer()), flux_clips(), vae(kl_vae(16, False))),
    "wan": lambda: Three(diffusion_model(wan_transformer()), wan_clip(), vae(wan_vae())),
    "wan22": lambda: Three(diffusion_model(wan_transformer(in_dim=48, out_dim=48)), wan_clip(), wan22_vae()),
    "ltx": lambda: Three(diffusion_model(ltx_transformer()), ltx_clip(), vae(*ltx_vae_state())),
    "hunyuan": lambda: Three(diffusion_model(hunyuan_transformer()), hunyuan_clips(), hunyuan_vae()),
}
SIZES = {  # (height, width), frames: as small as each takes
    "sd15": ((32, 64), None),
    "sdxl": ((32, 64), None),
    "zero123": ((32, 32), None),
    "sv3d_u": ((32, 32), 3),
    "sv3d_p": ((32, 32), 3),
    "sd3": ((32, 64), None),
    "flux": ((32, 64), None),
    "wan": ((32, 48), 5),
    "wan22": ((64, 96), 5),
    "ltx": ((64, 96), 9),
    "hunyuan": ((32, 48), 5),
}
