"""Images of meshes against closed forms: where rays meet planes, how much is covered, what textures show."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toy_meshes import model_of

from dream4d_engine.cameras import CameraBatch, make_cameras
from dream4d_engine.mesh import Mesh
from dream4d_engine.meshes import Material, Model, Placement, Source
from dream4d_engine.meshes.color import linear_to_srgb, srgb_to_linear
from dream4d_engine.meshes.look import look_at, surface_of
from dream4d_engine.rays import rays_from_cameras

AS_IT_IS = Placement(((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)), (0.0, 0.0, 0.0), 1.0)
SQUARE = torch.tensor([[0, 1, 2], [0, 2, 3]])


def camera(azimuth: float = 0.0, elevation: float = 0.0, size: int = 32, distance: float = 3.0) -> CameraBatch:
    return make_cameras(azimuth, elevation, distance, math.radians(40), 0.0, size, size)


def wall(half: float = 0.5, x: float = 0.0) -> Tensor:
    """Corners of a square that faces the front, from its upper left."""
    return torch.tensor([[x, -half, half], [x, -half, -half], [x, half, -half], [x, half, half]])


def textured(vertices: Tensor, uv: Tensor, material: Material) -> Model:
    mesh = Mesh(vertices, SQUARE, uv=uv)
    return Model(mesh, (material,), torch.zeros(2, dtype=torch.int64), Source("wall", "tensors", ""))


CORNERS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])


def test_a_slanted_wall_is_seen_where_rays_meet_it() -> None:
    light = wall(2.0) / 4 + 0.5  # as much light as the place says, so colours are places
    model = model_of(wall(2.0), SQUARE, linear_to_srgb(light), "wall")
    cameras = camera(azimuth=1.0, elevation=0.3)
    seen = look_at(surface_of(model, AS_IT_IS), cameras, supersample=1)
    rays = rays_from_cameras(cameras)
    far = -rays.origins[:, 0] / rays.directions[:, 0]
    places = rays.origins + far[:, None] * rays.directions
    hit = (far > 0) & (places.abs() < 2).all(-1)
    assert (seen.mask.view(-1) > 0.5).equal(hit) and 300 < hit.sum() < 1024
    assert (seen.depth.view(-1) - far)[hit].abs().max() < 1e-4
    assert (srgb_to_linear(seen.rgb.view(-1, 3)) - (places / 4 + 0.5))[hit].abs().max() < 1e-4


def test_coverage_is_the_share_of_the_pixels_that_is_covered() -> None:
    model = model_of(wall(0.43), SQUARE, torch.ones(4, 3), "wall")
    for faces in (SQUARE, SQUARE.flip(-1)):  # seen from both sides
        turned = model_of(model.mesh.vertices, faces, torch.ones(4, 3), "wall")
        seen = look_at(surface_of(turned, AS_IT_IS), camera(), supersample=8)
        side = 2 * 0.43 * 16 / math.tan(math.radians(20)) / 3  # pixels
        assert seen.mask.sum().item() == pytest.approx(side**2, rel=0.02)
        assert ((seen.mask > 0.05) & (seen.mask < 0.95)).any()


def test_a_camera_inside_a_room_sees_walls_that_reach_behind_it() -> None:
    floor = torch.tensor([[-9.0, -9.0, -0.5], [9.0, -9.0, -0.5], [9.0, 9.0, -0.5], [-9.0, 9.0, -0.5]])
    cameras = camera(distance=1.0)
    seen = look_at(surface_of(model_of(floor, SQUARE, torch.ones(4, 3), "floor"), AS_IT_IS), cameras, supersample=1)
    rays = rays_from_cameras(cameras)
    far = -0.5 / rays.directions[:, 2]
    hit = (far > 0) & ((rays.origins + far[:, None] * rays.directions)[:, :2].abs() < 9).all(-1)
    assert (seen.mask.view(-1) > 0.5).equal(hit) and hit.any()
    assert torch.allclose(seen.depth.view(-1)[hit], far[hit], rtol=1e-3)


def test_what_lies_behind_a_hole_is_seen() -> None:
    image = torch.full((2, 2, 4), 255, dtype=torch.uint8)
    image[0, :, 3] = 0  # the upper half is not there
    image[..., 1:3] = 0
    front = textured(wall(0.5, 0.2), CORNERS, Material(image=image, alpha_cutoff=0.5, wrap=("clamp", "clamp")))
    vertices = torch.cat((front.mesh.vertices, wall(0.5, 0.0)))
    mesh = Mesh(vertices, torch.cat((SQUARE, SQUARE + 4)), uv=CORNERS.repeat(2, 1))
    both = Model(
        mesh, (front.materials[0], Material(color=(0, 1, 0, 1))), torch.tensor([0, 0, 1, 1]), Source("", "tensors", "")
    )
    seen = look_at(surface_of(both, AS_IT_IS), camera(), supersample=1)
    assert seen.rgb[0, 0, 13, 16].tolist() == pytest.approx([0, 1, 0], abs=1e-3)
    assert seen.rgb[0, 0, 19, 16].tolist() == pytest.approx([1, 0, 0], abs=1e-3)
    assert seen.depth[0, 0, 13, 16] > seen.depth[0, 0, 19, 16] + 0.15
    opaque = Model(mesh, (Material(), both.materials[1]), both.face_material, both.source)
    assert look_at(surface_of(opaque, AS_IT_IS), camera(), 1).rgb[0, 0, 13, 16].tolist() == pytest.approx([1, 1, 1])


def test_a_fine_texture_is_averaged_in_light() -> None:
    board = torch.zeros(256, 256, 4, dtype=torch.uint8)
    board[::2, ::2, :3] = board[1::2, 1::2, :3] = 255
    board[..., 3] = 255
    seen = look_at(surface_of(textured(wall(), CORNERS, Material(image=board)), AS_IT_IS), camera(), supersample=2)
    inner = seen.rgb[0, 0, 12:20, 12:20]
    assert (inner - linear_to_srgb(torch.tensor(0.5))).abs().max() < 0.02


@pytest.mark.parametrize(("wrap", "colors"), [("repeat", "rgrg"), ("mirror", "rggr"), ("clamp", "rggg")])
def test_what_lies_beyond_a_textures_border(wrap, colors: str) -> None:
    image = torch.zeros(1, 2, 4, dtype=torch.uint8)
    image[0, 0, 0] = image[0, 1, 1] = image[..., 3] = 255
    image[..., 3] = 255
    uv = CORNERS * torch.tensor([2.0, 1.0])
    seen = look_at(surface_of(textured(wall(0.8), uv, Material(image=image, wrap=(wrap, wrap))), AS_IT_IS), camera(), 1)
    row = seen.rgb[0, 0, 16]
    covered = (seen.mask[0, 0, 16, :, 0] > 0).nonzero()[:, 0]
    places = covered[0] + (len(covered) * torch.tensor([1, 3, 5, 7])) // 8  # the middles of the texels
    assert "".join("rg"[int(row[place].argmax())] for place in places) == colors
