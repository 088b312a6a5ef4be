"""Writing GLB: the binary chunk and its accessors, and a motion as morph targets with a clip of weights.

A target is a moment's difference from the mesh at rest, in the vertices' places and normals; between the moments that
have one, places are interpolated linearly. A number in brackets names a section of the glTF 2.0 specification.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import __version__
from ..documents import document_bytes
from ..fields.encodings import require_range
from .color import srgb_to_linear

if TYPE_CHECKING:
    import numpy as np

FLOAT, USHORT, UINT, SHORT, BYTE = 5126, 5123, 5125, 5122, 5120  # component types [3.6.2.2]
ARRAY, ELEMENTS = 34962, 34963  # what a buffer view is for
ON_TIME = 0.99
"""Of the vertices of a surface that was made, those that keep to the error bound."""
_KINDS = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4"}


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


def key_frames(tracks: Tensor, times: Tensor, bound: float, on_time: float = ON_TIME) -> list[int]:
    """Pick moments of tracks [T, V, 3], first and last among them, so that the line between two neighbours is nowhere
    more than `bound` off for a share `on_time` of the vertices: where it is farthest off, there is the next one."""
    keys, n = [0, len(tracks) - 1], len(tracks)
    while len(keys) < n:
        worst, where = bound, None
        for start, end in itertools.pairwise(keys):
            if end - start < 2:
                continue
            share = ((times[start + 1 : end] - times[start]) / (times[end] - times[start]))[:, None, None]
            between = torch.lerp(tracks[start], tracks[end], share)
            off = (between - tracks[start + 1 : end]).norm(dim=-1).sort(-1).values
            off = off[:, min(off.shape[1] - 1, int(on_time * off.shape[1]))]
            if float(off.max()) > worst:
                worst, where = float(off.max()), start + 1 + int(off.argmax())
        if where is None:
            break
        keys = sorted((*keys, where))
    return keys


@dataclass
class Parts:
    """The binary chunk as it grows, and what says what lies where."""

    data: bytearray = field(default_factory=bytearray)
    views: list[dict] = field(default_factory=list)
    accessors: list[dict] = field(default_factory=list)
    quantized: bool = False  # whether any target is in fewer bits than 32

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

    def accessor(self, values: np.ndarray, component: int, target: int | None = ARRAY, bounds: bool = False) -> int:
        """Append rows [N, C]; return the number of their accessor. Integers of a vertex are shares of their maximum."""
        import numpy as np

        n, width = values.shape
        row = values.itemsize * width
        padded = row + -row % 4 if target == ARRAY else row  # a vertex's data begin at multiples of 4 bytes [3.6.2.4]
        rows = np.zeros((n, padded), np.uint8)
        rows[:, :row] = np.ascontiguousarray(values).view(np.uint8).reshape(n, row)
        view = self.view(rows.tobytes(), target, padded if padded != row else None)
        return self._add({"bufferView": view}, values, component, target == ARRAY, bounds)

    def triangles(self, faces: Tensor, n_vertices: int) -> int:
        """Append the corners of faces [M, 3] over so many vertices; return the number of their accessor."""
        return self.accessor(*_numbers(faces.reshape(-1, 1).cpu().numpy(), n_vertices), ELEMENTS)

    def colors(self, srgb: Tensor) -> int:
        """Append vertices' colours [V, 3] as light, which COLOR_0 is [3.9.2]; return the number of their accessor."""
        light = srgb_to_linear(srgb.detach().float().cpu().clamp(0, 1))
        return self.accessor((light * 65535).round().numpy().astype("<u2"), USHORT)

    def target(self, values: np.ndarray, component: int, bounds: bool) -> int:
        """Append a target's rows, only those that aren't zero where that is smaller [3.6.2.3]."""
        import numpy as np

        self.quantized |= component != FLOAT
        moved = np.flatnonzero(values.any(1))
        if not len(moved):
            return self._add({}, values, component, True, bounds)
        index, index_type = _numbers(moved, len(values))
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
        if vertex and component != FLOAT:
            entry["normalized"] = True
        if bounds:
            entry |= {"min": values.min(0).tolist(), "max": values.max(0).tolist()}
        self.accessors.append(entry)
        return len(self.accessors) - 1


def _numbers(values: np.ndarray, n: int) -> tuple[np.ndarray, int]:
    """Numbers below n in as few bytes as hold them, and their component type."""
    return (values.astype("<u2"), USHORT) if n < 2**16 else (values.astype("<u4"), UINT)


@dataclass(frozen=True)
class Motion:
    """Which moments of a motion are written, and when they are shown."""

    keys: list[int]
    """Moments that the clip has key frames for."""
    targets: list[int]
    """Those that have a target; at the others the mesh is as it is at rest."""
    way: list[int]
    """The key frames in the order that they are shown in."""
    seconds: list[float]
    """When each of them is."""


def plan_motion(
    rest: Tensor, tracks: Tensor, times: Tensor, bound: float, options: GltfOptions, on_time: float = ON_TIME
) -> Motion | None:
    """Choose the key frames of tracks [T, V, 3] at `times`; None where nothing moves away from `rest` [V, 3]."""
    keys = key_frames(tracks, times, bound, on_time)
    off = (tracks - rest).norm(dim=-1).sort(-1).values[:, int(on_time * (tracks.shape[1] - 1))]
    if len(keys) == 2 and float(off.max()) <= bound:
        return None
    # a motion that begins or ends at rest gets no target there, so that its loop closes exactly
    targets = [key for key in keys if key not in (keys[0], keys[-1]) or float(off[key]) > bound]
    way, seconds = keys + (keys[-2::-1] if options.bounce else []), []
    for number, key in enumerate(way):
        moment = float(times[key] - times[0])
        span = float(times[-1] - times[0])
        seconds.append(options.duration * (moment if number < len(keys) else 2 * span - moment))
    return Motion(keys, targets, way, seconds)


def add_clip(parts: Parts, motion: Motion, weights: Sequence[float], kept: Sequence[float] = ()) -> dict[str, Any]:
    """Add the clip of a motion whose targets have `weights` at their moments; return its sampler.

    `kept`: weights of targets that come before them and don't change.
    """
    column = {key: number for number, key in enumerate(motion.targets)}
    rows: list[float] = []
    for key in motion.way:
        row = [0.0] * len(motion.targets)
        if key in column:
            row[column[key]] = weights[column[key]]
        rows += [*kept, *row]
    time_at = parts.accessor(torch.tensor(motion.seconds)[:, None].numpy().astype("<f4"), FLOAT, None, bounds=True)
    found = parts.accessor(torch.tensor(rows)[:, None].numpy().astype("<f4"), FLOAT, None)
    return {"input": time_at, "interpolation": "LINEAR", "output": found}


def add_target(
    parts: Parts, moved: Sequence[Tensor], turned: Sequence[Tensor | None], quantize: bool, bound: float
) -> tuple[list[dict[str, int]], float]:
    """Add a target of differences [V, 3] of places, and of normals, to each of the pieces of a mesh.

    Returns the pieces' entries, and the weight that all of them have at their moment. Quantised differences are shares
    of the largest one, and the weight is that: an extension-free way to a scale. It is never above 1, where Blender
    cuts it off; what is larger is written in 32 bits. `bound`: what places may be off.
    """
    farthest = max(float(way.abs().max()) for way in moved)
    most = max((float(turn.abs().max()) for turn in turned if turn is not None), default=0.0)
    weight = min(max(farthest, most, 1e-6), 1.0) if quantize else 1.0
    if quantize and weight / 32767 > bound / 4:  # normals turn by more than places move, in the units of the mesh
        weight = min(max(farthest, 1e-12), 1.0)
    entries = []
    for way, turn in zip(moved, turned, strict=True):
        entry = {"POSITION": _add_shares(parts, way / weight, SHORT, quantize and farthest <= weight, True)}
        if turn is not None:
            entry["NORMAL"] = _add_shares(parts, turn / weight, BYTE, quantize and most <= weight, False)
        entries.append(entry)
    return entries, weight


def _add_shares(parts: Parts, values: Tensor, kind: int, quantize: bool, bounds: bool) -> int:
    """Add a target's rows in the bits of `kind`, or in 32."""
    if not quantize:
        return parts.target(values.numpy().astype("<f4"), FLOAT, bounds)
    most, dtype = (32767, "<i2") if kind == SHORT else (127, "i1")
    return parts.target((values * most).round().numpy().astype(dtype), kind, bounds)


def name_extensions(document: dict[str, Any], parts: Parts) -> None:
    """Say in the document which extension its targets need: KHR_mesh_quantization, where any is not in 32 bits."""
    if parts.quantized:
        for key in ("extensionsUsed", "extensionsRequired"):
            known = document.setdefault(key, [])
            known += ["KHR_mesh_quantization"] * ("KHR_mesh_quantization" not in known)


def glb_of_one(shape: dict[str, Any], node: dict[str, Any], entries: dict[str, Any], parts: Parts) -> bytes:
    """Return a file of one node that shows one mesh; `entries`: what else the document holds."""
    document = {
        "asset": {"version": "2.0", "generator": f"dream4d {__version__}"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [node],
        "meshes": [shape],
    } | entries
    name_extensions(document, parts)
    document |= {"accessors": parts.accessors, "bufferViews": parts.views, "buffers": [{"byteLength": len(parts.data)}]}
    return glb_container(document, bytes(parts.data))


def glb_container(document: dict, data: bytes) -> bytes:
    """GLB [4]: a header, the document padded with spaces, the binary chunk padded with zeros."""
    text = document_bytes(document)
    text += b" " * (-len(text) % 4)
    data += b"\0" * (-len(data) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(data), b"BIN\0") + data
    return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks
