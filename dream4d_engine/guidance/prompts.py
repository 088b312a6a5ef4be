"""Which words go with which camera.

The four views are always in the order of VIEWS, so that text embeddings can be kept as a table [4, L, D] and picked
by index. Angles in radians; names that end in `_deg` are in degrees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import Conditions

VIEWS = ("side", "front", "back", "overhead")
SIDE, FRONT, BACK, OVERHEAD = range(4)

NEGATIVE_PROMPT = (
    "ugly, bad anatomy, blurry, pixelated obscure, unnatural colors, poor lighting, dull, and unclear, cropped, "
    "lowres, low quality, artifacts, duplicate, morbid, mutilated, poorly drawn face, deformed, dehydrated, "
    "bad proportions"
)

# How strongly the other views are avoided, as (a, b, c) of a * exp(-b * r) + c with r the nearness to the view
# that is wanted (2304.04968, section 4).
_TOWARDS_BACK_AVOID_SIDE = (1.0, 0.5, -0.606)
_TOWARDS_BACK_AVOID_FRONT = (1.0, 0.5, 0.967)
_BETWEEN_FRONT_AND_SIDE = (4.0, 0.5, -2.426)


def view_prompts(prompt: str) -> tuple[str, ...]:
    """Return the prompt as seen from each of VIEWS: "a cat, side view", ..."""
    return tuple(f"{prompt}, {view} view" for view in VIEWS)


def without_word(prompt: str, word: str = "sks") -> str:
    """Return the prompt without a word that only a personalised model knows."""
    return " ".join(part for part in prompt.split() if part.strip(",.;") != word)


def _wrapped_deg(azimuth: Tensor) -> Tensor:
    """Return azimuths in degrees within [-180, 180)."""
    return torch.remainder(torch.rad2deg(azimuth) + 180, 360) - 180


def view_index(
    azimuth: Tensor, elevation: Tensor, front_deg: float = 30.0, back_deg: float = 30.0, overhead_deg: float = 60.0
) -> Tensor:
    """Return the index into VIEWS of each camera, int64, the shape of `azimuth`.

    Front within `front_deg` of azimuth 0, back within `back_deg` of 180 degrees, overhead above `overhead_deg`
    whatever the azimuth, else side. The bounds themselves do not count as within.
    """
    azimuth_deg = _wrapped_deg(azimuth).abs()
    index = torch.full(azimuth.shape, SIDE, dtype=torch.int64, device=azimuth.device)
    index[azimuth_deg < front_deg] = FRONT
    index[azimuth_deg > 180 - back_deg] = BACK
    index[elevation > math.radians(overhead_deg)] = OVERHEAD
    return index


@dataclass(frozen=True)
class PerpNegViews:
    """How perp-neg mixes and avoids the views, for B x F cameras."""

    mix: Tensor  # [B, F, 4] shares of the tokens of VIEWS in the text, summing to 1
    avoid: Tensor  # [B, F, 2] indices of the views to avoid
    weights: Tensor  # [B, F, 2] how much, at most 0


def _decay(nearness: Tensor, curve: tuple[float, float, float]) -> Tensor:
    a, b, c = curve
    return a * torch.exp(-b * nearness) + c


def perp_neg_views(azimuth: Tensor, elevation: Tensor, overhead_deg: float = 60.0) -> PerpNegViews:
    """Return the interpolated view and the views to avoid (2304.04968, section 4); inputs [B, F].

    In the front half the text goes from front to side and both are avoided, the farther one more; in the back half it
    goes from side to back and side and front are avoided. Overhead views avoid nothing.
    """
    quarter = _wrapped_deg(azimuth).abs() / 90  # 0 at the front, 1 at the side, 2 at the back
    ahead, overhead = quarter < 1, elevation > math.radians(overhead_deg)
    nearness = torch.where(ahead, 1 - quarter, 2 - quarter)  # 1 at the front (of the front half), at the side (behind)
    first = torch.where(ahead, _decay(nearness, _BETWEEN_FRONT_AND_SIDE), _decay(nearness, _TOWARDS_BACK_AVOID_SIDE))
    second = torch.where(
        ahead, _decay(1 - nearness, _BETWEEN_FRONT_AND_SIDE), _decay(nearness, _TOWARDS_BACK_AVOID_FRONT)
    )
    weights = -torch.stack((first, second), -1) * ~overhead[..., None]
    rest, zero = 1 - nearness, torch.zeros_like(nearness)
    # shares in the order of VIEWS
    mix_ahead = torch.stack((rest, nearness, zero, zero), -1)
    mix_behind = torch.stack((nearness, zero, rest, zero), -1)
    mix_overhead = torch.stack((zero, zero, zero, torch.ones_like(zero)), -1)
    mix = torch.where(overhead[..., None], mix_overhead, torch.where(ahead[..., None], mix_ahead, mix_behind))
    pairs = torch.stack((torch.where(ahead, FRONT, SIDE), torch.where(ahead, SIDE, FRONT)), -1)
    return PerpNegViews(mix, pairs, weights)


@dataclass(frozen=True)
class PerpNegConditions:
    """What perp-neg needs beside the negative prompt."""

    text: Conditions  # to reach: the interpolated view's
    avoid: tuple[Conditions, ...]  # n, to avoid
    weights: Tensor  # [B, F, n] how much, at most 0


def perp_neg_conditions(
    azimuth: Tensor, elevation: Tensor, tokens: Tensor, vector: Tensor | None = None
) -> PerpNegConditions:
    """Return perp-neg's conditions for B x F cameras from the table [4, L, D] of the *text's* view prompts.

    The views to avoid are the same prompt seen from elsewhere, not the negative prompt. `vector` goes to all.
    """
    views = perp_neg_views(azimuth, elevation)
    mixed = torch.einsum("bfv,vld->bfld", views.mix.to(tokens), tokens)
    avoided = views.avoid.to(tokens.device).unbind(-1)
    avoid = tuple(Conditions(tokens[index], vector) for index in avoided)  # [B, F] of a table -> [B, F, L, D]
    return PerpNegConditions(Conditions(mixed, vector), avoid, views.weights.to(tokens))
