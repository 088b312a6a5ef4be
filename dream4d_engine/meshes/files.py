"""OBJ, PLY and STL files as models: the vertices in the files' own order, and what they look like.

Read here rather than by a library, since those at hand reorder vertices, resolve counting from the end of a list
wrongly in the middle of a file, and take memory for what a header claims before they look whether it is there.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..documents import as_text, describe
from ..mesh import Mesh, MeshError
from .container import read_bytes, require_form
from .gltf import MOST_FACES, MOST_VERTICES
from .mtl import image_beside, read_mtl
from .polygons import cut_concave
from .record import Material, Model, Source

if TYPE_CHECKING:
    import numpy as np


def read_plain_model(path: Path, form: Literal["obj", "ply", "stl"]) -> Model:
    """Read an OBJ, PLY or STL file. Raises MeshError where there is no model to be had."""
    data = read_bytes(path)
    if form != "stl" or not _is_binary_stl(data):  # which may begin as it likes
        require_form(data, path, form)
    readers: dict[str, Callable[[bytes, Path], _Read]] = {"obj": _read_obj, "ply": _read_ply, "stl": _read_stl}
    try:
        read = readers[form](data, path)
    except (ValueError, IndexError, OverflowError) as error:
        if isinstance(error, MeshError):
            raise
        raise MeshError(f"{path.name} is damaged, or no {form.upper()} file: {error}") from error
    if not len(read.faces):
        raise MeshError(f"{path.name} has no faces: export it with its surface, not as points or lines")
    if read.normals is not None and not bool(read.normals.isfinite().all()):
        read.normals = None  # of faces without an area; they can be had anew
        read.notes.append("its normals hold numbers that are not finite: they were made anew")
    for name in ("vertices", "uv", "colors"):
        values = getattr(read, name)
        if values is not None and not bool(values.isfinite().all()):
            raise MeshError(f"{path.name}: its {name} hold numbers that are not finite: export the model anew")
    low, high = int(read.faces.min()), int(read.faces.max())
    if low < 0 or high >= len(read.vertices):
        wrong = low if low < 0 else high
        raise MeshError(f"{path.name}: a face names vertex {wrong:,} of {len(read.vertices):,}: the file is damaged")
    if read.polygons is not None:
        cut_concave(read.vertices.numpy(), read.faces.numpy(), read.polygons)
    colors = None if read.colors is None else read.colors.clamp(0, 1)
    mesh = Mesh(read.vertices, read.faces, read.normals, colors, read.uv)
    of_face = torch.zeros(len(read.faces), dtype=torch.int64) if read.of_face is None else read.of_face
    source = Source(as_text(path.name), form, hashlib.sha256(data).hexdigest())
    return Model(mesh, tuple(read.materials), of_face, source, (), tuple(dict.fromkeys(read.notes)))


@dataclass
class _Read:
    """What a file held."""

    vertices: Tensor
    faces: Tensor
    uv: Tensor | None = None
    colors: Tensor | None = None
    normals: Tensor | None = None
    of_face: Tensor | None = None
    polygons: np.ndarray | None = None
    """[P, 2] runs of faces that are fans of one polygon: the first one, and how many."""
    materials: list[Material] = field(default_factory=lambda: [Material("default", double_sided=True)])
    notes: list[str] = field(default_factory=list)


# ---- OBJ ---------------------------------------------------------------------------------------------------------


@dataclass
class _Obj:
    """Lists of an OBJ as they grow."""

    places: array = field(default_factory=lambda: array("d"))  # 3 each
    colors: array = field(default_factory=lambda: array("d"))  # 3 each, or none
    uv: array = field(default_factory=lambda: array("d"))  # 2 each
    normals: array = field(default_factory=lambda: array("d"))  # 3 each
    corners: array = field(default_factory=lambda: array("q"))  # 9 a face: place, uv, normal of each corner; -1: none
    of_face: array = field(default_factory=lambda: array("q"))
    polygons: array = field(default_factory=lambda: array("q"))  # 2 each, as in `_Read`
    names: dict[str, int] = field(default_factory=lambda: {"": 0})
    """Of the materials that faces name, with their numbers."""
    material: int = 0
    libraries: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _read_obj(data: bytes, path: Path) -> _Read:
    import numpy as np

    obj = _Obj()
    for number, line in enumerate(
        data.removeprefix(b"\xef\xbb\xbf").replace(b"\\\r\n", b" ").replace(b"\\\n", b" ").splitlines(), 1
    ):
        try:
            _add_line(obj, line.split())
        except (ValueError, IndexError) as error:
            said = describe(line.decode("utf-8", "replace"))
            raise MeshError(f"{path.name}: line {number} can't be understood: {said}") from error
        if len(obj.places) > 3 * MOST_VERTICES or len(obj.of_face) > MOST_FACES:
            raise MeshError(f"{path.name} has more than {MOST_VERTICES:,} vertices or faces: reduce it first")
    places = np.array(obj.places, "f8").reshape(-1, 3)
    corners = np.array(obj.corners, "i8").reshape(-1, 3)
    counts = (("v", len(places)), ("vt", len(obj.uv) // 2), ("vn", len(obj.normals) // 3))
    for column, (what, count) in enumerate(counts):
        if len(corners) and int(corners[:, column].max()) >= count:
            raise MeshError(f"{path.name}: a face names {what} {int(corners[:, column].max()) + 1:,} of {count:,}")
    read = _joined(places, corners, obj)
    read.of_face = torch.from_numpy(np.array(obj.of_face, "i8"))
    read.polygons = np.array(obj.polygons, "i8").reshape(-1, 2)
    read.notes += obj.notes
    known = {name: m for library in obj.libraries for name, m in read_mtl(path, library, read.notes).items()}
    if read.colors is not None and known and bool((read.colors != read.colors[0]).any()):
        # they say more than a material's one colour, and many programs write a grey one beside them
        known = {name: replace(material, color=(1.0, 1.0, 1.0, 1.0)) for name, material in known.items()}
        read.notes.append("the vertices' colours stand in place of the materials' (Kd)")
    missing = [name for name in obj.names if name and name not in known]
    if missing:
        read.notes.append(f"the material {missing[0]} is not described in any .mtl: it is shown white")
    read.materials = [known.get(name, Material(name or "default", double_sided=True)) for name in obj.names]
    return read


def _add_line(obj: _Obj, words: list[bytes]) -> None:
    """Take over what a line of an OBJ says."""
    key = words[0] if words else b""
    if key in (b"v", b"vn", b"vt", b"f") and any(b"#" in word for word in words):
        words = b" ".join(words).partition(b"#")[0].split()
    if key in (b"v", b"vn"):
        if len(words) < 4:
            raise ValueError("three numbers are missing")
        (obj.places if key == b"v" else obj.normals).extend(map(float, words[1:4]))
        if key == b"v" and len(words) >= 7:
            obj.colors.extend(map(float, words[4:7]))
    elif key == b"vt":
        obj.uv.extend((float(words[1]), float(words[2]) if len(words) > 2 else 0.0))
    elif key == b"f":
        _add_face(obj, words[1:])
    elif key == b"usemtl":
        obj.material = obj.names.setdefault(b" ".join(words[1:]).decode("utf-8", "replace"), len(obj.names))
    elif key == b"mtllib":
        obj.libraries.append(b" ".join(words[1:]).decode("utf-8", "replace"))
    elif key in (b"l", b"p"):
        obj.notes.append("points and lines were left out")


def _add_face(obj: _Obj, words: list[bytes]) -> None:
    """Add a polygon as a fan; places are counted from 1, or from the end of what there is so far."""
    if len(words) < 3:
        raise ValueError("a face needs three corners")
    counts = (len(obj.places) // 3, len(obj.uv) // 2, len(obj.normals) // 3)
    corners = []
    for word in words:
        parts = word.split(b"/")
        corner = [-1, -1, -1]
        for column, part in enumerate(parts[:3]):
            if part:
                index = int(part)
                corner[column] = index - 1 if index > 0 else counts[column] + index
                if index == 0 or corner[column] < 0:
                    raise ValueError(f"there is no {index}")
        if corner[0] < 0:
            raise ValueError("a corner without a place")
        corners.append(corner)
    if len(corners) > 3:
        obj.polygons.extend((len(obj.of_face), len(corners) - 2))
    for k in range(1, len(corners) - 1):
        obj.corners.extend((*corners[0], *corners[k], *corners[k + 1]))
        obj.of_face.append(obj.material)


def _joined(places: np.ndarray, corners: np.ndarray, obj: _Obj) -> _Read:
    """One list of vertices, in the places' order, where those of a face have own coordinates or normals several."""
    import numpy as np

    if len(corners) and int(corners[:, 2].min()) < 0:  # normals of some corners alone are none
        corners = corners.copy()
        corners[:, 2] = -1
    unused = np.setdiff1d(np.arange(len(places)), corners[:, 0])
    alone = np.stack((unused, np.full_like(unused, -1), np.full_like(unused, -1)), 1)
    rows, inverse = np.unique(np.concatenate((corners, alone)), axis=0, return_inverse=True)
    faces = inverse.reshape(-1)[: len(corners)].reshape(-1, 3)
    read = _Read(_tensor(places[rows[:, 0]]), torch.from_numpy(np.ascontiguousarray(faces)))
    if len(obj.colors) == 3 * len(places) and len(places):
        read.colors = _shares(np.frombuffer(obj.colors, "f8").reshape(-1, 3)[rows[:, 0]], read.notes)
    if len(obj.uv) and bool((rows[:, 1] >= 0).any()):
        uv = np.concatenate((np.frombuffer(obj.uv, "f8").reshape(-1, 2), [[0.0, 1.0]]))[rows[:, 1]]
        read.uv = _tensor(np.stack((uv[:, 0], 1 - uv[:, 1]), 1))  # OBJ counts from the lower edge
    if len(obj.normals) and len(corners) and int(corners[:, 2].min()) >= 0:
        normals = np.concatenate((np.frombuffer(obj.normals, "f8").reshape(-1, 3), [[0.0, 0.0, 1.0]]))[rows[:, 2]]
        read.normals = torch.nn.functional.normalize(_tensor(normals), dim=-1)
    return read


def _shares(colors: np.ndarray, notes: list[str]) -> Tensor:
    """Colours [V, 3] that a file gives as floats: of 1, or of 255 as some programs write them."""
    import numpy as np

    if np.isfinite(colors).all() and 1.5 < colors.max() <= 255:
        notes.append("its vertices' colours reach beyond 1: they were taken as shares of 255")
        colors = colors / 255
    return _tensor(colors)


def _tensor(values: np.ndarray) -> Tensor:
    import numpy as np

    with np.errstate(over="ignore"):  # what is too large is found as infinite
        there = np.ascontiguousarray(values, "f4")
    return torch.from_numpy(there if there.flags.writeable else there.copy())  # not the file's own bytes


# ---- PLY ---------------------------------------------------------------------------------------------------------

_PLY = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4"}
_PLY |= {"double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"}
_PLY |= {"float32": "f4", "float64": "f8"}


@dataclass
class _Element:
    """A list of a PLY file: its properties are (name, type, None), lists (name, type, type of their length)."""

    name: str
    count: int
    properties: list[tuple[str, str, str | None]] = field(default_factory=list)


def _read_ply(data: bytes, path: Path) -> _Read:
    import numpy as np

    form, elements, texture, body = _ply_header(data, path)
    columns: dict[str, np.ndarray] = {}
    faces: np.ndarray = np.zeros((0, 3), "i8")
    polygons: np.ndarray = np.zeros((0, 2), "i8")
    notes: list[str] = []
    read_rows = _AsciiRows(body, path) if form == "ascii" else _BinaryRows(body, path, ">" if "big" in form else "<")
    for element in elements:
        if element.name == "vertex":
            columns = read_rows.table(element)
        elif element.name == "face":
            faces = read_rows.faces(element)
            polygons = np.array(read_rows.polygons, "i8").reshape(-1, 2)
            if {"red", "diffuse_red"} & {name for name, _, _ in element.properties}:
                notes.append("the colours of its faces were left out: only those of vertices are read")
            break
        else:
            read_rows.table(element)
    if not all(axis in columns for axis in "xyz"):
        raise MeshError(f"{path.name}: its vertices have no x, y and z: it is damaged")
    read = _Read(_tensor(np.stack([columns[axis] for axis in "xyz"], 1)), torch.from_numpy(faces))
    read.polygons, read.notes = polygons, notes
    for names in (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b")):
        if read.colors is None and all(name in columns for name in names):
            colors = np.stack([columns[name] for name in names], 1)
            whole = colors.dtype.kind in "ui"
            read.colors = _tensor(colors / np.iinfo(colors.dtype).max) if whole else _shares(colors, read.notes)
    if all(name in columns for name in ("nx", "ny", "nz")):
        normals = _tensor(np.stack([columns[name] for name in ("nx", "ny", "nz")], 1))
        read.normals = torch.nn.functional.normalize(normals, dim=-1)
    for u, v in (("s", "t"), ("u", "v"), ("texture_u", "texture_v")):
        if u in columns and v in columns:
            read.uv = _tensor(np.stack((columns[u], 1 - columns[v]), 1))  # counted from the lower edge
    if texture and read.uv is not None:
        image = image_beside(path, texture, read.notes)
        read.materials = [Material("default", image=image, double_sided=True)]
    elif texture:
        read.notes.append("its texture was left out: the vertices have no coordinates in it (s and t)")
    return read


def _ply_header(data: bytes, path: Path) -> tuple[str, list[_Element], str, memoryview]:
    end = re.search(rb"end_header[ \t]*\r?\n", data[: 2**20])
    if not data.startswith(b"ply") or end is None:
        raise MeshError(f"{path.name} is no PLY file: it has no header that ends in end_header")
    form, texture, elements = "", "", []
    for line in data[: end.start()].decode("ascii", "replace").splitlines():
        words = line.split()
        if words[:1] == ["format"]:
            form = words[1]
        elif words[:2] == ["comment", "TextureFile"]:
            texture = line.split(None, 2)[2].strip() if len(words) > 2 else ""
        elif words[:1] == ["element"]:
            most = MOST_VERTICES if words[1] == "vertex" else 2 * MOST_FACES
            if not 0 <= int(words[2]) <= most:
                raise MeshError(f"{path.name}: its header says {words[2]} of {words[1]}, at most {most:,} are read")
            elements.append(_Element(words[1], int(words[2])))
        elif words[:1] == ["property"]:
            length = words[2] if words[1] == "list" else None
            kind = words[3] if length else words[1]
            if kind not in _PLY or (length is not None and _PLY.get(length, "f")[0] == "f"):
                raise MeshError(f"{path.name}: its header has a property of an unknown type: {describe(line)}")
            elements[-1].properties.append((words[-1], kind, length))
    if form not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise MeshError(f"{path.name}: its format is {describe(form)}, which is none of PLY's")
    return form, elements, texture, memoryview(data)[end.end() :]


class _BinaryRows:
    """The elements of a binary PLY, one after the other."""

    def __init__(self, body: memoryview, path: Path, order: str) -> None:
        self.body, self.path, self.order, self.at = body, path, order, 0
        self.polygons = array("q")  # 2 each, as in `_Read`

    def _take(self, n_bytes: int, what: str) -> memoryview:
        left = len(self.body) - self.at
        if n_bytes > left:
            raise MeshError(f"{self.path.name}: its {what} need {n_bytes:,} bytes, {left:,} are left: is it complete?")
        self.at += n_bytes
        return self.body[self.at - n_bytes : self.at]

    def table(self, element: _Element, lengths: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
        """All rows by property; `lengths`: of the lists in it, the same in all rows."""
        import numpy as np

        kinds: list[Any] = []
        waiting = list(lengths)
        for number, (name, kind, length) in enumerate(element.properties):
            if length is None:
                kinds.append((name, self.order + _PLY[kind]))
            elif waiting:
                kinds += [(f"n{number}", self.order + _PLY[length]), (name, self.order + _PLY[kind], (waiting.pop(0),))]
            else:
                raise MeshError(f"{self.path.name}: {element.name} has lists, which only faces may have")
        dtype = np.dtype(kinds)
        rows = np.frombuffer(self._take(element.count * dtype.itemsize, element.name), dtype)
        return {name: rows[name] for name in dtype.names or ()}

    def faces(self, element: _Element) -> np.ndarray:
        """Triangles [M, 3]: polygons as fans."""
        import numpy as np

        lists = [number for number, (_, _, length) in enumerate(element.properties) if length is not None]
        place = next((n for n in lists if element.properties[n][0] in ("vertex_indices", "vertex_index")), None)
        if place is None:
            raise MeshError(f"{self.path.name}: its faces have no vertex_indices: export it as triangles")
        start = self.at
        if lists == [place]:
            try:
                rows = self.table(element, (3,))
                if (rows[f"n{place}"] == 3).all():
                    return rows[element.properties[place][0]].astype("i8")
            except MeshError:  # shorter than if all were triangles: not even that many corners
                pass
        self.at, found = start, array("q")
        sizes = [(_PLY[kind], None if length is None else _PLY[length]) for _, kind, length in element.properties]
        for _ in range(element.count):
            for number, (kind, length) in enumerate(sizes):
                n = 1 if length is None else int(self._numbers(length, 1)[0])
                corners = self._numbers(kind, n)
                if number == place:
                    if n > 3:
                        self.polygons.extend((len(found) // 3, n - 2))
                    for k in range(1, n - 1):
                        found.extend((int(corners[0]), int(corners[k]), int(corners[k + 1])))
            if len(found) > 3 * MOST_FACES:
                raise MeshError(f"{self.path.name} has more than {MOST_FACES:,} faces: reduce it first")
        return np.array(found, "i8").reshape(-1, 3)

    def _numbers(self, kind: str, count: int) -> np.ndarray:
        import numpy as np

        dtype = np.dtype(self.order + kind)
        if count < 0:
            raise MeshError(f"{self.path.name}: a list of {count} numbers: the file is damaged")
        return np.frombuffer(self._take(dtype.itemsize * count, "faces"), dtype)


class _AsciiRows:
    """The elements of a PLY in letters, likewise."""

    def __init__(self, body: memoryview, path: Path) -> None:
        self.lines, self.path, self.at = bytes(body).split(b"\n"), path, 0
        self.polygons = array("q")  # 2 each, as in `_Read`

    def _take(self, count: int, what: str) -> list[list[bytes]]:
        rows: list[list[bytes]] = []
        while len(rows) < count:
            if self.at >= len(self.lines):
                raise MeshError(f"{self.path.name}: it has {len(rows):,} rows of {what}, its header says {count:,}")
            words = self.lines[self.at].split()
            self.at += 1
            if words:
                rows.append(words)
        return rows

    def table(self, element: _Element) -> dict[str, np.ndarray]:
        import numpy as np

        rows = self._take(element.count, element.name)
        if any(length is not None for _, _, length in element.properties):
            return {}
        width = len(element.properties)
        values = np.array([row[:width] for row in rows], "f8").reshape(-1, width)
        return {name: values[:, k].astype(_PLY[kind]) for k, (name, kind, _) in enumerate(element.properties)}

    def faces(self, element: _Element) -> np.ndarray:
        import numpy as np

        found = array("q")
        for row in self._take(element.count, "face"):
            at = 0
            for name, _, length in element.properties:
                n = 1 if length is None else int(row[at])
                first = at if length is None else at + 1
                if length is not None and name in ("vertex_indices", "vertex_index"):
                    corners = [int(word) for word in row[first : first + n]]
                    if len(corners) != n:
                        raise MeshError(
                            f"{self.path.name}: a face says {n} corners and has {len(corners)}: it is damaged"
                        )
                    if n > 3:
                        self.polygons.extend((len(found) // 3, n - 2))
                    for k in range(1, n - 1):
                        found.extend((corners[0], corners[k], corners[k + 1]))
                at = first + n
        return np.array(found, "i8").reshape(-1, 3)


# ---- STL ---------------------------------------------------------------------------------------------------------


def _read_stl(data: bytes, path: Path) -> _Read:
    import numpy as np

    count = _stl_faces(data)
    if data.lstrip()[:5].lower() == b"solid" and not _is_binary_stl(data):
        words = re.findall(rb"vertex\s+(\S+)\s+(\S+)\s+(\S+)", data)
        places = np.array(words, "f8").reshape(-1, 3)
        if len(places) % 3:
            raise MeshError(f"{path.name} has {len(places):,} corners, which are no triangles: is it complete?")
    else:
        if len(data) < 84 + 50 * count:
            said = f"its header says {count:,} faces ({84 + 50 * count:,} bytes), there are {len(data):,} bytes"
            raise MeshError(f"{path.name}: {said}: is the download complete?")
        rows = np.frombuffer(data, np.dtype([("n", "<f4", 3), ("at", "<f4", (3, 3)), ("end", "<u2")]), count, 84)
        places = rows["at"].reshape(-1, 3)
    if len(places) > min(MOST_VERTICES, 3 * MOST_FACES):
        raise MeshError(f"{path.name} has more than {MOST_VERTICES // 3:,} faces: reduce it first")
    return _Read(_tensor(places), torch.arange(len(places)).view(-1, 3))


def _stl_faces(data: bytes) -> int:
    """How many faces a binary STL says that it has."""
    return int.from_bytes(data[80:84], "little")


def _is_binary_stl(data: bytes) -> bool:
    """Whether a file is as long as a binary STL says it is."""
    return len(data) == 84 + 50 * _stl_faces(data)
