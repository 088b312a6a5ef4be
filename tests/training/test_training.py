"""The recipes, the loop and both stages, on priors whose answer is known."""

import math
import re
from dataclasses import replace

import pytest
import torch
from checkpoint_changes import TABLE, drop, filled, put, rewritten, say
from training_cases import CPU, SMALL, ideal_guidance, motion_case, seeded, solid_ball, static_case

from dream4d_engine.cameras import make_cameras
from dream4d_engine.fields.deformation import DeformationConfig
from dream4d_engine.fields.encodings import HashGridConfig
from dream4d_engine.guidance.distillation import DistillationConfig
from dream4d_engine.priors.networks.execution import Runtime
from dream4d_engine.randomness import Draw
from dream4d_engine.rendering import RenderOptions, prepare_view, render_chunked
from dream4d_engine.scene import build_scene
from dream4d_engine.schedules import Schedule, constant
from dream4d_engine.supervision import (
    RandomBackground,
    RegularizerWeights,
    Supervision,
    Terms,
    draw_background,
    gather,
    rendered,
    views_of,
)
from dream4d_engine.training import loop
from dream4d_engine.training.checkpoint import CheckpointError, first_difference, load_checkpoint, set_aside
from dream4d_engine.training.config import (
    MODEL_VIDEO,
    MODELSCOPE,
    MOTION_RECIPES,
    STATIC_RECIPES,
    TEXT_TO_3D,
    TOY_MOTION,
    TOY_STATIC,
    ZEROSCOPE,
    LoopConfig,
    OptimizerConfig,
    Phase,
    find_recipe,
    with_loop,
)
from dream4d_engine.training.guidance import load_guidance
from dream4d_engine.training.history import all_answered
from dream4d_engine.training.loop import (
    Interrupted,
    PriorSilent,
    ResumeMismatch,
    RunControl,
    TrainingDiverged,
    train,
)
from dream4d_engine.training.motion import choose_deformation_scale, train_motion, whole_motion
from dream4d_engine.training.stages import Stage, current_phase
from dream4d_engine.training.static import object_extent, static_groups, static_stage, train_static
from dream4d_engine.training.validate import check_recipe

LOOPED = replace(TOY_MOTION.deformation, loop=True)

# ---- recipes -----------------------------------------------------------------------------------------------------


def test_the_text_recipe_has_the_published_numbers():
    multiview, image = (term.distillation for term in TEXT_TO_3D.guidance)
    assert [term.weight for term in TEXT_TO_3D.guidance] == [2.0, 1.0]
    assert TEXT_TO_3D.steps == 10_000
    assert (multiview.guidance_scale, multiview.loss, multiview.rescale) == (50.0, "x0", 0.5)
    assert image.guidance_scale == 101.0, "100 in the form text + s (text - negative)"
    assert [multiview.max_noise(step / 10_000) for step in (0, 8000, 9999)] == [0.98, 0.5, 0.5]
    assert multiview.min_noise(0.4) == pytest.approx(0.5)
    assert (image.min_noise(0.3), image.max_noise(0.9)) == (0.2, 0.6)
    phases = [current_phase(TEXT_TO_3D.phases, step / 10_000) for step in (0, 4999, 5000)]
    assert [(p.n_groups, p.height) for p in phases] == [(2, 64), (2, 64), (1, 256)]
    grid = TEXT_TO_3D.scene.radiance.grid
    assert (grid.n_levels, grid.n_features, grid.log2_entries, grid.base_resolution) == (16, 2, 19, 16)
    assert grid.base_resolution * grid.growth**15 == pytest.approx(4096, rel=1e-3)
    assert TEXT_TO_3D.optimizer.betas == (0.9, 0.99) and TEXT_TO_3D.optimizer.eps == 1e-15


def test_any_video_model_is_guided_less_as_the_run_goes_on():
    video = MODEL_VIDEO.guidance[0].distillation
    assert [video.at(progress).guidance_scale for progress in (0.0, 0.5, 1.0)] == [25.0, 18.5, 12.0]


def test_the_motion_recipes_have_the_published_numbers():
    video = ZEROSCOPE.guidance[0].distillation
    assert (ZEROSCOPE.n_frames, ZEROSCOPE.phases[0].width, ZEROSCOPE.phases[0].height) == (24, 144, 80)
    assert (video.guidance_scale, video.n_steps, video.color_weight) == (101.0, 1, 0.1)
    assert (video.min_noise(0.999999), video.max_noise(0.0)) == (pytest.approx(0.2, abs=1e-5), 0.99)
    assert ZEROSCOPE.regularizers.displacement_tv == 1000.0
    assert ZEROSCOPE.cameras.azimuth_deg == (-150.0, 150.0) and ZEROSCOPE.cameras.elevation_deg == (0.0, 45.0)
    assert ZEROSCOPE.optimizer.milestones == (0.8, 0.9) and ZEROSCOPE.optimizer.lr_grid == 0.001
    assert (ZEROSCOPE.deformation.grid.n_levels, ZEROSCOPE.deformation.grid.base_resolution) == (12, 4)
    assert [current_phase(MODELSCOPE.phases, p).height for p in (0.0, 0.69, 0.7)] == [64, 64, 256]
    assert [phase.displacement_tv for phase in MODELSCOPE.phases] == [None, 10.0], "1000, then 10"


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ValueError, match="'tyo'.*toy"):
        find_recipe("tyo", {"toy": TOY_STATIC})


def test_random_backgrounds_come_as_often_and_as_wide_as_asked():
    generator = seeded()
    config = RandomBackground(probability=0.5, low=0.2, high=0.6)
    drawn = [draw_background(config, generator, CPU) for _ in range(400)]
    colors = torch.stack([color for color in drawn if color is not None])
    assert 150 < len(colors) < 250
    assert 0.2 <= colors.min() < 0.25 and 0.55 < colors.max() <= 0.6
    grey = draw_background(replace(config, probability=1.0, grey=True), generator, CPU)
    assert torch.all(grey == grey[0])


# ---- the loop ----------------------------------------------------------------------------------------------------


def parameters_of(scene):
    return torch.cat([p.detach().reshape(-1) for p in scene.parameters()])


def test_a_run_that_was_stopped_and_resumed_ends_bit_for_bit_as_an_unbroken_one(tmp_path):
    recipe, guidance, _, _ = static_case(steps=24)
    unbroken, _ = train_static(recipe, guidance, seed=3, device=CPU, control=RunControl())
    seen = []
    control = RunControl(
        checkpoint=tmp_path / "run.checkpoint",
        identity={"prompt": "a"},
        on_step=lambda report, scene: seen.append(report.step),
        should_stop=lambda: len(seen) == 10,
    )
    with pytest.raises(Interrupted, match="after step 10"):
        train_static(recipe, guidance, seed=3, device=CPU, control=control)
    resumed, summary = train_static(recipe, guidance, seed=3, device=CPU, control=control)
    assert summary.resumed_from == 10 and seen == list(range(1, 25))
    assert torch.equal(parameters_of(resumed), parameters_of(unbroken))
    assert torch.equal(resumed.occupancy.values, unbroken.occupancy.values)


def test_a_finished_run_is_not_repeated(tmp_path):
    recipe, guidance, _, _ = static_case(steps=3)
    control = RunControl(checkpoint=tmp_path / "run.checkpoint")
    first, _ = train_static(recipe, guidance, seed=0, device=CPU, control=control)
    again, summary = train_static(recipe, guidance, seed=0, device=CPU, control=control)
    assert summary.resumed_from == 3
    assert torch.equal(parameters_of(first), parameters_of(again))


def test_resuming_with_other_settings_says_which(tmp_path):
    recipe, guidance, _, _ = static_case(steps=2)
    control = RunControl(checkpoint=tmp_path / "run.checkpoint", identity={"recipe": {"lr": 0.01}})
    train_static(recipe, guidance, seed=0, device=CPU, control=control)
    other = replace(control, identity={"recipe": {"lr": 0.02}})
    with pytest.raises(ResumeMismatch, match=r"recipe\.lr is 0\.02, the run there has 0\.01"):
        train_static(recipe, guidance, seed=0, device=CPU, control=other)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path, damage):
    recipe, guidance, _, _ = static_case(steps=1)
    path = tmp_path / "run.checkpoint"
    train_static(recipe, guidance, seed=0, device=CPU, control=RunControl(checkpoint=path))
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "foreign": b"PK\x03\x04" * 100, "empty": b""}[damage])
    with pytest.raises(CheckpointError, match="run.checkpoint"):
        load_checkpoint(path)


def test_what_lies_in_a_checkpoints_place_is_said_as_it_is(tmp_path):
    """Nobody has downloaded it, so nothing is said of downloads."""
    path = tmp_path / "run.checkpoint"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="run.checkpoint is empty: what was in it is lost$"):
        load_checkpoint(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="run.checkpoint is a folder, no checkpoint$") as caught:
        load_checkpoint(path)
    (path / "x").touch()
    assert caught.value.path == path and set_aside(path).is_dir() and not path.exists()
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match="is a Git LFS pointer"):
        load_checkpoint(path)


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory):
    """A checkpoint of a run of 6 steps, stopped after 4."""
    path = tmp_path_factory.mktemp("whole") / "run.checkpoint"
    recipe, guidance, _, _ = static_case(steps=6, size=8)
    seen = []
    control = RunControl(path, {"a": 1}, lambda report, _: seen.append(report), lambda: len(seen) == 4)
    with pytest.raises(Interrupted):
        train_static(recipe, guidance, seed=0, device=CPU, control=control)
    return path


BAD_STATES = {
    "NaN in a parameter": (put(TABLE, filled(math.nan)), f"{TABLE} holds numbers that are not finite"),
    "infinite occupancy": (put("scene.occupancy.values", filled(math.inf)), "scene.occupancy.values holds numbers"),
    "NaN in a moment": (put("optimizer.0.exp_avg", filled(math.nan)), "optimizer.0.exp_avg holds numbers that are"),
    "infinite square": (put("optimizer.1.exp_avg_sq", filled(math.inf)), "optimizer.1.exp_avg_sq holds numbers"),
    "negative square": (put("optimizer.0.exp_avg_sq", filled(-1.0)), "optimizer.0.exp_avg_sq holds squares below 0"),
    "moments of the future": (put("optimizer.0.step", lambda t: t + 9), "optimizer.0.step counts 13 steps, the run"),
    "NaN steps": (put("optimizer.0.step", lambda t: t * math.nan), "optimizer.0.step holds numbers that are not"),
    "beyond the end": (say(step="7"), "it is at step 7 of a run of 6"),
    "far beyond": (say(step="1000000000000"), "it is at step 1000000000000 of a run of 6"),
    "before the beginning": (say(step="-1"), "it is at step -1 of a run of 6"),
    "no number": (say(step="four"), "step in its header is 'four'"),
    "endless number": (say(step="9" * 5000), "step in its header is '999"),
    "no version": (say(format_version=""), "format_version in its header is ''"),
    "no identity": (say(identity=""), "identity is not valid JSON"),
    "another identity": (say(identity="[]"), "identity must hold an object, got []"),
    "deep identity": (say(identity='{"a":' * 5000 + "1" + "}" * 5000), "identity is nested too deep"),
    "no parameter": (drop(TABLE), f"{TABLE} is missing"),
    "no moment": (drop("optimizer.0.exp_avg_sq"), "optimizer.0.exp_avg_sq is missing"),
    "no moments of one": (drop("optimizer.0."), "the optimiser's moments are missing, or some of them"),
    "no moments at all": (drop("optimizer."), "the optimiser's moments are missing, or some of them"),
    "another scene": (put(TABLE, lambda t: t[:-8].clone()), f"{TABLE} has the shape"),
    "other moments": (put("optimizer.0.exp_avg", lambda t: t[:1].clone()), "optimizer.0.exp_avg has the shape"),
    "halves": (put(TABLE, lambda t: t.half()), f"{TABLE} has the type torch.float16, the run needs torch.float32"),
    "whole moments": (put("optimizer.0.exp_avg", lambda t: t.long()), "optimizer.0.exp_avg has the type torch.int64"),
    "a part too many": (lambda t, h: t.update(extra=torch.zeros(1)), "the run knows no extra"),
    "a moment too many": (lambda t, h: t.update({"optimizer.99.step": torch.zeros(())}), "knows no optimizer.99.step"),
    "a name of its own": (
        lambda t, h: t.update({"optimizer.\x1b.step": torch.zeros(1)}),
        "the run knows no optimizer.",
    ),
    "a bad scale": (lambda t, h: t.update(scaler=torch.tensor([0.0, 1.0])), "scaler holds [0.0, 1.0]"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_run_does_not_go_on_from_a_state_that_no_run_has(name, whole_checkpoint, tmp_path):
    change, said = BAD_STATES[name]
    path = rewritten(whole_checkpoint, tmp_path / "run.checkpoint", change)
    recipe, guidance, _, _ = static_case(steps=6, size=8)
    with pytest.raises(CheckpointError) as caught:
        train_static(recipe, guidance, seed=0, device=CPU, control=RunControl(path, {"a": 1}))
    assert said in str(caught.value) and "run.checkpoint" in str(caught.value) and str(caught.value).isprintable()
    assert caught.value.path == path


def test_a_checkpoint_of_an_older_version_is_refused_for_that_reason(whole_checkpoint, tmp_path):
    path = rewritten(whole_checkpoint, tmp_path / "run.checkpoint", say(format_version="1"))
    with pytest.raises(CheckpointError, match="older version of dream4d, whose steps drew other random") as caught:
        load_checkpoint(path)
    assert caught.value.path == path, "it is kept aside, and the run starts over"


def test_a_newer_checkpoint_stays_where_it_is(whole_checkpoint, tmp_path):
    path = rewritten(whole_checkpoint, tmp_path / "run.checkpoint", say(format_version="3"))
    with pytest.raises(CheckpointError, match="newer version of dream4d: update") as caught:
        load_checkpoint(path)
    assert caught.value.path is None


def test_the_latest_files_that_could_not_be_used_are_kept(tmp_path):
    names = []
    for content in "abcde":
        (tmp_path / "run.checkpoint").write_text(content)
        names.append(set_aside(tmp_path / "run.checkpoint"))
    assert names[0].name == "run.checkpoint.damaged"
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["c", "d", "e"]
    assert set_aside(tmp_path / "none.checkpoint") is None


def test_the_same_seed_gives_the_same_result_and_another_one_another():
    recipe, guidance, _, _ = static_case(steps=3)
    runs = [train_static(recipe, guidance, seed=s, device=CPU, control=RunControl())[0] for s in (1, 1, 2)]
    assert torch.equal(parameters_of(runs[0]), parameters_of(runs[1]))
    assert not torch.equal(parameters_of(runs[0]), parameters_of(runs[2]))


def fit_on(objective, steps=6, **loop):
    scene = build_scene(SMALL, seeded())
    recipe = replace(static_case()[0], steps=steps, loop=LoopConfig(precision="full", **loop))

    def view(scene, progress, draw):
        return prepare_view(scene, make_cameras(0.0, 0.3, 3.0, 0.7, 0.0, 2, 2), RenderOptions())

    def loss(scene, output, view, progress, draw):
        return Terms({"test": objective(scene, progress)})

    supervision = Supervision("test", view, loss)
    stage = Stage("test", scene, static_groups(scene, recipe.optimizer), recipe, lambda *_: (supervision,))
    return scene, train(stage, {}, 0, RunControl())


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted():
    calls = []

    def objective(scene, progress):
        calls.append(progress)
        bad = float("nan") if len(calls) == 2 else 1.0
        before.append(parameters_of(scene).clone())
        return bad * sum(p.square().sum() for p in scene.parameters())

    before = []
    _, summary = fit_on(objective)
    assert summary.bad_steps == 1
    assert torch.equal(before[1], before[2]), "the bad step left the parameters alone"
    assert not torch.equal(before[0], before[1]) and not torch.equal(before[2], before[3])


def test_a_run_that_only_fails_stops_and_says_what_to_lower():
    with pytest.raises(TrainingDiverged, match="learning rates or the guidance scale"):
        fit_on(lambda scene, progress: float("nan") * parameters_sum(scene), steps=50, max_bad_steps=3)


@pytest.mark.parametrize("steps", [1, 3, 21])
def test_a_run_that_changes_nothing_is_no_success(steps):
    with pytest.raises(TrainingDiverged, match=f"{min(steps, 21)} steps in a row gave no finite gradient"):
        fit_on(lambda scene, progress: float("inf") * parameters_sum(scene), steps=steps)


def test_gradients_too_large_to_be_squared_change_nothing():
    with pytest.raises(TrainingDiverged):
        fit_on(lambda scene, progress: 1e25 * parameters_sum(scene), steps=2)


def test_a_state_that_no_run_could_go_on_from_is_not_saved(tmp_path):
    recipe, guidance, _, _ = static_case(steps=30, size=8)
    path, kept = tmp_path / "run.checkpoint", []

    def on_step(report, scene):
        if report.step == 10:  # after the save of step 7
            kept.append(path.read_bytes())
            scene.occupancy.values[0] = math.nan

    with pytest.raises(TrainingDiverged, match=r"scene\.occupancy\.values is not finite after step 14"):
        train_static(recipe, guidance, seed=0, device=CPU, control=RunControl(path, {}, on_step))
    assert kept == [path.read_bytes()]


# ---- priors without an answer ------------------------------------------------------------------------------------


def overflowing_prior(recipe, name="conv_in", prompt="a red cube"):
    """The toy prior, its weights finite and so large that its activations are not."""
    kind = recipe.guidance[0].prior
    from dream4d_engine.priors.files import toy_prior

    loaded = []
    guidance = load_guidance(recipe, {kind: toy_prior(kind)}, prompt, Runtime(CPU), on_prior=loaded.append)
    unet = loaded[0].networks[0]
    layer = unet.get_submodule(name)

    def break_it():
        with torch.no_grad():
            layer.weight.fill_(1e38)
        assert all(p.isfinite().all() for p in unet.parameters())

    return guidance, break_it


def toy_case(steps):
    phases = (replace(TOY_STATIC.phases[0], n_groups=1, height=16, width=16),)
    optimizer = replace(TOY_STATIC.optimizer, lr_mlp=0.01)
    loop_config = LoopConfig(precision="full", checkpoint_steps=2)
    return replace(TOY_STATIC, steps=steps, scene=SMALL, phases=phases, optimizer=optimizer, loop=loop_config)


def test_a_prior_that_overflows_ends_the_run_and_the_last_good_state_is_kept(tmp_path):
    recipe = toy_case(steps=40)
    guidance, break_it = overflowing_prior(recipe)
    states, reports = [], []

    def on_step(report, scene):
        reports.append(report)
        states.append(parameters_of(scene).clone())
        if report.step == 4:
            break_it()

    path = tmp_path / "run.checkpoint"
    with pytest.raises(PriorSilent, match="static: 100% of what the multiview prior answers is not finite, 6 steps"):
        train_static(recipe, guidance, seed=0, device=CPU, control=RunControl(path, {}, on_step))
    assert len(reports) == 9, "the tenth step, the sixth in a row, was too much"
    assert reports[3].nonfinite == {} and reports[3].warning == ""
    assert reports[7].nonfinite == {"multiview": 0.5} and reports[7].warning == "multiview prior: 50 % not finite"
    assert not torch.equal(states[2], states[3]) and torch.equal(states[3], states[8]), "the bad steps changed nothing"
    saved = load_checkpoint(path)
    assert saved.step == 4, "the bad steps were not saved"
    assert torch.equal(saved.tensors["scene.canonical.grid.table"].flatten()[:9], states[3][:9])


@pytest.mark.parametrize("steps", [1, 4])
def test_a_prior_that_never_answers_is_no_success_however_short_the_run(steps):
    recipe = toy_case(steps)
    guidance, break_it = overflowing_prior(recipe)
    break_it()
    with pytest.raises(PriorSilent) as caught:
        train_static(recipe, guidance, seed=0, device=CPU, control=RunControl())
    assert caught.value.prior == "multiview"


class Partly:
    """A denoiser whose answers are not finite in some steps, or in some places."""

    def __init__(self, denoiser, steps, spoil):
        self._denoiser, self._steps, self._spoil, self._n = denoiser, steps, spoil, 0

    def __getattr__(self, name):
        return getattr(self._denoiser, name)

    def denoise(self, x, sigma, conditions):
        answer, self._n = self._denoiser.denoise(x, sigma, conditions).clone(), self._n + 1
        if self._n in self._steps:
            self._spoil(answer)
        return answer


def spoilt(steps, spoil, n_steps=12, stage="static"):
    """Train on a prior that is spoilt in some steps; return (reports, summary)."""
    if stage == "static":
        recipe, guidance, *_ = static_case(steps=n_steps, size=8)
    else:
        recipe, guidance, _, still, _ = motion_case(steps=n_steps)
    (kind,) = guidance
    guidance[kind] = replace(guidance[kind], denoiser=Partly(guidance[kind].denoiser, steps, spoil))
    reports = []
    control = RunControl(on_step=lambda report, scene: reports.append(report))
    given = {"seed": 0, "device": CPU, "control": control}
    if stage == "static":
        return reports, train_static(recipe, guidance, **given)[1]
    return reports, train_motion(still, recipe, guidance, **given)[1]


def test_answers_that_lack_now_and_then_are_told_and_the_run_goes_on():
    reports, summary = spoilt({3, 4, 5, 6, 7, 9}, lambda answer: answer.fill_(math.nan))
    assert summary.steps == 12 and summary.bad_steps == 6
    assert summary.nonfinite == {"multiview": pytest.approx(0.5)}
    assert reports[1].warning == "" and reports[-1].warning == "multiview prior: 50 % not finite"
    assert math.isfinite(summary.final_loss)


def test_a_few_values_that_lack_count_as_0_and_are_told():
    def one_value(answer):
        answer[0, 0, 0, 0, 0] = math.inf

    reports, summary = spoilt(range(1, 13), one_value)
    assert summary.bad_steps == 0 and 0 < summary.nonfinite["multiview"] < 0.01
    assert "multiview prior: 0." in reports[-1].warning


@pytest.mark.parametrize("spoil", [lambda a: a[:, :1].fill_(math.nan), lambda a: a[..., :1].fill_(math.inf)])
@pytest.mark.parametrize(("stage", "prior"), [("static", "multiview"), ("motion", "video")])
def test_one_view_or_one_column_that_always_lacks_ends_the_run(spoil, stage, prior):
    with pytest.raises(PriorSilent, match=f"{stage}: .*% of what the {prior} prior answers is not finite, 6 steps"):
        spoilt(range(100), spoil, stage=stage)


def test_a_silent_prior_leaves_the_loss_scale_alone():
    """Of half precision, which only a GPU trains with; what counts here works on a CPU, too."""
    scene, scaler = build_scene(SMALL, seeded()), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = loop.make_optimizer(static_groups(scene, OptimizerConfig()), OptimizerConfig())

    def step(share, factor=1.0):
        before = parameters_of(scene).clone()
        optimizer.zero_grad()
        loss = factor * parameters_sum(scene)
        answered = all_answered(Terms({}, {"multiview.nonfinite": torch.tensor(share)}), CPU)
        scaler.scale(loop._nan_unless(loss.detach().isfinite() & answered, loss)).backward()
        finite = loop._step(optimizer, scaler, answered, RunControl().processes)
        changed = not torch.equal(before, parameters_of(scene))
        assert bool(finite) == changed
        return changed, scaler.get_scale()

    assert step(0.0) == (True, 1024.0)
    assert step(1.0) == (False, 1024.0), "nothing changes, the scale neither"
    assert step(0.0, math.inf) == (False, 512.0), "a gradient that is too large halves it"
    assert step(0.005) == (True, 512.0)


def test_silence_is_heard_a_step_late_on_a_gpu(monkeypatch):
    history = loop.History
    monkeypatch.setattr(loop, "History", lambda stage, max_bad_steps, lag: history(stage, max_bad_steps, 1))
    with pytest.raises(PriorSilent, match="6 steps in a row, up to step 6"):
        spoilt(range(100), lambda answer: answer.fill_(math.nan))


def parameters_sum(scene):
    return sum(p.sum() for p in scene.parameters())


def test_no_steps_is_an_error():
    with pytest.raises(ValueError, match="at least one step, got 0"):
        fit_on(lambda scene, progress: parameters_sum(scene), steps=0)


def test_a_missing_prior_is_named():
    recipe, _, _, _ = static_case()
    with pytest.raises(ValueError, match="'multiview'"):
        train_static(recipe, {}, seed=0, device=CPU, control=RunControl())


def test_differences_are_found_where_they_are():
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}).startswith("a[1].b is 2")
    assert first_difference({"a": 1}, {}).startswith("a is 1")
    assert first_difference({"a": [{"b": 2, "new": False, "weight": 0.0}]}, {"a": [{"b": 2}]}) is None
    assert first_difference({"b": 2, "new": True}, {"b": 2}).startswith("new is True")
    assert first_difference({"b": 2}, {"b": 2, "new": False}).startswith("new is")


# ---- stage 1 -----------------------------------------------------------------------------------------------------


def test_an_ideal_prior_is_distilled_to_its_truth():
    recipe, guidance, cameras, truth = static_case(steps=80)
    scene, summary = train_static(recipe, guidance, seed=0, device=CPU, control=RunControl())
    output = render_chunked(scene, cameras)
    opaque, solid = output.opacity > 0.5, truth.mask > 0.5
    iou = (opaque & solid).sum() / (opaque | solid).sum()
    assert iou > 0.85
    error = (output.rgb - truth.rgb).square().mean()
    assert -10 * math.log10(error) > 20
    assert summary.bad_steps == 0


def test_every_regulariser_can_be_switched_on():
    recipe, guidance, _, _ = static_case(steps=2)
    weights = RegularizerWeights(0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
    reports = []
    control = RunControl(on_step=lambda report, scene: reports.append(report))
    train_static(replace(recipe, regularizers=weights), guidance, seed=0, device=CPU, control=control)
    names = {"opacity", "entropy", "orientation", "z_variance", "normal_2d", "normal_3d"}
    assert names <= reports[-1].terms.keys()
    assert all(math.isfinite(value) for value in reports[-1].terms.values())


def test_supervisions_keep_their_accuracy_under_autocast():
    recipe, guidance, _, _ = static_case()
    losses = []
    for enabled in (False, True):
        scene = build_scene(SMALL, seeded())
        with torch.autocast("cpu", torch.bfloat16, enabled):
            supervisions, draw = static_stage(recipe, scene).supervisions(guidance, None), Draw(1)
            seen = rendered(supervisions, scene, views_of(supervisions, scene, 0.5, draw))
            terms = gather([one.loss(scene, output, view, 0.5, draw) for one, view, output in seen])
            loss = sum(terms.losses.values())
        loss.backward()
        assert all(p.grad.isfinite().all() for p in scene.canonical.parameters())
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


# ---- stage 2 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [0.3, 0.5])
def test_the_extent_of_a_ball_is_its_radius(radius):
    assert object_extent(solid_ball(radius)) == pytest.approx(radius, abs=0.04)


def test_the_deformation_scale_zooms_small_objects_only():
    recipe = replace(TOY_MOTION, target_extent=0.6, min_scale=1.2, max_scale=2.0)
    assert choose_deformation_scale(solid_ball(0.55), recipe) == 1.0
    assert choose_deformation_scale(solid_ball(0.4), recipe) == pytest.approx(1.5, rel=0.1)
    assert choose_deformation_scale(solid_ball(0.1), recipe) == 2.0


def test_an_empty_scene_is_not_animated():
    with pytest.raises(ValueError, match="empty"):
        choose_deformation_scale(solid_ball(0.001), TOY_MOTION)


def test_an_impossible_deformation_scale_is_named():
    with pytest.raises(ValueError, match="-1"):
        train_motion(solid_ball(0.5), TOY_MOTION, {}, seed=0, device=CPU, control=RunControl(), deformation_scale=-1)


def test_an_ideal_video_prior_is_distilled_to_its_motion():
    recipe, guidance, cameras, still, rise = motion_case(steps=60)
    scene, _ = train_motion(still, recipe, guidance, seed=0, device=CPU, control=RunControl(), deformation_scale=1.0)
    opacity = render_chunked(scene, cameras).opacity[0, ..., 0]
    rows = torch.arange(opacity.shape[1], dtype=torch.float32)
    centre = -(opacity.sum(2) * rows).sum(1) / opacity.sum((1, 2))
    signal, truth = centre - centre[0], torch.tensor(rise, dtype=torch.float32)
    assert torch.corrcoef(torch.stack((signal, truth)))[0, 1] > 0.9
    assert 0.6 < signal.max() / truth.max() < 1.3


@pytest.mark.parametrize("strength", [None, 0.5])
def test_the_motion_as_a_whole_learns_a_jump_and_goes_as_many_times_as_far_as_is_shown(strength):
    recipe, guidance, cameras, still, rise = motion_case(steps=40)
    deformation = replace(recipe.deformation, body_knots=6)
    optimizer = replace(recipe.optimizer, lr_body=0.03)
    recipe = replace(recipe, deformation=deformation, first_levels=0, level_rate=0.0, optimizer=optimizer)
    recipe = replace(recipe, motion_strength=strength)
    scene, _ = train_motion(still, recipe, guidance, seed=0, device=CPU, control=RunControl(), deformation_scale=1.0)
    assert scene.deformation.shown == 1 and int(scene.deformation.active_levels) == 0
    opacity = render_chunked(scene, cameras).opacity[0, ..., 0]
    rows = torch.arange(opacity.shape[1], dtype=torch.float32)
    centre = -(opacity.sum(2) * rows).sum(1) / opacity.sum((1, 2))
    signal, truth = centre - centre[0], torch.tensor(rise, dtype=torch.float32)
    assert torch.corrcoef(torch.stack((signal, truth)))[0, 1] > 0.98
    assert signal.max() / truth.max() == pytest.approx(strength or 1.0, abs=0.1 * (strength or 1.0))


def test_how_far_an_object_goes_as_a_whole_is_told_in_its_sizes():
    """A ball that is shown as large as the box, and is 0.3 of the box higher all the time."""
    config = DeformationConfig(HashGridConfig(n_levels=1), scale=2.0, body_knots=7)
    ball = solid_ball(0.5).with_deformation(config, seeded())
    assert whole_motion(ball) == 0 == whole_motion(solid_ball(0.5))
    with torch.no_grad():
        ball.deformation.body.doubt.zero_()
        ball.deformation.body.taken.zero_()
        ball.deformation.body.knots[:, -1] = 0.6  # in half sides of the box
    assert whole_motion(ball) == pytest.approx(0.3, rel=0.05)
    ball.deformation.shown = 0.5
    assert whole_motion(ball) == pytest.approx(0.15, rel=0.05)


@pytest.mark.parametrize(("least", "is_kept"), [(0.0, True), (1e-4, True), (0.9, False)])
def test_a_motion_that_is_smaller_than_chance_is_left_out_and_said(least, is_kept, caplog):
    recipe, guidance, _, still, _ = motion_case(steps=3)
    deformation = replace(recipe.deformation, body_knots=6)
    recipe = replace(recipe, deformation=deformation, first_levels=0, level_rate=0.0, least_motion=least)
    scene, _ = train_motion(still, recipe, guidance, seed=0, device=CPU, control=RunControl(), deformation_scale=1.0)
    assert bool((scene.deformation.body.knots != 0).any()) == is_kept
    assert ("taken for chance" in caplog.text) != is_kept


def test_the_doubt_about_a_motion_grows_over_the_run_and_is_whole_in_the_end():
    recipe, guidance, _, still, _ = motion_case(steps=4)
    deformation = replace(recipe.deformation, body_knots=6)
    recipe = replace(recipe, deformation=deformation, doubt=Schedule(0.0, 0.8, 0.0, 0.5))
    seen = []
    control = RunControl(on_step=lambda report, scene: seen.append(scene.deformation.body.doubted))
    scene, _ = train_motion(still, recipe, guidance, seed=0, device=CPU, control=control)
    assert seen == [0.0, 0.4, 0.8, 0.8] and scene.deformation.body.doubted == 1


def test_animating_leaves_its_input_and_the_canonical_field_alone():
    recipe, guidance, _, still, _ = motion_case(steps=2)
    before = {name: value.clone() for name, value in still.state_dict().items()}
    scene, _ = train_motion(still, recipe, guidance, seed=0, device=CPU, control=RunControl())
    assert all(torch.equal(value, before[name]) for name, value in still.state_dict().items())
    assert torch.equal(scene.canonical.grid.table, still.canonical.grid.table)
    assert all(p.requires_grad for p in scene.canonical.parameters())
    assert still.deformation is None and scene.deformation is not None


def test_a_phase_can_change_the_weight_of_the_total_variation():
    recipe, guidance, _, still, _ = motion_case(steps=4)
    phases = (recipe.phases[0], replace(recipe.phases[0], start=0.5, displacement_tv=0.0))
    recipe = replace(recipe, phases=phases, regularizers=RegularizerWeights(displacement_tv=1.0))
    seen = []
    control = RunControl(on_step=lambda report, scene: seen.append("displacement_tv" in report.terms))
    train_motion(still, recipe, guidance, seed=0, device=CPU, control=control)
    assert seen == [True, True, False, False]


def test_the_grid_levels_of_the_deformation_come_free_one_by_one():
    recipe, guidance, _, still, _ = motion_case(steps=4)
    recipe = replace(recipe, first_levels=1, level_rate=2)
    seen = []
    control = RunControl(on_step=lambda report, scene: seen.append(int(scene.deformation.active_levels)))
    train_motion(still, recipe, guidance, seed=0, device=CPU, control=control)
    assert seen == [1, 1, 2, 2]


def test_views_behind_the_limit_are_left_out_of_the_image_prior():
    config = DistillationConfig(1.0, constant(0.5), constant(0.5), max_azimuth_deg=100)
    cameras = make_cameras(torch.tensor([[0.0, math.pi]]), 0.2, 3.0, 0.7, 0.0, 8, 8)
    scene = build_scene(SMALL, seeded())
    image = render_chunked(scene, cameras).rgb.movedim(-1, 2).requires_grad_()
    from dream4d_engine.guidance.distillation import distill

    guidance = ideal_guidance(torch.rand(1, 8, 8, 3, generator=seeded()), config)
    distill(guidance, image, cameras, 0.0, Draw(0)).loss.backward()
    assert image.grad[0, 0].abs().sum() > 0 and image.grad[0, 1].abs().sum() == 0


@pytest.mark.parametrize("recipe", [*STATIC_RECIPES.values(), *MOTION_RECIPES.values()], ids=lambda r: r.name)
def test_every_recipe_keeps_to_the_limits(recipe):
    check_recipe(recipe)


@pytest.mark.parametrize("name", MOTION_RECIPES)
def test_a_loop_is_filmed_from_any_moment_on_but_for_the_toy_prior(name):
    recipe, phase = MOTION_RECIPES[name], Phase(0.0, 200, 4, 4)
    takes, looped = (r.sample_cameras(phase, seeded(3)) for r in (recipe, with_loop(recipe)))
    assert torch.equal(takes.c2w, looped.c2w)
    if name == "toy":  # all that its prior knows begin in the first fifth
        assert torch.equal(takes.time.remainder(1), looped.time.remainder(1))
    else:
        assert looped.time[:, 0].histc(10, 0, 1).min() > 5
    check_recipe(with_loop(recipe))
    given = with_loop(replace(recipe, loop_starts=(0.0, 0.1)))
    assert given.sample_cameras(phase, seeded(3)).time[:, 0].max() <= 0.1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "at least one step"),
        ({"n_frames": 0}, "motion.n_frames must be at least 1"),
        ({"phases": ()}, "motion.phases must have one that starts at 0"),
        ({"phases": (Phase(0.5, 1, 8, 8),)}, "motion.phases must have one that starts at 0"),
        ({"phases": (Phase(0.0, 1, 8, 0),)}, "motion.phases.0.width must be at least 1"),
        ({"phases": (Phase(0.0, 1, 8, 8), Phase(-1.0, 1, 8, 8))}, "motion.phases.1.start"),
        ({"time_span": (0.9, 0.2)}, "motion.time_span"),
        ({"loop_starts": (0.0, 1.0)}, "motion.loop_starts is about loops"),
        (
            {"loop_starts": (0.5, 0.2), "deformation": LOOPED},
            "motion.loop_starts must keep to -1 <= first <= last <= 1",
        ),
        ({"max_scale": 0.0}, "motion.max_scale must be above 0"),
        ({"least_motion": -0.1}, "motion.least_motion must be at least 0"),
        ({"doubt": Schedule(0.0, -1.0)}, "motion.doubt.last must be at least 0"),
        ({"motion_strength": 0.0}, "motion.motion_strength must lie in [0.25, 2], got 0"),
        ({"motion_strength": 2.5}, "motion.motion_strength must lie in [0.25, 2], got 2.5"),
        ({"optimizer": OptimizerConfig(lr_body=-1.0)}, "motion.optimizer.lr_body must be at least 0"),
        ({"level_rate": math.nan}, "motion.level_rate must be a finite number, got nan"),
        ({"optimizer": OptimizerConfig(betas=(0.9, 1.0))}, "motion.optimizer.betas"),
        ({"optimizer": OptimizerConfig(lr_mlp=-1.0)}, "motion.optimizer.lr_mlp must be at least 0"),
        ({"optimizer": OptimizerConfig(milestones=(0.5, math.inf))}, "motion.optimizer.milestones.1"),
        ({"background": RandomBackground(low=-5.0)}, "motion.background.low"),
        ({"loop": LoopConfig(occupancy_every=0)}, "motion.loop.occupancy_every must be at least 1"),
    ],
)
def test_numbers_that_no_run_can_be_made_with(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        check_recipe(replace(MOTION_RECIPES["toy"], **changes), "motion")


def test_readings_that_come_a_step_late_change_nothing_but_the_reports(monkeypatch):
    recipe, guidance, _, _ = static_case(steps=4)

    def run():
        reports = []
        control = RunControl(on_step=lambda report, scene: reports.append(report))
        scene, summary = train_static(recipe, guidance, seed=1, device=CPU, control=control)
        return parameters_of(scene), [report.loss for report in reports], summary

    parameters, losses, summary = run()
    history = loop.History
    monkeypatch.setattr(loop, "History", lambda stage, max_bad_steps, lag: history(stage, max_bad_steps, 1))
    late_parameters, late_losses, late_summary = run()
    assert torch.equal(parameters, late_parameters)
    assert math.isnan(late_losses[0]) and late_losses[1:] == losses[:-1], "each the loss of the step before"
    assert late_summary.final_loss == summary.final_loss == losses[-1], "all are read in the end"
