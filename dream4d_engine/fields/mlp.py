"""Small bias-free ReLU networks."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ..kernels import Kernels, torch_kernels


class MLP(nn.Module):
    """`hidden_layers` ReLU layers of `hidden_width`, then a linear one; no biases, no output activation."""

    def __init__(self, n_inputs: int, n_outputs: int, hidden_width: int, hidden_layers: int) -> None:
        super().__init__()
        widths = [n_inputs, *[hidden_width] * hidden_layers, n_outputs]
        self.layers = nn.ParameterList(
            nn.Parameter(torch.zeros(n_out, n_in)) for n_in, n_out in itertools.pairwise(widths)
        )

    def reset(self, generator: torch.Generator) -> None:
        """Start afresh."""
        with torch.no_grad():
            for weight in self.layers:
                bound = weight.shape[1] ** -0.5  # 1 / sqrt(inputs): what nn.Linear starts from
                weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * bound)

    def forward(self, x: Tensor, kernels: Kernels | None = None) -> Tensor:
        """[S, n_inputs] -> [S, n_outputs]; without `kernels`, in plain PyTorch."""
        return (kernels.mlp if kernels else torch_kernels.mlp)(x, tuple(self.layers))
