"""A tiny scene with everything a scene can have, and where it came from."""

from __future__ import annotations

import torch

from dream4d_engine.assets import Provenance
from dream4d_engine.fields.background import BackgroundConfig
from dream4d_engine.fields.deformation import DeformationConfig
from dream4d_engine.fields.encodings import HashGridConfig
from dream4d_engine.fields.radiance import RadianceConfig
from dream4d_engine.scene import Scene, SceneConfig, build_scene

GRID = HashGridConfig(n_levels=2, log2_entries=4, base_resolution=2, growth=1.5)
CONFIG = SceneConfig(
    radiance=RadianceConfig(GRID, hidden_width=4),
    deformation=DeformationConfig(GRID, hidden_width=4, hidden_layers=1, scale=1.25),
    background=BackgroundConfig(hidden_width=4, hidden_layers=1),
    occupancy_resolution=4,
    n_samples=32,
)
PROVENANCE = Provenance(
    "ein roter Würfel", "text-to-3d/toy", 3, 250, {"torch": "2.13"}, parent=Provenance(prompt="a cube")
)


def tiny_scene(config: SceneConfig = CONFIG) -> Scene:
    scene = build_scene(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in scene.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    if scene.deformation is not None:
        scene.deformation.set_active_levels(1)
    scene.refresh_occupancy()
    return scene
