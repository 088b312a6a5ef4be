"""The scene: a canonical field, perhaps a deformation over time, a background, and where density may be."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from .cameras import film_times
from .fields.background import Background, BackgroundConfig
from .fields.deformation import DeformationConfig, DeformationField
from .fields.edit import UNCHANGED, MotionEdit
from .fields.encodings import require_range
from .fields.radiance import RadianceConfig, RadianceField
from .kernels import Kernels, select_kernels
from .occupancy import N_TIMES, OccupancyGrid

MAX_SAMPLES = 65536
"""Of samples along a ray, the most that make sense."""
NORMAL_OFFSET = 0.01
"""Half the distance, in radii, over which density differences are taken for normals: some cells of the middle levels,
so that the noise of the finest ones does not show."""


@dataclass(frozen=True)
class SceneConfig:
    """Everything that fixes a scene's parameters."""

    radius: float = 1.0  # of the box [-radius, radius]^3, world units
    radiance: RadianceConfig = RadianceConfig()
    deformation: DeformationConfig | None = None  # None: the scene is static
    background: BackgroundConfig = BackgroundConfig()
    occupancy_resolution: int = 32  # cells a side
    n_samples: int = 512  # intervals along the box's diagonal

    def __post_init__(self) -> None:
        require_range("radius", self.radius, 1e-3, 1e3)
        require_range("occupancy_resolution", self.occupancy_resolution, 1, 256)
        require_range("n_samples", self.n_samples, 1, MAX_SAMPLES)

    def step_size(self, n_samples: int | None = None) -> float:
        """Length of a sample's interval; `n_samples` None means the scene's own."""
        return 1.732 * 2 * self.radius / (n_samples or self.n_samples)  # the box's diagonal, sqrt(3) sides long


@dataclass(frozen=True)
class FieldOutput:
    """What a scene is at S points."""

    density: Tensor  # [S], 1 / world unit
    rgb: Tensor  # [S, 3] in (0, 1)
    normals: Tensor | None = None  # [S, 3] unit vectors
    displacement: Tensor | None = None  # [S, 3], in units of the [0, 1] box


@dataclass(frozen=True)
class _Lookup:
    """Where points of a moving scene are looked up."""

    places: Tensor  # [S, 3] in the canonical [0, 1] box
    displacement: Tensor | None = None  # [S, 3]; None: nothing moves
    outside: Tensor | None = None  # [S] bool, which came from beyond the box; None: none

    def empty_outside(self, density: Tensor) -> Tensor:
        """The density [S], and none of what came from beyond the box, where nothing is."""
        return density if self.outside is None else density.masked_fill(self.outside, 0.0)


class Scene(nn.Module):
    """A static scene is one whose `deformation` is None; everything else treats both alike.

    `kernels` None: the fastest that run on the device the scene is on, chosen when they are first needed there: a scene
    that is built to be moved to a GPU asks no compiler for a CPU.
    """

    def __init__(self, config: SceneConfig, kernels: Kernels | None = None) -> None:
        super().__init__()
        self.config = config
        self._given_kernels = self._kernels = kernels
        self.canonical = RadianceField(config.radiance, config.radius)
        self.deformation = None if config.deformation is None else DeformationField(config.deformation)
        self.background = Background(config.background)
        self.occupancy = OccupancyGrid(config.occupancy_resolution, config.radius)

    def _apply(self, fn: Callable, recurse: bool = True) -> Scene:
        """What `.to`, `.cpu` and `.cuda` come down to: the device may be another one afterwards."""
        before = self.device
        super()._apply(fn, recurse)
        if self._given_kernels is None and self.device != before:
            self._kernels = None
        return self

    @property
    def kernels(self) -> Kernels:
        """What the scene is looked at with."""
        if self._kernels is None:
            self._kernels = select_kernels(self.device)
        return self._kernels

    @kernels.setter
    def kernels(self, kernels: Kernels) -> None:
        self._kernels = kernels

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.canonical.grid.table.device

    @property
    def loops(self) -> bool:
        """Whether its last moment is its first one."""
        if self.deformation is None:
            return False
        first, last = self.edit.moments(torch.tensor([0.0, 1.0])).tolist()
        return first == last or (self.deformation.config.loop and (last - first) % 1 == 0)

    @property
    def length(self) -> float:
        """How many takes of a prior's own length its animation lasts."""
        return 1.0 if self.deformation is None else self.deformation.config.length or 1.0

    def reset(self, generator: torch.Generator) -> None:
        """Start afresh: draw all parameters, call every cell occupied."""
        self.canonical.reset(generator)
        if self.deformation is not None:
            self.deformation.reset(generator)
        self.background.reset(generator)
        self.occupancy.fill()

    @property
    def edit(self) -> MotionEdit:
        """What is changed of the motion as it was trained."""
        return UNCHANGED if self.deformation is None else self.deformation.config.edit or UNCHANGED

    def _look_up(self, points: Tensor, moments: Tensor) -> _Lookup:
        """What points [S, 3] of the world show at trained moments [S]."""
        u = ((points / self.config.radius + 1) / 2).clamp(0, 1)  # rounding, and the offsets of normals, leave the box
        field = self.deformation
        if field is None:
            return _Lookup(u)
        trained = partial(field.displacement, kernels=self.kernels)
        displacement = self.edit.displacement(trained, u, moments, self.config.radius)
        came_from = field.warp(u, displacement)
        outside = ((came_from < 0) | (came_from > 1)).any(-1)  # what is not a number is not outside, and stays seen
        return _Lookup(came_from.clamp(0, 1), displacement, outside)

    def query(self, points: Tensor, times: Tensor, normals: bool = False) -> FieldOutput:
        """Evaluate the scene at points [S, 3] of the world and times [S] in [0, 1]; differentiable in all parameters.

        Normals cost six more density queries.
        """
        found = self._look_up(points, self.edit.moments(times))
        density, rgb = self.canonical(found.places, self.kernels)
        normal = self.normals(points, times) if normals else None
        return FieldOutput(found.empty_outside(density), rgb, normal, found.displacement)

    def density(self, points: Tensor, times: Tensor) -> Tensor:
        """Evaluate the density [S] alone."""
        return self._density_then(points, self.edit.moments(times))

    def _density_then(self, points: Tensor, moments: Tensor) -> Tensor:
        """The density [S] at moments [S] of the trained motion."""
        found = self._look_up(points, moments)
        return found.empty_outside(self.canonical.density(found.places, self.kernels))

    def looked_up(self, points: Tensor, time: float) -> Tensor:
        """Points [S, 3] of the world -> the places [S, 3] of the canonical [0, 1] box that they show at a time."""
        return self._look_up(points, self.edit.moments(points.new_full((len(points),), time))).places

    def is_solid(self, density: Tensor) -> Tensor:
        """Whether a quarter of the radius of such density [S] would be half opaque: 1 - exp(-d t) > 1/2."""
        return density * (self.config.radius / 4) > math.log(2)

    def normals(self, points: Tensor, times: Tensor) -> Tensor:
        """Return outward unit normals [S, 3] (zero where the density does not change)."""
        # minus the density's gradient, by central differences
        offsets = torch.eye(3, device=points.device, dtype=points.dtype) * (NORMAL_OFFSET * self.config.radius)
        slopes = [self.density(points + d, times) - self.density(points - d, times) for d in offsets]
        return nn.functional.normalize(-torch.stack(slopes, -1), dim=-1, eps=1e-9)

    def moments(self) -> Tensor:
        """The moments [T] of the trained motion at which occupancy looks at the scene."""
        if self.deformation is None or self.edit.strength == 0:
            return torch.zeros(1, device=self.device)
        # things that go farther pass more cells between two moments, and long animations are as dense in them
        n_times = math.ceil(N_TIMES * max(1.0, self.edit.strength) * self.length)
        return film_times(n_times, self.deformation.config.loop, self.device)

    def update_occupancy(self, generator: torch.Generator, all_cells: bool) -> None:
        """Update the occupancy grid in training, all of its cells or a random quarter."""
        self.occupancy.update(self._density_then, generator, all_cells, self.moments(), self.config.step_size())

    def refresh_occupancy(self) -> None:
        """Compute the occupancy grid anew, repeatably, from the scene as it is; for evaluation."""
        self.occupancy.refresh(self._density_then, self.moments(), self.config.step_size())

    def clone(self) -> Scene:
        """An independent copy."""
        return copy.deepcopy(self)

    def edited(self, edit: MotionEdit) -> Scene:
        """Return a copy whose motion is changed, on top of what is changed already.

        Raises ValueError for a scene that doesn't move, for a frozen box that lies outside of the scene's, and where
        the motion would become too strong.
        """
        if self.deformation is None:
            raise ValueError("the scene doesn't move, so there is no motion to change: animate it first")
        radius = self.config.radius
        for box in edit.frozen:
            if max(box.low) >= radius or min(box.high) <= -radius:
                raise ValueError(
                    f"the frozen box from {box.low} to {box.high} lies outside of the scene, which reaches from "
                    f"-{radius:g} to {radius:g}"
                )
        whole, scene = self.edit.then(edit), self.clone()
        assert scene.deformation is not None
        changed = replace(scene.deformation.config, edit=None if whole.is_nothing else whole)
        scene.deformation.config = changed
        scene.config = replace(scene.config, deformation=changed)
        if whole.strength == 0:  # then it is the still scene's own, to the bit
            scene.refresh_occupancy()
        elif not edit.keeps_places:
            scene.occupancy.move(partial(self._moved, edit), scene.moments(), self.config.step_size())
        return scene

    def _moved(self, edit: MotionEdit, points: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Where an edit has what is at points [S, 3] at moments [S] instead, and its density [S]."""
        radius = self.config.radius
        found = self._look_up(points, moments)
        assert found.displacement is not None  # a scene that is edited moves
        u = (points / radius + 1) / 2
        goes = edit.places(u + found.displacement, u, radius)
        return (2 * goes - 1) * radius, found.empty_outside(self.canonical.density(found.places, self.kernels))

    def with_deformation(
        self,
        config: DeformationConfig,
        generator: torch.Generator,
        background: BackgroundConfig | None = None,
    ) -> Scene:
        """Return a copy that can move: a fresh deformation (of zero displacement) and, if asked, a fresh background."""
        changed = replace(self.config, deformation=config, background=background or self.config.background)
        # the occupancy starts as everywhere occupied, since it has to hold for all times
        fresh = ("deformation", "occupancy") if background is None else ("deformation", "occupancy", "background")
        scene = self._rebuilt(changed, fresh)
        assert scene.deformation is not None  # as `changed` has it
        scene.deformation.reset(generator)
        if background is not None:
            scene.background.reset(generator)
        return scene

    def _rebuilt(self, config: SceneConfig, fresh: tuple[str, ...]) -> Scene:
        """A scene of `config` on the same device that takes over all parts but the `fresh` ones."""
        scene = Scene(config, self._given_kernels).to(self.device)
        state = {name: value for name, value in self.state_dict().items() if name.split(".")[0] not in fresh}
        missing, unexpected = scene.load_state_dict(state, strict=False)
        wrong = [name for name in missing if name.split(".")[0] not in fresh] + list(unexpected)
        if wrong:
            raise ValueError(f"the scene's parts do not fit its new configuration: {', '.join(wrong)}")
        return scene.train(self.training)


def build_scene(config: SceneConfig, generator: torch.Generator, kernels: Kernels | None = None) -> Scene:
    """Build a fresh scene, on CPU; `.to(device)` moves it."""
    scene = Scene(config, kernels)
    scene.reset(generator)
    return scene
