"""What a command is: a file of this folder that holds one as COMMAND, and a line in FILES."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import UsageError

FILES = {
    "text-to-3d": "text_to_3d",
    "image-to-3d": "image_to_3d",
    "animate": "animate",
    "text-to-4d": "text_to_4d",
    "image-to-4d": "image_to_4d",
    "batch": "batch",
    "motion": "motion",
    "render": "render",
    "export": "export",
    "import": "import_scene",
    "info": "info",
    "bench": "bench",
    "priors": "priors",
    "convert": "convert",
}
"""Every command's file. Its first line is what `dream4d --help` says of it."""


@dataclass(frozen=True)
class Command:
    """What a command's file registers."""

    options: type  # a frozen dataclass: its fields are the flags, the texts below them their help
    run: Callable[..., int]  # (options, *recipes) -> exit code; it says by itself what is to be said
    with_recipes: Callable[[Any], tuple] = lambda options: (options,)
    """options as far as they are known -> them and the recipes they name, whose numbers become flags too."""


def find_command(name: str) -> Command:
    """Import a command's file."""
    if name not in FILES:
        raise UsageError(f"unknown command {name!r}: choose one of {', '.join(FILES)}")
    return import_module(f".{FILES[name]}", __package__).COMMAND


def help_text() -> str:
    """The text of `dream4d --help`. The files are read, not imported: that would bring torch in."""
    lines = []
    for name, file in FILES.items():
        tree = ast.parse(Path(__file__).with_name(f"{file}.py").read_text(encoding="utf-8"))
        about, _, _ = (ast.get_docstring(tree) or "").partition("\n")
        lines.append(f"  {name:<12}{about}")
    return "\n".join(
        [
            "dream4d: from a sentence, an image or a mesh to a moving object.",
            "",
            "usage: dream4d COMMAND ... (dream4d COMMAND --help says more)",
            "",
            *lines,
            "",
            'For example: dream4d text-to-4d "a red cube is jumping" --out demo',
        ]
    )
