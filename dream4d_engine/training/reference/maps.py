"""Depth and normal maps of an image: taken where they are what they should be, refused where they can't be."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from .masks import COLORED
from .pixels import ImageError

_LEAST_RANGE = 1.5 / 255
_LENGTH_OFF, _TURNED_AWAY, _MIRRORED = 0.12, 0.25, -0.4
"""Of normals: the mean deviation of their length from 1, the share of those that point away, and the correlation of
their right or up with the place on the subject below which a channel seems to be turned round."""


def read_depth(values: Tensor, mask: Tensor, name: str) -> Tensor:
    """The depth map of a subject as [S, S, 1] in [0, 1]; its scale and shift are of no meaning.

    Args:
        values: [S, S, 1 or 3 or 4], of no meaning outside of the mask [S, S, 1]. name: for messages.
    """
    inside = mask[..., 0] > 0
    if values.shape[-1] > 1:
        colors = values[..., :3]
        share = _colored(colors[inside])
        if share > 0.01:
            like = (
                "a normal map (give it as the normal map)"
                if _normal_complaint(colors, inside) is None
                else "one in false colours, made to be looked at (or another image)"
            )
            raise ImageError(
                f"the {name} is coloured: red, green and blue differ at {share:.0%} of the subject. It looks like "
                f"{like}, and the depth can't be told from its colours: save the depth itself as a grey PNG of 8 or 16 "
                "bits, without a colour map"
            )
        values = colors.mean(-1, keepdim=True)
    low, high = (float(x) for x in values[inside].aminmax())
    # full range of what was stored: 16-bit maps may use little of it
    if high - low < min(_LEAST_RANGE, 0.01 * max(abs(high), abs(low))) or high == low:
        raise ImageError(
            f"the {name} is the same everywhere on the subject ({high:.4g}), so it says nothing: give another, or "
            "leave it out"
        )
    if low < 0 or high > 1:  # distances in some unit
        values = (values - low) / (high - low)
    return values * mask


def read_normals(colors: Tensor, mask: Tensor, name: str) -> tuple[Tensor, str]:
    """The normals [S, S, 3] of a map's colours, as unit vectors, and a warning where a channel seems turned round."""
    inside = mask[..., 0] > 0
    complaint = _normal_complaint(colors[..., :3], inside)
    if complaint is not None:
        raise ImageError(
            f"the {name} {complaint}. It must hold the camera's normals as colours (n + 1) / 2: red to the right, "
            "green up, blue towards the camera, (128, 128, 255) where the surface faces it"
        )
    normals = functional.normalize(2 * colors[..., :3] - 1, dim=-1)  # 8 bits leave them a little off length 1
    return normals, _turned_round(normals, inside)


def _colored(colors: Tensor) -> float:
    """The share of colours [N, 3] that aren't grey."""
    return float((colors.amax(-1) - colors.amin(-1) > COLORED).float().mean())


def _normal_complaint(colors: Tensor, inside: Tensor) -> str | None:
    """Why the colours [S, S, 3] can't be normals, as the end of a sentence; None if they can."""
    chosen = colors[inside]
    vectors = 2 * chosen - 1
    length = vectors.norm(dim=-1)
    if length.median() < 0.1:  # (128, 128, 128) is the null vector
        return "is middle grey nearly everywhere on the subject, which is no direction"
    if _colored(chosen) < 0.01:
        return "is grey on the subject: it looks like a depth map or another image"
    off = float((length - 1).abs().mean())
    if off > _LENGTH_OFF:
        return f"holds no unit vectors: their length is off by {off:.0%} on average, as that of other images' colours"
    away = float((vectors[:, 2] < -0.05).float().mean())
    if away > _TURNED_AWAY:
        return (
            f"points away from the camera at {away:.0%} of the subject: its blue may be turned round, or its normals "
            "those of the world or the object"
        )
    return None


def _turned_round(normals: Tensor, inside: Tensor) -> str:
    """A warning where the left looks to the right, or the top down."""
    # of a subject that isn't hollow, what lies on the right looks to the right, and what lies above looks up
    rows, columns = inside.nonzero().unbind(-1)
    right, up = normals[inside][:, 0], normals[inside][:, 1]
    for name, direction, values, place in (("red", "left", right, columns), ("green", "down", up, -rows)):
        place = place.float()
        varied = min(values.std(), place.std()) > 0.05  # what hardly changes correlates with anything
        if varied and float(torch.corrcoef(torch.stack((values, place)))[0, 1]) < _MIRRORED:
            return f"the normal map's {name} seems to point {direction}, unless the subject is hollow: turn it round"
    return ""
