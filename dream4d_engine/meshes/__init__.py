"""Meshes of others: read, placed into a scene's box, and given motion."""

from .record import Front, Material, MeshOrigin, Model, ModelFormat, Part, Placement, Source, Up, Wrap, place

__all__ = [
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
    "place",
]
