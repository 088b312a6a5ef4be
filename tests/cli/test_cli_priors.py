"""The commands about models, and runs with models that are not folders."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import ldm_layout as layout
import pytest
import torch
from ldm_layout import small_checkpoint
from lora_cases import old_processors
from places import GUIDANCE
from safetensors.torch import save_file

from dream4d_engine.cli import main
from dream4d_engine.priors.files import toy_folder
from dream4d_engine.priors.formats import weights
from dream4d_engine.priors.formats.weights import WEIGHTS

TINY = GUIDANCE / "mvdream_tiny.pt"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Small checkpoints of MVDream's and Stable Diffusion's layouts, a LoRA and a tiny autoencoder."""
    from diffusers import AutoencoderTiny

    folder = tmp_path_factory.mktemp("models")
    for name in ("mvdream", "sd21"):
        torch.save(layout.random_state(small_checkpoint(name)), folder / f"{name}.pt")
    save_file(old_processors(), folder / "lora.safetensors")
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    with torch.random.fork_rng():
        tiny = AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    tiny.save_pretrained(folder / "tiny")
    return folder


@pytest.fixture(autouse=True)
def no_leftovers(monkeypatch):
    """The command line sets the environment for its process."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    levels = {name: logging.getLogger(name).level for name in ("transformers", "diffusers")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def run(capsys, *words) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refuse(capsys, words: str, *command) -> None:
    code, _, errors = run(capsys, *command)
    assert code == 2 and errors.startswith("dream4d: error: ") and errors.count("\n") == 1, errors
    assert words in errors, errors


def test_priors_lists_the_table(capsys):
    code, text, _ = run(capsys, "priors")
    assert code == 0
    for w in WEIGHTS:
        assert all(word in text for word in (w.id, w.name, w.license, w.gate, w.checked, *w.repositories))
    code, text, _ = run(capsys, "priors", "--json")
    table = json.loads(text)
    assert code == 0 and [row["id"] for row in table] == [w.id for w in WEIGHTS]
    assert {"download", "memory", "license", "gate", "mirrors", "gone", "repositories"} <= table[0].keys()


def test_priors_lists_a_folder(capsys, models):
    code, text, _ = run(capsys, "priors", "--folder", models, "--json")
    found = {Path(row["path"]).name: (row["layout"], row["kind"]) for row in json.loads(text)}
    assert code == 0 and found == {
        "lora.safetensors": ("LoRA", None),
        "mvdream.pt": ("checkpoint", "multiview"),
        "sd21.pt": ("checkpoint", "image"),
        "tiny": ("tiny autoencoder", None),
    }
    assert "multiview   checkpoint" in run(capsys, "priors", "--folder", models)[1]
    assert "no models below" in run(capsys, "priors", "--folder", TINY.parent / "nowhere")[1]


def test_convert(capsys, tmp_path, models):
    out = tmp_path / "folder"
    code, text, _ = run(capsys, "convert", TINY, "--kind", "multiview", "--out", out)
    assert code == 0 and "a model of kind multiview (unet, vae, scheduler)" in text and "no encoder" in text
    assert json.loads((out / "model_index.json").read_text())["dream4d"]["n_frames"] == 4
    refuse(capsys, "exists: choose another --out, or --overwrite", "convert", TINY, "--out", out)
    code, text, _ = run(capsys, "convert", models / "sd21.pt", "--out", out, "--overwrite", "--half")
    assert code == 0 and "kind image (unet, vae, scheduler, text_encoder, tokenizer)" in text and "no enc" not in text
    refuse(capsys, "can't be used as 'image'", "convert", TINY, "--kind", "image", "--out", tmp_path / "b")
    refuse(capsys, "there is no file", "convert", tmp_path / "no.pt", "--out", tmp_path / "b")
    asked, lora, tiny = text_to_3d(tmp_path / "c", models), models / "lora.safetensors", models / "tiny"
    for flag in ("--tiny-vae", "--tiny-decoder"):
        refuse(capsys, f"{flag}: {lora} is no AutoencoderTiny", *asked, flag, lora)
        refuse(capsys, f"{flag}: {out / 'vae'} holds a AutoencoderKL", *asked, flag, out)
        refuse(capsys, f"{flag}: there is no model folder", *asked, flag, tmp_path / "nowhere")
    refuse(capsys, "leave --tiny-decoder away", *asked, "--tiny-vae", tiny, "--tiny-decoder", tiny)
    code, _, errors = run(capsys, *asked, "--tiny-decoder", tiny, "--dry-run")
    assert code == 0 and "the recipe 'toy-personalised' decodes nothing" in errors
    toys = ["text-to-3d", "a red cube", "--out", tmp_path / "c", "--dry-run"]
    code, _, errors = run(capsys, *toys, "--tiny-vae", tiny)
    assert code == 0 and "no model that the recipe 'toy' asks has an autoencoder, --tiny-vae" in errors
    assert not (tmp_path / "b").exists()


def text_to_3d(out, models) -> list:
    """A run of one step with MVDream and Stable Diffusion from checkpoints."""
    return [
        *("text-to-3d", "a sks cat", "--recipe", "toy-personalised", "--steps", "1", "--out", out),
        *("--multiview-prior", models / "mvdream.pt", "--image-prior", models / "sd21.pt", "--device", "cpu"),
        *("--size", "8", "--orbit-frames", "2", "--static.scene.n-samples", "8"),
        *("--static.phases.0.height", "8", "--static.phases.0.width", "8"),
    ]


def test_a_run_with_checkpoints_lora_and_tiny_autoencoder(capsys, tmp_path, models):
    from dream4d_engine.assets import load_scene

    plain, changed = tmp_path / "plain", tmp_path / "changed"
    extras = (
        "--image-lora",
        models / "lora.safetensors",
        "--image-lora-strength",
        "0.5",
        "--tiny-vae",
        models / "tiny",
    )
    assert run(capsys, *text_to_3d(plain, models))[0] == 0
    code, _, errors = run(capsys, *text_to_3d(changed, models), *extras)
    assert code == 0, errors
    settings = json.loads((changed / "run.json").read_text())["settings"]["options"]
    assert settings["lora"]["image_lora_strength"] == 0.5 and settings["priors"]["tiny_vae"].endswith("tiny")
    a, b = (load_scene(folder / "scene.safetensors")[0].state_dict() for folder in (plain, changed))
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_mistakes_are_answered_before_the_run(capsys, tmp_path, models):
    command = text_to_3d(tmp_path / "out", models)
    refuse(capsys, "there is no file", *command, "--image-lora", tmp_path / "no.safetensors")
    refuse(capsys, "is no LoRA that can be used", *command, "--image-lora", models / "sd21.pt")
    refuse(
        capsys, "of kind 'image' and can't be used as 'multiview'", *command, "--multiview-prior", models / "sd21.pt"
    )
    refuse(capsys, "is a LoRA", *command, "--image-prior", models / "lora.safetensors")
    refuse(capsys, "there is no model folder or file nowhere", *command, "--image-prior", "nowhere")
    refuse(capsys, "nothing is fetched unless you ask for it (--download", *command, "--image-prior", "sd21-base")
    recipe = ("text-to-3d", "a cat", "--recipe", "text-to-3d", "--out", tmp_path / "out")
    refuse(capsys, "give its folder, checkpoint or hub id with --multiview-prior MODEL", *recipe)
    assert not (tmp_path / "out").exists()


def test_download_goes_through_the_command_line(capsys, tmp_path, models, monkeypatch):
    """The switch reaches the search; what it says goes to the error output, so that programs can read the other."""

    def find(name, *, download, say, **_):
        assert download
        say(f"downloading {name}")
        return models / "sd21.pt"

    monkeypatch.setattr("dream4d_engine.cli.models.find_weights", find)
    command = text_to_3d(tmp_path / "out", models)
    for flag in ("--multiview-prior", "--image-prior"):
        command[command.index(flag) + 1] = "sd21-base"
    code, _, errors = run(capsys, *command, "--download")
    assert code == 2 and "downloading sd21-base" in errors and "can't be used as 'multiview'" in errors


def test_unfinished_downloads_are_not_taken_for_models(tmp_path):
    """A folder in the cache from which a file is missing counts as not downloaded."""
    place = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    shutil.copytree(toy_folder("image"), place)
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("0" * 40)
    assert weights.find_weights("a/b", cache=tmp_path) == place
    (place / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(weights.PriorError, match="has not been downloaded"):
        weights.find_weights("a/b", cache=tmp_path)
