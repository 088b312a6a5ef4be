"""The circle: true meshes of the toy world -> scenes -> motion by the toy video prior -> the meshes' own vertices,
compared with where the world has them: `python benchmarks/circle.py --workers 2`.

Correlation and amplitude are of the motion's strength over time: how far the vertices have gone along the true motion's
farthest reach, as a share of that reach. The error is the mean distance to the true places, in the object's size.

One CPU thread, seed 0: correlation, amplitude and error of the sliding cone are 0.9995, 0.95, 0.025, of the swaying
torus 0.9991, 0.97, 0.034. With its densities bent but not blurred (`softness` None) the cone has 0.969, 0.91, 0.072:
it drifts to the front and back as it slides, and lies half its way off at the end. With neither (211 in the middle of
that cone, 25 in one from priors) it slides 0.13 of its way. Bent alone, the jumping cube has 0.998, 0.91, 0.038, the
stretching snowman 0.997, 0.84, 0.040.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import common  # noqa: F401  (finds the checkout)
import torch
from torch import Tensor
from toy_meshes import toy_model, true_tracks

from dream4d_engine.assets import load_scene, save_scene
from dream4d_engine.meshes import place
from dream4d_engine.priors.files import toy_prior
from dream4d_engine.surface import track_own_vertices
from dream4d_engine.toyworld.captions import as_caption
from dream4d_engine.training.config import MESH_QUICK, TOY_MOTION, for_mesh_scene, with_rigidity
from dream4d_engine.training.guidance import load_guidance, runtime_for
from dream4d_engine.training.loop import RunControl
from dream4d_engine.training.mesh_fit import fit_mesh
from dream4d_engine.training.motion import train_motion

CAPTIONS = (
    "a red cube is jumping",
    "a blue cone is sliding",
    "a yellow snowman is stretching",
    "a green torus is swaying",
)


@dataclass(frozen=True)
class Case:
    caption: str
    rigidity: float | None  # instead of the recipe's
    out: Path
    seed: int = 0
    device: str = "cpu"
    zoom: float | None = None  # of the deformation; None: chosen by the recipe


def compare(found: Tensor, truth: Tensor, size: float) -> dict[str, float]:
    """Measures of tracks [T, V, 3] in the model's own units."""
    went, true = found - truth[:1], truth - truth[:1]
    reach = true[true.square().sum((1, 2)).argmax()]
    signal, wanted = (((way * reach).sum((1, 2)) / reach.square().sum()) for way in (went, true))
    return {
        "correlation": float(torch.corrcoef(torch.stack((signal, wanted)))[0, 1]),
        "amplitude": float(signal.std() / wanted.std()),
        "error": float((found - truth).norm(dim=-1).mean() / size),
        "still": float(true.norm(dim=-1).mean() / size),  # the error of not moving at all
    }


def still_of(caption: str, out: Path, device: str = "cpu") -> float:
    """Fit the caption's object, unless that was done; return the seconds."""
    caption = as_caption(caption)
    path, model = out / f"{caption.shape}.safetensors", toy_model(caption)
    if path.exists():
        return 0.0
    torch.set_num_threads(1)
    where = torch.device(device)
    scene, summary = fit_mesh(model, place(model, up="z"), MESH_QUICK, seed=0, device=where, control=RunControl())
    save_scene(path, scene)
    return summary.seconds


def measure(case: Case) -> tuple[Case, dict[str, float]]:
    torch.set_num_threads(1)
    caption = as_caption(case.caption)
    model = toy_model(caption)
    still, _ = load_scene(case.out / f"{caption.shape}.safetensors")
    recipe = for_mesh_scene(TOY_MOTION)
    recipe = recipe if case.rigidity is None else with_rigidity(recipe, case.rigidity)
    device = torch.device(case.device)
    runtime = runtime_for(recipe, device, accelerate=False)
    guidance = load_guidance(recipe, {"video": toy_prior("video")}, case.caption, runtime)
    began = time.monotonic()
    control = RunControl()
    scene, _ = train_motion(
        still, recipe, guidance, seed=case.seed, device=device, control=control, deformation_scale=case.zoom
    )
    took = time.monotonic() - began
    times = torch.linspace(0, 1, 17)
    tracks = track_own_vertices(scene, model, place(model, up="z"), times)
    save_scene(case.out / f"{caption.shape}-{caption.motion}-{case.rigidity}-{case.seed}.safetensors", scene)
    found = compare(tracks.positions, true_tracks(caption, model.mesh.vertices, times), model.mesh.size)
    assert scene.deformation is not None
    return case, found | {
        "unconverged": tracks.unconverged,
        "scale": scene.deformation.config.scale,
        "seconds": took,
        "tracking": time.monotonic() - began - took,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the scenes; fits found there are taken")
    parser.add_argument("--captions", nargs="+", default=CAPTIONS)
    parser.add_argument("--rigidity", type=float, nargs="*", default=[None], help="instead of the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--zoom", type=float, help="the deformation's scale (default: the recipe's choice)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        one_each = list({as_caption(c).shape: c for c in options.captions}.values())
        seconds = pool.starmap(still_of, [(c, options.out, options.device) for c in one_each])
        print("fits:", ", ".join(f"{c}: {s:.0f} s" for c, s in zip(one_each, seconds, strict=True)), flush=True)
        cases = [
            Case(c, r, options.out, seed, options.device, options.zoom)
            for seed in options.seeds
            for c in options.captions
            for r in options.rigidity
        ]
        for case, found in pool.imap_unordered(measure, cases, chunksize=1):
            shown = {k: round(v, 4) for k, v in found.items()}
            weight = "own" if case.rigidity is None else f"{case.rigidity:g}"
            print(case.caption, f"rigidity {weight}", f"seed {case.seed}", json.dumps(shown), flush=True)
            with (options.out / "circle.jsonl").open("a") as file:
                file.write(json.dumps(asdict(case) | {"out": ""} | found) + "\n")


if __name__ == "__main__":
    main()
