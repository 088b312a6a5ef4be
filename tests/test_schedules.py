"""Numbers that change with progress."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream4d_engine.schedules import Schedule, constant, milestones, stepped


def test_a_schedule_follows_the_published_rule():
    noise = Schedule(0.98, 0.02, 0.0, 0.8)  # (0, 0.98, 0.02, 8000) of 10,000 steps
    assert noise(0.0) == 0.98
    assert noise(0.4) == pytest.approx(0.5)
    assert noise(0.8) == noise(0.95) == 0.02


@given(st.floats(0, 1), st.floats(-5, 5), st.floats(-5, 5))
def test_a_schedule_stays_between_its_ends(progress, first, last):
    value = Schedule(first, last, 0.2, 0.7)(progress)
    assert min(first, last) - 1e-9 <= value <= max(first, last) + 1e-9


def test_a_constant_never_changes():
    assert {constant(0.3)(p / 10) for p in range(11)} == {0.3}


@pytest.mark.parametrize("bounds", [(-0.1, 1.0), (0.5, 0.4), (0.0, 1.1)])
def test_bounds_out_of_order_are_named(bounds):
    with pytest.raises(ValueError, match=str(bounds[0])):
        Schedule(0.0, 1.0, *bounds)


def test_levels_come_free_every_five_hundred_of_ten_thousand_steps():
    assert all(stepped(step / 10_000, 4, 20) == 4 + step // 500 for step in range(10_000))


def test_the_rate_halves_at_each_milestone():
    assert [milestones(step / 10_000, (0.8, 0.9), 0.5) for step in (7999, 8000, 8999, 9000)] == [1, 0.5, 0.5, 0.25]
