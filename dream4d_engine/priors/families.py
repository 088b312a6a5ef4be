"""What is known of the families of today's models: what they make, at which sizes, of how many frames.

Shared by models in diffusers' folders and those that stand in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..cameras import Orbit
from .handle import PriorKind


@dataclass(frozen=True)
class Family:
    """Models of one class."""

    name: str
    kind: PriorKind
    size: tuple[int, int]  # (height, width) that is asked for where nobody says another, pixels
    trained_at: str  # in words
    multiple: int = 16  # of both sides
    n_frames: int | None = None  # where nobody says another number
    frame_step: int = 1  # takes have a multiple of this and one more frames: the autoencoder puts so many into one
    switch: float | None = None  # the time t above which a second model, where there is a pair, takes over
    orbit: Orbit | None = None  # what the views of a model of novel views are, that sees n_frames of them at once


# 17 to 25 frames of 576x320 are what a step's autoencoder can bear on cards of today; images of 512 for the same reason
STABLE_DIFFUSION = Family("Stable Diffusion 1 or 2", "image", (512, 512), "512x512, or 768x768 for version 2 with v", 8)
SDXL = Family("Stable Diffusion XL", "image", (512, 512), "1024x1024", 8)
SD3 = Family("Stable Diffusion 3", "image", (512, 512), "1024x1024")
FLUX = Family("Flux", "image", (512, 512), "about 1024x1024")
STABLE_ZERO123 = Family("Stable Zero123", "novel_view", (256, 256), "256x256", 8)
_ORBITS = "orbits of 21 views of 576x576"
SV3D_U = Family("SV3D_u", "novel_view", (576, 576), _ORBITS, 8, 21, orbit="static")
SV3D_P = Family("SV3D_p", "novel_view", (576, 576), _ORBITS, 8, 21, orbit="dynamic")
# Wan 2.2 14B is a pair: 0.875 is the boundary of its settings for text to video
WAN = Family("Wan", "video", (320, 576), "832x480, 81 frames", 16, 17, 4, 0.875)
WAN22_5B = Family("Wan 2.2 5B", "video", (352, 640), "1280x704, 121 frames", 32, 25, 4)
LTX = Family("LTX-Video", "video", (320, 576), "768x512, 97 frames", 32, 25, 8)
HUNYUAN = Family("HunyuanVideo", "video", (320, 576), "1280x720 or 960x544, 129 frames", 16, 17, 4)


def fitting_size(family: Family, height: int, width: int) -> tuple[int, int]:
    """Return the nearest size that the family's models take; 0 stands for the family's own."""
    given = (height or family.size[0], width or family.size[1])
    tall, wide = (max(family.multiple, round(side / family.multiple) * family.multiple) for side in given)
    return tall, wide


def fitting_frames(family: Family, n_frames: int) -> int | None:
    """Return the nearest number of frames that the family's models take; 0 stands for the family's own."""
    if family.n_frames is None:
        return None
    steps = max(1, round(((n_frames or family.n_frames) - 1) / family.frame_step))
    return steps * family.frame_step + 1
