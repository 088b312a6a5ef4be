"""Diffusion models from folders in diffusers' format.

Nothing is ever downloaded: a folder has everything or the error says which file is missing. Beside the usual
entries, `model_index.json` may hold one of ours that says what the other files leave open:

    "dream4d": {"kind": "multiview", "n_frames": 4, "image_size": [32, 32], "vector": "camera",
                "group_attention": true, "known_words": [...], "negative_prompt": "", "license": "Apache-2.0"}

Without it the kind is guessed from the networks' configurations, the other values from the kind.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .denoisers import UNetDenoiser
from .view_attention import attend_across_views

PriorKind = Literal["image", "multiview", "novel_view", "pixel", "video"]
VectorKind = Literal["camera", "frame_time"]

# IF was trained with 77 text tokens although its T5 could read more.
PIXEL_TEXT_TOKENS = 77


class PriorError(ValueError):
    """A model folder that cannot be used, or a prompt that the model does not know."""


@dataclass(frozen=True, eq=False)
class Prior:
    """A frozen diffusion model with what must be known to condition it.

    Args:
        kind: how it is conditioned. vector: what its class embedding reads, None where it has none.
        known_words: the whole vocabulary of a toy model, None where any prompt will do.
        negative_prompt: the one to use where nobody asks for another; None means the recipes' usual one.
    """

    name: str
    kind: PriorKind
    folder: Path
    denoiser: UNetDenoiser
    vector: VectorKind | None = None
    known_words: frozenset[str] | None = None
    negative_prompt: str | None = None
    license: str = "unknown"

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Return the text encoder's last hidden states [n, L, D], float32, on the denoiser's device.

        The encoder is loaded for this call and freed afterwards: it is not needed again in a run.
        """
        return encode_text(self.folder, prompts, self.kind, self.denoiser.device, self.denoiser.dtype)


def load_prior(
    folder: Path | str,
    kind: PriorKind | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Prior:
    """Load the denoiser (and VAE) of a diffusers folder; `kind` overrides what the folder says of itself."""
    folder = Path(folder)
    index = read_json(folder, "model_index.json")
    unet_config = read_json(folder, "unet/config.json")
    ours = index.get("dream4d", {})
    kind = kind or ours.get("kind") or guess_kind(folder, unet_config)
    if kind not in get_args(PriorKind):
        raise PriorError(f"{folder}: unknown kind of prior {kind!r}; known are {', '.join(get_args(PriorKind))}")
    vector = ours.get("vector", "camera" if kind == "multiview" else None)
    if vector is not None and vector not in get_args(VectorKind):
        raise PriorError(f"{folder}: unknown vector {vector!r}; known are {', '.join(get_args(VectorKind))}")
    alphas_bar, prediction_type = read_schedule(folder)
    unet = _load_network(folder, "unet", _unet_class(folder, unet_config), dtype, device)
    vae = _load_network(folder, "vae", "AutoencoderKL", dtype, device) if (folder / "vae").is_dir() else None
    group_attention = bool(ours.get("group_attention", kind == "multiview"))
    if group_attention:
        attend_across_views(unet)
    denoiser = UNetDenoiser(
        unet=unet,
        alphas_bar=alphas_bar.to(device),
        prediction_type=prediction_type,
        image_size=_image_size(ours, unet_config, vae),
        n_frames=ours.get("n_frames", {"multiview": 4, "video": 24}.get(kind)),
        vae=vae,
        group_attention=group_attention,
    )
    words = ours.get("known_words")
    return Prior(
        name=ours.get("name", folder.resolve().name),
        kind=kind,
        folder=folder,
        denoiser=denoiser,
        vector=vector,
        known_words=None if words is None else frozenset(words),
        negative_prompt=ours.get("negative_prompt"),
        license=ours.get("license", "unknown"),
    )


def toy_folder(kind: PriorKind) -> Path:
    """Where the toy prior of this kind lies inside the package."""
    return Path(__file__).parent / "toy" / kind


def check_prompt(prior: Prior, prompt: str) -> None:
    """Raise PriorError for an empty prompt or, with a toy prior, one with words that it was not taught."""
    if not prompt.strip():
        raise PriorError("the prompt is empty: say what to make, for example 'a red cube is jumping'")
    if prior.known_words is None:
        return
    unknown = [word for word in split_words(prompt) if word not in prior.known_words]
    if unknown:
        raise PriorError(
            f"the {prior.name} prior does not know {', '.join(repr(w) for w in dict.fromkeys(unknown))}; "
            f"its words are: {', '.join(sorted(prior.known_words - {','}))}"
        )


def split_words(prompt: str) -> list[str]:
    """The words of a prompt as the toy tokenizers see them: lower case, commas on their own."""
    return prompt.lower().replace(",", " , ").split()


def encode_text(
    folder: Path, prompts: Sequence[str], kind: PriorKind, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """Encode prompts with the folder's text encoder, [n, L, D] in float32; see Prior.encode_text."""
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    architecture = read_json(folder, "text_encoder/config.json").get("architectures", ["CLIPTextModel"])[0]
    is_t5 = architecture.startswith("T5")
    if not (folder / "tokenizer").is_dir():
        raise PriorError(f"{folder} has no tokenizer/ folder")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    encoder_class = T5EncoderModel if is_t5 else CLIPTextModel
    variant = weights_variant(folder, "text_encoder", "model")
    with no_progress_bars():
        encoder = encoder_class.from_pretrained(
            folder / "text_encoder", dtype=dtype, variant=variant, local_files_only=True
        )
    encoder = encoder.to(device).eval()
    length = min(tokenizer.model_max_length, PIXEL_TEXT_TOKENS) if is_t5 else tokenizer.model_max_length
    batch = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    # as in the models' own training: CLIP reads its padding, T5 masks it
    mask = batch.attention_mask.to(device) if is_t5 else None
    with torch.no_grad():
        hidden = encoder(batch.input_ids.to(device), attention_mask=mask)[0].float()
    del encoder
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return hidden


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars over ours while it loads weights."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def read_schedule(folder: Path) -> tuple[Tensor, str]:
    """Return (alphas_bar [T], prediction_type) of the folder's scheduler."""
    from diffusers import DDPMScheduler

    config = read_json(folder, "scheduler/scheduler_config.json")
    scheduler = DDPMScheduler.from_config(config)
    return scheduler.alphas_cumprod.float(), config.get("prediction_type", "epsilon")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read one of the folder's JSON files; PriorError where it is missing or broken."""
    path = Path(folder) / name
    if not Path(folder).is_dir():
        raise PriorError(f"there is no model folder {folder}")
    if not path.is_file():
        raise PriorError(f"{folder} is not a complete diffusers folder: {name} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PriorError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise PriorError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def guess_kind(folder: Path, unet_config: dict[str, Any]) -> PriorKind:
    """Return the kind that the networks' configurations suggest, for folders that don't say it themselves."""
    if unet_config.get("_class_name") == "UNet3DConditionModel":
        return "video"
    if (folder / "image_encoder").is_dir() and not (folder / "text_encoder").is_dir():
        return "novel_view"
    if unet_config.get("class_embed_type") == "projection":
        return "multiview"
    return "image" if (folder / "vae").is_dir() else "pixel"


def _unet_class(folder: Path, unet_config: dict[str, Any]) -> str:
    name = unet_config.get("_class_name", "UNet2DConditionModel")
    if name not in ("UNet2DConditionModel", "UNet3DConditionModel"):
        raise PriorError(f"{folder}/unet is a {name}; UNet2DConditionModel and UNet3DConditionModel can be used")
    return name


def _image_size(ours: dict[str, Any], unet_config: dict[str, Any], vae: nn.Module | None) -> tuple[int, int]:
    """Return (height, width) in pixels: as declared, else the UNet's sample size times the VAE's factor."""
    if "image_size" in ours:
        height, width = ours["image_size"]
        return int(height), int(width)
    size = unet_config.get("sample_size") or 64
    height, width = (size, size) if isinstance(size, int) else size
    factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    return height * factor, width * factor


def weights_variant(folder: Path, part: str, stem: str) -> str | None:
    """Return which of the published names the weights of a part have: None (plain) or "fp16"."""
    names = [path.name for path in (folder / part).glob("*") if path.suffix in (".safetensors", ".bin")]
    if any(name.startswith((f"{stem}.safetensors", f"{stem}-", f"{stem}.bin", "pytorch_model")) for name in names):
        return None
    if any(name.startswith(f"{stem}.fp16") for name in names):
        return "fp16"
    raise PriorError(f"{folder} is not a complete diffusers folder: {part}/{stem}.safetensors is missing")


def _load_network(
    folder: Path, part: str, class_name: str, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """Load a frozen diffusers network from one of the folder's parts."""
    import diffusers

    read_json(folder, f"{part}/config.json")
    variant = weights_variant(folder, part, "diffusion_pytorch_model")
    try:
        network = getattr(diffusers, class_name).from_pretrained(
            folder / part,
            torch_dtype=dtype,
            variant=variant,
            local_files_only=True,
            low_cpu_mem_usage=importlib.util.find_spec("accelerate") is not None,
        )
    except Exception as error:  # whatever diffusers and safetensors raise for damaged files
        raise PriorError(f"cannot load {folder / part}: {error}") from error
    return network.to(device).eval().requires_grad_(False)
