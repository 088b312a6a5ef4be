"""The terms of the loss beside distillation, by their properties."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dream4d_engine.supervision import losses


def image(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SHAPE = (2, 3, 8, 6, 1)


@given(st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_entropy_is_largest_at_one_half(opacity: float) -> None:
    entropy = losses.opacity_entropy(torch.full(SHAPE, opacity, dtype=torch.float64))
    assert 0 < entropy <= math.log(2) + 1e-12
    assert losses.opacity_entropy(torch.full(SHAPE, 0.5)).item() == pytest.approx(math.log(2))
    assert entropy.item() == pytest.approx(losses.opacity_entropy(torch.full(SHAPE, 1 - opacity)).item(), abs=1e-5)


def test_entropy_has_finite_gradient_at_the_ends() -> None:
    opacity = torch.tensor([0.0, 1.0, 0.5]).requires_grad_()
    losses.opacity_entropy(opacity).backward()
    assert opacity.grad.isfinite().all()


def test_sparsity() -> None:
    assert losses.opacity_sparsity(torch.zeros(SHAPE)).item() == pytest.approx(0.1)
    assert losses.opacity_sparsity(torch.ones(SHAPE)).item() == pytest.approx(math.sqrt(1.01))


def test_orientation_counts_only_what_faces_away() -> None:
    directions = torch.tensor([[0.0, 0.0, -1.0]]).expand(4, 3)
    towards, away = -directions, directions
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4]).requires_grad_()
    assert losses.orientation(weights, towards, directions) == 0
    assert losses.orientation(weights, away, directions, n_rays=2).item() == pytest.approx(0.5)
    sideways = torch.tensor([[1.0, 0.0, 0.0]]).expand(4, 3).clone().requires_grad_()
    loss = losses.orientation(weights, away + sideways, directions)
    loss.backward()
    assert weights.grad is None
    pixels = losses.orientation(
        torch.ones(1, 1, 2, 2, 1), away.reshape(1, 1, 2, 2, 3), directions.reshape(1, 1, 2, 2, 3)
    )
    assert pixels.item() == pytest.approx(1.0)


def test_z_variance_sees_opaque_pixels_only() -> None:
    opacity = torch.tensor([0.9, 0.1])
    assert losses.z_variance(torch.tensor([2.0, 50.0]), opacity).item() == pytest.approx(2.0)
    assert losses.z_variance(torch.tensor([2.0, 50.0]), 0 * opacity) == 0


def test_smoothness_of_constants_is_0() -> None:
    normals = torch.tensor([0.0, 0.6, 0.8]).expand(2, 3, 5, 4, 3)
    assert losses.normal_smoothness_2d(normals) == 0
    assert losses.normal_smoothness_2d(image(0, 2, 3, 5, 4, 3)) > 0
    assert losses.normal_smoothness_3d(normals, normals) == 0
    assert losses.normal_smoothness_3d(normals, normals + 0.5).item() == pytest.approx(0.5)


def test_total_variation() -> None:
    assert losses.displacement_tv(torch.full((2, 4, 5, 6, 3), 0.3)) == 0
    step = torch.zeros(2, 4, 5, 6, 3)
    step[0, 2:, ..., 0] = 2.0  # one group jumps once in time: 5 * 6 pixels, squared difference 4, 2 groups
    assert losses.displacement_tv(step).item() == pytest.approx(5 * 6 * 4 / 2)
    corner = torch.zeros(1, 3, 3, 3, 3)
    corner[0, 1, 1, 1, 1] = 1.0  # two differences along each of frames, rows and columns
    assert losses.displacement_tv(corner).item() == pytest.approx(6.0)


def test_reference_image() -> None:
    rgb, mask, background = image(0, 1, 1, 4, 4, 3), (image(1, 1, 1, 4, 4, 1) > 0.5).double(), torch.tensor(0.25)
    background = background.expand_as(rgb)
    same = SimpleNamespace(rgb=torch.where(mask > 0, rgb, background), background=background)
    assert losses.reference_rgb(same, rgb, mask) == 0
    other = SimpleNamespace(rgb=same.rgb + 0.1, background=background)
    assert losses.reference_rgb(other, rgb, mask).item() == pytest.approx(0.01)
    assert losses.reference_mask(mask, mask) == 0
    assert losses.reference_mask(1 - mask, mask).item() == pytest.approx(1.0)


@given(st.floats(0.1, 20), st.floats(-5, 5))
@settings(max_examples=30, deadline=None)
def test_depth_does_not_depend_on_the_references_scale_and_shift(scale: float, shift: float) -> None:
    rendered, reference = image(0, *SHAPE), image(1, *SHAPE)
    mask = (image(2, *SHAPE) > 0.3).double()
    expected = losses.depth(rendered, reference, mask)
    assert losses.depth(rendered, scale * reference + shift, mask).item() == pytest.approx(expected.item(), rel=1e-6)
    assert losses.depth(rendered, scale * rendered + shift, mask).item() == pytest.approx(0.0, abs=1e-10)
    expected = losses.relative_depth(rendered, reference, mask)
    moved = losses.relative_depth(scale * rendered + 1, scale * reference + shift, mask)
    assert moved.item() == pytest.approx(expected.item(), rel=1e-5)


def test_depth_is_the_least_squares_residual_with_the_right_gradient() -> None:
    rendered, reference = image(0, 1, 1, 6, 5, 1).requires_grad_(), image(1, 1, 1, 6, 5, 1)
    mask = (image(2, 1, 1, 6, 5, 1) > 0.4).double()
    inside = mask[..., 0].bool()[0, 0]
    target = rendered.detach()[0, 0, ..., 0][inside]
    columns = torch.stack((reference[0, 0, ..., 0][inside], torch.ones_like(target)), -1)
    fitted = columns @ torch.linalg.lstsq(columns, target[:, None]).solution[:, 0]
    loss = losses.depth(rendered, reference, mask)
    assert loss.item() == pytest.approx((target - fitted).square().mean().item())
    loss.backward()
    torch.testing.assert_close(rendered.grad[0, 0, ..., 0][inside], 2 * (target - fitted) / target.numel())
    assert not rendered.grad[0, 0, ..., 0][~inside].any()


def test_relative_depth_bounds() -> None:
    rendered, mask = image(0, *SHAPE), torch.ones(SHAPE, dtype=torch.float64)
    assert losses.relative_depth(rendered, rendered, mask).item() == pytest.approx(0.0, abs=1e-5)
    assert losses.relative_depth(rendered, -rendered, mask).item() == pytest.approx(2.0, abs=1e-5)
    flat = torch.ones(SHAPE, dtype=torch.float64).requires_grad_()
    loss = losses.relative_depth(flat, rendered, mask)
    loss.backward()
    assert loss.item() == pytest.approx(1.0) and flat.grad.isfinite().all()


def test_normal() -> None:
    normals = torch.nn.functional.normalize(image(0, 1, 1, 4, 4, 3) - 0.5, dim=-1)
    mask = (image(1, 1, 1, 4, 4, 1) > 0.5).double()
    assert losses.normal(normals, 3 * normals, mask).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.normal(normals, -normals, mask).item() == pytest.approx(2.0, abs=1e-6)
    changed = torch.where(mask > 0, normals, -normals)
    assert losses.normal(normals, changed, mask).item() == pytest.approx(0.0, abs=1e-6)


def test_rigidity_is_the_squared_strain_and_its_gradient() -> None:
    before = image(3, 7, 3) - 0.5
    assert losses.rigidity(before.flip(-1), before).item() == pytest.approx(0, abs=1e-12)  # turned over: as long
    apart = (1.3 * before).requires_grad_()
    loss = losses.rigidity(apart, before)
    assert loss.item() == pytest.approx(0.09)
    loss.backward()
    length = before.norm(dim=-1, keepdim=True)
    # d/da (|a|/|b| - 1)^2 = 2 (|a|/|b| - 1) a / (|a| |b|), mean over the pairs
    assert torch.allclose(apart.grad, 2 * 0.3 * before / length / length / 7)
    together = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    losses.rigidity(together, before[:2]).backward()
    assert together.grad.isfinite().all()
    assert losses.rigidity(apart[:0], before[:0]) == 0
