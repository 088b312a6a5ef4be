"""Samples that are found before their step."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from training_cases import CPU, seeded, solid_ball, static_case

from dream4d_engine.cameras import make_cameras, orbit
from dream4d_engine.kernels import torch_kernels
from dream4d_engine.priors.files import toy_prior
from dream4d_engine.rendering import RenderOptions, prefetch_samples, prepare_view, render_view
from dream4d_engine.toyworld.measure import photograph
from dream4d_engine.training import prefetch
from dream4d_engine.training.checkpoint import load_checkpoint
from dream4d_engine.training.config import TOY_IMAGE, TOY_MOTION, TOY_STATIC
from dream4d_engine.training.guidance import active_terms, load_guidance, runtime_for
from dream4d_engine.training.loop import Interrupted, RunControl
from dream4d_engine.training.motion import train_motion
from dream4d_engine.training.plan import LADDER
from dream4d_engine.training.prefetch import Prefetch
from dream4d_engine.training.reference import prepare_reference
from dream4d_engine.training.static import train_static

CUDA = torch.cuda.is_available()
STRATIFIED = RenderOptions(stratified=True)


def ball():
    scene = solid_ball(0.5)
    scene.update_occupancy(seeded(), all_cells=True)
    return scene


def look(scene, options=STRATIFIED):
    """What a step looks at, named by a function as supervisions are."""
    return {look: prepare_view(scene, orbit(2, 24, 24), options, seeded())}


def test_samples_that_were_found_ahead_are_those_of_the_step():
    scene = ball()
    expected = render_view(scene, look(scene)[look])
    ahead = Prefetch(scene, half=False, enabled=True)
    for _ in range(3):  # their number is asked for the first time, and guessed from then on
        ahead.begin(look(scene))
        view = ahead.take()[look]
        assert view.samples is not None
        found = render_view(scene, view)
        assert torch.equal(found.samples.t_starts, expected.samples.t_starts)
        assert torch.equal(found.rgb, expected.rgb)
    assert ahead.take() is None


def test_samples_beyond_the_capacity_are_found_by_the_step_itself(monkeypatch):
    scene = ball()
    expected = render_view(scene, look(scene)[look])
    ahead = Prefetch(scene, half=False, enabled=True)
    monkeypatch.setattr(prefetch, "SPARE", 0.5)
    for fits in (True, False):
        ahead.begin(look(scene))
        view = ahead.take()[look]
        assert (view.samples is not None) == fits
        assert torch.equal(render_view(scene, view).rgb, expected.rgb), "nothing is lost"


def test_only_as_many_samples_as_there_is_room_for_are_looked_at():
    scene = ball()
    view = look(scene)[look]
    samples, n_found = prefetch_samples(scene, view, None).take()
    assert 0 < len(samples.t_starts) < n_found, "some are transparent"
    small = prefetch_samples(scene, view, n_found - 1)
    assert len(small.visible) == n_found - 1 and small.take() == (None, n_found)
    for options in (replace(STRATIFIED, prune=False), replace(STRATIFIED, rays_at_once=100)):
        with pytest.raises(ValueError, match="only where rays are pruned by a first look and rendered all at once"):
            prefetch_samples(scene, replace(view, options=options), None)


def test_larger_pieces_are_looked_at_where_there_is_much_memory(monkeypatch):
    scene, asked, rendering = ball(), [], import_module("dream4d_engine.rendering.render")
    monkeypatch.setattr(rendering, "prefetch_visible", lambda *arguments: asked.append(arguments[-2]))
    for gibibytes in (10, 24, 80, 140):
        monkeypatch.setattr(rendering, "_gpu_factor", lambda device, n=gibibytes: n // 4)
        prefetch_samples(scene, look(scene)[look], 100)
    assert asked == [2**19, 2**19, 2**20, 2**21]


def test_the_capacity_follows_how_large_the_cameras_show_the_scene():
    scene, ahead = ball(), Prefetch(ball(), half=False, enabled=True)
    for distance in (3.0, 2.6, 4.0, 3.2):
        cameras = make_cameras(0.0, 0.3, distance, 0.7, 0.0, 24, 24)
        ahead.begin({look: prepare_view(scene, cameras, STRATIFIED, seeded())})
        view = ahead.take()[look]
        assert view.samples is not None, distance
        assert view.apparent_area == pytest.approx((distance * math.tan(0.35)) ** -2)


def test_where_the_number_of_samples_stays_unknown_none_are_found_ahead(monkeypatch):
    scene = ball()
    expected = render_view(scene, look(scene)[look])

    def march_into(*given):
        *columns, n_found = torch_kernels.march_into(*given)
        return *columns, torch.full_like(n_found, -1)

    scene.kernels = replace(scene.kernels, march_into=march_into)
    ahead = Prefetch(scene, half=False, enabled=True)
    ahead.begin(look(scene))
    view = ahead.take()[look]
    assert view.samples is None and torch.equal(render_view(scene, view).rgb, expected.rgb)
    assert not ahead.enabled


def enable(monkeypatch, on):
    """Make runs prefetch, or not."""
    monkeypatch.setattr("dream4d_engine.training.loop.Prefetch", lambda scene, half, enabled: Prefetch(scene, half, on))


def run(monkeypatch, path, prefetches, stop_after=()):
    """A run whose parameters stay, so that looking at them earlier makes no difference: (losses, last state)."""
    enable(monkeypatch, prefetches)
    recipe, guidance, _, _ = static_case(steps=12)
    still = replace(recipe.optimizer, lr_grid=0.0, lr_mlp=0.0, lr_background=0.0)
    losses, scene = {}, ball()

    def note(report, scene):
        losses[report.step] = report.loss

    for stop in (*stop_after, None):
        control = RunControl(path, on_step=note, should_stop=lambda stop=stop: max(losses, default=0) == stop)
        given = {"seed": 3, "device": CPU, "control": control, "scene": scene}
        if stop is None:
            train_static(replace(recipe, optimizer=still), guidance, **given)
        else:
            with pytest.raises(Interrupted, match=f"after step {stop}"):
                train_static(replace(recipe, optimizer=still), guidance, **given)
    return losses, load_checkpoint(path).tensors


def test_a_run_that_prefetches_draws_the_same_numbers_and_goes_on_as_if_nothing_had_happened(monkeypatch, tmp_path):
    losses, state = run(monkeypatch, tmp_path / "plain", False)
    assert len(losses) == 12 and all(math.isfinite(loss) for loss in losses.values())
    # stopped before a step of every kind: with the occupancy brought up to date first (8), and without
    for name, stops in (("ahead", ()), ("stopped", (3, 7))):
        theirs, their_state = run(monkeypatch, tmp_path / name, True, stops)
        assert theirs == losses
        assert their_state.keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in their_state.items())


def test_where_rays_are_rendered_twice_nothing_is_found_ahead():
    """Their samples are found once more in the backward pass."""
    assert any(plan.prefetches for plan in LADDER)
    assert all(plan.rays_at_once is None for plan in LADDER if plan.prefetches)


@pytest.mark.skipif(not CUDA, reason="no CUDA GPU: there is nothing to wait for")
@pytest.mark.parametrize("stage", ["text", "image", "motion", "walk"])
def test_no_step_waits_for_the_gpu(stage, monkeypatch):
    recipe = {"text": TOY_STATIC, "image": TOY_IMAGE, "motion": TOY_MOTION, "walk": TOY_MOTION}[stage]
    if stage == "walk":  # as the published recipes of videos are guided
        term = recipe.guidance[0]
        walk = replace(term.distillation, loss="multistep", color_weight=0.1)
        recipe = replace(recipe, guidance=(replace(term, distillation=walk),))
    recipe = replace(recipe, regularizers=replace(recipe.regularizers, rigidity=0.0))  # it asks where rays end
    recipe = replace(recipe, steps=40, loop=replace(recipe.loop, precision="half"))
    reference = prepare_reference(photograph("a red cube"), TOY_IMAGE.reference) if stage == "image" else None
    handles, device = {term.prior: toy_prior(term.prior) for term in active_terms(recipe)}, torch.device("cuda")
    guidance = load_guidance(recipe, handles, "a red cube is jumping", runtime_for(recipe, device), reference)

    def train(prefetches):
        enable(monkeypatch, prefetches)
        # raises wherever the CPU would wait, once capacity and graphs are there; a step beyond it may
        control = RunControl(on_step=lambda report, scene: torch.cuda.set_sync_debug_mode(2 * (8 < report.step < 39)))
        given = {"seed": 0, "device": device, "control": control}
        if recipe.stage == "motion":
            train_motion(solid_ball(0.5), recipe, guidance, **given)
        else:
            train_static(recipe, guidance, reference=reference, **given)

    monkeypatch.setattr(prefetch, "SPARE", 2.0)  # a step beyond the capacity does wait
    try:
        train(True)
        with pytest.raises(RuntimeError, match="synchronizing"):
            train(False)
    finally:
        torch.cuda.set_sync_debug_mode(0)
