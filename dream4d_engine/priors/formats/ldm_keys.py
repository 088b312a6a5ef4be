"""From the names and shapes of latent diffusion's checkpoints (2112.10752) to diffusers' networks.

The checkpoints of Stable Diffusion, MVDream and Zero123 share a layout: the UNet under `model.diffusion_model.`, the
autoencoder under `first_stage_model.`, the encoder of the condition under `cond_stage_model.`. Each `*_names` function
returns a table {name there: name in diffusers} that covers every tensor; each `*_config` function returns the
arguments of the diffusers class, as far as shapes tell: the number of heads is not in them (see `unet_config`).

Letters: L resnets in each level of the way down.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...documents import field
from ..errors import PriorError
from .checkpoints import Shapes, shown
from .clip_keys import count_numbered, sizes

UNET, VAE, CONDITION = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
EMA = "model_ema."
PROJECTION = "cc_projection."

HEAD_WIDTH = 64  # of the models on Stable Diffusion 2; those on 1 have 8 heads everywhere
SD1_HEADS = 8

_EDGES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "camera_embed.0": "class_embedding.linear_1",
    "camera_embed.2": "class_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
# the parts of an autoencoder's attention: latent diffusion's own names first, then those that conversions left
_VAE_ATTENTION = {
    "group_norm": ("norm", "group_norm"),
    "to_q": ("q", "to_q", "query"),
    "to_k": ("k", "to_k", "key"),
    "to_v": ("v", "to_v", "value"),
    "to_out.0": ("proj_out", "to_out.0", "to_out", "proj_attn"),
}
_VAE_ATTENTION_NAMES = {there: here for here, all_names in _VAE_ATTENTION.items() for there in all_names}
MOST_LEVELS = MOST_RESNETS = 16
MOST_TRANSFORMERS = 64  # in one block


# ---- UNet --------------------------------------------------------------------------------------------------------


def unet_names(keys: Iterable[str]) -> dict[str, str]:
    """Map the names of a UNet's tensors (without `model.diffusion_model.`) to UNet2DConditionModel's."""
    keys = list(keys)
    n_resnets = _resnets_per_level(keys)
    return {key: _unet_name(key, n_resnets) for key in keys}


def _unet_name(key: str, n_resnets: int) -> str:
    for edge, name in _EDGES.items():
        if key.startswith(f"{edge}."):
            return f"{name}.{_in_resnet(key.removeprefix(f'{edge}.'))}"
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", key)
    if found is None:
        raise PriorError(f"the checkpoint's UNet has a part that no known model has: {shown(key)}")
    side, place, part, rest = found[1], int(found[2]), int(found[3]), found[4]
    # On the way down a level is L resnets and a downsampling, after the first convolution; on the way up it is L + 1
    # resnets, the last of them with the upsampling.
    level, index = divmod(place - 1 if side == "input" else place, n_resnets + 1)
    block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if rest.startswith("op."):
        return f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    # behind the resnet, and the attention where there is one
    if re.fullmatch(r"output_blocks\.\d+\.[12]\.conv\.(weight|bias)", key):
        return f"{block}.upsamplers.0.{rest}"
    return f"{block}.{'attentions' if part == 1 else 'resnets'}.{index}.{_in_resnet(rest)}"


_HEAD = re.compile(r"(input|output)_blocks_(\d+)_(\d+)|(middle_block|time_embed|camera_embed|out)_(\d+)")


def unet_layer(name: str, n_resnets: int) -> str | None:
    """Translate the name of a UNet's layer (`_` may stand for dots) to UNet2DConditionModel's, with `_` for all dots.

    None where it is no name of latent diffusion's. `n_resnets`: L, the model's layers_per_block.
    """
    plain = name.replace(".", "_")
    head = _HEAD.match(plain)
    if head is None or plain[head.end() :][:1] not in ("", "_"):
        return None
    block = f"{head[1]}_blocks.{head[2]}.{head[3]}" if head[1] else f"{head[4]}.{head[5]}"
    rest = plain[head.end() + 1 :]
    layers = {layer.replace(".", "_"): layer for layer in _RESNET}
    key = ".".join(word for word in (block, layers.get(rest, rest), "weight") if word)
    try:
        return _unet_name(key, n_resnets).removesuffix(".weight").replace(".", "_")
    except PriorError:  # a block that no UNet has
        return None


def _in_resnet(rest: str) -> str:
    """Translate a name within a resnet; within an attention the names are the same."""
    layer, _, parameter = rest.rpartition(".")
    return f"{_RESNET[layer]}.{parameter}" if layer in _RESNET else rest


def _resnets_per_level(keys: Iterable[str]) -> int:
    """L, from where the first downsampling is (or, in a network of one level, from the number of blocks)."""
    keys = set(keys)
    # blocks 0 (the first convolution), then levels of L blocks and a downsampling, which the last level has not
    most = (MOST_RESNETS + 1) * MOST_LEVELS
    n_blocks = count_numbered(dict.fromkeys(keys, ()), r"input_blocks\.(\d+)\.", "the checkpoint's UNet", most)
    steps = [place for place in range(n_blocks) if f"input_blocks.{place}.0.op.weight" in keys]
    n_resnets = steps[0] - 1 if steps else n_blocks - 1
    if not 1 <= n_resnets <= MOST_RESNETS:
        raise PriorError(f"the checkpoint's UNet has {n_resnets} blocks in a level: no known model is made so")
    return n_resnets


def unet_config(shapes: Shapes, params: Mapping[str, Any] | None = None, sample_size: int = 64) -> dict[str, Any]:
    """Return the arguments of UNet2DConditionModel.

    Args:
        shapes: of the UNet's tensors (without `model.diffusion_model.`).
        params: `unet_config.params` of the model's own configuration, if it is at hand, for the number of heads
            (num_head_channels or num_heads). Without it: heads of 64 channels where the projections are linear
            (Stable Diffusion 2), else 8 heads (1).
    """
    n_resnets = _resnets_per_level(shapes)
    widths, attends, depths = _levels(shapes, n_resnets)
    n_transformers = (2 * n_resnets + 1) * sum(d for d, yes in zip(depths, attends, strict=True) if yes) + depths[-1]
    _require_most(shapes, ".in_layers.2.weight", (2 * n_resnets + 1) * len(widths) + 2, "the checkpoint's UNet")
    _require_most(shapes, ".attn1.to_q.weight", n_transformers, "the checkpoint's UNet")
    linear = len(shapes[_first(shapes, ".1.proj_in.weight")]) == 2  # else a 1x1 convolution
    camera = sizes(shapes, "camera_embed.0.weight", 2) if "camera_embed.0.weight" in shapes else None
    down = tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends)
    up = tuple("CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends))
    return {
        "sample_size": sample_size,
        "in_channels": sizes(shapes, "input_blocks.0.0.weight", 4)[1],
        "out_channels": sizes(shapes, "out.2.weight", 4)[0],
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": widths,
        "layers_per_block": n_resnets,
        "transformer_layers_per_block": depths,
        "cross_attention_dim": sizes(shapes, _first(shapes, ".attn2.to_k.weight"), 2)[1],
        # despite its name this is the number of heads (a slip that diffusers keeps for its old models' sake)
        "attention_head_dim": _heads(widths, linear, params or {}),
        "use_linear_projection": linear,
        "class_embed_type": None if camera is None else "projection",
        "projection_class_embeddings_input_dim": None if camera is None else camera[1],
    }


def _levels(shapes: Shapes, n_resnets: int) -> tuple[tuple[int, ...], tuple[bool, ...], tuple[int, ...]]:
    """Return channels, whether there is attention, and the transformers' depth of each level, finest first."""
    widths, attends, depths = [], [], []
    place = 1
    while (name := f"input_blocks.{place}.0.out_layers.3.weight") in shapes:
        widths.append(sizes(shapes, name, 4)[0])
        blocks = [key for key in shapes if key.startswith(f"input_blocks.{place}.1.transformer_blocks.")]
        attends.append(bool(blocks))
        what, pattern = f"the checkpoint's UNet (input_blocks.{place}.1)", r".+?\.transformer_blocks\.(\d+)\."
        found = dict.fromkeys(blocks, ())
        depths.append(count_numbered(found, pattern, what, MOST_TRANSFORMERS) if blocks else 1)
        place += n_resnets + 1
    if not widths:
        raise PriorError("the checkpoint is not complete: input_blocks.1.0.out_layers.3.weight of its UNet is missing")
    return tuple(widths), tuple(attends), tuple(depths)


def _heads(widths: tuple[int, ...], linear: bool, params: Mapping[str, Any]) -> tuple[int, ...]:
    where = "the model's configuration: unet_config.params"
    head_width = field(params, "num_head_channels", int, where, PriorError, -1)
    n_heads = field(params, "num_heads", int, where, PriorError, -1)
    # latent diffusion writes -1 where the other one of the two is meant
    if head_width <= 0 and n_heads <= 0:
        return tuple(max(width // HEAD_WIDTH, 1) for width in widths) if linear else (SD1_HEADS,) * len(widths)
    heads = tuple(width // head_width if head_width > 0 else n_heads for width in widths)
    for width, count in zip(widths, heads, strict=True):
        if not 1 <= count <= width or width % count:
            name = "num_head_channels" if head_width > 0 else "num_heads"
            raise PriorError(f"{where}.{name} is {params[name]}, which doesn't fit the file's {width} channels")
    return heads


def _first(shapes: Shapes, end: str) -> str:
    """The first tensor of attention's that is named so."""
    found = next((key for key in shapes if key.endswith(end)), None)
    if found is None:
        raise PriorError(f"the checkpoint's UNet has no cross-attention (no tensor *{end})")
    return found


def _require_most(shapes: Shapes, end: str, n_expected: int, what: str) -> None:
    """Refuse what lacks most of the layers that a few of its names speak of, before they are built."""
    n_there = sum(key.endswith(end) for key in shapes)
    # what lacks a few is built, and the error then names them
    if n_expected > 2 * n_there + 8:
        raise PriorError(f"{what} is not complete: it has {n_there} tensors *{end}, its blocks need {n_expected}")


def prediction_mark(shapes: Shapes) -> str | None:
    """Name the tensor whose spread tells Stable Diffusion 2's v-models from the others (see single_file.py): the first
    norm of the last transformer's block. None in other models."""
    places = [int(f[1]) for key in shapes if (f := re.fullmatch(r"output_blocks\.(\d{1,4})\.1\.proj_in\.weight", key))]
    name = f"output_blocks.{max(places, default=0)}.1.transformer_blocks.0.norm1.bias"
    linear = len(shapes[_first(shapes, ".1.proj_in.weight")]) == 2
    # Stable Diffusion 1's projections are convolutions; MVDream, which is on Stable Diffusion 2, predicts noise
    return name if linear and "camera_embed.0.weight" not in shapes and name in shapes else None


def ema_name(key: str) -> str:
    """Return where the running mean of a UNet's tensor is kept (its whole name, without dots)."""
    return EMA + f"diffusion_model.{key}".replace(".", "")


# ---- Autoencoder -------------------------------------------------------------------------------------------------


def vae_names(keys: Iterable[str]) -> dict[str, str]:
    """Map the names of an autoencoder's tensors (without `first_stage_model.`) to AutoencoderKL's.

    What only its training needed (`loss.`) is left out. The names may be the encoder's alone.
    """
    keys = [key for key in keys if not key.startswith(("loss.", "model_ema."))]
    what, n_levels = "the checkpoint's autoencoder (decoder.up.*)", 0
    if any(key.startswith("decoder.") for key in keys):
        n_levels = count_numbered(dict.fromkeys(keys, ()), r"decoder\.up\.(\d+)\.", what, MOST_LEVELS)
    names = {key: _vae_name(key, n_levels) for key in keys}
    taken: dict[str, str] = {}
    for key, name in names.items():
        if taken.setdefault(name, key) != key:
            raise PriorError(f"the checkpoint's autoencoder has one part twice: {shown(taken[name])} and {shown(key)}")
    return names


def _vae_name(key: str, n_levels: int) -> str:
    if key.startswith(("quant_conv.", "post_quant_conv.")):
        return key
    side, _, rest = key.partition(".")
    layer, _, parameter = rest.rpartition(".")
    if side not in ("encoder", "decoder"):
        raise PriorError(f"the checkpoint's autoencoder has a part that no known model has: {shown(key)}")
    if layer in ("conv_in", "conv_out"):
        return key
    if layer == "norm_out":
        return f"{side}.conv_norm_out.{parameter}"
    if found := re.fullmatch(r"mid\.block_([12])\.(.+)", rest):
        return f"{side}.mid_block.resnets.{int(found[1]) - 1}.{_shortcut(found[2])}"
    attention = layer.removeprefix("mid.attn_1.")
    if attention != layer and attention in _VAE_ATTENTION_NAMES:
        return f"{side}.mid_block.attentions.0.{_VAE_ATTENTION_NAMES[attention]}.{parameter}"
    if found := re.fullmatch(r"(down|up)\.(\d+)\.block\.(\d+)\.(.+)", rest):
        return f"{side}.{_vae_level(found[1], int(found[2]), n_levels)}.resnets.{found[3]}.{_shortcut(found[4])}"
    if found := re.fullmatch(r"(down|up)\.(\d+)\.(down|up)sample\.conv", layer):
        block = _vae_level(found[1], int(found[2]), n_levels)
        return f"{side}.{block}.{found[1]}samplers.0.conv.{parameter}"
    raise PriorError(f"the checkpoint's autoencoder has a part that no known model has: {shown(key)}")


def _vae_level(side: str, level: int, n_levels: int) -> str:
    # there the blocks on the way up are numbered by resolution, here by order
    return f"down_blocks.{level}" if side == "down" else f"up_blocks.{n_levels - 1 - level}"


def _shortcut(rest: str) -> str:
    return rest.replace("nin_shortcut.", "conv_shortcut.")


def vae_config(shapes: Shapes, scaling_factor: float = 0.18215) -> dict[str, Any]:
    """Return the arguments of AutoencoderKL from its tensors' shapes (without `first_stage_model.`)."""
    what = "the checkpoint's autoencoder (encoder.down.*)"
    n_levels = count_numbered(shapes, r"encoder\.down\.(\d+)\.", what, MOST_LEVELS)
    n_resnets = count_numbered(shapes, r"encoder\.down\.0\.block\.(\d+)\.", what, MOST_RESNETS)
    _require_most(shapes, ".conv1.weight", (2 * n_resnets + 1) * n_levels + 4, "the checkpoint's autoencoder")
    widths = [sizes(shapes, f"encoder.down.{level}.block.0.conv2.weight", 4)[0] for level in range(n_levels)]
    return {
        "in_channels": sizes(shapes, "encoder.conv_in.weight", 4)[1],
        "out_channels": sizes(shapes, "decoder.conv_out.weight", 4)[0],
        "latent_channels": sizes(shapes, "post_quant_conv.weight", 4)[0],
        "block_out_channels": tuple(widths),
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": n_resnets,
        "sample_size": 256,
        "scaling_factor": scaling_factor,
    }
