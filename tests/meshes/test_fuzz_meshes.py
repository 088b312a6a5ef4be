"""Damage at random: a model is read (and its motion written), or it is refused in one sentence."""

from __future__ import annotations

import copy
import random
import struct

import torch
from gltf_files import Builder, arm, clip

from dream4d_engine.mesh import MeshError
from dream4d_engine.meshes import moving_glb, read_model

VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    7,
    2**31,
    2**63,
    10**400,
    0.5,
    -1e300,
    float("inf"),
    float("nan"),
    "",
    "x",
    "VEC4",
]
VALUES += [
    [],
    [0],
    [-1],
    [[0]],
    {},
    {"a": 1},
    "data:;base64,AAAA",
    "../x",
    5126,
    5123,
    5121,
    "MASK",
    [0, 0, 0, 0],
    [1, 2, 3],
]
TIMES = torch.linspace(0, 1, 3)


def places(tree: object, way: tuple = ()) -> list[tuple]:
    """The ways to all values in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in ((*way, key), *places(value, (*way, key)))]


def everything() -> Builder:
    b = arm(Builder())
    uv = b.add([[0, 0], [1, 0], [1, 1], [0, 1]])
    flat = b.mesh(normals=True, TEXCOORD_0=uv) | {
        "material": 0,
        "targets": [{"POSITION": b.add([[0, 0, 1]] * 4, bounds=True)}],
    }
    b.tree["meshes"].append(
        {"primitives": [flat, b.mesh() | {"mode": 1, "targets": flat["targets"]}], "weights": [0.25]}
    )
    b.tree["nodes"].append({"mesh": 1, "rotation": [0, 0, 0, 1], "scale": [1, 2, 1]})
    b.tree["scenes"][0]["nodes"].append(3)
    texture = {"index": 0, "texCoord": 0, "extensions": {"KHR_texture_transform": {"offset": [0, 0], "scale": [1, 1]}}}
    look = {"baseColorFactor": [1, 1, 1, 1], "baseColorTexture": texture}
    b.tree |= {
        "materials": [{"name": "a", "alphaMode": "OPAQUE", "emissiveFactor": [0, 0, 0], "pbrMetallicRoughness": look}]
    }
    b.tree |= {"images": [{"bufferView": 0}], "textures": [{"source": 0, "sampler": 0}], "samplers": [{"wrapS": 10497}]}
    b.tree["animations"].append(clip(b, [(3, "weights", [0, 1], [0.0, 1.0], "LINEAR")], "more"))
    return b


def test_documents_with_a_value_changed(tmp_path, fuzz: int) -> None:
    source, path, n_read = random.Random(0), tmp_path / "a.glb", 0
    whole = everything()
    ways = places(whole.tree)
    for _ in range(400 * fuzz):
        b = Builder()
        b.data, b.tree = whole.data, copy.deepcopy(whole.tree)
        for _ in range(source.choice((1, 1, 2))):
            *way, last = source.choice(ways)
            tree = b.tree
            try:
                for key in way:
                    tree = tree[key]
                if source.random() < 0.15:
                    del tree[last]
                else:
                    tree[last] = source.choice(VALUES)
            except (LookupError, TypeError):  # the first change took the second one's place away
                continue
        b.save(path)
        try:
            model = read_model(path, source.choice((None, "go", "more")), 0.0)
            n_read += 1
            moving_glb(model, model.mesh.vertices + TIMES[:, None, None] * model.mesh.size, TIMES)
        except MeshError as error:
            assert "\n" not in str(error) and str(error).startswith("a.glb")
    assert 50 * fuzz < n_read < 350 * fuzz


def test_files_with_bytes_changed(tmp_path, fuzz: int) -> None:
    source = random.Random(1)
    ply = b"ply\nformat binary_little_endian 1.0\nelement vertex 4\n"
    ply += b"property float x\nproperty float y\nproperty float z\n"
    ply += b"element face 2\nproperty list uchar int vertex_indices\nend_header\n" + struct.pack("<12f", *range(12))
    ply += struct.pack("<B3iB4i", 3, 0, 1, 2, 4, 0, 1, 2, 3)
    obj = b"v 0 0 0\nv 1 0 0 .5 .5 .5\nv 1 1 0\nvt 0 1\nvn 0 0 1\nusemtl a\nf 1/1/1 2/1/1 3/1/1\nf -1 -2 -3\n"
    stl = b"solid" + bytes(75) + struct.pack("<I", 2) + bytes(100)
    for name, data in (("a.glb", everything().glb()), ("a.ply", ply), ("a.obj", obj), ("a.stl", stl)):
        for _ in range(100 * fuzz):
            changed = bytearray(data)
            for _ in range(source.choice((1, 2, 8))):
                changed[source.randrange(len(changed))] = source.choice((0, 32, 45, 48, 57, 255, source.randrange(256)))
            if source.random() < 0.2:
                changed = changed[: source.randrange(len(changed))]
            (tmp_path / name).write_bytes(changed)
            try:
                read_model(tmp_path / name)
            except MeshError as error:
                assert "\n" not in str(error) and name in str(error)
