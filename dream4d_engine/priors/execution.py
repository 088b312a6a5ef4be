"""How a frozen model's networks are run: how much at once, where the weights wait, what is compiled.

None of it changes what is computed, only how much memory it takes and how long. `LADDER` lists the ways from the
fastest to the one that needs least memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Execution:
    """How to run a denoiser.

    Args:
        pictures_at_once: that go through the VAE together; None for all.
        pictures_kept: of those encoded for a gradient, how many keep what the backward pass needs; None for all. The
            others are encoded without it and once more in the backward pass: one forward pass more for them.
        groups_at_once: that go through the UNet together, each condition's counted; None for all.
        offload: the UNet's weights wait in main memory and come block by block.
    """

    pictures_at_once: int | None = None
    pictures_kept: int | None = None
    groups_at_once: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        for name, least in (("pictures_at_once", 1), ("pictures_kept", 0), ("groups_at_once", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    def describe(self) -> str:
        """The plan in words."""
        if self == Execution():
            return "everything at once"
        parts = []
        if self.pictures_at_once is not None:
            parts.append(f"{self.pictures_at_once} pictures at once")
        if self.pictures_kept is not None:
            kept = f"all but {self.pictures_kept}" if self.pictures_kept else "all"
            parts.append(f"{kept} encoded twice")
        if self.groups_at_once is not None:
            parts.append(f"{self.groups_at_once} group of the UNet at once")
        if self.offload:
            parts.append("UNet weights in main memory")
        return ", ".join(parts)


LADDER = (
    Execution(pictures_at_once=8),
    Execution(pictures_at_once=8, pictures_kept=16),
    Execution(pictures_at_once=8, pictures_kept=8),
    Execution(pictures_at_once=4, pictures_kept=4),
    Execution(pictures_at_once=2, pictures_kept=0),
    Execution(pictures_at_once=1, pictures_kept=0, groups_at_once=1),
    Execution(pictures_at_once=1, pictures_kept=0, groups_at_once=1, offload=True),
)


class _EncodedTwice(torch.autograd.Function):
    """Apply a network keeping only its input; the backward pass applies it once more, with gradient."""

    @staticmethod
    def forward(ctx, network: Network, pictures: Tensor) -> Tensor:
        ctx.network = network
        ctx.save_for_backward(pictures)
        return network(pictures)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (pictures,) = ctx.saved_tensors
        with torch.enable_grad():
            again = pictures.detach().requires_grad_()
            (found,) = torch.autograd.grad(ctx.network(again), again, grad)
        return None, found


def in_slices(network: Network, pictures: Tensor, execution: Execution) -> Tensor:
    """Apply a network to pictures [n, ...], slice by slice; the result and its gradient are those of one pass."""
    at_once, kept = execution.pictures_at_once or len(pictures), execution.pictures_kept
    if not (torch.is_grad_enabled() and pictures.requires_grad) or kept is None or kept >= len(pictures):
        parts = pictures.split(at_once)
        return network(pictures) if len(parts) == 1 else torch.cat([network(part) for part in parts])
    n_twice = len(pictures) - kept
    # those to be kept come last: the backward pass begins with them, and their memory is free for the others
    parts = [_EncodedTwice.apply(network, part) for part in pictures[:n_twice].split(at_once)]
    parts += [network(part) for part in pictures[n_twice:].split(at_once) if len(part)]
    return torch.cat(parts)


# --- weights in main memory --------------------------------------------------------------------------------------


class Offload:
    """Keeps a network's weights in (pinned) main memory and brings each part to the device for its forward pass.

    Parts are the children with weights, of the lists among them each member. No gradient for the weights.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.device, self._home = device, {}
        for tensor in (*network.parameters(), *network.buffers()):
            held = tensor.detach().to("cpu", copy=True)
            self._home[tensor] = held.pin_memory() if device.type == "cuda" else held
            tensor.data = self._home[tensor]
        for part in _parts(network):
            part.register_forward_pre_hook(self._bring, prepend=True)
            part.register_forward_hook(self._leave)

    def _bring(self, part: nn.Module, _inputs) -> None:
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = self._home[tensor].to(self.device, non_blocking=True)

    def _leave(self, part: nn.Module, _inputs, _output) -> None:
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = self._home[tensor]


def _parts(network: nn.Module) -> Iterator[nn.Module]:
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            for member in child:
                # a block's own lists (resnets, attentions) where it has them: a block can be half of a network
                yield from _parts(member) if any(isinstance(c, nn.ModuleList) for c in member.children()) else (member,)
        elif any(isinstance(c, nn.ModuleList) for c in child.children()) and not list(child.parameters(recurse=False)):
            yield from _parts(child)
        elif next(child.parameters(), None) is not None:
            yield child


# --- compiling ---------------------------------------------------------------------------------------------------


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Frozen networks run in their own precision: autocast would turn their norms to float32 and back."""
    with torch.autocast(device.type, enabled=False):
        yield
