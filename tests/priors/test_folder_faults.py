"""Model folders as they arrive damaged, mixed up or meant badly: a sentence with file and field, at little cost."""

from __future__ import annotations

import ast
import io
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from comfy_harness import REPOSITORY
from prior_folders import NEVER_SAID, copy_of, use
from safetensors.torch import load_file, save_file

from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.files import toy_folder
from dream4d_engine.priors.formats.folders import FolderLoader
from dream4d_engine.priors.loading import load_prior
from dream4d_engine.priors.networks.text import END, read_tokenizer, write_clip_tokenizer

UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
TEXT, TOKENIZER, MARKS = (
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
)
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3438167534\n"
PAGE = b"<!DOCTYPE html><html><head><title>Log in</title></head></html>"
GIGABYTE, SECONDS = 2**30, 5


def change(folder: Path, name: str, changes: dict) -> None:
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def replace_file(folder: Path, name: str, content: bytes) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("UNetSpatioTemporalConditionModel", "of the kind of Stable Video Diffusion and SV3D; SV3D is read in ComfyUI"),
        ("PriorTransformer", "unet is a PriorTransformer; UNet2DConditionModel and UNet3DConditionModel can be used"),
    ],
)
def test_a_network_of_another_class_is_refused_by_a_look_at_the_folder(tmp_path, network, said) -> None:
    """Before a run's folder is made, that is: a dry run found nothing wrong."""
    folder = copy_of("novel_view", tmp_path / "model")
    change(folder, UNET, {"_class_name": network})
    with pytest.raises(PriorError, match=said):
        FolderLoader(folder).check()


def refusal(folder: Path) -> str:
    """What is said of a folder that can't be used: one line, with no advice that others give, soon and for little."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(PriorError) as caught:
        use(folder)
    assert time.process_time() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GIGABYTE
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000, message
    assert not any(word in message for word in NEVER_SAID), message
    return message


# ---- sizes -------------------------------------------------------------------------------------------------------

HUGE = {
    "steps": (SCHEDULER, {"num_train_timesteps": 10**9}, "num_train_timesteps is 1,000,000,000; 2 to 100,000"),
    "negative steps": (SCHEDULER, {"num_train_timesteps": -1}, "num_train_timesteps is -1; 2 to"),
    "layers": (
        UNET,
        {"layers_per_block": 10**5},
        "layers_per_block is 100000, but the weights beside it hold 326 tens",
    ),
    "layers of each": (
        UNET,
        {"layers_per_block": [1, 10**5, 1]},
        "layers_per_block is [1, 100000, 1], but the weights",
    ),
    "depth": (UNET, {"transformer_layers_per_block": 10**5}, "transformer_layers_per_block is 100000, but the weights"),
    "together": (UNET, {"layers_per_block": 40, "transformer_layers_per_block": 40}, "layers_per_block is 40, but the"),
    "blocks": (UNET, {"block_out_channels": [32] * 10**5}, "block_out_channels has 100,000 entries"),
    "width": (UNET, {"block_out_channels": [2**20, 64, 128]}, "of another shape"),
    "tokens": (UNET, {"cross_attention_dim": 10**9}, "cross_attention_dim is 1000000000; numbers up to 1,048,576"),
    "image": (UNET, {"sample_size": 10**6}, "of another shape|images of up to"),
    "classes": (UNET, {"num_class_embeds": 10**6}, "class_embedding.weight is missing"),
    "encoder layers": (TEXT, {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, but the weights"),
    "vocabulary": (TEXT, {"vocab_size": 10**9}, "vocab_size is 1000000000; numbers up to"),
    "smaller vocabulary": (TEXT, {"vocab_size": 10**6}, "token_embedding.weight is of another shape"),
    "positions": (TEXT, {"max_position_embeddings": 10**6}, "position_embedding.weight is of another shape"),
    "frames": (INDEX, {"dream4d": {"n_frames": 10**9}}, "n_frames is 1,000,000,000"),
    "declared image": (
        INDEX,
        {"dream4d": {"image_size": [10**6, 32]}},
        "image_size is [1000000, 32]; images of up",
    ),
}


@pytest.mark.parametrize("name", HUGE)
def test_sizes_are_compared_with_the_weights_and_with_what_is_reasonable(tmp_path, name):
    file, changes, said = HUGE[name]
    folder = copy_of("image", tmp_path / "model")
    if name == "image":
        index = json.loads((folder / INDEX).read_text())
        del index["dream4d"]["image_size"]
        (folder / INDEX).write_text(json.dumps(index))
    change(folder, file, changes)
    message = refusal(folder)
    assert any(one in message for one in said.split("|")), message
    assert file.rpartition("/")[0] in message


# ---- kinds and values --------------------------------------------------------------------------------------------

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
WRONG = {
    "prediction": (
        SCHEDULER,
        {"prediction_type": "flow"},
        "prediction_type is 'flow'; known are epsilon, v_prediction",
    ),
    "prediction kind": (SCHEDULER, {"prediction_type": ["epsilon"]}, "prediction_type must be text, got ['epsilon']"),
    "betas": (SCHEDULER, {"beta_schedule": "cosine"}, "beta_schedule is 'cosine'; known are linear"),
    "nan beta": (SCHEDULER, {"beta_start": float("nan")}, "beta_start must be a number, got nan"),
    "infinite beta": (SCHEDULER, {"beta_end": float("inf")}, "beta_end must be a number, got inf"),
    "large beta": (SCHEDULER, {"beta_end": 2}, "beta_end is 2.0, it must lie between 0 and 1"),
    "text beta": (SCHEDULER, {"beta_start": "0.1"}, "beta_start must be a number, got '0.1'"),
    "trained nan": (SCHEDULER, {"trained_betas": [0.1, float("nan")]}, "trained_betas[1] is nan"),
    "trained text": (SCHEDULER, {"trained_betas": "0.1"}, "trained_betas must be a list, got '0.1'"),
    "trained negative": (SCHEDULER, {"trained_betas": [-0.1] * 1000}, "trained_betas[0] is -0.1"),
    "trained length": (
        SCHEDULER,
        {"trained_betas": [0.1] * 999},
        "trained_betas has 999 entries, but num_train_timest",
    ),
    "other noise": (SCHEDULER, {"_class_name": "EDMEulerScheduler"}, "another kind of noise can't be used"),
    "other flow": (SCHEDULER, {"_class_name": "FlowMatchHeunDiscreteScheduler"}, "another kind of noise can't be used"),
    "flow shift": (SCHEDULER, FLOW | {"shift": 0}, "shift is 0; 0.01 to 1000 can be used"),
    "flow shift in text": (SCHEDULER, FLOW | {"shift": "3"}, "shift must be a number, got '3'"),
    "flow nan": (SCHEDULER, FLOW | {"shift": float("nan")}, "shift must be a number, got nan"),
    "flow by size": (
        SCHEDULER,
        FLOW | {"use_dynamic_shifting": True},
        "use_dynamic_shifting is true; flows of one shift",
    ),
    "flow inverted": (SCHEDULER, FLOW | {"invert_sigmas": True}, "invert_sigmas is true; flows of one shift"),
    "flow steps": (SCHEDULER, FLOW | {"num_train_timesteps": 100}, "num_train_timesteps is 100; a flow is told 1,000"),
    "steps in text": (SCHEDULER, {"num_train_timesteps": "1000"}, "num_train_timesteps must be a whole number"),
    "channels in text": (
        UNET,
        {"block_out_channels": "32,64,128"},
        "block_out_channels must be a list, got '32,64,128'",
    ),
    "channels in a list": (UNET, {"block_out_channels": [32, "64", 128]}, "block_out_channels must be a list, got [32"),
    "nan": (UNET, {"norm_eps": float("nan")}, "norm_eps is nan"),
    "layers in text": (UNET, {"layers_per_block": "1"}, "layers_per_block must be a whole number or a list, got '1'"),
    "block": (UNET, {"mid_block_type": "Other"}, "no UNet2DConditionModel can be built by it"),
    "long": (UNET, {"mid_block_type": "a" * 10_000}, "no UNet2DConditionModel can be built by it"),
    "advice": (
        UNET,
        {"mid_block_type": "trust_remote_code=True"},
        "no UNet2DConditionModel can be built by it (ValueE",
    ),
    "no heads": (UNET, {"attention_head_dim": 0}, "no UNet2DConditionModel can be built by it"),
    "inpainting": (UNET, {"in_channels": 9}, "does not fit: conv_in.weight is of another shape"),
    "other inputs": (UNET, {"class_embed_type": "timestep"}, "class_embedding.linear_1.bias"),
    "no embedding's": (UNET, {"class_embed_type": "identity"}, "can't be run as a model of kind 'image'"),
    "class": (UNET, {"_class_name": ["UNet2DConditionModel"]}, "_class_name must be text"),
    "other class": (UNET, {"_class_name": "Kandinsky3UNet"}, "unet is a Kandinsky3UNet; UNet2DConditionModel"),
    "encoder": (
        TEXT,
        {"architectures": ["LlamaModel"]},
        "architectures names 'LlamaModel'; the text encoders of CLIP and T5",
    ),
    "encoder null": (TEXT, {"architectures": [None]}, "architectures names None"),
    "encoder width": (TEXT, {"hidden_size": "64"}, "hidden_size must be a whole number, got '64'"),
    "width of another": (TEXT, {"hidden_size": 128}, "reads tokens 64 wide"),
    "no layers": (TEXT, {"num_hidden_layers": 0}, "num_hidden_layers is 0, it must be 1 or more"),
    "activation": (TEXT, {"hidden_act": "os.system"}, "hidden_act 'os.system' is no function that is known"),
    "no heads of encoder": (TEXT, {"num_attention_heads": 7}, "text_encoder/config.json"),
    "class of tokenizer": (TOKENIZER, {"tokenizer_class": "GPT2Tokenizer"}, "tokenizer_class is 'GPT2Tokenizer'"),
    "tokenizer null": (TOKENIZER, {"tokenizer_class": 3}, "tokenizer_class must be text, got 3"),
    "length": (TOKENIZER, {"model_max_length": -5}, "model_max_length is -5"),
    "length in text": (TOKENIZER, {"model_max_length": "77"}, "model_max_length must be a whole number, got '77'"),
    "mark": (TOKENIZER, {"pad_token": 7}, "pad_token must be text, got 7"),
    "mark in the map": (MARKS, {"eos_token": {"content": None}}, "special_tokens_map.json: eos_token must be text"),
    "ours": (INDEX, {"dream4d": "image"}, "model_index.json: dream4d must be an object, got 'image'"),
    "kind": (INDEX, {"dream4d": {"kind": "sound"}}, "unknown kind of prior 'sound'; known are image"),
    "kind's kind": (INDEX, {"dream4d": {"kind": ["image"]}}, "dream4d: kind must be text"),
    "vector": (INDEX, {"dream4d": {"kind": "image", "vector": [1]}}, "unknown vector [1]; known are camera"),
    "words": (INDEX, {"dream4d": {"kind": "image", "known_words": ["a", 1]}}, "known_words must hold text, got 1"),
    "words in text": (INDEX, {"dream4d": {"kind": "image", "known_words": "a b"}}, "known_words must be a list"),
    "size": (INDEX, {"dream4d": {"image_size": "32"}}, "image_size must be a whole number, or height and width"),
    "negative": (INDEX, {"dream4d": {"negative_prompt": {}}}, "negative_prompt must be text"),
    "resize": (INDEX, {"dream4d": {"image_resize": "best"}}, "unknown image_resize 'best'; known are corners"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_named_with_file_and_field(tmp_path, name):
    file, changes, said = WRONG[name]
    folder = copy_of("image", tmp_path / "model")
    change(folder, file, changes)
    message = refusal(folder)
    assert said in message and file.rpartition("/")[0] in message, message


TEXT_FILES = (INDEX, UNET, SCHEDULER, TEXT, TOKENIZER, MARKS, "tokenizer/vocab.json")
BROKEN = {
    "deep": (b"[" * 200_000, "nested too deep"),
    "deep object": (b'{"a":' * 200 + b"1" + b"}" * 200, "nested too deep"),
    "cut": (b'{"a": 1, "b"', "is not valid JSON"),
    "list": (b"[1, 2]", "must hold an object, got [1, 2]"),
    "null": (b"null", "must hold an object, got None"),
    "text": (b'"text"', "must hold an object"),
    "other letters": (b'{"a": "\xff\xfe"}', "is no text in UTF-8"),
    "empty": (b"", "is empty"),
    "pointer": (POINTER, "is a Git LFS pointer"),
    "page": (PAGE, "is a web page"),
    "large": (b" " * (2**24 + 1), "it can't be meant"),
    "long number": (b'{"a": ' + b"9" * 10_000 + b"}", "is not valid JSON"),
}


@pytest.mark.parametrize("file", TEXT_FILES)
@pytest.mark.parametrize("form", BROKEN)
def test_files_of_text_that_are_none(tmp_path, file, form):
    content, said = BROKEN[form]
    folder = copy_of("image", tmp_path / "model")
    (folder / file).write_bytes(content)
    message = refusal(folder)
    assert said in message and str(folder / file) in message


def test_a_file_with_a_mark_at_its_beginning_is_read(tmp_path):
    folder = copy_of("image", tmp_path / "model")
    for file in (INDEX, UNET, TEXT, TOKENIZER):
        (folder / file).write_bytes(b"\xef\xbb\xbf" + (folder / file).read_bytes())
    use(folder)


def test_sizes_of_a_tokenizer_json(tmp_path):
    """Replacements that make a prompt grow; a padding that would be filled."""
    folder = copy_of("pixel", tmp_path / "model")
    path = folder / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    change(folder, "tokenizer/tokenizer.json", {"padding": content["padding"], "truncation": None})
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    path.write_text(json.dumps(content | {"padding": padding | {"pad_type_id": 0, "pad_token": "<pad>"}}))
    use(folder)
    growing = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}
    path.write_text(json.dumps(content | {"normalizer": {"type": "Sequence", "normalizers": [growing] * 40}}))
    assert "its replacements make a text" in refusal(folder)
    path.write_text(json.dumps(content | {"model": {"type": "Unigram", "unk_id": 10**6, "vocab": []}}))
    assert "tokenizer" in refusal(folder)
    path.write_text(json.dumps(content | {"model": {"type": "Unigram", "unk_id": "x", "vocab": [["a", "b"]]}}))
    assert "its files are damaged or don't belong together" in refusal(folder)
    path.unlink()
    assert "tokenizer.json is missing" in refusal(folder)


def test_tokenizers_as_they_are_published(tmp_path):
    """With marks as objects; without settings; T5's as spiece.model alone."""
    folder = copy_of("image", tmp_path / "model")
    kept = {"lstrip": False, "rstrip": False, "normalized": True, "single_word": False, "__type": "AddedToken"}
    marks = json.loads((folder / MARKS).read_text())
    change(folder, TOKENIZER, {name: kept | {"content": mark} for name, mark in marks.items()})
    change(folder, TOKENIZER, {"errors": "replace", "name_or_path": "someone/something", "add_prefix_space": False})
    expected = load_prior(toy_folder("image")).encode_text(["a red cube"])
    assert torch.equal(load_prior(folder).encode_text(["a red cube"]), expected)
    (folder / TOKENIZER).unlink()
    assert torch.equal(load_prior(folder).encode_text(["a red cube"])[:, :5], expected[:, :5])
    with pytest.raises(PriorError, match="the prompt can't be split into tokens"):
        load_prior(folder).encode_text(["a \ud800 cube"])
    other = copy_of("pixel", tmp_path / "t5")
    (other / "tokenizer/tokenizer.json").unlink()
    (other / "tokenizer/spiece.model").write_bytes(b"garbage")
    (other / TOKENIZER).write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    message = refusal(other)
    assert "pip install sentencepiece protobuf" in message or "its files are damaged" in message


def test_a_tokenizer_and_an_encoder_of_two_models(tmp_path):
    folder = copy_of("image", tmp_path / "model")
    words = json.loads((folder / "tokenizer/vocab.json").read_text())
    (folder / "tokenizer/vocab.json").write_text(json.dumps({word: n + 1000 for word, n in words.items()}))
    message = refusal(folder)
    assert "they are not of one model" in message or "don't belong together" in message


# ---- weights -----------------------------------------------------------------------------------------------------

WEIGHTS = {"unet": UNET_WEIGHTS, "text_encoder": "text_encoder/model.safetensors"}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize(
    ("content", "said"), [(POINTER, "is a Git LFS pointer"), (PAGE, "is a web page"), (b"", "is empty")]
)
def test_weights_that_are_something_else(tmp_path, part, suffix, content, said):
    folder = copy_of("image", tmp_path / "model")
    (folder / WEIGHTS[part]).unlink()
    name = WEIGHTS[part].replace(".safetensors", suffix).replace("/model.bin", "/pytorch_model.bin")
    replace_file(folder, name, content)
    message = refusal(folder)
    assert said in message and str(folder / name) in message
    with pytest.raises(PriorError, match=said):
        FolderLoader(folder).check()  # before anything is loaded


def test_an_image_encoder_is_missed_only_where_images_are_read(tmp_path):
    """Pipelines that take images beside prompts list one, and come without it."""
    listed = {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
    folder = copy_of("image", tmp_path / "image")
    change(folder, INDEX, listed)
    assert load_prior(folder).encode_text(["a red cube"]).shape[0] == 1
    for changes in ({"dream4d": {"kind": "novel_view"}}, {"dream4d": {"kind": "image"}, "text_encoder": None}):
        change(folder, INDEX, listed | changes)
        with pytest.raises(PriorError, match="image_encoder/config.json is missing"):
            FolderLoader(folder).check()
    folder = copy_of("novel_view", tmp_path / "novel_view")
    shutil.rmtree(folder / "image_encoder")
    assert "image_encoder/config.json is missing" in refusal(folder)


def test_weights_that_want_to_run_something_or_are_cut(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = copy_of("image", tmp_path / "model")
    whole = load_file(folder / UNET_WEIGHTS)
    (folder / UNET_WEIGHTS).unlink()
    path = folder / "unet/diffusion_pytorch_model.bin"
    for old_format in (False, True):
        torch.save(whole | {"x": Runs()}, path, _use_new_zipfile_serialization=not old_format)
        message = refusal(folder)
        assert str(path) in message and not (tmp_path / "ran").exists()
        content = io.BytesIO()
        torch.save(whole, content, _use_new_zipfile_serialization=not old_format)
        path.write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
        assert str(path) in refusal(folder)
        path.write_bytes(content.getvalue())
        use(folder)


def test_weights_that_do_not_fit_are_not_filled_up_with_random_ones(tmp_path):
    folder = copy_of("image", tmp_path / "model")
    for part, name in (("unet", "conv_in.bias"), ("text_encoder", "final_layer_norm.weight")):
        path = folder / WEIGHTS[part]
        state = load_file(path)
        for changed, said in ((None, "is missing"), (torch.zeros(3), "is of another shape")):
            other = {n: t for n, t in state.items() if n != name} | ({} if changed is None else {name: changed})
            path.unlink()
            save_file(other, path)
            message = refusal(folder)
            assert name in message and said in message and f"{part}: what the weights hold and config.json" in message
        path.unlink()
        save_file(state, path)
    use(folder)


@pytest.mark.parametrize(
    "piece", ["../../x.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.bin", 7, None, "x.txt"]
)
def test_lists_of_files_name_files_beside_them_only(tmp_path, piece):
    folder = copy_of("image", tmp_path / "model")
    (folder / UNET_WEIGHTS).unlink()
    (folder.parent / "x.safetensors").symlink_to(toy_folder("image") / UNET_WEIGHTS)
    (folder / f"{UNET_WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"conv_in.bias": piece}}))
    assert "index.json: weight_map must name files of weights beside it, got" in refusal(folder)
    for content, said in (([], "weight_map must be an object"), ({}, "is missing"), (None, "is missing")):
        (folder / f"{UNET_WEIGHTS}.index.json").write_text(json.dumps({"weight_map": content}))
        assert said in refusal(folder)


def test_names_of_an_older_autoencoder(tmp_path):
    """As published before diffusers renamed the attention of autoencoders."""
    from prior_folders import image_folder

    folder = image_folder(tmp_path / "sd")
    modern = [p.clone() for p in load_prior(folder).denoiser.vae.parameters()]  # the file is written again below
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    old, names = {}, {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, tensor in load_file(path).items():
        for here, there in names.items():
            if f".{here}." in name:
                tensor = tensor[:, :, None, None] if name.startswith("enc") and tensor.ndim == 2 else tensor
                name = name.replace(f".{here}.", f".{there}.")
        old[name] = tensor.contiguous()
    assert any("query" in name for name in old)
    save_file(old, path)
    loaded = load_prior(folder).denoiser.vae
    assert all(torch.equal(a, b) for a, b in zip(modern, loaded.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["image", "pixel", "novel_view"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_encoders_are_filled_as_transformers_fills_them(kind, dtype):
    import transformers

    source, part = FolderLoader(toy_folder(kind)), "image_encoder" if kind == "novel_view" else "text_encoder"
    ours = source.image_encoder(dtype, "cpu") if kind == "novel_view" else source.text_encoder(dtype, "cpu")[1]
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers before 5 knows the stored names of encoders by another name")
    theirs = type(ours).from_pretrained(toy_folder(kind) / part, dtype=dtype, local_files_only=True).eval()
    for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b), name
    assert all(not p.requires_grad for p in ours.parameters()) and not ours.training


# ---- programs and places in a folder -----------------------------------------------------------------------------


def with_a_program(folder: Path, part: str, marker: Path) -> None:
    """Let a part's files ask for a program that would leave a mark."""
    place = folder / part
    (place / "program.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Thing: pass\n")
    names = {"AutoTokenizer": ["program.Thing", "program.Thing"], "AutoModel": "program.Thing"}
    names |= {"AutoConfig": "program.Thing", "AutoencoderKL": "program.Thing"}
    more = {"auto_map": names, "_name_or_path": "someone/something", "custom_pipeline": "program"}
    for file in place.glob("*config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | more))


@pytest.mark.parametrize("answer", [None, "y\ny\ny\n"], ids=["closed", "yes"])
def test_programs_in_a_folder_are_not_run_and_nobody_is_asked(tmp_path, monkeypatch, capfd, answer):
    folder, marker = copy_of("image", tmp_path / "model"), tmp_path / "ran"
    for part in ("unet", "text_encoder", "tokenizer", "scheduler"):
        with_a_program(folder, part, marker)
    (folder / "pipeline.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    change(folder, INDEX, {"_class_name": ["pipeline", "Thing"], "custom_pipeline": "pipeline"})
    asked = io.StringIO(answer or "")
    monkeypatch.setattr(sys, "stdin", asked)
    if answer is None:
        asked.close()
    use(folder)  # all that is known is there: the programs are not needed
    change(folder, TOKENIZER, {"tokenizer_class": "Thing"})
    assert "it comes with a program of its own (auto_map), which is never run" in refusal(folder)
    (folder / TOKENIZER).write_text(json.dumps({"auto_map": {"AutoTokenizer": ["program.Thing", None]}}))
    assert "a program of its own (auto_map), which is never run" in refusal(folder)
    assert not marker.exists() and not any(name.rpartition(".")[2] == "program" for name in sys.modules)
    assert answer is None or asked.tell() == 0
    assert "trust_remote_code" not in "".join(capfd.readouterr())


LOADERS = {
    "from_pretrained",
    "from_config",
    "from_single_file",
    "load_config",
    "get_config_dict",
    "get_class_from_dynamic_module",
}
SOURCES = sorted((REPOSITORY / "dream4d_engine").rglob("*.py")) + sorted((REPOSITORY / "nodes").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(REPOSITORY)) for path in SOURCES])
def test_whatever_is_loaded_runs_no_program_and_stays_here(path):
    """Every call that could run a folder's program or ask the hub says that it mustn't; Auto classes are not used."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("transformers", "diffusers"):
            automatic = [
                a.name for a in node.names if a.name.startswith("Auto") and not a.name.startswith("Autoencoder")
            ]
            automatic += [a.name for a in node.names if a.name.endswith("Pipeline")]
            assert not automatic, f"{path.name}:{node.lineno} imports {automatic}"
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in LOADERS:
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        where = f"{path.name}:{node.lineno}"
        assert given.get("trust_remote_code") == "False" and given.get("local_files_only") == "True", where
    assert "trust_remote_code=True" not in path.read_text(encoding="utf-8")


# ---- folders as users have them ----------------------------------------------------------------------------------


def padded_with_a_bang(folder: Path) -> Path:
    """Stable Diffusion 2's tokenizer, as its folder has it."""
    write_clip_tokenizer(folder, "!")
    change(folder, "tokenizer_config.json", {"pad_token": END})
    return folder


def saved_again(folder: Path, how: str) -> Path:
    """What the versions of transformers make of it that read the padding in special_tokens_map.json."""
    bang = {"content": "!", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    padded_with_a_bang(folder)
    if how in ("added", "settings alone"):
        change(
            folder, "tokenizer_config.json", {"pad_token": "!", "added_tokens_decoder": {"0": bang | {"special": True}}}
        )
    if how == "settings alone":
        (folder / MARKS.rpartition("/")[2]).unlink()
    if how in ("tokenizer.json", "tokenizer.json beside"):
        words = read_tokenizer(folder).words
        words.backend_tokenizer.save(str(folder / "tokenizer.json"))
        change(folder, "tokenizer.json", {"added_tokens": [{"id": 0, "special": True} | bang]})
    if how == "tokenizer.json":
        for name in ("vocab.json", "merges.txt", MARKS.rpartition("/")[2]):
            (folder / name).unlink()
        change(folder, "tokenizer_config.json", {"pad_token": "!"})
    return folder


@pytest.mark.parametrize("how", ["added", "settings alone", "tokenizer.json", "tokenizer.json beside"])
def test_padding_cuts_no_words_in_tokenizers_that_were_saved_again(tmp_path, how):
    prompts = ["wow!! a red cube, 4k!", "a cube ! !"]
    right, _ = read_tokenizer(padded_with_a_bang(tmp_path / "published")).tokens(prompts, 77)
    found = read_tokenizer(saved_again(tmp_path / "again", how))
    ids, _ = found.tokens(prompts, 77)
    assert found.pad_id == 0 and torch.equal(ids[:, :12], right[:, :12])


@pytest.mark.parametrize("name", [None, "TokenizersBackend", "PreTrainedTokenizerFast"])
def test_a_tokenizer_json_alone(tmp_path, name):
    folder = tmp_path / "tokenizer"
    write_clip_tokenizer(folder, END)
    right = read_tokenizer(folder)
    right.words.backend_tokenizer.save(str(folder / "tokenizer.json"))
    for path in folder.iterdir():
        if path.name != "tokenizer.json":
            path.unlink()
    if name is not None:
        change(folder, "tokenizer_config.json", {"tokenizer_class": name})
    found = read_tokenizer(folder)
    assert found.pad_id == right.pad_id == 49407
    assert torch.equal(found.tokens(["wow!! a red cube"], 77)[0], right.tokens(["wow!! a red cube"], 77)[0])


def half_precision_beside(folder: Path, form: str) -> None:
    """The UNet in half precision, beside a full one that isn't there in truth."""
    place = folder / "unet"
    state = {name: tensor.half() for name, tensor in load_file(place / UNET_WEIGHTS.rpartition("/")[2]).items()}
    pieces = [list(state)[::2], list(state)[1::2]]
    if form == "pointer":
        replace_file(folder, UNET_WEIGHTS, POINTER)
        save_file(state, place / "diffusion_pytorch_model.fp16.safetensors")
        return
    (folder / UNET_WEIGHTS).unlink()
    stem, table = "diffusion_pytorch_model", {}
    for i, names in enumerate(pieces):
        file = f"{stem}.fp16-{i + 1:05}-of-00002.safetensors"
        save_file({name: state[name] for name in names}, place / file)
        table |= dict.fromkeys(names, file)
    name = "safetensors.fp16.index" if form == "older list" else "safetensors.index.fp16"
    (place / f"{stem}.{name}.json").write_text(json.dumps({"weight_map": table}))
    if form == "list without its pieces":
        missing = dict.fromkeys(state, f"{stem}-00001-of-00002.safetensors")
        (place / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": missing}))


@pytest.mark.parametrize("form", ["pointer", "list without its pieces", "older list"])
def test_the_form_of_the_weights_that_is_whole_is_taken(tmp_path, form):
    folder = copy_of("image", tmp_path / "model")
    full = load_file(folder / UNET_WEIGHTS)
    half_precision_beside(folder, form)
    state = load_prior(folder).denoiser.unet.state_dict()
    assert all(torch.equal(state[name], tensor.half().float()) for name, tensor in full.items())
