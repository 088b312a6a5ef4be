"""Where the nodes of a glTF scene are at one moment of one of its clips, and where a primitive's vertices are then.

Sections 3.5 (scenes and nodes), 3.7.2.2 (morph targets), 3.7.3 (skins) and 3.11 (animations) of glTF 2.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..documents import describe
from ..mesh import MeshError
from .container import Gltf, Tree

if TYPE_CHECKING:
    import numpy as np

_PATHS = {"translation": 3, "rotation": 4, "scale": 3}
_REST = {"translation": [0.0, 0.0, 0.0], "rotation": [0.0, 0.0, 0.0, 1.0], "scale": [1.0, 1.0, 1.0]}


@dataclass(frozen=True)
class Pose:
    """All nodes of a file at one moment."""

    world: list[np.ndarray]
    """[4, 4] of each node."""
    shown: list[int]
    """The nodes of the scene, ascending."""
    weights: dict[int, list[float]]
    """Of the morph targets of those nodes that a clip moves or that have weights of their own."""
    moved: dict[int, dict[str, list[float]]]
    """Translation, rotation and scale that a clip gives nodes."""


def clip_names(file: Gltf) -> list[str]:
    """The names of a file's clips; one without a name is called by its number."""
    names = []
    for index in range(len(file.entries("animations"))):
        entry = file.entry("animations", index, "the file")
        names.append(file.get(entry, "name", str, f"animations[{index}]", "") or str(index))
    return names


def clip_seconds(file: Gltf, clip: str) -> float:
    """When the last key frame of a clip is."""
    entry = file.entry("animations", clip_names(file).index(clip), "the file")
    ends = [
        file.accessor(sampler.get("input"), f"the clip {clip}: input", ("SCALAR",)).max()
        for sampler in file.get(entry, "samplers", list, "animations", [])
        if isinstance(sampler, dict)
    ]
    return float(max(ends, default=0.0))


def pose_nodes(file: Gltf, clip: str | None, time: float) -> Pose:
    """The nodes at `time` seconds into a clip; None: as the file has them at rest."""
    moved = {} if clip is None else _sampled(file, clip, time)
    parents = _parents(file)
    world: list[np.ndarray | None] = [None] * len(parents)
    for start in range(len(parents)):
        chain, index = [], start
        while index >= 0 and world[index] is None:
            chain.append(index)
            if len(chain) > len(parents):
                raise file.fault(f"nodes[{start}]", "is among its own ancestors: the file is damaged")
            index = parents[index]
        for node in reversed(chain):
            own, parent = _local(file, node, moved.get(node, {})), parents[node]
            above = world[parent] if parent >= 0 else None
            world[node] = own if above is None else above @ own
    placed = [matrix for matrix in world if matrix is not None]
    shown = _shown(file, parents)
    weights = {node: values["weights"] for node, values in moved.items() if "weights" in values}
    for node in shown:
        entry = file.entry("nodes", node, "the scene")
        if node not in weights and entry.get("weights") is not None:
            values = file.get(entry, "weights", list, f"nodes[{node}]", [])
            weights[node] = file.numbers(entry, "weights", len(values), f"nodes[{node}]", [])
    return Pose(placed, shown, weights, {n: {k: v for k, v in m.items() if k != "weights"} for n, m in moved.items()})


def _parents(file: Gltf) -> list[int]:
    """Each node's parent, -1 for roots."""
    parents = [-1] * len(file.entries("nodes"))
    for index in range(len(parents)):
        entry = file.entry("nodes", index, "the file")
        for child in file.get(entry, "children", list, f"nodes[{index}]", []):
            file.entry("nodes", child, f"nodes[{index}].children")
            if parents[child] >= 0:
                raise file.fault(f"nodes[{child}]", f"is a child of both nodes[{parents[child]}] and nodes[{index}]")
            parents[child] = index
    return parents


def _shown(file: Gltf, parents: list[int]) -> list[int]:
    """The nodes of the file's scene; where there is none, all."""
    if not file.entries("scenes"):
        return list(range(len(parents)))
    number = file.get(file.tree, "scene", int, "the file", 0)
    scene = file.entry("scenes", number, "scene")
    waiting, found = list(file.get(scene, "nodes", list, f"scenes[{number}]", [])), set()
    while waiting:
        index = waiting.pop()
        entry = file.entry("nodes", index, f"scenes[{number}].nodes")
        if index not in found and not _hidden(file, entry, f"nodes[{index}]"):
            found.add(index)
            waiting += file.get(entry, "children", list, f"nodes[{index}]", [])
    return sorted(found)


def _hidden(file: Gltf, node: Tree, where: str) -> bool:
    """Whether a node, and all below it, is not to be seen (KHR_node_visibility)."""
    found = file.extension(node, "KHR_node_visibility", where)
    return found is not None and not file.get(found, "visible", bool, where, True)


def _local(file: Gltf, index: int, moved: dict[str, list[float]]) -> np.ndarray:
    """A node's own matrix [4, 4]."""
    import numpy as np

    entry, where = file.entry("nodes", index, "the file"), f"nodes[{index}]"
    if entry.get("matrix") is not None:
        return np.array(file.numbers(entry, "matrix", 16, where, [])).reshape(4, 4).T
    t, r, s = (
        moved[path] if path in moved else file.numbers(entry, path, n, where, _REST[path]) for path, n in _PATHS.items()
    )
    x, y, z, w = r
    own = np.eye(4)
    own[:3, :3] = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    ) * np.array(s)
    own[:3, 3] = t
    return own


def _sampled(file: Gltf, clip: str, time: float) -> dict[int, dict[str, list[float]]]:
    """What a clip says of nodes at a moment: by node, the values of each path."""
    names = clip_names(file)
    if not names:
        raise MeshError(f"{file.name} has no clips: leave the clip {describe(clip)} away, it is taken at rest")
    if clip not in names:
        raise MeshError(f"{file.name} has no clip {describe(clip)}: it has {', '.join(names)}")
    number = names.index(clip)
    where = f"animations[{number}]"
    entry = file.entry("animations", number, "the file")
    samplers = file.get(entry, "samplers", list, where, [])
    found: dict[int, dict[str, list[float]]] = {}
    for place, channel in enumerate(file.get(entry, "channels", list, where, [])):
        said = f"{where}.channels[{place}]"
        if not isinstance(channel, dict):
            raise file.fault(said, "must hold an object")
        target, which = file.object_in(channel, "target", said), channel.get("sampler")
        path = file.get(target, "path", str, f"{said}.target", "")
        if target.get("node") is None or path not in (*_PATHS, "weights"):  # an extension's, such as pointers
            continue
        file.entry("nodes", target["node"], f"{said}.target.node")
        if not isinstance(which, int) or not 0 <= which < len(samplers) or not isinstance(samplers[which], dict):
            raise file.fault(f"{said}.sampler", f"is {describe(which)}, there are {len(samplers)}: the file is damaged")
        values = _value_at(file, samplers[which], time, path, f"{where}.samplers[{which}]")
        found.setdefault(target["node"], {})[path] = values.tolist()
    return found


def _value_at(file: Gltf, sampler: Tree, time: float, path: str, where: str) -> np.ndarray:
    """What a sampler says at a moment [3.11, appendix C]."""
    import numpy as np

    keys = file.accessor(sampler.get("input"), f"{where}.input", ("SCALAR",))[:, 0].astype("f8")
    kinds = {"rotation": ("VEC4",), "weights": ("SCALAR",)}.get(path, ("VEC3",))
    rows = file.accessor(sampler.get("output"), f"{where}.output", kinds).astype("f8")
    if (np.diff(keys) < 0).any():
        raise file.fault(f"{where}.input", "must hold moments in ascending order")
    kind = file.get(sampler, "interpolation", str, where, "LINEAR")
    if kind not in ("LINEAR", "STEP", "CUBICSPLINE"):
        raise file.fault(f"{where}.interpolation", f"must be LINEAR, STEP or CUBICSPLINE, got {describe(kind)}")
    per_key = 3 if kind == "CUBICSPLINE" else 1
    width = len(rows) * rows.shape[1] // (len(keys) * per_key)
    if rows.size != width * len(keys) * per_key or (path != "weights" and width != _PATHS[path]):
        raise file.fault(f"{where}.output", f"has {len(rows):,} rows for {len(keys):,} moments: the file is damaged")
    values = rows.reshape(len(keys), per_key, width)
    i = int(np.clip(np.searchsorted(keys, time, "right") - 1, 0, len(keys) - 1))
    j = min(i + 1, len(keys) - 1)
    span = keys[j] - keys[i]
    u = float(np.clip((time - keys[i]) / span, 0, 1)) if span > 0 else 0.0
    if kind == "CUBICSPLINE":
        (_, a, leaves), (comes, b, _) = values[i], values[j]
        out = (2 * u**3 - 3 * u**2 + 1) * a + span * (u**3 - 2 * u**2 + u) * leaves
        out = out + (3 * u**2 - 2 * u**3) * b + span * (u**3 - u**2) * comes
    elif kind == "STEP":
        out = values[i, 0]
    else:
        out = _between(values[i, 0], values[j, 0], u, path)
    if path != "rotation":
        return out
    length = float(np.linalg.norm(out))
    if length < 1e-6:
        raise file.fault(f"{where}.output", "holds a rotation that is no unit quaternion: export the model anew")
    return out / length


def _between(a: np.ndarray, b: np.ndarray, u: float, path: str) -> np.ndarray:
    """The value a share `u` of the way, for rotations along the shorter arc."""
    import numpy as np

    if path != "rotation":
        return a + u * (b - a)
    d = float(a @ b)
    b, d = (-b, -d) if d < 0 else (b, d)
    angle = np.arccos(min(d, 1.0))
    if angle < 1e-4:
        return a + u * (b - a)
    return (np.sin((1 - u) * angle) * a + np.sin(u * angle) * b) / np.sin(angle)


# ---- vertices ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Posed:
    """A primitive's vertices at one moment."""

    local: np.ndarray
    """[V, 3] in the frame that `matrix` takes to the scene's: the node's own, after its morph targets."""
    matrix: np.ndarray
    """[4, 4] of the node, or [V, 4, 4] where a skin moves each vertex by itself."""

    @property
    def world(self) -> np.ndarray:
        """[V, 3] in the scene's frame."""
        import numpy as np

        turned = np.einsum("...ij,...j->...i", self.matrix[..., :3, :3], self.local)
        return turned + self.matrix[..., :3, 3]

    @property
    def mirrored(self) -> bool:
        """Whether its faces are turned inside out on the way [3.7.4]."""
        import numpy as np

        return bool(np.median(np.linalg.det(self.matrix[..., :3, :3])) < 0)


def pose_vertices(file: Gltf, pose: Pose, node: int, primitive: Tree, where: str) -> Posed:
    """Where a node's primitive is; `where` names it in messages."""

    attributes = file.object_in(primitive, "attributes", where)
    points = file.accessor(attributes.get("POSITION"), f"{where}.attributes.POSITION", ("VEC3",)).astype("f8")
    for moved, weight in targets_of(file, pose, node, primitive, where, "POSITION"):
        if weight and moved is not None:
            points = points + weight * same_length(file, moved, len(points), f"{where}.targets")
    entry = file.entry("nodes", node, "the scene")
    if entry.get("skin") is None or "JOINTS_0" not in attributes:
        return Posed(points, pose.world[node])
    return Posed(points, _skinned(file, pose, entry, attributes, len(points), where))


def targets_of(
    file: Gltf, pose: Pose, node: int, primitive: Tree, where: str, name: str
) -> list[tuple[np.ndarray | None, float]]:
    """A primitive's morph targets for one attribute, each with its weight at the moment."""
    targets = file.get(primitive, "targets", list, where, [])
    weights = target_weights(file, pose, node, len(targets))
    found: list[tuple[np.ndarray | None, float]] = []
    for number, (target, weight) in enumerate(zip(targets, weights, strict=True)):
        if not isinstance(target, dict):
            raise file.fault(f"{where}.targets[{number}]", "must hold an object")
        said = f"{where}.targets[{number}].{name}"
        found.append((file.accessor(target[name], said, ("VEC3",)) if name in target else None, weight))
    return found


def target_weights(file: Gltf, pose: Pose, node: int, count: int) -> list[float]:
    """The weights of a node's `count` morph targets at the moment; 0 where nothing is said."""
    weights = pose.weights.get(node)
    if weights is None:
        entry = file.entry("nodes", node, "the scene")
        mesh = file.entry("meshes", entry.get("mesh"), f"nodes[{node}].mesh")
        said = file.get(mesh, "weights", list, f"meshes[{entry['mesh']}]", [])
        weights = file.numbers(mesh, "weights", len(said), f"meshes[{entry['mesh']}]", [])
    return (weights + [0.0] * count)[:count]


def same_length(file: Gltf, values: np.ndarray, count: int, where: str) -> np.ndarray:
    """Values of vertices, which must be as many as there are."""
    if len(values) != count:
        raise file.fault(where, f"has {len(values):,} rows for {count:,} vertices: the file is damaged")
    return values


def _skinned(file: Gltf, pose: Pose, node: Tree, attributes: Tree, count: int, where: str) -> np.ndarray:
    """Each vertex's matrix [V, 4, 4]: its joints', weighted [3.7.3.3]."""
    import numpy as np

    skin, said = file.entry("skins", node["skin"], f"{where}: skin"), f"skins[{node['skin']}]"
    joints = file.get(skin, "joints", list, said, [])
    for joint in joints:
        file.entry("nodes", joint, f"{said}.joints")
    if not joints:
        raise file.fault(f"{said}.joints", "names no joints: the file is damaged")
    back = np.tile(np.eye(4), (len(joints), 1, 1))
    if skin.get("inverseBindMatrices") is not None:
        rows = file.accessor(skin["inverseBindMatrices"], f"{said}.inverseBindMatrices", ("MAT4",)).astype("f8")
        if len(rows) < len(joints):
            raise file.fault(f"{said}.inverseBindMatrices", f"has {len(rows)} matrices for {len(joints)} joints")
        back = rows[: len(joints)].reshape(-1, 4, 4).transpose(0, 2, 1)
    moved = np.stack([pose.world[joint] @ matrix for joint, matrix in zip(joints, back, strict=True)])
    total, share, number = np.zeros((count, 4, 4)), np.zeros(count), 0
    while f"JOINTS_{number}" in attributes:
        names = [f"{where}.attributes.{name}_{number}" for name in ("JOINTS", "WEIGHTS")]
        at = same_length(file, file.accessor(attributes[f"JOINTS_{number}"], names[0], ("VEC4",)), count, names[0])
        weights = file.accessor(attributes.get(f"WEIGHTS_{number}"), names[1], ("VEC4",)).astype("f8")
        weights = same_length(file, weights, count, names[1])
        at = at.astype("i8")
        if int(at.max()) >= len(joints) or int(at.min()) < 0:
            raise file.fault(names[0], f"names joint {int(at.max())}, the skin has {len(joints)}: the file is damaged")
        for k in range(4):
            total += weights[:, k, None, None] * moved[at[:, k]]
        share += weights.sum(1)
        number += 1
    total[share <= 1e-9] = moved[0]  # no joint holds it: the first one does, as in three.js
    share[share <= 1e-9] = 1.0
    return total / share[:, None, None]
