"""The regulariser of rigidity on motions known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from exact_scene import GRID, exact_scene, jump, stretch, turn
from training_cases import seeded

from dream4d_engine.cameras import fixed_take
from dream4d_engine.fields.deformation import DeformationConfig
from dream4d_engine.randomness import Draw
from dream4d_engine.rendering import RenderOptions, prepare_view, render_view
from dream4d_engine.scene import Scene, SceneConfig, build_scene
from dream4d_engine.supervision import RegularizerWeights, regularisers


def strain(scene: Scene, weight: float = 1.0) -> torch.Tensor:
    """The term for a take of the scene."""
    view = prepare_view(scene, fixed_take(4, 16, 16), RenderOptions())
    one = regularisers(lambda progress: RegularizerWeights(rigidity=weight), lambda *_: view)
    with torch.no_grad():
        output = render_view(scene, view)
    return one.loss(scene, output, view, 0.0, Draw(0)).losses["rigidity"]


@pytest.mark.parametrize("motion", [jump, turn])
def test_what_moves_rigidly_costs_nothing(motion) -> None:
    assert strain(exact_scene("cube", motion)).item() == pytest.approx(0, abs=1e-6)


def test_what_stretches_costs_its_squared_strain() -> None:
    found = strain(exact_scene("cube", stretch)).item()
    # at the times 1/3 and 2/3 of four frames: taller by 1 + 0.4 sin(2 pi t), so lengths shrink or grow on the way back
    strains = []
    for time in (1 / 3, 2 / 3):
        tall = 1 + 0.4 * math.sin(2 * math.pi * time)
        way = torch.randn(20000, 3, generator=seeded(0))
        back = way * torch.tensor([tall**0.5, tall**0.5, 1 / tall])
        strains.append(float((back.norm(dim=-1) / way.norm(dim=-1) - 1).square().mean()))
    assert found == pytest.approx(sum(strains) / 4, rel=0.25)  # two of the four frames are at rest
    assert strain(exact_scene("cube", stretch), 3.0).item() == pytest.approx(3 * found)


def narrow_behind(points: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """The inverse of narrowing that begins 0.25 behind the front and below the top of a cube of half side 0.45."""
    x, y, z = points.unbind(-1)
    share = 3 * (0.2 - x).clamp_min(0) * (0.2 - z).clamp_min(0) * torch.sin(math.pi * times)
    return torch.stack((x, y * (1 + share), z), -1)


def test_sides_that_no_camera_sees_are_rigid_too() -> None:
    # the one camera sees the front and the top, where this motion moves nothing
    assert strain(exact_scene("cube", narrow_behind)).item() > 0.001


def test_only_what_is_solid_is_rigid() -> None:
    def beside(points: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return points + (points.abs().amax(-1, keepdim=True) - 0.75).clamp_min(0)

    assert strain(exact_scene("cube", beside)).item() == pytest.approx(0, abs=1e-4)


def test_a_zoom_costs_nothing_and_a_gradient_reaches_the_field() -> None:
    scene = exact_scene("cube")
    moving = build_scene(SceneConfig(deformation=DeformationConfig(GRID, hidden_layers=1, scale=1.5)), seeded(0))
    scene.deformation = moving.deformation
    loss = strain(scene)
    assert loss.item() == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        scene.deformation.mlp.layers[-1].normal_(0, 0.1, generator=seeded(1))
        scene.deformation.grid.table.normal_(0, 0.3, generator=seeded(2))
    loss = strain(scene)
    loss.backward()
    assert loss > 0 and scene.deformation.grid.table.grad.abs().sum() > 0


def test_a_still_scene_has_no_motion_to_keep_rigid() -> None:
    with pytest.raises(ValueError, match="about motion"):
        strain(exact_scene("cube"))
