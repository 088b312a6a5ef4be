"""What each kind of prior is told about a camera: text, poses, times."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..cameras import CameraBatch
from ..guidance.denoiser import Conditions
from ..guidance.distillation import DistillationConfig, Guidance
from ..guidance.prompts import (
    NEGATIVE_PROMPT,
    PerpNegConditions,
    perp_neg_conditions,
    view_index,
    view_prompts,
    without_word,
)
from .errors import PriorError
from .formats.finite import check_finite
from .formats.loaders import ImageResize
from .handle import PriorKind
from .loading import LoadedPrior

ConditionsOf = Callable[[CameraBatch], tuple[Conditions, Conditions]]

_SINGLE_VIEWS = ("image", "pixel")

FRAME_TURNS, MAX_TIMED_FRAMES = 4, 8

# the mean and deviation that CLIP's images are normalised with (2103.00020)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def camera_vector(cameras: CameraBatch) -> Tensor:
    """Return MVDream's camera condition [B, F, 16]: c2w, row by row, its translation scaled to length 1."""
    c2w = cameras.c2w.clone()
    position = c2w[..., :3, 3]
    c2w[..., :3, 3] = position / position.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return c2w.flatten(-2)


def frame_time_vector(time: Tensor) -> Tensor:
    """Return what a toy video prior is told of its frames, [B, F, 16], from their times [B, F] in [0, 1].

    Sines and cosines of 1 to 4 turns of the time, then the frame's place as one of 8.
    """
    n_groups, n_frames = time.shape
    if n_frames > MAX_TIMED_FRAMES:
        raise ValueError(f"the toy video prior knows at most {MAX_TIMED_FRAMES} frames, got {n_frames}")
    angle = 2 * math.pi * time[..., None] * torch.arange(1, FRAME_TURNS + 1, device=time.device)
    place = torch.eye(n_frames, MAX_TIMED_FRAMES, device=time.device, dtype=time.dtype)
    return torch.cat((angle.sin(), angle.cos(), place.expand(n_groups, -1, -1)), -1)


def pose_vector(cameras: CameraBatch, reference: CameraBatch) -> Tensor:
    """Return Zero123's relative pose [B, F, 4]: change of polar angle, sine and cosine of azimuth, distance.

    The polar angle grows downwards from the zenith. `reference` broadcasts to [B, F]. 2303.11328, section 3.2.
    """
    polar = reference.elevation - cameras.elevation
    azimuth = cameras.azimuth - reference.azimuth
    distance = cameras.distance - reference.distance
    return torch.stack((polar, azimuth.sin(), azimuth.cos(), distance.expand_as(polar)), -1)


def text_conditions(prior: LoadedPrior, prompt: str, negative: str | None = None) -> ConditionsOf:
    """Encode the prompts once; return what gives (text, negative) conditions for cameras [B, F].

    Image and pixel priors read the words of each view, video priors those of a group's first camera, multi-view
    priors the bare prompt and the cameras themselves; the negative branch gets the same cameras.
    """
    return table_conditions(prior, *_encode_prompts(prior, prompt, negative))


def text_guidance(prior: LoadedPrior, prompt: str, negative: str | None, config: DistillationConfig) -> Guidance:
    """Return the guidance of a prior by a prompt. `negative` None: the prior's own, else the recipes' usual one."""
    table, negative_tokens = _encode_prompts(prior, prompt, negative)
    perp_neg = None
    if config.perp_neg:
        if prior.kind not in _SINGLE_VIEWS:
            raise PriorError(f"perp-neg is for priors of single views; {prior.name} is a {prior.kind} prior")

        def perp_neg(cameras: CameraBatch) -> PerpNegConditions:
            return perp_neg_conditions(cameras.azimuth.to(table), cameras.elevation.to(table), table)

    return Guidance(prior.name, prior.denoiser, table_conditions(prior, table, negative_tokens), config, perp_neg)


def words_for(kind: PriorKind, prompt: str) -> str:
    """What a prior is told of a prompt: the word of a personal subject ("sks") only where a LoRA may have taught it."""
    return prompt if kind == "image" else without_word(prompt)


def check_prompt(name: str, known_words: frozenset[str] | None, prompt: str) -> None:
    """Raise PriorError for an empty prompt or, with a toy prior, one with words that it was not taught."""
    if not without_full_stop(prompt):
        raise PriorError("the prompt is empty: say what to make, for example 'a red cube is jumping'")
    if known_words is None:
        return
    unknown = [word for word in split_words(without_full_stop(prompt)) if word not in known_words]
    if unknown:
        raise PriorError(
            f"the {name} prior does not know {', '.join(repr(w) for w in dict.fromkeys(unknown))}; "
            f"its words are: {', '.join(sorted(known_words - {','}))}; others need a full-size model"
        )


def without_full_stop(prompt: str) -> str:
    """A prompt as a toy prior reads it: captions that it was taught by have no full stop."""
    return re.sub(r"[\s.]+\Z", "", prompt)


def split_words(prompt: str) -> list[str]:
    """The words of a prompt as the toy tokenizers see them: lower case, commas on their own."""
    return prompt.lower().replace(",", " , ").split()


def _encode_prompts(prior: LoadedPrior, prompt: str, negative: str | None) -> tuple[Tensor, Tensor]:
    """Return the text's tokens, one row a view (in the order of VIEWS) or one in all, and the negative's [L, D]."""
    if prior.kind == "novel_view":
        raise PriorError(f"the {prior.name} prior is told an image, not a prompt: use image_guidance")
    prompt = words_for(prior.kind, prompt)
    check_prompt(prior.name, prior.known_words, prompt)
    negative = _negative_prompt(prior, negative)
    if prior.known_words is not None:
        prompt, negative = without_full_stop(prompt), without_full_stop(negative)
    texts = (prompt,) if prior.kind == "multiview" else view_prompts(prompt)
    encoded = prior.encode_text([*texts, negative])
    return encoded[:-1], encoded[-1]


def table_conditions(prior: LoadedPrior, table: Tensor, negative_table: Tensor) -> ConditionsOf:
    """Return what gives (text, negative) conditions for cameras [B, F] from encoded prompts.

    Args:
        table: tokens of the text, [4, L, D] in the order of prompts.VIEWS, or [1, L, D] for all views.
        negative_table: [L, D] for all views, or one for each of VIEWS.
    """

    def conditions(cameras: CameraBatch) -> tuple[Conditions, Conditions]:
        n_groups, n_frames = cameras.shape
        view = torch.zeros(n_groups, n_frames, dtype=torch.long, device=table.device)
        if len(table) > 1:
            view = view_index(cameras.azimuth, cameras.elevation).to(table.device)
        if prior.kind == "video":
            view = view[:, :1].expand(-1, n_frames)
        vector = _vector(prior, cameras)
        negative = negative_table[view] if negative_table.ndim == 3 else negative_table.expand(*view.shape, -1, -1)
        return Conditions(table[view], vector), Conditions(negative, vector)

    return conditions


def image_conditions(prior: LoadedPrior, image: Tensor, reference: CameraBatch) -> ConditionsOf:
    """Return what gives a novel-view prior its conditions for cameras [B, F].

    Args:
        image: [3, H, W] in [0, 1], what the `reference` camera ([1, 1]) sees. The negative branch gets zeros for
            both the token and the image.
    """
    if prior.kind != "novel_view":
        raise PriorError(f"the {prior.name} prior is told a prompt, not an image: use text_guidance")
    denoiser = prior.denoiser
    image = image.to(denoiser.device)
    projection = prior.loader.projection(denoiser.device)
    check_finite(dict(zip(("weight", "bias"), projection, strict=True)), f"{prior.loader.path}: its pose projection")
    resized = functional.interpolate(image[None], denoiser.image_size, mode="bilinear", antialias=True)
    # what was trained with antialiased images took them as they came, Zero123 at its own size
    embedding = embed_image(prior, image[None] if prior.image_resize == "antialiased" else resized)
    concat = _reference_latent(prior, resized)
    return embedded_conditions(embedding, concat, projection, reference.to(denoiser.device))


def embedded_conditions(
    embedding: Tensor, concat: Tensor, projection: tuple[Tensor, Tensor], reference: CameraBatch
) -> ConditionsOf:
    """Return what gives Zero123's conditions for cameras [B, F].

    Args:
        embedding: [1, D] of the reference image. concat: [1, 1, c, h, w], its latent, not scaled.
        projection: weight [D', D + 4] and bias of the layer that turns [embedding, pose] into a token.
        reference: [1, 1], the camera that sees the image.
    """
    return view_conditions(
        embedding,
        concat,
        lambda cameras: pose_vector(cameras, reference),
        lambda rows: functional.linear(rows, *projection),
    )


def view_conditions(
    embedding: Tensor,
    concat: Tensor,
    pose_of: Callable[[CameraBatch], Tensor],
    project: Callable[[Tensor], Tensor],
    vector_of: Callable[[CameraBatch], Tensor | None] = lambda cameras: None,
) -> ConditionsOf:
    """Return what gives a model of novel views its conditions; the negative branch gets zeros, and the same vector.

    Args:
        embedding: [1, D] of the reference image. concat: [1, 1, c, h, w], its latent, not scaled.
        pose_of: cameras [B, F] on the embedding's device -> [B, F, K]. project: [B, F, D + K] -> tokens [B, F, D'].
        vector_of: cameras [B, F] -> what is added to the time embedding, [B, F, L].
    """

    def conditions(cameras: CameraBatch) -> tuple[Conditions, Conditions]:
        pose = pose_of(cameras.to(embedding.device))
        tokens = project(torch.cat((embedding.expand(*pose.shape[:2], -1), pose), -1))[:, :, None]
        beside = concat.expand(*pose.shape[:2], -1, -1, -1)
        vector = vector_of(cameras)
        text = Conditions(tokens, vector, beside)
        return text, Conditions(torch.zeros_like(tokens), vector, torch.zeros_like(beside))

    return conditions


def image_guidance(prior: LoadedPrior, image: Tensor, reference: CameraBatch, config: DistillationConfig) -> Guidance:
    """Return the guidance of a novel-view prior by one image [3, H, W] seen from `reference` [1, 1]."""
    return Guidance(prior.name, prior.denoiser, image_conditions(prior, image, reference), config)


def clip_pixels(images: Tensor, size: int, resize: ImageResize = "antialiased") -> Tensor:
    """Resize and normalise images [n, 3, H, W] in [0, 1] for a CLIP image encoder.

    Zero123 was trained on images that were resized with their corners in place and without antialiasing.
    """
    antialiased = resize == "antialiased"
    resized = functional.interpolate(
        images, (size, size), mode="bicubic", antialias=antialiased, align_corners=not antialiased
    )
    # numbers, not tensors: a step that is recorded as a CUDA graph can't copy constants to the device
    channels = zip(resized.unbind(-3), CLIP_MEAN, CLIP_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], -3)


def embed_image(prior: LoadedPrior, images: Tensor) -> Tensor:
    """Return CLIP's embeddings [n, D] of images [n, 3, H, W] in [0, 1]; the encoder is freed afterwards."""
    denoiser = prior.denoiser
    encoder: Any = prior.loader.image_encoder(denoiser.dtype, denoiser.device)
    with torch.no_grad():
        pixels = clip_pixels(images, encoder.config.image_size, prior.image_resize).to(denoiser.dtype)
        return encoder(pixels).image_embeds.float()


def _negative_prompt(prior: LoadedPrior, negative: str | None) -> str:
    if negative is None:
        negative = NEGATIVE_PROMPT if prior.negative_prompt is None else prior.negative_prompt
    if negative:
        check_prompt(prior.name, prior.known_words, negative)
    return negative


def _vector(prior: LoadedPrior, cameras: CameraBatch) -> Tensor | None:
    if prior.vector == "camera":
        return camera_vector(cameras).to(prior.denoiser.device)
    if prior.vector == "frame_time":
        return frame_time_vector(cameras.time).to(prior.denoiser.device)
    return None


def _reference_latent(prior: LoadedPrior, images: Tensor) -> Tensor:
    """Encode reference images [n, 3, H, W] as Zero123 does: the VAE's mode, not scaled."""
    denoiser = prior.denoiser
    with torch.no_grad():
        z = denoiser.encode(images[:, None])
    return z if denoiser.vae is None else z / denoiser.vae.config.scaling_factor
