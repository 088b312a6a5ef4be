"""A mesh as one binary glTF file (GLB): still, or moving by morph targets whose weights are animated.

glTF is y up with the front towards +z (specification 2.0, 3.4), a mesh here z up with the front towards +x. A number in
brackets names a section of the specification.
"""

from __future__ import annotations

import io
from typing import Any

from torch import Tensor

from ..mesh import Mesh, MeshError, vertex_normals
from ..meshes.glb import FLOAT, GltfOptions, Parts, add_clip, add_target, glb_of_one, plan_motion
from .images import to_bytes


def y_up(vectors: Tensor) -> Tensor:
    """Turn vectors [..., 3] from z up and front +x to y up and front +z."""
    return vectors[..., [1, 2, 0]]


def glb_bytes(mesh: Mesh, options: GltfOptions | None = None) -> tuple[bytes, int]:
    """Return the file, and how many key frames its animation has (0: a still mesh has none)."""
    options, parts = options or GltfOptions(), Parts()
    if not len(mesh.faces):
        raise MeshError("a mesh without faces can't be written")
    tracks = mesh.vertices[None] if mesh.tracks is None else mesh.tracks
    tracks = y_up(tracks.detach().float().cpu())
    normals = vertex_normals(tracks, mesh.faces.cpu())
    attributes = {
        "POSITION": parts.accessor(tracks[0].numpy().astype("<f4"), FLOAT, bounds=True),
        "NORMAL": parts.accessor(normals[0].numpy().astype("<f4"), FLOAT),
    }
    material = _material(mesh, options, parts, attributes)
    corners = parts.triangles(mesh.faces, len(tracks[0]))
    shape = {"name": options.name, "primitives": [{"attributes": attributes, "indices": corners, "material": 0}]}
    n_keys = 0
    if len(tracks) > 1 and (animation := _animate(tracks, normals, mesh, options, parts, shape)):
        material["animations"], n_keys = [animation], animation.pop("n_keys")
    return glb_of_one(shape, {"name": options.name, "mesh": 0}, material, parts), n_keys


def _material(mesh: Mesh, options: GltfOptions, parts: Parts, attributes: dict[str, int]) -> dict:
    """Add the mesh's colours; return the document's entries that say how they are shown."""
    look: dict[str, Any] = {"metallicFactor": 0.0, "roughnessFactor": 0.9}
    entries: dict[str, list[Any]] = {}
    if mesh.texture is not None and mesh.uv is not None:
        from PIL import Image

        attributes["TEXCOORD_0"] = parts.accessor(mesh.uv.cpu().numpy().astype("<f4"), FLOAT)
        buffer = io.BytesIO()
        Image.fromarray(to_bytes(mesh.texture)).save(buffer, "PNG", optimize=True)
        look["baseColorTexture"] = {"index": 0}
        entries["images"] = [{"mimeType": "image/png", "bufferView": parts.view(buffer.getvalue())}]
        entries["samplers"] = [{"magFilter": 9729, "minFilter": 9987, "wrapS": 33071, "wrapT": 33071}]  # clamped
        entries["textures"] = [{"source": 0, "sampler": 0}]
    elif mesh.colors is not None:
        attributes["COLOR_0"] = parts.colors(mesh.colors)
    material = {"pbrMetallicRoughness": look, "doubleSided": True}  # where the motion folds the inside may show
    if not options.lit:
        material["extensions"] = {"KHR_materials_unlit": {}}
        entries["extensionsUsed"] = ["KHR_materials_unlit"]
    return entries | {"materials": [material]}


def _animate(
    tracks: Tensor, normals: Tensor, mesh: Mesh, options: GltfOptions, parts: Parts, shape: dict
) -> dict | None:
    """Add a target for each key frame to the mesh's entry `shape`; return the clip, None where nothing moves."""
    if mesh.times is None:
        return None
    bound, times = options.error * max(mesh.size, 1e-9), mesh.times.detach().float().cpu()
    motion = plan_motion(tracks[0], tracks, times, bound, options)
    if motion is None:
        return None
    targets, weights = [], []
    for key in motion.targets:
        moved, turned = tracks[key] - tracks[0], normals[key] - normals[0]
        (entry,), weight = add_target(parts, [moved], [turned], options.quantize, bound)
        targets.append(entry)
        weights.append(weight)
    shape["primitives"][0]["targets"] = targets
    names = [f"t={float(times[key]):.3f}" for key in motion.targets]
    shape |= {"weights": [0.0] * len(targets), "extras": {"targetNames": names}}
    return {
        "name": options.name,
        "samplers": [add_clip(parts, motion, weights)],
        "channels": [{"sampler": 0, "target": {"node": 0, "path": "weights"}}],
        "n_keys": len(motion.keys),
    }
