"""What is seen where the scene is transparent: a learned colour of the direction, or one solid colour."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import Kernels
from .encodings import require_range, spherical_harmonics
from .mlp import MLP


@dataclass(frozen=True)
class BackgroundConfig:
    """Spherical harmonics of the direction through a network, or one colour."""

    degree: int = 3  # of the harmonics, of which there are degree^2
    hidden_width: int = 16
    hidden_layers: int = 2
    color: tuple[float, float, float] | None = None  # red, green, blue in [0, 1]; then nothing is learned

    def __post_init__(self) -> None:
        if self.degree != 3:
            raise ValueError(f"the background's spherical harmonics have degree 3, got {self.degree}")
        require_range("hidden_width", self.hidden_width, 1, 1024)
        require_range("hidden_layers", self.hidden_layers, 0, 16)
        for value in self.color or ():
            require_range("color", value, 0.0, 1.0)


class Background(nn.Module):
    """Directions to colours in [0, 1]."""

    solid: Tensor  # [3], only where the configuration names a colour

    def __init__(self, config: BackgroundConfig) -> None:
        super().__init__()
        self.config = config
        if config.color is None:
            self.mlp = MLP(config.degree**2, 3, config.hidden_width, config.hidden_layers)
        else:  # no part of an asset; a buffer, so that it is on the device before it is needed
            self.register_buffer("solid", torch.tensor(config.color), persistent=False)

    def reset(self, generator: torch.Generator) -> None:
        """Start afresh."""
        if self.config.color is None:
            self.mlp.reset(generator)

    def forward(self, directions: Tensor, kernels: Kernels | None = None) -> Tensor:
        """Unit directions [N, 3] -> rgb [N, 3]."""
        if self.config.color is None:
            return torch.sigmoid(self.mlp(spherical_harmonics(directions), kernels).float())
        return self.solid.to(directions.dtype).expand(directions.shape)
