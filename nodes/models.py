"""Meshes of others between ComfyUI and the engine: its MESH, its 3D files, and those that lie in its folders."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import folder_paths
import torch
from comfy_api.latest import Types, io
from torch import Tensor

from ..dream4d_engine.documents import describe
from ..dream4d_engine.export.gltf import y_up
from ..dream4d_engine.mesh import Mesh, MeshError
from ..dream4d_engine.meshes import READ_FORMATS, Model, model_from_tensors, read_model
from ..dream4d_engine.meshes.color import linear_to_srgb, srgb_to_linear
from .places import files_below, path_below
from .session import gradients

Given: TypeAlias = Types.MESH | Types.File3D
SUFFIXES = tuple(f".{known}" for known in READ_FORMATS)
_FOLDER = "3d"
_GREY = 0.22
"""How bright ComfyUI writes a mesh that says nothing of its colour (nodes_save_3d.py), in light."""
_TYPES = [io.Mesh, io.File3DGLB, io.File3DGLTF, io.File3DOBJ, io.File3DPLY, io.File3DSTL, io.File3DAny]


def model_input(name: str, tooltip: str, optional: bool = False) -> io.Input:
    """A socket for a mesh, whether it is one already or a file."""
    return io.MultiType.Input(name, types=_TYPES, optional=optional, tooltip=tooltip)


def core_mesh(mesh: Mesh) -> Types.MESH:
    """A mesh as ComfyUI's nodes have it: a batch of one on the CPU, y up, colours as amounts of light.

    It says of itself that it is unlit, as the field's colours hold light of their own; core's writer passes that on
    unless there is a texture.
    """

    def batch(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().cpu()[None].contiguous()

    return Types.MESH(
        batch(y_up(mesh.vertices)),
        batch(mesh.faces),
        uvs=batch(mesh.uv),
        vertex_colors=None if mesh.colors is None else batch(srgb_to_linear(mesh.colors)),
        texture=batch(mesh.texture),
        normals=None if mesh.normals is None else batch(y_up(mesh.normals)),
        unlit=True,
    )


def model_of(given: Given, clip: str | None = None, time: float = 0.0) -> Model:
    """Read what came through a socket, at a second of a clip (files of glTF alone have any).

    Raises MeshError for what is no mesh that can be used.
    """
    with gradients():  # what is made or copied here can be trained with
        if isinstance(given, Types.File3D):
            return read_model(_place_of(given), clip, time)
        if clip is not None:
            raise MeshError("a mesh of the graph has no clips: leave clip empty, or connect the file it comes from")
        return _model_of_tensors(given)


def _place_of(file: Types.File3D) -> Path:
    """Where a 3D file lies; one that lies in memory is written into the temporary folder, under its fingerprint."""
    form = str(file.format or "").lower()
    if form not in READ_FORMATS:
        known = ", ".join(READ_FORMATS)
        raise MeshError(f"a 3D file of the format {describe(form)} came: take one of {known}, or export it as GLB")
    if file.is_disk_backed:
        path = Path(file.get_source())
        if not path.is_file():
            raise MeshError(f"there is no file {path}: choose it again in the node that it comes from")
        if path.suffix.lower() == f".{form}":
            return path
    data = file.get_bytes()
    folder = Path(folder_paths.get_temp_directory()) / "dream4d_models" / hashlib.sha256(data).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"model.{form}"
    if not path.exists():
        file.save_to(str(path))
    return path


def _model_of_tensors(mesh: Types.MESH) -> Model:
    """A mesh of the graph as a model, with the colours that ComfyUI would write it with."""
    for name in ("vertices", "faces"):
        value = getattr(mesh, name, None)
        if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[-1] != 3:
            shown = list(value.shape) if isinstance(value, Tensor) else describe(value)
            raise MeshError(f"the mesh's {name} must have the shape [1, N, 3], got {shown}")
    n = len(mesh.vertices)
    if n != 1 or len(mesh.faces) != 1:
        raise MeshError(f"the mesh is a batch of {n}: one mesh is needed, so make or load them one by one")
    n_vertices = mesh.vertices.shape[1] if mesh.vertex_counts is None else int(mesh.vertex_counts[0])
    n_faces = mesh.faces.shape[1] if mesh.face_counts is None else int(mesh.face_counts[0])
    if not n_vertices or not n_faces:
        raise MeshError(f"the mesh has {n_vertices} vertices and {n_faces} faces: there is nothing to see of it")

    def rows(value: Tensor | None, what: str) -> Tensor | None:
        if value is None:
            return None
        if not isinstance(value, Tensor) or value.ndim != 3 or len(value) != 1 or value.shape[1] < n_vertices:
            raise MeshError(f"the mesh's {what} must be a tensor [1, {n_vertices}, ...], one row for each vertex")
        return value[0, :n_vertices].float().cpu().clone()

    uv, colors = rows(mesh.uvs, "uvs"), rows(mesh.vertex_colors, "vertex_colors")
    texture = None if mesh.texture is None or uv is None else mesh.texture[0].clone()
    return model_from_tensors(
        mesh.vertices[0, :n_vertices].clone(),
        mesh.faces[0, :n_faces].clone(),
        uv,
        _colors(mesh, colors, texture, n_vertices),
        texture,
    )


def _colors(mesh: Types.MESH, colors: Tensor | None, texture: Tensor | None, n_vertices: int) -> Tensor | None:
    """The vertices' colours [V, 3], sRGB, with the material's factor in them; None where there is neither."""
    material = mesh.material if isinstance(mesh.material, Mapping) else {}
    bare = None if colors is not None or texture is not None else [_GREY] * 3
    factor = material.get("base_color_factor") or bare
    if factor is None:
        return None if colors is None else linear_to_srgb(colors[:, :3].clamp(0, 1))
    light = torch.ones(n_vertices, 3) if colors is None else colors[:, :3].clamp(0, 1)
    return linear_to_srgb((light * light.new_tensor([float(part) for part in factor[:3]])).clamp(0, 1))


def fingerprint_of(model: Model) -> str:
    """Change when anything of a model does that is seen."""
    found = hashlib.sha256(repr((model.source, [_plain(one) for one in model.materials])).encode())
    mesh = model.mesh
    images = [material.image for material in model.materials]
    for value in (mesh.vertices, mesh.faces, mesh.uv, mesh.colors, model.face_material, *images):
        found.update(b"-" if value is None else value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _plain(material: Any) -> tuple:
    return (material.color, material.alpha_cutoff, material.wrap, material.double_sided)


# ---- files ---------------------------------------------------------------------------------------------------------


def model_files() -> list[str]:
    """The files that may be meshes, as `files_below` names them; of the input folder those that core's loaders list."""
    found = files_below(SUFFIXES)
    return [name for name in found if not name.endswith("[input]") or name.startswith(f"{_FOLDER}/")]


def model_path(file: str) -> Path:
    """Return the place of a file named like those of `model_files`; PlaceError if it leads elsewhere or isn't there."""
    return path_below(file, SUFFIXES, "file of a mesh")
