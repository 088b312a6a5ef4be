"""What a run will need, estimated before it starts."""

from __future__ import annotations

from ..fields.encodings import HashGridConfig
from ..scene import SceneConfig
from .config import MeshRecipe, MotionRecipe, Phase, StaticRecipe

_FIXED_ROOM = 2**25
"""Bytes on the disk for videos, images and records."""
_SHARE_OF_SAMPLES = 0.05
"""Of the places on the rays, how many are looked at with gradient in a scene like the first one, at the least."""
_BYTES_A_PIXEL = 120
"""A ray (7 numbers), colour, opacity, depth, spread and background (9 numbers, twice), the frame in bytes."""

_BYTES_SEEN = 27
"""A pixel of a view of a mesh: its colour in bytes, two distances, its number in a list, and all of it while made."""


def _grid_bytes(grid: HashGridConfig, n_dims: int) -> int:
    """Bytes of a grid's parameters."""
    return 4 * grid.layout(n_dims).n_parameters


def scene_bytes(scene: SceneConfig) -> int:
    """Bytes of a scene's parameters; the networks are small beside the grids."""
    moving = 0 if scene.deformation is None else _grid_bytes(scene.deformation.grid, 4)  # x, y, z, t
    return _grid_bytes(scene.radiance.grid, 3) + moving + 2**20


def disk_bytes(recipes: tuple[StaticRecipe | MotionRecipe, ...], scene: SceneConfig) -> int:
    """Bytes of all that a run writes: results, and a checkpoint (parameters, two moments) beside its successor."""
    return _FIXED_ROOM + sum(2 * 4 * scene_bytes(recipe.trained(scene)) for recipe in recipes)


def film_bytes(height: int, width: int) -> int:
    """Bytes that rendering one frame takes at the least: its rays and its images, the latter twice for a moment."""
    return _BYTES_A_PIXEL * height * width


def memory_bytes(recipe: StaticRecipe | MotionRecipe, scene: SceneConfig) -> int:
    """Bytes that training takes at the least: parameters with gradient and moments, and the samples of a step."""
    config, n_images = recipe.trained(scene), getattr(recipe, recipe.group_field)
    moving = config.deformation
    n_levels = config.radiance.grid.n_levels + (0 if moving is None else 2 * moving.grid.n_levels)

    def rays(phase: Phase) -> int:
        return phase.n_groups * n_images * phase.height * phase.width

    reference = recipe.reference
    seen = 0 if reference is None else max((phase.size**2 for phase in reference.phases), default=0)
    carried = min(recipe.gradient_frames or n_images, n_images) / n_images  # the others keep nothing of their samples
    per_ray = 100 + carried * config.n_samples * _SHARE_OF_SAMPLES * _sample_bytes(n_levels)
    # parameters, gradient and two moments
    return 4 * scene_bytes(config) + int((max(map(rays, recipe.phases), default=0) + seen) * per_ray)


def _sample_bytes(n_levels: int) -> int:
    """What autograd keeps of a sample: the features of its levels, and the networks' layers."""
    return 200 * n_levels + 1500


def mesh_memory_bytes(recipe: MeshRecipe) -> int:
    """Bytes that a fit to a mesh takes at the least: what is seen of it, parameters and moments, a step's samples."""
    sample, per_ray = _sample_bytes(recipe.scene.radiance.grid.n_levels), recipe.scene.n_samples * _SHARE_OF_SAMPLES
    step = max(phase.n_rays * per_ray + phase.n_points for phase in recipe.phases)
    seen = _BYTES_SEEN * recipe.n_views * recipe.view_size**2
    return 4 * scene_bytes(recipe.scene) + int(step * sample) + seen


def mesh_disk_bytes(recipe: MeshRecipe) -> int:
    """Bytes of all that a fit to a mesh writes."""
    return _FIXED_ROOM + 2 * 4 * scene_bytes(recipe.scene)
