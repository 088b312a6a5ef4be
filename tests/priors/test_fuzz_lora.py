"""LoRA files that are changed at random: each is read, or refused in one sentence, in little time and memory."""

from __future__ import annotations

import json
import math
import random
import re
import resource
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.formats.identify import identify, open_loader
from dream4d_engine.priors.formats.lora_files import lora_files, read_lora
from dream4d_engine.priors.lora import add_layers

ROUNDS, SECONDS, BYTES = 1200, 5.0, 2**30
LAYERS = ("down_blocks.0.attentions.0.to_q", "down_blocks.0.attentions.0.to_out.0", "mid_block.proj_in")
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
ODD = (
    None,
    True,
    -1,
    0,
    4,
    1e308,
    -(10**40),
    2**63,
    math.nan,
    math.inf,
    "",
    "4",
    "\x00\x1b[2J\n",
    "é" * 300,
    [],
    {},
    [[]],
)
WORDS = (
    "lora_A",
    "lora_B",
    "lora_down",
    "lora_up",
    "alpha",
    "weight",
    "bias",
    "to_q",
    "processor",
    "to_q_lora",
    "lora",
)
WORDS += (
    "hada_w1_a",
    "lokr_w2",
    "dora_scale",
    "lora_mid",
    "diff",
    "unet",
    "text_encoder",
    "lora_unet_input_blocks_4_1",
)
WORDS += ("lora_te2_x", "transformer", "base_model.model", "default", "", ".", "..", "\udcff", "\n", "x" * 5000, "0")
SETTINGS = ("r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "bias", "use_dora", "peft_type", "unet.r")
SETTINGS += ("unet.lora_alpha", "text_encoder.lora_alpha", "init_lora_weights", "modules_to_save", "new", "unet.", ".")
PATTERNS = (
    "to_q",
    "(",
    "(a+)+$",
    r"(\w|\w\w|\.)+[v-z]",
    "(?P<a>x",
    "[",
    "*",
    "\\",
    "(?i)q",
    "a{9999999}",
    "(" * 500,
    "|",
    "",
)
TYPES = ("F32", "F16", "BF16", "F64", "I8", "I64", "BOOL", "F8_E4M3", "F4", "C64", "U16", "", "f32", 4, None)


class TinyNetwork(torch.nn.Module):
    """Layers under the names above."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"layers_per_block": 2})()
        for name in (*LAYERS, TEXT):
            place: torch.nn.Module = self
            *heads, last = name.split(".")
            for head in heads:
                place.add_module(head, getattr(place, head, None) or torch.nn.Module())
                place = getattr(place, head)
            place.add_module(last, torch.nn.Linear(8, 8))


def plain_file(rng: random.Random) -> tuple[dict, dict[str, str], bytes]:
    """The entries, the metadata and the data of a good file in one of the formats."""
    style = rng.randrange(4)
    state = {}
    for name in (*LAYERS, TEXT):
        rank = rng.choice((1, 2, 4))
        root = ("text_encoder." if name == TEXT else "unet.") + name
        if style == 1:
            root = ("lora_te_" if name == TEXT else "lora_unet_") + name.replace(".", "_")
            state[f"{root}.alpha"] = torch.tensor(2.0)
        if style == 2:
            root = f"base_model.model.{name}"
        down, up = (("lora.down", "lora.up"), ("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora_A.x", "lora_B.x"))[
            style
        ]
        kind = rng.choice((torch.float32, torch.float16, torch.bfloat16))
        state |= {
            f"{root}.{down}.weight": torch.ones(rank, 8, dtype=kind),
            f"{root}.{up}.weight": torch.ones(8, rank, dtype=kind),
        }
    raw = save(state)
    size = struct.unpack("<Q", raw[:8])[0]
    header = (
        {"r": 4, "lora_alpha": 8} if rng.random() < 0.5 else {"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_q": 2}}
    )
    metadata = {"lora_adapter_metadata": json.dumps({k: v for k, v in header.items() if k != "r"})}
    return json.loads(raw[8 : 8 + size]), metadata if rng.random() < 0.5 else {}, raw[8 + size :]


def change(entries: dict, metadata: dict, data: bytearray, rng: random.Random) -> bool:
    """Make one change; return whether the header is to be written as it is, however wrong."""
    key = rng.choice(sorted(entries)) if entries else ""
    what = rng.randrange(12)
    if what == 0 and entries:  # another name
        parts = key.split(".")
        parts[rng.randrange(len(parts))] = rng.choice(WORDS)
        entries[".".join(parts)] = entries.pop(key)
    elif what == 1 and entries:
        entries.pop(key)
    elif what == 2 and entries:  # another shape of as many numbers, or of others
        shape = entries[key].get("shape") or [1]
        n = math.prod(s for s in shape if isinstance(s, int)) if all(isinstance(s, int) for s in shape) else 8
        entries[key]["shape"] = rng.choice(
            ([n], [1, n], [n, 1], [], [2, n // 2], [0, n], [n, 1, 1, 1], [-1], [2**62, 2**62], [1] * 70, "8", None)
        )
    elif what == 3 and entries:
        entries[key]["dtype"] = rng.choice(TYPES)
    elif what == 4 and entries:
        entries[key]["data_offsets"] = rng.choice(([0, 0], [0, 32], [-1, 4], [0, 2**63], [4], None, "0", [32, 0]))
    elif what == 5 and data:  # other numbers, NaN among them
        for _ in range(rng.choice((1, 40))):
            data[rng.randrange(len(data))] = rng.choice((0, 0xFF, 0x7F, 0x7C, rng.randrange(256)))
    elif what == 6:
        del data[rng.randrange(len(data) + 1) :]
    elif what in (7, 8):
        metadata["lora_adapter_metadata"] = (
            json.dumps(settings(rng)) if rng.random() < 0.8 else rng.choice(("null", "[", "[" * 9999, "1" * 9999, ""))
        )
    elif what == 9:
        metadata[rng.choice(("format", "ss_network_alpha", "x"))] = rng.choice(("", "pt", "x" * 10000))
    elif what == 10:
        return True
    return False


def settings(rng: random.Random) -> object:
    if rng.random() < 0.1:
        return rng.choice(ODD)
    found = {}
    for _ in range(rng.randrange(1, 5)):
        name = rng.choice(SETTINGS)
        value = rng.choice((*ODD, 8, 8, 4))
        if name.endswith("pattern") and rng.random() < 0.8:
            value = {rng.choice(PATTERNS): rng.choice((*ODD, 4, 4, 4)) for _ in range(rng.randrange(1, 4))}
        found[name] = value
    return found


def written(folder: Path, rng: random.Random) -> Path:
    """Write one changed file, with settings beside it or without, as .safetensors or as torch's own."""
    entries, metadata, data = plain_file(rng)
    changed = bytearray(data)
    damaged = any([change(entries, metadata, changed, rng) for _ in range(rng.choice((1, 1, 2, 5)))])
    text = json.dumps(({"__metadata__": metadata} if metadata else {}) | entries).encode("utf-8", "surrogatepass")
    raw = bytearray(struct.pack("<Q", len(text)) + text + bytes(changed))
    if damaged:
        for _ in range(rng.choice((1, 10))):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    path = folder / rng.choice(("adapter_model.safetensors", "mine.safetensors", "pytorch_lora_weights.safetensors"))
    path.write_bytes(bytes(raw))
    if rng.random() < 0.3:
        text = json.dumps(settings(rng)) if rng.random() < 0.8 else rng.choice(("", "[", "{" * 9999, "\ufeff{}", "NaN"))
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    return path if rng.random() < 0.7 else folder


def torch_state(rng: random.Random) -> dict:
    """A table as torch.save writes it, with what such a file may hold instead of matrices."""
    state = {}
    for name in LAYERS:
        for half, shape in (("A", (2, 8)), ("B", (8, 2))):
            odd = (
                torch.ones(()),
                torch.ones(0, 8),
                torch.ones(8, 2).T,
                torch.ones(1).expand(2, 10**9),
                torch.full((2, 8), math.nan),
                torch.ones(2, 8).to_sparse(),
                torch.ones(2, 8, dtype=torch.int64),
                torch.ones(2, 8, dtype=torch.complex64),
                "text",
                None,
                [1.0],
                {},
            )
            state[f"unet.{name}.lora_{half}.weight"] = rng.choice(odd) if rng.random() < 0.2 else torch.ones(shape)
    return state


def try_file(path: Path) -> str | None:
    """Read a file in all ways; return what was said, or None where it is a LoRA."""
    said = None
    for use in (read_lora, identify, open_loader, lora_files):
        try:
            found = use(path)
        except PriorError as error:
            said = str(error) if use is read_lora else said
            assert "\n" not in str(error) and len(str(error)) < 2000, str(error)
            assert not re.search("unexpected|defect|Traceback|KeyError", str(error)), str(error)
            continue
        if use is read_lora:
            layers = [layer for part in found.values() for layer in part.values()]
            assert layers and all(math.isfinite(layer.scale) for layer in layers)
            assert all(half.isfinite().all() for layer in layers for half in (layer.down, layer.up))
            assert all(layer.up.flatten(1).shape[1] == len(layer.down) for layer in layers)
            try_to_add({name: layer for part in found.values() for name, layer in part.items()})
    return said


def try_to_add(layers) -> None:
    """Either all of it is added, in finite numbers, or nothing."""
    network = TinyNetwork()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    try:
        add_layers(network, layers, 1.0, "it")
    except PriorError:
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(value.isfinite().all() for value in network.state_dict().values())


def memory() -> int:
    """The most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bounded(path: Path) -> str | None:
    start, before = time.process_time(), memory()
    said = try_file(path)
    assert time.process_time() - start < SECONDS and memory() - before < BYTES
    return said


@pytest.mark.parametrize("seed", range(4))
def test_changed_files(tmp_path, fuzz, seed):
    rng = random.Random(seed)
    read, refused = 0, set()
    for i in range(ROUNDS * fuzz // 4):
        folder = tmp_path / str(i)
        folder.mkdir()
        said = bounded(written(folder, rng))
        read += said is None
        refused |= {re.sub(r"\d+|/\S+|'.*'", "", said)[:60]} if said else set()
    assert read > 9 and len(refused) > 20  # else the changes try nothing


def test_changed_torch_files(tmp_path, fuzz):
    rng = random.Random(7)
    results = []
    for i in range(20 * fuzz):
        path = tmp_path / f"{i}.bin"
        torch.save(torch_state(rng), path)
        results.append(bounded(path))
    assert any(results)


@pytest.mark.parametrize(
    "name", ["x" * 10**5, "a." * 10**5, "unet." + ".lora_A" * 10**4, ".processor" * 10**4 + ".to_q_lora.down.weight"]
)
def test_long_names(tmp_path, name):
    from safetensors.torch import save_file

    save_file({name: torch.ones(2, 8)}, tmp_path / "a.safetensors")
    assert bounded(tmp_path / "a.safetensors")


def test_many_layers_and_many_patterns(tmp_path):
    from safetensors.torch import save_file

    state = {f"unet.b.{i}.lora_{half}.weight": torch.ones(1, 1) for i in range(5000) for half in "AB"}
    patterns = {rf"b\.{i}\.(x|y).*": 2 for i in range(2000)}
    save_file(
        state, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": patterns})}
    )
    said = bounded(tmp_path / "a.safetensors")
    assert said is None or "takes too long to match" in said
