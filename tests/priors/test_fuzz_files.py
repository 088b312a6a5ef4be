"""Random damage to files of weights, scenes and what lies beside them: a clear error or a model, nothing else.

Every round is seeded; `--fuzz N` runs N times as many.
"""

from __future__ import annotations

import io
import json
import random
import resource
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ldm_layout as layout
import pytest
import torch
from ldm_layout import WIDTH, small
from places import GOLDEN
from safetensors.torch import save_file

from dream4d_engine.assets import AssetError, load_scene, read_info
from dream4d_engine.dream_in_4d import import_checkpoint
from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.formats.convert import convert
from dream4d_engine.priors.formats.identify import identify, open_loader
from dream4d_engine.priors.loading import load_prior

MOST_SECONDS, MOST_BYTES = 5.0, 2**30

NUMBERS = [-1, 0, 1, 3, 10**5, 10**9, 2**31, 2**63, 10**30, 1e308, 0.5, float("nan"), float("inf")]
VALUES = [*NUMBERS, None, True, "", "x", "1", "\x1b[2J", "\ud800", [], {}, [1, 2, 3], [[[]]], {"a": None}, "v", "eps"]


@pytest.fixture(scope="module", autouse=True)
def intact(tmp_path_factory):
    """What the damage is done to is whole; and the libraries that are imported once are no file's fault."""
    for name, state in STATES.items():
        path = tmp_path_factory.mktemp("intact") / "x.safetensors"
        save_file({k: v.clone() for k, v in state.items()}, path)
        source = open_loader(path)
        assert load_prior(path).kind == ("novel_view" if name == "zero123" else "image")
        if name != "zero123":
            source.text_encoder(torch.float32, "cpu")


@pytest.fixture(autouse=True)
def bounded_memory():
    """What a test takes above what was in use before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MOST_BYTES


def outcome(attempt: Callable[[], Any], seed: object) -> str:
    """Whether a file was taken or refused; anything but a sentence fails the test."""
    begin = time.process_time()  # other processes may keep this one waiting
    try:
        attempt()
        found = "taken"
    except (PriorError, AssetError) as error:
        text = str(error)
        assert "\n" not in text and len(text) < 1200 and text.isprintable(), (seed, text)
        assert not any(word in text for word in ("weights_only", "KeyError", "object is not", "Traceback")), (
            seed,
            text,
        )
        found = "refused"
    except Exception as error:
        raise AssertionError(f"{seed}: {type(error).__name__}: {error}") from error
    assert time.process_time() - begin < MOST_SECONDS, seed
    return found


def fuzzed(rounds: int, name: str, make: Callable[[random.Random], Callable[[], Any]], least: int) -> None:
    """Run so many rounds; at least `least` percent of them must be refused, or the damage would be none."""
    results = []
    for i in range(rounds):
        seed = f"{name}:{i}"
        results.append(outcome(make(random.Random(seed)), seed))
    assert results.count("refused") * 100 >= least * rounds, results


# --- Damage ------------------------------------------------------------------------------------------------------


def damaged_bytes(content: bytes, chance: random.Random, first: int = 0) -> bytes:
    """Bits flipped, cut short, stretched, parts of it moved, or overwritten with one byte; mostly near the beginning
    and the end, where the headers are."""
    data = bytearray(content)

    def place() -> int:
        span = min(len(data), chance.choice([64, 1024, 8192, len(data)]))
        return chance.choice([first + chance.randrange(span), len(data) - 1 - chance.randrange(span)]) % len(data)

    for _ in range(chance.choice([1, 1, 2, 8])):
        kind = chance.randrange(6)
        if kind == 0:
            data[place()] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place()] = chance.choice(b'\x00\xff\x80.(}]R{"0129:')
        elif kind == 2 and len(data) > 64:
            del data[max(place(), 32) :]
        elif kind == 3:
            at = place()
            data[at:at] = chance.randbytes(chance.randint(1, 16))
        elif kind == 4:
            length = chance.randint(1, 64)
            data[place() :][:length] = data[place() :][:length]
        else:
            at, length = place(), chance.randint(1, 16)
            data[at : at + length] = bytes([chance.choice([0, 255, 127])]) * len(data[at : at + length])
    return bytes(data)


def damaged_tree(tree: Any, chance: random.Random) -> Any:
    """A copy of a tree with some values put in place of others, or left out."""
    tree = json.loads(json.dumps(tree))
    for _ in range(chance.randint(1, 3)):
        node = tree
        while isinstance(node, dict) and node:
            key = chance.choice(list(node))
            if not isinstance(node[key], dict) or chance.random() < 0.3:
                if chance.random() < 0.15:
                    del node[key]
                else:
                    node[key] = chance.choice(VALUES)
                break
            node = node[key]
    return tree


def damaged_text(tree: Any, chance: random.Random) -> str:
    text = json.dumps(damaged_tree(tree, chance))
    if chance.random() < 0.2:
        text = damaged_bytes(text.encode(), chance).decode("utf-8", "replace")
    return chance.choice([text] * 12 + ["[" * 10**5, "null", '"text"', "", "<html>", "1e999", "\x00", "{" + text])


def damaged_name(name: str, chance: random.Random) -> str:
    """A tensor's name with a number, a part or a letter changed."""
    parts = name.split(".")
    at = chance.randrange(len(parts))
    parts[at] = chance.choice(["0", "1", "7", "99999", "-1", "x", "", "weight", "\x1b[2J", "norm", "conv", "9" * 5000])
    return ".".join(parts)


def damaged_state(state: dict[str, torch.Tensor], chance: random.Random) -> dict[str, Any]:
    """Tensors renamed, left out, reshaped, of other types, repeated, or no tensors."""
    state = dict(state)
    groups = (
        "input_blocks",
        "output_blocks",
        "encoder.",
        "decoder.",
        "cond_stage_model",
        "proj_in",
        "attn",
        "betas",
        "",
    )
    for _ in range(chance.choice([1, 1, 2, 5, 40])):
        names = [name for name in state if chance.choice(groups) in name] or list(state)
        name = chance.choice(names)
        tensor = state.pop(name)
        kind = chance.randrange(7)
        if kind == 0:
            continue
        if kind == 1:
            state[damaged_name(name, chance)] = tensor
        elif kind == 2:
            shape = [chance.choice([0, 1, 2, 3, 32, 64, n]) for n in tensor.shape]
            state[name] = torch.zeros(shape)
        elif kind == 3:
            dtype = chance.choice([torch.int8, torch.int64, torch.bool, torch.float64, torch.bfloat16, torch.complex64])
            state[name] = tensor.to(dtype)
        elif kind == 4:
            state[name] = chance.choice(
                [tensor.flatten(), tensor[None], torch.tensor(1.0), torch.full(tensor.shape, torch.nan)]
            )
        elif kind == 5:
            state[name] = tensor
            state[damaged_name(name, chance)] = torch.zeros(chance.choice([(), (1,), (0,), (3, 3), (32,)]))
        else:
            state[name] = tensor
            state["betas"] = torch.full((chance.choice([0, 1, 10, 1000]),), chance.choice([0.0, 0.01, 1.0, torch.nan]))
    return state


# --- Checkpoints -------------------------------------------------------------------------------------------------


def tiny(name: str) -> layout.Shapes:
    """A checkpoint of each kind with a vocabulary of a few words."""
    vae = layout.vae(32, (1, 2), 1)
    if name == "sd15":
        return layout.checkpoint(
            layout.unet(small(context=WIDTH, linear=False)), vae, layout.hf_clip_text(WIDTH, 2, 64)
        )
    if name == "sd21":
        return layout.checkpoint(layout.unet(small(context=WIDTH)), vae, layout.open_clip_text(WIDTH, 3, 64))
    image = layout.clip_image(WIDTH, 2, patch=8, n_patches=16)
    return layout.checkpoint(layout.unet(small(context=768, linear=False, in_channels=8)), vae, image, True)


STATES = {name: layout.random_state(tiny(name)) for name in ("sd15", "sd21", "zero123")}
SETTINGS = {
    "model": {
        "target": "a.b.C",
        "params": {
            "linear_start": 0.00085,
            "linear_end": 0.012,
            "timesteps": 1000,
            "scale_factor": 0.18215,
            "parameterization": "v",
            "image_size": 64,
            "unet_config": {"params": {"num_heads": 8, "num_head_channels": -1}},
            "cond_stage_config": {"params": {"layer": "penultimate"}},
        },
    }
}
HEADER = {"modelspec.prediction_type": "v", "modelspec.resolution": "768x768"}


def looked_at(path: Path, chance: random.Random) -> Callable[[], None]:
    """All that is asked of a file before a run, and what the run builds of it."""

    def attempt() -> None:
        identify(path)
        source = open_loader(path)
        source.metadata(None)
        if chance.random() < 0.5:
            load_prior(path)
            if source.encoder_layout() == "clip_image":
                source.image_encoder(torch.float32, "cpu")
                source.projection("cpu")
            else:
                source.text_encoder(torch.float32, "cpu")

    return attempt


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_damaged_tensors(tmp_path, form, fuzz):
    def make(chance: random.Random):
        name = chance.choice(list(STATES))
        state = damaged_state(STATES[name], chance)
        path = tmp_path / f"x.{'safetensors' if form == 'safetensors' else 'ckpt'}"
        if form == "safetensors":
            save_file({k: v.contiguous().clone() for k, v in state.items()}, path, HEADER if name == "sd21" else None)
        else:
            state |= {chance.choice(list(state)): chance.choice([*VALUES, torch.zeros(1).expand(10**9)])}
            torch.save(
                chance.choice([state, {"state_dict": state, "global_step": chance.choice(VALUES)}]),
                path,
                _use_new_zipfile_serialization=form == "zip",
            )
        return looked_at(path, chance)

    fuzzed(12 * fuzz, f"tensors {form}", make, 50)


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_damaged_bytes(tmp_path, form, fuzz):
    few = {k: v for k, v in STATES["sd21"].items() if "attn" in k or "input_blocks.0" in k or ".conv_in" in k}
    path = tmp_path / f"x.{'safetensors' if form == 'safetensors' else 'ckpt'}"
    save_file(few, path, HEADER) if form == "safetensors" else torch.save(
        {"state_dict": few, "global_step": 3}, path, _use_new_zipfile_serialization=form == "zip"
    )
    content = path.read_bytes()

    def make(chance: random.Random):
        path.write_bytes(damaged_bytes(content, chance))
        return looked_at(path, chance)

    fuzzed(150 * fuzz, f"bytes {form}", make, 60)


def test_damaged_headers(tmp_path, fuzz):
    """The header of a .safetensors file, still JSON but with other shapes, types and places."""
    path = tmp_path / "x.safetensors"
    save_file({k: v for k, v in STATES["sd21"].items() if "input_blocks" in k}, path, HEADER)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]

    def make(chance: random.Random):
        text = damaged_text(header, chance).encode("utf-8", "replace")
        path.write_bytes(struct.pack("<Q", chance.choice([len(text)] * 20 + [0, 2**40, 2**63])) + text + body)
        return looked_at(path, chance)

    fuzzed(100 * fuzz, "headers", make, 60)


def test_damaged_programs(tmp_path, fuzz):
    """The pickle of a torch file, in an archive that is whole."""
    torch.save({"state_dict": {k: v for k, v in STATES["sd15"].items() if "input_blocks.0" in k}}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    said = next(name for name in parts if name.endswith("data.pkl"))
    path = tmp_path / "x.ckpt"

    def make(chance: random.Random):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", chance.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])) as archive:
            for name, content in parts.items():
                archive.writestr(name, damaged_bytes(content, chance) if name == said else content)
        path.write_bytes(out.getvalue())
        return looked_at(path, chance)

    fuzzed(300 * fuzz, "programs", make, 60)


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_damaged_settings_beside_a_file(tmp_path, suffix, fuzz):
    save_file({k: v.clone() for k, v in STATES["sd21"].items()}, tmp_path / "x.safetensors")

    def make(chance: random.Random):
        (tmp_path / f"x{suffix}").write_bytes(damaged_text(SETTINGS, chance).encode("utf-8", "replace"))
        return lambda: (identify(tmp_path / "x.safetensors"), open_loader(tmp_path / "x.safetensors").text_parts())

    fuzzed((120 if suffix == ".json" else 40) * fuzz, f"settings {suffix}", make, 30)


def test_damaged_checkpoints_are_not_converted_in_part(tmp_path, fuzz):
    def make(chance: random.Random):
        path = tmp_path / "x.safetensors"
        state = damaged_state(STATES[chance.choice(list(STATES))], chance)
        save_file({k: v.contiguous().clone() for k, v in state.items()}, path)

        def attempt() -> None:
            try:
                convert(path, tmp_path / "out", overwrite=True)
            finally:
                left = {p.name for p in tmp_path.iterdir()} - {"x.safetensors", "out"}
                assert not left, left

        return attempt

    fuzzed(6 * fuzz, "convert", make, 30)


# --- Scenes and the original's checkpoints -----------------------------------------------------------------------


def test_damaged_scenes(tmp_path, fuzz):
    from scene_cases import PROVENANCE, tiny_scene

    from dream4d_engine.assets import save_scene

    path = save_scene(tmp_path / "scene.safetensors", tiny_scene(), PROVENANCE)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    inner = {name: json.loads(header["__metadata__"][name]) for name in ("config", "provenance")}

    def make(chance: random.Random):
        if chance.random() < 0.3:
            path.write_bytes(damaged_bytes(content, chance))
        else:
            name = chance.choice(list(inner))
            changed = header | {"__metadata__": header["__metadata__"] | {name: damaged_text(inner[name], chance)}}
            text = json.dumps(changed).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + body)
        return lambda: (read_info(path), load_scene(path))

    fuzzed(400 * fuzz, "scenes", make, 40)


def test_damaged_checkpoints_of_the_original(tmp_path, fuzz):
    content = torch.load(GOLDEN / "stage2.ckpt", weights_only=True)
    settings = json.loads((GOLDEN / "stage2.json").read_text())

    def make(chance: random.Random):
        damaged = dict(content)
        if chance.random() < 0.6:
            damaged["state_dict"] = damaged_state(content["state_dict"], chance)
        if chance.random() < 0.3:
            damaged["global_step"] = chance.choice(VALUES)
        torch.save(damaged, tmp_path / "x.ckpt")
        (tmp_path / "x.json").write_bytes(damaged_text(settings, chance).encode("utf-8", "replace"))
        return lambda: import_checkpoint(tmp_path / "x.ckpt")

    fuzzed(40 * fuzz, "import", make, 30)
