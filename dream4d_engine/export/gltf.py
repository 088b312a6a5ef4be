"""A mesh as one binary glTF file (GLB): still, or moving by morph targets whose weights are animated.

glTF is y up with the front towards +z (specification 2.0, 3.4), a mesh here z up with the front towards +x. A target is
a moment's difference from the first one, in the vertices' places and normals; between the moments that have one, places
are interpolated linearly. A number in brackets names a section of the specification.
"""

from __future__ import annotations

import io
import itertools
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import __version__
from ..documents import document_bytes
from ..fields.encodings import require_range
from ..mesh import Mesh, MeshError, linear, vertex_normals
from .images import to_bytes

if TYPE_CHECKING:
    import numpy as np

_FLOAT, _USHORT, _UINT, _SHORT, _BYTE = 5126, 5123, 5125, 5122, 5120  # component types [3.6.2.2]
_ARRAY, _ELEMENTS = 34962, 34963  # what a buffer view is for
_KINDS = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4"}
_ON_TIME = 0.99  # of the vertices, those that keep to the error bound


@dataclass(frozen=True)
class GltfOptions:
    """How a mesh is written."""

    duration: float = 2.0
    """Seconds that times 0 to 1 take."""
    bounce: bool = False
    """Play forwards, then backwards: a motion that doesn't come back to its start then loops without a jump."""
    error: float = 0.004
    """How far places between key frames may be off, in object sizes (99 % of the vertices keep to it)."""
    quantize: bool = True
    """Targets in 16 and 8 bits (KHR_mesh_quantization, which three.js and Blender read) instead of 32."""
    lit: bool = False
    """A material that takes the viewer's light; else the colours, which hold light of their own, show as they are."""
    name: str = "dream4d"
    """Of the object and its clip."""

    def __post_init__(self) -> None:
        require_range("duration", self.duration, 0.01, 3600)
        require_range("error", self.error, 1e-6, 1.0)


def y_up(vectors: Tensor) -> Tensor:
    """Turn vectors [..., 3] from z up and front +x to y up and front +z."""
    return vectors[..., [1, 2, 0]]


def key_frames(tracks: Tensor, times: Tensor, bound: float) -> list[int]:
    """Pick moments of tracks [T, V, 3], first and last among them, so that the line between two neighbours is nowhere
    more than `bound` off for 99 % of the vertices: where it is farthest off, there is the next one."""
    keys, n = [0, len(tracks) - 1], len(tracks)
    while len(keys) < n:
        worst, where = bound, None
        for start, end in itertools.pairwise(keys):
            if end - start < 2:
                continue
            share = ((times[start + 1 : end] - times[start]) / (times[end] - times[start]))[:, None, None]
            between = torch.lerp(tracks[start], tracks[end], share)
            off = (between - tracks[start + 1 : end]).norm(dim=-1).sort(-1).values
            off = off[:, min(off.shape[1] - 1, int(_ON_TIME * off.shape[1]))]
            if float(off.max()) > worst:
                worst, where = float(off.max()), start + 1 + int(off.argmax())
        if where is None:
            break
        keys = sorted((*keys, where))
    return keys


@dataclass
class _Parts:
    """The binary chunk as it grows, and what says what lies where."""

    data: bytearray = field(default_factory=bytearray)
    views: list[dict] = field(default_factory=list)
    accessors: list[dict] = field(default_factory=list)

    def view(self, data: bytes, target: int | None = None, stride: int | None = None) -> int:
        """Append bytes; return the number of their buffer view."""
        self.data.extend(b"\0" * (-len(self.data) % 4))
        view = {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(data)}
        if target is not None:
            view["target"] = target
        if stride is not None:
            view["byteStride"] = stride
        self.data.extend(data)
        self.views.append(view)
        return len(self.views) - 1

    def accessor(self, values: np.ndarray, component: int, target: int | None = _ARRAY, bounds: bool = False) -> int:
        """Append rows [N, C]; return the number of their accessor. Integers of a vertex are shares of their maximum."""
        import numpy as np

        n, width = values.shape
        row = values.itemsize * width
        padded = row + -row % 4 if target == _ARRAY else row  # a vertex's data begin at multiples of 4 bytes [3.6.2.4]
        rows = np.zeros((n, padded), np.uint8)
        rows[:, :row] = np.ascontiguousarray(values).view(np.uint8).reshape(n, row)
        view = self.view(rows.tobytes(), target, padded if padded != row else None)
        return self._add({"bufferView": view}, values, component, target == _ARRAY, bounds)

    def target(self, values: np.ndarray, component: int, bounds: bool) -> int:
        """Append a target's rows, only those that aren't zero where that is smaller [3.6.2.3]."""
        import numpy as np

        moved = np.flatnonzero(values.any(1))
        if not len(moved):
            return self._add({}, values, component, True, bounds)
        index, index_type = (moved.astype("<u2"), _USHORT) if len(values) < 2**16 else (moved.astype("<u4"), _UINT)
        row = values.itemsize * values.shape[1]
        if len(moved) * (index.itemsize + row) >= len(values) * (row + -row % 4):
            return self.accessor(values, component, bounds=bounds)
        sparse = {
            "count": len(moved),
            "indices": {"bufferView": self.view(index.tobytes()), "componentType": index_type},
            "values": {"bufferView": self.view(np.ascontiguousarray(values[moved]).tobytes())},
        }
        return self._add({"sparse": sparse}, values, component, True, bounds)

    def _add(self, where: dict, values: np.ndarray, component: int, vertex: bool, bounds: bool) -> int:
        entry = where | {"componentType": component, "count": len(values), "type": _KINDS[values.shape[1]]}
        if vertex and component != _FLOAT:
            entry["normalized"] = True
        if bounds:
            entry |= {"min": values.min(0).tolist(), "max": values.max(0).tolist()}
        self.accessors.append(entry)
        return len(self.accessors) - 1


def glb_bytes(mesh: Mesh, options: GltfOptions | None = None) -> tuple[bytes, int]:
    """Return the file, and how many key frames its animation has (0: a still mesh has none)."""
    options, parts = options or GltfOptions(), _Parts()
    if not len(mesh.faces):
        raise MeshError("a mesh without faces can't be written")
    tracks = mesh.vertices[None] if mesh.tracks is None else mesh.tracks
    tracks, faces = y_up(tracks.detach().float().cpu()), mesh.faces.cpu()
    normals = vertex_normals(tracks, faces)
    attributes = {
        "POSITION": parts.accessor(tracks[0].numpy().astype("<f4"), _FLOAT, bounds=True),
        "NORMAL": parts.accessor(normals[0].numpy().astype("<f4"), _FLOAT),
    }
    material = _material(mesh, options, parts, attributes)
    n = len(tracks[0])
    index = faces.reshape(-1, 1).numpy()
    index, kind = (index.astype("<u2"), _USHORT) if n < 2**16 else (index.astype("<u4"), _UINT)
    primitive = {"attributes": attributes, "indices": parts.accessor(index, kind, _ELEMENTS), "material": 0}
    shape = {"name": options.name, "primitives": [primitive]}
    document = {
        "asset": {"version": "2.0", "generator": f"dream4d {__version__}"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"name": options.name, "mesh": 0}],
        "meshes": [shape],
    } | material
    n_keys = 0
    if len(tracks) > 1 and (animation := _animate(tracks, normals, mesh, options, parts, shape)):
        document["animations"], n_keys = [animation], animation.pop("n_keys")
        if options.quantize:
            for key in ("extensionsUsed", "extensionsRequired"):
                document[key] = [*document.get(key, []), "KHR_mesh_quantization"]
    document |= {"accessors": parts.accessors, "bufferViews": parts.views, "buffers": [{"byteLength": len(parts.data)}]}
    return _container(document, bytes(parts.data)), n_keys


def _material(mesh: Mesh, options: GltfOptions, parts: _Parts, attributes: dict[str, int]) -> dict:
    """Add the mesh's colours; return the document's entries that say how they are shown."""
    look: dict[str, Any] = {"metallicFactor": 0.0, "roughnessFactor": 0.9}
    entries: dict[str, list[Any]] = {}
    if mesh.texture is not None and mesh.uv is not None:
        from PIL import Image

        attributes["TEXCOORD_0"] = parts.accessor(mesh.uv.cpu().numpy().astype("<f4"), _FLOAT)
        buffer = io.BytesIO()
        Image.fromarray(to_bytes(mesh.texture)).save(buffer, "PNG", optimize=True)
        look["baseColorTexture"] = {"index": 0}
        entries["images"] = [{"mimeType": "image/png", "bufferView": parts.view(buffer.getvalue())}]
        entries["samplers"] = [{"magFilter": 9729, "minFilter": 9987, "wrapS": 33071, "wrapT": 33071}]  # clamped
        entries["textures"] = [{"source": 0, "sampler": 0}]
    elif mesh.colors is not None:
        light = linear(mesh.colors.detach().float().cpu().clamp(0, 1))  # COLOR_0 is linear [3.9.2]
        attributes["COLOR_0"] = parts.accessor((light * 65535).round().numpy().astype("<u2"), _USHORT)
    material = {"pbrMetallicRoughness": look, "doubleSided": True}  # where the motion folds the inside may show
    if not options.lit:
        material["extensions"] = {"KHR_materials_unlit": {}}
        entries["extensionsUsed"] = ["KHR_materials_unlit"]
    return entries | {"materials": [material]}


def _animate(
    tracks: Tensor, normals: Tensor, mesh: Mesh, options: GltfOptions, parts: _Parts, shape: dict
) -> dict | None:
    """Add a target for each key frame to the mesh's entry `shape`; return the clip, None where nothing moves."""
    if mesh.times is None:
        return None
    bound = options.error * max(mesh.size, 1e-9)
    times = mesh.times.detach().float().cpu()
    keys = key_frames(tracks, times, bound)
    off = (tracks - tracks[0]).norm(dim=-1).sort(-1).values[:, int(_ON_TIME * (tracks.shape[1] - 1))]
    if len(keys) == 2 and float(off.max()) <= bound:
        return None
    targets: list[dict] = []
    names, columns = [], {}
    for key in keys[1:]:
        if float(off[key]) <= bound and key == keys[-1]:
            continue  # the motion ends where it began: no target, so the loop closes exactly
        entry, weight = _target(tracks[key] - tracks[0], normals[key] - normals[0], options.quantize, parts)
        columns[key] = (len(targets), weight)
        targets.append(entry)
        names.append(f"t={float(times[key]):.3f}")
    shape["primitives"][0]["targets"] = targets
    shape |= {"weights": [0.0] * len(targets), "extras": {"targetNames": names}}
    seconds, rows = [], []
    way = keys + (keys[-2::-1] if options.bounce else [])
    for number, key in enumerate(way):
        moment = float(times[key] - times[0])
        span = float(times[-1] - times[0])
        seconds.append(options.duration * (moment if number < len(keys) else 2 * span - moment))
        row = [0.0] * len(targets)
        if key in columns:
            row[columns[key][0]] = columns[key][1]
        rows += row
    time_at = parts.accessor(torch.tensor(seconds)[:, None].numpy().astype("<f4"), _FLOAT, None, bounds=True)
    weights = parts.accessor(torch.tensor(rows)[:, None].numpy().astype("<f4"), _FLOAT, None)
    return {
        "name": options.name,
        "samplers": [{"input": time_at, "interpolation": "LINEAR", "output": weights}],
        "channels": [{"sampler": 0, "target": {"node": 0, "path": "weights"}}],
        "n_keys": len(keys),
    }


def _target(moved: Tensor, turned: Tensor, quantize: bool, parts: _Parts) -> tuple[dict[str, int], float]:
    """Add a target of differences [V, 3] of places and normals; return its entry and the weight that it has at its
    moment.

    Quantised differences are shares of the largest one, and the weight is that: an extension-free way to a scale.
    """
    if not quantize:
        entry = {"POSITION": parts.target(moved.numpy().astype("<f4"), _FLOAT, True)}
        return entry | {"NORMAL": parts.target(turned.numpy().astype("<f4"), _FLOAT, False)}, 1.0
    weight = max(float(moved.abs().max()), float(turned.abs().max()), 1e-6)
    places = (moved / weight * 32767).round().numpy().astype("<i2")
    directions = (turned / weight * 127).round().numpy().astype("i1")
    entry = {"POSITION": parts.target(places, _SHORT, True), "NORMAL": parts.target(directions, _BYTE, False)}
    return entry, weight


def _container(document: dict, data: bytes) -> bytes:
    """GLB [4]: a header, the document padded with spaces, the binary chunk padded with zeros."""
    text = document_bytes(document)
    text += b" " * (-len(text) % 4)
    data += b"\0" * (-len(data) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(data), b"BIN\0") + data
    return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks
