"""Several processes, a GPU each, that train one scene together.

Started by torchrun. Every process holds the whole scene; each renders and distils its own camera groups, whose random
numbers are those of their places in the whole batch (see randomness.py), and the gradients are averaged. So N processes
with a recipe compute what one process computes with N times the recipe's camera groups, within rounding. Process 0
alone writes files and speaks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Processes:
    """The processes of a run."""

    rank: int = 0  # this one's number
    world_size: int = 1  # how many there are
    words: ProcessGroup | None = None  # for short messages between the CPUs, so that no GPU has to be waited for

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace the tensors by their means over the processes, in place, all in one message."""
        if self.world_size == 1:
            return
        tensors = list(tensors)
        flat = torch.cat([t.reshape(-1).float() for t in tensors])  # in fp32: a sum may be too large for half precision
        torch.distributed.all_reduce(flat)
        flat /= self.world_size
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, wish: bool) -> bool:
        """Whether some process wishes so."""
        if self.world_size == 1:
            return wish
        word = torch.tensor(int(wish))
        torch.distributed.all_reduce(word, torch.distributed.ReduceOp.MAX, group=self.words)
        return bool(word)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            torch.distributed.barrier(group=self.words)


SINGLE = Processes()


def is_launched() -> bool:
    """Whether torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join_processes(device: torch.device) -> tuple[Processes, torch.device]:
    """Meet the other processes that torchrun started; return the processes and this process's device."""
    if not is_launched():
        return SINGLE, device
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"there are {torch.cuda.device_count()} GPUs for more processes: "
                "start as many with torchrun --nproc-per-node, or take --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)  # NCCL works on the current one
    elif device.type != "cpu":
        raise ValueError(f"several processes can share cuda or cpu, not {device.type}: start one process")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    words = torch.distributed.new_group(backend="gloo")
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), words), device


def leave_processes() -> None:
    """Say goodbye, if there are others."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
