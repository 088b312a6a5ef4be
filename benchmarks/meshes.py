"""How well and how fast a scene is made of a mesh, judged by three.js: `python benchmarks/meshes.py FILE.glb ...`.

For each file: how alike our own images of the mesh and three.js's are, then the fit's seconds, and how alike its
renders and three.js's are, over eight views of 256x256 that it was not trained on. PSNR over whole images before white,
IoU of what is more than half covered. The word "soup" instead of a file: a figure of open layered shells, judged by our
own images. `--out` keeps the images beside each other: the mesh above, the scene below. `--scenes FOLDER` judges scenes
that `dream4d import` made elsewhere, on a machine without a browser: FOLDER/NAME.safetensors of NAME.glb.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import torch
from browsers import HERE, find_browser
from PIL import Image
from torch import Tensor
from toy_meshes import soup

from dream4d_engine.assets import load_scene
from dream4d_engine.cameras import CameraBatch, make_cameras
from dream4d_engine.export import save_image
from dream4d_engine.meshes import Placement, place, read_model
from dream4d_engine.meshes.container import read_gltf
from dream4d_engine.meshes.look import MeshImages, look_at, surface_of
from dream4d_engine.meshes.poses import clip_names
from dream4d_engine.rendering import RenderOptions, render_chunked
from dream4d_engine.training.config import MESH_RECIPES
from dream4d_engine.training.loop import RunControl
from dream4d_engine.training.mesh_fit import fit_mesh, mesh_match, mesh_recipe

SIZE, SUPERSAMPLE = 256, 4


def judges() -> CameraBatch:
    """Eight cameras [8, 1] that no fit is trained on, from below to above."""
    azimuth = torch.arange(8) * (math.pi / 4) + 0.3
    elevation = torch.deg2rad(torch.tensor([15.0, -20.0, 40.0, 0.0, 65.0, 10.0, -45.0, 25.0]))
    return make_cameras(azimuth[:, None], elevation[:, None], 3.0, math.radians(40), 0.0, SIZE, SIZE)


def in_three(path: Path, placement: Placement, cameras: CameraBatch, clip: int = 0) -> MeshImages:
    """What three.js shows of a file at the beginning of a clip, to cameras of the scene's world [B, 1]."""
    rotation = torch.tensor(placement.rotation)
    wanted = []
    for c2w, fov in zip(cameras.c2w[:, 0], cameras.fov_y[:, 0], strict=True):
        matrix = torch.eye(4)
        matrix[:3, :3], matrix[:3, 3] = rotation.mT @ c2w[:3, :3], placement.from_world(c2w[:3, 3])
        columns, far = matrix.mT.flatten().tolist(), 10 / placement.scale
        wanted.append({"matrix": columns, "fov": math.degrees(fov), "seconds": 0.0, "near": far / 1000, "far": far})
    size = cameras.height * SUPERSAMPLE
    with tempfile.TemporaryDirectory() as folder:
        command = ["node", HERE / "gltf.mjs", find_browser(), path, folder, str(size), json.dumps(wanted)]
        look = json.dumps({"clip": clip, "bare": True})
        done = subprocess.run([*command, look], capture_output=True, text=True, timeout=600)
        if done.returncode or "error" in json.loads(done.stdout):
            raise SystemExit(f"three.js could not show {path}: {done.stderr or done.stdout}")
        shots = [np.asarray(Image.open(Path(folder) / f"{n}.png").convert("RGBA")) for n in range(len(wanted))]
    pixels = torch.from_numpy(np.stack(shots)).float() / 255
    pixels[..., :3] *= pixels[..., 3:]
    fine = pixels.view(len(shots), cameras.height, SUPERSAMPLE, cameras.width, SUPERSAMPLE, 4).mean((2, 4))[:, None]
    mask = fine[..., 3:]
    return MeshImages(fine[..., :3] / mask.clamp_min(1e-6), mask, torch.zeros_like(mask))


def alike(one: MeshImages, other: MeshImages) -> tuple[float, float]:
    """PSNR before white and IoU."""
    a, b = (image.rgb * image.mask + 1 - image.mask for image in (one, other))
    solid, covered = one.mask > 0.5, other.mask > 0.5
    error = float((a - b).square().mean())
    return -10 * math.log10(max(error, 1e-12)), float((solid & covered).sum() / (solid | covered).sum())


def measure(name: str, recipe: str | None, out: Path | None, clip: str | None, scenes: Path | None) -> None:
    """Print what becomes of one file, at the beginning of a clip of its own (the first one unless told)."""
    cameras = judges()
    if name == "soup":
        model = soup()
        placement = place(model, up="z")
        judge = look_at(surface_of(model, placement), cameras)
    else:
        path = Path(name)
        clips = clip_names(read_gltf(path))
        clip = clip or next(iter(clips), None)
        model = read_model(path, clip, 0.0)
        placement = place(model)
        judge = in_three(path, placement, cameras, clips.index(clip) if clip is not None else 0)
        psnr, iou = alike(judge, look_at(surface_of(model, placement), cameras))
        print(f"{path.name}, {clip}: our images and three.js's {psnr:.1f} dB, IoU {iou:.4f}", flush=True)
    if scenes is not None:
        scene, how = load_scene(scenes / f"{Path(name).stem}.safetensors")[0], "made elsewhere"
    else:
        began = time.perf_counter()
        chosen = MESH_RECIPES[recipe] if recipe else mesh_recipe(common.DEVICE)
        scene, summary = fit_mesh(model, placement, chosen, seed=0, device=common.DEVICE, control=RunControl())
        common.wait()
        took = time.perf_counter() - began
        how = f"{chosen.name}, {took:.0f} s in all, {summary.steps} steps of {1e3 * summary.seconds_per_step:.0f} ms"
    psnr, iou = mesh_match(scene, judge, cameras)
    print(f"{name}: {psnr:.1f} dB, IoU {iou:.4f}; {how}", flush=True)
    if out is not None:
        found = render_chunked(scene, cameras, RenderOptions(background=torch.ones(3)))
        above = (judge.rgb * judge.mask + 1 - judge.mask)[:, 0]
        save_image(out / f"{Path(name).stem}.png", torch.cat((_row(above), _row(found.rgb[:, 0]))))


def _row(images: Tensor) -> Tensor:
    return torch.cat(list(images), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="GLB files, or soup")
    parser.add_argument("--recipe", choices=list(MESH_RECIPES), help="the one that suits the device unless told")
    parser.add_argument("--clip", help="the first one of each file unless told")
    parser.add_argument("--out", type=Path, help="folder for the images")
    parser.add_argument("--scenes", type=Path, help="folder of scenes that are there already")
    options = parser.parse_args()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    for name in options.files:
        measure(name, options.recipe, options.out, options.clip, options.scenes)


if __name__ == "__main__":
    main()
