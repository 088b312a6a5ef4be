"""LoRA files in every format, against the sum that they stand for."""

from __future__ import annotations

import json

import ldm_layout as layout
import pytest
import torch
from ldm_layout import WIDTH, small_checkpoint
from lora_cases import ATTENTION, LAYERS, RANK, TEXT_LAYER, old_processors, pairs
from safetensors.torch import save_file

from dream4d_engine.guidance.denoiser import Conditions
from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.formats.identify import identify
from dream4d_engine.priors.formats.lora_files import read_lora
from dream4d_engine.priors.loading import apply_lora, load_prior


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "sd21.pt"
    torch.save(layout.random_state(small_checkpoint("sd21")), path)
    return path


@pytest.fixture()
def prior(checkpoint):
    return load_prior(checkpoint)


def diffusers_layers():
    state = {}
    for name, (down, up) in pairs().items():
        kind = "text_encoder." if name == TEXT_LAYER else "unet."
        lora = "lora_linear_layer" if name == TEXT_LAYER else "lora"
        state |= {f"{kind}{name}.{lora}.down.weight": down, f"{kind}{name}.{lora}.up.weight": up}
    return state


def peft(prefix="", middle=""):
    state = {}
    for name, (down, up) in pairs().items():
        root = ("text_encoder." if name == TEXT_LAYER else "unet.") + prefix
        state |= {f"{root}{name}.lora_A{middle}.weight": down, f"{root}{name}.lora_B{middle}.weight": up}
    return state


def kohya(alpha=None):
    state = {}
    for name, (down, up) in pairs().items():
        root = ("lora_te_" if name == TEXT_LAYER else "lora_unet_") + name.replace(".", "_")
        state |= {f"{root}.lora_down.weight": down, f"{root}.lora_up.weight": up}
        state |= {} if alpha is None else {f"{root}.alpha": torch.tensor(alpha)}
    return state


FORMATS = {
    "old.safetensors": (old_processors(), 1.0),
    "old.bin": (old_processors(), 1.0),
    "oldest.bin": (old_processors(""), 1.0),
    "diffusers.safetensors": (diffusers_layers(), 1.0),
    "peft.safetensors": (peft(), 1.0),
    "peft.bin": (peft("base_model.model.", ".default"), 1.0),
    "kohya.safetensors": (kohya(), 1.0),
    "kohya_alpha.safetensors": (kohya(1.5), 1.5 / RANK),
}


def save(path, state, metadata=None):
    save_file(state, path, metadata) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def weights(prior) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in prior.denoiser.unet.state_dict().items()}


@pytest.mark.parametrize("file", FORMATS)
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_every_format_adds_its_sum(prior, tmp_path, file, strength):
    state, scale = FORMATS[file]
    path = save(tmp_path / file, state)
    assert identify(path).layout == "LoRA" and identify(path).kind is None
    before, text_before = weights(prior), prior.encode_text(["a cat"])
    changed = apply_lora(prior, path, strength)
    after = weights(changed)
    for name, (down, up) in pairs(text=False).items():
        expected = before[f"{name}.weight"] + strength * scale * up @ down
        torch.testing.assert_close(after[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)
    touched = {name for name in before if not torch.equal(before[name], after[name])}
    assert touched == {f"{name}.weight" for name in LAYERS}
    has_text = any("te_" in key or "text_encoder" in key for key in state)
    assert torch.equal(changed.encode_text(["a cat"]), text_before) != has_text


def test_text_encoder_gets_the_sum_too(prior, tmp_path):
    path = save(tmp_path / "l.safetensors", peft())
    changed = apply_lora(prior, path, 0.5)
    _, encoder = prior.loader.text_encoder(torch.float32, "cpu")
    layer = next(m for name, m in encoder.named_modules() if name.endswith("encoder.layers.1.self_attn.q_proj"))
    down, up = pairs()[TEXT_LAYER]
    layer.weight.data = layer.weight + 0.5 * up @ down
    from dream4d_engine.priors.networks.text import encode_prompts

    expected = encode_prompts(prior.loader.text_encoder(torch.float32, "cpu")[0], encoder, ["a cat"])
    torch.testing.assert_close(changed.encode_text(["a cat"]), expected)


def test_strengths_add_up_and_take_away(prior, tmp_path):
    path = save(tmp_path / "l.safetensors", old_processors())
    before = weights(prior)
    x, conditions = torch.randn(1, 1, 4, 8, 8), Conditions(torch.randn(1, 1, 77, WIDTH))
    plain = prior.denoiser.denoise(x, torch.ones(1), conditions)
    assert not torch.allclose(apply_lora(prior, path).denoiser.denoise(x, torch.ones(1), conditions), plain, atol=1e-4)
    apply_lora(apply_lora(prior, path, 0.5), path, -1.5)
    for name, value in weights(prior).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-5)


def test_alpha_of_peft_is_in_the_header(prior, tmp_path):
    header = {"unet.r": RANK, "unet.lora_alpha": 6, "unet.alpha_pattern": {LAYERS[0]: 9}}
    path = save(tmp_path / "l.safetensors", peft(), {"lora_adapter_metadata": json.dumps(header)})
    layers = read_lora(path)["unet"]
    assert layers[LAYERS[0]].scale == 3 and layers[LAYERS[1]].scale == 2
    assert read_lora(path)["text_encoder"][TEXT_LAYER].scale == 1


def test_convolutions_too(prior, tmp_path):
    down, up = torch.randn(2, 32, 3, 3), torch.randn(32, 2, 1, 1)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    path = save(tmp_path / "l.safetensors", {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})
    before = weights(prior)["down_blocks.0.resnets.0.conv1.weight"]
    after = weights(apply_lora(prior, path))["down_blocks.0.resnets.0.conv1.weight"]
    expected = before + torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


def test_a_folder_as_training_writes_it(prior, tmp_path):
    save(tmp_path / "pytorch_lora_weights.safetensors", old_processors())
    assert identify(tmp_path).layout == "LoRA"
    apply_lora(prior, tmp_path)
    with pytest.raises(PriorError, match=r"pytorch_lora_weights\.safetensors is missing"):
        apply_lora(prior, tmp_path.parent)


def test_what_does_not_fit_is_named_and_nothing_changes(prior, checkpoint, tmp_path):
    state = old_processors() | {
        "unet.mid_block.attentions.9.processor.to_q_lora.down.weight": torch.zeros(2, 4),
        "unet.mid_block.attentions.9.processor.to_q_lora.up.weight": torch.zeros(4, 2),
    }
    before = weights(prior)
    with pytest.raises(PriorError, match="mid_block.attentions.9.to_q is not in it.*of 5 layers.*another model"):
        apply_lora(prior, save(tmp_path / "a.safetensors", state))
    key = f"unet.{ATTENTION}.processor.to_k_lora.down.weight"
    with pytest.raises(PriorError, match=r"attn2.to_k is 768 -> 64 there and 64 -> 64 here"):
        apply_lora(prior, save(tmp_path / "b.safetensors", old_processors() | {key: torch.zeros(RANK, 768)}))
    assert all(torch.equal(value, before[name]) for name, value in weights(prior).items())
    wide = {
        "text_encoder.text_model.encoder.layers.7.mlp.fc1.lora_A.weight": torch.zeros(2, WIDTH),
        "text_encoder.text_model.encoder.layers.7.mlp.fc1.lora_B.weight": torch.zeros(WIDTH, 2),
    }
    before = weights(prior)
    with pytest.raises(PriorError, match="does not fit the text encoder: .*layers.7.mlp.fc1 is not in it"):
        apply_lora(prior, save(tmp_path / "c.safetensors", old_processors() | wide))
    assert all(torch.equal(value, before[name]) for name, value in weights(prior).items())


def test_bad_loras(prior, checkpoint, tmp_path):
    with pytest.raises(PriorError, match="there is no file"):
        apply_lora(prior, tmp_path / "nowhere.safetensors")
    with pytest.raises(PriorError, match="is no LoRA that can be used: it holds model.diffusion_model"):
        apply_lora(prior, checkpoint)
    some = dict(list(old_processors().items())[:3])
    with pytest.raises(PriorError, match="is not complete: .*to_k has no up matrix"):
        apply_lora(prior, save(tmp_path / "half.safetensors", some))
    dora = old_processors() | {f"unet.{ATTENTION}.to_q.lora_magnitude_vector": torch.ones(WIDTH)}
    with pytest.raises(PriorError, match="is a DoRA .*lora_magnitude_vector"):
        apply_lora(prior, save(tmp_path / "dora.safetensors", dora))
    path = save(tmp_path / "l.safetensors", old_processors())
    for strength in (float("nan"), 11.0):
        with pytest.raises(PriorError, match=r"must lie in \[-10, 10\]"):
            apply_lora(prior, path, strength)


def test_half_precision_keeps_its_type(checkpoint, tmp_path):
    prior = load_prior(checkpoint, dtype=torch.float16)
    before = weights(prior)[f"{LAYERS[0]}.weight"].float()
    after = weights(apply_lora(prior, save(tmp_path / "l.safetensors", old_processors()), 0.3))[f"{LAYERS[0]}.weight"]
    down, up = pairs()[LAYERS[0]]
    assert after.dtype == torch.float16
    torch.testing.assert_close(after.float(), before + 0.3 * up @ down, rtol=1e-3, atol=1e-3)


def test_the_file_that_a_model_came_from_is_left_alone(prior, tmp_path):
    """Tensors may be mapped from the disk: what is loaded again is without the LoRA."""
    before = weights(prior)
    apply_lora(prior, save(tmp_path / "l.safetensors", old_processors()))
    again = prior.loader.unet(torch.float32, "cpu").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in before.items())
