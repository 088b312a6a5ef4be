"""From the encoders of text and pictures inside latent diffusion's checkpoints to transformers' CLIP classes.

Three layouts occur under `cond_stage_model.`: transformers' own (Stable Diffusion 1), OpenCLIP's text tower (Stable
Diffusion 2 and MVDream; its users read the last but one layer), and OpenAI's CLIP (2103.00020) with its image tower
(Zero123).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from .checkpoints import Shapes
from .errors import PriorError

EncoderLayout = Literal["transformers", "open_clip", "clip_image"]

HEAD_WIDTH = 64  # of every CLIP that is used here
START_TOKEN, END_TOKEN = 49406, 49407

_HF, _TEXT, _VISUAL = "transformer.text_model.", "model.transformer.resblocks.", "model.visual."
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


@dataclass(frozen=True)
class Piece:
    """Where a tensor comes from: all of `source`, or the given third of its rows; transposed afterwards if need be."""

    source: str
    third: int | None = None
    transpose: bool = False

    def take(self, read: Callable[[str], Tensor]) -> Tensor:
        """Read the tensor."""
        value = read(self.source)
        if self.third is not None:
            value = value.chunk(3)[self.third]
        return value.T.contiguous() if self.transpose else value


def encoder_layout(shapes: Shapes) -> EncoderLayout | None:
    """Say which layout the tensors of a `cond_stage_model` (without that prefix) have; None if there is no encoder."""
    if any(key.startswith(_VISUAL) for key in shapes):
        return "clip_image"
    if any(key.startswith(_TEXT) for key in shapes):
        return "open_clip"
    return "transformers" if any(key.startswith(_HF) for key in shapes) else None


def text_pieces(shapes: Shapes, layout: EncoderLayout) -> dict[str, Piece]:
    """Return CLIPTextModel's tensors. Of OpenCLIP's layers the last is left out: nobody reads what it makes."""
    if layout == "transformers":
        names = (key for key in shapes if key.startswith(_HF) and not key.endswith("position_ids"))
        return {key.removeprefix("transformer."): Piece(key) for key in names}
    pieces = {
        "text_model.embeddings.token_embedding.weight": Piece("model.token_embedding.weight"),
        "text_model.embeddings.position_embedding.weight": Piece("model.positional_embedding"),
        "text_model.final_layer_norm.weight": Piece("model.ln_final.weight"),
        "text_model.final_layer_norm.bias": Piece("model.ln_final.bias"),
    }
    return pieces | _block_pieces(_TEXT, "text_model.encoder.layers", _n_blocks(shapes, _TEXT) - 1)


def text_config(shapes: Shapes, layout: EncoderLayout) -> dict[str, Any]:
    """Return the arguments of CLIPTextConfig."""
    if layout == "transformers":
        token, position = (shapes[f"{_HF}embeddings.{name}_embedding.weight"] for name in ("token", "position"))
        n_layers = _n_blocks(shapes, f"{_HF}encoder.layers.")
        wide = shapes[f"{_HF}encoder.layers.0.mlp.fc1.weight"][0]
    else:
        token, position = shapes["model.token_embedding.weight"], shapes["model.positional_embedding"]
        n_layers, wide = _n_blocks(shapes, _TEXT) - 1, shapes[f"{_TEXT}0.mlp.c_fc.weight"][0]
    return {
        "vocab_size": token[0],
        "hidden_size": token[1],
        "intermediate_size": wide,
        "num_hidden_layers": n_layers,
        "num_attention_heads": max(token[1] // HEAD_WIDTH, 1),
        "max_position_embeddings": position[0],
        "projection_dim": shapes.get("model.text_projection", token)[1],
        "hidden_act": "quick_gelu" if layout == "transformers" else "gelu",
        "bos_token_id": START_TOKEN,
        "eos_token_id": END_TOKEN,
        "pad_token_id": END_TOKEN if layout == "transformers" else 0,
    }


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
    width, _, patch, _ = shapes[f"{_VISUAL}conv1.weight"]
    blocks = f"{_VISUAL}transformer.resblocks."
    n_patches = shapes[f"{_VISUAL}positional_embedding"][0] - 1
    return {
        "hidden_size": width,
        "intermediate_size": shapes[f"{blocks}0.mlp.c_fc.weight"][0],
        "num_hidden_layers": _n_blocks(shapes, blocks),
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "image_size": patch * round(n_patches**0.5),
        "patch_size": patch,
        "projection_dim": shapes[f"{_VISUAL}proj"][1],
        "hidden_act": "quick_gelu",
    }


def _n_blocks(shapes: Shapes, prefix: str) -> int:
    numbers = {found[1] for key in shapes if (found := re.match(re.escape(prefix) + r"(\d+)\.", key))}
    if not numbers:
        raise PriorError(f"the checkpoint's encoder has no layers ({prefix})")
    return len(numbers)


def _block_pieces(there: str, here: str, n_blocks: int) -> dict[str, Piece]:
    """The tensors of a transformer's blocks; query, key and value are one matrix there."""
    pieces = {}
    for i in range(n_blocks):
        for old, new in _BLOCK.items():
            pieces |= {f"{here}.{i}.{new}.{part}": Piece(f"{there}{i}.{old}.{part}") for part in ("weight", "bias")}
        for third, letter in enumerate("qkv"):
            for part in ("weight", "bias"):
                name = f"{here}.{i}.self_attn.{letter}_proj.{part}"
                pieces[name] = Piece(f"{there}{i}.attn.in_proj_{part}", third)
    return pieces
