"""Small bias-free ReLU networks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..columns import apart
from ..kernels import Kernels, torch_kernels

MOST_TOGETHER = 128
"""Hidden units, which the kernels have in one piece."""


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


def ask_together(x: Tensor, networks: Sequence[MLP], kernels: Kernels | None = None) -> tuple[Tensor, ...]:
    """[S, n_inputs] -> [S, n_outputs] of each network; on a GPU as one, where they are small and have one hidden layer.

    Then the inputs are read once, and get one gradient instead of a sum of several that are held at the same time. A
    CPU's cache has room for the smaller ones.
    """
    hidden = [network.layers[0] for network in networks]
    shallow = all(len(network.layers) == 2 for network in networks)
    if not x.is_cuda or not shallow or sum(len(weight) for weight in hidden) > MOST_TOGETHER:
        return tuple(network(x, kernels) for network in networks)
    whole = (kernels.mlp if kernels else torch_kernels.mlp)(x, together(networks))
    return apart(whole, [len(network.layers[1]) for network in networks])


def together(networks: Sequence[MLP]) -> tuple[Tensor, Tensor]:
    """The layers of networks of one hidden layer and the same inputs as those of one network."""
    hidden, outputs = (tuple(network.layers[k] for network in networks) for k in (0, 1))
    return torch.cat(hidden), torch.block_diag(*outputs)  # an output sees its own network's hidden units alone
