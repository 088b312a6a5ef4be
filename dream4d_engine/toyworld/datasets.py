"""What the toy priors see in training: banks of rendered images, and the batches drawn from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import product

import torch
from torch import Tensor

from ..cameras import CameraBatch, make_cameras, sample_takes, sample_views
from ..guidance.prompts import VIEWS, view_index
from ..priors.conditioning import camera_vector, frame_time_vector, pose_vector
from ..priors.handle import PriorKind
from ..training.config import TOY_CAMERAS, TOY_DISTANCE, TOY_FOV_DEG
from .captions import COLORS, MOTIONS, SHAPES, Caption
from .models import IMAGE_SIZE, N_FRAMES, N_VIEWS, tokenize
from .world import Objects, render_objects, world_from_canonical

GREY = (0.15, 1.0)
CAPTION_DROPOUT = 0.12


@dataclass(frozen=True)
class Bank:
    """N groups of F rendered images on the training device.

    Args:
        rgba: [N, F, 4, H, W] uint8, colours multiplied by the mask.
        objects: [N, 3] places in COLORS, SHAPES, MOTIONS.
        view: [N] place in VIEWS of the first camera.
        vector: [N, F, 16] the class embedding's input, or None. pose: [N, 4] from image 0 to 1, or None.
    """

    rgba: Tensor
    objects: Tensor
    view: Tensor
    vector: Tensor | None = None
    pose: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """What one training step reads; images are in [-1, 1]."""

    clean: Tensor  # [B, F, 3, H, W]
    noise: Tensor  # of the same shape
    timestep: Tensor  # [B]

    def copy_from(self, other: Batch) -> None:
        """Overwrite the tensors in place."""
        for f in fields(self):
            if (tensor := getattr(self, f.name)) is not None:
                tensor.copy_(getattr(other, f.name))


@dataclass(frozen=True)
class TextBatch(Batch):
    """Of a prior that reads sentences."""

    token_ids: Tensor  # [B, L]
    token_mask: Tensor  # [B, L], 0 where a token only fills up
    vector: Tensor | None  # [B, F, 16] the class embedding's input


@dataclass(frozen=True)
class NovelViewBatch(Batch):
    """Of the prior that is shown an image."""

    reference: Tensor  # [B, 3, H, W]
    pose: Tensor  # [B, 4] from the reference to the image
    keep: Tensor  # [B], 0 where the condition is dropped


# --- Cameras ---------------------------------------------------------------------------------------------------


def _image_cameras(n: int, generator: torch.Generator) -> CameraBatch:
    """Single views; one in eight from high up, for the words "overhead view"."""
    usual = sample_views(TOY_CAMERAS, n, 1, IMAGE_SIZE, IMAGE_SIZE, generator)
    high = torch.rand(n, 1, generator=generator) < 0.125
    lifted = math.radians(30) + torch.rand(n, 1, generator=generator) * math.radians(55)
    elevation = torch.where(high, lifted, usual.elevation)
    return make_cameras(usual.azimuth, elevation, TOY_DISTANCE, math.radians(TOY_FOV_DEG), 0.0, IMAGE_SIZE, IMAGE_SIZE)


def _reference_and_target_cameras(n: int, generator: torch.Generator) -> CameraBatch:
    """Pairs (reference, target); half of the references are the recipes' own: straight from the front."""
    random = torch.rand(6, n, generator=generator)
    frontal = (random[0] < 0.5).float()
    azimuth = (2 * random[1:3] - 1) * math.pi
    azimuth[0] = azimuth[0] * (1 - frontal)
    elevation = torch.stack(((1 - frontal) * random[3] * math.radians(30), torch.deg2rad(90 * random[4] - 10)))
    distance = torch.stack((torch.full((n,), TOY_DISTANCE), TOY_DISTANCE + 0.6 * (random[5] - 0.5) * (1 - frontal)))
    return make_cameras(azimuth.T, elevation.T, distance.T, math.radians(TOY_FOV_DEG), 0.0, IMAGE_SIZE, IMAGE_SIZE)


def _cameras(kind: PriorKind, n: int, generator: torch.Generator) -> CameraBatch:
    if kind == "multiview":
        return sample_views(TOY_CAMERAS, n, N_VIEWS, IMAGE_SIZE, IMAGE_SIZE, generator)
    if kind == "video":
        return sample_takes(TOY_CAMERAS, n, N_FRAMES, IMAGE_SIZE, IMAGE_SIZE, generator)
    if kind == "novel_view":
        return _reference_and_target_cameras(n, generator)
    return _image_cameras(n, generator)


# --- Rendering -------------------------------------------------------------------------------------------------


def render_bank(
    kind: PriorKind, n_groups: int, generator: torch.Generator, device: torch.device | str, chunk: int = 4096
) -> Bank:
    """Render a bank of random objects and cameras; all random numbers come from a CPU generator."""
    cameras = _cameras(kind, n_groups, generator)
    sizes = (len(COLORS), len(SHAPES), len(MOTIONS))
    objects = torch.stack([torch.randint(size, (n_groups,), generator=generator) for size in sizes], -1)
    if kind != "video":
        objects[:, 2] = MOTIONS.index("still")
    rgba = torch.cat(
        [
            _render_groups(objects[start : start + chunk], cameras.groups(slice(start, start + chunk)), device)
            for start in range(0, n_groups, chunk)
        ]
    )
    vector = {"multiview": lambda: camera_vector(cameras), "video": lambda: frame_time_vector(cameras.time)}
    pose = None
    if kind == "novel_view":
        pose = pose_vector(cameras.frames(1, 2), cameras.frames(0, 1))[:, 0]
    bank = Bank(
        rgba,
        objects,
        view_index(cameras.azimuth, cameras.elevation)[:, 0],
        vector[kind]() if kind in vector else None,
        pose,
    )
    tensors = {f.name: getattr(bank, f.name) for f in fields(bank)}
    return replace(bank, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


def _render_groups(objects: Tensor, cameras: CameraBatch, device: torch.device | str) -> Tensor:
    """Render one object a group; returns [N, F, 4, H, W] uint8, colours multiplied by the mask."""
    n_frames = cameras.shape[1]
    cameras = cameras.to(device)
    color, shape, motion = objects.to(device).repeat_interleave(n_frames, 0).unbind(-1)
    table = torch.tensor(list(COLORS.values()), device=device)
    moved = world_from_canonical(motion, shape, cameras.time.reshape(-1))
    images_of = Objects(shape, table[color], torch.linalg.inv(moved))
    image = render_objects(images_of, cameras, background=(0.0, 0.0, 0.0))
    rgba = torch.cat((image.rgb, image.mask), -1)
    return (rgba * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 1, 4, 2, 3).contiguous()


def composite(rgba: Tensor, grey: Tensor) -> Tensor:
    """Return images [B, F, 3, H, W] in [0, 1] from uint8 RGBA over one grey a group, grey [B]."""
    values = rgba.float() / 255
    return values[:, :, :3] + (1 - values[:, :, 3:]) * grey[:, None, None, None, None]


# --- Captions --------------------------------------------------------------------------------------------------

_MOTION_WORDS, _VIEW_WORDS = (*MOTIONS, None), (*VIEWS, None)
_RADICES = (len(COLORS), len(SHAPES), len(_MOTION_WORDS), len(_VIEW_WORDS), 2)


def caption_table() -> list[str]:
    """Return every sentence that training uses: place 0 is the empty one, then all of mixed radix order."""
    texts = [""]
    for color, shape, motion, view, the in product(COLORS, SHAPES, _MOTION_WORDS, _VIEW_WORDS, (False, True)):
        text = Caption(color, shape).object_text
        text = f"the {color} {shape}" if the else text
        text = text if motion is None else f"{text} is {motion}"
        texts.append(text if view is None else f"{text}, {view} view")
    return texts


def draw_captions(kind: PriorKind, bank: Bank, index: Tensor, generator: torch.Generator) -> Tensor:
    """Return places [B] in `caption_table` of what is said of the bank's groups `index`.

    Moving images are told their motion (one in seven still ones is not). Resting ones are told any motion or none:
    they show the moment 0, where all motions agree. The view is named for image and pixel priors, for videos more
    often than not, never for multi-view groups.
    """
    n, device = len(index), index.device
    color, shape, motion = bank.objects[index].unbind(-1)
    random = torch.rand(5, n, generator=generator, device=device)
    none = len(MOTIONS)
    if kind == "video":
        unsaid = (motion == MOTIONS.index("still")) & (random[0] < 0.5)
    else:
        motion = (random[1] * none).long().clamp(max=none - 1)
        unsaid = random[0] < 0.5
    motion = torch.where(unsaid, none, motion)
    p_view = {"multiview": 0.0, "video": 0.6}.get(kind, 0.88)
    view = torch.where(random[2] < p_view, bank.view[index], len(VIEWS))
    the = (random[3] < 0.1).long()
    place = torch.zeros_like(color)
    for digit, radix in zip((color, shape, motion, view, the), _RADICES, strict=True):
        place = place * radix + digit
    return torch.where(random[4] < CAPTION_DROPOUT, 0, place + 1)


BatchMaker = Callable[[int, torch.Generator], Batch]


def batch_maker(kind: PriorKind, bank: Bank, n_timesteps: int = 1000) -> BatchMaker:
    """Return a function (batch size, generator on the bank's device) -> Batch."""
    device = bank.rgba.device
    if kind != "novel_view":
        ids, mask = (tensor.to(device) for tensor in tokenize(kind, caption_table()))

    def make(n: int, generator: torch.Generator) -> Batch:
        index = torch.randint(len(bank.rgba), (n,), generator=generator, device=device)
        grey = GREY[0] + (GREY[1] - GREY[0]) * torch.rand(n, generator=generator, device=device)
        if kind == "novel_view":
            grey = torch.ones_like(grey)  # the recipes show this prior white backgrounds only
        images = 2 * composite(bank.rgba[index], grey) - 1
        timestep = torch.randint(n_timesteps, (n,), generator=generator, device=device)
        shown = images[:, 1:] if kind == "novel_view" else images
        noise = torch.randn(shown.shape, generator=generator, device=device)
        if bank.pose is not None:
            keep = (torch.rand(n, generator=generator, device=device) >= CAPTION_DROPOUT).float()
            return NovelViewBatch(shown, noise, timestep, images[:, 0], bank.pose[index], keep)
        caption = draw_captions(kind, bank, index, generator)
        vector = None if bank.vector is None else bank.vector[index]
        return TextBatch(shown, noise, timestep, ids[caption], mask[caption], vector)

    return make
