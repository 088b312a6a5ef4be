"""Graphs for a real server, and what came of them."""

from __future__ import annotations

import re
from pathlib import Path

from comfy_harness import Server, node, static_nodes
from PIL import Image
from safetensors.torch import load_file

PROMPT = "a red cube is jumping"


def output_files(server: Server, outputs: dict, key: str = "images") -> list[Path]:
    """The files that an output node says it saved."""
    return [server.base / saved["type"] / saved["subfolder"] / saved["filename"] for saved in outputs[key]]


def assert_same_scene(server: Server, one: Path, other: Path) -> None:
    """Equal to the last bit; on a GPU, whose sums come in any order, in the names and shapes alone."""
    first, second = load_file(one), load_file(other)
    assert {n: v.shape for n, v in first.items()} == {n: v.shape for n, v in second.items()}
    if server.on_gpu:
        return
    for name, value in first.items():
        assert value.equal(second[name]), name


def steps_in(events: list, stage: str) -> list[int]:
    """The steps that the lines of text on the nodes tell."""
    lines = [content for kind, content in events if kind == "text"]
    return [int(found[1]) for line in lines if (found := re.match(rf"{stage} (\d+)/", line))]


def ended(kind: str, content) -> bool:
    return kind in ("execution_success", "execution_error", "execution_interrupted")


def image_file(server: Server, name: str, alpha: bool = True, size: int = 48) -> str:
    """An image in the input folder: a red square in the middle, the rest transparent unless `alpha` is False."""
    image = Image.new("RGBA" if alpha else "RGB", (size, size), (255, 255, 255, 0)[: 4 if alpha else 3])
    image.paste((220, 30, 30, 255)[: 4 if alpha else 3], (size // 4, size // 4, size * 3 // 4, size * 3 // 4))
    image.save(server.base / "input" / name)
    return name


def image_nodes(file: str, **changes) -> dict:
    """Nodes 1, 2, 3 and 9: the priors for images, a still scene, and the image it is made from."""
    graph = static_nodes(2, PROMPT, seed=71, recipe="toy-image")
    given = graph["2"]["inputs"]
    del given["multiview_prior"]
    given |= {"novel_view_prior": ["1", 0], "pixel_prior": ["3", 0]}
    given |= {"reference_image": ["9", 0], "reference_mask": ["9", 1]} | changes
    graph["2"]["inputs"] = {name: value for name, value in given.items() if value is not None}
    graph["1"] = node("Dream4DLoadToyPrior", kind="novel_view")
    graph["3"] = node("Dream4DLoadToyPrior", kind="pixel")
    graph["9"] = node("LoadImage", image=file)
    return graph | {"8": node("Dream4DSceneInfo", scene=["2", 0])}
