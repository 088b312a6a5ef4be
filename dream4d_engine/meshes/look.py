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

NEAR = 1e-3
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


def surface_of(model: Model, placement: Placement, device: torch.device | str = "cpu") -> Surface:
    """Bring a model into the world, and its textures into linear light."""
    mesh, faces = model.mesh, model.mesh.faces
    # far from the origin or of tiny units, single precision would lose the shape
    world = placement.to_world(mesh.vertices.double()).float()
    return Surface(
        world[faces].to(device),
        None if mesh.uv is None else mesh.uv[faces].float().to(device),
        None if mesh.colors is None else srgb_to_linear(mesh.colors[faces].float()).to(device),
        model.face_material.to(device),
        model.materials,
        tuple(_pyramid(material.image, device) for material in model.materials),
    )


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


@dataclass(frozen=True)
class _Pieces:
    """What of the faces lies before a camera: triangles, some of them cut."""

    corners: Tensor  # [P, 3, 3] in the camera's frame: right, up and ahead
    shares: Tensor  # [P, 3, 3] barycentric places of the corners in their face
    face: Tensor  # [P] int64


def _before(local: Tensor) -> _Pieces:
    """Cut triangles [M, 3, 3] (right, up, ahead) at the near plane."""
    n, device = len(local), local.device
    whole = torch.eye(3, device=device).expand(n, 3, 3)
    ahead = local[..., 2] > NEAR
    n_ahead = ahead.sum(-1)
    keep = (n_ahead == 3).nonzero()[:, 0]
    parts = [(local[keep], whole[keep], keep)]
    for count in (1, 2):
        cut = (n_ahead == count).nonzero()[:, 0]
        if not len(cut):
            continue
        # turned so that the corner which is alone on its side of the plane is the first
        alone = (ahead[cut] == (count == 1)).int().argmax(-1)
        order = (alone[:, None] + torch.arange(3, device=device)) % 3
        rows = torch.arange(len(cut), device=device)[:, None]
        a, b, c = local[cut][rows, order].unbind(1)
        sa, sb, sc = whole[cut][rows, order].unbind(1)

        def met(p: Tensor, q: Tensor, sp: Tensor, sq: Tensor) -> tuple[Tensor, Tensor]:
            share = ((NEAR - p[:, 2]) / (q[:, 2] - p[:, 2]))[:, None]
            return torch.lerp(p, q, share), torch.lerp(sp, sq, share)

        (ab, sab), (ac, sac) = met(a, b, sa, sb), met(a, c, sa, sc)
        if count == 1:
            parts.append((torch.stack((a, ab, ac), 1), torch.stack((sa, sab, sac), 1), cut))
        else:
            parts.append((torch.stack((ab, b, c), 1), torch.stack((sab, sb, sc), 1), cut))
            parts.append((torch.stack((ab, c, ac), 1), torch.stack((sab, sc, sac), 1), cut))
    corners, shares, face = (torch.cat(column) for column in zip(*parts, strict=True))
    return _Pieces(corners, shares, face)


def _draw(surface: Surface, c2w: Tensor, fov_y: Tensor, height: int, width: int) -> Tensor:
    """[H, W, 5] of one camera, a place in the middle of each pixel: sRGB, 1 where something is, distance."""
    device = surface.triangles.device
    local = (surface.triangles - c2w[:3, 3]) @ c2w[:3, :3]
    pieces = _before(local * local.new_tensor([1.0, 1.0, -1.0]))
    focal = 0.5 * height / torch.tan(fov_y / 2)
    x, y, ahead = pieces.corners.unbind(-1)
    # -1 / ahead is linear in the image, and smallest where it is nearest
    flat = torch.stack((width / 2 + focal * x / ahead, height / 2 - focal * y / ahead, -1 / ahead), -1)
    level = _levels(surface, pieces, flat)

    def place(piece: Tensor, barycentric: Tensor) -> tuple[Tensor, Tensor]:
        """Barycentric places in the whole face, and how far ahead [S]."""
        ahead = pieces.corners[piece, :, 2]
        shares = barycentric / ahead
        total = shares.sum(-1)
        shares = shares / total[:, None]
        return (shares[..., None] * pieces.shares[piece]).sum(1), 1 / total

    def shows(piece: Tensor, barycentric: Tensor) -> Tensor:
        return _paint(surface, pieces.face[piece], place(piece, barycentric)[0], level[piece])[1]

    cut_out = any(material.alpha_cutoff is not None for material in surface.materials)
    faces = torch.arange(flat.shape[0] * 3, device=device).view(-1, 3)
    found = rasterize(flat.reshape(-1, 3), faces, height, width, shows if cut_out else None)
    image = torch.zeros(height, width, 5, device=device)
    hit = found.face >= 0
    piece = found.face[hit]
    where, far = place(piece, found.barycentric[hit])
    color, _ = _paint(surface, pieces.face[piece], where, level[piece])
    rows, columns = hit.nonzero().unbind(-1)
    ray = torch.stack(((columns + 0.5 - width / 2) / focal, (rows + 0.5 - height / 2) / focal), -1)
    distance = far * (1 + ray.square().sum(-1)).sqrt()  # `far` runs along the camera's axis
    image[hit] = torch.cat((color, torch.ones_like(distance)[:, None], distance[:, None]), -1)
    return image


def _levels(surface: Surface, pieces: _Pieces, flat: Tensor) -> Tensor:
    """[P] int64, the texture's halvings at which a texel is about as large as a pixel, one for each triangle."""
    if surface.uv is None:
        return torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
    sizes = [levels[0].shape[0] * levels[0].shape[1] if levels else 1 for levels in surface.pyramids]
    texels = torch.tensor(sizes, device=flat.device, dtype=torch.float32)[surface.material[pieces.face]]
    texture = _doubled_area((pieces.shares[..., None] * surface.uv[pieces.face][:, None]).sum(2)) * texels
    shown = _doubled_area(flat[..., :2])
    ratio = texture / shown.clamp_min(1e-12)
    return (0.5 * ratio.clamp_min(1e-12).log2()).round().long().clamp_min(0)


def _doubled_area(corners: Tensor) -> Tensor:
    """Of triangles [P, 3, 2]."""
    a, b = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    return (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).abs()


def _paint(surface: Surface, face: Tensor, where: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Return sRGB [S, 3] and whether there is anything [S], at barycentric places [S, 3] of faces [S]."""
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
            color = color * _texture(levels, uv, level[mine], one.wrap)
        light[mine] = color
    if surface.colors is not None:
        light[:, :3] *= (where[..., None] * surface.colors[face]).sum(1)
    cutoffs = [-1.0 if one.alpha_cutoff is None else one.alpha_cutoff for one in surface.materials]
    return linear_to_srgb(light[:, :3].clamp(0, 1)), light[:, 3] >= light.new_tensor(cutoffs)[material]


def _texture(levels: tuple[Tensor, ...], uv: Tensor, level: Tensor, wrap: tuple[Wrap, Wrap]) -> Tensor:
    """Light and alpha [S, 4] at uv [S, 2], each from its halving of the texture, between texels bilinearly."""
    level = level.clamp_max(len(levels) - 1)
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
        above, below = (
            torch.lerp(texels[row, columns[0]], texels[row, columns[1]], right[:, None]) for row in rows
        )
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
