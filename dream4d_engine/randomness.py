"""Random numbers that don't depend on how many processes share the work.

Everything random is drawn on the CPU from one generator, row by row of a batch (a row: a camera group, or what
belongs to it). Where several processes each do a part of the batch, all of them draw the whole batch's numbers and
take their own rows: together they see what one process with the whole batch would see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SharedGenerator(torch.Generator):
    """A CPU generator of process `rank` of `count`, all of which were given the same seed."""

    rank: int = 0
    count: int = 1

    @classmethod
    def of(cls, rank: int, count: int) -> SharedGenerator:
        """Make one; its seed is still to be set."""
        generator = cls()
        generator.rank, generator.count = rank, count
        return generator


def share_of(generator: torch.Generator) -> tuple[int, int]:
    """(rank, count) of a generator; (0, 1) of a plain one."""
    return getattr(generator, "rank", 0), getattr(generator, "count", 1)


def own_rows(whole: Tensor, generator: torch.Generator) -> Tensor:
    """The rows of this process, of a draw for all of them."""
    rank, count = share_of(generator)
    n = len(whole) // count
    return whole[rank * n : (rank + 1) * n]


def draw_rows(draw: Callable[..., Tensor], shape: tuple[int, ...], generator: torch.Generator, **given) -> Tensor:
    """Draw [n, ...] (torch.rand, torch.randn) for this process's n rows of the batch."""
    whole = (shape[0] * share_of(generator)[1], *shape[1:])
    return own_rows(draw(whole, generator=generator, **given), generator)


@contextmanager
def same_for_all(generator: torch.Generator) -> Iterator[None]:
    """Inside, every process draws the same: for what is no part of the batch."""
    rank, count = share_of(generator)
    if count == 1:
        yield
        return
    generator.rank, generator.count = 0, 1
    try:
        yield
    finally:
        generator.rank, generator.count = rank, count
