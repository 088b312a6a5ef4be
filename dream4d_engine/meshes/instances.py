"""Nodes that show one mesh many times (EXT_mesh_gpu_instancing), as a node for each of them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from .container import Gltf, Tree

EXTENSION = "EXT_mesh_gpu_instancing"
_PATHS = {"TRANSLATION": ("VEC3",), "ROTATION": ("VEC4",), "SCALE": ("VEC3",)}
_MOST = 2**16


def spread_instances(file: Gltf) -> Gltf:
    """The same file without the extension: each instance moves on its own, and every program shows it."""
    holders = [
        number for number, node in enumerate(file.entries("nodes")) if EXTENSION in (node.get("extensions") or {})
    ]
    if not holders:
        return file
    tree = copy.deepcopy(file.tree)
    for number in holders:
        _spread(file, tree["nodes"], number)
    for kind in ("extensionsUsed", "extensionsRequired"):
        tree[kind] = [name for name in tree.get(kind, []) if name != EXTENSION]
        if not tree[kind]:
            del tree[kind]
    return replace(file, tree=tree)


def _spread(file: Gltf, nodes: list[Tree], number: int) -> None:
    where, node = f"nodes[{number}]", nodes[number]
    said = f"{where}.extensions.{EXTENSION}"
    found = file.extension(node, EXTENSION, where) or {}
    del node["extensions"][EXTENSION]
    if not node["extensions"]:
        del node["extensions"]
    attributes = file.object_in(found, "attributes", said)
    rows = {
        path.lower(): file.accessor(attributes[path], f"{said}.{path}", kinds)
        for path, kinds in _PATHS.items()
        if path in attributes
    }
    counts = {len(values) for values in rows.values()}
    if node.get("mesh") is None or not counts:
        return
    if len(counts) > 1 or max(counts) > _MOST:
        raise file.fault(said, f"must hold one number of instances, at most {_MOST:,}, got {sorted(counts)}")
    shown: dict[str, Any] = {key: node.pop(key) for key in ("mesh", "weights") if key in node}
    children = list(file.get(node, "children", list, where, []))
    for k in range(counts.pop()):
        children.append(len(nodes))
        nodes.append({**shown, **{path: values[k].tolist() for path, values in rows.items()}})
    node["children"] = children
