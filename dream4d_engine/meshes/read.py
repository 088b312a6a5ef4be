"""A model from a file of any of the formats that are read."""

from __future__ import annotations

from pathlib import Path

from ..mesh import MeshError
from .gltf import read_gltf_model
from .record import Model

READ_FORMATS = ("glb", "gltf", "obj", "ply", "stl")


def read_model(path: Path | str, clip: str | None = None, time: float = 0.0) -> Model:
    """Read a mesh from GLB, glTF, OBJ, PLY or STL; only the first two have clips.

    Raises MeshError, with one sentence, where there is no mesh to be had.
    """
    path = Path(path)
    form = path.suffix.lower().removeprefix(".")
    if form in ("glb", "gltf"):
        return read_gltf_model(path, clip, time)
    if form not in READ_FORMATS:
        names = ", ".join(f".{known}" for known in READ_FORMATS)
        raise MeshError(f"{path} is no file of a format that is read ({names}): export it as GLB")
    raise MeshError(f"{path}: {form} is not read yet")
