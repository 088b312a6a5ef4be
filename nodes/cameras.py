"""From widgets and the 3D viewer's camera to the engine's cameras. Degrees appear here only."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..dream4d_engine.cameras import CameraBatch, film_times, final_path, fixed_take, orbit
from ..dream4d_engine.documents import describe

FINAL_PATH, ORBIT, FIXED, CONNECTED = "final path", "orbit", "fixed view", "connected camera"
CAMERAS = (FINAL_PATH, ORBIT, FIXED, CONNECTED)
FINAL_PARTS = 8

VIEWER_SIZE = 5.0
"""The 3D viewer shows every object with this largest side; our box has the side 2."""
_FROM_VIEWER = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
"""The viewer's y is up and its front is +z; ours are +z and +x."""


def viewer_cameras(camera: Mapping, n_frames: int, height: int, width: int, loop: bool = False) -> CameraBatch:
    """Return the 3D viewer's camera filming the whole animation, [1, n_frames].

    Raises ValueError for what can't be rendered: orthographic cameras, numbers that are missing or not finite.
    """
    if camera.get("cameraType", "perspective") != "perspective":
        raise ValueError("the connected camera is orthographic: switch the 3D viewer to perspective")
    position, target = _vector(camera, "position"), _vector(camera, "target")
    zoom = _number(camera, "zoom", 1.0, 1e-3, 1e3)
    fov = math.radians(_number(camera, "fov", 50.0, 0.1, 179.0))
    fov = 2 * math.atan(math.tan(fov / 2) / zoom)
    place = _FROM_VIEWER @ position * (2 / VIEWER_SIZE)
    distance = float(place.norm())
    if not 1e-3 <= distance <= 1e4:
        raise ValueError("the connected camera stands in the object's middle, too far away or at no finite place")
    turned = camera.get("quaternion")
    rotation = _looking(position, target) if turned is None else _rotation(turned)
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
        time=film_times(n_frames, loop)[None],
        height=height,
        width=width,
    )


def unknown_cameras(name: object) -> str:
    """Say that there are no cameras of this name, in ComfyUI's words for it."""
    return f"cameras: {name!r} not in list: choose one of {', '.join(CAMERAS)}"


def path_cameras(
    name: str,
    n_frames: int,
    size: tuple[int, int],
    *,
    azimuth_deg: float,
    elevation_deg: float,
    distance: float,
    fov_deg: float,
    loop: bool = False,
) -> CameraBatch:
    """Return one of the paths, [1, frames]; each plays the animation. `size`: (height, width) in pixels."""
    height, width = size
    if name == FINAL_PATH:
        return final_path(height, width, FINAL_PARTS, n_frames, elevation_deg, distance, fov_deg, loop)
    if name == ORBIT:
        times = film_times(n_frames, loop)[None]
        return orbit(n_frames, height, width, elevation_deg, distance, fov_deg, times, azimuth_deg)
    if name == FIXED:
        return fixed_take(n_frames, height, width, azimuth_deg, elevation_deg, distance, fov_deg, loop)
    raise ValueError(unknown_cameras(name))


def _vector(camera: Mapping, name: str) -> Tensor:
    try:
        return torch.tensor([float(camera[name][axis]) for axis in "xyz"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the connected camera has no {name} with x, y and z") from error


def _number(camera: Mapping, name: str, default: float, low: float, high: float) -> float:
    """A number of the camera in its range; the default where it is missing or 0."""
    try:
        value = float(camera.get(name) or default)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not low <= value <= high:
        raise ValueError(
            f"the connected camera's {name} is {describe(camera[name])}: it must lie between {low} and {high}"
        )
    return value


def _rotation(quaternion: Mapping) -> Tensor:
    """Rotation matrix of a quaternion; its columns are right, up and backward, as ours are."""
    try:
        q = torch.tensor([float(quaternion[axis]) for axis in "wxyz"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError("the connected camera has no quaternion with x, y, z and w") from error
    if not 1e-6 < float(q.norm()) < math.inf:
        raise ValueError("the connected camera's quaternion is no rotation: its numbers are 0 or not finite")
    w, x, y, z = (q / q.norm()).tolist()
    return torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def _looking(position: Tensor, target: Tensor) -> Tensor:
    """Rotation of a camera that looks from one place to another, y up; straight down, z is "up" instead."""
    if not 1e-6 < float((position - target).norm()) < math.inf:
        raise ValueError("the connected camera looks at the place where it stands: move it, or its target")
    backward = torch.nn.functional.normalize(position - target, dim=0)
    up = torch.tensor([0.0, 1.0, 0.0]) if abs(float(backward[1])) < 0.9999 else torch.tensor([0.0, 0.0, -1.0])
    right = torch.nn.functional.normalize(torch.linalg.cross(up, backward), dim=0)
    return torch.stack((right, torch.linalg.cross(backward, right), backward), 1)
