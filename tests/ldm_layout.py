"""The names and shapes of latent diffusion's checkpoints, listed from how those networks are built.

The loaders are tested on these lists at full size, and on files with random numbers under them at small size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class UNetSize:
    """`attends`: levels with transformers. `linear`: their projections are linear layers (Stable Diffusion 2)."""

    channels: int = 320
    multiples: tuple[int, ...] = (1, 2, 4, 4)
    n_resnets: int = 2
    attends: tuple[int, ...] = (0, 1, 2)
    context: int = 1024
    linear: bool = True
    in_channels: int = 4
    camera: int | None = None


SD21, SD15 = UNetSize(), UNetSize(context=768, linear=False)
MVDREAM = UNetSize(camera=16)
ZERO123 = UNetSize(context=768, linear=False, in_channels=8)


def layer(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": (shape[0],)}


def resnet(name: str, inside: int, outside: int, time: int) -> Shapes:
    return {
        **layer(f"{name}.in_layers.0", inside),
        **layer(f"{name}.in_layers.2", outside, inside, 3, 3),
        **layer(f"{name}.emb_layers.1", outside, time),
        **layer(f"{name}.out_layers.0", outside),
        **layer(f"{name}.out_layers.3", outside, outside, 3, 3),
        **(layer(f"{name}.skip_connection", outside, inside, 1, 1) if inside != outside else {}),
    }


def transformer(name: str, width: int, context: int, linear: bool) -> Shapes:
    projection = (width, width) if linear else (width, width, 1, 1)
    found = {
        **layer(f"{name}.norm", width),
        **layer(f"{name}.proj_in", *projection),
        **layer(f"{name}.proj_out", *projection),
    }
    block = f"{name}.transformer_blocks.0"
    for i, inside in ((1, width), (2, context)):
        found |= {f"{block}.attn{i}.to_q.weight": (width, width)}
        found |= {f"{block}.attn{i}.to_{letter}.weight": (width, inside) for letter in "kv"}
        found |= layer(f"{block}.attn{i}.to_out.0", width, width)
    for i in (1, 2, 3):
        found |= layer(f"{block}.norm{i}", width)
    return {
        **found,
        **layer(f"{block}.ff.net.0.proj", 8 * width, width),
        **layer(f"{block}.ff.net.2", width, 4 * width),
    }


def unet(size: UNetSize) -> Shapes:
    """A UNet, its skip connections counted as it is built."""
    base, time = size.channels, 4 * size.channels
    found = {**layer("time_embed.0", time, base), **layer("time_embed.2", time, time)}
    if size.camera is not None:
        found |= {**layer("camera_embed.0", time, size.camera), **layer("camera_embed.2", time, time)}
    found |= layer("input_blocks.0.0", base, size.in_channels, 3, 3)
    skips, width, place = [base], base, 1
    last = len(size.multiples) - 1
    for level, multiple in enumerate(size.multiples):
        for _ in range(size.n_resnets):
            found |= resnet(f"input_blocks.{place}.0", width, multiple * base, time)
            width = multiple * base
            if level in size.attends:
                found |= transformer(f"input_blocks.{place}.1", width, size.context, size.linear)
            skips.append(width)
            place += 1
        if level < last:
            found |= layer(f"input_blocks.{place}.0.op", width, width, 3, 3)
            skips.append(width)
            place += 1
    found |= resnet("middle_block.0", width, width, time)
    found |= transformer("middle_block.1", width, size.context, size.linear)
    found |= resnet("middle_block.2", width, width, time)
    place = 0
    for level in reversed(range(len(size.multiples))):
        for i in range(size.n_resnets + 1):
            found |= resnet(f"output_blocks.{place}.0", width + skips.pop(), size.multiples[level] * base, time)
            width, part = size.multiples[level] * base, 1
            if level in size.attends:
                found |= transformer(f"output_blocks.{place}.1", width, size.context, size.linear)
                part = 2
            if level and i == size.n_resnets:
                found |= layer(f"output_blocks.{place}.{part}.conv", width, width, 3, 3)
            place += 1
    assert not skips
    return {**found, **layer("out.0", width), **layer("out.2", 4, width, 3, 3)}


def vae_block(name: str, inside: int, outside: int) -> Shapes:
    return {
        **layer(f"{name}.norm1", inside),
        **layer(f"{name}.conv1", outside, inside, 3, 3),
        **layer(f"{name}.norm2", outside),
        **layer(f"{name}.conv2", outside, outside, 3, 3),
        **(layer(f"{name}.nin_shortcut", outside, inside, 1, 1) if inside != outside else {}),
    }


def vae_middle(side: str, width: int) -> Shapes:
    found = {**vae_block(f"{side}.mid.block_1", width, width), **vae_block(f"{side}.mid.block_2", width, width)}
    found |= layer(f"{side}.mid.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        found |= layer(f"{side}.mid.attn_1.{part}", width, width, 1, 1)
    return found


def vae(channels: int = 128, multiples: tuple[int, ...] = (1, 2, 4, 4), n_resnets: int = 2) -> Shapes:
    """An autoencoder."""
    widths, last = [m * channels for m in multiples], len(multiples) - 1
    found = layer("encoder.conv_in", channels, 3, 3, 3)
    width = channels
    for level, wide in enumerate(widths):
        for i in range(n_resnets):
            found |= vae_block(f"encoder.down.{level}.block.{i}", width, wide)
            width = wide
        if level < last:
            found |= layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    found |= {**vae_middle("encoder", width), **layer("encoder.norm_out", width)}
    found |= {**layer("encoder.conv_out", 8, width, 3, 3), **layer("quant_conv", 8, 8, 1, 1)}
    found |= {**layer("post_quant_conv", 4, 4, 1, 1), **layer("decoder.conv_in", width, 4, 3, 3)}
    found |= vae_middle("decoder", width)
    for level in reversed(range(len(widths))):
        for i in range(n_resnets + 1):
            found |= vae_block(f"decoder.up.{level}.block.{i}", width, widths[level])
            width = widths[level]
        if level:
            found |= layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    return {**found, **layer("decoder.norm_out", width), **layer("decoder.conv_out", 3, width, 3, 3)}


def clip_blocks(prefix: str, width: int, n_layers: int) -> Shapes:
    found: Shapes = {}
    for i in range(n_layers):
        block = f"{prefix}.{i}"
        found |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        found |= {**layer(f"{block}.attn.out_proj", width, width)}
        found |= {**layer(f"{block}.ln_1", width), **layer(f"{block}.ln_2", width)}
        found |= {**layer(f"{block}.mlp.c_fc", 4 * width, width), **layer(f"{block}.mlp.c_proj", width, 4 * width)}
    return found


def open_clip_text(width: int = 1024, n_layers: int = 24, vocabulary: int = 49408, length: int = 77) -> Shapes:
    """OpenCLIP's text tower, as FrozenOpenCLIPEmbedder keeps it."""
    return {
        "model.positional_embedding": (length, width),
        "model.text_projection": (width, width),
        "model.logit_scale": (),
        "model.attn_mask": (length, length),
        "model.token_embedding.weight": (vocabulary, width),
        **layer("model.ln_final", width),
        **clip_blocks("model.transformer.resblocks", width, n_layers),
    }


def clip_image(width: int = 1024, n_layers: int = 24, patch: int = 14, n_patches: int = 256, out: int = 768) -> Shapes:
    """OpenAI's CLIP with its text tower deleted, as FrozenCLIPImageEmbedder keeps it."""
    return {
        "mean": (3,),
        "std": (3,),
        "model.positional_embedding": (77, out),
        "model.text_projection": (out, out),
        "model.logit_scale": (),
        "model.token_embedding.weight": (49408 if width == 1024 else 8, out),
        **layer("model.ln_final", out),
        "model.visual.class_embedding": (width,),
        "model.visual.positional_embedding": (n_patches + 1, width),
        "model.visual.proj": (width, out),
        "model.visual.conv1.weight": (width, 3, patch, patch),
        **layer("model.visual.ln_pre", width),
        **layer("model.visual.ln_post", width),
        **clip_blocks("model.visual.transformer.resblocks", width, n_layers),
    }


def hf_clip_text(width: int = 768, n_layers: int = 12, vocabulary: int = 49408, length: int = 77) -> Shapes:
    """CLIP's text encoder under transformers' names, as FrozenCLIPEmbedder keeps it."""
    root = "transformer.text_model"
    found: Shapes = {
        f"{root}.embeddings.position_ids": (1, length),
        f"{root}.embeddings.token_embedding.weight": (vocabulary, width),
        f"{root}.embeddings.position_embedding.weight": (length, width),
        **layer(f"{root}.final_layer_norm", width),
    }
    for i in range(n_layers):
        block = f"{root}.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= layer(f"{block}.self_attn.{name}", width, width)
        found |= {**layer(f"{block}.layer_norm1", width), **layer(f"{block}.layer_norm2", width)}
        found |= {**layer(f"{block}.mlp.fc1", 4 * width, width), **layer(f"{block}.mlp.fc2", width, 4 * width)}
    return found


def checkpoint(unet_shapes: Shapes, vae_shapes: Shapes, condition: Shapes, projection: bool = False) -> Shapes:
    """The whole of a checkpoint's shapes."""
    found = {f"model.diffusion_model.{k}": v for k, v in unet_shapes.items()}
    found |= {f"first_stage_model.{k}": v for k, v in vae_shapes.items()}
    found |= {f"cond_stage_model.{k}": v for k, v in condition.items()}
    return found | (layer("cc_projection", 768, 772) if projection else {})


WIDTH = 64  # of the small checkpoints' encoders


def small(**changes) -> UNetSize:
    """Two levels of 32 and 64 channels."""
    return UNetSize(**{"channels": 32, "multiples": (1, 2), "n_resnets": 1, "attends": (0, 1)} | changes)


def small_checkpoint(name: str) -> Shapes:
    """One of each kind of checkpoint, of a few hundred thousand numbers (and the vocabulary's)."""
    small_vae = vae(32, (1, 2), 1)
    if name == "sd15":
        return checkpoint(unet(small(context=WIDTH, linear=False)), small_vae, hf_clip_text(WIDTH, 2))
    if name == "sd21":
        return checkpoint(unet(small(context=WIDTH)), small_vae, open_clip_text(WIDTH, 3))
    if name == "mvdream":
        return checkpoint(unet(small(context=WIDTH, camera=16)), small_vae, open_clip_text(WIDTH, 3))
    image = clip_image(WIDTH, 2, patch=8, n_patches=16)
    return checkpoint(unet(small(context=768, linear=False, in_channels=8)), small_vae, image, True)


def random_state(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Small random numbers; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {k: v + 1 if v.ndim == 1 and k.endswith("weight") else v for k, v in state.items()}
