"""Small networks in one kernel each way: a sample's hidden layers never leave the multiprocessor.

In half precision only, that is under autocast, and on Hopper GPUs only: their matrix units take operands from shared
memory, while on others the weights would have to be held in registers, and spill. Everything else (other GPUs and
widths, more layers, full precision) is computed by `torch_kernels.mlp`. A network's shape is compared with it once, on
random numbers, before it is relied on.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..machine import must_be_able
from . import torch_kernels
from .launched import on_device, power_of_two, unobserved

logger = logging.getLogger(__name__)

_WIDTHS = (16, 32, 64, 128)
_MAX_LAYERS = 4
_MAX_ENDS = 128
"""Inputs and outputs at most."""
_TILE = 128
_HOPPER = 9
_TOLERANCE = 5e-3
"""Of the first comparison, as a share of the largest number: some times what rounding to float16 leaves."""

Shape = tuple[int, int, int, int]
"""(inputs, hidden width, hidden layers, outputs)."""


def mlp(x: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """Bias-free ReLU network; see `torch_kernels.mlp`. Under autocast to float16 the result is float32 all the same:
    sums are made in it."""
    if not _fits(x, layers):
        return torch_kernels.mlp(x, layers)
    shape = (layers[0].shape[1], layers[0].shape[0], len(layers) - 1, layers[-1].shape[0])
    try:
        trusted = _trusted(shape, x.device)
    except torch.OutOfMemoryError:  # no answer: it is tried again the next time
        trusted = False
    return fused_mlp(x, layers, shape) if trusted else torch_kernels.mlp(x, layers)


def fused_mlp(x: Tensor, layers: Sequence[Tensor], shape: Shape) -> Tensor:
    """[S, inputs] -> [S, outputs] float32, whatever the device and autocast are."""
    return _MLP.apply(x.half(), torch.cat([weight.reshape(-1) for weight in layers]), shape)


@lru_cache(maxsize=64)
def _trusted(shape: Shape, device: torch.device) -> bool:
    """Does the kernel run on the device and give what PyTorch gives, gradients included? If not, the log says why."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != _HOPPER:
        logger.info("networks are not fused on %s: that is for Hopper GPUs", device)
        return False
    try:
        # as many samples as let every program of the forward pass take three tiles
        error = first_error(shape, device, 3 * 4 * _multiprocessors(device) * _TILE + 5)
    except Exception as reason:  # whatever a compiler may raise
        must_be_able(reason, "fused networks")
        logger.warning("networks of %s are not fused on %s: %s: %s", shape, device, type(reason).__name__, reason)
        return False
    if not error < _TOLERANCE:  # NaN is no agreement either
        logger.warning("networks of %s are not fused on %s: they differ from PyTorch's by %.1e", shape, device, error)
        return False
    return True


def first_error(shape: Shape, device: torch.device, n_samples: int, seed: int = 0) -> float:
    """Largest difference from `torch_kernels.mlp` in float32, of outputs and gradients, as a share of their largest."""
    generator = torch.Generator().manual_seed(seed)
    n_inputs, width, n_layers, n_outputs = shape
    sizes = [n_inputs, *[width] * n_layers, n_outputs]
    worst = 0.0
    # First with positive weights and inputs, so that the hidden layers are linear: where a ReLU's input rounds across
    # 0, a correct gradient differs a lot. A second look at random signs covers the outputs with ReLUs that close.
    for signed in (False, True):
        draws = [torch.rand(o, i, generator=generator) / i for i, o in itertools.pairwise(sizes)]
        x, grad = (torch.rand(n_samples, n, generator=generator) for n in (n_inputs, n_outputs))
        if signed:
            draws, x = [(w - 0.5 / w.shape[1]) * w.shape[1] ** 0.5 * 4 for w in draws], x - 0.5
        found = []
        for function in (lambda x, w: fused_mlp(x, w, shape), torch_kernels.mlp):
            with torch.enable_grad(), torch.autocast(device.type, enabled=False), unobserved():
                leaves = [tensor.half().float().to(device).requires_grad_() for tensor in (x, *draws)]
                out = function(leaves[0], leaves[1:])
                gradients = torch.autograd.grad(out, leaves, grad.to(device))
            found.append([out.detach()] if signed else [out.detach(), *gradients])
        for ours, theirs in zip(*found, strict=True):
            worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    return worst


def _fits(x: Tensor, layers: Sequence[Tensor]) -> bool:
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) != torch.float16:
        return False
    *hidden, last = layers
    same = {weight.shape[0] for weight in hidden} | {weight.shape[1] for weight in layers[1:]}
    ends = max(layers[0].shape[1], last.shape[0])
    return len(same) == 1 and same <= set(_WIDTHS) and len(hidden) <= _MAX_LAYERS and ends <= _MAX_ENDS


class _MLP(torch.autograd.Function):
    """The backward pass computes the hidden layers again."""

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, shape: Shape) -> Tensor:
        from . import triton_mlp_source as source

        x = x.contiguous()
        ctx.save_for_backward(x, weights)
        ctx.shape = shape
        out = torch.empty(len(x), shape[3], dtype=torch.float32, device=x.device)
        if len(x):
            with on_device(x.device):
                source.mlp_forward[(_programs(len(x), x.device, 4),)](
                    x, weights, out, len(x), **_constants(shape), B=_TILE, num_warps=4
                )
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        from . import triton_mlp_source as source

        x, weights = ctx.saved_tensors
        wants_x, wants_weights = ctx.needs_input_grad[:2]
        if not len(x):
            return torch.zeros_like(x), torch.zeros_like(weights), None
        n_programs = _programs(len(x), x.device, 1 if wants_weights else 2)
        grad_x = torch.empty_like(x) if wants_x else None
        parts = weights.new_empty(n_programs, len(weights)) if wants_weights else None
        with on_device(x.device):
            source.mlp_backward[(n_programs,)](
                x, weights, grad.contiguous(), x if grad_x is None else grad_x, weights if parts is None else parts,
                len(x), len(weights), **_constants(ctx.shape), B=_TILE,
                WANTS_X=wants_x, WANTS_WEIGHTS=wants_weights, num_warps=8,
            )  # fmt: skip
        return grad_x, None if parts is None else parts.sum(0), None


def _constants(shape: Shape) -> dict:
    n_inputs, width, n_layers, n_outputs = shape
    return {
        "I": n_inputs,
        "IP": max(16, power_of_two(n_inputs)),
        "H": width,
        "N": n_layers,
        "O": n_outputs,
        "OP": max(16, power_of_two(n_outputs)),
    }


@lru_cache(maxsize=8)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _programs(n_samples: int, device: torch.device, each: int) -> int:
    """Programs, at most `each` for a multiprocessor."""
    return min(-(-n_samples // _TILE), each * _multiprocessors(device))
