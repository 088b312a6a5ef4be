"""How well and how fast a scene is made of a mesh, judged by three.js: `python benchmarks/meshes.py FILE.glb ...`.

For each file: how alike our own images of the mesh and three.js's are, then the fit's seconds, and how alike its renders
and three.js's are, over eight views of 256x256 that it was not trained on. PSNR over whole images before white, IoU of
what is more than half covered. `--out` keeps the images beside each other: three.js above, the scene below.
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

from dream4d_engine.cameras import CameraBatch, make_cameras
from dream4d_engine.export import save_image
from dream4d_engine.meshes import Model, Placement, place
from dream4d_engine.meshes.look import MeshImages, look_at, surface_of
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


def in_three(path: Path, placement: Placement, cameras: CameraBatch, clip: int = 0, seconds: float = 0.0) -> MeshImages:
    """What three.js shows of a file to cameras of the scene's world [B, 1]."""
    rotation = torch.tensor(placement.rotation)
    wanted = []
    for c2w, fov in zip(cameras.c2w[:, 0], cameras.fov_y[:, 0], strict=True):
        matrix = torch.eye(4)
        matrix[:3, :3], matrix[:3, 3] = rotation.mT @ c2w[:3, :3], placement.from_world(c2w[:3, 3])
        matrix_list, far = matrix.mT.flatten().tolist(), 10 / placement.scale
        wanted.append(
            {"matrix": matrix_list, "fov": math.degrees(fov), "seconds": seconds, "near": far / 1000, "far": far}
        )
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
