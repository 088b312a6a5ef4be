"""The deformation field: where in the canonical field a point of the moving scene is looked up.

It is a *backward* warp (observed -> canonical), one function for all times, and starts as no displacement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..columns import side_by_side
from ..kernels import Kernels
from .body import BodyMotion
from .edit import MotionEdit
from .encodings import MAX_LOG2_ENTRIES, HashGrid, HashGridConfig, require_range
from .mlp import MLP

SEAM = 0.25
"""Of a loop, the last share of time, over which its end becomes its beginning. A longer one would cost more, a shorter
one would be steeper."""
MAX_LENGTH = 64.0
"""Of an animation, in takes."""


@dataclass(frozen=True)
class DeformationConfig:
    """A hash grid over (u, t) read by one network."""

    grid: HashGridConfig = HashGridConfig(n_levels=12, base_resolution=4)
    hidden_width: int = 64
    hidden_layers: int = 4
    scale: float = 1.0  # above 1 it enlarges the canonical object in the frame
    loop: bool = False  # time is a circle: 1 is 0 again
    edit: MotionEdit | None = None  # of what was trained; the scene sees to it, the field stays as it is
    length: float | None = None  # of the animation, in takes of a prior's own length; None: it is one
    body_knots: int = 0  # of the motion as a whole that the local one is added to, over time; 0: there is none

    def __post_init__(self) -> None:
        require_range("hidden_width", self.hidden_width, 1, 1024)
        require_range("hidden_layers", self.hidden_layers, 0, 16)
        require_range("scale", self.scale, 0.05, 20.0)
        if self.length is not None:
            require_range("length", self.length, 1.0, MAX_LENGTH)
        if self.body_knots and not 4 <= self.body_knots <= 1024:
            raise ValueError(f"body_knots must be 0, or lie in [4, 1024], got {self.body_knots}")

    def lasting(self, length: float) -> DeformationConfig:
        """The same for an animation of so many takes: as fine in each of them as it is in one."""
        grid = self.grid
        # as many cells a take as before, and as many entries for a cell
        resolution, entries = round(grid.base_resolution * length), grid.log2_entries + round(math.log2(length))
        longer = replace(grid, base_resolution=resolution, log2_entries=min(entries, MAX_LOG2_ENTRIES))
        ends = 0 if self.loop else 3  # knots beyond the intervals between them
        knots = self.body_knots and round((self.body_knots - ends) * length) + ends
        return replace(self, grid=longer, body_knots=knots, length=length)


class DeformationField(nn.Module):
    """Displacements in units of the [0, 1] box. `active_levels` grows during training (coarse to fine)."""

    active_levels: Tensor

    def __init__(self, config: DeformationConfig) -> None:
        super().__init__()
        self.config = config
        self.grid = HashGrid(config.grid, 4)
        self.mlp = MLP(self.grid.layout.n_outputs, 3, config.hidden_width, config.hidden_layers)
        self.body = BodyMotion(config.body_knots, config.loop) if config.body_knots else None
        self.register_buffer("active_levels", torch.tensor(config.grid.n_levels, dtype=torch.int64))
        self.shown = 1.0  # share of the motion that is shown: while it is trained, the prior may be shown less, or more
        self._n_active = config.grid.n_levels  # the same on the host: asking a GPU for it would stop every query

    def reset(self, generator: torch.Generator) -> None:
        """Start afresh, with zero displacement: the last layer's weights are zero."""
        self.grid.reset(generator)
        self.mlp.reset(generator)
        with torch.no_grad():
            self.mlp.layers[-1].zero_()
        if self.body is not None:
            self.body.reset()

    def set_active_levels(self, n_levels: int) -> None:
        """Use the coarsest `n_levels` levels of the grid only."""
        self._n_active = max(0, min(n_levels, self.config.grid.n_levels))
        self.active_levels.fill_(self._n_active)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.active_levels.device.type != "meta":  # where only shapes are looked at there is no number
            self._n_active = int(self.active_levels)

    def displacement(self, u: Tensor, times: Tensor, kernels: Kernels) -> Tensor:
        """u [S, 3], times [S], all in [0, 1] -> displacements [S, 3]; the local part lies in (-1, 1).

        A loop's times may be any.
        """
        if self.body is None:
            return self._local(u, times, kernels)
        came_from = self.body(u, times, self.shown)
        if not self._n_active:
            return came_from - u
        # in the object's own frame, so that what is local goes along
        return came_from - u + self._local(came_from.clamp(0, 1), times, kernels)

    def _local(self, u: Tensor, times: Tensor, kernels: Kernels) -> Tensor:
        # a grid is as fine along all its axes: a long animation's has the cells of time, of which space takes a part
        place = u if self.config.length is None else u / self.config.length
        features = self._features(place, times, kernels)
        displacement = 2 * torch.sigmoid(self.mlp(features, kernels).float()) - 1
        return displacement if self.shown == 1 else self.shown * displacement

    def _features(self, u: Tensor, times: Tensor, kernels: Kernels) -> Tensor:
        """What the grid holds at u [S, 3] and times [S]; of a loop, a function of period 1, smooth where it closes.

        A loop's grid holds the times from -SEAM to 1. Over the last SEAM of them, what it holds at t goes over into
        what it holds at t - 1: (1 - b) F(t) + b F(t - 1), where b and its slope are 0 and 0 in the beginning, 1 and 0
        in the end.
        """
        if not self.config.loop:
            return self.grid(side_by_side(u, times[:, None]), kernels, self._n_active)
        phase = times.remainder(1)
        late = ((phase - 1) / SEAM + 1).clamp(0, 1)
        blend = late.square() * (3 - 2 * late)
        # a GPU looks all of them up twice: to be told which are late it would have to be waited for
        rows = slice(None) if u.is_cuda else blend.nonzero()[:, 0]
        held = torch.cat((phase, (phase[rows] - 1).clamp_min(-SEAM)))
        places = torch.cat((torch.cat((u, u[rows])), ((held + SEAM) / (1 + SEAM))[:, None]), -1)
        here, before = self.grid(places, kernels, self._n_active).tensor_split((len(u),))
        change = blend[rows, None].to(here) * (before - here[rows])
        return here + change if isinstance(rows, slice) else here.index_add(0, rows, change)

    def warp(self, u: Tensor, displacement: Tensor) -> Tensor:
        """Return the places [S, 3] where the canonical field is queried; those beyond [0, 1] are beyond its box."""
        # zoomed about the box's middle: places further apart in the frame show ones that lie closer in the field
        return (u + displacement - 0.5) / self.config.scale + 0.5
