"""A scene's motion in the mesh that the scene was made from: the user's own vertices, looks and file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..fields.encodings import require_range
from ..mesh import MeshError
from ..meshes import GltfOptions, MeshOrigin, Model, moving_glb
from ..meshes.container import read_bytes
from ..scene import Scene
from ..surface import track_own_vertices
from .meshes import clip_times


@dataclass(frozen=True)
class OwnMesh:
    """A GLB file of the user's mesh, moving."""

    data: bytes
    n_keys: int
    """Key frames of the animation, 0 where nothing moves."""
    notes: tuple[str, ...]
    """Sentences for people."""


def require_own(model: Model, origin: MeshOrigin | None) -> MeshOrigin:
    """The origin of a scene that was made from this model; MeshError where it was not."""
    return _require_same(model.source.name, model.source.sha256, origin)


def require_own_file(path: Path, origin: MeshOrigin | None) -> MeshOrigin:
    """Likewise for a file, before it is read as the scene's origin says: another one may not have that clip."""
    return _require_same(path.name, hashlib.sha256(read_bytes(path)).hexdigest(), origin)


def _require_same(name: str, sha256: str, origin: MeshOrigin | None) -> MeshOrigin:
    if origin is None:
        raise MeshError(
            "the scene was not made from a mesh, so its motion has no way into one: make a scene of the mesh, animate "
            "that, or export the scene's own surface"
        )
    ours = origin.source
    if ours.sha256 != sha256:
        raise MeshError(
            f"{name} (SHA-256 {sha256[:12]}…) is not the mesh that the scene was made from, which is {ours.name} "
            f"({ours.sha256[:12]}…): name that file, as it was then"
        )
    return origin


def own_mesh_glb(
    scene: Scene,
    origin: MeshOrigin | None,
    model: Model,
    n_times: int = 24,
    options: GltfOptions | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> OwnMesh:
    """Give a model the motion of the scene that was made from it (`origin`: as its provenance says), as a GLB.

    Raises MeshError for another model, or a scene that doesn't move.
    """
    origin = require_own(model, origin)
    require_range("n_times", n_times, 2, 1000)
    times = clip_times(scene, n_times)
    tracks = track_own_vertices(scene, model, origin.placement, times, on_progress)
    made = moving_glb(model, tracks.positions, tracks.times, options, origin.placement)
    return OwnMesh(made.data, made.n_keys, (*model.notes, *tracks.notes, *made.notes))
