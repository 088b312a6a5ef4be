"""Recipes, scenes and guidance that are quick to train, on priors whose answer is known."""

import math
from dataclasses import replace

import torch

from dream4d_engine.cameras import CameraRanges, fixed_take, sample_views
from dream4d_engine.fields.background import BackgroundConfig
from dream4d_engine.fields.deformation import DeformationConfig
from dream4d_engine.fields.encodings import HashGridConfig
from dream4d_engine.fields.radiance import RadianceConfig
from dream4d_engine.guidance.denoiser import Conditions
from dream4d_engine.guidance.distillation import DistillationConfig, Guidance
from dream4d_engine.rendering import render_chunked
from dream4d_engine.scene import build_scene
from dream4d_engine.schedules import Schedule, constant
from dream4d_engine.supervision import RandomBackground, RegularizerWeights
from dream4d_engine.toyworld.ideal import IdealDenoiser
from dream4d_engine.toyworld.world import render_caption
from dream4d_engine.training.config import (
    TOY_MOTION,
    TOY_STATIC,
    GuidanceTerm,
    LoopConfig,
    OptimizerConfig,
    Phase,
    StaticRecipe,
)

CPU = torch.device("cpu")
SMALL = replace(
    TOY_STATIC.scene,
    radiance=RadianceConfig(grid=HashGridConfig(n_levels=4, log2_entries=11, base_resolution=4, growth=1.5)),
    n_samples=32,
    occupancy_resolution=16,
)
SOLID = RandomBackground(probability=0.0)
GREY = (0.5, 0.5, 0.5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ideal_guidance(images, config):
    """The guidance of a prior that knows exactly one group of images [F, H, W, 3]."""
    denoiser = IdealDenoiser(images.movedim(-1, 1)[None])

    def conditions(cameras):
        tokens = Conditions(torch.zeros(*cameras.shape, 1, 1))
        return tokens, tokens

    return Guidance("ideal", denoiser, conditions, config)


def static_case(steps=60, size=16):
    """A recipe of four fixed views, and the guidance that wants a red cube in them."""
    ranges = CameraRanges((0, 0), (15, 15), (40, 40), (3, 3), relative_distance=False)
    config = DistillationConfig(1.0, Schedule(0.9, 0.1), Schedule(0.95, 0.2), loss="x0", shared_timestep=True)
    recipe = StaticRecipe(
        name="test",
        steps=steps,
        scene=SMALL,
        cameras=ranges,
        n_views=4,
        phases=(Phase(0.0, 1, size, size),),
        guidance=(GuidanceTerm("multiview", 1.0, config),),
        regularizers=RegularizerWeights(opacity=20.0, entropy=20.0),
        background=SOLID,
        optimizer=OptimizerConfig(lr_mlp=0.01),
        loop=LoopConfig(precision="full", occupancy_every=8, checkpoint_steps=7),
    )
    cameras = sample_views(ranges, 1, 4, size, size, seeded())
    truth = render_caption("a red cube", cameras, background=GREY)
    return recipe, {"multiview": ideal_guidance(truth.rgb[0], config)}, cameras, truth


def solid_ball(radius, background=SMALL.background):
    """A static scene that is a ball: only the blob, sharpened."""
    blob = RadianceConfig(grid=SMALL.radiance.grid, blob_scale=200.0, blob_std=radius)
    return build_scene(replace(SMALL, radiance=blob, background=background), seeded())


def motion_case(steps):
    """A recipe of one fixed camera, and the guidance that wants a jump."""
    n_frames, size = 6, 24
    config = DistillationConfig(1.0, constant(0.2), constant(0.6), loss="x0", shared_timestep=True)
    recipe = replace(
        TOY_MOTION,
        steps=steps,
        deformation=DeformationConfig(
            grid=HashGridConfig(n_levels=3, log2_entries=12, base_resolution=4, growth=1.4),
            hidden_width=32,
            hidden_layers=2,
        ),
        cameras=CameraRanges((0, 0), (15, 15), (40, 40), (3, 3), relative_distance=False),
        n_frames=n_frames,
        phases=(Phase(0.0, 1, size, size),),
        guidance=(GuidanceTerm("video", 1.0, config),),
        time_span=(1.0, 1.0),
        first_levels=4,  # all that is local from the beginning, and nothing else
        optimizer=OptimizerConfig(lr_grid=0.02),
        background=SOLID,
    )
    cameras = fixed_take(n_frames, size, size)
    still = solid_ball(0.5, background=BackgroundConfig(color=(0.0, 0.0, 0.0)))
    mask = render_chunked(still, cameras).opacity
    rise = [round(4 * math.sin(math.pi * t)) for t in cameras.time[0].tolist()]
    frames = [torch.roll(m, -shift, 0) for m, shift in zip(mask[0], rise, strict=True)]
    clip = 0.5 * torch.stack(frames).expand(-1, -1, -1, 3)  # a fresh field is grey
    return recipe, {"video": ideal_guidance(clip, config)}, cameras, still, rise


def kept_bytes(ask) -> tuple[torch.Tensor, int]:
    """What `ask` returns, and how much is kept for its backward pass."""
    sizes: dict[int, int] = {}

    def keep(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        found = ask()
    return found, sum(sizes.values())
