"""Images of a mesh of others as three.js shows glTF's base colour without light, for cameras of the scene's world.

Textures and colours are multiplied in linear light and filtered there; what a pixel covers is averaged as it is shown
(sRGB), as a field's images are. Faces are seen from both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cameras import CameraBatch
from ..mesh import rasterize
from .color import linear_to_srgb, srgb_to_linear
from .record import Material, Model, Placement, Wrap

NEAR = 1e-2
"""What is nearer to a camera is cut off, world units."""


@dataclass(frozen=True)
class MeshImages:
    """What cameras [B, F] see of a mesh: images [B, F, H, W, channels]."""

    rgb: Tensor  # 3, sRGB in [0, 1]; the mean of what is covered, 0 where nothing is
    mask: Tensor  # 1, the share of the pixel that is covered
    depth: Tensor  # 1, distance along the ray in world units, mean of what is covered; 0 where nothing is


@dataclass(frozen=True)
class Surface:
    """A model in the world and on its device, ready to be looked at."""

    triangles: Tensor  # [M, 3, 3] in the world
    uv: Tensor | None  # [M, 3, 2]
    colors: Tensor | None  # [M, 3, 3] linear
    material: Tensor  # [M] int64
    materials: tuple[Material, ...]
    pyramids: tuple[tuple[Tensor, ...], ...]  # of each material, linear [h, w, 4], each half as large; () without
    texels: Tensor  # [M], how many of them lie on an area of 1


def surface_of(model: Model, placement: Placement, device: torch.device | str = "cpu") -> Surface:
    """Bring a model into the world, and its textures into linear light."""
    mesh, faces = model.mesh, model.mesh.faces
    # far from the origin or of tiny units, single precision would lose the shape
    world = placement.to_world(mesh.vertices.double()).float()
    triangles, material = world[faces].to(device), model.face_material.to(device)
    uv = None if mesh.uv is None else mesh.uv[faces].float().to(device)
    pyramids = tuple(_pyramid(one.image, device) for one in model.materials)
    sizes = [levels[0].shape[0] * levels[0].shape[1] if levels else 0 for levels in pyramids]
    texels = torch.zeros(len(triangles), device=device)
    if uv is not None:
        texels = _texels(triangles, uv, torch.tensor(sizes, dtype=torch.float32, device=device)[material])
    colors = None if mesh.colors is None else srgb_to_linear(mesh.colors[faces].float()).to(device)
    return Surface(triangles, uv, colors, material, model.materials, pyramids, texels)


@torch.no_grad()
def look_at(surface: Surface, cameras: CameraBatch, supersample: int = 4) -> MeshImages:
    """Draw a mesh for all cameras; a pixel is the mean of `supersample`^2 places in it."""
    cameras = cameras.to(surface.triangles.device)
    height, width = cameras.height, cameras.width
    fine = cameras.resized(height * supersample, width * supersample)
    rows = []
    for group in range(cameras.shape[0]):
        for frame in range(cameras.shape[1]):
            seen = _draw(surface, fine.c2w[group, frame], fine.fov_y[group, frame], fine.height, fine.width)
            rows.append(seen.view(height, supersample, width, supersample, 5).mean((1, 3)))
    images = torch.stack(rows).view(*cameras.shape, height, width, 5)
    mask = images[..., 3:4]
    share = mask.clamp_min(1e-6)
    return MeshImages(images[..., :3] / share, mask, images[..., 4:] / share)


def _pyramid(image: Tensor | None, device: torch.device | str) -> tuple[Tensor, ...]:
    """A texture in linear light and its halves, quarters and so on, down to one texel a side."""
    if image is None:
        return ()
    texels = image.to(device).float() / 255
    levels = [torch.cat((srgb_to_linear(texels[..., :3]), texels[..., 3:]), -1)]
    while max(levels[-1].shape[:2]) > 1:
        last = levels[-1].movedim(-1, 0)[None]
        kernel = tuple(2 if side > 1 else 1 for side in last.shape[2:])
        levels.append(torch.nn.functional.avg_pool2d(last, kernel)[0].movedim(0, -1))
    return tuple(levels)


def _before(local: Tensor) -> tuple[Tensor, Tensor]:
    """Cut triangles [M, 3, 3] (right, up, ahead) at the near plane; return the pieces [P, 3, 3] and whose they are."""
    ahead = local[..., 2] > NEAR
    n_ahead = ahead.sum(-1)
    keep = (n_ahead == 3).nonzero()[:, 0]
    pieces, faces = [local[keep]], [keep]
    for count in (1, 2):
        cut = (n_ahead == count).nonzero()[:, 0]
        # turned so that the corner which is alone on its side of the plane is the first
        alone = (ahead[cut] == (count == 1)).int().argmax(-1) if len(cut) else cut
        order = (alone[:, None] + torch.arange(3, device=local.device)) % 3
        a, b, c = local[cut[:, None], order].unbind(1)
        ab, ac = (torch.lerp(a, q, ((NEAR - a[:, 2]) / (q[:, 2] - a[:, 2]))[:, None]) for q in (b, c))
        corners = [(a, ab, ac)] if count == 1 else [(ab, b, c), (ab, c, ac)]
        pieces += [torch.stack(three, 1) for three in corners]
        faces += [cut] * len(corners)
    return torch.cat(pieces), torch.cat(faces)


def _meet(triangles: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Where lines [S, 3] from the origin meet the planes of triangles [S, 3, 3]: barycentric places [S, 3], and how
    many times the direction that is [S] (Moeller and Trumbore 1997)."""
    a = triangles[:, 0]
    one, two = triangles[:, 1] - a, triangles[:, 2] - a
    across = torch.linalg.cross(directions, two)
    whole = (one * across).sum(-1)
    second = -(a * across).sum(-1) / whole
    side = torch.linalg.cross(-a, one)
    third, far = (directions * side).sum(-1) / whole, (two * side).sum(-1) / whole
    return torch.stack((1 - second - third, second, third), -1).clamp(0, 1), far


def _draw(surface: Surface, c2w: Tensor, fov_y: Tensor, height: int, width: int) -> Tensor:
    """[H, W, 5] of one camera, a place in the middle of each pixel: sRGB, 1 where something is, distance."""
    device = surface.triangles.device
    local = ((surface.triangles - c2w[:3, 3]) @ c2w[:3, :3]) * torch.tensor([1.0, 1.0, -1.0], device=device)
    pieces, of = _before(local)
    focal = 0.5 * height / torch.tan(fov_y / 2)
    x, y, ahead = pieces.unbind(-1)
    # -1 / ahead is linear in the image, and smallest where it is nearest
    flat = torch.stack((width / 2 + focal * x / ahead, height / 2 - focal * y / ahead, -1 / ahead), -1)

    def look(face: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the places x, y [S] of the image show of faces: sRGB, whether there is anything, and the distance."""
        directions = torch.stack(((x - width / 2) / focal, (height / 2 - y) / focal, torch.ones_like(x)), -1)
        where, far = _meet(local[face], directions)
        normal = torch.linalg.cross(local[face, 1] - local[face, 0], local[face, 2] - local[face, 0])
        slant = (torch.nn.functional.normalize(normal, dim=-1) * directions).sum(-1).abs().clamp_min(1e-3)
        # the area of the surface that a pixel covers is (far / focal)^2 |d|^3 / |n . d|, near enough with |d| = 1
        color, there = _paint(surface, face, where, (far / focal).square() / slant)
        return color, there, far * directions.norm(dim=-1)

    def shows(piece: Tensor, barycentric: Tensor) -> Tensor:
        x, y = (barycentric[..., None] * flat[piece, :, :2]).sum(1).unbind(-1)
        return look(of[piece], x, y)[1]

    cut_out = any(material.alpha_cutoff is not None for material in surface.materials)
    corners = torch.arange(len(flat) * 3, device=device).view(-1, 3)
    found = rasterize(flat.reshape(-1, 3), corners, height, width, shows if cut_out else None).face
    image = torch.zeros(height, width, 5, device=device)
    hit = found >= 0
    rows, columns = hit.nonzero().unbind(-1)
    color, _, distance = look(of[found[hit]], columns + 0.5, rows + 0.5)
    image[hit] = torch.cat((color, torch.ones_like(distance)[:, None], distance[:, None]), -1)
    return image


def _texels(triangles: Tensor, uv: Tensor, sizes: Tensor) -> Tensor:
    """[M], how many of the texture's texels lie on an area of 1 of each face; `sizes`: of the texture of each face."""
    one, two = uv[:, 1] - uv[:, 0], uv[:, 2] - uv[:, 0]
    share = (one[:, 0] * two[:, 1] - one[:, 1] * two[:, 0]).abs()
    area = torch.linalg.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]).norm(dim=-1)
    return share * sizes / area.clamp_min(1e-12)


def _paint(surface: Surface, face: Tensor, where: Tensor, area: Tensor) -> tuple[Tensor, Tensor]:
    """Return sRGB [S, 3] and whether there is anything [S], at barycentric places [S, 3] of faces [S], averaged over
    about such an area [S] of the surface."""
    light = torch.ones(len(face), 4, device=face.device)
    material = surface.material[face]
    for number, one in enumerate(surface.materials):
        mine = (material == number).nonzero()[:, 0]
        if not len(mine):
            continue
        color = light.new_tensor(one.color).expand(len(mine), 4)
        levels = surface.pyramids[number]
        if levels and surface.uv is not None:
            uv = (where[mine, :, None] * surface.uv[face[mine]]).sum(1)
            # the halving at which a texel is about as large
            level = (0.5 * (area[mine] * surface.texels[face[mine]]).clamp_min(1e-12).log2()).round().long()
            color = color * _texture(levels, uv, level.clamp(0, len(levels) - 1), one.wrap)
        light[mine] = color
    if surface.colors is not None:
        light[:, :3] *= (where[..., None] * surface.colors[face]).sum(1)
    cutoffs = [-1.0 if one.alpha_cutoff is None else one.alpha_cutoff for one in surface.materials]
    return linear_to_srgb(light[:, :3].clamp(0, 1)), light[:, 3] >= light.new_tensor(cutoffs)[material]


def _texture(levels: tuple[Tensor, ...], uv: Tensor, level: Tensor, wrap: tuple[Wrap, Wrap]) -> Tensor:
    """Light and alpha [S, 4] at uv [S, 2], each from its halving of the texture, between texels bilinearly."""
    found = torch.empty(len(uv), 4, device=uv.device)
    for number in level.unique().tolist():
        mine = level == number
        texels = levels[number]
        size = uv.new_tensor([texels.shape[1], texels.shape[0]])
        at = uv[mine] * size - 0.5
        low = at.floor()
        right, down = (at - low).unbind(-1)
        columns = [_wrapped(low[:, 0] + k, texels.shape[1], wrap[0]) for k in (0, 1)]
        rows = [_wrapped(low[:, 1] + k, texels.shape[0], wrap[1]) for k in (0, 1)]
        above, below = (torch.lerp(texels[row, columns[0]], texels[row, columns[1]], right[:, None]) for row in rows)
        found[mine] = torch.lerp(above, below, down[:, None])
    return found


def _wrapped(place: Tensor, n: int, wrap: Wrap) -> Tensor:
    """The texel that stands for one at `place` (whole numbers, of any size), of n."""
    if wrap == "clamp":
        return place.clamp(0, n - 1).long()
    if wrap == "repeat":
        return place.remainder(n).long().clamp(0, n - 1)
    turn = place.remainder(2 * n)
    return torch.minimum(turn, 2 * n - 1 - turn).long().clamp(0, n - 1)
