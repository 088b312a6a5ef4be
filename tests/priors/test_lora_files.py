"""LoRA files as users bring them: their factor, their names, and what is refused before anything has changed."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import ldm_layout as layout
import pytest
import torch
from ldm_layout import WIDTH, small
from places import CASES
from safetensors.torch import load_file, save_file

from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.files import toy_folder, toy_subject
from dream4d_engine.priors.formats import ldm_keys
from dream4d_engine.priors.formats.identify import identify, identify_all, open_loader
from dream4d_engine.priors.formats.lora_files import lora_files, read_lora
from dream4d_engine.priors.loading import apply_lora, load_prior
from dream4d_engine.priors.lora import add_layers

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
LAYERS = [f"{ATTENTION}.{name}" for name in ("to_k", "to_out.0", "to_q", "to_v")]
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
RANK = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Stable Diffusion 2's layout, 32 and 64 channels and two resnets a level."""
    shapes = layout.checkpoint(
        layout.unet(small(context=WIDTH, n_resnets=2)), layout.vae(32, (1, 2), 1), layout.open_clip_text(WIDTH, 3)
    )
    path = tmp_path_factory.mktemp("cases") / "sd21.safetensors"
    save_file(layout.random_state(shapes), path)
    return path


@pytest.fixture()
def prior(checkpoint):
    return load_prior(checkpoint)


def weights(network) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(before, after) -> bool:
    return before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def pair(rank=RANK, inside=WIDTH, outside=WIDTH, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inside, generator=generator), torch.randn(outside, rank, generator=generator)


def peft(layers=LAYERS, prefix="base_model.model.", rank=RANK) -> dict[str, torch.Tensor]:
    halves = {}
    for seed, layer in enumerate(layers):
        down, up = pair(rank, seed=seed)
        halves |= {f"{prefix}{layer}.lora_A.weight": down, f"{prefix}{layer}.lora_B.weight": up}
    return halves


def kohya(layer="down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q", alpha=None, prefix="lora_unet_"):
    down, up = pair()
    found = {f"{prefix}{layer}.lora_down.weight": down, f"{prefix}{layer}.lora_up.weight": up}
    return found | ({} if alpha is None else {f"{prefix}{layer}.alpha": alpha})


def folder_of(place: Path, config: dict, state=None, name="adapter_model.safetensors") -> Path:
    """A folder as peft writes it."""
    place.mkdir(parents=True)
    save_file(peft() if state is None else state, place / name)
    (place / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return place


def file_of(path: Path, state, header=None) -> Path:
    save_file(state, path, None if header is None else {"lora_adapter_metadata": json.dumps(header)})
    return path


def scales(path: Path) -> dict[str, float]:
    return {name: layer.scale for name, layer in read_lora(path)["unet"].items()}


def refused(path: Path, words: str) -> None:
    with pytest.raises(PriorError, match=words) as raised:
        read_lora(path)
    said = str(raised.value)
    assert "\n" not in said and path.name.partition(".")[0] in said and "unexpected" not in said


# ---- The factor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "factor"),
    [("lora_rslora.safetensors", 4.0), ("peft_adapter", 6.75), ("peft_adapter/adapter_model.safetensors", 6.75)],
)
def test_the_given_files_add_their_sum(prior, case, factor):
    path = CASES / case
    assert identify(path).layout == "LoRA"
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    state, before = load_file(file), weights(prior.denoiser.unet)
    apply_lora(prior, path, 0.5)
    after = prior.denoiser.unet.state_dict()
    for layer in LAYERS:
        down, up = (next(t for k, t in state.items() if f"{layer}.lora_{half}." in k) for half in "AB")
        expected = before[f"{layer}.weight"] + 0.5 * factor * up @ down
        torch.testing.assert_close(after[f"{layer}.weight"], expected, rtol=1e-5, atol=1e-5)
    assert sum(not torch.equal(before[name], after[name]) for name in before) == len(LAYERS)


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"r": 4, "lora_alpha": 27}, (6.75, 6.75, 6.75, 6.75)),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, (4, 4, 4, 4)),
        ({"r": 4, "lora_alpha": 2.5, "use_rslora": None}, (0.625,) * 4),
        ({"r": 4}, (2, 2, 2, 2)),  # peft's own alpha is 8
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q": 12}}, (1, 1, 3, 1)),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"attn2.to_q": 12}}, (1, 1, 3, 1)),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {f"{ATTENTION}.to_q": 12}}, (1, 1, 3, 1)),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {rf"^{ATTENTION}.to_q": 12}}, (1, 1, 3, 1)),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {r"down_blocks\.\d+\..*\.to_(q|v)": 12}}, (1, 1, 3, 3)),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"q": 12, "o_q": 12, "attn2": 12}}, (1, 1, 1, 1)),  # whole words
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q": 12, "attn2.to_q": 8}}, (1, 1, 3, 1)),  # the first
        ({"r": 8, "lora_alpha": 4, "rank_pattern": {"attn2.to_.*": 4}}, (1, 1, 1, 1)),
        ({"r": 9, "lora_alpha": 4, "rank_pattern": {"0": 4, "attn2.to_[kqv]": 4}, "use_rslora": True}, (2, 2, 2, 2)),
    ],
)
@pytest.mark.parametrize("written", ["beside", "in the header", "in the header, without a prefix"])
def test_settings_of_peft_make_the_factor(tmp_path, settings, factors, written):
    expected = dict(zip(LAYERS, factors, strict=True))
    if written == "beside":
        path = folder_of(tmp_path / "mine", {"peft_type": "LORA", "bias": "none", **settings})
        assert scales(path / "adapter_model.safetensors") == pytest.approx(expected)
    else:
        prefix, names = ("unet.", "unet.") if written == "in the header" else ("", "")
        path = file_of(
            tmp_path / "mine.safetensors", peft(prefix=names), {f"{prefix}{k}": v for k, v in settings.items()}
        )
    assert scales(path) == pytest.approx(expected)


def test_ranks_that_differ_have_their_own_factor(tmp_path):
    state = peft(LAYERS[:2]) | peft(LAYERS[2:], rank=16)
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 16, "to_v": 16}}
    assert scales(folder_of(tmp_path / "a", config, state)) == pytest.approx(
        dict(zip(LAYERS, (2, 2, 0.5, 0.5), strict=True))
    )
    config |= {"use_rslora": True}
    assert scales(folder_of(tmp_path / "b", config, state)) == pytest.approx(
        dict(zip(LAYERS, (4, 4, 2, 2), strict=True))
    )
    assert set(scales(file_of(tmp_path / "c.safetensors", state)).values()) == {1.0}


def test_settings_are_of_their_file_alone(tmp_path):
    """A stray adapter_config.json in a collection does nothing to the other files; next to a single file it counts."""
    folder = folder_of(tmp_path / "loras", {"r": 4, "lora_alpha": 27})
    kohyas = file_of(folder / "k.safetensors", kohya(alpha=torch.tensor(2.0)))
    diffusers = file_of(folder / "d.safetensors", peft(prefix="unet."))
    assert set(scales(kohyas).values()) == {0.5} and set(scales(diffusers).values()) == {1.0}
    assert set(scales(file_of(folder / "other_name.safetensors", peft())).values()) == {6.75}
    renamed = folder_of(tmp_path / "one", {"r": 4, "lora_alpha": 27}, peft(prefix="unet."), "mine.safetensors")
    assert set(scales(renamed / "mine.safetensors").values()) == {6.75}


def test_a_header_goes_before_what_lies_beside(tmp_path):
    folder = folder_of(tmp_path / "a", {"r": 4, "lora_alpha": 27})
    file_of(folder / "adapter_model.safetensors", peft(), {"r": 4, "lora_alpha": 12})
    assert set(scales(folder).values()) == {3.0}


def test_folders_of_both_networks(prior, tmp_path):
    """As peft's own DreamBooth script writes them."""
    folder_of(tmp_path / "dog" / "unet", {"r": 4, "lora_alpha": 8})
    folder_of(tmp_path / "dog" / "text_encoder", {"r": 4, "lora_alpha": 4}, peft([TEXT]))
    found = read_lora(tmp_path / "dog")
    assert {layer.scale for layer in found["unet"].values()} == {2.0}
    assert [layer.scale for layer in found["text_encoder"].values()] == [1.0] and TEXT in found["text_encoder"]
    assert identify(tmp_path / "dog").layout == "LoRA" and len(lora_files(tmp_path / "dog")) == 4
    assert [found.path for found in identify_all(tmp_path)] == [tmp_path / "dog"]
    before = prior.encode_text(["a cat"])
    assert not torch.equal(apply_lora(prior, tmp_path / "dog").encode_text(["a cat"]), before)


def test_the_text_encoder_alone(prior, tmp_path):
    path = file_of(tmp_path / "t.safetensors", peft([TEXT.removeprefix("text_model.")]))
    assert not read_lora(path)["unet"]
    before, unet = prior.encode_text(["a cat"]), weights(prior.denoiser.unet)
    changed = apply_lora(prior, path)
    assert not torch.equal(changed.encode_text(["a cat"]), before) and same(unet, prior.denoiser.unet.state_dict())


def test_old_alphas_are_found_under_every_name(tmp_path):
    down, up = pair()
    for name in (f"unet.{ATTENTION}.to_q", f"unet.{ATTENTION}.processor.to_q_lora", f"unet.{ATTENTION}.to_q.lora"):
        half = name if "_lora" in name or name.endswith(".lora") else f"{name}.lora"
        state = {f"{half}.down.weight": down, f"{half}.up.weight": up, f"{name}.alpha": torch.tensor(2)}
        assert scales(file_of(tmp_path / "a.safetensors", state)) == {f"{ATTENTION}.to_q": 0.5}


# ---- What is said of it is malformed -----------------------------------------------------------------------------

_HEADER = "its header's lora_adapter_metadata"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("lora_alpha_null", f"{_HEADER}: unet.lora_alpha must be a finite number, got null"),
        ("lora_hdr_null", f"{_HEADER} must hold an object, but holds null: .* save the LoRA anew"),
        ("lora_hdr_list", f"{_HEADER} must hold an object"),
        ("lora_rank0", r"attn2_to_q is empty: its down matrix is \[0, 64\]"),
        ("lora_rank_mismatch", r"attn2.to_v has halves of unequal ranks, 8 \(down, \[8, 64\]\) and 4 \(up"),
    ],
)
def test_the_given_malformed_files(prior, case, words):
    path, before = CASES / f"{case}.safetensors", weights(prior.denoiser.unet)
    refused(path, words)
    with pytest.raises(PriorError, match=words):
        apply_lora(prior, path)
    assert same(before, prior.denoiser.unet.state_dict())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_alpha": "8"}, "lora_alpha must be a finite number, got '8'"),
        ({"lora_alpha": None}, "lora_alpha must be a finite number, got null"),
        ({"lora_alpha": [8]}, r"lora_alpha must be a finite number, got \[8\]"),
        ({"lora_alpha": True}, "lora_alpha must be a finite number, got True"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a finite number, got nan"),
        ({"lora_alpha": math.inf}, "lora_alpha must be a finite number, got inf"),
        ({"lora_alpha": 0}, "would add nothing: its alpha is 0"),
        ({"r": 0}, "r is 0, a rank must be 1 or more"),
        ({"r": -4}, "r is -4, a rank must be 1 or more"),
        ({"r": 2.5}, "r is 2.5, a rank must be 1 or more"),
        ({"r": None}, "r must be a finite number, got null"),
        ({"r": 8}, "says rank 8 for down_blocks.1.*, its matrices have 4"),
        ({"r": 4, "rank_pattern": {"to_k": 6}}, "says rank 6 for .*to_k, its matrices have 4"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false, got 'yes'"),
        ({"alpha_pattern": [1]}, r"alpha_pattern must hold an object, got \[1\]"),
        ({"alpha_pattern": {"to_q": None}}, "alpha_pattern, 'to_q' must be a finite number, got null"),
        ({"rank_pattern": {"to_q": "4"}}, "rank_pattern, 'to_q' must be a finite number, got '4'"),
        ({"alpha_pattern": {"to_(q": 4}}, r"'to_\(q' is no regular expression"),
        ({"alpha_pattern": {r"(\w|\w\w|\.)+[v-z]": 4}}, "takes too long to match"),
        ({"peft_type": 3}, "peft_type must be text, got 3"),
    ],
)
@pytest.mark.parametrize("written", ["beside", "in the header"])
def test_malformed_settings_are_named(tmp_path, settings, words, written):
    if written == "beside":
        path = folder_of(tmp_path / "mine", settings)
        words = words if "add nothing" in words else f"adapter_config.json.*{words}"
    else:
        path = file_of(tmp_path / "mine.safetensors", peft(), {f"unet.{key}": value for key, value in settings.items()})
    refused(path, words)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{", "version https://git-lfs.github.com/spec/v1", "<html>", "[" * 999]
)
def test_settings_that_are_no_settings(tmp_path, text):
    folder = folder_of(tmp_path / "mine", {})
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    refused(folder, "adapter_config.json")


@pytest.mark.parametrize(
    ("alpha", "words"),
    [
        (torch.tensor([4.0, 4.0]), "alpha holds 2 values, it must be one number"),
        (torch.zeros(0), "alpha holds 0 values"),
        (torch.tensor(math.nan), "alpha is nan, it must be a finite number"),
        (torch.tensor(-math.inf), "alpha is -inf, it must be a finite number"),
        (torch.tensor(0.0), "would add nothing: its alpha is 0"),
        (torch.tensor(True), "alpha holds bool"),
    ],
)
def test_malformed_alphas_are_named(tmp_path, alpha, words):
    refused(file_of(tmp_path / "mine.safetensors", kohya(alpha=alpha)), words)


def test_alphas_that_contradict_the_settings(tmp_path):
    state = kohya(alpha=torch.tensor(2.0))
    refused(file_of(tmp_path / "a.safetensors", state, {"unet.lora_alpha": 8}), r"makes the factor of .* 2, .*it 0.5")
    assert set(scales(file_of(tmp_path / "b.safetensors", state, {"unet.lora_alpha": 2})).values()) == {0.5}


@pytest.mark.parametrize("value", [2.0, torch.tensor([2.0]), torch.tensor([[2]])])
def test_alphas_of_one_number_in_any_shape(tmp_path, value):
    path = file_of(tmp_path / "a.safetensors", kohya(alpha=torch.as_tensor(value)))
    assert set(scales(path).values()) == {0.5}


# ---- The matrices ------------------------------------------------------------------------------------------------

_SHAPES = {
    "unequal ranks": ((4, 64), (64, 8), r"unequal ranks, 4 .* and 8"),
    "swapped": ((64, 4), (4, 64), None),
    "no matrix": ((256,), (64, 4), "which are no matrices"),
    "a number": ((), (), "which are no matrices"),
    "empty": ((4, 0), (64, 4), "is empty"),
    "a wide up": ((4, 64), (64, 4, 3, 3), "unequal ranks, 4 .* and 36"),
}


@pytest.mark.parametrize("what", [name for name, entry in _SHAPES.items() if entry[2]])
@pytest.mark.parametrize("network", ["unet", "text_encoder"])
def test_halves_that_do_not_belong_together(prior, tmp_path, what, network):
    down, up, words = _SHAPES[what]
    name = {"unet": f"unet.{ATTENTION}.to_q", "text_encoder": f"text_encoder.{TEXT}"}[network]
    bad = {f"{name}.lora_A.weight": torch.ones(down), f"{name}.lora_B.weight": torch.ones(up)}
    path = file_of(tmp_path / "mine.safetensors", peft(LAYERS[:2], "unet.") | bad)
    before = weights(prior.denoiser.unet)
    refused(path, words)
    with pytest.raises(PriorError):
        apply_lora(prior, path)
    assert same(before, prior.denoiser.unet.state_dict())


def test_swapped_halves_do_not_fit(prior, tmp_path):
    before = weights(prior.denoiser.unet)
    state = peft(LAYERS[1:], "unet.") | {
        f"unet.{LAYERS[0]}.lora_A.weight": torch.ones(64, 4),
        f"unet.{LAYERS[0]}.lora_B.weight": torch.ones(4, 64),
    }
    with pytest.raises(PriorError, match="to_k is 4 -> 4 there and 64 -> 64 here"):
        apply_lora(prior, file_of(tmp_path / "a.safetensors", state))
    assert same(before, prior.denoiser.unet.state_dict())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_no_numbers(tmp_path, bad, dtype):
    state = {name: tensor.to(dtype) for name, tensor in peft().items()}
    key = f"base_model.model.{LAYERS[2]}.lora_B.weight"
    state[key][3, 1] = bad
    refused(file_of(tmp_path / "mine.safetensors", state), f"{key} (holds NaN|is infinite).*1 of 256 values")


def test_large_values_are_numbers_although_their_sum_is_none(tmp_path):
    state = {name: torch.full_like(tensor, 6e4).half() for name, tensor in peft().items()}
    assert len(scales(file_of(tmp_path / "a.safetensors", state))) == 4


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.complex64])
def test_types_that_are_no_numbers_with_fractions(tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in peft().items()}
    kind = str(dtype).removeprefix("torch.")
    refused(file_of(tmp_path / "mine.safetensors", state), f"holds {kind}, not plain floating point numbers")


def test_eight_bits_are_enough(prior, tmp_path):
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in peft(prefix="unet.").items()}
    before = weights(prior.denoiser.unet)
    apply_lora(prior, file_of(tmp_path / "a.safetensors", state))
    down, up = (state[f"unet.{LAYERS[0]}.lora_{half}.weight"].float() for half in "AB")
    after = prior.denoiser.unet.state_dict()[f"{LAYERS[0]}.weight"]
    torch.testing.assert_close(after, before[f"{LAYERS[0]}.weight"] + up @ down)


def test_sums_that_half_precision_cannot_hold(checkpoint, tmp_path):
    prior = load_prior(checkpoint, dtype=torch.float16)
    before = weights(prior.denoiser.unet)
    state = peft(prefix="unet.")
    state[f"unet.{LAYERS[2]}.lora_B.weight"] *= 1e6
    path = file_of(tmp_path / "a.safetensors", state)
    with pytest.raises(PriorError, match=f"the weights of {LAYERS[2]} are more than float16 can hold; take a smaller"):
        apply_lora(prior, path)
    assert same(before, prior.denoiser.unet.state_dict())
    apply_lora(load_prior(checkpoint), path)


def test_a_file_that_claims_more_than_it_holds(tmp_path):
    """One number, spread over a hundred million places."""
    state = {f"{LAYERS[0]}.lora_A.weight": torch.zeros(1).expand(4, 10**8), f"{LAYERS[0]}.lora_B.weight": pair()[1]}
    torch.save(state, tmp_path / "mine.bin")
    refused(tmp_path / "mine.bin", "claims 400,000,256 numbers|mine.bin")


# ---- Names -------------------------------------------------------------------------------------------------------


def test_the_given_file_of_ldm_names(prior):
    before = weights(prior.denoiser.unet)
    apply_lora(prior, CASES / "lora_ldm_names.safetensors")
    state = load_file(CASES / "lora_ldm_names.safetensors")
    down, up = (next(t for k, t in state.items() if f"lora_{half}" in k) for half in ("down", "up"))
    after = prior.denoiser.unet.state_dict()
    expected = before[f"{ATTENTION}.to_q.weight"] + up @ down
    torch.testing.assert_close(after[f"{ATTENTION}.to_q.weight"], expected, rtol=1e-5, atol=1e-6)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [f"{ATTENTION}.to_q.weight"]


@pytest.mark.parametrize("size", [layout.SD21, layout.SD15, small(n_resnets=1), small(n_resnets=3)])
@pytest.mark.parametrize("dot", [".", "_"])
def test_every_layer_of_ldm_has_its_name(size, dot):
    """The translation of a layer alone is that of the whole table."""
    keys = [key for key in layout.unet(size) if key.endswith(".weight")]
    table = ldm_keys.unet_names(layout.unet(size))
    for key in keys:
        layer = key.removesuffix(".weight").replace(".", dot)
        expected = table[key].removesuffix(".weight").replace(".", "_")
        assert ldm_keys.unet_layer(layer, size.n_resnets) == expected


@pytest.mark.parametrize(
    "name", ["down_blocks_1_attentions_0", "input_blocks_4", "input_blocks_4_1x", "outer_2", "", "_"]
)
def test_other_names_are_not_translated(name):
    assert ldm_keys.unet_layer(name, 2) is None


@pytest.mark.parametrize(
    ("key", "layer"),
    [
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0",
            "down_blocks.1.attentions.0.{}attn1.to_out.0",
        ),
        ("lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k", "mid_block.attentions.0.{}attn2.to_k"),
        ("lora_unet_output_blocks_2_1_transformer_blocks_0_attn1_to_q", "up_blocks.0.attentions.2.{}attn1.to_q"),
        ("lora_unet_input_blocks_5_0_in_layers_2", "down_blocks.1.resnets.1.conv1"),
        ("lora_unet_input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_time_embed_0", "time_embedding.linear_1"),
        ("diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_q", "down_blocks.1.attentions.0.{}attn2.to_q"),
        ("model.diffusion_model.middle_block.1.proj_in", "mid_block.attentions.0.proj_in"),
        ("diffusion_model.out.2", "conv_out"),
        ("diffusion_model.down_blocks.1.attentions.0.proj_out", "down_blocks.1.attentions.0.proj_out"),
        ("unet.mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_in"),
    ],
)
def test_layers_are_found_under_every_name(prior, tmp_path, key, layer):
    layer = layer.format("transformer_blocks.0.")
    before = weights(prior.denoiser.unet)
    weight = before[f"{layer}.weight"]
    down, up = pair(2, weight[0].numel(), len(weight))
    state = {f"{key}.lora_down.weight": down.reshape(2, *weight.shape[1:]), f"{key}.lora_up.weight": up}
    apply_lora(prior, file_of(tmp_path / "a.safetensors", state))
    after = prior.denoiser.unet.state_dict()
    torch.testing.assert_close(
        after[f"{layer}.weight"], weight + (up @ down).reshape(weight.shape), rtol=1e-4, atol=1e-5
    )
    assert [name for name in before if not torch.equal(before[name], after[name])] == [f"{layer}.weight"]


@pytest.mark.parametrize(
    "key",
    [
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "text_encoder.encoder.layers.0.self_attn.q_proj",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj",
        "base_model.model.text_model.encoder.layers.0.self_attn.q_proj",
    ],
)
def test_layers_of_the_text_are_found_under_every_name(prior, tmp_path, key):
    _, encoder = prior.loader.text_encoder(torch.float32, "cpu")
    before = weights(encoder)
    path = file_of(tmp_path / "a.safetensors", {f"{key}.lora_A.weight": pair()[0], f"{key}.lora_B.weight": pair()[1]})
    add_layers(encoder, read_lora(path)["text_encoder"], 1.0, "")
    changed = [name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) == 1 and changed[0].endswith("encoder.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["lora_te2_text_model_encoder_layers_0_mlp_fc1.{}"], "a LoRA for Stable Diffusion XL"),
        (["text_encoder_2.text_model.encoder.layers.0.mlp.fc1.{}", f"unet.{LAYERS[0]}.{{}}"], "Stable Diffusion XL"),
        (["lora_unet_double_blocks_0_img_attn_proj.{}"], "a LoRA for Flux"),
        (["diffusion_model.single_blocks.0.linear1.{}"], "a LoRA for Flux"),
        (["transformer.single_transformer_blocks.0.attn.to_q.{}"], "a LoRA for Flux"),
        (["transformer.transformer_blocks.0.attn.to_q.{}"], "a diffusion transformer"),
        (["lora_unet_joint_blocks_0_x_block_attn_proj.{}"], "a LoRA for Stable Diffusion 3"),
        (["diffusion_model.blocks.0.self_attn.q.{}"], "a diffusion transformer"),
        (["lora_prior_unet_down_blocks_0_0.{}"], "Stable Cascade"),
        (["unet.down_blocks.0.motion_modules.0.proj_in.{}"], "AnimateDiff"),
    ],
)
def test_loras_for_other_models_are_named(tmp_path, names, words):
    state = {}
    for name in names:
        down, up = pair()
        state |= {name.format("lora_down.weight"): down, name.format("lora_up.weight"): up}
    refused(file_of(tmp_path / "mine.safetensors", state), f"is a LoRA for {words.removeprefix('a LoRA for ')}")


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("dora_scale", "is a DoRA"),
        ("lora_magnitude_vector", "is a DoRA"),
        ("lora_magnitude_vector.default.weight", "is a DoRA"),
        ("hada_w1_a", "is a LoHa"),
        ("lokr_w1", "is a LoKr"),
        ("oft_blocks", "is an OFT"),
        ("oft_R.weight", "is an OFT"),
        ("lora_mid.weight", "three matrices"),
        ("diff", "whole differences"),
        ("diff_b", "whole differences"),
        ("lora_B.bias", "with biases"),
        ("lora_B.default.bias", "with biases"),
        ("lora_up.bias", "with biases"),
        ("lora_embedding_A", "embeddings"),
        ("on_input", "IA3"),
        ("weight", "it holds .*to_q.weight beside its pairs .weights that were trained as a whole"),
        ("bias", "it holds .*to_q.bias beside its pairs"),
        ("base_layer.weight", "it holds .*base_layer.weight beside its pairs"),
    ],
)
@pytest.mark.parametrize(
    "root", [f"base_model.model.{ATTENTION}.to_q", f"lora_unet_{ATTENTION.replace('.', '_')}_to_q"]
)
def test_relatives_of_lora_are_refused_for_what_they_are(prior, tmp_path, end, words, root):
    path = file_of(tmp_path / "mine.safetensors", peft() | {f"{root}.{end}": torch.ones(64, 4)})
    assert identify(path).layout == "LoRA"
    before = weights(prior.denoiser.unet)
    refused(path, words)
    assert same(before, prior.denoiser.unet.state_dict())


def test_words_of_textual_inversion_are_named(tmp_path):
    refused(file_of(tmp_path / "mine.safetensors", {"emb_params": torch.ones(2, 768)}), "textual inversion")
    bundle = peft() | {"bundle_emb.sks.string_to_param.*": torch.ones(2, 768)}
    refused(file_of(tmp_path / "mine.safetensors", bundle), "textual inversion")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora is True: DoRA"),
        ({"bias": "all"}, "bias is 'all': a LoRA with trained biases"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"bias": 1}, "bias is 1"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save is .*whole layers"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA': only LoRA"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changed the model's own"),
        ({"init_lora_weights": ["olora"]}, "init_lora_weights"),
        ({"layer_replication": [[0, 4]]}, "layers that are used several times"),
        ({"use_something_new": 0.5}, "use_something_new is 0.5: which is not known here and may change the result"),
    ],
)
def test_settings_that_are_not_followed_are_refused(tmp_path, settings, words):
    refused(folder_of(tmp_path / "mine", {"r": 4, "lora_alpha": 4, **settings}), words)
    header = {f"unet.{key}": value for key, value in settings.items()}
    refused(file_of(tmp_path / "mine.safetensors", peft(prefix="unet."), header), words)


def test_everything_that_peft_writes_of_a_plain_lora_is_known(tmp_path):
    config = {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": {"base_model_class": "UNet2DConditionModel", "parent_library": "diffusers"},
        "base_model_name_or_path": "some/where",
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian",
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 16,
        "lora_bias": False,
        "lora_dropout": 0.1,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.18.0",
        "qalora_group_size": 16,
        "r": 4,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
        "target_parameters": None,
        "task_type": None,
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    }
    assert set(scales(folder_of(tmp_path / "mine", config)).values()) == {4.0}


def test_several_loras_in_one_file(prior, tmp_path):
    state = peft(LAYERS[:1]) | {
        f"base_model.model.{LAYERS[0]}.lora_A.second.weight": pair()[0],
        f"base_model.model.{LAYERS[0]}.lora_B.second.weight": pair()[1],
    }
    refused(file_of(tmp_path / "mine.safetensors", state), "holds both .* and .*: is it several LoRAs")
    state = peft(LAYERS[:1]) | peft(LAYERS[:1], "unet.")
    refused(file_of(tmp_path / "mine.safetensors", state), "holds more than one pair")
    state = kohya() | kohya("input_blocks_4_1_transformer_blocks_0_attn2_to_q")
    before = weights(prior.denoiser.unet)
    with pytest.raises(PriorError, match="attn2.to_q is named twice there"):
        apply_lora(prior, file_of(tmp_path / "twice.safetensors", state))
    assert same(before, prior.denoiser.unet.state_dict())


def test_what_is_missing_is_named(tmp_path):
    refused(file_of(tmp_path / "mine.safetensors", {"lora_unet_x.alpha": torch.tensor(1.0)}), "no down matrix")
    alone = kohya() | {"lora_unet_other.alpha": torch.tensor(1.0)}
    refused(file_of(tmp_path / "mine.safetensors", alone), "lora_unet_other has no down matrix")
    refused(file_of(tmp_path / "mine.safetensors", {}), "holds no LoRA")
    (tmp_path / "mine").mkdir()
    refused(tmp_path / "mine", r"pytorch_lora_weights.safetensors is missing \(or peft's adapter_model.safetensors")


def test_a_folder_of_two_loras_asks_which(tmp_path):
    folder = folder_of(tmp_path / "mine", {"lora_alpha": 4})
    file_of(folder / "pytorch_lora_weights.safetensors", peft(prefix="unet."))
    refused(folder, "holds two LoRAs, pytorch_lora_weights.safetensors and adapter_model.safetensors: say which file")


def test_a_lora_for_wider_text_says_whose(prior, tmp_path):
    names = (f"unet.{ATTENTION}.to_k.lora_A.weight", f"unet.{ATTENTION}.to_k.lora_B.weight")
    for width, model in ((768, "Stable Diffusion 1"), (2048, "Stable Diffusion XL")):
        path = file_of(tmp_path / "a.safetensors", dict(zip(names, pair(4, width), strict=True)))
        with pytest.raises(PriorError, match=rf"another model \(its text is {width} wide, as in {model}\)"):
            apply_lora(prior, path)


def test_a_lora_is_no_model(tmp_path):
    folder = folder_of(tmp_path / "mine", {"lora_alpha": 4})
    for path in (folder, toy_subject(), CASES / "peft_adapter"):
        with pytest.raises(PriorError, match="is a LoRA: it is added to a model"):
            open_loader(path)


# ---- The toy image prior -----------------------------------------------------------------------------------------


def broken_subject(folder: Path, what: str) -> Path:
    """The toy subject's LoRA with a NaN in its last tensor, or one half of another rank."""
    state = load_file(toy_subject() / "pytorch_lora_weights.safetensors")
    key = max(name for name in state if name.endswith("down.weight"))
    if what == "nan":
        state[key][0, 0] = math.nan
    else:
        state[key] = state[key].repeat(2, 1)
    save_file(state, folder / f"{what}.safetensors")
    return folder / f"{what}.safetensors"


@pytest.mark.parametrize(("what", "words"), [("nan", "holds NaN"), ("rank", "halves of unequal ranks, 8 .* and 4")])
def test_a_broken_lora_is_refused_at_the_door(tmp_path, capsys, monkeypatch, what, words):
    from dream4d_engine.cli import main
    from dream4d_engine.priors import files

    path = broken_subject(tmp_path, what)
    prior = load_prior(toy_folder("image"))
    before = weights(prior.denoiser.unet)
    with pytest.raises(PriorError, match=words):
        apply_lora(prior, path)
    assert same(before, prior.denoiser.unet.state_dict())
    monkeypatch.setattr(files, "load_prior", lambda *_: pytest.fail("a model was loaded"))
    command = ["text-to-3d", "a sks snowman", "--recipe", "toy-personalised", "--out", str(tmp_path / "out")]
    assert main([*command, "--image-lora", str(path)]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and re.search(words, errors) and str(path) in errors
    assert main([*command, "--image-lora", "toy", "--image-lora-strength", "nan"]) == 2
    assert "--image-lora-strength must lie in [-10, 10], got nan" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_beside_count_as_the_loras_files(tmp_path):
    folder = shutil.copytree(CASES / "peft_adapter", tmp_path / "mine")
    names = {"adapter_model.safetensors", "adapter_config.json"}
    assert {file.name for file in lora_files(folder)} == names
    assert {file.name for file in lora_files(folder / "adapter_model.safetensors")} == names
    assert [file.name for file in lora_files(toy_subject())] == ["pytorch_lora_weights.safetensors"]
