"""Small folders of today's models, made with diffusers' own classes and random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dream4d_engine.priors.networks.text import END

WIDE, POOLED = 32, 16
WORDS = ("a", "red", "cube", "is", "jumping", ",", "side", "view", "front", "back", "overhead", "ugly")


def tokenizer(end: str, pad: str, length: int) -> Any:
    """A tokenizer of a dozen words, quick to read, that ends a sentence and fills it up as T5's or CLIP's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<pad>", end, "<unk>", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    marks = {"pad_token": pad, "eos_token": end, "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **marks)


def t5_tokenizer() -> Any:
    return tokenizer("</s>", "<pad>", 512)


def clip_tokenizer() -> Any:
    return tokenizer(END, END, 77)


def t5(umt5: bool = False) -> Any:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    config, encoder = (UMT5Config, UMT5EncoderModel) if umt5 else (T5Config, T5EncoderModel)
    return encoder(config(vocab_size=16, d_model=WIDE, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).eval()


def clip(projection: bool, hidden: int = POOLED) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    size = {"hidden_size": hidden, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPTextConfig(
        vocab_size=16, projection_dim=hidden, **size, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def image_vae(channels: int) -> Any:
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "latent_channels": channels}
    shift = {} if channels == 4 else {"shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}
    return AutoencoderKL(**kinds, **sizes, **shift, scaling_factor=0.5).eval()


def wan() -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "text_dim": WIDE}
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return lambda: WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(umt5=True),
        vae=AutoencoderKLWan(base_dim=8, z_dim=16).eval(),
        scheduler=UniPCMultistepScheduler(**flow),
        transformer=WanTransformer3DModel(**sizes, freq_dim=32).eval(),
    )


def ltx() -> Any:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    channels = {"block_out_channels": (8, 8, 16, 16), "decoder_block_out_channels": (8, 8, 16, 16)}
    layers = {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5, "latent_channels": 128}
    moved = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096}
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "num_layers": 2}
    return lambda: LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, **moved),
        vae=AutoencoderKLLTXVideo(**channels, **layers).eval(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=LTXVideoTransformer3DModel(**heads, caption_channels=WIDE).eval(),
    )


def llama() -> Any:
    from transformers import LlamaConfig, LlamaModel

    size = {"hidden_size": WIDE, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaModel(LlamaConfig(vocab_size=16, num_key_value_heads=2, rope_theta=500.0, **size)).eval()


def hunyuan() -> Any:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "rope_axes_dim": (4, 4, 4), "num_refiner_layers": 1}
    words = {"text_embed_dim": WIDE, "pooled_projection_dim": POOLED, "num_layers": 1, "num_single_layers": 1}
    return lambda: HunyuanVideoPipeline(
        text_encoder=llama(),
        tokenizer=tokenizer("</s>", "<pad>", 4096),
        transformer=HunyuanVideoTransformer3DModel(**sizes, **words).eval(),
        vae=AutoencoderKLHunyuanVideo(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip(False),
        tokenizer_2=clip_tokenizer(),
    )


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (32, 32)}
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    width = {"cross_attention_dim": 2 * POOLED, "projection_class_embeddings_input_dim": POOLED + 6 * 8}
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    noise |= {"timestep_spacing": "leading", "steps_offset": 1}
    return lambda: StableDiffusionXLPipeline(
        vae=image_vae(4),
        text_encoder=clip(False),
        text_encoder_2=clip(True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=16, layers_per_block=1, attention_head_dim=4, norm_num_groups=8, **blocks, **added, **width
        ).eval(),
        scheduler=EulerDiscreteScheduler(**noise),
    )


def sd3(with_t5: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    sizes = {"sample_size": 16, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    words = {"joint_attention_dim": WIDE, "caption_projection_dim": 16, "pooled_projection_dim": 2 * POOLED}
    return lambda: StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**sizes, **words, in_channels=16, out_channels=16).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(16),
        text_encoder=clip(True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5() if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )


def flux(guided: bool = False) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    words = {"joint_attention_dim": WIDE, "pooled_projection_dim": POOLED, "axes_dims_rope": (4, 4, 8)}
    return lambda: FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guided),
        vae=image_vae(16),
        text_encoder=clip(False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(**sizes, **words, in_channels=64, guidance_embeds=guided).eval(),
    )


MAKERS = {"wan": wan, "ltx": ltx, "hunyuan": hunyuan, "sdxl": sdxl, "sd3": sd3, "flux": flux}
SIZES = {"wan": ([32, 48], 9), "ltx": ([64, 96], 9), "sdxl": ([64, 64], None), "sd3": ([64, 64], None)}
SIZES |= {"flux": ([64, 96], None), "hunyuan": ([32, 48], 9)}


def pipeline_folder(name: str, place: Path, made: Any = None) -> tuple[Any, Path]:
    """A pipeline of this family, and its folder, which asks for small images."""
    folder = place / name
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = (made or MAKERS[name]())()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                for parameter in part.parameters():
                    if not parameter.any():  # some layers begin at zero
                        torch.nn.init.normal_(parameter, std=0.02)
    pipeline.save_pretrained(folder)
    size, n_frames = SIZES[name]
    index = json.loads((folder / "model_index.json").read_text())
    index["dream4d"] = {"image_size": size} | ({} if n_frames is None else {"n_frames": n_frames})
    (folder / "model_index.json").write_text(json.dumps(index))
    return pipeline, folder
