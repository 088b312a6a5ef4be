"""From the encoders of text and images inside latent diffusion's checkpoints to transformers' CLIP classes.

Three layouts occur under `cond_stage_model.`: transformers' own (Stable Diffusion 1), OpenCLIP's text tower (Stable
Diffusion 2 and MVDream), and OpenAI's CLIP (2103.00020) with its image tower (Zero123).

How many layers of a text tower are read is part of the model and not of the file: Stable Diffusion 2 reads the last
but one layer of OpenCLIP's towers, and files come with or without the last. So the count follows from the tower,
which its width tells, and from `layer` in the model's own configuration where that is at hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ...documents import describe, field
from ..errors import PriorError
from .checkpoints import Shapes, shown

EncoderLayout = Literal["transformers", "open_clip", "clip_image"]

HEAD_WIDTH = 64  # of every CLIP that is used here
START_TOKEN, END_TOKEN = 49406, 49407
OPEN_CLIP_WIDTH = 1024  # OpenAI's text towers are narrower: from here on it is one of OpenCLIP's
MOST_LAYERS = 128

# layers of OpenCLIP's published text towers by width (B and L, H and g, bigG and e)
_TOWERS = {512: (12,), 640: (12,), 768: (12,), 1024: (24,), 1280: (32, 36)}

_TEXT, _VISUAL = "transformer.resblocks.", "model.visual."
# of a block, CLIP's own names and transformers'
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


@dataclass(frozen=True)
class Piece:
    """Where a tensor comes from."""

    source: str
    third: int | None = None  # of the source's rows, which are query, key and value; None: all of them
    transpose: bool = False

    def take(self, read: Callable[[str], Tensor]) -> Tensor:
        """Read the tensor."""
        value = read(self.source)
        if self.third is not None:
            value = value.chunk(3)[self.third]
        return value.T.contiguous() if self.transpose else value


def encoder_layout(shapes: Shapes, prefer: EncoderLayout = "open_clip") -> EncoderLayout | None:
    """Say which layout the tensors of a `cond_stage_model` (without that prefix) have; None if there is no encoder.

    Args:
        prefer: what it is where a whole CLIP was kept, with both of its towers.
    """
    is_text, is_image = _text_root(shapes) is not None, any(key.startswith(_VISUAL) for key in shapes)
    # a tower of images has resblocks too, so it is looked for by its own beginning
    if is_image and (prefer == "clip_image" or not is_text):
        return "clip_image"
    if is_text:
        return "open_clip"
    return None if _hf_root(shapes) is None else "transformers"


def _text_root(shapes: Shapes) -> str | None:
    """What stands before OpenCLIP's names (`model.` where nobody changed it)."""
    return _root(shapes, _TEXT, "token_embedding.weight")


def _hf_root(shapes: Shapes) -> str | None:
    """What stands before transformers' names: `transformer.text_model.`, or without one of both, as some write it."""
    return _root(shapes, "encoder.layers.", "embeddings.token_embedding.weight")


def _root(shapes: Shapes, blocks: str, embedding: str) -> str | None:
    roots = dict.fromkeys(key.removesuffix(embedding) for key in shapes if key.endswith(embedding))
    return next((root for root in roots if any(key.startswith(root + blocks) for key in shapes)), None)


def text_pieces(shapes: Shapes, layout: EncoderLayout, condition: Mapping[str, Any] | None = None) -> dict[str, Piece]:
    """Return CLIPTextModel's tensors, of the layers that are read. `condition`: see `text_config`."""
    n_layers = text_config(shapes, layout, condition)["num_hidden_layers"]
    model = "text_model"  # the published names; loaders.encoder_state finds the installed version's
    if layout == "transformers":
        root = _hf_root(shapes) or ""
        pieces = {}
        for name in (key.removeprefix(root) for key in shapes if key.startswith(root)):
            layer = re.match(r"encoder\.layers\.(\d+)\.", name)
            is_read = layer is None or int(layer[1]) < n_layers
            # without a projection of the text, which no model here reads
            known = name.partition(".")[0] in ("embeddings", "encoder", "final_layer_norm")
            if known and is_read and not name.endswith("position_ids"):
                pieces[f"{model}.{name}"] = Piece(root + name)
        return pieces
    root = _text_root(shapes) or ""
    pieces = {
        f"{model}.embeddings.token_embedding.weight": Piece(f"{root}token_embedding.weight"),
        f"{model}.embeddings.position_embedding.weight": Piece(f"{root}positional_embedding"),
        f"{model}.final_layer_norm.weight": Piece(f"{root}ln_final.weight"),
        f"{model}.final_layer_norm.bias": Piece(f"{root}ln_final.bias"),
    }
    return pieces | _block_pieces(root + _TEXT, f"{model}.encoder.layers", n_layers)


def text_config(shapes: Shapes, layout: EncoderLayout, condition: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the arguments of CLIPTextConfig.

    Args:
        condition: `cond_stage_config.params` of the model's own configuration, if it is at hand: `layer` says whether
            the last or the last but one ("penultimate") layer is read. Without it: the last of OpenAI's towers, the
            last but one of OpenCLIP's.
    """
    if layout == "transformers":
        root = _hf_root(shapes) or ""
        token, position = f"{root}embeddings.token_embedding.weight", f"{root}embeddings.position_embedding.weight"
        blocks, wide = f"{root}encoder.layers.", "mlp.fc1.weight"
    else:
        root = _text_root(shapes) or ""
        token, position = f"{root}token_embedding.weight", f"{root}positional_embedding"
        blocks, wide = root + _TEXT, "mlp.c_fc.weight"
    vocabulary, width = sizes(shapes, token, 2)
    is_open_clip = layout == "open_clip" or width >= OPEN_CLIP_WIDTH
    projection = shapes.get(f"{root}text_projection", ())  # [width, embedding]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": sizes(shapes, f"{blocks}0.{wide}", 2)[0],
        "num_hidden_layers": _n_read(_n_blocks(shapes, blocks), width, is_open_clip, condition or {}),
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "max_position_embeddings": sizes(shapes, position, 2)[0],
        "projection_dim": projection[1] if len(projection) == 2 else width,
        "hidden_act": "gelu" if is_open_clip else "quick_gelu",  # x sigmoid(1.702 x), OpenAI's approximation
        "bos_token_id": START_TOKEN,
        "eos_token_id": END_TOKEN,
        "pad_token_id": 0 if is_open_clip else END_TOKEN,
    }


def _n_read(n_there: int, width: int, is_open_clip: bool, condition: Mapping[str, Any]) -> int:
    """How many layers of a text tower the model reads, of which the file holds `n_there`."""
    where = "the model's configuration: cond_stage_config.params"
    layer = field(condition, "layer", str, where, PriorError, "penultimate" if is_open_clip else "last")
    if layer not in ("last", "penultimate"):
        raise PriorError(f"{where}.layer must be 'last' or 'penultimate', got {describe(layer)}")
    # a tower of unknown width is taken to be whole
    whole = next((n for n in _TOWERS.get(width, ()) if n >= n_there), n_there) if is_open_clip else n_there
    n_read = whole - 1 if layer == "penultimate" else whole
    if n_there < n_read or n_read < 1:
        raise PriorError(
            f"the checkpoint's text encoder has {n_there} layers, a tower of width {width} has {whole}, of which "
            f"the model reads {n_read}: the file is not complete"
        )
    return n_read


def vision_pieces(shapes: Shapes) -> dict[str, Piece]:
    """Return CLIPVisionModelWithProjection's tensors."""
    model = "vision_model"
    pieces = {
        f"{model}.embeddings.class_embedding": Piece(f"{_VISUAL}class_embedding"),
        f"{model}.embeddings.patch_embedding.weight": Piece(f"{_VISUAL}conv1.weight"),
        f"{model}.embeddings.position_embedding.weight": Piece(f"{_VISUAL}positional_embedding"),
        "visual_projection.weight": Piece(f"{_VISUAL}proj", transpose=True),
    }
    for there, here in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):  # transformers' own spelling
        pieces |= {f"{model}.{here}.{part}": Piece(f"{_VISUAL}{there}.{part}") for part in ("weight", "bias")}
    blocks = f"{_VISUAL}transformer.resblocks."
    return pieces | _block_pieces(blocks, f"{model}.encoder.layers", _n_blocks(shapes, blocks))


def vision_config(shapes: Shapes) -> dict[str, Any]:
    """Return the arguments of CLIPVisionConfig."""
    width, _, patch, _ = sizes(shapes, f"{_VISUAL}conv1.weight", 4)
    blocks = f"{_VISUAL}transformer.resblocks."
    n_patches = sizes(shapes, f"{_VISUAL}positional_embedding", 2)[0] - 1  # the first position is the class's
    return {
        "hidden_size": width,
        "intermediate_size": sizes(shapes, f"{blocks}0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": _n_blocks(shapes, blocks),
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "image_size": patch * round(n_patches**0.5),  # images are square
        "patch_size": patch,
        "projection_dim": sizes(shapes, f"{_VISUAL}proj", 2)[1],
        "hidden_act": "quick_gelu",
    }


def sizes(shapes: Shapes, name: str, n_dims: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there and have this many dimensions, none of them 0."""
    if name not in shapes:
        raise PriorError(f"the checkpoint is not complete: {shown(name)} is missing")
    shape = tuple(shapes[name])
    if len(shape) != n_dims or 0 in shape:
        raise PriorError(f"the checkpoint's {shown(name)} has shape {shape}, not one of {n_dims} dimensions")
    return shape


def _n_blocks(shapes: Shapes, prefix: str) -> int:
    return count_numbered(shapes, re.escape(prefix) + r"(\d+)\.", f"the checkpoint's encoder ({prefix}*)", MOST_LAYERS)


def count_numbered(shapes: Shapes, pattern: str, what: str, most: int) -> int:
    """How many parts there are whose numbers the pattern finds; they must run from 0 without a gap."""
    numbers = {found[1] for key in shapes if (found := re.match(pattern, key))}
    if not numbers:
        raise PriorError(f"{what} has no layers")
    if len(numbers) > most:
        raise PriorError(f"{what} has {len(numbers):,} layers: no known model has more than {most}")
    missing = next((i for i in range(len(numbers)) if str(i) not in numbers), None)
    if missing is not None:
        raise PriorError(f"{what} is not complete: layer {missing} is missing")
    return len(numbers)


def _block_pieces(there: str, here: str, n_blocks: int) -> dict[str, Piece]:
    """The tensors of a transformer's blocks; query, key and value are one matrix there."""
    pieces: dict[str, Piece] = {}
    for i in range(n_blocks):
        for old, new in _BLOCK.items():
            pieces |= {f"{here}.{i}.{new}.{part}": Piece(f"{there}{i}.{old}.{part}") for part in ("weight", "bias")}
        for third, letter in enumerate("qkv"):
            for part in ("weight", "bias"):
                name = f"{here}.{i}.self_attn.{letter}_proj.{part}"
                pieces[name] = Piece(f"{there}{i}.attn.in_proj_{part}", third)
    return pieces
