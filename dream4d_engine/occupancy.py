"""Where density may be, over all times: a coarse grid that lets the renderer skip empty space."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .transfers import send

DECAY = 0.95  # of a value from update to update, so that what became empty is forgotten
MAX_THRESHOLD = 0.01  # of density * step, so about of a sample's opacity
N_TIMES = 12
"""Moments at which a moving scene is looked at."""
MOMENTS_AT_ONCE = 2**21
"""Points times moments that a GPU is asked for together, at most."""

POINTS_AT_ONCE = 2**18
"""Points that are followed together."""

DensityFunction = Callable[[Tensor, Tensor], Tensor]
"""(points [S, 3] in the world, times [S]) -> density [S]."""
MovedDensity = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(points [S, 3] in the world, times [S]) -> (where what is there goes instead [S, 3], its density [S])."""


class OccupancyGrid(nn.Module):
    """R^3 cells over the box [-radius, radius]^3, axes x, y, z; a fresh grid is occupied everywhere.

    `values` hold an exponential moving maximum of density * step (about the opacity of one sample).
    """

    values: Tensor
    occupied: Tensor

    def __init__(self, resolution: int, radius: float) -> None:
        super().__init__()
        self.radius = radius
        self.register_buffer("values", torch.zeros(resolution, resolution, resolution))
        self.register_buffer("occupied", torch.ones(resolution, resolution, resolution, dtype=torch.bool))

    @property
    def resolution(self) -> int:
        """Cells a side."""
        return self.values.shape[0]

    @torch.no_grad()
    def update(
        self,
        density: DensityFunction,
        generator: torch.Generator,
        all_cells: bool,
        times: Tensor,
        step_size: float,
    ) -> None:
        """Let the values decay and raise them to what one random point in each cell shows, the maximum over `times`.

        Args:
            all_cells: every cell, or a random quarter. times: [T]. step_size: the renderer's step.
        """
        n_cells, device = self.values.numel(), self.values.device
        if all_cells:
            cells = torch.arange(n_cells)
        else:
            cells = torch.randperm(n_cells, generator=generator)[: max(1, n_cells // 4)]
        places = torch.rand(len(cells), 3, generator=generator)
        cells, places = send(cells, device), send(places, device)
        seen = self._max_density(density, self._points(cells, places), times) * step_size
        flat = self.values.view(-1)
        flat[cells] = torch.maximum(flat[cells] * DECAY, seen)  # only of the cells that were looked at
        self._threshold()

    @torch.no_grad()
    def refresh(self, density: DensityFunction, times: Tensor, step_size: float, per_side: int = 2) -> None:
        """Set every value to the maximum over per_side^3 evenly spaced points of its cell and all `times`: the exact
        and repeatable way, for evaluation."""
        cells = torch.arange(self.values.numel(), device=self.values.device)
        ticks = (torch.arange(per_side, device=cells.device) + 0.5) / per_side
        best = torch.zeros(len(cells), device=cells.device)
        for place in torch.cartesian_prod(ticks, ticks, ticks):
            seen = self._max_density(density, self._points(cells, place.expand(len(cells), 3)), times)
            best = torch.maximum(best, seen * step_size)
        self.values.copy_(best.view_as(self.values))
        self._threshold()

    @torch.no_grad()
    def move(self, look: MovedDensity, times: Tensor, step_size: float, per_side: int = 2) -> None:
        """Set every value to the maximum of what was in occupied cells and is seen in this one from now on.

        Points evenly spaced in the occupied cells are followed, per_side^3 each; each counts for a cell's width around
        it, so that what is stretched to per_side times its length has no gaps.
        """
        n, device = self.resolution, self.values.device
        cells = self.occupied.view(-1).nonzero()[:, 0]
        ticks = (torch.arange(per_side, device=device) + 0.5) / per_side
        halves = torch.tensor([-0.5, 0.5], device=device)
        strides = torch.tensor([n * n, n, 1], device=device)
        places = torch.cartesian_prod(ticks, ticks, ticks)
        everywhere = self._points(cells.repeat_interleave(len(places)), places.repeat(len(cells), 1))
        best = torch.zeros(self.values.numel(), device=device)
        for points in everywhere.split(POINTS_AT_ONCE):
            for time in times:
                goes, density = look(points, time.to(points).expand(len(points)))
                at = (goes / self.radius + 1) / 2 * n
                for aside in torch.cartesian_prod(halves, halves, halves):
                    cell = ((at + aside).floor().long().clamp(0, n - 1) * strides).sum(-1)
                    best.scatter_reduce_(0, cell, density.float() * step_size, "amax")
        self.values.copy_(best.view_as(self.values))
        self._threshold()

    @torch.no_grad()
    def fill(self) -> None:
        """Call every cell occupied."""
        self.values.zero_()
        self.occupied.fill_(True)

    def _threshold(self) -> None:
        threshold = self.values.mean().clamp_max(MAX_THRESHOLD)  # the mean: else a faint scene would be empty
        torch.gt(self.values, threshold, out=self.occupied)

    def _points(self, cells: Tensor, places: Tensor) -> Tensor:
        """Return the points [M, 3] at `places` [M, 3] in [0, 1] of the cells numbered [M]."""
        n = self.resolution
        corner = torch.stack((cells // (n * n), cells // n % n, cells % n), -1)  # z runs fastest
        return ((corner + places) / n * 2 - 1) * self.radius

    @staticmethod
    def _max_density(density: DensityFunction, points: Tensor, times: Tensor) -> Tensor:
        if points.is_cuda and len(points) * len(times) <= MOMENTS_AT_ONCE:  # one moment would not keep a GPU busy
            found = density(points.repeat(len(times), 1), times.to(points).repeat_interleave(len(points)))
            return found.float().view(len(times), -1).amax(0)
        best = torch.zeros(len(points), device=points.device)
        for time in times:
            best = torch.maximum(best, density(points, time.to(points).expand(len(points))).float())
        return best
