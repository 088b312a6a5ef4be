"""What is declared as needed: in one way everywhere, and nothing that is imported is left out."""

from __future__ import annotations

import ast
import sys

import pytest
from comfy_harness import REPOSITORY
from floors import floors, of_the_project

IMPORTED_AS = {"PIL": "pillow", "yaml": "pyyaml", "skimage": "scikit-image"}
IMPORTED_AS |= {"tokenizers": "transformers", "scipy": "scikit-image"}  # they come with the other's own version
OPTIONAL = {"triton", "tinycudann", "nerfacc", "cuda", "tomllib"}  # tried, and done without
COMFYUI = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "server", "nodes", "node_helpers"}
COMFYUI |= {"aiohttp"}  # ComfyUI's own server


def test_both_lists_name_the_same_lowest_versions():
    listed = floors((REPOSITORY / "requirements.txt").read_text(encoding="utf-8"))
    declared = of_the_project() | of_the_project("mesh")  # nodes make meshes, too
    assert listed and declared and all(declared.get(name) == version for name, version in listed.items())
    # ComfyUI brings its own torch, its nodes need no command line, and textures are baked by who asks for them
    assert declared.keys() - listed.keys() == {"torch", "tyro", "rich", "xatlas"}
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").split()
    assert len(lines) == len(listed) and all(">=" in line for line in lines)


def test_torch_reads_weights_only_safely():
    """Before 2.6, its unpickler for weights could be got around (CVE-2025-32434)."""
    assert tuple(map(int, of_the_project()["torch"].split("."))) >= (2, 6)


@pytest.mark.parametrize("room", ["dream4d_engine", "nodes"])
def test_whatever_is_imported_is_declared(room):
    declared = of_the_project() | of_the_project("cpu") | of_the_project("mesh") | of_the_project("ray")
    for path in sorted((REPOSITORY / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.partition(".")[0] for name in names} - OPTIONAL - COMFYUI - {"dream4d_engine", ""}:
                package = IMPORTED_AS.get(top, top).lower().replace("_", "-")
                assert top in sys.stdlib_module_names or package in declared, f"{path.name}:{node.lineno}: {top}"
