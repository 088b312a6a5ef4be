"""The prepared image in training: the camera that saw it, and what that camera should see of the scene."""

from __future__ import annotations

import math

import torch

from ...cameras import CameraBatch, make_cameras
from ...supervision import Targets
from ...transfers import send
from ..config import ReferenceConfig, StaticRecipe
from .pixels import ImageError
from .prepare import Reference, resized


def reference_cameras(config: ReferenceConfig, size: int = 1) -> CameraBatch:
    """The camera that saw the image, [1, 1]."""
    return make_cameras(
        math.radians(config.azimuth_deg),
        math.radians(config.elevation_deg),
        config.distance,
        math.radians(config.fov_y_deg),
        0.0,
        size,
        size,
    )


def reference_targets(
    reference: Reference, config: ReferenceConfig, size: int, device: torch.device | str = "cpu"
) -> Targets:
    """The prepared image at one of the recipe's sizes, as targets [1, 1]."""
    present = {n: getattr(reference, n) for n in ("rgb", "mask", "depth", "normals")}
    # [S, S, c] -> [1, 1, size, size, c]
    layers = resized({n: layer for n, layer in present.items() if layer is not None}, size)
    cameras = reference_cameras(config, size)
    if "normals" in layers:
        rotation = cameras.c2w[0, 0, :3, :3]  # from the camera's frame to the world's
        layers["normals"] = (rotation * layers["normals"][..., None, :]).sum(-1)
    return Targets(cameras.to(device), **{n: send(layer[None, None], device) for n, layer in layers.items()})


def check_reference(recipe: StaticRecipe, reference: Reference | None) -> None:
    """Refuse an image where none is looked at, none where one is needed, and maps that don't fit the weights."""
    config = recipe.reference
    if config is None:
        if reference is not None:
            raise ImageError(f"the recipe {recipe.name!r} looks at no image: take one that does (image-to-3d)")
        return
    if reference is None:
        raise ImageError(f"the recipe {recipe.name!r} makes a scene from an image: give one")
    weights = {"depth map": (reference.depth, config.depth or config.relative_depth, "depth or .relative-depth")}
    weights["normal map"] = (reference.normals, config.normal, "normal")
    for name, (given, weight, flag) in weights.items():
        if weight and given is None:
            raise ImageError(f"the recipe weighs a {name}, but none was given: give one, or set the weight to 0")
        if given is not None and not weight:
            raise ImageError(f"a {name} was given, but its weight is 0: raise reference.{flag}, or leave it out")
