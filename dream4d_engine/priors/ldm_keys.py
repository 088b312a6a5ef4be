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

from .checkpoints import Shapes
from .errors import PriorError

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
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


# ---- UNet --------------------------------------------------------------------------------------------------------


def unet_names(keys: Iterable[str]) -> dict[str, str]:
    """Map the names of a UNet's tensors (without `model.diffusion_model.`) to UNet2DConditionModel's."""
    keys = list(keys)
    n_resnets = _resnets_per_level(keys)
    return {key: _unet_name(key, n_resnets, _is_upsampler(key, keys)) for key in keys}


def _unet_name(key: str, n_resnets: int, upsampler: bool) -> str:
    for edge, name in _EDGES.items():
        if key.startswith(f"{edge}."):
            return f"{name}.{_in_resnet(key.removeprefix(f'{edge}.'))}"
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", key)
    if found is None:
        raise PriorError(f"the checkpoint's UNet has a part that no known model has: {key}")
    side, place, part, rest = found[1], int(found[2]), int(found[3]), found[4]
    level, index = divmod(place - 1 if side == "input" else place, n_resnets + 1)
    block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if rest.startswith("op."):
        return f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if upsampler:
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
        return _unet_name(key, n_resnets, _is_upsampler(key, [])).removesuffix(".weight").replace(".", "_")
    except PriorError:  # a block that no UNet has
        return None


def _in_resnet(rest: str) -> str:
    """Translate a name within a resnet; within an attention the names are the same."""
    layer, _, parameter = rest.rpartition(".")
    return f"{_RESNET[layer]}.{parameter}" if layer in _RESNET else rest


def _is_upsampler(key: str, keys: list[str]) -> bool:
    return re.fullmatch(r"output_blocks\.\d+\.[12]\.conv\.(weight|bias)", key) is not None


def _resnets_per_level(keys: Iterable[str]) -> int:
    """L, from where the first downsampling is (or, in a network of one level, from the number of blocks)."""
    keys = set(keys)
    places = sorted({int(key.split(".")[1]) for key in keys if key.startswith("input_blocks.")})
    if not places:
        raise PriorError("the checkpoint's UNet has no input blocks")
    steps = [place for place in places if f"input_blocks.{place}.0.op.weight" in keys]
    return steps[0] - 1 if steps else places[-1]


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
    linear = len(_first(shapes, r".*\.1\.proj_in\.weight")) == 2
    camera = shapes.get("camera_embed.0.weight")
    down = tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends)
    up = tuple("CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends))
    return {
        "sample_size": sample_size,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": widths,
        "layers_per_block": n_resnets,
        "transformer_layers_per_block": depths,
        "cross_attention_dim": _first(shapes, r".*\.attn2\.to_k\.weight")[1],
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
    while (conv := shapes.get(f"input_blocks.{place}.0.out_layers.3.weight")) is not None:
        blocks = {re.match(rf"input_blocks\.{place}\.1\.transformer_blocks\.(\d+)\.", key) for key in shapes} - {None}
        widths.append(conv[0])
        attends.append(bool(blocks))
        depths.append(len({found[1] for found in blocks}) or 1)
        place += n_resnets + 1
    return tuple(widths), tuple(attends), tuple(depths)


def _heads(widths: tuple[int, ...], linear: bool, params: Mapping[str, Any]) -> tuple[int, ...]:
    if params.get("num_head_channels", -1) > 0:
        return tuple(width // params["num_head_channels"] for width in widths)
    if params.get("num_heads", -1) > 0:
        return (params["num_heads"],) * len(widths)
    return tuple(max(width // HEAD_WIDTH, 1) for width in widths) if linear else (SD1_HEADS,) * len(widths)


def _first(shapes: Shapes, pattern: str) -> tuple[int, ...]:
    for key, shape in shapes.items():
        if re.fullmatch(pattern, key):
            return shape
    raise PriorError(f"the checkpoint's UNet has no cross-attention ({pattern})")


def ema_name(key: str) -> str:
    """Return where the running mean of a UNet's tensor is kept (its whole name, without dots)."""
    return EMA + f"diffusion_model.{key}".replace(".", "")


# ---- Autoencoder -------------------------------------------------------------------------------------------------


def vae_names(keys: Iterable[str]) -> dict[str, str]:
    """Map the names of an autoencoder's tensors (without `first_stage_model.`) to AutoencoderKL's.

    What only its training needed (`loss.`) is left out.
    """
    keys = [key for key in keys if not key.startswith(("loss.", "model_ema."))]
    n_levels = 1 + max((int(key.split(".")[2]) for key in keys if key.startswith("decoder.up.")), default=0)
    return {key: _vae_name(key, n_levels) for key in keys}


def _vae_name(key: str, n_levels: int) -> str:
    if key.startswith(("quant_conv.", "post_quant_conv.")):
        return key
    side, _, rest = key.partition(".")
    layer, _, parameter = rest.rpartition(".")
    if side not in ("encoder", "decoder"):
        raise PriorError(f"the checkpoint's autoencoder has a part that no known model has: {key}")
    if layer in ("conv_in", "conv_out"):
        return key
    if layer == "norm_out":
        return f"{side}.conv_norm_out.{parameter}"
    if found := re.fullmatch(r"mid\.block_([12])\.(.+)", rest):
        return f"{side}.mid_block.resnets.{int(found[1]) - 1}.{_shortcut(found[2])}"
    if found := re.fullmatch(r"mid\.attn_1\.(\w+)", layer):
        return f"{side}.mid_block.attentions.0.{_VAE_ATTENTION[found[1]]}.{parameter}"
    if found := re.fullmatch(r"(down|up)\.(\d+)\.block\.(\d+)\.(.+)", rest):
        return f"{side}.{_vae_level(found[1], int(found[2]), n_levels)}.resnets.{found[3]}.{_shortcut(found[4])}"
    if found := re.fullmatch(r"(down|up)\.(\d+)\.(down|up)sample\.conv", layer):
        block = _vae_level(found[1], int(found[2]), n_levels)
        return f"{side}.{block}.{found[1]}samplers.0.conv.{parameter}"
    raise PriorError(f"the checkpoint's autoencoder has a part that no known model has: {key}")


def _vae_level(side: str, level: int, n_levels: int) -> str:
    """The blocks on the way up are numbered by resolution there, by order here."""
    return f"down_blocks.{level}" if side == "down" else f"up_blocks.{n_levels - 1 - level}"


def _shortcut(rest: str) -> str:
    return rest.replace("nin_shortcut.", "conv_shortcut.")


def vae_config(shapes: Shapes, scaling_factor: float = 0.18215) -> dict[str, Any]:
    """Return the arguments of AutoencoderKL from its tensors' shapes (without `first_stage_model.`)."""
    widths, n_resnets = [], 0
    while (conv := shapes.get(f"encoder.down.{len(widths)}.block.0.conv2.weight")) is not None:
        widths.append(conv[0])
    while f"encoder.down.0.block.{n_resnets}.conv2.weight" in shapes:
        n_resnets += 1
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["post_quant_conv.weight"][0],
        "block_out_channels": tuple(widths),
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": n_resnets,
        "sample_size": 256,
        "scaling_factor": scaling_factor,
    }
