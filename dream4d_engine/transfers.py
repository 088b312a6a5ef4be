"""Numbers on their way to a GPU and back, without the CPU waiting for what else the GPU has to do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Bring a tensor to a device without waiting for the device to be done with earlier work."""
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)  # from other memory the copy would wait
    return tensor.to(device)


@dataclass(frozen=True)
class Fetched:
    """A device's numbers on their way to the CPU; `read` waits for the device where they aren't there yet."""

    values: Tensor  # [n], on the CPU; on their way there until `ready`
    ready: torch.cuda.Event | None = None  # None: they are there

    def read(self) -> list[float]:
        """The numbers."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.values.tolist()


def fetch(values: Tensor) -> Fetched:
    """Begin to bring a tensor [n] to the CPU, after the work that its device has been given so far."""
    if values.device.type != "cuda":
        return Fetched(values)
    held = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return Fetched(held, ready)
