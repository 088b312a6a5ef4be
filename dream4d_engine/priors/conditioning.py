"""What each kind of prior is told about a camera: text, poses, times."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

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
from .loading import Prior, PriorError, PriorKind, check_prompt, no_progress_bars, read_json, weights_variant

ConditionsOf = Callable[[CameraBatch], tuple[Conditions, Conditions]]

_SINGLE_VIEWS = ("image", "pixel")

FRAME_TURNS, MAX_TIMED_FRAMES = 4, 8

# the mean and deviation that CLIP's pictures are normalised with (2103.00020)
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


def text_conditions(prior: Prior, prompt: str, negative: str | None = None) -> ConditionsOf:
    """Encode the prompts once; return what gives (text, negative) conditions for cameras [B, F].

    Image and pixel priors read the words of each view, video priors those of a group's first camera, multi-view
    priors the bare prompt and the cameras themselves; the negative branch gets the same cameras.
    """
    return _conditions_from(prior, *_encode_prompts(prior, prompt, negative))


def text_guidance(prior: Prior, prompt: str, negative: str | None, config: DistillationConfig) -> Guidance:
    """Return the guidance of a prior by a prompt. `negative` None: the prior's own, else the recipes' usual one."""
    table, negative_tokens = _encode_prompts(prior, prompt, negative)
    perp_neg = None
    if config.perp_neg:
        if prior.kind not in _SINGLE_VIEWS:
            raise PriorError(f"perp-neg is for priors of single views; {prior.name} is a {prior.kind} prior")

        def perp_neg(cameras: CameraBatch) -> PerpNegConditions:
            return perp_neg_conditions(cameras.azimuth.to(table), cameras.elevation.to(table), table)

    return Guidance(prior.name, prior.denoiser, _conditions_from(prior, table, negative_tokens), config, perp_neg)


def words_for(kind: PriorKind, prompt: str) -> str:
    """What a prior is told of a prompt: the word of a personal subject ("sks") only where a LoRA may have taught it."""
    return prompt if kind == "image" else without_word(prompt)


def _encode_prompts(prior: Prior, prompt: str, negative: str | None) -> tuple[Tensor, Tensor]:
    """Return the text's tokens, one row a view (in the order of VIEWS) or one in all, and the negative's [L, D]."""
    if prior.kind == "novel_view":
        raise PriorError(f"the {prior.name} prior is told an image, not a prompt: use image_guidance")
    prompt = words_for(prior.kind, prompt)
    check_prompt(prior, prompt)
    negative = _negative_prompt(prior, negative)
    texts = (prompt,) if prior.kind == "multiview" else view_prompts(prompt)
    encoded = prior.encode_text([*texts, negative])
    return encoded[:-1], encoded[-1]


def _conditions_from(prior: Prior, table: Tensor, negative_tokens: Tensor) -> ConditionsOf:
    def conditions(cameras: CameraBatch) -> tuple[Conditions, Conditions]:
        n_groups, n_frames = cameras.shape
        view = torch.zeros(n_groups, n_frames, dtype=torch.long, device=table.device)
        if len(table) > 1:
            view = view_index(cameras.azimuth, cameras.elevation).to(table.device)
        if prior.kind == "video":
            view = view[:, :1].expand(-1, n_frames)
        vector = _vector(prior, cameras)
        return Conditions(table[view], vector), Conditions(negative_tokens.expand(n_groups, n_frames, -1, -1), vector)

    return conditions


def image_conditions(prior: Prior, picture: Tensor, reference: CameraBatch) -> ConditionsOf:
    """Return what gives a novel-view prior its conditions for cameras [B, F].

    Args:
        picture: [3, H, W] in [0, 1], what the `reference` camera ([1, 1]) sees. The negative branch gets zeros for
            both the token and the picture.
    """
    if prior.kind != "novel_view":
        raise PriorError(f"the {prior.name} prior is told a prompt, not an image: use text_guidance")
    denoiser = prior.denoiser
    picture = picture.to(denoiser.device)
    embedding = embed_picture(prior, picture[None])
    projection = _load_projection(prior.folder, denoiser.device)
    resized = functional.interpolate(picture[None], denoiser.image_size, mode="bilinear", antialias=True)
    concat = _reference_latent(prior, resized)
    reference = reference.to(denoiser.device)

    def conditions(cameras: CameraBatch) -> tuple[Conditions, Conditions]:
        pose = pose_vector(cameras.to(denoiser.device), reference)
        rows = torch.cat((embedding.expand(*pose.shape[:2], -1), pose), -1)
        tokens = functional.linear(rows, *projection)[:, :, None]
        beside = concat.expand(*pose.shape[:2], -1, -1, -1)
        text = Conditions(tokens, None, beside)
        return text, Conditions(torch.zeros_like(tokens), None, torch.zeros_like(beside))

    return conditions


def image_guidance(prior: Prior, picture: Tensor, reference: CameraBatch, config: DistillationConfig) -> Guidance:
    """Return the guidance of a novel-view prior by one picture [3, H, W] seen from `reference` [1, 1]."""
    return Guidance(prior.name, prior.denoiser, image_conditions(prior, picture, reference), config)


def clip_pixels(pictures: Tensor, size: int) -> Tensor:
    """Resize and normalise pictures [n, 3, H, W] in [0, 1] for a CLIP image encoder."""
    resized = functional.interpolate(pictures, (size, size), mode="bicubic", antialias=True, align_corners=False)
    # numbers, not tensors: a step that is recorded as a CUDA graph can't copy constants to the device
    channels = zip(resized.unbind(-3), CLIP_MEAN, CLIP_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], -3)


def embed_picture(prior: Prior, pictures: Tensor) -> Tensor:
    """Return CLIP's embeddings [n, D] of pictures [n, 3, H, W] in [0, 1]; the encoder is freed afterwards."""
    from transformers import CLIPVisionModelWithProjection

    folder, denoiser = prior.folder, prior.denoiser
    config = read_json(folder, "image_encoder/config.json")
    variant = weights_variant(folder, "image_encoder", "model")
    with no_progress_bars():
        encoder = CLIPVisionModelWithProjection.from_pretrained(
            folder / "image_encoder", dtype=denoiser.dtype, variant=variant, local_files_only=True
        )
    encoder = encoder.to(denoiser.device).eval()
    with torch.no_grad():
        pixels = clip_pixels(pictures, config.get("image_size", 224)).to(denoiser.dtype)
        return encoder(pixels).image_embeds.float()


def _negative_prompt(prior: Prior, negative: str | None) -> str:
    if negative is None:
        negative = NEGATIVE_PROMPT if prior.negative_prompt is None else prior.negative_prompt
    if negative:
        check_prompt(prior, negative)
    return negative


def _vector(prior: Prior, cameras: CameraBatch) -> Tensor | None:
    if prior.vector == "camera":
        return camera_vector(cameras).to(prior.denoiser.device)
    if prior.vector == "frame_time":
        return frame_time_vector(cameras.time).to(prior.denoiser.device)
    return None


def _reference_latent(prior: Prior, pictures: Tensor) -> Tensor:
    """Encode reference pictures [n, 3, H, W] as Zero123 does: the VAE's mode, not scaled."""
    denoiser = prior.denoiser
    with torch.no_grad():
        z = denoiser.encode(pictures[:, None])
    return z if denoiser.vae is None else z / denoiser.vae.config.scaling_factor


def _load_projection(folder: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (weight, bias), float32, of the layer that turns [embedding, pose] into a token."""
    from safetensors.torch import load_file

    variant = weights_variant(folder, "clip_camera_projection", "diffusion_pytorch_model")
    name = "diffusion_pytorch_model" + ("" if variant is None else f".{variant}")
    path = folder / "clip_camera_projection" / f"{name}.safetensors"
    if path.is_file():
        state = load_file(str(path), device=str(device))
    else:
        state = torch.load(path.with_suffix(".bin"), map_location=device, weights_only=True)
    if not {"proj.weight", "proj.bias"} <= state.keys():
        raise PriorError(f"{path} holds {sorted(state)}, not proj.weight and proj.bias")
    return state["proj.weight"].float(), state["proj.bias"].float()
