"""Self-attention that looks across the views or frames of a group."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as functional
from torch import Tensor


class GroupAttention:
    """An attention processor (in diffusers' sense) whose self-attention lets F neighbours attend together.

    The batch holds groups of F images after each other: [B*F, N, C] becomes [B, F*N, C] for self-attention and
    goes back afterwards; cross-attention stays within an image. F comes with each call as `n_views`
    (diffusers' `cross_attention_kwargs`), so the processor has no state. MVDream (2308.16512), section 3.1.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        n_views: int = 1,
    ) -> Tensor:
        """Attend. hidden_states [B*F, N, C]; encoder_hidden_states [B*F, L, D] or None for self-attention."""
        if attention_mask is not None:
            raise ValueError("attention across views takes no attention mask")
        shape = hidden_states.shape
        if encoder_hidden_states is None:
            hidden_states = hidden_states.reshape(shape[0] // n_views, n_views * shape[1], shape[2])  # [B, F*N, C]
            context = hidden_states
        else:
            context = encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        # [B, heads, tokens, C / heads]
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        attended = attn.to_out[1](attn.to_out[0](attended.to(query.dtype)))  # a linear layer, then dropout
        return attended.reshape(shape)


def attend_across_views(unet: Any) -> None:
    """Give every attention of a UNet2DConditionModel the processor above; no weight changes."""
    unet.set_attn_processor(GroupAttention())
