"""Animations that last longer than what their prior makes: recipes, fields, measures."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from scene_cases import CONFIG, tiny_scene
from training_cases import CPU, SMALL, motion_case, solid_ball

from dream4d_engine.assets import config_from_dict
from dream4d_engine.cli.options import ImageOptions
from dream4d_engine.cli.parsing import parse
from dream4d_engine.cli.results import final_cameras
from dream4d_engine.fields.deformation import DeformationConfig, DeformationField
from dream4d_engine.guidance.windows import Windows
from dream4d_engine.kernels import select_kernels
from dream4d_engine.occupancy import N_TIMES
from dream4d_engine.priors.files import toy_prior
from dream4d_engine.toyworld.evaluate import Images, evaluate_later, evaluate_scene
from dream4d_engine.training.config import MODEL_VIDEO, TOY_MOTION, ZEROSCOPE, MotionRecipe
from dream4d_engine.training.control import RunControl
from dream4d_engine.training.estimate import memory_bytes
from dream4d_engine.training.guidance import with_frames_of, with_longer_takes
from dream4d_engine.training.motion import motion_stage, train_motion
from dream4d_engine.training.validate import check_recipe

ONE = SimpleNamespace(n_frames=None, most_frames=None, frame_step=1)
WAN = SimpleNamespace(n_frames=17, most_frames=None, frame_step=4)


def longer(n_frames: int | None, recipe=TOY_MOTION, handle=ONE):
    return with_longer_takes(recipe, {"video": handle}, n_frames)


# ---- recipes -----------------------------------------------------------------------------------------------------


def test_a_recipe_is_as_before_where_nobody_asks_for_more():
    assert longer(None) is TOY_MOTION and longer(8) is TOY_MOTION
    assert TOY_MOTION.windows is None and TOY_MOTION.trained(SMALL).deformation is TOY_MOTION.deformation


def test_more_frames_are_seen_through_windows_of_the_priors_own():
    recipe = longer(24)
    assert recipe == replace(TOY_MOTION, n_frames=24, windows=Windows(24, 8))
    wan = longer(41, with_frames_of(MODEL_VIDEO, {"video": WAN}), WAN)
    assert wan.windows == Windows(41, 17, frame_step=4)
    check_recipe(recipe)
    assert "24 frames, 3.3 times as long as the model's own, seen through 4 windows of 8" in recipe.windows.describe()


def test_a_resumed_run_asks_again_and_gets_the_same():
    wan = longer(41, with_frames_of(MODEL_VIDEO, {"video": WAN}), WAN)
    for recipe, handle in ((longer(24), ONE), (wan, WAN)):
        again = with_frames_of(recipe, {"video": handle})
        assert longer(recipe.n_frames, again, handle) == recipe


@pytest.mark.parametrize(
    ("n_frames", "handle", "expected"),
    [
        (5, ONE, "5 frames are fewer than the 8"),
        (40, WAN, "ask for 37 or 41 frames, not 40"),
        (450, ONE, "450 frames are more than 64 times as long as the 8 of the model: ask for 449 at most"),
        (10_000, WAN, "ask for 1025 at most"),
    ],
)
def test_what_can_not_be_made_is_said_at_the_door(n_frames, handle, expected):
    with pytest.raises(ValueError, match=expected):
        longer(n_frames, with_frames_of(TOY_MOTION, {"video": handle}), handle)


@pytest.mark.parametrize("n_frames", [None, 24])
def test_a_take_that_the_prior_can_not_see_at_once_is_refused(n_frames):
    twelve = replace(TOY_MOTION, n_frames=12)
    with pytest.raises(ValueError, match=r"motion\.n_frames is 12, and the .* sees 8 frames at most at once: leave it"):
        longer(n_frames, twelve, toy_prior("video"))
    assert longer(n_frames, handle=toy_prior("video")).n_frames == (n_frames or 8)


def test_a_recipe_for_other_models_is_said_to_be_one():
    with pytest.raises(ValueError, match="the recipe 'model-video' is for other models, so choose toy$"):
        longer(None, MODEL_VIDEO, toy_prior("video"))


def test_the_most_frames_can_be_asked_for():
    assert longer(449).windows.length == 64 and longer(1025, with_frames_of(MODEL_VIDEO, {"video": WAN}), WAN)


def test_its_record_is_read_back_as_it_was():
    assert config_from_dict(MotionRecipe, json.loads(json.dumps(asdict(longer(24))))) == longer(24)


def test_a_length_without_windows_is_refused():
    with pytest.raises(ValueError, match=r"motion\.deformation\.length follows from the frames"):
        check_recipe(replace(TOY_MOTION, deformation=TOY_MOTION.deformation.lasting(2.0)), "motion")


def test_windows_of_another_take_are_refused():
    with pytest.raises(ValueError, match="windows cut takes of 24 frames, and motion.n_frames is 16"):
        check_recipe(replace(longer(24), n_frames=16), "motion")


def test_what_it_takes_grows_with_it():
    short, long = (memory_bytes(longer(n, ZEROSCOPE), SMALL) for n in (None, 72))
    assert long > 2 * short
    assert final_cameras(ImageOptions(part_frames=7), tiny_scene(CONFIG)).shape == (1, 56)
    lasting = replace(CONFIG, deformation=CONFIG.deformation.lasting(3.0))
    assert final_cameras(ImageOptions(part_frames=7), tiny_scene(lasting)).shape == (1, 3 * 56)


def test_the_command_line_knows_the_frames():
    assert parse("animate", ["s", "x", "--frames", "24"]).options.frames == 24
    assert parse("text-to-4d", ["x", "--motion-frames", "24"]).options.motion_frames == 24
    assert parse("animate", ["s", "x"]).options.frames is None
    with pytest.raises(ValueError, match="--frames must lie in"):
        parse("animate", ["s", "x", "--frames", "0"])


# ---- the field ---------------------------------------------------------------------------------------------------


def test_the_field_is_as_fine_in_every_take_as_in_one():
    config = DeformationConfig()
    three = config.lasting(3.0)
    assert three.grid.base_resolution == 12 and three.grid.log2_entries == config.grid.log2_entries + 2
    assert three.length == 3.0 and three.scale == config.scale
    one, long = config.grid.layout(4).levels[5], three.grid.layout(4).levels[5]
    assert (long.scale + 1) / 3 == pytest.approx(one.scale + 1, rel=1e-6)  # cells a take, and along a third of the box


def test_the_place_in_the_box_takes_a_part_of_a_long_grid():
    field, kernels = DeformationField(TOY_MOTION.deformation.lasting(2.0)), select_kernels(CPU)
    seen = []
    field.grid.forward = lambda x, *_: seen.append(x) or torch.zeros(len(x), field.grid.layout.n_outputs)
    u, times = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 5)
    field.displacement(u, times, kernels)
    assert torch.equal(seen[0], torch.cat((u / 2, times[:, None]), 1))


def test_a_long_scene_is_looked_at_as_often_in_every_take():
    still = solid_ball(0.5)
    short, long = (
        motion_stage(still, replace(recipe, deformation=motion_case(1)[0].deformation), 0, 1.0).scene
        for recipe in (TOY_MOTION, longer(22))
    )
    assert len(short.moments()) == N_TIMES and len(long.moments()) == 3 * N_TIMES
    assert long.deformation.config.length == 3.0 and short.deformation.config.length is None


def test_a_long_motion_is_trained_over_all_its_frames():
    recipe, guidance, _, still, _ = motion_case(3)
    recipe = longer(11, recipe)
    assert recipe.windows.starts == (0, 2, 5)
    reports = []
    control = RunControl(checkpoint=None, identity={}, on_step=lambda report, scene: reports.append(report))
    scene, summary = train_motion(still, recipe, guidance, seed=0, device=CPU, control=control, deformation_scale=1.0)
    assert summary.steps == 3 and not summary.bad_steps and not any(summary.nonfinite.values())
    assert scene.deformation.config.length == 2.0
    u = torch.rand(400, 3, generator=torch.Generator().manual_seed(0))
    moved = [
        scene.deformation.displacement(u, torch.full((400,), t), scene.kernels).abs().max() for t in (0.2, 0.5, 0.9)
    ]
    assert min(moved) > 1e-4, "everywhere in time"


# ---- measures ----------------------------------------------------------------------------------------------------


def test_every_take_of_a_long_scene_is_measured(monkeypatch):
    """Against a scene that jumps once and then stands."""
    from dream4d_engine.toyworld import evaluate as module

    scene = motion_stage(solid_ball(0.5), longer(15), 0, 1.0).scene
    truth = module.true_renderer("a red cube is jumping")

    def rendered(_scene, cameras, _options):
        time = cameras.time * 2
        image = truth(cameras.at_time(torch.where(time > 1, torch.zeros(()), time)))
        return Images(image.rgb, image.opacity)

    monkeypatch.setattr(module, "render_chunked", rendered)
    first = evaluate_scene(scene, "a red cube is jumping", size=24, n_views=2, n_times=5, n_azimuths=4)
    assert first.motion_correlation > 0.99 and first.motion_amplitude == pytest.approx(1, abs=0.05)
    (second,) = evaluate_later(scene, first, size=24, n_times=5)
    assert second.motion_correlation == 0 and second.motion_amplitude < 0.05 and "clip IoU" in second.summary()
    short = motion_stage(solid_ball(0.5), TOY_MOTION, 0, 1.0).scene
    assert evaluate_later(short, first) == ()
