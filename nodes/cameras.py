"""From widgets and the 3D viewer's camera to the engine's cameras. Degrees appear here only."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..dream4d_engine.cameras import CameraBatch, final_path, fixed_take, orbit

FINAL_PATH, ORBIT, FIXED, CONNECTED = "final path", "orbit", "fixed view", "connected camera"
CAMERAS = (FINAL_PATH, ORBIT, FIXED, CONNECTED)
FINAL_PARTS = 8

VIEWER_SIZE = 5.0
"""The 3D viewer shows every object with this largest side; our box has the side 2."""
_FROM_VIEWER = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
"""The viewer's y is up and its front is +z; ours are +z and +x."""


def viewer_cameras(camera: Mapping, n_frames: int, height: int, width: int) -> CameraBatch:
    """Return the 3D viewer's camera filming the whole animation, [1, n_frames].

    Raises ValueError for what can't be rendered: orthographic cameras, numbers that are missing or not finite.
    """
    if camera.get("cameraType", "perspective") != "perspective":
        raise ValueError("the connected camera is orthographic: switch the 3D viewer to perspective")
    position, target = _vector(camera, "position"), _vector(camera, "target")
    if "quaternion" in camera:
        rotation = _rotation(camera["quaternion"])
    else:
        rotation = _looking(position, target)
    zoom, fov = float(camera.get("zoom") or 1.0), math.radians(float(camera.get("fov") or 50.0))
    fov = 2 * math.atan(math.tan(fov / 2) / zoom)
    place = _FROM_VIEWER @ position * (2 / VIEWER_SIZE)
    distance = float(place.norm())
    if not math.isfinite(distance + fov) or distance < 1e-3:
        raise ValueError("the connected camera stands inside the object's middle or has no finite place")
    c2w = torch.eye(4)
    c2w[:3, :3], c2w[:3, 3] = _FROM_VIEWER @ rotation, place

    def same(value: float) -> Tensor:
        return torch.full((1, n_frames), value)

    return CameraBatch(
        c2w=c2w.expand(1, n_frames, 4, 4).clone(),
        fov_y=same(fov),
        azimuth=same(math.atan2(float(place[1]), float(place[0]))),
        elevation=same(math.asin(max(-1.0, min(1.0, float(place[2]) / distance)))),
        distance=same(distance),
        time=torch.linspace(0, 1, n_frames)[None],
        height=height,
        width=width,
    )


def path_cameras(
    name: str,
    n_frames: int,
    height: int,
    width: int,
    *,
    azimuth_deg: float,
    elevation_deg: float,
    distance: float,
    fov_deg: float,
) -> CameraBatch:
    """Return one of the paths, [1, frames]; every one of them plays the animation."""
    if name == FINAL_PATH:
        return final_path(height, width, FINAL_PARTS, n_frames, elevation_deg, distance, fov_deg)
    if name == ORBIT:
        times = torch.linspace(0, 1, n_frames)[None]
        return orbit(n_frames, height, width, elevation_deg, distance, fov_deg, times, azimuth_deg)
    if name == FIXED:
        return fixed_take(n_frames, height, width, azimuth_deg, elevation_deg, distance, fov_deg)
    raise ValueError(f"unknown cameras {name!r}: choose one of {', '.join(CAMERAS)}")


def _vector(camera: Mapping, name: str) -> Tensor:
    try:
        return torch.tensor([float(camera[name][axis]) for axis in "xyz"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the connected camera has no {name} with x, y and z") from error


def _rotation(quaternion: Mapping) -> Tensor:
    """Rotation matrix of a quaternion; its columns are right, up and backward, as ours are."""
    try:
        q = torch.tensor([float(quaternion[axis]) for axis in "wxyz"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("the connected camera has no quaternion with x, y, z and w") from error
    w, x, y, z = (q / q.norm().clamp_min(1e-9)).tolist()
    return torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def _looking(position: Tensor, target: Tensor) -> Tensor:
    """Rotation of a camera that looks from one place to another, y up; straight down, z is "up" instead."""
    backward = torch.nn.functional.normalize(position - target, dim=0)
    up = torch.tensor([0.0, 1.0, 0.0]) if abs(float(backward[1])) < 0.9999 else torch.tensor([0.0, 0.0, -1.0])
    right = torch.nn.functional.normalize(torch.linalg.cross(up, backward), dim=0)
    return torch.stack((right, torch.linalg.cross(backward, right), backward), 1)
