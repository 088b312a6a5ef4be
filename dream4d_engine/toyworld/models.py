"""The toy priors before training: small networks of the full-size models' classes, and their folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..priors.formats.configurations import FLOW_SCHEDULER
from ..priors.formats.loaders import no_progress_bars
from ..priors.handle import PriorKind
from ..priors.networks.text import read_tokenizer
from ..priors.networks.view_attention import attend_across_views
from .captions import vocabulary

if TYPE_CHECKING:
    # not from diffusers itself: there a type checker finds the stand-ins for where torch is missing
    from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPVisionModelWithProjection, T5EncoderModel

KINDS: tuple[PriorKind, ...] = get_args(PriorKind)
IMAGE_SIZE, N_VIEWS, N_FRAMES, MAX_TOKENS, WIDTH = 32, 4, 8, 16, 64
LATENT_CHANNELS, N_TIMESTEPS = 4, 1000
Prediction = Literal["v", "flow"]
"""What a network learns to answer: v of a diffusion (2202.00512), or the velocity eps - z of a flow (2209.03003)."""
WORDS = (*vocabulary(), ",")
SUBJECT_WORD = "sks"
"""Of a personal subject. The image prior reads it as three letters that no caption holds: its rare word, which a LoRA
gives a meaning (see train_lora.py)."""


@dataclass(frozen=True)
class ToySize:
    """Channels of the UNet's three levels (32, 16 and 8 pixels; attention at the latter two) and heads of each."""

    channels: tuple[int, int, int]
    heads: tuple[int, int, int] = (1, 2, 4)


SIZES: dict[PriorKind, ToySize] = {
    "image": ToySize((32, 64, 128)),
    "multiview": ToySize((32, 64, 128)),
    "video": ToySize((32, 64, 128)),
    "novel_view": ToySize((32, 64, 96), (1, 2, 3)),
    "pixel": ToySize((32, 64, 96), (1, 2, 3)),
}


class CLIPCameraProjection(nn.Module):
    """The one layer that turns Zero123's [image embedding, pose] into a cross-attention token."""

    def __init__(self, embedding_dim: int, additional_embeddings: int = 4):
        super().__init__()
        self.proj = nn.Linear(embedding_dim + additional_embeddings, embedding_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.proj(embedding)


class ToyPrior(nn.Module):
    """Everything that is trained for one prior."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet


class TextPrior(ToyPrior):
    """One that reads sentences."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel | T5EncoderModel):
        super().__init__(unet)
        self.text = text


class NovelViewPrior(ToyPrior):
    """One that is shown an image."""

    def __init__(self, unet: UNet2DConditionModel, image: CLIPVisionModelWithProjection):
        super().__init__(unet)
        self.image, self.projection = image, CLIPCameraProjection(WIDTH)


def build_prior(kind: PriorKind, size: ToySize | None = None, latent: bool = False) -> ToyPrior:
    """Build the freshly initialised networks of one kind (from torch's global generator, as diffusers does).

    `latent`: for what `build_autoencoder` makes of the images.
    """
    size = size or SIZES[kind]
    grouped = kind in ("multiview", "video")
    unet = _build_unet(kind, size, latent)
    if grouped:
        attend_across_views(unet)
    if kind == "novel_view":
        return NovelViewPrior(unet, _build_image_encoder())
    return TextPrior(unet, _build_t5() if kind == "pixel" else _build_clip_text())


def build_autoencoder() -> AutoencoderKL:
    """A small one: images [n, 3, H, W] to 4 channels of half the size."""
    from diffusers.models import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def build_tiny_autoencoder() -> AutoencoderTiny:
    """A smaller one for the same latents."""
    from diffusers.models import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1),
        latent_channels=LATENT_CHANNELS,
    )


def _build_unet(kind: PriorKind, size: ToySize, latent: bool) -> UNet2DConditionModel:
    from diffusers.models import UNet2DConditionModel

    grouped = kind in ("multiview", "video")
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 2 if latent else IMAGE_SIZE,
        in_channels=LATENT_CHANNELS if latent else 6 if kind == "novel_view" else 3,
        out_channels=LATENT_CHANNELS if latent else 6 if kind == "pixel" else 3,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=size.channels,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        # despite its name this is the number of heads (a slip that diffusers keeps for its old models' sake)
        attention_head_dim=size.heads,
        class_embed_type="projection" if grouped else None,
        projection_class_embeddings_input_dim=16 if grouped else None,
        encoder_hid_dim=WIDTH if kind == "pixel" else None,
    )


def _build_clip_text() -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary_of_clip, _ = clip_vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary_of_clip),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=WIDTH,
        bos_token_id=vocabulary_of_clip["<|startoftext|>"],
        eos_token_id=vocabulary_of_clip["<|endoftext|>"],
        pad_token_id=vocabulary_of_clip["<|endoftext|>"],
    )
    return CLIPTextModel(config)


def _build_t5() -> T5EncoderModel:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=3 + len(t5_pieces()),
        d_model=WIDTH,
        d_kv=16,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def _build_image_encoder() -> CLIPVisionModelWithProjection:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config)


# --- Tokenizers ------------------------------------------------------------------------------------------------


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return (vocabulary, merges) of a byte-pair encoding in which every known word is one token.

    Each word gets the merges that the earlier words' merges leave it in want of, so none is broken by another;
    unknown words fall apart into letters and beginnings of known words.
    """
    letters = [*"abcdefghijklmnopqrstuvwxyz", ",", "."]
    tokens = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters)])
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        while len(parts := _apply_merges([*word[:-1], word[-1] + "</w>"], merges)) > 1:
            merges.append((parts[0], parts[1]))
            tokens[parts[0] + parts[1]] = None
    for special in ("<|startoftext|>", "<|endoftext|>"):
        tokens[special] = None
    return {token: i for i, token in enumerate(tokens)}, merges


def _apply_merges(parts: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Merge neighbours as byte-pair encoding does: the earliest rule first, everywhere it fits."""
    for pair in merges:
        merged: list[str] = []
        for part in parts:
            if merged and (merged[-1], part) == pair:
                merged[-1] += part
            else:
                merged.append(part)
        parts = merged
    return parts


def t5_pieces() -> list[tuple[str, float]]:
    """Return the pieces (and their scores) of a unigram model in which every known word is one piece."""
    commas = [(",", -1.0)]
    words = [("▁" + word, -1.0) for word in WORDS]
    letters = [(letter, -10.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    return [*words, *commas, *letters]


def save_clip_tokenizer(folder: Path) -> None:
    """Write a tokenizer that transformers' CLIPTokenizer loads, in the format of the published models."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens, merges = clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(tokens), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")


def save_t5_tokenizer(folder: Path) -> None:
    """Write a tokenizer.json that transformers' PreTrainedTokenizerFast loads."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram

    folder.mkdir(parents=True, exist_ok=True)
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(Unigram([*((token, 0.0) for token in special), *t5_pieces()], unk_id=2))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_TOKENS, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def tokenize(kind: PriorKind, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return (token ids, attention mask), [n, MAX_TOKENS], through the very files that are saved."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (save_t5_tokenizer if kind == "pixel" else save_clip_tokenizer)(Path(folder))
        return read_tokenizer(Path(folder)).tokens(texts, MAX_TOKENS)


# --- Folders ---------------------------------------------------------------------------------------------------

_PARTS: dict[str, list[str]] = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_CONDITIONERS: dict[str, dict[str, list[str]]] = {
    "clip": {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]},
    "t5": {
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    },
    "image": {
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "clip_camera_projection": ["dream4d_engine", "CLIPCameraProjection"],
    },
}


FLOW_SHIFT = 3.0
"""SD3's (2403.03206, section 5.3.2). With it a share of the flow's schedule is nearly as much noise as the same share
of the v-priors': sigma 2.0, 7.0 and 147 at 0.4, 0.7 and 0.98, theirs are 2.0, 11.9 and 130. So one recipe serves both.
"""


def scheduler_config(kind: PriorKind, prediction: Prediction = "v") -> dict[str, Any]:
    """The training schedule: 1000 linear betas from 1e-4 to 0.02, v-prediction; or that of a flow."""
    if prediction == "flow":
        return {"_class_name": FLOW_SCHEDULER, "num_train_timesteps": N_TIMESTEPS, "shift": FLOW_SHIFT}
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": N_TIMESTEPS,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "v_prediction",
        "variance_type": "learned_range" if kind == "pixel" else "fixed_small",
        "clip_sample": False,
    }


def model_index(kind: PriorKind, latent: bool = False, prediction: Prediction = "v") -> dict[str, Any]:
    """The folder's model_index.json, with what our loader wants to know."""
    words = [*WORDS, SUBJECT_WORD] if kind == "image" else list(WORDS)
    conditioner = _CONDITIONERS["image" if kind == "novel_view" else "t5" if kind == "pixel" else "clip"]
    ours = {
        "name": f"toy {kind.replace('_', '-')}" + (" flow" if prediction == "flow" else ""),
        "kind": kind,
        "image_size": [IMAGE_SIZE, IMAGE_SIZE],
        "n_frames": {"multiview": N_VIEWS, "video": N_FRAMES}.get(kind),
        "vector": {"multiview": "camera", "video": "frame_time"}.get(kind),
        "group_attention": kind in ("multiview", "video"),
        "known_words": None if kind == "novel_view" else words,
        "negative_prompt": "",
        "license": "Apache-2.0",
    }
    scheduler = ["diffusers", scheduler_config(kind, prediction)["_class_name"]]
    parts = {"unet": _PARTS["unet"], "scheduler": scheduler, **conditioner}
    if latent:
        parts["vae"] = _PARTS["vae"]
    return {"_class_name": "IFPipeline" if kind == "pixel" else "DiffusionPipeline", **parts, "dream4d": ours}


def save_prior(
    prior: ToyPrior,
    kind: PriorKind,
    folder: Path,
    dtype: torch.dtype = torch.float16,
    vae: AutoencoderKL | None = None,
    prediction: Prediction = "v",
) -> None:
    """Write an ordinary diffusers folder with weights of `dtype`; the networks themselves are left as they are."""
    import copy

    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(prior).cpu().to(dtype)
    half.unet.save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(kind, prediction))
    write_json(folder / "model_index.json", model_index(kind, vae is not None, prediction))
    if vae is not None:
        half_vae = copy.deepcopy(vae).cpu().to(dtype)  # type: ignore[arg-type]  # diffusers' decorator hides the types of `to`
        half_vae.save_pretrained(folder / "vae")
    if isinstance(half, TextPrior):
        with no_progress_bars():
            half.text.save_pretrained(folder / "text_encoder")
        (save_t5_tokenizer if kind == "pixel" else save_clip_tokenizer)(folder / "tokenizer")
    if isinstance(half, NovelViewPrior):
        with no_progress_bars():
            half.image.save_pretrained(folder / "image_encoder")
        part = folder / "clip_camera_projection"
        part.mkdir(exist_ok=True)
        config = {"_class_name": "CLIPCameraProjection", "embedding_dim": WIDTH, "additional_embeddings": 4}
        write_json(part / "config.json", config)
        state = {name: value.contiguous() for name, value in half.projection.state_dict().items()}
        save_file(state, str(part / "diffusion_pytorch_model.safetensors"), metadata={"format": "pt"})


def load_weights(prior: ToyPrior, folder: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Read the networks' weights back from a folder; those whose name holds one of `leave_out` stay as they are."""
    from safetensors.torch import load_file

    parts = {"unet": "unet/diffusion_pytorch_model", "text": "text_encoder/model", "image": "image_encoder/model"}
    parts["projection"] = "clip_camera_projection/diffusion_pytorch_model"
    for name, network in prior.named_children():
        path = folder / f"{parts[name]}.safetensors"
        if not path.is_file():
            raise ValueError(f"cannot start from {folder}: {path} is missing")
        state = load_file(str(path))
        kept = {key: value for key, value in state.items() if not any(part in key for part in leave_out)}
        left_out = [key for key in state if key not in kept]
        found = network.load_state_dict(kept, strict=False)
        if found.unexpected_keys or set(found.missing_keys) - set(left_out):
            raise ValueError(f"cannot start from {path}: it is of another network")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
