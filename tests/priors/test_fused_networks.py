"""The fused networks against PyTorch's, interpreted on a CPU: values, gradients, and when they are not used."""

from __future__ import annotations

import itertools
import secrets

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dream4d_engine.kernels import torch_kernels, triton_mlp

SHAPES = [(24, 64, 4, 3), (32, 64, 1, 1), (9, 16, 2, 3), (20, 32, 3, 2), (70, 32, 1, 20)]


def weights(shape: tuple[int, int, int, int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [shape[0], *[shape[1]] * shape[2], shape[3]]
    return [torch.randn(o, i, generator=generator) * i**-0.5 for i, o in itertools.pairwise(sizes)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_samples", [1, 128, 1500])
def test_fused_networks_equal_pytorch_in_values_and_gradients(shape, n_samples: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("networks are fused on Hopper GPUs only")
    # the only output of one sample may nearly cancel, and any rounding is a large share of it then: a seed without that
    seed = 0 if n_samples == 1 else secrets.randbits(31)
    assert triton_mlp.first_error(shape, device, n_samples, seed) < 5e-3


def test_on_other_devices_and_in_full_precision_the_networks_are_pytorchs() -> None:
    x, layers = torch.rand(5, 24), weights(SHAPES[0])
    assert torch.equal(triton_mlp.mlp(x, layers), torch_kernels.mlp(x, layers))
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(triton_mlp.mlp(x, layers), torch_kernels.mlp(x, layers))


@pytest.mark.parametrize("shape", [(24, 48, 1, 3), (24, 64, 5, 3), (200, 64, 1, 3), (24, 64, 0, 3)])
def test_shapes_that_do_not_fit_are_left_to_pytorch(shape: tuple[int, int, int, int]) -> None:
    with torch.autocast("cpu", torch.float16):
        assert not triton_mlp._fits(torch.rand(2, shape[0]), weights(shape))
        assert triton_mlp._fits(torch.rand(2, 24), weights(SHAPES[0]))


def test_a_first_comparison_within_a_checkpoint_leaves_it_alone(monkeypatch) -> None:
    shape, device = (9, 16, 2, 3), torch.device("cpu")
    monkeypatch.setattr(triton_mlp, "fused_mlp", lambda x, layers, shape: torch_kernels.mlp(x, layers))
    x, layers = torch.rand(5, 9), [weight.requires_grad_() for weight in weights(shape)]
    errors = []

    def draw(x: torch.Tensor) -> torch.Tensor:
        if not errors:
            errors.append(triton_mlp.first_error(shape, device, 64))
        return torch_kernels.mlp(x, layers)

    found = [
        torch.autograd.grad(out.square().sum(), layers)
        for out in (checkpoint(draw, x, use_reentrant=False), torch_kernels.mlp(x, layers))
    ]
    assert errors == [0.0]
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_kernel_that_fails_or_differs_is_passed_over_with_its_reason(monkeypatch, caplog) -> None:
    device, shape = torch.device("cuda", 0), (24, 64, 4, 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_mlp, "_multiprocessors", lambda device: 2)

    def broken(*_):
        raise RuntimeError("no such instruction")

    for found, said in ((broken, "no such instruction"), (lambda *_: 0.5, "5.0e-01"), (lambda *_: float("nan"), "nan")):
        triton_mlp._trusted.cache_clear()
        monkeypatch.setattr(triton_mlp, "first_error", found)
        assert not triton_mlp._trusted(shape, device)
        assert said in caplog.text
    triton_mlp._trusted.cache_clear()
    monkeypatch.setattr(triton_mlp, "first_error", lambda *_: 1e-3)
    assert triton_mlp._trusted(shape, device)
    triton_mlp._trusted.cache_clear()


def test_a_full_card_is_no_answer(monkeypatch) -> None:
    """Then PyTorch's own has the network this time, and the kernel is tried again the next time."""
    shape = (5, 16, 1, 3)
    layers, x, asked = weights(shape), torch.randn(7, 5), []
    monkeypatch.setattr(triton_mlp, "_fits", lambda *_: True)
    monkeypatch.setattr(triton_mlp, "fused_mlp", lambda x, layers, shape: torch_kernels.mlp(x, layers) + 1)

    full = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA driver: out of memory (2)")]

    def first_error(*_) -> float:
        asked.append(None)
        if full:
            raise full.pop()
        return 0.0

    monkeypatch.setattr(triton_mlp, "first_error", first_error)
    monkeypatch.setattr(triton_mlp, "_multiprocessors", lambda device: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    on_a_card = triton_mlp._trusted

    def trusted(shape, device):
        return on_a_card(shape, torch.device("cuda", 0))

    monkeypatch.setattr(triton_mlp, "_trusted", trusted)
    on_a_card.cache_clear()
    plain = torch_kernels.mlp(x, layers)
    differences = [float((triton_mlp.mlp(x, layers) - plain).mean()) for _ in range(4)]
    on_a_card.cache_clear()
    assert differences == pytest.approx([0, 0, 1, 1], abs=1e-6) and len(asked) == 3
