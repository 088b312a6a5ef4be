"""A model from a file of any of the formats that are read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..mesh import MeshError
from .files import read_plain_model
from .gltf import read_gltf_model
from .record import Model

_PLAIN: dict[str, Literal["obj", "ply", "stl"]] = {"obj": "obj", "ply": "ply", "stl": "stl"}
READ_FORMATS = ("glb", "gltf", *_PLAIN)


def read_model(path: Path | str, clip: str | None = None, time: float = 0.0) -> Model:
    """Read a mesh from GLB, glTF, OBJ, PLY or STL; only the first two have clips.

    Raises MeshError, with one sentence, where there is no mesh to be had.
    """
    path = Path(path)
    form = path.suffix.lower().removeprefix(".")
    if form in ("glb", "gltf"):
        return read_gltf_model(path, clip, time)
    if form not in _PLAIN:
        names = ", ".join(f".{known}" for known in READ_FORMATS)
        raise MeshError(f"{path} is no file of a format that is read ({names}): export it as GLB")
    if clip is not None or time:
        raise MeshError(f"{path.name}: {form.upper()} files have no clips: leave the clip and its time away")
    return read_plain_model(path, _PLAIN[form])
