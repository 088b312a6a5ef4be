"""How much of a model's work is done at once: what is computed stays the same, memory and time change."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Execution:
    """How to run a denoiser; None for all of them."""

    images_at_once: int | None = None  # that go through the VAE together
    # Of those encoded for a gradient, how many keep what the backward pass needs. The others are encoded without it
    # and once more in the backward pass: one forward pass more for them.
    images_kept: int | None = None
    groups_at_once: int | None = None  # that go through the UNet together, each condition's counted
    offload: bool = False  # the UNet's weights wait in main memory and come block by block

    def __post_init__(self) -> None:
        for name, least in (("images_at_once", 1), ("images_kept", 0), ("groups_at_once", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    def describe(self) -> str:
        """The plan in words."""
        if self == Execution():
            return "everything at once"
        parts = []
        if self.images_at_once is not None:
            parts.append(f"{self.images_at_once} images at once")
        if self.images_kept is not None:
            kept = f"all but {self.images_kept}" if self.images_kept else "all"
            parts.append(f"{kept} checkpointed")
        if self.groups_at_once is not None:
            parts.append(f"{self.groups_at_once} group of the UNet at once")
        if self.offload:
            parts.append("UNet weights in main memory")
        return ", ".join(parts)
