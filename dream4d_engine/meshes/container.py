"""glTF files as they are stored: the container, its document, buffers and accessors, each checked before it is read.

A number in brackets names a section of the glTF 2.0 specification. Everything that is wrong with a file is a MeshError
of one sentence with the file's name and the field's.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from ..documents import MOST_BYTES, as_object, describe, disguise, parse_document
from ..documents import field as plain_field
from ..mesh import MeshError

if TYPE_CHECKING:
    import numpy as np

MOST_FILE = 2**30
"""Bytes of one file, and of all buffers together."""
MOST_VALUES = 2**27
"""Numbers in one accessor: more than the vertices of any model that can be shown."""
COMPONENTS = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}  # [3.6.2.2]
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}

T = TypeVar("T")
Tree = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Gltf:
    """A glTF file in memory."""

    name: str
    """Of the file, for messages."""
    tree: Tree
    """Its JSON, as parsed."""
    buffers: tuple[bytes, ...]
    sha256: str
    """Of the file itself, without the files beside it."""
    chunk: bytes = b""
    """A GLB's binary chunk; also `buffers[0]` where that names no file."""
    folder: Path | None = None
    """Where the files beside it are."""
    cache: dict[int, np.ndarray] = field(default_factory=dict)

    # ---- the document

    def fault(self, where: str, what: str) -> MeshError:
        """An error that names the file and a field."""
        return MeshError(f"{self.name}: {where} {what}")

    def entries(self, kind: str) -> list[Any]:
        """A list of the document, such as "nodes"; empty where there is none."""
        return self.get(self.tree, kind, list, "the file", [])

    def entry(self, kind: str, index: object, said_by: str) -> Tree:
        """One object of such a list, which `said_by` names."""
        n = len(self.entries(kind))
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < n:
            raise self.fault(said_by, f"names {kind}[{describe(index)}], there are {n}: the file is damaged")
        return as_object(self.entries(kind)[index], f"{self.name}: {kind}[{index}]", MeshError)

    def get(self, tree: Tree, name: str, kind: type[T], where: str, default: T) -> T:
        """A field of an object, of one kind."""
        return plain_field(tree, name, kind, f"{self.name}: {where}", MeshError, default)

    def object_in(self, tree: Tree, name: str, where: str) -> Tree:
        """An object in an object; empty where there is none."""
        return as_object(tree.get(name) or {}, f"{self.name}: {where}.{name}", MeshError)

    def extension(self, tree: Tree, name: str, where: str) -> Tree | None:
        """An extension of an object, or None."""
        found = self.object_in(tree, "extensions", where)
        return as_object(found[name], f"{self.name}: {where}.extensions.{name}", MeshError) if name in found else None

    def numbers(self, tree: Tree, name: str, count: int, where: str, default: list[float]) -> list[float]:
        """A list of so many numbers."""
        values = self.get(tree, name, list, where, default)
        if len(values) != count:
            raise self.fault(f"{where}.{name}", f"must hold {count} numbers, got {len(values)}")
        return [self.get({name: value}, name, float, where, 0.0) for value in values]

    # ---- its numbers

    def view(self, index: object, said_by: str) -> tuple[memoryview, int]:
        """The bytes of a buffer view, and its stride (0: packed)."""
        view, where = self.entry("bufferViews", index, said_by), f"bufferViews[{index}]"
        self.entry("buffers", view.get("buffer"), f"{where}.buffer")
        start, length, stride = (
            self.get(view, name, int, where, 0) for name in ("byteOffset", "byteLength", "byteStride")
        )
        data = self.buffers[view["buffer"]]
        if start < 0 or length < 0 or start + length > len(data):
            raise self.fault(
                where, f"takes bytes {start:,} to {start + length:,} of a buffer of {len(data):,}: the file is damaged"
            )
        if stride and not 4 <= stride <= 252:
            raise self.fault(f"{where}.byteStride", f"must lie in [4, 252], got {stride}")
        return memoryview(data)[start : start + length], stride

    def accessor(self, index: object, said_by: str, kinds: tuple[str, ...]) -> np.ndarray:
        """The numbers [N, C] of an accessor: integers as they are, or as shares where it says `normalized`."""
        import numpy as np

        entry, where = self.entry("accessors", index, said_by), f"accessors[{index}]"
        kind, component = entry.get("type"), entry.get("componentType")
        if not isinstance(kind, str) or kind not in kinds:
            raise self.fault(f"{where}.type", f"must be {' or '.join(kinds)} for {said_by}, got {describe(kind)}")
        if isinstance(index, int) and index in self.cache:
            return self.cache[index]
        if not isinstance(component, int) or component not in COMPONENTS:
            raise self.fault(f"{where}.componentType", f"must be one of {', '.join(map(str, COMPONENTS))}")
        count, width = self.get(entry, "count", int, where, 0), WIDTHS[kind]
        if not 1 <= count * width <= MOST_VALUES:
            raise self.fault(f"{where}.count", f"must lie in [1, {MOST_VALUES // width:,}], got {count:,}")
        values = self._rows(entry, where, count, width, np.dtype(COMPONENTS[component]))
        if component == 5126 and not np.isfinite(values).all():
            raise self.fault(where, f"({said_by}) holds numbers that are not finite: export the model anew")
        if entry.get("normalized") and component != 5126:  # [3.6.2.2]
            values = np.maximum(values.astype("f4") / np.float32(np.iinfo(values.dtype).max), np.float32(-1))
        values.setflags(write=False)
        if isinstance(index, int):
            self.cache[index] = values
        return values

    def _rows(self, entry: Tree, where: str, count: int, width: int, dtype: np.dtype) -> np.ndarray:
        """An accessor's rows [count, width] as stored, dense or sparse [3.6.2.3]."""
        import numpy as np

        def packed(holder: Tree, place: str, rows: int, columns: int, kind: np.dtype) -> np.ndarray:
            data, stride = self.view(holder.get("bufferView"), f"{place}.bufferView")
            start = self.get(holder, "byteOffset", int, place, 0)
            row = columns * kind.itemsize
            stride = stride or row
            if start < 0 or stride < row or start + stride * (rows - 1) + row > len(data):
                raise self.fault(
                    place,
                    f"needs {start + stride * (rows - 1) + row:,} bytes of a view of {len(data):,}: it is damaged",
                )
            return np.ndarray((rows, columns), kind, data, start, (stride, kind.itemsize))

        sparse = self.object_in(entry, "sparse", where)
        if not sparse:
            if "bufferView" not in entry:
                return np.zeros((count, width), dtype)
            return packed(entry, where, count, width, dtype).copy()
        n, place = self.get(sparse, "count", int, f"{where}.sparse", 0), f"{where}.sparse"
        if not 1 <= n <= count:
            raise self.fault(f"{place}.count", f"must lie in [1, {count:,}], got {n:,}")
        indices, values = (self.object_in(sparse, name, place) for name in ("indices", "values"))
        component = indices.get("componentType")
        if component not in (5121, 5123, 5125):
            raise self.fault(f"{place}.indices.componentType", f"must be 5121, 5123 or 5125, got {describe(component)}")
        at = packed(indices, f"{place}.indices", n, 1, np.dtype(COMPONENTS[component]))[:, 0]
        if int(at.max()) >= count:
            raise self.fault(f"{place}.indices", f"name row {int(at.max()):,} of {count:,}: the file is damaged")
        rows = packed(values, f"{place}.values", n, width, dtype)
        out = (
            packed(entry, where, count, width, dtype).copy()
            if "bufferView" in entry
            else np.zeros((count, width), dtype)
        )
        out[at] = rows
        return out

    def file_beside(self, uri: str, where: str) -> Path:
        """The path of a file that a URI names, in the model's folder."""
        return path_beside(self.name, self.folder, uri, where)


def path_beside(name: str, folder: Path | None, uri: str, where: str) -> Path:
    """The path of a file that another one, `name`, names by a URI; it must lie in the same folder or below."""
    where = f"{name}: {where}"
    try:
        elsewhere = bool(urlsplit(uri).scheme) or uri.startswith(("//", "\\\\"))
    except ValueError:  # half of an address
        elsewhere = True
    if elsewhere:
        raise MeshError(f"{where} leads to {describe(uri)}, nothing is fetched from elsewhere: save the model as GLB")
    if folder is None:
        raise MeshError(f"{where} names the file {describe(uri)}, there is no folder to look in: use a GLB")
    plain = unquote(uri).replace("\\", "/")
    try:
        path, base = (folder / plain).resolve(), folder.resolve()
        path.is_file()  # a name that no disk takes
    except (OSError, ValueError, RuntimeError) as error:
        raise MeshError(f"{where} names no file: {describe(uri)}") from error
    if not path.is_relative_to(base):
        raise MeshError(f"{where} leads out of the model's folder: {describe(uri)}; save the model as GLB")
    return path


def read_bytes(path: Path, most: int = MOST_FILE) -> bytes:
    """A whole file, no larger than `most`."""
    try:
        if path.is_dir():
            raise MeshError(f"{path} is a folder: name the model's file in it")
        if not path.is_file():
            raise MeshError(f"{path} " + ("is no regular file" if path.exists() else "does not exist"))
        size = path.stat().st_size
        if size > most:
            raise MeshError(f"{path} has {size:,} bytes, more than {most:,}: save a smaller model")
        return path.read_bytes()
    except OSError as error:
        raise MeshError(f"{path} can't be read: {error.strerror or error}") from error


_AS_GLB = "open it in a program for models, and export it as GLB"
_OTHER_FORMATS = {
    b"Kaydara FBX": f"is an FBX file: {_AS_GLB}",
    b"; FBX": f"is an FBX file: {_AS_GLB}",
    b"BLENDER": "is a file of Blender: open it there, and export it as GLB",
    b"#usda": f"is a USD file: {_AS_GLB}",
    b"PXR-USDC": f"is a USD file: {_AS_GLB}",
    b"PK\x03\x04": f"is an archive, as those of USDZ and 3MF are: unpack it, or {_AS_GLB}",
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd), as files of Blender are: open it there, and export it as GLB",
    b"\xff\xfe": "is text in UTF-16: save it in UTF-8",
    b"\xfe\xff": "is text in UTF-16: save it in UTF-8",
}
_OWN_BEGINNINGS = {b"glTF": "glb", b"ply\n": "ply", b"ply\r": "ply"}
"""How files of the formats that are read begin; the others begin as they like."""


def require_form(data: bytes, path: Path, *forms: str) -> None:
    """Raise MeshError for a file's bytes that are of none of these formats, with what they are."""
    strange = disguise(data[:512])
    if strange is None:
        others = (what for start, what in _OTHER_FORMATS.items() if data.startswith(start))
        own = (form for start, form in _OWN_BEGINNINGS.items() if data.startswith(start) and form not in forms)
        named = (f"is a file of {form.upper()} under another name: let its name end in .{form}" for form in own)
        strange = next(others, None) or next(named, None)
    if strange is not None:
        raise MeshError(f"{path} {strange}")


def read_gltf(path: Path) -> Gltf:
    """Read a .glb or .gltf file and the buffers that it names; which of the two it is its first bytes say."""
    data, name = read_bytes(path), path.name
    require_form(data, path, "glb", "gltf")
    text, chunk = _chunks(data, name) if data[:4] == b"glTF" else (data, b"")
    if len(text) > MOST_BYTES["JSON"]:
        most = MOST_BYTES["JSON"]
        raise MeshError(f"{name} holds {len(text):,} bytes of JSON, more than {most:,}: save the model as GLB")
    tree = as_object(parse_document(bytes(text), name, MeshError), name, MeshError)
    tree = _without_null(tree)
    file = Gltf(name, tree, (), hashlib.sha256(data).hexdigest(), bytes(chunk), path.absolute().parent)
    version = file.get(file.object_in(tree, "asset", "the file"), "version", str, "asset", "")
    if version.split(".")[0] != "2":
        raise file.fault("asset.version", f"is {describe(version)}, this program reads glTF 2: save the model as that")
    whole = Gltf(name, tree, _buffers(file), file.sha256, file.chunk, file.folder)
    _check_lists(whole)
    return whole


def document_of(path: Path) -> bytes:
    """The JSON of a .glb or .gltf file; of a GLB nothing else is read."""
    with open(path, "rb") as file:
        head = file.read(20)
        if head[:4] != b"glTF" or len(head) < 20:
            return head + file.read(MOST_BYTES["JSON"])
        return file.read(min(struct.unpack_from("<I", head, 12)[0], MOST_BYTES["JSON"]))


def _without_null(tree: Any) -> Any:
    """The document without what is null, which says as much as what is missing; `extras` are the user's own."""
    if isinstance(tree, dict):
        return {k: v if k == "extras" else _without_null(v) for k, v in tree.items() if v is not None}
    return [_without_null(value) for value in tree] if isinstance(tree, list) else tree


_LISTS = (
    "accessors",
    "animations",
    "bufferViews",
    "images",
    "materials",
    "meshes",
    "nodes",
    "scenes",
    "skins",
    "textures",
)


def _check_lists(file: Gltf) -> None:
    """Make sure that also what is not shown is what it should be: motion is written back into the whole of the file."""
    for kind in ("extensionsUsed", "extensionsRequired"):
        for index, name in enumerate(file.entries(kind)):
            if not isinstance(name, str):
                raise file.fault(f"{kind}[{index}]", f"must be a name, got {describe(name)}")
    for kind in _LISTS:
        for index in range(len(file.entries(kind))):
            file.object_in(file.entry(kind, index, "the file"), "extensions", f"{kind}[{index}]")
    for index in range(len(file.entries("bufferViews"))):
        file.view(index, "the file")
    for index in range(len(file.entries("accessors"))):
        count = file.get(file.entry("accessors", index, "the file"), "count", int, f"accessors[{index}]", 0)
        if not 1 <= count <= MOST_VALUES:
            raise file.fault(f"accessors[{index}].count", f"must lie in [1, {MOST_VALUES:,}], got {count:,}")
    for index in range(len(file.entries("images"))):
        file.get(file.entry("images", index, "the file"), "uri", str, f"images[{index}]", "")
    for index in range(len(file.entries("nodes"))):
        node = file.entry("nodes", index, "the file")
        for name, kind in (("mesh", "meshes"), ("skin", "skins")):
            if node.get(name) is not None:
                file.entry(kind, node[name], f"nodes[{index}].{name}")
    for index in range(len(file.entries("meshes"))):
        _check_mesh(file, file.entry("meshes", index, "the file"), f"meshes[{index}]")


def _check_mesh(file: Gltf, mesh: Tree, where: str) -> None:
    counts = set()
    for number, primitive in enumerate(file.get(mesh, "primitives", list, where, [])):
        place = f"{where}.primitives[{number}]"
        shape = as_object(primitive, f"{file.name}: {place}", MeshError)
        file.object_in(shape, "extensions", place)
        targets = file.get(shape, "targets", list, place, [])
        counts.add(len(targets))
        holders = [file.object_in(shape, "attributes", place)]
        holders += [as_object(target, f"{file.name}: {place}.targets", MeshError) for target in targets]
        if "POSITION" not in holders[0]:
            raise file.fault(f"{place}.attributes", "has no POSITION: the file is damaged")
        n = file.entry("accessors", holders[0]["POSITION"], f"{place}: POSITION")["count"]
        for holder in holders:
            for name, accessor in holder.items():
                rows = file.entry("accessors", accessor, f"{place}: {name}")["count"]
                if rows != n:  # [3.7.2.1]
                    raise file.fault(f"{place}: {name}", f"has {rows:,} rows for {n:,} vertices: the file is damaged")
    if len(counts) > 1:  # [3.7.2.2]
        raise file.fault(where, "has primitives of different numbers of targets: the file is damaged")


def _chunks(data: bytes, name: str) -> tuple[memoryview, memoryview]:
    """A GLB's document and binary chunk [4.4]."""
    whole = memoryview(data)
    if len(data) < 20:
        raise MeshError(f"{name} is cut off after {len(data)} bytes: is the download complete?")
    version, length = struct.unpack_from("<II", data, 4)
    if version != 2:
        raise MeshError(f"{name}: the header says version {version}, this program reads glTF 2: save the model as that")
    if length > len(data):
        raise MeshError(f"{name}: the header says {length:,} bytes, there are {len(data):,}: is the download complete?")
    found: list[tuple[bytes, memoryview]] = []
    at = 12
    while at + 8 <= length and len(found) < 2:
        size, kind = struct.unpack_from("<I4s", data, at)
        if at + 8 + size > length:
            raise MeshError(
                f"{name}: chunk {len(found)} says {size:,} bytes, {length - at - 8:,} are left: it is damaged"
            )
        found.append((kind, whole[at + 8 : at + 8 + size]))
        at += 8 + size
    if not found or found[0][0] != b"JSON":
        raise MeshError(f"{name}: its first chunk is not JSON: it is no GLB file")
    binary = found[1][1] if len(found) > 1 and found[1][0] == b"BIN\0" else whole[:0]
    return found[0][1], binary


def _buffers(file: Gltf) -> tuple[bytes, ...]:
    """All buffers, none longer than it says [3.6.1]."""
    found: list[bytes] = []
    total = 0
    for index in range(len(file.entries("buffers"))):
        entry, where = file.entry("buffers", index, "the file"), f"buffers[{index}]"
        length = file.get(entry, "byteLength", int, where, 0)
        total += max(0, length)
        if not 1 <= length or total > MOST_FILE:
            raise file.fault(
                f"{where}.byteLength", f"says {length:,}, all together may have {MOST_FILE:,}: it can't be meant"
            )
        uri = file.get(entry, "uri", str, where, "")
        if not uri and index == 0:
            data = file.chunk
        elif not uri:
            raise file.fault(
                where,
                "has no uri, and only the first buffer can be in the file itself: save the model anew, uncompressed",
            )
        else:
            data = uri_bytes(file, uri, where, length)
        if len(data) < length:
            raise file.fault(where, f"says {length:,} bytes, there are {len(data):,}: is the download complete?")
        found.append(data[:length])
    return tuple(found)


def uri_bytes(file: Gltf, uri: str, where: str, most: int) -> bytes:
    """What a URI holds: a data URI in base64, or a file in the model's folder of at most about `most` bytes."""
    if uri[:5].lower() != "data:":
        return read_bytes(file.file_beside(uri, f"{where}.uri"), max(most * 2, 2**20))
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise file.fault(f"{where}.uri", f"is no data URI in base64: {describe(uri)}")
    if len(body) > 2 * most + 1024:
        raise file.fault(f"{where}.uri", f"holds {len(body):,} letters of base64 for {most:,} bytes: it can't be meant")
    try:
        return base64.b64decode(unquote(body), validate=True)
    except (binascii.Error, ValueError) as error:
        raise file.fault(f"{where}.uri", "holds letters that are no base64: the file is damaged") from error
