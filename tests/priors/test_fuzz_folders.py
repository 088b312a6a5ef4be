"""Model folders with random damage: they load, or a PriorError says why not, within a bound of time and memory."""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from prior_folders import NEVER_SAID, copy_of, use

from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.formats.identify import identify

ROUNDS, SECONDS, GIGABYTE = 25, 5, 2**30
KINDS = ("image", "pixel", "novel_view")
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 64, 10**5, 10**9, 2**63, 2**64, 10**40, 0.5, 1e-300, 1e300),
    *(float("nan"), float("inf"), "", "x", "../../x", "\ud800", "\x1b[2J", "a" * 10_000, [], [[]], [1] * 1000),
    *({}, {"content": 1}, {"a": {"b": []}}, [None], ["x", 1], "CLIPTokenizer", "UNet3DConditionModel"),
)


def places(node: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values of a document."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def damage_document(path: Path, draw: random.Random) -> None:
    """Change, remove or add some values of a JSON file, or garble its text."""
    if draw.random() < 0.2:
        return damage_bytes(path, draw)
    document = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        place = draw.choice([p for p in places(document) if p] or [()])
        node = document
        for key in place[:-1]:
            node = node[key]
        if not place:
            continue
        action = draw.random()
        if action < 0.7:
            node[place[-1]] = copy.deepcopy(draw.choice(VALUES))
        elif action < 0.85:
            del node[place[-1]]
        elif isinstance(node, dict):
            node[draw.choice(("auto_map", "_class_name", "quantization_config", "x"))] = copy.deepcopy(
                draw.choice(VALUES)
            )
        elif isinstance(node[place[-1]], int | float):
            node[place[-1]] = node[place[-1]] * draw.choice((-1, 2, 1000))
    path.write_text(json.dumps(document), encoding="utf-8")


def damage_bytes(path: Path, draw: random.Random) -> None:
    """Cut a file, or change some of its first bytes, where the sizes of weights are written."""
    content = bytearray(path.read_bytes())
    if draw.random() < 0.3:
        content = content[: draw.randrange(len(content) + 1)]
    for _ in range(draw.choice((0, 1, 3, 30))):
        if content:
            content[draw.randrange(min(len(content), 30_000))] = draw.randrange(256)
    if path.is_symlink():
        path.unlink()
    path.write_bytes(content)


def damage(folder: Path, draw: random.Random) -> str:
    """Damage one file of a folder; return what was done."""
    path = draw.choice(
        sorted(p for p in folder.rglob("*") if (p.is_file() and p.parent != folder) or p.name == "model_index.json")
    )
    if draw.random() < 0.05:
        path.unlink()
        return f"{path.name} removed"
    if path.suffix == ".safetensors" and draw.random() < 0.2:
        state = (
            {"conv_in.weight": torch.zeros(1).expand(2**20, 2**10)} if draw.random() < 0.5 else {"x": torch.zeros(2)}
        )
        path.unlink()
        path = path.with_name("pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin")
        torch.save(state, path, _use_new_zipfile_serialization=draw.random() < 0.5)
    elif path.suffix == ".json":
        damage_document(path, draw)
    else:
        damage_bytes(path, draw)
    return str(path.relative_to(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_folders(tmp_path, kind, fuzz):
    warnings.simplefilter("ignore")
    use(copy_of(kind, tmp_path / "whole"))
    refused = 0
    for seed in range(ROUNDS * fuzz):
        draw = random.Random(f"{kind} {seed}")
        folder = copy_of(kind, tmp_path / "model")
        where = f"seed {seed}: {damage(folder, draw)}"
        start, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for action in (identify, use):
            try:
                action(folder)
            except PriorError as error:
                refused += action is use
                message = str(error)
                assert len(message) < 1500 and message.isprintable(), f"{where}: {message!r}"
                assert not any(word in message for word in NEVER_SAID), f"{where}: {message}"
            except BaseException as error:
                raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        assert time.process_time() - start < SECONDS, where
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < GIGABYTE, where
        shutil.rmtree(folder)
    assert refused >= ROUNDS * fuzz // 3
