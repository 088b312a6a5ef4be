"""Scenes from meshes: silhouettes and colours come back, from views that nothing was trained on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from toy_meshes import model_of, toy_model

from dream4d_engine.cameras import make_cameras
from dream4d_engine.mesh import MeshError
from dream4d_engine.meshes import place
from dream4d_engine.meshes.look import look_at, surface_of
from dream4d_engine.scene import build_scene
from dream4d_engine.training.config import (
    MESH_DENSEST,
    MESH_QUICK,
    MESH_RIGIDITY,
    MESH_SOFTNESS,
    TOY_MOTION,
    TOY_STATIC,
    ZEROSCOPE,
    for_mesh_scene,
    with_rigidity,
)
from dream4d_engine.training.loop import Interrupted, RunControl
from dream4d_engine.training.mesh_fit import fit_mesh, mesh_match, mesh_stage, sightings_of
from dream4d_engine.training.motion import motion_stage
from dream4d_engine.training.validate import check_recipe

CPU = torch.device("cpu")
SCENE = replace(TOY_STATIC.scene, n_samples=96)
SMALL = replace(
    MESH_QUICK,
    steps=150,
    scene=SCENE,
    n_views=24,
    view_size=64,
    phases=(
        replace(MESH_QUICK.phases[0], n_rays=32, n_points=1024),
        replace(MESH_QUICK.phases[1], start=0.5, n_rays=512, n_points=512),
    ),
    optimizer=replace(MESH_QUICK.optimizer, lr_grid=0.02, lr_mlp=0.02),
)


def test_a_cube_comes_back() -> None:
    model = toy_model("a red cube")
    placement = place(model, up="z")
    scene, summary = fit_mesh(model, placement, SMALL, seed=0, device=CPU, control=RunControl())
    cameras = make_cameras(
        torch.tensor([[0.4], [2.0], [-1.9]]), torch.tensor([[0.2], [0.7], [-0.4]]), 3.0, math.radians(40), 0.0, 64, 64
    )
    psnr, iou = mesh_match(scene, look_at(surface_of(model, placement), cameras), cameras)
    assert psnr > 24 and iou > 0.95, (psnr, iou)
    assert summary.steps == SMALL.steps and scene.deformation is None
    points = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.75], [0.8, 0.8, 0.8]])
    inside, above, corner = (scene.density(points, torch.zeros(3)) * SCENE.step_size()).tolist()
    assert inside > 1 and above < 0.05 and corner < 0.05  # solid within, though only its skin was ever seen


def test_free_is_what_some_camera_sees_past() -> None:
    model = toy_model("a green torus")
    placement = place(model, up="z")
    sightings = sightings_of(surface_of(model, placement), SMALL, lambda share: None)
    points = placement.to_world(
        torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.4, 0.0], [0.13, 0.4, 0.0], [0.21, 0.4, 0.0], [0.0, 0.0, 0.62]])
    )
    assert sightings.are_free(points).tolist() == [True, False, False, True, True]


def test_a_fit_tells_and_stops() -> None:
    model, told = toy_model("a red cube"), []

    def fit(control: RunControl) -> None:
        recipe = replace(SMALL, steps=4, n_views=4)
        fit_mesh(model, place(model, up="z"), recipe, seed=0, device=CPU, control=control, on_look=told.append)

    steps = []
    with pytest.raises(Interrupted):
        fit(RunControl(on_step=lambda report, scene: steps.append(report.step), should_stop=lambda: len(steps) == 2))
    assert steps == [1, 2] and told[0] == 0 and told[-1] == 1 and told == sorted(told)
    with pytest.raises(Interrupted):
        fit(RunControl(should_stop=lambda: True))


def test_a_mesh_that_nobody_can_see_is_refused() -> None:
    line = torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 0, 2]])
    model = model_of(line, torch.tensor([[0, 1, 2]]), torch.ones(3, 3), "a line")
    with pytest.raises(MeshError, match="nothing of the mesh is to be seen"):
        fit_mesh(model, place(model, up="z"), SMALL, seed=0, device=CPU, control=RunControl())


def test_thin_parts_stay_occupied_and_the_open_empty() -> None:
    sheet = torch.tensor([[0.0, -1, -1], [0, 1, -1], [0, 1, 1], [0, -1, 1]])
    model = model_of(sheet, torch.tensor([[0, 1, 2], [0, 2, 3]]), torch.ones(4, 3), "a sheet")
    sightings = sightings_of(surface_of(model, place(model, up="z")), SMALL, lambda share: None)
    scene = build_scene(SCENE, torch.Generator().manual_seed(0))
    mesh_stage(SMALL, scene, sightings).finish()
    n = scene.occupancy.resolution
    assert scene.occupancy.occupied[n // 2 - 1 : n // 2 + 1, n // 3 : -n // 3, n // 3 : -n // 3].any(0).all()
    assert not scene.occupancy.occupied[: n // 2 - 3].any()  # though the fresh field has a cloud there


def test_scenes_from_meshes_move_more_rigidly() -> None:
    assert ZEROSCOPE.regularizers.rigidity == 0 and ZEROSCOPE.densest is None
    suited = for_mesh_scene(ZEROSCOPE)
    assert suited == replace(with_rigidity(ZEROSCOPE, MESH_RIGIDITY), densest=MESH_DENSEST, softness=MESH_SOFTNESS)
    assert with_rigidity(suited, 0.0).regularizers.rigidity == 0
    assert for_mesh_scene(TOY_MOTION).regularizers.rigidity == TOY_MOTION.regularizers.rigidity == 200
    own = with_rigidity(TOY_MOTION, 7.0)
    assert own.regularizers.rigidity == 7 and for_mesh_scene(own).regularizers.rigidity == 7
    assert for_mesh_scene(replace(own, densest=9.0)) == replace(own, densest=9.0)
    with pytest.raises(ValueError, match=r"densest must be above 0"):
        check_recipe(replace(own, densest=-1.0))
    for softness in (0.001, 0.5):
        with pytest.raises(ValueError, match=r"softness must"):
            check_recipe(replace(suited, softness=softness))
    with pytest.raises(ValueError, match=r"softness blurs what recipe\.densest bends"):
        check_recipe(replace(suited, densest=None))
    with pytest.raises(ValueError, match=r"regularizers\.rigidity must be at least 0"):
        check_recipe(with_rigidity(own, -1.0))
    still = replace(TOY_STATIC, regularizers=replace(TOY_STATIC.regularizers, rigidity=1.0))
    with pytest.raises(ValueError, match="about motion"):
        check_recipe(still)


def test_a_hard_surface_is_bent_to_a_soft_one_only_while_it_learns_to_move() -> None:
    scene = build_scene(SMALL.scene, torch.Generator().manual_seed(0))
    u = torch.rand(500, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = scene.canonical.density(u, scene.kernels)
        stage = motion_stage(scene, replace(TOY_MOTION, densest=2.0), 0, 1.0)
        during = stage.scene.canonical.density(u, scene.kernels)
        stage.finish()
        after = stage.scene.canonical.density(u, scene.kernels)
        there = scene.canonical.density(u, scene.kernels)
    assert before.max() > 4 and torch.allclose(during, 2 * (1 - torch.exp(-before / 2)), atol=1e-6)
    assert torch.equal(after, before) and torch.equal(there, before)
    assert "densest" not in " ".join(stage.scene.state_dict())


def test_a_hard_skin_is_blurred_where_it_is() -> None:
    ball = replace(SMALL.scene, radiance=replace(SMALL.scene.radiance, blob_scale=1e4, blob_std=0.5))
    scene = build_scene(ball, torch.Generator().manual_seed(0))
    names = set(scene.state_dict())
    r = torch.tensor([0.3, 0.47, 0.49, 0.5, 0.51, 0.53, 0.6])
    u = (r[:, None] * torch.tensor([2.0, -1.0, 2.0]) / 3 + 1) / 2
    stage = motion_stage(scene, replace(TOY_MOTION, densest=30.0, softness=0.01), 0, 1.0)
    found = stage.scene.canonical.density(u, scene.kernels)
    # of a wall where the bent density is at its half, blurred by 0.02 of the world and between the lattice's points
    inside = 0.5 * (1 + torch.erf((0.4985 - r) / 0.0216 / math.sqrt(2)))
    assert found == pytest.approx(30 * inside.square(), abs=1.0)
    shown = stage.scene.query(2 * u - 1, torch.zeros(7))
    assert torch.allclose(shown.density, found, atol=1e-3)
    assert set(stage.scene.canonical.state_dict()) == {n.removeprefix("canonical.") for n in names if "canonical" in n}
    stage.finish()
    hard = stage.scene.canonical.density(u, scene.kernels)
    assert torch.equal(hard, scene.canonical.density(u, scene.kernels)) and hard[4] < 1 < 30 < hard[2]
