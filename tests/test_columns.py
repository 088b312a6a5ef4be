"""Columns side by side are what torch's own concatenation makes of them, with its gradients."""

from __future__ import annotations

import pytest
import torch

from dream4d_engine.columns import _Apart, _SideBySide, apart, side_by_side

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: columns lie on a CPU alone")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_columns_and_their_gradients(device: str, n: int) -> None:
    columns = [torch.randn(n, k, device=device, requires_grad=k != 2) for k in (3, 1, 2)]
    expected = torch.cat(columns, -1)
    pull = torch.randn_like(expected)
    wanted = [column for column in columns if column.requires_grad]
    gradients = torch.autograd.grad(expected, wanted, pull)
    for made in (side_by_side(*columns), _SideBySide.apply(*columns)):
        assert torch.equal(made, expected) and made.is_contiguous()
        for ours, theirs in zip(torch.autograd.grad(made, wanted, pull), gradients, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_columns_apart_and_their_gradient(device: str, n: int) -> None:
    whole, widths = torch.randn(n, 6, device=device, requires_grad=True), (3, 1, 2)
    pulls = [torch.randn(n, k, device=device) for k in widths]
    for parts in (apart(whole, widths), _Apart.apply(whole, widths)):
        assert torch.equal(torch.cat(parts, -1), whole)
        assert torch.equal(torch.autograd.grad(parts, whole, pulls)[0], torch.cat(pulls, -1))
        assert torch.equal(torch.autograd.grad(parts[1], whole, pulls[1])[0][:, 3:4], pulls[1]) or n == 0


def test_columns_of_several_types_are_promoted() -> None:
    whole, half = torch.ones(2, 3), torch.ones(2, 1, dtype=torch.float16)
    assert side_by_side(half, whole).dtype == torch.float32
