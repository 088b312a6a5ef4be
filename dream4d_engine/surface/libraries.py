"""What meshes need that isn't installed with the rest."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..mesh import MeshError

_NEEDED = {
    "skimage.measure": "meshes need scikit-image",
    "fast_simplification": "fewer faces need fast-simplification",
    "xatlas": "textures need xatlas",
}


def library(name: str) -> Any:
    """Import one of the libraries; MeshError says what needs it, and how to have it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise MeshError(f'{_NEEDED[name]}: pip install "dream4d[mesh]"') from error


def check_libraries(faces: int, texture: int) -> None:
    """Raise MeshError, before the work, where a library is missing for a mesh of so many faces (0: all) and texels."""
    for name, asked in (("skimage.measure", True), ("fast_simplification", faces), ("xatlas", texture)):
        if asked:
            library(name)
