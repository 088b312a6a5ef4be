"""Weights that are no numbers: looked for once, where a network or a LoRA is loaded, and said by name."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import PriorError
from .checkpoints import SUFFIXES, open_checkpoint

FULL_PRECISION = "in full precision (--static.loop.precision full, --motion.loop.precision full)"


def check_finite(tensors: Mapping[str, Tensor], where: Path | str) -> None:
    """Raise PriorError, which names the file and the tensor, where one holds NaN or an infinite value.

    Args:
        tensors: by name, all on one device; they are read once.
        where: the file they are from, or the folder of several files, or words that name it.
    """
    # whole numbers (positions, counts) are always finite
    floats = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel() and not t.is_meta}
    if not floats:
        return
    # a sum is the fastest pass there is, and no NaN or infinity gets lost in it; it may overflow by itself, though
    # one stack, one answer: a GPU is waited for once
    sums = torch.stack([t.sum().float() for t in floats.values()]).isfinite().tolist()
    for (name, tensor), sound in zip(floats.items(), sums, strict=True):
        if not sound and not (finite := tensor.isfinite()).all():
            raise PriorError(_sentence(name, tensor, int((~finite).sum()), where))


def _sentence(name: str, tensor: Tensor, n_bad: int, where: Path | str) -> str:
    place = f"{_file_of(name, where)}: {name}"
    share = f"{n_bad:,} of {tensor.numel():,} values"
    # infinite but no NaN: most likely a number that was too large for this precision, so the model itself is fine
    if tensor.dtype == torch.float16 and not tensor.isnan().any():
        return (
            f"{place} is infinite in half precision ({share}), which ends at {torch.finfo(torch.float16).max:,.0f}: "
            f"use the model {FULL_PRECISION}, or get weights that were made to fit; if it is infinite there too, the "
            "file is damaged"
        )
    return (
        f"{place} holds NaN or infinite numbers ({share}): the file is damaged, or its training went wrong; download "
        "it again, or take another"
    )


def _file_of(name: str, where: Path | str) -> Path | str:
    """Which of a folder's files has the tensor; the folder itself if none does under this name."""
    if not isinstance(where, Path) or not where.is_dir():
        return where
    for path in sorted(where.iterdir()):
        if path.suffix not in SUFFIXES:
            continue
        with contextlib.suppress(PriorError):
            keys = open_checkpoint(path).shapes
            # modules and files differ in what stands before a name, `text_model.` for one
            if any(key == name or key.endswith(f".{name}") or name.endswith(f".{key}") for key in keys):
                return path
    return where
