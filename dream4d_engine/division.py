"""The work of one step divided among processes: each does a part, and then all have the whole.

Parts are runs of consecutive rows. What a process did itself carries its gradient, what it was given carries none. So
where all compute the same loss of the whole, the sum of their gradients is the gradient of one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


class ProcessLost(RuntimeError):
    """Another process of the run is gone, or can't be reached any more."""


@contextmanager
def together() -> Iterator[None]:
    """Do inside what needs all processes; ProcessLost where one of them doesn't answer."""
    try:
        yield
    except torch.OutOfMemoryError:  # one's own affair
        raise
    except RuntimeError as error:  # gloo's; NCCL's are torch.distributed's own, which derive from it
        raise ProcessLost(
            f"another of the {torch.distributed.get_world_size()} processes is gone, or can't be reached any more "
            "(what it said last tells why)"
        ) from error


@dataclass(frozen=True)
class Division:
    """Among how many processes a step is divided, and which of them this is."""

    rank: int = 0
    size: int = 1
    rehearsed: bool = False  # nothing is exchanged, and what the others would have given is 0

    def rehearsal(self) -> Division:
        """The same without the others, as the first of them, who has most to do: right in memory, wrong in numbers."""
        return Division(0, self.size, rehearsed=True)

    def counts(self, n: int, rows: int = 1) -> tuple[int, ...]:
        """How many rows of n things of `rows` rows each every process has, as evenly as can be.

        Whole things where there is one for everybody, else rows.
        """
        if n < self.size:
            n, rows = n * rows, 1
        return tuple(rows * (n // self.size + (rank < n % self.size)) for rank in range(self.size))

    def own(self, counts: Sequence[int]) -> slice:
        """Which rows are this process's."""
        start = sum(counts[: self.rank])
        return slice(start, start + counts[self.rank])

    def gather(self, mine: Tensor, counts: Sequence[int]) -> Tensor:
        """Put the rows of all processes together, [sum of counts, ...]; the gradient on one's own comes back to them.

        All call it in the same order, with rows of one shape and type.
        """
        return mine if self.size == 1 else _Gathered.apply(mine, self, tuple(counts))

    def once(self, value: Tensor) -> Tensor:
        """A value that every process computes for itself, whose gradient is to be counted once among them all."""
        return value if self.size == 1 else value.detach() + (value - value.detach()) / self.size


WHOLE = Division()
"""Of one process."""


class _Gathered(torch.autograd.Function):
    """Rows of all processes; backward: what falls to one's own."""

    @staticmethod
    def forward(ctx, mine: Tensor, division: Division, counts: tuple[int, ...]) -> Tensor:
        ctx.own = division.own(counts)
        if division.rehearsed:
            whole = mine.new_zeros(sum(counts), *mine.shape[1:])
            whole[ctx.own] = mine
            return whole
        most = max(counts)  # everybody sends as much
        if len(mine) < most:
            mine = torch.cat((mine, mine.new_zeros(most - len(mine), *mine.shape[1:])))
        whole = mine.new_empty(division.size * most, *mine.shape[1:])
        sent = list(whole.split(most))
        with together():
            torch.distributed.all_gather(sent, mine.contiguous())
        if min(counts) == most:
            return whole
        return torch.cat([rows[:count] for rows, count in zip(sent, counts, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad[ctx.own], None, None
