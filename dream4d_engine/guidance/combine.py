"""Making one prediction out of several: classifier-free guidance, perp-neg, rescaling.

All of these are written for x0 and hold for eps too: at one x and sigma, x0 = x - sigma * eps, so differences of
the two are proportional and the affine combinations below commute with that map.

Shapes: predictions [B, F, c, h, w].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cfg(text: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Return the prediction guided towards the text: scale 1 is the text's own (2207.12598, equation 6)."""
    return negative + scale * (text - negative)


def published_scale(scale: float) -> float:
    """Turn the scale of "text + s * (text - negative)" into the one that `cfg` takes, s + 1."""
    return scale + 1.0


def perpendicular(vector: Tensor, direction: Tensor) -> Tensor:
    """Return the part of `vector` perpendicular to `direction`, each image [c, h, w] taken as one vector.

    Where the direction is zero there is nothing to be perpendicular to, and the vector comes back whole.
    """
    dims = (-3, -2, -1)
    length = (direction * direction).sum(dims, keepdim=True)  # squared
    along = (vector * direction).sum(dims, keepdim=True) / torch.where(length > 0, length, torch.ones_like(length))
    return vector - along * direction


def perp_neg(text: Tensor, negative: Tensor, others: Sequence[Tensor], weights: Tensor, scale: float) -> Tensor:
    """Guide towards the text and away from other prompts, without working against the text itself.

    Perp-Neg (2304.04968, algorithm 1): negative + scale * (d + sum_i w_i * perp(other_i - negative, d)) with
    d = text - negative.

    Args:
        others: n predictions under the prompts to avoid (the other views). weights: [B, F, n], at most 0.
    """
    towards = text - negative  # d
    away = torch.zeros_like(towards)
    for i, other in enumerate(others):
        away = away + weights[:, :, i, None, None, None].to(towards) * perpendicular(other - negative, towards)
    return negative + scale * (towards + away)


def rescale(guided: Tensor, text: Tensor, share: float) -> Tensor:
    """Bring the standard deviation of a guided x0 towards that of the text prediction alone.

    `share` of the result is rescaled, the rest is not (2305.08891, equations 15-16, on x0 as in MVDream 2308.16512).
    """
    if share == 0:
        return guided
    dims = (1, 2, 3, 4)  # a group's views, channels and pixels: its views keep their differences
    ratio = text.std(dims, keepdim=True) / guided.std(dims, keepdim=True).clamp_min(1e-12)
    return guided * (share * ratio + (1 - share))
