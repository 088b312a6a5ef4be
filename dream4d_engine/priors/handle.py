"""Diffusion models as live things: a handle can be kept, compared and sent around; what it loads guides a run.

Where a model comes from (files, a graph of nodes) is the handle's own business; the rest of the program sees these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..cameras import CameraBatch, Orbit
from ..guidance.distillation import DistillationConfig, Guidance
from .networks.execution import Runtime

PriorKind = Literal["image", "multiview", "novel_view", "pixel", "video"]
Device = torch.device | str


@dataclass(frozen=True)
class ReferenceView:
    """What a model of novel views is told instead of words."""

    image: Tensor  # [3, H, W] in [0, 1]
    camera: CameraBatch  # [1, 1], what saw it


class Guide(Protocol):
    """Tells a prior what to look for."""

    def __call__(
        self, prompt: str, negative: str | None, config: DistillationConfig, reference: ReferenceView | None = None
    ) -> Guidance:
        """Return its guidance by the words, or by the reference where it reads none.

        `negative`: what not to make; None for the prior's own words, else the recipes' usual ones. PriorError where it
        doesn't know a word, or lacks the reference.
        """
        ...


@dataclass(frozen=True, eq=False)
class Prior:
    """A frozen diffusion model in memory. Who loads it releases it."""

    name: str
    kind: PriorKind  # how it is conditioned
    guide: Guide
    negative_prompt: str | None = None  # where nobody asks for other words; None: the recipes' usual ones
    networks: tuple[nn.Module, ...] = ()  # to be moved as one by who manages memory; none where they see to it
    release: Callable[[], None] = lambda: None  # gives back what is held beside the networks


@runtime_checkable
class PriorHandle(Protocol):
    """A diffusion model that can be had; light, and safe to keep."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> PriorKind: ...

    @property
    def n_frames(self) -> int | None:
        """Of the takes that it must have; None where the recipe may choose."""

    @property
    def most_frames(self) -> int | None:
        """Of a take that it can see at once; None where there is no such bound."""

    @property
    def frame_step(self) -> int:
        """Frames that its autoencoder puts into one, after the first."""

    @property
    def orbit(self) -> Orbit | None:
        """Of a model of novel views: the orbits that it sees whole, around the reference's place; None: single views.

        A model of dynamic ones sees static ones, too.
        """

    def fingerprint(self) -> str:
        """Change when what `load` gives does."""
        ...

    def n_bytes(self) -> int:
        """Size of the weights."""
        ...

    def describe(self) -> str:
        """Where the model comes from and what was added to it, for a sentence about a fault."""
        ...

    def check_prompt(self, prompt: str) -> None:
        """Raise PriorError where the model can't be told this; before any work, so nothing large is loaded."""
        ...

    def load(self, runtime: Runtime) -> Prior:
        """Load it. PriorError with the file and the reason where that fails."""
        ...
