"""How far it is from a command to where things happen: `python benchmarks/hops.py` takes two steps, about ten seconds.

Counts our own functions and modules on the stack when a UNet, the backward pass and the optimizer are first called: a
stack trace with fewer of them is easier to follow.
"""

from __future__ import annotations

import sys
import tempfile
from functools import wraps
from pathlib import Path

import common  # noqa: F401  (finds the checkout)
import torch
from diffusers import UNet2DConditionModel

import dream4d_engine
from dream4d_engine.cli import main as dream4d

OURS = str(Path(dream4d_engine.__file__).resolve().parent)
STEPS = ["--steps", "2", "--size", "16", "--orbit-frames", "2"]


def watch(found: dict[str, list[str]], owner: type, method: str, name: str) -> None:
    """Have `owner.method` note which files of ours are on the stack, at its first call."""
    real = getattr(owner, method)

    @wraps(real)
    def call(*args, **kwargs):
        if name not in found:
            found[name], frame = [], sys._getframe(1)
            while frame is not None:
                code = frame.f_code
                if code.co_filename.startswith(OURS) and not code.co_name.startswith("<"):  # no module, no lambda
                    found[name].append(code.co_filename)
                frame = frame.f_back
        return real(*args, **kwargs)

    setattr(owner, method, call)


def main() -> None:
    found: dict[str, list[str]] = {}
    watch(found, UNet2DConditionModel, "forward", "UNet")
    watch(found, torch.Tensor, "backward", "backward pass")
    watch(found, torch.optim.AdamW, "step", "optimizer")
    with tempfile.TemporaryDirectory() as folder:
        code = dream4d(["text-to-3d", "a red cube", *STEPS, "--out", f"{folder}/run"])
    for name, files in found.items():
        print(f"{name}: {len(files)} frames in {len(set(files))} modules")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
