"""Meshes of others: read, placed into a scene's box, and given motion."""

from .beside import files_beside
from .glb import GltfOptions
from .patch import MovingGlb, moving_glb
from .read import READ_FORMATS, read_model
from .record import Front, Material, MeshOrigin, Model, ModelFormat, Part, Placement, Source, Up, Wrap, place
from .tensors import model_from_tensors

__all__ = [
    "READ_FORMATS",
    "Front",
    "GltfOptions",
    "Material",
    "MeshOrigin",
    "Model",
    "ModelFormat",
    "MovingGlb",
    "Part",
    "Placement",
    "Source",
    "Up",
    "Wrap",
    "files_beside",
    "model_from_tensors",
    "moving_glb",
    "place",
    "read_model",
]
