"""What the live preview costs: `python benchmarks/previews.py` runs the toy recipes with previews and without.

Two figures, because one machine's clock is noisy: the share of the run that rendering and showing took, measured
inside, and the processor time of the whole process with previews against without. Needs no ComfyUI.
"""

from __future__ import annotations

import argparse
import io
import time
from dataclasses import replace

import common  # noqa: F401  (finds the checkout and its tests)
import torch
from pack import part_of_the_pack

from dream4d_engine.priors.files import toy_prior
from dream4d_engine.priors.networks.execution import Runtime
from dream4d_engine.training.config import TOY_MOTION, TOY_STATIC
from dream4d_engine.training.guidance import load_guidance
from dream4d_engine.training.loop import RunControl
from dream4d_engine.training.motion import train_motion
from dream4d_engine.training.static import train_static

PROMPT, CPU = "a red cube is jumping", torch.device("cpu")


def as_the_server_does(image) -> None:
    """Encode what the server sends; there it happens on the server's own thread."""
    image.save(io.BytesIO(), "JPEG", quality=95)


def measure(train, seconds: float) -> tuple[object, float, float, object]:
    """Return (result, processor seconds, seconds, cost) of a run with a preview every `seconds` (0: none)."""
    preview = part_of_the_pack("preview").LivePreview(as_the_server_does, seconds)
    used, began = time.process_time(), time.monotonic()
    result = train(RunControl(on_step=lambda _, scene: preview.offer(scene)))
    preview.close()
    return result, time.process_time() - used, time.monotonic() - began, preview.cost


def main() -> None:
    """Measure both stages and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250, help="of each stage")
    parser.add_argument("--seconds", type=float, default=4.0, help="between previews; the nodes' default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    still, moving = (replace(recipe, steps=options.steps) for recipe in (TOY_STATIC, TOY_MOTION))
    looks = {kind: toy_prior(kind) for kind in ("multiview", "video")}
    views, films = (load_guidance(recipe, looks, PROMPT, Runtime(CPU)) for recipe in (still, moving))

    def static(control):
        return train_static(still, views, seed=0, device=CPU, control=control)[0]

    scene = static(RunControl())  # once before anything is measured: the first run is slower

    def motion(control):
        return train_motion(scene, moving, films, seed=0, device=CPU, control=control)[0]

    print("stage   previews  share of the run  processor s with, without")
    for name, train in (("static", static), ("motion", motion)):
        _, without, _, _ = measure(train, 0.0)
        _, used, seconds, cost = measure(train, options.seconds)
        share = (cost.rendering + cost.showing) / seconds
        print(f"{name}  {cost.made:8d}  {share:16.1%}  {used:12.1f} {without:8.1f} ({used / without - 1:+.1%})")


if __name__ == "__main__":
    main()
