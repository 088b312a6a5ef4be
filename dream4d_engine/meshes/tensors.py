"""Tensors that are a mesh already, as other programs hand them over in memory, as a model."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..mesh import Mesh, MeshError
from .record import Material, Model, Source


def model_from_tensors(
    vertices: Tensor,
    faces: Tensor,
    uv: Tensor | None = None,
    colors: Tensor | None = None,
    texture: Tensor | None = None,
    name: str = "mesh",
) -> Model:
    """A model of vertices [V, 3] and faces [M, 3].

    Args:
        uv: [V, 2], from the texture's upper left corner. colors: [V, 3] or [V, 4], sRGB in [0, 1].
        texture: [H, W, 3 or 4] in [0, 1], sRGB; needs uv. name: what messages call it.

    Raises MeshError where that is no mesh.
    """
    digest = hashlib.sha256()
    for part, kind in ((vertices, torch.float32), (faces, torch.int64), (uv, torch.float32), (colors, torch.float32)):
        digest.update(b"-" if part is None else part.detach().to("cpu", kind).contiguous().numpy().tobytes())
    if colors is not None and (colors.ndim != 2 or colors.shape[1] not in (3, 4)):
        raise MeshError(f"{name}: colors must have the shape [V, 3] or [V, 4], got {list(colors.shape)}")
    image = None
    if texture is not None:
        if texture.ndim != 3 or texture.shape[-1] not in (3, 4):
            raise MeshError(f"{name}: its texture must have the shape [H, W, 3 or 4], got {list(texture.shape)}")
        if uv is None:
            raise MeshError(f"{name}: a texture needs uv, the places of the vertices in it")
        shown = texture.detach().cpu().float().nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
        opaque = torch.full_like(shown[..., :1], 255)
        image = torch.cat((shown[..., :3], shown[..., 3:] if shown.shape[-1] == 4 else opaque), -1)
        digest.update(image.numpy().tobytes())
    mesh = Mesh(
        vertices.detach().cpu().float(),
        faces.detach().cpu().long(),
        colors=None if colors is None else colors[:, :3].detach().cpu().float().clamp(0, 1),
        uv=None if uv is None else uv.detach().cpu().float(),
    )
    of_face = torch.zeros(len(mesh.faces), dtype=torch.int64)
    source = Source(name, "tensors", digest.hexdigest())
    return Model(mesh, (Material(name, image=image, double_sided=True),), of_face, source)
