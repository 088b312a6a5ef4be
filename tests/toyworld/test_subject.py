"""The personal subject, how its likeness is measured, its LoRA, and how steadiness is measured."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dream4d_engine.cameras import fixed_take, orbit
from dream4d_engine.priors.conditioning import check_prompt, text_conditions, words_for
from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.files import toy_folder, toy_prior, toy_subject
from dream4d_engine.priors.formats.identify import open_loader
from dream4d_engine.priors.formats.lora_files import read_lora
from dream4d_engine.priors.loading import apply_lora, load_prior
from dream4d_engine.toyworld import measure, train_latent
from dream4d_engine.toyworld.datasets import render_bank
from dream4d_engine.toyworld.evaluate import Images, align, frame_error, frames_of, true_renderer
from dream4d_engine.toyworld.measure import PARTS, all_cases, measure_path, measure_subject, photograph, table
from dream4d_engine.toyworld.models import SUBJECT_WORD
from dream4d_engine.toyworld.samples import sample
from dream4d_engine.toyworld.subject import (
    BODY_COLOR,
    HEAD_COLOR,
    SUBJECT_PROMPT,
    likeness,
    photo_prompts,
    photos,
    render_subject,
)
from dream4d_engine.toyworld.train_lora import LoraTraining, add_lora, train_lora
from dream4d_engine.training.config import TOY_IMAGE
from dream4d_engine.training.reference import prepare_reference


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def subject_renderer(cameras):
    image = render_subject(cameras, background=(0.0, 0.0, 0.0))
    return Images(image.rgb, image.mask)


# ---- the subject -------------------------------------------------------------------------------------------------


def test_the_subject_is_all_like_itself_and_nothing_a_caption_says_is():
    found = likeness(subject_renderer)
    assert (found.right, found.iou) == (8, 1.0)
    assert found.body == (BODY_COLOR,) * 8 and found.head == (HEAD_COLOR,) * 8
    for color in (BODY_COLOR, HEAD_COLOR, "white"):
        other = likeness(true_renderer(f"a {color} snowman"))
        assert other.right == 0 and other.iou > 0.99
        assert set(other.body + other.head) == {color}


def test_a_subject_upside_down_or_empty_is_not_like_it():
    def swapped(cameras):
        images = subject_renderer(cameras)
        return Images(images.rgb.flip(2), images.opacity.flip(2))

    assert likeness(swapped).right == 0
    empty = likeness(lambda cameras: Images(*(torch.zeros(1, 8, 64, 64, n) for n in (3, 1))))
    assert empty.right == 0 and set(empty.body) == {"none"} and empty.iou == 0


def test_parts_are_found_where_the_result_stands():
    """Smaller by a fifth and 5 pixels off, the parts are still told apart."""

    def moved(cameras):
        images = subject_renderer(replace(cameras, fov_y=2 * torch.atan(1.2 * torch.tan(cameras.fov_y / 2))))
        return Images(*(torch.roll(p, (5, -3), (2, 3)) for p in (images.rgb, images.opacity)))

    assert likeness(moved).right == 8


def test_aligning_brings_an_image_over_the_truth():
    color, opacity = frames_of(subject_renderer, orbit(3, 48, 48))
    shifted = torch.roll(color, (4, -6), (1, 2)), torch.roll(opacity, (4, -6), (1, 2))
    again, covered, iou = align(*shifted, opacity)
    assert torch.equal(covered, opacity) and torch.equal(again, color)
    assert iou.tolist() == [1, 1, 1]


def test_four_images_show_it_cut_out_and_say_from_where():
    images = photos(32)
    assert images.shape == (4, 4, 32, 32)
    assert (images[:, :3] <= images[:, 3:] + 1e-6).all(), "multiplied by the alpha"
    assert 0.1 < images[:, 3].mean() < 0.3
    prompts = photo_prompts()
    assert prompts[0] == "a sks snowman, front view" and prompts[2] == "a sks snowman, back view"
    assert all(SUBJECT_WORD in prompt.split() for prompt in prompts)


# ---- its word ----------------------------------------------------------------------------------------------------


def test_only_the_image_prior_is_told_the_subjects_word():
    assert words_for("image", SUBJECT_PROMPT) == SUBJECT_PROMPT
    assert {words_for(kind, SUBJECT_PROMPT) for kind in ("multiview", "pixel", "video")} == {"a snowman"}
    for kind in ("image", "multiview", "video"):
        toy_prior(kind).check_prompt(SUBJECT_PROMPT)
    with pytest.raises(PriorError, match="does not know 'sks'"):
        check_prompt("toy", open_loader(toy_folder("multiview")).metadata("multiview").known_words, SUBJECT_PROMPT)


def test_the_word_is_read_as_letters_that_no_caption_holds():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy_folder("image") / "tokenizer", local_files_only=True)
    assert tokenizer.tokenize("a sks snowman") == ["a</w>", "s", "k", "s</w>", "snowman</w>"]


# ---- its LoRA ----------------------------------------------------------------------------------------------------


def test_additions_change_nothing_at_first_and_are_all_that_learns():
    prior = load_prior(toy_folder("image"), "image")
    unet, conditions = prior.denoiser.unet, text_conditions(prior, "a red cube")(orbit(1, 32, 32))[0]
    x, sigma = torch.randn(1, 1, 3, 32, 32, generator=seeded()), torch.tensor([0.7])
    before = prior.denoiser.denoise(x, sigma, conditions)
    added = add_lora(unet, 2, seeded())
    assert len(added) == 7 * 2 * 4 and all(isinstance(layer.base, nn.Linear) for layer in added.values())
    assert torch.equal(prior.denoiser.denoise(x, sigma, conditions), before)
    trained = {name.rpartition(".")[2] for name, p in unet.named_parameters() if p.requires_grad}
    assert trained == {"down", "up"}


def test_training_writes_pairs_that_the_loader_takes(tmp_path):
    from safetensors.torch import save_file

    lines = []
    tensors = train_lora(LoraTraining(rank=2, steps=2, batch=4), lines.append)
    assert len(tensors) == 2 * 56 and all(t.dtype == torch.float16 for t in tensors.values())
    assert any(t.abs().max() > 0 for name, t in tensors.items() if ".up." in name)
    save_file(tensors, str(tmp_path / "lora.safetensors"))
    layers = read_lora(tmp_path / "lora.safetensors")["unet"]
    assert len(layers) == 56
    prior = load_prior(toy_folder("image"), "image")
    name, layer = next((n, lay) for n, lay in layers.items() if lay.up.abs().max() > 0)
    before = prior.denoiser.unet.get_submodule(name).weight.clone()
    apply_lora(prior, tmp_path / "lora.safetensors")
    change = prior.denoiser.unet.get_submodule(name).weight - before
    assert torch.allclose(change, layer.up.float() @ layer.down.float(), atol=1e-6)


def test_the_shipped_lora_is_small_and_makes_the_subject():
    files = list(toy_subject().glob("*.safetensors"))
    assert [f.name for f in files] == ["pytorch_lora_weights.safetensors"] and files[0].stat().st_size <= 1e6
    cameras = orbit(8, 32, 32)  # two of them were in training

    def drawn(with_lora):
        prior = load_prior(toy_folder("image"), "image")
        if with_lora:
            prior = apply_lora(prior, toy_subject())
        images = sample(prior.denoiser, text_conditions(prior, SUBJECT_PROMPT)(cameras), seeded(3), 6, scale=1.0)
        truth = render_subject(cameras, background=(0.0, 0.0, 0.0))
        return likeness(lambda _: Images(images.movedim(2, -1), truth.mask), 32, 8)

    assert drawn(True).right >= 6
    assert drawn(False).right == 0


# ---- steadiness --------------------------------------------------------------------------------------------------


def test_the_truth_is_steady_and_trembling_is_not():
    caption = "a red cube is jumping"
    truth = true_renderer(caption)
    assert frame_error(truth, caption, 32, 8) == 0

    def trembling(cameras):
        images = truth(cameras)
        odd = torch.arange(cameras.shape[1]) % 2 == 1
        return Images(*(torch.where(odd[:, None, None, None], torch.roll(p, 2, 3), p) for p in vars(images).values()))

    def shifted(cameras):
        return Images(*(torch.roll(p, 2, 3) for p in vars(truth(cameras)).values()))

    still = true_renderer("a red cube is still")
    assert frame_error(trembling, caption, 32, 8) > 1.5 * frame_error(shifted, caption, 32, 8)
    aside = Images(*(torch.roll(p, 2, 3) for p in vars(still(fixed_take(8, 32, 32))).values()))
    assert frame_error(lambda cameras: aside, "a red cube", 32, 8) == 0, "what stands still is steady, wherever"
    assert frame_error(still, caption, 32, 8) > 0.05
    assert frame_error(lambda c: Images(*(torch.zeros(1, 8, 32, 32, n) for n in (3, 1))), "a red cube", 32, 8) == 0


# ---- the whole table ---------------------------------------------------------------------------------------------


def test_photographs_are_what_the_recipe_expects():
    found = prepare_reference(photograph("a green cone is stretching", 64), TOY_IMAGE.reference)
    assert "kept at" in found.statement and found.mask.shape == (64, 64, 1)


def test_the_table_has_every_case_and_a_case_can_be_run():
    cases = all_cases(list(PARTS), toy_subject(), "cpu", [0], 0.01)
    assert [sum(c.part == part for c in cases) for part in PARTS] == [6, 2, 22, 22, 22, 4, 12, 15]
    result = measure_subject(next(c for c in cases if c.part == "subject"))
    assert result[2].shape == (8, 64, 64, 3)
    lines = table([result])
    assert lines[0].startswith("| | right | body") and lines[2].startswith("| with LoRA | ")


def test_targets_of_four_steps_show_steadier_films(monkeypatch):
    monkeypatch.setattr(measure, "TARGET_TIMESTEPS", (700,))
    cases = [c for c in all_cases(["targets"], toy_subject(), "cpu", [0], 1.0) if c.caption == "a red cube is jumping"]
    (_, one, film), (_, four, _) = [measure.measure_target(case) for case in cases]
    assert film.shape == (8, 32, 32, 3)
    for start in ("still, 700", "moving, 700"):
        assert 0 < four[start] < 0.85 * one[start]


def test_a_film_can_be_distilled_from_the_video_prior_alone():
    case = next(c for c in all_cases(["films"], toy_subject(), "cpu", [0], 0.1) if "cone is stretching, 1" in c.name)
    _, measures, film = measure.measure_film(case)
    assert film.shape == (8, 32, 32, 3) and 0 <= film.min() and film.max() <= 1
    assert 0 < measures["frame_error"] < 0.75 * measures["at rest"], "it moves as it should"


def test_runs_of_several_seeds_are_one_line_with_their_spread():
    cases = [c for c in all_cases(["paths"], toy_subject(), "cpu", [0, 1], 0.008) if c.name.endswith("jumping, fast")]
    results = [measure_path(case) for case in cases]
    lines = table(results)
    assert len(lines) == 3 and lines[2].startswith("| a red cube is jumping, fast | ")
    ious = [measures["iou"] for _, measures, _ in results]
    assert f"{sum(ious) / 2:.3f} ± {abs(ious[0] - ious[1]) / 2**0.5:.3f}" in lines[2]


# ---- a prior on latents ------------------------------------------------------------------------------------------


def test_a_latent_prior_and_its_two_autoencoders_can_be_trained_and_compared(tmp_path):
    options = ["--autoencoder-steps", "12", "--steps", "1", "--batch", "2", "--bank", "8", "--device", "cpu"]
    train_latent.main(["--out", str(tmp_path), *options])
    prior = load_prior(tmp_path / "video", "video")
    assert prior.denoiser.image_size == (32, 32) and prior.denoiser.unet.config.in_channels == 4
    image = torch.full((1, 8, 3, 32, 32), 0.5)
    latents = prior.denoiser.encode(image)
    assert latents.shape == (1, 8, 4, 16, 16) and prior.denoiser.decode(latents).shape == image.shape
    cases = all_cases(["autoencoders"], toy_subject(), "cpu", [0], 0.008, tmp_path)
    # untrained, a tiny one encodes another way; its decoder alone hardly turns the gradient, which comes from encoding
    for way, low, high in (("tiny", -1, 0.999), ("tiny decoder", 0.9, 1 - 1e-7)):
        case = next(c for c in cases if c.name == f"a red cube is jumping, {way}")
        _, found, images = measure.measure_autoencoder(case)
        assert low < found["gradient_cosine"] < high and images.shape == (8, 64, 64, 3)


def test_the_latent_part_asks_for_its_folder(capsys):
    with pytest.raises(SystemExit):
        measure.main(["--out", "nowhere", "--only", "autoencoders"])
    assert "needs --latent" in capsys.readouterr().err


def test_the_full_autoencoder_learns_to_show_images():
    bank = render_bank("video", 8, seeded(), "cpu")
    vae = train_latent.train_autoencoder(bank, 60, 8, print)
    images = train_latent.draw_images(bank, 16, seeded(3))
    latents = vae.encode(images).latent_dist.mode()
    missed = (vae.decode(latents).sample - images).abs().mean()
    assert missed < 0.6 * (images - images.mean()).abs().mean()
    assert 0.7 < float((vae.config.scaling_factor * latents).std()) < 1.4
