"""Steps in which some frames of a take alone carry gradient: the mean is the whole gradient, and less is kept."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from training_cases import kept_bytes, motion_case

from dream4d_engine.fields.background import BackgroundConfig
from dream4d_engine.guidance.distillation import distill
from dream4d_engine.randomness import Draw
from dream4d_engine.rendering import RenderOptions, prepare_view, render_view
from dream4d_engine.supervision import gather, heaviest, rendered, views_of, with_gradient_in
from dream4d_engine.toyworld.ideal import IdealDenoiser
from dream4d_engine.training.config import Phase
from dream4d_engine.training.estimate import memory_bytes
from dream4d_engine.training.motion import motion_stage
from dream4d_engine.training.validate import check_recipe

DRAW = Draw(3)


@cache
def case(gradient_frames):
    """A stage whose scene already moves before a background of its own, and its guidance."""
    recipe, guidance, _, still, _ = motion_case(10)
    weights = replace(recipe.regularizers, displacement_tv=1.0, opacity=2.0, rigidity=0.01)
    recipe = replace(recipe, phases=(Phase(0.0, 1, 10, 10),))
    recipe = replace(recipe, gradient_frames=gradient_frames, regularizers=weights, fresh_background=BackgroundConfig())
    stage = motion_stage(still, recipe, seed=0, deformation_scale=1.0)
    with torch.no_grad():
        for parameter in stage.scene.deformation.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return stage, guidance


def gradients(stage, guidance, rays_at_once, change):
    """The loss and the gradient of a step whose view was changed, and which frames carried it."""
    supervisions = stage.supervisions(guidance, rays_at_once)
    views = {key: change(view) for key, view in views_of(supervisions, stage.scene, 0.5, DRAW).items()}
    stage.scene.zero_grad(set_to_none=True)
    seen = rendered(supervisions, stage.scene, views)
    terms = gather([one.loss(stage.scene, out, view, 0.5, DRAW) for one, view, out in seen])
    loss = sum(terms.losses.values())
    loss.backward()
    (view,) = views.values()
    found = torch.cat([p.grad.flatten() for _, ps, _ in stage.groups for p in ps if p.grad is not None])
    return loss.detach(), found, view.carried


def cameras_and_options(stage):
    recipe = stage.recipe
    return recipe.sample_cameras(recipe.phases[0], DRAW.groups("cameras", 1)), RenderOptions()


@pytest.mark.parametrize("rays_at_once", [None, 200])
def test_the_mean_over_the_draws_is_the_whole_gradient(rays_at_once):
    stage, guidance = case(2)
    loss, whole, none = gradients(stage, guidance, rays_at_once, lambda view: with_gradient_in(view, None, None))
    assert none is None and whole.norm() > 0
    view, seeds = prepare_view(stage.scene, *cameras_and_options(stage)), {}
    for seed in range(20):
        (frames,) = with_gradient_in(view, 2, Draw(seed).groups("gradient frames", 1)).carried
        seeds[tuple(frames.nonzero().flatten().tolist())] = seed
    assert sorted(seeds) == [(0, 1), (2, 3), (4, 5)]
    parts = []
    for frames, seed in seeds.items():
        source = Draw(seed).groups("gradient frames", 1)
        same, part, carried = gradients(
            stage, guidance, rays_at_once, partial(with_gradient_in, at_most=2, source=source)
        )
        torch.testing.assert_close(same, loss)  # what is seen is the same
        assert tuple(carried[0].nonzero().flatten().tolist()) == frames
        # of the motion: frames have one background
        grid = sum(p.numel() for p in stage.scene.deformation.grid.parameters())
        assert (part - whole)[:grid].norm() > 0.1 * whole[:grid].norm(), "by itself it is another one"
        parts.append(part)
    assert (torch.stack(parts).mean(0) - whole).norm() < 1e-5 * whole.norm()


def test_frames_are_drawn_in_order_by_the_step_and_each_as_often():
    stage, _ = case(4)
    view = prepare_view(stage.scene, *cameras_and_options(stage))
    view = replace(view, cameras=view.cameras.groups(torch.zeros(400, dtype=torch.long)), rays=view.rays)
    assert view.cameras.shape == (400, 6)
    drawn = with_gradient_in(replace(view, rays=_rays(view)), 4, Draw(0, 7).groups("gradient frames", 400))
    again = with_gradient_in(replace(view, rays=_rays(view)), 4, Draw(0, 7).groups("gradient frames", 400))
    assert drawn.carried.equal(again.carried)
    # 6 frames in as few parts as 4 allows: two of 3
    assert {tuple(row.tolist()) for row in drawn.carried} == {(True,) * 3 + (False,) * 3, (False,) * 3 + (True,) * 3}
    assert abs(drawn.carried[:, 0].float().mean() - 0.5) < 0.1 and drawn.gradient.factor == 2
    assert drawn.gradient.rays.reshape(400, 6, -1).all(-1).equal(drawn.carried)
    assert heaviest(drawn).carried.equal(torch.tensor([[True] * 3 + [False] * 3] * 400))
    assert with_gradient_in(view, 6, None).gradient is None and with_gradient_in(view, None, None).gradient is None


def _rays(view):
    """One ray a frame."""
    n = view.cameras.c2w.shape[0] * 6
    return replace(view.rays, origins=torch.zeros(n, 3), directions=torch.ones(n, 3), times=torch.zeros(n))


def test_rendering_keeps_what_its_frames_need():
    stage, guidance = case(2)
    (view,) = views_of(stage.supervisions(guidance, None), stage.scene, 0.5, DRAW).values()
    assert view.gradient is not None
    few, kept = kept_bytes(lambda: render_view(stage.scene, heaviest(view)))
    all_, most = kept_bytes(lambda: render_view(stage.scene, with_gradient_in(view, None, None)))
    torch.testing.assert_close(few.rgb, all_.rgb)
    assert kept < 0.5 * most  # a third, and what is summed along all rays


def test_a_prior_of_single_images_is_asked_for_the_gradient_of_those_it_sees():
    """Images at the back are left out; of the others it is told which carry gradient."""
    told = []

    class Told(IdealDenoiser):
        def encode(self, images, carried=None):
            told.append(carried)
            return super().encode(images)

    stage, guidance = case(2)
    cameras, _ = cameras_and_options(stage)
    azimuth = torch.tensor([[0.0, 3.1, 0.1, 0.2, 3.0, 0.3]])
    config = replace(stage.recipe.guidance[0].distillation, max_azimuth_deg=90.0)
    denoiser = Told(torch.rand(1, 1, 3, 4, 4))
    single = replace(guidance["video"], denoiser=denoiser, config=config)
    carried = torch.tensor([[False, False, True, True, True, False]])
    images = torch.rand(1, 6, 3, 4, 4)
    distill(single, images, replace(cameras, azimuth=azimuth), 0.5, DRAW, carried)
    assert told[0].tolist() == [[False], [True], [True], [False]]
    told.clear()
    distill(single, images, replace(cameras, azimuth=azimuth), 0.5, DRAW)
    assert told and not any(one is not None for one in told)


def test_a_recipe_says_how_many():
    stage, _ = case(3)
    assert stage.recipe.gradient_frames == 3
    scene = stage.scene.config
    less, most = (memory_bytes(replace(stage.recipe, gradient_frames=n), scene) for n in (3, None))
    assert less < most == memory_bytes(replace(stage.recipe, gradient_frames=99), scene)
    with pytest.raises(ValueError, match=r"gradient_frames must be at least 1, got 0"):
        check_recipe(replace(stage.recipe, gradient_frames=0))
