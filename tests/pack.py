"""The parts of the pack that need no ComfyUI, and how its nodes lie in a workflow."""

from __future__ import annotations

import importlib
import sys
import types

from comfy_harness import REPOSITORY

NODES = REPOSITORY / "nodes"
HEAD = 30  # height of a node's head, which lies above its place
# How high nodes become at a width of 340 when they show a square video or a live preview, as the page measures it
# (test_browser.py compares).
GROWN = {"SaveVideo": 440, "Dream4DOptimizeStaticScene": 700, "Dream4DAnimateScene": 700, "Dream4DPreview4D": 460}


def part_of_the_pack(name: str) -> types.ModuleType:
    """Import a module of nodes/ that knows no ComfyUI, without running the package's own imports."""
    for package, place in (("dream4d_pack", REPOSITORY), ("dream4d_pack.nodes", NODES)):
        if package not in sys.modules:
            module = types.ModuleType(package)
            module.__path__ = [str(place)]
            sys.modules[package] = module
    return importlib.import_module(f"dream4d_pack.nodes.{name}")


def overlaps(boxes: list[tuple[object, float, float, float, float]]) -> list[tuple[object, object]]:
    """The pairs of boxes (name, x, y, width, height) that lie over each other."""
    found = []
    for number, (one, x, y, width, height) in enumerate(boxes):
        for other, left, top, wide, high in boxes[:number]:
            if x < left + wide and left < x + width and y < top + high and top < y + height:
                found.append((other, one))
    return found
