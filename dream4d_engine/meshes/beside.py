"""Which files beside a model it names, so that a change of one of them is noticed without making a mesh of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..documents import as_object, parse_document
from ..mesh import MeshError
from .container import document_of, path_beside, read_bytes
from .mtl import find_beside, libraries_beside, texture_names

_PLY_HEADER = 2**20  # bytes in which it ends
_MTLLIB = re.compile(rb"(?:\A(?:\xef\xbb\xbf)?|[\r\n])[ \t]*mtllib[ \t]+([^\r\n]+)")
_TEXTURE = re.compile(rb"^[ \t]*comment[ \t]+TextureFile[ \t]+([^\r\n]+)", re.MULTILINE)


def files_beside(path: Path) -> list[Path]:
    """The buffers, materials and textures that a model's file names, as far as they are there; [] where it is damaged.

    Each once, in the order in which they are named.
    """
    form = path.suffix.lower().removeprefix(".")
    named = {"glb": _of_gltf, "gltf": _of_gltf, "obj": _of_obj, "ply": _of_ply}.get(form)
    try:
        return [] if named is None else list(dict.fromkeys(named(path)))
    except (OSError, ValueError):
        return []


def _of_gltf(path: Path) -> Iterator[Path]:
    tree = as_object(parse_document(document_of(path), path.name, MeshError), path.name, MeshError)
    for kind in ("buffers", "images"):
        entries: Any = tree.get(kind)
        for entry in entries if isinstance(entries, list) else ():
            uri: Any = entry.get("uri") if isinstance(entry, dict) else None
            if isinstance(uri, str) and uri[:5].lower() != "data:":
                try:
                    found = path_beside(path.name, path.absolute().parent, uri, kind)
                except MeshError:  # said where the model is read
                    continue
                if found.is_file():
                    yield found


def _of_obj(path: Path) -> Iterator[Path]:
    for said in _MTLLIB.findall(read_bytes(path)):
        for _, library in libraries_beside(path, b" ".join(said.split()).decode("utf-8", "replace")):
            if library is not None:
                yield library
                yield from filter(None, (find_beside(path, name) for name in texture_names(library)))


def _of_ply(path: Path) -> Iterator[Path]:
    with open(path, "rb") as file:
        header = file.read(_PLY_HEADER).partition(b"end_header")[0]
    names = (name.decode("ascii", "replace").strip() for name in _TEXTURE.findall(header))
    yield from filter(None, (find_beside(path, name) for name in names))
