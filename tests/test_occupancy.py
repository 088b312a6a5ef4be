"""The occupancy grid: what it keeps, what it forgets, and that it never hides a thing in plain sight."""

from __future__ import annotations

import torch

from dream4d_engine.occupancy import DECAY, MAX_THRESHOLD, OccupancyGrid

STEP = 0.05
NOW = torch.zeros(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ball(center: tuple[float, float, float], radius: float, density: float = 20.0):
    def at(points: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return density * ((points - torch.tensor(center)).norm(dim=-1) < radius).float()

    return at


def centers(n: int, radius: float = 1.0) -> torch.Tensor:
    ticks = ((torch.arange(n) + 0.5) / n * 2 - 1) * radius
    return torch.stack(torch.meshgrid(ticks, ticks, ticks, indexing="ij"), -1)


def test_a_fresh_grid_is_occupied_everywhere() -> None:
    assert OccupancyGrid(8, 1.0).occupied.all()


def test_axes_are_x_y_z() -> None:
    grid = OccupancyGrid(16, 2.0)
    grid.update(ball((1.2, -0.4, 0.6), 0.5), generator(), True, NOW, STEP)
    where = centers(16, 2.0)[grid.occupied]
    assert torch.allclose(where.mean(0), torch.tensor([1.2, -0.4, 0.6]), atol=0.1)


def test_update_is_a_decaying_maximum() -> None:
    grid = OccupancyGrid(4, 1.0)
    grid.update(lambda p, t: torch.full((len(p),), 2.0), generator(), True, NOW, STEP)
    assert torch.allclose(grid.values, torch.tensor(2.0 * STEP))
    grid.update(lambda p, t: torch.zeros(len(p)), generator(), True, NOW, STEP)
    assert torch.allclose(grid.values, torch.tensor(2.0 * STEP * DECAY))


def test_a_later_update_touches_a_quarter() -> None:
    grid = OccupancyGrid(8, 1.0)
    grid.update(lambda p, t: torch.ones(len(p)), generator(), False, NOW, STEP)
    assert (grid.values > 0).sum() == 8**3 // 4


def test_the_threshold_is_the_mean_but_at_most_a_hundredth() -> None:
    grid = OccupancyGrid(8, 1.0)
    faint = 0.1 * MAX_THRESHOLD / STEP
    grid.update(lambda p, t: faint * (p[:, 0] > 0), generator(), True, NOW, STEP)
    assert torch.equal(grid.occupied, centers(8)[..., 0] > 0)
    grid.update(lambda p, t: 1 + 9.0 * (p[:, 0] > 0), generator(), True, NOW, STEP)
    assert grid.occupied.all()


def test_a_moving_thing_is_kept_at_all_its_places() -> None:
    def moving(points: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        center = torch.stack((1.2 * times - 0.6, 0 * times, 0 * times), -1)
        return 20.0 * ((points - center).norm(dim=-1) < 0.3).float()

    grid = OccupancyGrid(16, 1.0)
    grid.refresh(moving, torch.linspace(0, 1, 12), STEP)
    where = centers(16)
    for time in (0.0, 0.25, 0.5, 1.0):
        solid = moving(where.view(-1, 3), torch.full((16**3,), time)).view(16, 16, 16) > 0
        assert (grid.occupied | ~solid).all()
    assert grid.occupied.float().mean() < 0.2


def test_refresh_is_exact_and_repeatable() -> None:
    grid = OccupancyGrid(16, 1.0)
    grid.refresh(ball((0, 0, 0), 0.5), NOW, STEP)
    first = grid.occupied.clone()
    grid.refresh(ball((0, 0, 0), 0.5), NOW, STEP)
    assert torch.equal(grid.occupied, first)
    distance = centers(16).norm(dim=-1)
    assert first[distance < 0.45].all() and not first[distance > 0.6].any()
    grid.fill()
    assert grid.occupied.all()


def test_updates_repeat_with_the_generator() -> None:
    grids = [OccupancyGrid(8, 1.0) for _ in range(2)]
    for grid in grids:
        grid.update(ball((0, 0, 0), 0.6), generator(7), False, NOW, STEP)
    assert torch.equal(grids[0].values, grids[1].values)
