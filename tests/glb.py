"""GLB files read by a reader that knows only the specification, and by the Khronos validator."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path

import numpy as np
from browsers import HERE

WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3}
TYPES = {5120: "i1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}


class Glb:
    """A GLB file as the specification says."""

    def __init__(self, data: bytes) -> None:
        magic, version, length = struct.unpack_from("<4sII", data)
        assert (magic, version, length) == (b"glTF", 2, len(data))
        n, kind = struct.unpack_from("<I4s", data, 12)
        assert kind == b"JSON"
        self.tree = json.loads(data[20 : 20 + n])
        m, kind = struct.unpack_from("<I4s", data, 20 + n)
        assert kind == b"BIN\0" and 28 + n + m == len(data)
        self.binary = data[28 + n :]
        self.primitive = self.tree["meshes"][0]["primitives"][0]

    def view(self, index: int) -> tuple[bytes, int]:
        view = self.tree["bufferViews"][index]
        return self.binary[view["byteOffset"] :][: view["byteLength"]], view.get("byteStride", 0)

    def read(self, index: int) -> np.ndarray:
        entry = self.tree["accessors"][index]
        kind, width, n = np.dtype(TYPES[entry["componentType"]]), WIDTHS[entry["type"]], entry["count"]
        values = np.zeros((n, width), kind)
        if "bufferView" in entry:
            data, stride = self.view(entry["bufferView"])
            stride = stride or kind.itemsize * width
            values = np.ndarray((n, width), kind, data, 0, (stride, kind.itemsize)).copy()
        if "sparse" in entry:
            sparse = entry["sparse"]
            where = np.frombuffer(
                self.view(sparse["indices"]["bufferView"])[0], TYPES[sparse["indices"]["componentType"]]
            )
            rows = np.frombuffer(self.view(sparse["values"]["bufferView"])[0], kind).reshape(-1, width)
            assert len(where) == len(rows) == sparse["count"] and (np.diff(where.astype(int)) > 0).all()
            values[where] = rows
        for name, side in (("min", values.min(0)), ("max", values.max(0))):
            assert entry.get(name, side.tolist()) == side.tolist()
        if entry.get("normalized"):
            values = np.maximum(values / np.iinfo(kind).max, -1.0)
        return values

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        sampler = self.tree["animations"][0]["samplers"][0]
        seconds = self.read(sampler["input"])[:, 0]
        return seconds, self.read(sampler["output"]).reshape(len(seconds), -1)

    def at(self, second: float, name: str = "POSITION") -> np.ndarray:
        """An attribute at a second of the clip."""
        values = self.read(self.primitive["attributes"][name]).astype(float)
        if "animations" in self.tree:
            seconds, weights = self.weights()
            now = [np.interp(second, seconds, column) for column in weights.T]
            for weight, target in zip(now, self.primitive["targets"], strict=True):
                values += weight * self.read(target[name])
        return values


def issues_of(path: Path) -> dict:
    """What the Khronos validator says of a file; `why_no_module("gltf-validator")` tells whether it can be asked."""
    done = subprocess.run(["node", HERE / "validate.mjs", path], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)
