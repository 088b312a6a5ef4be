"""Several processes, a GPU each, that train one scene together.

Started by torchrun. Every process holds the whole scene. What they share is one of two things:

- the work: each does a part of every step of the recipe (see division.py), and the gradients are summed. So N processes
  compute what one computes, within rounding, sooner;
- cameras: each renders and distils camera groups of its own, whose random numbers are those of their places in the
  whole batch (see randomness.py), and the gradients are averaged. So N processes with a recipe compute what one process
  computes with N times the recipe's camera groups, within rounding.

Process 0 alone writes files and speaks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..division import WHOLE, Division, together

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Share = Literal["auto", "work", "cameras"]
"""What several processes share; auto: the work, where a step has an image for each of them."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run."""

    rank: int = 0  # this one's number
    world_size: int = 1  # how many there are
    words: ProcessGroup | None = None  # for short messages between the CPUs, so that no GPU has to be waited for
    division: Division = WHOLE  # of a step's work, where it is that which they share

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    @property
    def place(self) -> int:
        """Of this process's camera groups in the whole batch, see Draw."""
        return 0 if self.division.size > 1 else self.rank

    def sharing(self, share: Share, n_images: int) -> Processes:
        """The processes as they share the steps of a recipe, each of which looks at `n_images` images or more."""
        divided = share == "work" or (share == "auto" and n_images >= self.world_size)
        return replace(self, division=Division(self.rank, self.world_size) if divided else WHOLE)

    def describe(self, share: Share, n_images: int) -> str:
        """How they share the steps, in words."""
        if self.division.size > 1:
            return f"{self.world_size} processes do each step together"
        own = f"{self.world_size} processes, each with camera groups of its own"
        if share == "cameras":
            return own
        images = "1 image" if n_images == 1 else f"{n_images} images"
        return f"{own}: steps of {images} can't be divided among them (--share work divides what it can)"

    def combine(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Make the parameters' gradients those of all processes, and return those that there are."""
        if self.world_size > 1:
            # a part of the work may reach fewer parameters than the whole; what nothing reaches stays without
            reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
            with together():
                torch.distributed.all_reduce(reached, torch.distributed.ReduceOp.MAX, group=self.words)
            for parameter, somewhere in zip(parameters, reached.tolist(), strict=True):
                if somewhere and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.merge(gradients)
        return gradients

    def merge(self, tensors: Iterable[Tensor]) -> None:
        """Replace the tensors by their means over the processes, or by their sums where these do parts of one step.

        In place, all in one message.
        """
        tensors = list(tensors)
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1).float() for t in tensors])  # in fp32: a sum may be too large for half precision
        with together():
            torch.distributed.all_reduce(flat)
        if self.division.size == 1:
            flat /= self.world_size
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, wish: bool) -> bool:
        """Whether some process wishes so."""
        if self.world_size == 1:
            return wish
        word = torch.tensor(int(wish))
        with together():
            torch.distributed.all_reduce(word, torch.distributed.ReduceOp.MAX, group=self.words)
        return bool(word)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            with together():
                torch.distributed.barrier(group=self.words)


SINGLE = Processes()


def is_launched() -> bool:
    """Whether torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def speaks() -> bool:
    """Whether this process is the one that speaks, before it has met the others."""
    return os.environ.get("RANK", "0") == "0"


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
