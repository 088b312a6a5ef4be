"""Random numbers without state: what is drawn follows from who asks, for which step, and for what.

A step's numbers depend on its number alone, so a checkpoint holds no generator and the next step can be prepared ahead
of its time. A camera group's numbers depend on its place in the whole batch alone, so N processes with n groups each
draw what one process with N * n groups draws. Everything is drawn on the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Source = torch.Generator | Sequence[torch.Generator]
"""One generator for a whole batch, or one for each of its groups, in order."""


@dataclass(frozen=True)
class Draw:
    """The random numbers of one step."""

    seed: int  # of the run
    step: int = 0  # its number; 0 also for what is drawn before the first
    rank: int = 0  # of this process among those that share the batch, each with as many groups

    def for_(self, purpose: str, group: int | None = None) -> torch.Generator:
        """A generator for one purpose, and one group of the whole batch; None: the same one in every process."""
        name = f"{self.seed}/{self.step}/{purpose}/{'' if group is None else group}"
        # hashed, so that no two seeds, steps or purposes share a generator
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)  # 63 bits, as every system takes

    def groups(self, purpose: str, n: int) -> tuple[torch.Generator, ...]:
        """A generator for each of this process's n groups."""
        return tuple(self.for_(purpose, self.rank * n + i) for i in range(n))


def draw_rows(draw: Callable[..., Tensor], shape: tuple[int, ...], source: Source, **given) -> Tensor:
    """Draw [n, ...] (torch.rand, torch.randn); of several generators each draws as many of the n rows."""
    if isinstance(source, torch.Generator):
        return draw(shape, generator=source, **given)
    each = (shape[0] // len(source), *shape[1:])  # rows are in order of their groups
    return torch.cat([draw(each, generator=generator, **given) for generator in source])
