"""The whole pack inside ComfyUI's Python, without a server: its nodes, and the engine under them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path

NAME = "dream4d_pack"


def pack(name: str) -> types.ModuleType:
    """A module of the pack; ComfyUI's options have to be parsed."""
    if NAME not in sys.modules:
        root = Path(__file__).resolve().parents[2]
        spec = importlib.util.spec_from_file_location(
            NAME, root / "__init__.py", submodule_search_locations=[str(root)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return importlib.import_module(f"{NAME}.{name}")
