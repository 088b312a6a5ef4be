"""The motions: affine maps from the canonical frame to the world, analytic in the time, the identity at time 0.

- still: nothing moves.
- jumping: up and down once, z += 0.35 sin(pi t).
- sliding: to the object's left (+y), to its right and back, y += 0.3 sin(2 pi t).
- stretching: taller, then flatter, about the centre; the height times s = 1 + 0.4 sin(2 pi t), the widths times
  1 / sqrt(s), so that the volume stays.
- spinning: a turn about the vertical axis by 50 degrees to the left (the face turns towards +y), then to the right
  and back: 50 deg * sin(2 pi t).
- swaying: leans to its left and right with the bottom held, y += 0.4 (z - z_bottom) sin(2 pi t).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .captions import MOTIONS, SHAPES
from .shapes import SHAPE_MODELS

JUMP, SLIDE, STRETCH, SPIN_DEG, SWAY = 0.35, 0.30, 0.40, 50.0, 0.40


def world_from_canonical(motion_index: Tensor, shape_index: Tensor, time: Tensor, strength: float = 1.0) -> Tensor:
    """Return [N, 4, 4] maps of the object from where it is at time 0 to where it is at `time`.

    Args:
        motion_index, shape_index: [N] places in MOTIONS and SHAPES. time: [N] in [0, 1].
        strength: multiplies the amplitude of every motion.
    """
    bottoms = time.new_tensor([SHAPE_MODELS[name].z_bottom for name in SHAPES])[shape_index]
    wave = strength * torch.sin(2 * math.pi * time)

    def only(motion: str, value: Tensor) -> Tensor:
        return torch.where(motion_index == MOTIONS.index(motion), value, torch.zeros_like(value))

    up = only("jumping", strength * JUMP * torch.sin(math.pi * time))
    left = only("sliding", SLIDE * wave)
    tall = 1 + only("stretching", STRETCH * wave)
    angle = only("spinning", math.radians(SPIN_DEG) * wave)
    shear = only("swaying", SWAY * wave)
    wide = tall.rsqrt()
    # at most one of these differs from the identity, so their order does not matter
    affine = torch.zeros(*time.shape, 4, 4, dtype=time.dtype, device=time.device)
    affine[:, 0, 0], affine[:, 0, 1] = wide * torch.cos(angle), -torch.sin(angle)
    affine[:, 1, 0], affine[:, 1, 1] = torch.sin(angle), wide * torch.cos(angle)
    affine[:, 1, 2], affine[:, 1, 3] = shear, left - shear * bottoms
    affine[:, 2, 2], affine[:, 2, 3] = tall, up
    affine[:, 3, 3] = 1
    return affine
