"""Small networks by PyTorch's matrix products, with little memory: for GPUs where no kernel has them in one piece.

Under autocast samples go through the network in pieces whose hidden layers stay in the cache, and the backward pass
computes these again: of a network only its inputs are kept. In full precision it is `torch_kernels.mlp`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import torch_kernels

_PIECE = 2**24
"""Numbers of a hidden layer of a piece: 32 MiB."""


def mlp(x: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """Bias-free ReLU network; see `torch_kernels.mlp`. Weights get their gradient in float32."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or len(layers) < 2:
        return torch_kernels.mlp(x, layers)
    return _MLP.apply(x.to(torch.get_autocast_dtype(kind)), *layers)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *layers: Tensor) -> Tensor:
        ctx.save_for_backward(x, *layers)
        weights, n_outputs = _in_type_of(x, layers), len(layers[-1])
        out = x.new_empty(len(x), n_outputs)
        for part in _pieces(x, weights):
            out[part] = (_hidden(x[part], weights)[-1] @ weights[-1].t())[:, :n_outputs]
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, *layers = ctx.saved_tensors
        weights = _in_type_of(x, layers)
        grad = F.pad(grad.to(x.dtype), (0, len(weights[-1]) - grad.shape[1]))
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        for part in _pieces(x, weights):
            inputs, along = _hidden(x[part], weights), grad[part]
            for k in reversed(range(len(weights))):
                if ctx.needs_input_grad[k + 1]:
                    sums[k] += along.t() @ inputs[k]
                if k:  # past the ReLU whose result this layer's inputs are
                    along = torch.ops.aten.threshold_backward(along @ weights[k], inputs[k], 0)
                elif grad_x is not None:
                    grad_x[part] = along @ weights[0]
        sums[-1] = sums[-1][: len(layers[-1])]
        return grad_x, *(total.to(layer.dtype) for total, layer in zip(sums, layers, strict=True))


def _pieces(x: Tensor, weights: Sequence[Tensor]) -> Iterator[slice]:
    """Rows of x that go through the network together."""
    rows = max(1, _PIECE // len(weights[0]))
    return (slice(start, start + rows) for start in range(0, len(x), rows))


def _in_type_of(x: Tensor, layers: Sequence[Tensor]) -> list[Tensor]:
    """The weights as the products take them: in the inputs' type, outputs filled up to whole pieces of memory."""
    *hidden, last = (layer.to(x.dtype) for layer in layers)
    return [*hidden, F.pad(last, (0, 0, 0, -len(last) % 8))]


def _hidden(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """What goes into each layer."""
    inputs = [x]
    for weight in weights[:-1]:
        inputs.append((inputs[-1] @ weight.t()).relu_())
    return inputs
