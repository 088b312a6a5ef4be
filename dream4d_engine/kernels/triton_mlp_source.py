"""The device code of the fused networks; `triton_mlp` holds the functions around it. Imports triton at its top.

Letters: I inputs, H hidden width, N hidden layers (1 to 4), O outputs; IP and OP are I and O padded to what the matrix
units take. The weights lie behind each other in one float32 vector: [H, I], N - 1 times [H, H], [O, H]. Activations
are float16 and stay in registers, sums are float32. A program takes every so many-th tile of B samples, so that it
reads the weights once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _weights(ptr, n_out: tl.constexpr, n_in: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr):
    """One layer's weights [OUT, IN]; zeros beyond its own [n_out, n_in]."""
    row, column = tl.arange(0, OUT)[:, None], tl.arange(0, IN)[None, :]
    there = (row < n_out) & (column < n_in)
    return tl.load(ptr + row * n_in + column, mask=there, other=0.0).to(tl.float16)


@triton.jit
def _layer(x, weights):
    return tl.maximum(tl.dot(x, tl.trans(weights)), 0.0).to(tl.float16)


@triton.jit
def _through(grad, weights, hidden):
    """A gradient back through a layer to the ReLU before it, whose outputs are `hidden`."""
    return tl.where(hidden > 0, tl.dot(grad, weights), 0.0).to(tl.float16)


@triton.jit
def _tile(ptr, rows, n_samples, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)[None, :]
    there = (rows < n_samples)[:, None] & (column < WIDTH)
    return tl.load(ptr + rows[:, None] * WIDTH + column, mask=there, other=0.0).to(tl.float16)


@triton.jit(do_not_specialize=["n_samples"])
def mlp_forward(
    x_ptr,
    weights_ptr,
    out_ptr,
    n_samples,
    I: tl.constexpr,  # noqa: E741
    IP: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    OP: tl.constexpr,
    B: tl.constexpr,
):
    """x [S, I] float16 -> out [S, O] float32."""
    first = _weights(weights_ptr, H, I, H, IP)
    inner = weights_ptr + H * I
    if N > 1:
        second = _weights(inner, H, H, H, H)
    if N > 2:
        third = _weights(inner + H * H, H, H, H, H)
    if N > 3:
        fourth = _weights(inner + 2 * H * H, H, H, H, H)
    last = _weights(inner + (N - 1) * H * H, O, H, OP, H)
    column = tl.arange(0, OP)[None, :]
    tile = tl.program_id(0)
    while tile * B < n_samples:
        rows = tile.to(tl.int64) * B + tl.arange(0, B)
        h = _layer(_tile(x_ptr, rows, n_samples, I, IP), first)
        if N > 1:
            h = _layer(h, second)
        if N > 2:
            h = _layer(h, third)
        if N > 3:
            h = _layer(h, fourth)
        out = tl.dot(h, tl.trans(last))
        tl.store(out_ptr + rows[:, None] * O + column, out, mask=(rows < n_samples)[:, None] & (column < O))
        tile += tl.num_programs(0)


@triton.jit
def _keep(ptr, sums, n_out: tl.constexpr, n_in: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr):
    row, column = tl.arange(0, OUT)[:, None], tl.arange(0, IN)[None, :]
    tl.store(ptr + row * n_in + column, sums, mask=(row < n_out) & (column < n_in))


@triton.jit(do_not_specialize=["n_samples"])
def mlp_backward(
    x_ptr,
    weights_ptr,
    grad_ptr,
    grad_x_ptr,
    parts_ptr,
    n_samples,
    n_weights,
    I: tl.constexpr,  # noqa: E741
    IP: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    OP: tl.constexpr,
    B: tl.constexpr,
    WANTS_X: tl.constexpr,
    WANTS_WEIGHTS: tl.constexpr,
):
    """The hidden layers are computed again. grad [S, O] float32 -> grad_x [S, I] float16 and parts [programs, weights]
    float32, what each program's samples give to the weights' gradient."""
    first = _weights(weights_ptr, H, I, H, IP)
    inner = weights_ptr + H * I
    if N > 1:
        second = _weights(inner, H, H, H, H)
        of_second = tl.zeros((H, H), tl.float32)
    if N > 2:
        third = _weights(inner + H * H, H, H, H, H)
        of_third = tl.zeros((H, H), tl.float32)
    if N > 3:
        fourth = _weights(inner + 2 * H * H, H, H, H, H)
        of_fourth = tl.zeros((H, H), tl.float32)
    last = _weights(inner + (N - 1) * H * H, O, H, OP, H)
    of_first, of_last = tl.zeros((H, IP), tl.float32), tl.zeros((OP, H), tl.float32)
    column = tl.arange(0, IP)[None, :]
    tile = tl.program_id(0)
    while tile * B < n_samples:
        rows = tile.to(tl.int64) * B + tl.arange(0, B)
        x = _tile(x_ptr, rows, n_samples, I, IP)
        h1 = _layer(x, first)
        top = h1
        if N > 1:
            h2 = _layer(h1, second)
            top = h2
        if N > 2:
            h3 = _layer(h2, third)
            top = h3
        if N > 3:
            h4 = _layer(h3, fourth)
            top = h4
        grad = _tile(grad_ptr, rows, n_samples, O, OP)
        if WANTS_WEIGHTS:
            of_last = tl.dot(tl.trans(grad), top, of_last)
        grad = _through(grad, last, top)
        if N > 3:
            if WANTS_WEIGHTS:
                of_fourth = tl.dot(tl.trans(grad), h3, of_fourth)
            grad = _through(grad, fourth, h3)
        if N > 2:
            if WANTS_WEIGHTS:
                of_third = tl.dot(tl.trans(grad), h2, of_third)
            grad = _through(grad, third, h2)
        if N > 1:
            if WANTS_WEIGHTS:
                of_second = tl.dot(tl.trans(grad), h1, of_second)
            grad = _through(grad, second, h1)
        if WANTS_WEIGHTS:
            of_first = tl.dot(tl.trans(grad), x, of_first)
        if WANTS_X:
            there = (rows < n_samples)[:, None] & (column < I)
            tl.store(grad_x_ptr + rows[:, None] * I + column, tl.dot(grad, first).to(tl.float16), mask=there)
        tile += tl.num_programs(0)
    if WANTS_WEIGHTS:
        part = parts_ptr + tl.program_id(0) * n_weights
        _keep(part, of_first, H, I, H, IP)
        if N > 1:
            _keep(part + H * I, of_second, H, H, H, H)
        if N > 2:
            _keep(part + H * I + H * H, of_third, H, H, H, H)
        if N > 3:
            _keep(part + H * I + 2 * H * H, of_fourth, H, H, H, H)
        _keep(part + H * I + (N - 1) * H * H, of_last, O, H, OP, H)
