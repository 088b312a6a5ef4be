"""Meshes of others: read, placed into a scene's box, and given motion."""

from .read import READ_FORMATS, read_model
from .record import Front, Material, MeshOrigin, Model, ModelFormat, Part, Placement, Source, Up, Wrap, place
from .tensors import model_from_tensors

__all__ = [
    "READ_FORMATS",
    "Front",
    "Material",
    "MeshOrigin",
    "Model",
    "ModelFormat",
    "Part",
    "Placement",
    "Source",
    "Up",
    "Wrap",
    "model_from_tensors",
    "place",
    "read_model",
]
