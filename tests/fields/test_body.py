"""The motion of an object as a whole, against what can be written down."""

from __future__ import annotations

import math

import pytest
import torch

from dream4d_engine.fields.body import BodyMotion
from dream4d_engine.fields.deformation import DeformationConfig, DeformationField
from dream4d_engine.fields.encodings import HashGridConfig
from dream4d_engine.kernels import select_kernels

GRID = HashGridConfig(n_levels=3, log2_entries=8, base_resolution=2, growth=1.5)
KERNELS = select_kernels("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def undoubted(n_knots, loop=False):
    """One whose splines are shown as they are."""
    body = BodyMotion(n_knots, loop)
    body.doubt.zero_()
    return body


def body_of(*, turn=(0.0, 0.0, 0.0), along=(0.0, 0.0, 0.0), across=(0.0, 0.0, 0.0), shift=(0.0, 0.0, 0.0)):
    """One that is there at time 1, with nothing taken away of it."""
    body = undoubted(7)
    body.taken.zero_()
    with torch.no_grad():
        body.knots[4:] = torch.tensor([*turn, *along, *across, *shift])
    return body


def points_and_times():
    return torch.rand(20, 3, generator=generator(1)), torch.ones(20)


def test_it_starts_as_no_motion_with_a_gradient_to_every_number() -> None:
    body, u = BodyMotion(6), points_and_times()[0]
    times = torch.rand(20, generator=generator(2))
    came_from = body(u, times)
    torch.testing.assert_close(came_from, u, atol=1e-6, rtol=0)
    (came_from * torch.rand(20, 3, generator=generator(3))).sum().backward()
    assert body.knots.grad.isfinite().all() and (body.knots.grad != 0).all()


def test_its_turn_stretch_and_shift_are_those_of_the_formula() -> None:
    u, times = points_and_times()
    v = u - 0.5
    quarter = body_of(turn=(0.0, 0.0, math.pi / 2))(u, times) - 0.5
    torch.testing.assert_close(quarter, torch.stack((-v[:, 1], v[:, 0], v[:, 2]), -1), atol=1e-6, rtol=0)
    stretched = body_of(along=(0.5, 0.0, -0.25), across=(0.1, 0.0, 0.3))(u, times) - 0.5
    matrix = torch.tensor([[1.5, 0.1, 0.0], [0.1, 1.0, 0.3], [0.0, 0.3, 0.75]])
    torch.testing.assert_close(stretched, v @ matrix, atol=1e-6, rtol=0)
    shifted = body_of(shift=(0.2, -0.4, 1.0))(u, times)
    torch.testing.assert_close(shifted, u - torch.tensor([0.1, -0.2, 0.5]), atol=1e-6, rtol=0)
    axis = torch.tensor([0.3, -0.5, 0.7])
    turned = body_of(turn=axis.tolist())(u, times) - 0.5
    cross = torch.zeros(3, 3)
    cross[0, 1], cross[0, 2], cross[1, 2] = -axis[2], axis[1], -axis[0]
    torch.testing.assert_close(turned, v @ torch.matrix_exp(cross - cross.T).T, atol=1e-6, rtol=0)


def test_the_shift_is_undone_before_the_turn_and_the_stretch_comes_last() -> None:
    body = body_of(turn=(0.0, 0.0, math.pi / 2), along=(1.0, 0.0, 0.0), shift=(0.4, 0.0, 0.0))
    came_from = body(torch.tensor([[0.7, 0.8, 0.5]]), torch.ones(1))
    # what is 0.2 to the right went there: back in the middle, 0.3 ahead; turned it is at -0.3, stretched at -0.6
    torch.testing.assert_close(came_from, torch.tensor([[-0.1, 0.5, 0.5]]), atol=1e-6, rtol=0)


def test_half_of_a_turn_is_half_the_angle() -> None:
    u, times = points_and_times()
    whole, half = body_of(turn=(0.0, 0.8, 0.0)), body_of(turn=(0.0, 0.4, 0.0))
    torch.testing.assert_close(whole(u, times, 0.5), half(u, times))


@pytest.mark.parametrize("loop", [False, True])
def test_time_goes_smoothly_through_cubic_splines(loop) -> None:
    body = undoubted(7, loop)
    with torch.no_grad():
        body.knots.normal_(generator=generator(4))
    times = torch.linspace(0, 1, 4001, dtype=torch.float64)
    with torch.no_grad():
        values = body.double().at(times)
    second = values.diff(dim=0).diff(dim=0) * 4000**2
    assert second.diff(dim=0).abs().max() < 5, "no jump of the curvature (thousands), so none of slope and place"
    knots = body.knots.detach()
    at_knot, place = values[2000], 3
    if loop:
        at_knot, place = body.at(torch.tensor([3 / 7], dtype=torch.float64))[0].detach(), 3
    rest = (knots[-1] + 4 * knots[0] + knots[1]) / 6 if loop else (knots[0] + 4 * knots[1] + knots[2]) / 6
    there = (knots[place - 1] + 4 * knots[place] + knots[place + 1]) / 6
    torch.testing.assert_close(at_knot - values[0], there - rest)
    assert abs(values[0, 11]) < 1e-6, "at time 0 it is on its ground"
    assert (values[:-1, :11].mean(0).abs() < 0.01).all(), "over time it is nowhere else, and has no other shape"
    if loop:
        torch.testing.assert_close(values[0], values[-1])
        torch.testing.assert_close(values[1] - values[0], values[-1] - values[-2], atol=1e-4, rtol=0)


def test_a_curve_of_degree_three_is_met_exactly() -> None:
    body = undoubted(9)
    place = (torch.arange(9, dtype=torch.float64) - 1) / 6
    with torch.no_grad():  # the spline's coefficients of t^2: t_i^2 - h^2 / 3
        body.double().knots.copy_((place**2 - (1 / 6) ** 2 / 3)[:, None].expand(9, 12))
        times = torch.linspace(0, 1, 50, dtype=torch.float64)
        ways = body.at(times)
    torch.testing.assert_close(ways[:, 0] - ways[0, 0], times**2)
    torch.testing.assert_close(ways[:, 11], times**2)
    assert abs(ways[:, 0].mean()) < 0.01


def test_of_a_part_the_share_is_shown_that_its_size_deserves() -> None:
    """A turn of root mean square a is shown times a^2 / (a^2 + 0.25^2), whatever the other parts do."""
    times = torch.linspace(0, 1, 65)
    body, plain = BodyMotion(11, loop=True), undoubted(11, loop=True)
    wave = torch.sin(2 * math.pi * torch.arange(11) / 11)
    for height in (0.02, 0.2, 2.0):
        with torch.no_grad():
            for one in (body, plain):
                one.knots[:, 0], one.knots[:, 2] = 0.6 * height * wave, 0.8 * height * wave
                one.knots[:, 6], one.knots[:, 10] = 0.3 * wave, 0.01 * wave
            shown, whole = body.at(times), plain.at(times)
            body.doubted = 0.0
            torch.testing.assert_close(body.at(times), whole)
            body.doubted = 1.0

        def share(number, shown=shown, whole=whole):
            return float((shown[:, number] * whole[:, number]).sum() / whole[:, number].square().sum())

        turn = float(whole[:-1, :3].square().sum(-1).mean())
        assert share(0) == pytest.approx(share(2), abs=1e-6)
        assert share(0) == pytest.approx((turn + 0.001875) / (turn + 0.064375), rel=0.01)
        stretch = 2 * float(whole[:-1, 6].square().mean())
        assert share(6) == pytest.approx((stretch + 0.0048) / (stretch + 0.1648), rel=0.01)
        assert share(10) < 0.04


def test_what_is_local_goes_along_with_the_body() -> None:
    field = DeformationField(DeformationConfig(GRID, hidden_width=8, hidden_layers=1, body_knots=7))
    field.reset(generator())
    with torch.no_grad():
        field.mlp.layers[-1].normal_(generator=generator(5))
        field.grid.table.normal_(0, 0.3, generator=generator(6))
        field.body.doubt.zero_()
        field.body.knots[-3:, -1] = 0.4  # up by a fifth of the box in the end
    u, times = torch.rand(30, 3, generator=generator(1)) * 0.5 + 0.25, torch.ones(30)
    up = torch.tensor([0.0, 0.0, 0.2])
    alone = DeformationField(DeformationConfig(GRID, hidden_width=8, hidden_layers=1))
    alone.load_state_dict({n: v for n, v in field.state_dict().items() if not n.startswith("body.")})
    local = alone.displacement(u - up, times, KERNELS)
    torch.testing.assert_close(field.displacement(u, times, KERNELS), local - up, atol=1e-6, rtol=0)
    field.set_active_levels(0)
    torch.testing.assert_close(field.displacement(u, times, KERNELS), (-up).expand(30, 3), atol=1e-6, rtol=0)
    field.set_active_levels(3)
    field.shown = 0.5
    half = alone.displacement(u - up / 2, times, KERNELS) / 2
    torch.testing.assert_close(field.displacement(u, times, KERNELS), half - up / 2, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [-1, 1, 3, 1025])
def test_a_number_of_knots_that_makes_no_spline_is_refused(n) -> None:
    with pytest.raises(ValueError, match=rf"body_knots must be 0, or lie in \[4, 1024\], got {n}"):
        DeformationConfig(GRID, body_knots=n)
