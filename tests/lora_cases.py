"""A small LoRA in its formats."""

from __future__ import annotations

import torch
from ldm_layout import WIDTH

RANK = 3
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
LAYERS = (f"{ATTENTION}.to_q", f"{ATTENTION}.to_k", f"{ATTENTION}.to_v", f"{ATTENTION}.to_out.0")
TEXT_LAYER = "text_model.encoder.layers.1.self_attn.q_proj"


def pairs(text: bool = True) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(down, up) of each layer."""
    generator = torch.Generator().manual_seed(0)
    names = (*LAYERS, *((TEXT_LAYER,) if text else ()))
    return {n: tuple(0.3 * torch.randn(s, generator=generator) for s in ((RANK, WIDTH), (WIDTH, RANK))) for n in names}


def old_processors(prefix="unet."):
    state = {}
    for name, (down, up) in pairs(text=False).items():
        head, _, last = name.removesuffix(".0").rpartition(".")
        state[f"{prefix}{head}.processor.{last}_lora.down.weight"] = down
        state[f"{prefix}{head}.processor.{last}_lora.up.weight"] = up
    return state
