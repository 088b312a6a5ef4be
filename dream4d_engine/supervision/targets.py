"""Supervision by images that are there: one image of the subject, a film, or renderings of a mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..cameras import CameraBatch
from ..randomness import Draw
from ..rendering import RenderOptions, RenderOutput, View, prepare_view
from ..scene import Scene
from . import losses
from .record import Supervision, Terms, needed


@dataclass(frozen=True)
class Targets:
    """What cameras [B, F] should see: F = 1 for an image, F = T for a film, B many for views of a mesh."""

    cameras: CameraBatch  # [B, F]
    rgb: Tensor  # [B, F, H, W, 3] in [0, 1], of no meaning outside of the mask
    mask: Tensor  # [B, F, H, W, 1], the share of each pixel that the subject covers
    depth: Tensor | None = None  # [B, F, H, W, 1], growing away from the camera, up to a scale and shift of each image
    normals: Tensor | None = None  # [B, F, H, W, 3] unit vectors in the world's frame


@dataclass(frozen=True)
class PhotometricWeights:
    """Weights of the differences to targets; 0 leaves a term out. See losses.py."""

    rgb: float = 0.0  # of the colours' squared error
    mask: float = 0.0  # of the opacity's squared error
    depth: float = 0.0  # after the best scale and shift
    relative_depth: float = 0.0  # by its correlation
    normal: float = 0.0  # by the cosine
    entropy: float = 0.0  # of opacities between 0 and 1


def photometric(
    name: str,
    targets_at: Callable[[Scene, float], Targets],
    weights: PhotometricWeights,
    ray_jitter: float = 0.0,
    rays_at_once: int | None = None,
) -> Supervision:
    """Return the supervision that compares the scene with targets, by scene (for its device) and progress.

    Magic123 (2306.17843), section 3.2. `ray_jitter`, `rays_at_once`: see RenderOptions.
    """
    options = RenderOptions(
        stratified=True, normals=bool(weights.normal), ray_jitter=ray_jitter, rays_at_once=rays_at_once
    )

    def view(scene: Scene, progress: float, draw: Draw) -> View:
        # the same rays in every process: targets are no part of the batch that is shared out
        return prepare_view(scene, targets_at(scene, progress).cameras, options, draw.for_(f"{name} rays"))

    def loss(scene: Scene, output: RenderOutput, view: View, progress: float, draw: Draw) -> Terms:
        wanted = targets_at(scene, progress)
        solid = (wanted.mask > 0.5).float()
        parts: dict[str, Tensor] = {}
        if weights.rgb:
            parts["rgb"] = weights.rgb * losses.reference_rgb(output, wanted.rgb, wanted.mask)
        if weights.mask:
            parts["mask"] = weights.mask * losses.reference_mask(output.opacity, wanted.mask)
        if weights.entropy:
            parts["entropy"] = weights.entropy * losses.opacity_entropy(output.opacity)
        if weights.normal:
            normals = needed(output.normals, "a rendering of normals"), needed(wanted.normals, "a normal map")
            parts["normal"] = weights.normal * losses.normal(*normals, solid)
        if weights.depth or weights.relative_depth:
            seen = solid * (output.opacity.detach() > 0.5)  # the distance to what isn't there yet says nothing
            depth = needed(wanted.depth, "a depth map")
            distance = output.depth / output.opacity.clamp_min(0.5)  # the sum w t as a mean
        if weights.depth:
            parts["depth"] = weights.depth * losses.depth(distance, depth, seen)
        if weights.relative_depth:
            parts["relative_depth"] = weights.relative_depth * losses.relative_depth(distance, depth, seen)
        return Terms({f"{name}.{part}": value for part, value in parts.items()})

    return Supervision(name, view, loss)
