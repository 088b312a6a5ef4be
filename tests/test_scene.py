"""The scene as a whole: identities, golden point queries, copies."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dream4d_engine.dream_in_4d import import_checkpoint
from dream4d_engine.fields.background import BackgroundConfig
from dream4d_engine.fields.deformation import DeformationConfig
from dream4d_engine.fields.encodings import HashGridConfig
from dream4d_engine.fields.radiance import RadianceConfig
from dream4d_engine.kernels import Kernels, select_kernels
from dream4d_engine.scene import Scene, SceneConfig, build_scene

GOLDEN = Path(__file__).parent / "data" / "golden"
GRID = HashGridConfig(n_levels=4, log2_entries=8, base_resolution=4, growth=1.5)
CONFIG = SceneConfig(radiance=RadianceConfig(GRID, hidden_width=16), occupancy_resolution=8, n_samples=32)
MOTION = DeformationConfig(GRID, hidden_width=16, hidden_layers=2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(n: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, 3, generator=generator(1)) * 2 - 1, torch.rand(n, generator=generator(2))


def moving_scene() -> Scene:
    scene = build_scene(CONFIG, generator()).with_deformation(MOTION, generator(1))
    with torch.no_grad():
        for parameter in scene.deformation.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator(4)) * 0.1)
    return scene


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_point_queries_equal_golden(stage: str) -> None:
    scene, _ = import_checkpoint(GOLDEN / f"{stage}.ckpt")
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / f"{stage}_points.npz").items()}
    with torch.no_grad():
        found = scene.query(golden["points"], golden["times"][:, 0])
        background = scene.background(golden["dirs"])
    assert (background - golden["background"]).abs().max() < 1e-6
    # The second stage looks up random tables of 4096 cells a side at places that are themselves computed in fp32.
    exact, close = (1e-5, 1e-5) if stage == "stage1" else (1e-4, 1e-3)
    assert ((found.density - golden["density"][:, 0]).abs() / golden["density"][:, 0].clamp_min(1)).max() < exact
    assert (found.rgb - golden["rgb"]).abs().max() < close
    if stage == "stage2":
        assert (found.displacement - golden["displacement"]).abs().max() < 1e-6
        assert (found.rgb - golden["rgb"]).square().mean().sqrt() < 1e-4


def test_a_static_scene_has_no_time_and_no_displacement() -> None:
    scene, (where, times) = build_scene(CONFIG, generator()), points()
    first, second = scene.query(where, times), scene.query(where, 1 - times)
    assert torch.equal(first.density, second.density) and torch.equal(first.rgb, second.rgb)
    assert first.displacement is None and first.normals is None


def test_a_fresh_deformation_changes_nothing() -> None:
    static, (where, times) = build_scene(CONFIG, generator()), points()
    moving = static.with_deformation(MOTION, generator(1))
    assert torch.allclose(moving.query(where, times).density, static.query(where, times).density, rtol=1e-5)
    assert (moving.query(where, times).displacement == 0).all()
    assert static.deformation is None and static.config.deformation is None
    assert moving.config.deformation == MOTION


def test_a_deformation_moves_things_in_time() -> None:
    scene, (where, times) = moving_scene(), points()
    assert not torch.equal(scene.density(where, times), scene.density(where, 1 - times))


def test_what_comes_from_beyond_the_box_is_empty() -> None:
    """It moves up by 0.3 of the box, so what lies in the lowest 0.3 came from below: not from the box's floor."""
    config = replace(MOTION, body_knots=7)
    scene, (where, times) = build_scene(CONFIG, generator()).with_deformation(config, generator(1)), points(400)
    with torch.no_grad():
        scene.deformation.body.doubt.zero_()
        scene.deformation.body.knots[-3:, -1] = 0.6
        times = torch.ones_like(times)
        from_below = where[:, 2] < -0.4
        there = where.clone()
        there[:, 2] -= 0.6
        still = scene.density(there.clamp(-1, 1), torch.zeros_like(times))
        for density in (scene.density(where, times), scene.query(where, times).density):
            assert (density[from_below] == 0).all() and (still[from_below] > 0).all()
            assert torch.allclose(density[~from_below], still[~from_below], rtol=1e-3)
        scene.deformation.set_active_levels(0)  # places that are no numbers are in no grid
        scene.deformation.body.knots[0, 0] = math.nan
        lost, density = scene._look_up(where, times), torch.ones_like(times)
        assert lost.places.isnan().all() and torch.equal(lost.empty_outside(density), density), "it must be seen"


def test_density_is_that_of_query() -> None:
    for scene in (build_scene(CONFIG, generator()), moving_scene()):
        where, times = points()
        assert torch.equal(scene.density(where, times), scene.query(where, times).density)


def test_every_parameter_gets_a_gradient() -> None:
    scene, (where, times) = moving_scene(), points(400)
    found = scene.query(where * 0.4, times, normals=True)
    color = scene.background(torch.nn.functional.normalize(where, dim=-1))
    (found.density.sum() + found.rgb.square().sum() + found.normals.square().sum() + color.square().sum()).backward()
    for name, parameter in scene.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any() and parameter.grad.isfinite().all(), name


def test_normals_of_the_blob_point_outwards() -> None:
    scene, (where, times) = build_scene(CONFIG, generator()), points()
    where = where[(where.norm(dim=-1) > 0.2) & (where.abs().amax(-1) < 0.9)]
    normals = scene.query(where, times[: len(where)], normals=True).normals
    assert torch.allclose(normals.norm(dim=-1), torch.ones(len(where)), atol=1e-5)
    assert ((normals * where).sum(-1) / where.norm(dim=-1)).min() > 0.99


def test_a_clone_is_its_own() -> None:
    scene, (where, times) = moving_scene(), points()
    twin = scene.clone()
    before = twin.density(where, times)
    with torch.no_grad():
        scene.canonical.grid.table.add_(1.0)
        scene.occupancy.occupied.fill_(False)
    assert torch.equal(twin.density(where, times), before)
    assert twin.occupancy.occupied.all()
    assert twin.config == scene.config


def test_with_deformation_can_bring_a_fresh_background() -> None:
    static = build_scene(CONFIG, generator())
    kept = static.with_deformation(MOTION, generator(1))
    assert torch.equal(kept.background.mlp.layers[0], static.background.mlp.layers[0])
    wide = BackgroundConfig(hidden_width=64, hidden_layers=3)
    fresh = static.with_deformation(MOTION, generator(1), wide)
    assert fresh.config.background == wide and len(fresh.background.mlp.layers) == 4
    again = fresh.with_deformation(replace(MOTION, scale=1.5), generator(1))
    assert again.config.deformation.scale == 1.5


def test_one_seed_one_scene() -> None:
    one, two = build_scene(CONFIG, generator(5)), build_scene(CONFIG, generator(5))
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_occupancy_follows_the_density() -> None:
    scene = build_scene(CONFIG, generator())
    scene.refresh_occupancy()
    assert 0 < scene.occupancy.occupied.float().mean() < 0.5
    scene.update_occupancy(generator(), all_cells=True)
    assert scene.occupancy.occupied[4, 4, 4] and not scene.occupancy.occupied[0, 0, 0]
    assert len(scene.moments()) == 1 and len(moving_scene().moments()) == 12


def test_occupancy_looks_at_every_moment_of_a_loop_once() -> None:
    scene = build_scene(CONFIG, generator())
    assert not scene.loops and not moving_scene().loops
    looped = scene.with_deformation(replace(MOTION, loop=True), generator(1))
    assert looped.loops and looped.clone().loops
    assert torch.equal(looped.moments(), torch.arange(12) / 12)


def test_absurd_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match="radius must lie in"):
        SceneConfig(radius=-1.0)
    with pytest.raises(ValueError, match="n_samples must lie in"):
        SceneConfig(n_samples=0)
    assert SceneConfig().step_size() == pytest.approx(1.732 * 2 / 512)
    assert SceneConfig(radius=2.0).step_size(64) == pytest.approx(1.732 * 4 / 64)


def test_kernels_are_those_of_the_device_a_scene_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = select_kernels("cpu")
    asked: list[str] = []

    def select(device) -> Kernels:
        asked.append(torch.device(device).type)
        return replace(plain, name=f"for {asked[-1]}")

    monkeypatch.setattr("dream4d_engine.scene.select_kernels", select)
    scene = moving_scene()
    assert not asked, "a scene that goes on to a GPU needs none for a CPU"
    assert scene.kernels.name == "for cpu"
    n_asked = len(asked)
    assert scene.double().float().to("cpu").kernels.name == "for cpu" and len(asked) == n_asked
    there = scene.clone().to("meta")  # the one other device that every machine has
    assert there.kernels.name == "for meta" and scene.kernels.name == "for cpu"
    assert there.clone().kernels.name == "for meta"
    assert there.with_deformation(MOTION, generator()).kernels.name == "for meta"
    given = build_scene(CONFIG, generator(), plain)
    assert given.to("meta").kernels is plain


def test_active_levels_survive_copies_and_files() -> None:
    scene = moving_scene()
    places, times = points()
    everything = scene.density(places, times)
    scene.deformation.set_active_levels(1)
    fewer = scene.density(places, times)
    assert not torch.equal(fewer, everything)
    other = moving_scene()
    other.load_state_dict(scene.state_dict())
    for copy in (scene.clone(), other):
        assert torch.equal(copy.density(places, times), fewer)
