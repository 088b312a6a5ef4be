"""Meshes of others as records: what was read, where it came from, and where it stands in a scene's box."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..mesh import Mesh, MeshError
from .container import Gltf

ModelFormat = Literal["glb", "gltf", "obj", "ply", "stl", "tensors"]
Up = Literal["y", "z"]
Front = Literal["+x", "-x", "+y", "-y", "+z", "-z"]
Wrap = Literal["repeat", "mirror", "clamp"]
SIZE = 0.6
"""Of the box's side: an object of this length leaves room to move, and cameras of all recipes see it whole."""
_SMALLEST, _LARGEST = 1e-18, 1e18
"""Lengths of objects, in their files' units: what brings others to the box's size is no number that scenes keep."""

Rows = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]


@dataclass(frozen=True, eq=False)
class Material:
    """What is known of how a face looks: its base colour, which a texture and the vertices' colours multiply."""

    name: str = ""
    color: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """Red, green, blue (linear) and alpha."""
    image: Tensor | None = None
    """uint8 [H, W, 4], sRGB and alpha; the first row is v = 0."""
    alpha_cutoff: float | None = None
    """Where alpha is lower there is nothing (glTF's MASK); None: opaque."""
    double_sided: bool = False
    wrap: tuple[Wrap, Wrap] = ("repeat", "repeat")
    """What lies beyond the texture's borders, across and down."""


@dataclass(frozen=True)
class Source:
    """Which file a model was read from, and at which moment of it."""

    name: str
    """The file's own name, without folders, as it can be written in UTF-8."""
    format: ModelFormat
    sha256: str
    """Of the file's bytes; of the tensors where there is no file."""
    clip: str | None = None
    """The animation that poses it; None: at rest."""
    time: float = 0.0
    """Seconds into the clip."""


@dataclass(frozen=True)
class Part:
    """A primitive of a glTF scene, and which of the model's vertices are its own, in its own order."""

    node: int
    mesh: int
    primitive: int
    first: int
    """Its first vertex in the model."""
    count: int
    """How many vertices it has."""


@dataclass(frozen=True, eq=False)
class Model:
    """A mesh of others, in its file's own frame and units, as it stands at one moment."""

    mesh: Mesh
    """All triangles of the scene; the vertices as the file has them, none merged. `uv` may lie outside [0, 1], `colors`
    are sRGB, `texture` is None: images belong to materials."""
    materials: tuple[Material, ...]
    face_material: Tensor
    """[M] int64, places in `materials`."""
    source: Source
    parts: tuple[Part, ...] = ()
    """Where the vertices come from in a glTF file; () for all other formats."""
    notes: tuple[str, ...] = ()
    """Sentences for people: what was left out, or taken for something else."""
    file: Gltf | None = None
    """The glTF file itself, which motion is written back into; None for all other formats."""

    def __post_init__(self) -> None:
        if not len(self.mesh.faces):
            raise MeshError(f"{self.source.name} has no faces: export it with its surface, not as points or lines")
        if self.face_material.shape != self.mesh.faces.shape[:1]:
            raise MeshError(f"{self.source.name}: each face needs a material, got {list(self.face_material.shape)}")
        if not (0 <= int(self.face_material.min()) and int(self.face_material.max()) < len(self.materials)):
            raise MeshError(f"{self.source.name}: faces name materials that are not there")


@dataclass(frozen=True)
class Placement:
    """Where a model stands in the world (z up, front +x): world = rotation (place - center) * scale."""

    rotation: Rows
    center: tuple[float, float, float]
    scale: float

    def to_world(self, points: Tensor) -> Tensor:
        """Points [..., 3] of the file's frame in the world."""
        return ((points - points.new_tensor(self.center)) @ points.new_tensor(self.rotation).mT) * self.scale

    def from_world(self, points: Tensor) -> Tensor:
        """Points [..., 3] of the world in the file's frame."""
        return self.directions_from_world(points) + points.new_tensor(self.center)

    def directions_from_world(self, ways: Tensor) -> Tensor:
        """Differences [..., 3] of places of the world in the file's frame."""
        return (ways / self.scale) @ ways.new_tensor(self.rotation)


@dataclass(frozen=True)
class MeshOrigin:
    """What a scene that was made from a mesh keeps of it, so that its motion finds the way back."""

    source: Source
    placement: Placement


def place(
    model: Model, up: Up | None = None, front: Front | None = None, size: float = SIZE, radius: float = 1.0
) -> Placement:
    """Put a model into the middle of a scene's box [-radius, radius]^3.

    Args:
        up, front: axes of the file. `up` None: z in PLY and STL, else y; `front` None: +z where y is up (as in glTF),
            +x where z is.
        size: share of the box's side that the object's longest side takes, or its diagonal the square root of 2 times
            that, whichever is smaller: so a cube, too, is seen whole from everywhere.
    """
    up = up or ("z" if model.source.format in ("ply", "stl") else "y")
    front = front or ("+z" if up == "y" else "+x")
    axes = {"x": 0, "y": 1, "z": 2}
    if up not in ("y", "z") or front[-1:] not in axes or front[:-1] not in ("+", "-"):
        raise MeshError(f"up must be y or z and front one of +x, -x, +y, -y, +z, -z, got {up!r} and {front!r}")
    if front[-1] == up:
        raise MeshError(f"front {front} and up {up} are one axis: choose another front")
    if not 0 < size <= 1:
        raise MeshError(f"size must lie in (0, 1], got {size:g}")
    ahead, above = torch.zeros(3), torch.zeros(3)
    ahead[axes[front[-1]]] = 1.0 if front[0] == "+" else -1.0
    above[axes[up]] = 1.0
    rotation = torch.stack((ahead, torch.linalg.cross(above, ahead), above))  # rows: the world's axes in the file
    used = model.mesh.vertices[model.mesh.faces.unique()].double()
    low, high = used.amin(0), used.amax(0)
    extent = max(float((high - low).max()), float((high - low).norm()) / 2**0.5)
    if not extent:
        raise MeshError(f"{model.source.name} is 0 long: it has no size to scale by")
    if not _SMALLEST < extent < _LARGEST:
        much = "small" if extent < 1 else "large"
        raise MeshError(f"{model.source.name} is {extent:g} long, which is too {much}: scale it, and save it again")
    middle = ((low + high) / 2).tolist()
    rows = rotation.tolist()
    return Placement(
        (tuple(rows[0]), tuple(rows[1]), tuple(rows[2])),
        (middle[0], middle[1], middle[2]),
        size * 2 * radius / extent,
    )
