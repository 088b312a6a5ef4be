"""A model with its motion as a GLB: the user's own file with morph targets added to it, or a file made for it.

What the user's file holds stays byte for byte: materials, images, coordinates, buffer views. Appended are targets of
places and normals for its own primitives, and one clip of weights. A number in brackets names a section of the glTF 2.0
specification.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..mesh import MeshError, face_normals, vertex_normals
from .container import Gltf, Tree
from .glb import (
    ELEMENTS,
    FLOAT,
    UINT,
    GltfOptions,
    Motion,
    Parts,
    add_clip,
    add_target,
    glb_container,
    glb_of_one,
    name_extensions,
    plan_motion,
)
from .gltf import image_bytes, triangles
from .images import BadImage, encode_image
from .poses import clip_names, pose_nodes, pose_vertices, same_length, target_weights, targets_of
from .record import Model, Part, Placement

if TYPE_CHECKING:
    import numpy as np

_STORED_OTHERWISE = ("KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_meshopt_compression")
_WRAPS = {"repeat": 10497, "mirror": 33648, "clamp": 33071}


@dataclass(frozen=True)
class MovingGlb:
    """A GLB file that moves."""

    data: bytes
    n_keys: int
    """Key frames, at most, of one object; 0 where nothing moves."""
    notes: tuple[str, ...]
    """Sentences for people: what the file no longer holds, or holds otherwise."""


def moving_glb(
    model: Model, tracks: Tensor, times: Tensor, options: GltfOptions | None = None, placement: Placement | None = None
) -> MovingGlb:
    """Write a model's motion, `tracks` [T, V, 3] in its file's frame at `times` [T] in [0, 1].

    A model from a glTF file keeps that file; for others one is made, turned upright by the placement.
    """
    if len(times) < 2 or tuple(tracks.shape) != (len(times), *model.mesh.vertices.shape):
        raise MeshError(
            f"tracks of {model.source.name} must be [T, V, 3] with two times or more, got {list(tracks.shape)}"
        )
    if not bool(tracks.isfinite().all()):
        raise MeshError(f"the motion of {model.source.name} is not a finite number everywhere")
    tracks, times, options = tracks.detach().float().cpu(), times.detach().float().cpu(), options or GltfOptions()
    if model.file is not None:
        return _Patch(model, model.file, options).write(tracks, times)
    return _made(model, tracks, times, options, placement)


# ---- the user's own file -----------------------------------------------------------------------------------------


@dataclass
class _Patch:
    """A file as it is patched."""

    model: Model
    file: Gltf
    options: GltfOptions
    notes: dict[str, None] = field(default_factory=dict)
    samplers: list[Tree] = field(default_factory=list)
    channels: list[Tree] = field(default_factory=list)
    n_keys: int = 0
    users: Counter = field(default_factory=Counter)
    """Of each mesh, the nodes that still show it."""

    def write(self, tracks: Tensor, times: Tensor) -> MovingGlb:
        source, file = self.model.source, self.file
        self.tree = copy.deepcopy(file.tree)
        self.pose = pose_nodes(file, source.clip, source.time)
        self.parts = _merged_buffers(file, self.tree)
        self._embed_images()
        self._hold_pose()
        by_node: dict[int, dict[int, Part]] = {}
        for part in self.model.parts:
            by_node.setdefault(part.node, {})[part.primitive] = part
        self.users = Counter(node.get("mesh") for node in self.tree["nodes"])
        for node, drawn in by_node.items():
            self._move(node, drawn, tracks, times)
        if old := clip_names(file):
            self.tree.pop("animations", None)
            self.notes[f"its own clips ({', '.join(old)}) were left out: they would move it a second time"] = None
        if self.channels:
            clip = {"name": self.options.name, "samplers": self.samplers, "channels": self.channels}
            self.tree["animations"] = [clip]
            name_extensions(self.tree, self.parts)
        self.tree["accessors"], self.tree["bufferViews"] = self.parts.accessors, self.parts.views
        self.tree["buffers"][0]["byteLength"] = len(self.parts.data)
        return MovingGlb(glb_container(self.tree, bytes(self.parts.data)), self.n_keys, tuple(self.notes))

    def _embed_images(self) -> None:
        """Take images from beside the file into it."""
        for number, entry in enumerate(self.tree.get("images", [])):
            uri = entry.get("uri")
            if not uri or uri[:5].lower() == "data:":
                continue
            try:
                data = image_bytes(self.file, entry, f"images[{number}]")
            except BadImage:
                continue
            entry.pop("uri")
            entry["bufferView"] = self.parts.view(data)
            entry["mimeType"] = "image/jpeg" if data[:2] == b"\xff\xd8" else "image/png"
            if data[:4] == b"RIFF":
                entry["mimeType"] = "image/webp"

    def _hold_pose(self) -> None:
        """Leave the nodes as they are at the chosen moment of the clip."""
        for node, moved in self.pose.moved.items():
            if "matrix" not in self.tree["nodes"][node]:
                self.tree["nodes"][node] |= moved
        for node, weights in self.pose.weights.items():
            self.tree["nodes"][node]["weights"] = weights

    def _move(self, number: int, drawn: dict[int, Part], tracks: Tensor, times: Tensor) -> None:
        """Give the primitives of a node their targets, and the node a channel of the clip."""
        import numpy as np

        spans = sorted({(part.first, part.count) for part in drawn.values()})
        mine = torch.cat([torch.arange(first, first + count) for first, count in spans])
        bound = self.options.error * max(self.model.mesh.size, 1e-30)
        # the bound holds for all vertices: of a user's own mesh few may be a whole limb
        motion = plan_motion(self.model.mesh.vertices[mine], tracks[:, mine], times, bound, self.options, on_time=1.0)
        if motion is None:
            return
        node = self.tree["nodes"][number]
        shown, frame, skinned = node["mesh"], self.pose.world[number], node.get("skin") is not None
        if not skinned and abs(float(np.linalg.det(frame[:3, :3]))) < 1e-30:
            self.notes[f"nodes[{number}] is flattened by its scale: it was left still"] = None
            return
        mesh = copy.deepcopy(self.tree["meshes"][shown])
        wheres = [f"meshes[{shown}].primitives[{k}]" for k in range(len(mesh["primitives"]))]
        if skinned:
            normals = [
                self._bake(number, primitive, where)
                for primitive, where in zip(mesh["primitives"], wheres, strict=True)
            ]
            number, frame = self._own_node(number, mesh), np.eye(4)
            self.notes["its skin was left out: its pose at the chosen moment is the shape that now moves"] = None
        else:
            normals = [
                self._directions(number, primitive, where, "NORMAL")
                for primitive, where in zip(mesh["primitives"], wheres, strict=True)
            ]
        if self.users[shown] > 1:  # other nodes show it, too, and move otherwise
            self.users[shown] -= 1
            self.tree["meshes"].append(mesh)
            shown = len(self.tree["meshes"]) - 1
        self.tree["meshes"][shown], self.tree["nodes"][number]["mesh"] = mesh, shown
        pieces = self._pieces(mesh, drawn, normals, np.linalg.inv(frame), tracks)
        self._add_targets(number, mesh, pieces, motion, bound / float(np.cbrt(abs(np.linalg.det(frame[:3, :3])))))

    def _own_node(self, number: int, mesh: Tree) -> int:
        """Take a skinned mesh from its node to one of its own, which nothing moves; return that."""
        old = self.tree["nodes"][number]
        mesh.pop("weights", None)
        if isinstance(mesh.get("extras"), dict):
            mesh["extras"].pop("targetNames", None)
        for key in ("mesh", "skin", "weights"):
            old.pop(key, None)
        self.tree["nodes"].append({"name": old["name"]} if old.get("name") else {})
        if self.tree.get("scenes"):
            self.tree["scenes"][self.tree.get("scene", 0)].setdefault("nodes", []).append(len(self.tree["nodes"]) - 1)
        return len(self.tree["nodes"]) - 1

    def _bake(self, number: int, primitive: Tree, where: str) -> np.ndarray | None:
        """Write a primitive's vertices as its skin and its own targets pose them; return its normals."""
        import numpy as np

        posed, attributes = pose_vertices(self.file, self.pose, number, primitive, where), primitive["attributes"]
        baked = {"POSITION": self.parts.accessor(posed.world.astype("<f4"), FLOAT, bounds=True)}
        turn, normals = posed.matrix[..., :3, :3], None
        for name in ("NORMAL", "TANGENT"):
            values = self._directions(number, primitive, where, name)
            if values is None:
                continue
            # normals are turned by the inverse transposed of what turns places
            matrix = np.linalg.pinv(turn).swapaxes(-1, -2) if name == "NORMAL" else turn
            values[:, :3] = _unit(np.einsum("...ij,...j->...i", matrix, values[:, :3]))
            baked[name] = self.parts.accessor(values.astype("<f4"), FLOAT)
            normals = values if name == "NORMAL" else normals
        if posed.mirrored and primitive.get("mode", 4) in (4, 5, 6):
            faces = triangles(self.file, primitive, primitive.get("mode", 4), len(posed.local), where)[:, ::-1]
            primitive["indices"] = self.parts.accessor(faces.reshape(-1, 1).astype("<u4"), UINT, ELEMENTS)
            primitive.pop("mode", None)
        for name in list(attributes):
            if name.startswith(("JOINTS_", "WEIGHTS_")):
                attributes.pop(name)
        attributes |= baked
        primitive.pop("targets", None)
        return normals

    def _directions(self, node: int, primitive: Tree, where: str, name: str) -> np.ndarray | None:
        """A primitive's normals [V, 3] or tangents [V, 4], after its own targets; None where it has none."""
        said, file = f"{where}.attributes.{name}", self.file
        if name not in primitive["attributes"]:
            return None
        values = file.accessor(primitive["attributes"][name], said, ("VEC3",) if name == "NORMAL" else ("VEC4",))
        values = values.astype("f8")
        for moved, weight in targets_of(file, self.pose, node, primitive, where, name):
            if weight and moved is not None:
                values[:, :3] += weight * same_length(file, moved, len(values), said)
        values[:, :3] = _unit(values[:, :3])
        return values

    def _pieces(
        self, mesh: Tree, drawn: dict[int, Part], normals: list[np.ndarray | None], back: np.ndarray, tracks: Tensor
    ) -> list[_Piece]:
        """What of a mesh moves together: primitives that share their vertices are one piece."""
        found: dict[object, _Piece] = {}
        to_node, faces = torch.from_numpy(back).float(), self.model.mesh.faces
        for k, primitive in enumerate(mesh["primitives"]):
            part, attributes = drawn.get(k), primitive["attributes"]
            key = (None if part is None else part.first, attributes["POSITION"], attributes.get("NORMAL"))
            if key not in found and part is None:  # points and lines: as many zeros as they have vertices
                still = torch.zeros(1, int(self.parts.accessors[attributes["POSITION"]]["count"]), 3)
                found[key] = _Piece(still[0], still, None, faces[:0])
            elif key not in found and part is not None:
                first, last = part.first, part.first + part.count
                rest = self.model.mesh.vertices[first:last] @ to_node[:3, :3].T + to_node[:3, 3]
                mine = faces[(faces[:, 0] >= first) & (faces[:, 0] < last)] - first
                shading = normals[k]
                turned = None if shading is None else torch.from_numpy(shading[:, :3]).float()
                found[key] = _Piece(rest, tracks[:, first:last], turned, mine, to_node)
            found[key].users.append(primitive)
        return list(found.values())

    def _add_targets(self, number: int, mesh: Tree, pieces: list[_Piece], motion: Motion, bound: float) -> None:
        """Append the targets of a motion to a mesh's primitives, behind those that they have."""
        n_old = len(mesh["primitives"][0].get("targets", []))
        self.tree["nodes"][number].pop("weights", None)
        kept = target_weights(self.file, self.pose, number, n_old) if n_old else []
        weights = []
        for moment in motion.targets:
            ways, turns = zip(*(piece.at(moment) for piece in pieces), strict=True)
            entries, weight = add_target(self.parts, ways, turns, self.options.quantize, bound)
            weights.append(weight)
            for piece, entry in zip(pieces, entries, strict=True):
                for primitive in piece.users:
                    primitive.setdefault("targets", []).append(entry)
        mesh["weights"] = [*kept, *[0.0] * len(weights)]
        if isinstance(mesh.get("extras"), dict) and isinstance(mesh["extras"].get("targetNames"), list):
            names = [*mesh["extras"]["targetNames"], *[""] * n_old][:n_old]
            mesh["extras"]["targetNames"] = [*names, *(f"{self.options.name} {k}" for k in range(len(weights)))]
        self.samplers.append(add_clip(self.parts, motion, weights, kept))
        self.channels.append({"sampler": len(self.samplers) - 1, "target": {"node": number, "path": "weights"}})
        self.n_keys = max(self.n_keys, len(motion.keys))


@dataclass
class _Piece:
    """Vertices that move together, in their node's frame, and the primitives that show them."""

    rest: Tensor
    tracks: Tensor
    """[T, V, 3] in the file's frame; [1, V, 3] zeros where nothing moves."""
    normals: Tensor | None
    faces: Tensor
    back: Tensor | None = None
    """[4, 4] from the file's frame."""
    users: list[Tree] = field(default_factory=list)

    def at(self, moment: int) -> tuple[Tensor, Tensor | None]:
        """How far places [V, 3], and normals, are off from rest at a moment."""
        if self.back is None:
            return self.tracks[0], None
        places = self.tracks[moment] @ self.back[:3, :3].T + self.back[:3, 3]
        if self.normals is None:
            return places - self.rest, None
        turned = _turned(self.normals, _around(self.rest, self.faces), _around(places, self.faces))
        return places - self.rest, turned - self.normals


def _around(vertices: Tensor, faces: Tensor) -> Tensor:
    """Unit normals [V, 3] of the faces that name a vertex: where a file cuts an edge to make it hard, it stays hard."""
    total, outward = torch.zeros_like(vertices), face_normals(vertices, faces)
    for k in range(3):
        total.index_add_(0, faces[:, k], outward)
    return normalize(total, dim=-1, eps=1e-30)


def _turned(normals: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Turn normals [V, 3] by the shortest turn from `start` to `end`, unit vectors (Rodrigues' formula)."""
    axis, cos = torch.linalg.cross(start, end), (start * end).sum(-1, keepdim=True)
    found = normals * cos + torch.linalg.cross(axis, normals)
    found = found + axis * (axis * normals).sum(-1, keepdim=True) / (1 + cos).clamp_min(1e-3)
    return torch.where(cos < -0.999, end, normalize(found, dim=-1))


def _merged_buffers(file: Gltf, tree: Tree) -> Parts:
    """All buffers as one, and views and accessors that say so; what was stored in the first one stays where it was."""
    parts, starts = Parts(), []
    for data in file.buffers:
        parts.data.extend(b"\0" * (-len(parts.data) % 4))
        starts.append(len(parts.data))
        parts.data.extend(data)
    parts.views, parts.accessors = tree.get("bufferViews", []), tree.get("accessors", [])
    for view in parts.views:
        start = starts[view["buffer"]]
        if start:
            view["byteOffset"] = start + view.get("byteOffset", 0)
        view["buffer"] = 0
    first = {key: value for key, value in (tree.get("buffers") or [{}])[0].items() if key != "uri"}
    tree["buffers"] = [first]
    # what is stored compressed as well is read from the copy that is not, by those who read the file from now on, too
    for holder in [*parts.views, *(p for mesh in tree.get("meshes", []) for p in mesh.get("primitives", []))]:
        for name in _STORED_OTHERWISE:
            holder.get("extensions", {}).pop(name, None)
        if holder.get("extensions") == {}:
            del holder["extensions"]
    used = [name for name in tree.get("extensionsUsed", []) if name not in _STORED_OTHERWISE]
    if used != tree.get("extensionsUsed", []):
        tree["extensionsUsed"] = used
    if tree.get("extensionsUsed") == []:
        del tree["extensionsUsed"]
    return parts


def _unit(vectors: np.ndarray) -> np.ndarray:
    import numpy as np

    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


# ---- a file made for a model of another format -------------------------------------------------------------------


def _made(model: Model, tracks: Tensor, times: Tensor, options: GltfOptions, placement: Placement | None) -> MovingGlb:
    """A GLB of the model's own vertices, with a primitive for each of its materials."""
    mesh, parts = model.mesh, Parts()
    attributes = {"POSITION": parts.accessor(mesh.vertices.numpy().astype("<f4"), FLOAT, bounds=True)}
    normals = _normals_of(model)
    if normals is not None:
        attributes["NORMAL"] = parts.accessor(normals.numpy().astype("<f4"), FLOAT)
    if mesh.uv is not None:
        attributes["TEXCOORD_0"] = parts.accessor(mesh.uv.numpy().astype("<f4"), FLOAT)
    if mesh.colors is not None:
        attributes["COLOR_0"] = parts.colors(mesh.colors)
    primitives: list[Tree] = []
    used = model.face_material.unique().tolist()
    for number, index in enumerate(used):
        corners = parts.triangles(mesh.faces[model.face_material == index], len(mesh.vertices))
        primitives.append({"attributes": attributes, "indices": corners, "material": number})
    shape: Tree = {"name": model.source.name, "primitives": primitives}
    entries = _materials(model, used, parts)
    bound = options.error * max(mesh.size, 1e-30)
    motion = plan_motion(mesh.vertices, tracks, times, bound, options, on_time=1.0)
    if motion is not None:
        piece = _Piece(mesh.vertices, tracks, normals, mesh.faces, torch.eye(4))
        weights, targets = [], []
        for moment in motion.targets:
            moved, turned = piece.at(moment)
            (entry,), weight = add_target(parts, [moved], [turned], options.quantize, bound)
            weights.append(weight)
            targets.append(entry)
        for primitive in primitives:
            primitive["targets"] = targets
        shape["weights"] = [0.0] * len(weights)
        channel = {"sampler": 0, "target": {"node": 0, "path": "weights"}}
        entries["animations"] = [
            {"name": options.name, "samplers": [add_clip(parts, motion, weights)], "channels": [channel]}
        ]
    data = glb_of_one(shape, {"name": model.source.name, "mesh": 0} | _upright(placement), entries, parts)
    return MovingGlb(data, 0 if motion is None else len(motion.keys), ())


def _normals_of(model: Model) -> Tensor | None:
    """The model's normals; None where it is to be shown flat, as an STL is."""
    if model.mesh.normals is not None or model.source.format == "stl":
        return model.mesh.normals
    return vertex_normals(model.mesh.vertices, model.mesh.faces)


def _upright(placement: Placement | None) -> Tree:
    """The rotation of a node that turns the file's frame to y up and the front towards +z [3.4]."""
    if placement is None:
        return {}
    front, left, up = placement.rotation  # the world's axes in the file
    rotation = torch.tensor([left, up, front], dtype=torch.float64)
    # turns about a whole number of quarters: the quaternion is the axis of the symmetric part, or of the other one
    w = float((1 + rotation.trace()).clamp_min(0).sqrt() / 2)
    if w > 1e-6:
        x, y, z = (
            (rotation[2, 1] - rotation[1, 2]),
            (rotation[0, 2] - rotation[2, 0]),
            (rotation[1, 0] - rotation[0, 1]),
        )
        quaternion = [float(x) / (4 * w), float(y) / (4 * w), float(z) / (4 * w), w]
    else:
        square = (rotation + torch.eye(3, dtype=torch.float64)) / 2  # axis times its transposed
        axis = normalize(square[int(square.diagonal().argmax())], dim=-1)
        quaternion = [*axis.tolist(), 0.0]
    return {} if quaternion[3] > 1 - 1e-9 else {"rotation": quaternion}


def _materials(model: Model, used: list[int], parts: Parts) -> Tree:
    """The materials with these numbers, and the images that they show."""
    entries: dict[str, list[Any]] = {"materials": []}
    numbers: dict[int, int] = {}
    for index in used:
        material = model.materials[index]
        look: Tree = {"baseColorFactor": list(material.color), "metallicFactor": 0.0, "roughnessFactor": 0.9}
        if material.image is not None and model.mesh.uv is not None:
            place = id(material.image)
            if place not in numbers:
                numbers[place] = len(entries.setdefault("textures", []))
                view = parts.view(encode_image(material.image))
                entries.setdefault("images", []).append({"mimeType": "image/png", "bufferView": view})
                across, down = (_WRAPS[wrap] for wrap in material.wrap)
                entries.setdefault("samplers", []).append({"wrapS": across, "wrapT": down})
                entries["textures"].append({"source": numbers[place], "sampler": numbers[place]})
            look["baseColorTexture"] = {"index": numbers[place]}
        entry: Tree = {"name": material.name, "pbrMetallicRoughness": look}
        if material.double_sided:
            entry["doubleSided"] = True
        if material.alpha_cutoff is not None:
            entry |= {"alphaMode": "MASK", "alphaCutoff": material.alpha_cutoff}
        entries["materials"].append(entry)
    return entries
