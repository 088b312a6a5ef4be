"""A denoiser's work divided among processes: each takes some of the images, or some of the conditions.

Shapes as in denoiser.py. All processes call these in the same order with the same values, and get the same back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..division import Division
from .denoiser import Conditions, Denoiser, split_conditions


def encoded_by(denoiser: Denoiser, division: Division, n_images: int, keep: Tensor | None) -> tuple[int, ...] | None:
    """How many images each process encodes, of n that were rendered; None: each encodes all.

    They are those whose rays it rendered (see render_view), for only their gradient is its own. `keep`: [n] bool, on
    the CPU, which of them are looked at; None: all.
    """
    if division.size == 1 or n_images < division.size or not denoiser.images_apart:
        return None
    counts = division.counts(n_images)
    if keep is not None and division.rehearsed:  # as many as may ever fall to one
        kept = int(keep.sum())
        first = min(counts[0], kept)
        return (first, kept - first, *[0] * (division.size - 2))
    return counts if keep is None else tuple(int(part.sum()) for part in keep.split(list(counts)))


def encode(
    denoiser: Denoiser, division: Division, counts: Sequence[int] | None, images: Tensor, carried: Tensor | None
) -> Tensor:
    """Encode [B, F, 3, H, W] to [B, f, c, h, w]; the gradient is of a process's own images, unless `counts` is None."""
    if counts is None:
        return denoiser.encode(images, carried)
    each, own = images.flatten(0, 1)[:, None], division.own(counts)
    if not counts[division.rank]:
        with torch.no_grad():  # one that is another's, for the shape
            mine = denoiser.encode(each[:1])[:0]
    else:
        mine = denoiser.encode(each[own], None if carried is None else carried.flatten()[own, None])
    return division.gather(mine[:, 0], counts).unflatten(0, images.shape[:2])


@torch.no_grad()
def decode(denoiser: Denoiser, division: Division, z: Tensor) -> Tensor:
    """Decode to [B, F, 3, H, W]; no gradient."""
    if division.size == 1 or not denoiser.images_apart:
        return denoiser.decode(z)
    each = z.flatten(0, 1)[:, None]
    counts = division.counts(len(each))
    if counts[division.rank]:
        mine = denoiser.decode(each[division.own(counts)])
    else:
        mine = denoiser.decode(each[:1])[:0]  # for the shape
    return division.gather(mine[:, 0], counts).unflatten(0, z.shape[:2])


@torch.no_grad()
def denoise(denoiser: Denoiser, division: Division, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
    """Predict z from x [B, F, c, h, w]; sigma [B], conditions of B groups, or of B times as many windows."""
    if division.size == 1:
        return denoiser.denoise(x, sigma, conditions)
    counts = division.counts(len(x))
    own, dtype = division.own(counts), torch.promote_types(x.dtype, torch.float32)
    mine = x.new_empty((0, *x.shape[1:]), dtype=dtype)
    if counts[division.rank]:
        windows = len(conditions.tokens) // len(x)
        told = split_conditions(conditions, [windows * count for count in counts])[division.rank]
        mine = denoiser.denoise(x[own], sigma[own], told).to(dtype)
    return division.gather(mine, counts)
