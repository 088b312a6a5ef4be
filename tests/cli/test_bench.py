"""The bench: what it measures, on the toy models and on narrow copies of the full-size ones."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from dream4d_engine.cli import bench, main
from dream4d_engine.priors import architectures
from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.files import toy_folder
from dream4d_engine.profiling import Idle, Profile, Work, gaps
from dream4d_engine.scene import Scene

CPU = torch.device("cpu")
CHANNELS = (32, 32, 64, 64)
SMALL_VAE = {**architectures._SD_VAE, "block_out_channels": CHANNELS}
ONE_STEP = ["--steps", "1", "--warmup", "1", "--device", "cpu"]


def measured(tmp_path, *words):
    out = tmp_path / "bench.json"
    code = main(["bench", *words, *ONE_STEP, "--out", str(out)])
    return code, json.loads(out.read_text())["recipes"]


def fails(capsys, *words):
    assert main(["bench", *words]) == 2
    return capsys.readouterr().err


def narrow(architecture):
    """The same kind of model, small enough for a test."""
    heads = {"attention_head_dim": 8, "cross_attention_dim": 16, "block_out_channels": CHANNELS}
    return replace(architecture, unet={**architecture.unet, **heads}, token_width=16, n_tokens=3, image_size=(32, 32))


@pytest.fixture
def small(monkeypatch):
    """Recipes and models of the published kinds, all small."""
    monkeypatch.setattr(architectures, "_SD_VAE", SMALL_VAE)
    kinds = ("multiview", "image", "video")
    of_kind = {kind: narrow(architectures._OF_KIND[kind]) for kind in kinds}
    of_kind["video"] = replace(of_kind["video"], n_frames=8)
    monkeypatch.setattr(architectures, "_OF_KIND", of_kind)

    def shrunk(recipe, **changes):
        phases = tuple(replace(phase, height=8, width=8) for phase in recipe.phases)
        return replace(recipe, phases=phases, **changes)

    static = bench.STATIC_RECIPES["text-to-3d"]
    toys = bench.STATIC_RECIPES["toy"], bench.MOTION_RECIPES["toy"]
    motion = shrunk(bench.MOTION_RECIPES["zeroscope-144x80"], deformation=toys[1].deformation, n_frames=8)
    stages = {
        "static": {"text-to-3d": shrunk(static, scene=toys[0].scene)},
        "motion": {"zeroscope-144x80": replace(motion, name="toy-zeroscope")},
    }
    monkeypatch.setattr(bench, "_STAGES", stages)
    monkeypatch.setattr(bench, "REPEATS", 1)


def test_every_phase_of_the_published_recipes_is_measured_in_every_way(small, tmp_path, capsys):
    words = ["--models", "full", "--recipes", "static:text-to-3d", "motion:zeroscope-144x80"]
    code, found = measured(tmp_path, *words, "--variants", "plain", "tiny", "tiny-decoder")
    assert code == 0
    rows = [(row["recipe"], row["variant"], row["images"]) for row in found]
    static, motion = "static:text-to-3d", "motion:zeroscope-144x80"
    assert rows == [
        (static, "plain", "8 of 8x8"),
        (static, "plain", "4 of 8x8"),
        (static, "tiny", "8 of 8x8"),
        (static, "tiny", "4 of 8x8"),
        (static, "tiny-decoder", "8 of 8x8"),
        (static, "tiny-decoder", "4 of 8x8"),
        (motion, "plain", "8 of 8x8"),
        (motion, "tiny", "8 of 8x8"),
        (motion, "tiny-decoder", "8 of 8x8"),
    ]
    for row in found:
        assert 0 < row["guidance_seconds"] and 0 < row["seconds_per_step"] and row["error"] is None
        assert row["gradient_cosine"] is None, "random weights say nothing about it"
        assert all("random weights" in model for model in row["models"].values())
    assert "guidance" in capsys.readouterr().out


def test_models_are_measured_by_name_with_where_the_time_goes(small, tmp_path, capsys, monkeypatch):
    toys = bench.MOTION_RECIPES["toy"]
    video = replace(
        bench.MOTION_RECIPES["model-video"],
        deformation=toys.deformation,
        phases=(replace(toys.phases[0], height=8, width=8),),
    )
    monkeypatch.setitem(bench._STAGES["motion"], "model-video", replace(video, name="toy-video"))
    wan = replace(
        architectures.WAN_13B,
        unet={"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1, "text_dim": 16},
        image_size=(32, 32),
        token_width=16,
        n_tokens=3,
        n_frames=5,
    )
    build = architectures.random_network

    def shrunk(name, config, *given):
        return build(name, {"base_dim": 8} if name == "AutoencoderKLWan" else config, *given)

    monkeypatch.setattr(architectures, "random_network", shrunk)
    monkeypatch.setitem(bench.BY_FLAG, "wan-1.3b", wan)
    code, [found] = measured(tmp_path, "--models", "wan-1.3b", "--variants", "fast")
    assert code == 0 and found["recipe"] == "wan-1.3b" and found["images"] == "5 of 8x8"
    assert found["models"] == {"video": "Wan 2.1 1.3B, random weights"}
    parts = found["parts"]
    assert list(parts) == ["encode", "denoise", "rest"], "no colours are compared, so nothing is decoded"
    assert all(seconds > 0 for name, seconds in parts.items() if name != "rest")
    assert f"encode {parts['encode']:.3f}, denoise {parts['denoise']:.3f}" in capsys.readouterr().out
    assert "has no tiny autoencoder here" in fails(capsys, "--models", "wan-1.3b", "--variants", "tiny", *ONE_STEP)


def test_a_recipe_that_fails_is_noted_and_the_others_go_on(small, tmp_path, capsys, monkeypatch):
    build = bench.random_guidance

    def broken(architecture, *given):
        guidance = build(architecture, *given)
        if architecture.kind != "image":
            return guidance

        def conditions(cameras):
            raise RuntimeError("the model is broken")

        return replace(guidance, conditions=conditions)

    monkeypatch.setattr(bench, "random_guidance", broken)
    words = ["--models", "full", "--recipes", "static:text-to-3d", "motion:zeroscope-144x80", "--variants", "plain"]
    code, found = measured(tmp_path, *words)
    assert code == 1
    assert [row["error"] for row in found] == ["RuntimeError: the model is broken", None]
    assert "failed: RuntimeError: the model is broken" in capsys.readouterr().out


def own_model(folder):
    """A folder of a small text-to-image model on latents, its tiny autoencoder beside it."""
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

    toy = toy_folder("image")
    for part in ("tokenizer", "text_encoder", "scheduler"):
        shutil.copytree(toy / part, folder / "image" / part)
    width = json.loads((toy / "unet" / "config.json").read_text())["cross_attention_dim"]
    unet = {"sample_size": 4, "block_out_channels": CHANNELS, "attention_head_dim": 8, "cross_attention_dim": width}
    UNet2DConditionModel(**unet).save_pretrained(folder / "image" / "unet")
    AutoencoderKL(**SMALL_VAE).save_pretrained(folder / "image" / "vae")
    tiny = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
    AutoencoderTiny(**tiny).save_pretrained(folder / "tiny")
    index = json.loads((toy / "model_index.json").read_text())
    index["dream4d"] = {"kind": "image", "image_size": [32, 32]}
    (folder / "image" / "model_index.json").write_text(json.dumps(index))
    return folder / "image", folder / "tiny"


def test_the_tiny_autoencoder_is_compared_with_the_full_one(tmp_path, monkeypatch, capsys):
    image, tiny = own_model(tmp_path)
    terms = bench.STATIC_RECIPES["text-to-3d"].guidance[1:]
    recipe = replace(bench.STATIC_RECIPES["toy"], name="toy-image-only", guidance=terms)
    monkeypatch.setattr(bench, "_STAGES", {"static": {"own": recipe}})
    words = ["--recipes", "static:own", "--image-prior", str(image), "--variants", "fast", "tiny"]
    code, found = measured(tmp_path, *words, "--tiny-vae", str(tiny))
    assert code == 0
    assert found[0]["gradient_cosine"] is None and -1 <= found[1]["gradient_cosine"] < 0.99, "they are strangers"
    assert "gradient's cosine" in capsys.readouterr().out
    options = bench.Bench(image_prior=str(image))
    full, _ = bench._guidance(bench._Subject("", recipe), bench.Variant("plain", "plain", None), options, CPU)
    job = bench._Job(recipe, bench.Variant("tiny", "tiny", None), full, options, CPU)
    assert bench._gradient_cosine(job, recipe) == pytest.approx(1.0, abs=1e-6), "with itself"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--variants", "quick"], "unknown variant 'quick'"),
        (["--variants", "fast@10GiB", "--device", "cpu"], "memory budget, which is for GPUs"),
        (["--variants", "tiny", "--device", "cpu"], "needs --tiny-vae FOLDER"),
        (["--variants", "tiny-decoder", "--device", "cpu"], "needs --tiny-decoder FOLDER"),
        (["--variants", "fast@"], "unknown variant 'fast@'"),
        (["--recipes", "films:toy"], "unknown recipe 'films:toy'"),
        (["--models", "wan-14b"], "unknown model 'wan-14b'"),
        (["--models", "toy", "full"], "one of these three"),
        (["--models", "full", "sdxl"], "one of these three"),
        (["--models", "sdxl", "--recipes", "static:toy"], "leave --recipes away"),
    ],
)
def test_what_cannot_be_measured_is_named(words, said, capsys):
    assert said in fails(capsys, *words)


def test_a_profile_says_what_takes_longest(tmp_path, capsys):
    code, [found] = measured(tmp_path, "--recipes", "static:toy", "--profile")
    assert code == 0 and "ms of work in" in capsys.readouterr().out
    profile = found["profile"]
    seconds = [work["seconds"] for work in profile["work"]]
    assert seconds == sorted(seconds, reverse=True) and sum(seconds) == pytest.approx(profile["seconds"])
    assert any("convolution" in work["name"] for work in profile["work"]) and profile["idle"] == 0


def test_a_profile_is_of_steps_alone(tmp_path, monkeypatch):
    """Not of what ends a run, of which there is one."""
    refresh = Scene.refresh_occupancy

    def marked(scene):
        torch.cummax(torch.zeros(9), 0)  # which nothing else asks for
        refresh(scene)

    monkeypatch.setattr(Scene, "refresh_occupancy", marked)
    _, [found] = measured(tmp_path, "--recipes", "static:toy", "--profile")
    assert not any("cummax" in work["name"] for work in found["profile"]["work"])


def test_a_motion_that_few_steps_leave_small_is_measured_as_it_is(caplog):
    assert main(["bench", "--recipes", "motion:toy", "--steps", "1", "--warmup", "0", "--device", "cpu"]) == 0
    assert "least-motion" not in caplog.text, "no flag of the bench"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--variants", "fast", "tiny"], "needs --tiny-vae FOLDER"),
        (["--recipes", "static:toy", "motion:toy", "--video-prior", "nowhere"], "no model folder or file nowhere"),
    ],
)
def test_what_a_later_one_lacks_is_missed_before_the_first_is_measured(tmp_path, capsys, words, said):
    out = tmp_path / "bench.json"
    assert main(["bench", "--recipes", "static:toy", *ONE_STEP, "--out", str(out), *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out and not out.exists()


def test_what_was_measured_is_shown_where_a_later_way_cannot_be(tmp_path, capsys, monkeypatch):
    load, out = bench.load_guidance, tmp_path / "bench.json"

    def load_still(recipe, *given):
        if recipe.stage == "motion":
            raise PriorError("a file that was damaged meanwhile")
        return load(recipe, *given)

    monkeypatch.setattr(bench, "load_guidance", load_still)
    assert main(["bench", *ONE_STEP, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert "damaged meanwhile" in captured.err and "static:toy                fast" in captured.out
    assert len(json.loads(out.read_text())["recipes"]) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that ends processes instead")
def test_a_model_that_main_memory_does_not_hold_is_noted(small, tmp_path, capsys, monkeypatch):
    build = bench.random_guidance

    def large(architecture, *given):
        if architecture.kind == "video":
            torch.empty(2**44)
        return build(architecture, *given)

    monkeypatch.setattr(bench, "random_guidance", large)
    words = ["--models", "full", "--recipes", "motion:zeroscope-144x80", "static:text-to-3d", "--variants", "plain"]
    code, found = measured(tmp_path, *words)
    assert code == 1 and [row["error"] is None for row in found] == [False, True, True]
    assert "needs more main memory than is free: measure it on a GPU" in found[0]["error"]


def test_a_full_card_is_not_called_full_main_memory(small, tmp_path, monkeypatch):
    def full(*given, **known):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(bench, "random_guidance", full)
    code, [found] = measured(tmp_path, "--models", "full", "--recipes", "motion:zeroscope-144x80")
    assert code == 1 and found["error"] == "the weights don't fit: CUDA error: out of memory"
    monkeypatch.undo()
    monkeypatch.setattr(bench, "train_static", full)
    code, [found] = measured(tmp_path, "--recipes", "static:toy")
    assert code == 1 and found["error"] == "RuntimeError: CUDA error: out of memory"


@pytest.mark.parametrize(
    ("spans", "uncovered"),
    [
        ([], {}),
        ([(3, 5, "a")], {}),
        ([(7, 9, "c"), (0, 2, "a"), (1, 4, "b")], {("b", "c"): (3, 1)}),
        ([(0, 10, "a"), (2, 3, "b"), (4, 5, "c"), (11, 12, "d")], {("a", "d"): (1, 1)}),
        ([(0, 1, "a"), (2, 3, "b"), (3, 4, "a"), (6, 7, "b")], {("a", "b"): (3, 2)}),
    ],
)
def test_gaps_are_what_no_span_covers(spans, uncovered):
    assert gaps(spans) == uncovered


def test_a_profile_tells_what_was_idle_between():
    profile = Profile(0.2, 3, (Work("a", 0.2, 3),), {}, 0.004, (Idle("a", "b", 0.003, 2), Idle("b", "a", 0.001, 1)))
    assert "    3.000 ms  x2      idle between a and b" in profile.lines(4) and "b and a" not in str(profile.lines(4))
    assert profile.lines(8)[0] == "200.00 ms of work in 3 calls, 4.00 ms idle" and "b and a" in profile.lines(8)[-1]


def test_what_was_measured_is_shown_where_it_cannot_be_saved(tmp_path, capsys, monkeypatch):
    def full(path, _data):
        raise bench.WriteError(f"{path} can't be written: the disk is full")

    monkeypatch.setattr(bench, "write_atomically", full)
    code = main(["bench", "--recipes", "static:toy", *ONE_STEP, "--out", str(tmp_path / "found.json")])
    captured = capsys.readouterr()
    assert code == 2 and "found.json can't be written" in captured.err and "seconds a step" in captured.out
