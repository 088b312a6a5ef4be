"""Small glTF files, written by the specification alone."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from places import ROOT

ASSETS = Path(os.environ.get("DREAM4D_ASSETS", ROOT.parent / "shared" / "assets"))
"""Animated models with free licences, which are no part of the product."""
HALF = 2**-0.5
CODES = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
KINDS = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}
SQUARE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], "f4")
TWO = np.array([0, 1, 2, 0, 2, 3], "u2")


class Builder:
    """A document and its one buffer as they grow."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.tree: dict[str, Any] = {"asset": {"version": "2.0"}, "accessors": [], "bufferViews": []}

    def view(self, data: bytes, **more: Any) -> int:
        self.data.extend(b"\0" * (-len(self.data) % 4))
        entry = {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(data)} | more
        self.data.extend(data)
        self.tree["bufferViews"].append(entry)
        return len(self.tree["bufferViews"]) - 1

    def add(self, values: Any, kind: str = "f4", bounds: bool = False, **more: Any) -> int:
        rows = np.asarray(values, kind)
        rows = rows.reshape(len(rows), -1)
        entry = {"bufferView": self.view(rows.tobytes()), "componentType": CODES[kind], "count": len(rows)}
        entry |= {"type": KINDS[rows.shape[1]]} | more
        if bounds:
            entry |= {"min": rows.min(0).tolist(), "max": rows.max(0).tolist()}
        self.tree["accessors"].append(entry)
        return len(self.tree["accessors"]) - 1

    def mesh(self, points: Any = SQUARE, faces: Any = TWO, normals: bool = False, **attributes: int) -> dict[str, Any]:
        """A primitive."""
        found = {"POSITION": self.add(points, bounds=True)} | attributes
        if normals:
            found["NORMAL"] = self.add(np.tile(np.array([[0, 0, 1]], "f4"), (len(points), 1)))
        return {"attributes": found, "indices": self.add(faces, "u2")}

    def scene(self, *nodes: dict[str, Any], meshes: list[dict[str, Any]], **more: Any) -> Builder:
        """All nodes are roots but those that are somebody's children."""
        children = {child for node in nodes for child in node.get("children", [])}
        roots = [index for index in range(len(nodes)) if index not in children]
        self.tree |= {"scene": 0, "scenes": [{"nodes": roots}], "nodes": list(nodes), "meshes": meshes} | more
        return self

    def glb(self) -> bytes:
        tree = self.tree | {"buffers": [{"byteLength": len(self.data)}]}
        text = json.dumps(tree).encode()
        text += b" " * (-len(text) % 4)
        data = bytes(self.data) + b"\0" * (-len(self.data) % 4)
        chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(data), b"BIN\0") + data
        return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks

    def save(self, path: Path) -> Path:
        path.write_bytes(self.glb())
        return path

    def save_gltf(self, path: Path, embedded: bool = False) -> Path:
        """As JSON, with the buffer beside it or in it."""
        uri = f"{path.stem}.bin"
        if embedded:
            uri = "data:application/octet-stream;base64," + base64.b64encode(self.data).decode()
        else:
            path.with_suffix(".bin").write_bytes(self.data)
        path.write_text(json.dumps(self.tree | {"buffers": [{"byteLength": len(self.data), "uri": uri}]}))
        return path


def parsed(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A GLB's document and binary chunk."""
    (n,) = struct.unpack_from("<I", data, 12)
    (m,) = struct.unpack_from("<I", data, 20 + n)
    assert len(data) == 28 + n + m
    return json.loads(data[20 : 20 + n]), data[28 + n :]


def clip(builder: Builder, channels: list[tuple[int, str, Any, Any, str]], name: str = "go") -> dict[str, Any]:
    """An animation of channels (node, path, seconds, values, interpolation)."""
    samplers, found = [], []
    for node, path, seconds, values, kind in channels:
        entry = {"input": builder.add(seconds, bounds=True), "output": builder.add(values), "interpolation": kind}
        samplers.append(entry)
        found.append({"sampler": len(samplers) - 1, "target": {"node": node, "path": path}})
    return {"name": name, "samplers": samplers, "channels": found}


def png(color: tuple[int, ...], size: tuple[int, int] = (2, 2)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA" if len(color) == 4 else "RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def arm(b: Builder) -> Builder:
    """A strip from x = 0 to 2 that an upper joint at x = 1 bends by a quarter within a second."""
    points = [[x, y, 0] for x in (0, 1, 2) for y in (0, 1)]
    faces = [0, 2, 1, 1, 2, 3, 2, 4, 3, 3, 4, 5]
    joints = b.add([[0, 1, 0, 0]] * 6, "u1")
    weights = b.add([[1, 0, 0, 0]] * 2 + [[0.5, 0.5, 0, 0]] * 2 + [[0, 1, 0, 0]] * 2)
    back = np.stack([np.eye(4), np.eye(4)])
    back[1, 3, 0] = -1  # by columns: a move by -1 in x
    primitive = b.mesh(points, faces, normals=True, JOINTS_0=joints, WEIGHTS_0=weights)
    skin = {"joints": [1, 2], "inverseBindMatrices": b.add(back.reshape(2, 16))}
    # a skinned mesh goes where its joints are: its node's own place means nothing
    nodes = (
        {"mesh": 0, "skin": 0, "translation": [9, 9, 9], "name": "arm"},
        {"children": [2]},
        {"translation": [1, 0, 0]},
    )
    b.scene(*nodes, meshes=[{"primitives": [primitive]}], skins=[skin])
    b.tree["animations"] = [clip(b, [(2, "rotation", [0, 1], [[0, 0, 0, 1], [0, 0, HALF, HALF]], "LINEAR")])]
    return b
