"""Exported files in somebody else's renderer: three.js in a headless browser, beside our own images."""

from __future__ import annotations

import json
import math
import subprocess

import numpy as np
import pytest
import torch
from browsers import HERE, find_browser, why_no_browser, why_no_module
from exact_scene import exact_scene, stretch
from PIL import Image

from dream4d_engine.cameras import make_cameras
from dream4d_engine.export import ExportOptions, export_scene
from dream4d_engine.export.gltf import y_up
from dream4d_engine.rendering import render_chunked
from dream4d_engine.surface import SurfaceOptions

SIZE, TIMES = 128, (0.1, 0.25, 0.7)


@pytest.mark.parametrize("texture", [0, 256])
def test_three_shows_what_we_render(tmp_path, texture: int) -> None:
    for module in ("skimage", "fast_simplification", "xatlas"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    if reason := why_no_browser() or why_no_module("three"):
        pytest.skip(reason)
    scene = exact_scene("snowman", stretch)
    surface = SurfaceOptions(resolution=48, n_faces=3000)
    export_scene(scene, tmp_path / "model.glb", ExportOptions(13, texture=texture, surface=surface))
    azimuth, elevation = torch.tensor([[0.3, 2.0, -2.0]]), torch.tensor([[0.2, 0.5, -0.2]])
    cameras = make_cameras(azimuth, elevation, 3.0, math.radians(40), torch.tensor([TIMES]), SIZE, SIZE)
    wanted = [
        {"position": y_up(place).tolist(), "fov": 40, "seconds": 2 * time}
        for place, time in zip(cameras.position[0], TIMES, strict=True)
    ]
    command = [
        "node",
        HERE / "gltf.mjs",
        find_browser(),
        tmp_path / "model.glb",
        tmp_path,
        str(SIZE),
        json.dumps(wanted),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen == {"clips": [2], "errors": []}
    ours = render_chunked(scene, cameras)
    for view in range(len(TIMES)):
        image = torch.from_numpy(np.array(Image.open(tmp_path / f"{view}.png").convert("RGB"))) / 255
        shown, solid = image.sum(-1) > 0.05, ours.opacity[0, view, ..., 0] > 0.5
        assert (shown & solid).sum() / (shown | solid).sum() > 0.95
        clear = shown & (ours.opacity[0, view, ..., 0] > 0.99)
        assert (image - ours.rgb[0, view])[clear].abs().mean() < 0.03
