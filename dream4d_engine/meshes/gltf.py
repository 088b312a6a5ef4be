"""GLB and glTF files as models: all triangles of the scene at one moment of a clip, or at rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..documents import as_text, describe
from ..mesh import Mesh, MeshError
from .color import linear_to_srgb
from .container import Gltf, Tree, read_bytes, read_gltf, uri_bytes
from .images import MOST_PIXELS, BadImage, decode_image
from .instances import EXTENSION, spread_instances
from .poses import Pose, clip_names, clip_seconds, pose_nodes, pose_vertices, same_length
from .record import Material, Model, Part, Source, Wrap

if TYPE_CHECKING:
    import numpy as np

MOST_VERTICES = MOST_FACES = 2**24
"""Of a model: memory for a hundred times as many bytes is taken."""
_ALL_PIXELS = 2**27
_COMPRESSED = ("KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_meshopt_compression")
_UNDERSTOOD = {"KHR_mesh_quantization", "KHR_texture_transform", "EXT_texture_webp", "KHR_lights_punctual"}
_UNDERSTOOD |= {"KHR_texture_basisu", "KHR_animation_pointer", "KHR_node_visibility", "KHR_xmp_json_ld"} | {EXTENSION}
_WRAPS: dict[int, Wrap] = {33071: "clamp", 33648: "mirror", 10497: "repeat"}


@dataclass
class _Gathered:
    """What the primitives have added up to so far."""

    vertices: list[np.ndarray] = field(default_factory=list)
    uv: list[np.ndarray | None] = field(default_factory=list)
    colors: list[np.ndarray | None] = field(default_factory=list)
    faces: list[np.ndarray] = field(default_factory=list)
    materials: list[int] = field(default_factory=list)  # of each piece of faces
    parts: list[Part] = field(default_factory=list)
    firsts: dict[object, int] = field(default_factory=dict)  # of vertices that several primitives share
    n_vertices: int = 0
    n_faces: int = 0
    notes: dict[str, None] = field(default_factory=dict)  # in order, each once


def read_gltf_model(path: Path, clip: str | None = None, time: float = 0.0) -> Model:
    """Read a GLB or glTF file. Raises MeshError where there is no model to be had."""
    file = read_gltf(path)
    _check_extensions(file)
    file = spread_instances(file)
    _check_moment(file, clip, time)
    pose, gathered = pose_nodes(file, clip, time), _Gathered()
    looks = _Looks(file, gathered.notes)
    for node in pose.shown:
        entry = file.entry("nodes", node, "the scene")
        if entry.get("mesh") is None:
            continue
        if file.extension(entry, "EXT_mesh_gpu_instancing", f"nodes[{node}]") is not None:
            gathered.notes["what EXT_mesh_gpu_instancing repeats was taken once"] = None
        mesh = file.entry("meshes", entry["mesh"], f"nodes[{node}].mesh")
        for number, primitive in enumerate(file.get(mesh, "primitives", list, f"meshes[{entry['mesh']}]", [])):
            where = f"meshes[{entry['mesh']}].primitives[{number}]"
            if not isinstance(primitive, dict):
                raise file.fault(where, "must hold an object")
            _gather(file, pose, (node, entry["mesh"], number), primitive, gathered, looks)
    if not gathered.faces:
        raise MeshError(f"{file.name} has no faces in its scene: export it with its surface, not as points or lines")
    if any(file.entry("nodes", node, "the scene").get("skin") is not None for node in pose.shown):
        moment = "at rest" if clip is None else f"at {time:g} s of the clip {clip}"
        gathered.notes[f"its skin was posed {moment}"] = None
    if clip is not None and time > (end := clip_seconds(file, clip)) + 1e-3:
        gathered.notes[f"the clip {clip} ends at {end:.4g} s: its last moment was taken"] = None
    form = "glb" if file.chunk or path.suffix.lower() != ".gltf" else "gltf"
    source = Source(as_text(file.name), "glb" if form == "glb" else "gltf", file.sha256, clip, time)
    return _model(gathered, looks, source, file)


def _model(gathered: _Gathered, looks: _Looks, source: Source, file: Gltf) -> Model:
    import numpy as np

    def joined(columns: list[np.ndarray | None], width: int, otherwise: float) -> torch.Tensor | None:
        if all(column is None for column in columns):
            return None
        lengths = [len(v) for v in gathered.vertices]
        filled = [
            np.full((n, width), otherwise, "f4") if column is None else column.astype("f4")
            for n, column in zip(lengths, columns, strict=True)
        ]
        return torch.from_numpy(np.concatenate(filled))

    with np.errstate(over="ignore"):
        vertices = torch.from_numpy(np.concatenate(gathered.vertices).astype("f4"))
    if not bool(vertices.isfinite().all()):
        raise MeshError(f"{file.name} has vertices so far out that they are no numbers: scale it down")
    faces = torch.from_numpy(np.concatenate(gathered.faces))
    linear = joined(gathered.colors, 3, 1.0)
    mesh = Mesh(
        vertices,
        faces,
        colors=None if linear is None else linear_to_srgb(linear.clamp(0, 1)),
        uv=joined(gathered.uv, 2, 0.0),
    )
    counts = torch.tensor([len(piece) for piece in gathered.faces])
    of_face = torch.tensor(gathered.materials).repeat_interleave(counts)
    return Model(mesh, tuple(looks.materials), of_face, source, tuple(gathered.parts), tuple(gathered.notes), file)


def _check_extensions(file: Gltf) -> None:
    """Refuse a file that can't be read rightly without an extension that is not known here."""
    for name in file.get(file.tree, "extensionsRequired", list, "the file", []):
        if name in _COMPRESSED:
            raise MeshError(
                f"{file.name} is compressed ({name}), which this program can't read: save it again "
                "without compression, in Blender or with npx @gltf-transform/cli copy IN.glb OUT.glb"
            )
        if name not in _UNDERSTOOD and not str(name).startswith("KHR_materials_"):
            raise MeshError(
                f"{file.name} needs the extension {describe(name)}, which this program can't read: export it without"
            )


def _check_moment(file: Gltf, clip: str | None, time: float) -> None:
    if clip is None and time:
        names = clip_names(file)
        has = f"it has {', '.join(names)}" if names else "it has none, so leave the time away"
        raise MeshError(f"{file.name}: a time of {time:g} s needs the clip's name: {has}")
    if not 0 <= time < 1e6:
        raise MeshError(f"{file.name}: the time must be 0 or more seconds, got {time:g}")


def _gather(
    file: Gltf, pose: Pose, at: tuple[int, int, int], primitive: Tree, gathered: _Gathered, looks: _Looks
) -> None:
    """Add a primitive's vertices and faces."""
    import numpy as np

    node, mesh, number = at
    where = f"meshes[{mesh}].primitives[{number}]"
    mode = file.get(primitive, "mode", int, where, 4)
    if mode not in (4, 5, 6):
        gathered.notes["points and lines were left out"] = None
        return
    attributes = file.object_in(primitive, "attributes", where)
    _check_compressed(file, primitive, attributes, where)
    material = looks.of(primitive, where)
    uv_of = looks.uv_of[material]
    # primitives that share their vertices do so here, too
    shared = (node, str(sorted(attributes.items())), str(primitive.get("targets")), uv_of)
    if shared not in gathered.firsts:
        count = file.get(file.entry("accessors", attributes["POSITION"], where), "count", int, where, 0)
        gathered.n_vertices += count
        if gathered.n_vertices > MOST_VERTICES:  # before they are read: a file of a few bytes may claim any number
            raise MeshError(f"{file.name} has more than {MOST_VERTICES:,} vertices: reduce it first")
        posed = pose_vertices(file, pose, node, primitive, where)
        gathered.firsts[shared] = gathered.n_vertices - count
        gathered.vertices.append(posed.world)
        gathered.uv.append(looks.uv(attributes, uv_of, count, where))
        gathered.colors.append(_colors(file, attributes, count, where, gathered.notes))
        looks.mirrored[shared] = posed.mirrored
    first = gathered.firsts[shared]
    count = file.get(file.entry("accessors", attributes["POSITION"], where), "count", int, where, 0)
    faces = triangles(file, primitive, mode, count, where)
    gathered.n_faces += len(faces)
    if gathered.n_faces > MOST_FACES:
        raise MeshError(f"{file.name} has more than {MOST_FACES:,} faces: reduce it first")
    gathered.parts.append(Part(node, mesh, number, first, count))
    if len(faces):
        faces = faces[:, ::-1] if looks.mirrored[shared] else faces
        gathered.faces.append(np.ascontiguousarray(faces) + first)
        gathered.materials.append(material)


def _check_compressed(file: Gltf, primitive: Tree, attributes: Tree, where: str) -> None:
    found = file.extension(primitive, "KHR_draco_mesh_compression", where)
    position = file.entry("accessors", attributes["POSITION"], f"{where}.attributes.POSITION")
    if found is not None and "bufferView" not in position:
        raise file.fault(where, "is compressed (KHR_draco_mesh_compression): save the model again without compression")


def triangles(file: Gltf, primitive: Tree, mode: int, count: int, where: str) -> np.ndarray:
    """A primitive's faces [M, 3], counter-clockwise [3.7.2.1]."""
    import numpy as np

    if primitive.get("indices") is None:
        order = np.arange(count)
    else:
        rows = file.accessor(primitive["indices"], f"{where}.indices", ("SCALAR",))
        if rows.dtype.kind != "u":
            raise file.fault(f"{where}.indices", "must be whole numbers without a sign: the file is damaged")
        order = rows[:, 0].astype("i8")
        if int(order.max()) >= count:
            raise file.fault(f"{where}.indices", f"name vertex {int(order.max()):,} of {count:,}: the file is damaged")
    if mode == 4:
        return order[: len(order) // 3 * 3].reshape(-1, 3)
    if len(order) < 3:
        return np.zeros((0, 3), "i8")
    i = np.arange(len(order) - 2)
    if mode == 5:
        return order[np.stack((i, i + 1 + i % 2, i + 2 - i % 2), 1)]
    return order[np.stack((i + 1, i + 2, np.zeros_like(i)), 1)]


def _colors(file: Gltf, attributes: Tree, count: int, where: str, notes: dict[str, None]) -> np.ndarray | None:
    """The vertices' colours [V, 3], linear."""
    if "COLOR_0" not in attributes:
        return None
    said = f"{where}.attributes.COLOR_0"
    colors = same_length(file, file.accessor(attributes["COLOR_0"], said, ("VEC3", "VEC4")), count, said)
    if colors.dtype.kind != "f":
        raise file.fault(said, "must hold floats, or whole numbers that are normalized")
    if colors.shape[1] == 4 and bool((colors[:, 3] < 0.999).any()):
        notes["the vertices' alpha was left out: they are opaque"] = None
    return colors[:, :3]


# ---- materials ---------------------------------------------------------------------------------------------------

UvOf = tuple[int, tuple[float, float, float, float, float]]
"""Which set of coordinates a texture takes, and how they are moved, turned and scaled before."""


class _Looks:
    """The materials met so far."""

    def __init__(self, file: Gltf, notes: dict[str, None]) -> None:
        self.file, self.notes = file, notes
        self.materials: list[Material] = []
        self.uv_of: list[UvOf | None] = []
        self.mirrored: dict[object, bool] = {}
        self._numbers: dict[int, int] = {}
        self._images: dict[int, torch.Tensor | None] = {}
        self._pixels = 0

    def of(self, primitive: Tree, where: str) -> int:
        """The number of a primitive's material."""
        index = primitive.get("material")
        key = -1 if index is None else index
        if index is not None:
            self.file.entry("materials", index, f"{where}.material")
        if key not in self._numbers:
            material, uv_of = self._read(index)
            self._numbers[key] = len(self.materials)
            self.materials.append(material)
            self.uv_of.append(uv_of)
        return self._numbers[key]

    def uv(self, attributes: Tree, uv_of: UvOf | None, count: int, where: str) -> np.ndarray | None:
        """The coordinates of a texture [V, 2], transformed (KHR_texture_transform)."""
        import numpy as np

        number, (right, down, angle, wide, high) = uv_of or (0, (0, 0, 0, 1, 1))
        name = f"TEXCOORD_{number}"
        if name not in attributes:
            if uv_of is not None:
                self.notes[f"a texture lacks its coordinates ({name}): its upper left corner is shown"] = None
            return None
        said = f"{where}.attributes.{name}"
        uv = same_length(self.file, self.file.accessor(attributes[name], said, ("VEC2",)), count, said).astype("f8")
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[cos * wide, sin * high], [-sin * wide, cos * high]])
        return uv @ turn.T + np.array([right, down])

    def _read(self, index: int | None) -> tuple[Material, UvOf | None]:
        file, where = self.file, f"materials[{index}]"
        if index is None:
            return Material("default", double_sided=False), None
        entry = file.entry("materials", index, "a primitive")
        name = file.get(entry, "name", str, where, "") or where
        look, factor, texture = (
            file.object_in(entry, "pbrMetallicRoughness", where),
            "baseColorFactor",
            "baseColorTexture",
        )
        old = file.extension(entry, "KHR_materials_pbrSpecularGlossiness", where)
        if old is not None:
            look, factor, texture = old, "diffuseFactor", "diffuseTexture"
        r, g, b, a = file.numbers(look, factor, 4, where, [1.0, 1.0, 1.0, 1.0])
        mode = file.get(entry, "alphaMode", str, where, "OPAQUE")
        cutoff = file.get(entry, "alphaCutoff", float, where, 0.5) if mode == "MASK" else None
        if mode == "BLEND":
            self.notes[f"the material {name} lets light through (BLEND): it was taken as opaque"] = None
        light = file.numbers(entry, "emissiveFactor", 3, where, [0.0, 0.0, 0.0])
        if any(light) and not any((r, g, b)):
            (r, g, b), look, texture = (min(max(part, 0.0), 1.0) for part in light), entry, "emissiveTexture"
            self.notes[f"the material {name} is black and gives off light: that was taken as its colour"] = None
        elif any(light):
            self.notes[f"the light that the material {name} gives off was left out"] = None
        image, wrap, uv_of = None, Material().wrap, None
        if look.get(texture) is not None:
            image, wrap, uv_of = self._texture(file.object_in(look, texture, where), f"{where}.{texture}")
        double_sided = file.get(entry, "doubleSided", bool, where, False)
        return Material(name, (r, g, b, a), image, cutoff, double_sided, wrap), None if image is None else uv_of

    def _texture(self, info: Tree, where: str) -> tuple[torch.Tensor | None, tuple[Wrap, Wrap], UvOf]:
        file = self.file
        texture = file.entry("textures", info.get("index"), f"{where}.index")
        said, number = f"textures[{info['index']}]", file.get(info, "texCoord", int, where, 0)
        moved = file.extension(info, "KHR_texture_transform", where)
        placed = (0.0, 0.0, 0.0, 1.0, 1.0)
        if moved is not None:
            number = file.get(moved, "texCoord", int, where, number)
            right, down = file.numbers(moved, "offset", 2, where, [0.0, 0.0])
            wide, high = file.numbers(moved, "scale", 2, where, [1.0, 1.0])
            placed = (right, down, file.get(moved, "rotation", float, where, 0.0), wide, high)
        wrap: tuple[Wrap, Wrap] = ("repeat", "repeat")
        if texture.get("sampler") is not None:
            sampler = file.entry("samplers", texture["sampler"], f"{said}.sampler")
            across, down_ = (file.get(sampler, key, int, said, 10497) for key in ("wrapS", "wrapT"))
            wrap = (_WRAPS.get(across, "repeat"), _WRAPS.get(down_, "repeat"))
        webp = file.extension(texture, "EXT_texture_webp", said)
        source = texture.get("source") if webp is None else webp.get("source")
        if source is None:
            kinds = ", ".join(file.object_in(texture, "extensions", said)) or "no image"
            self.notes[f"{said} can't be read ({kinds}): its material is shown without"] = None
            return None, wrap, (number, placed)
        return self._image(source, said), wrap, (number, placed)

    def _image(self, index: Any, said_by: str) -> torch.Tensor | None:
        """The pixels of an image, None (and a note) where they can't be had."""
        entry, where = self.file.entry("images", index, f"{said_by}.source"), f"images[{index}]"
        if index in self._images:
            return self._images[index]
        try:
            self._images[index] = decode_image(image_bytes(self.file, entry, where), f"{self.file.name}: {where}")
        except BadImage as error:
            self.notes[f"{where} {error}: its material is shown without"] = None
            self._images[index] = None
        found = self._images[index]
        self._pixels += 0 if found is None else found.shape[0] * found.shape[1]
        if self._pixels > _ALL_PIXELS:
            raise MeshError(f"{self.file.name}: its textures have more than {_ALL_PIXELS:,} pixels: make them smaller")
        return found


def image_bytes(file: Gltf, entry: Tree, where: str) -> bytes:
    """An image's file, from the model's buffers or from beside it. BadImage where it is not there."""
    uri = file.get(entry, "uri", str, where, "")
    if not uri:
        return bytes(file.view(entry.get("bufferView"), f"{where}.bufferView")[0])
    if uri[:5].lower() == "data:":
        return uri_bytes(file, uri, where, len(uri))
    path = file.file_beside(uri, f"{where}.uri")
    if not path.is_file():
        raise BadImage(f"names the file {describe(uri)}, which is not there")
    return read_bytes(path, 16 * MOST_PIXELS)
