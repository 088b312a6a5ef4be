"""Priors from folders of today's models (formats/pipelines.py): prompts through all of their text encoders, then a
denoiser that is told them."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cameras import CameraBatch
from ..guidance.denoiser import Conditions
from ..guidance.distillation import DistillationConfig, Guidance
from ..guidance.prompts import NEGATIVE_PROMPT, view_index, view_prompts, without_word
from .conditioning import check_prompt
from .errors import PriorError
from .formats.pipelines import PipelineFolder
from .handle import Prior, ReferenceView
from .networks.denoisers import UNetDenoiser, prepared
from .networks.execution import Runtime
from .networks.text import CLIP_TOKENS, Tokenizer, token_rows
from .networks.transformers import TransformerDenoiser, prepared_transformer

WAN_TOKENS, LTX_TOKENS, SD3_TOKENS = 512, 128, 256
"""Of T5, as the models were trained."""
HUNYUAN_TOKENS = 256
"""Of Llama, without those of its instruction."""
_INSTRUCTION = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"
)  # fmt: skip
"""What HunyuanVideo was trained to have said to its Llama before and after a prompt (2412.03603)."""
_INSTRUCTION_TOKENS = 95
"""How many of the first of Llama's tokens are the instruction's, and are left out."""
_LLAMA_LAYER = -3
"""Of Llama's hidden states: two layers before the last."""
FLUX_TOKENS = {True: 512, False: 256}
"""By whether guidance was distilled into the model, which is dev; schnell read fewer."""


@dataclass(frozen=True, eq=False)
class Told:
    """Encoded prompts, a row each."""

    tokens: Tensor  # [n, L, D]
    vector: Tensor | None = None  # [n, K], pooled words
    mask: Tensor | None = None  # [n, L]


def load_pipeline(folder: PipelineFolder, runtime: Runtime) -> Prior:
    """Load the denoiser and the autoencoder; PriorError names the file that is missing, damaged or of another model."""
    metadata, device = folder.metadata(), runtime.device
    flow = folder.prediction() == "flow"
    # flows are made for bfloat16: in half precision their activations overflow
    dtype = torch.bfloat16 if flow and runtime.dtype == torch.float16 else runtime.dtype
    network, vae = folder.network(dtype, device), folder.vae(dtype, device)
    denoiser: UNetDenoiser | TransformerDenoiser
    if flow:
        denoiser = TransformerDenoiser(
            network, vae, folder.noise(), metadata.image_size, metadata.n_frames, device=device
        )
    else:
        denoiser = UNetDenoiser(
            network, folder.noise(), folder.prediction(), metadata.image_size, vae=vae, device=device
        )

    def guide(
        prompt: str, negative: str | None, config: DistillationConfig, reference: ReferenceView | None = None
    ) -> Guidance:
        if config.perp_neg:
            raise PriorError(f"perp-neg mixes the words of views, which {metadata.name} can't: turn it off")
        prompt = prompt if metadata.kind == "image" else without_word(prompt)
        check_prompt(metadata.name, None, prompt)
        avoided = metadata.negative_prompt if negative is None else negative
        texts = (*view_prompts(prompt), NEGATIVE_PROMPT if avoided is None else avoided)
        told = encode_texts(folder, texts, dtype, device)
        ready = (
            prepared(denoiser, runtime)
            if isinstance(denoiser, UNetDenoiser)
            else prepared_transformer(denoiser, runtime)
        )
        return Guidance(metadata.name, ready, told_conditions(told, metadata.n_frames is not None), config)

    return Prior(metadata.name, metadata.kind, guide, metadata.negative_prompt, (network, vae))


def told_conditions(told: Told, of_takes: bool) -> Callable[[CameraBatch], tuple[Conditions, Conditions]]:
    """Return what gives (text, negative) conditions for cameras [B, F]: rows of VIEWS, then the negative.

    `of_takes`: whole takes are told what their first camera is, [B, 1].
    """

    def conditions(cameras: CameraBatch) -> tuple[Conditions, Conditions]:
        view = view_index(cameras.azimuth, cameras.elevation).to(told.tokens.device)
        view = view[:, :1] if of_takes else view

        def rows(index: Tensor) -> Conditions:
            vector, mask = (None if table is None else table[index] for table in (told.vector, told.mask))
            return Conditions(told.tokens[index], vector, None, mask)

        return rows(view), rows(torch.full_like(view, -1))

    return conditions


# ---- Prompts -----------------------------------------------------------------------------------------------------


def encode_texts(folder: PipelineFolder, texts: Sequence[str], dtype: torch.dtype, device: torch.device) -> Told:
    """Return what the model is told of each text; the encoders are loaded one after the other and freed."""
    encode = _ENCODERS[folder.class_name]

    def through(part: str, read: Callable[[Tokenizer, Any], Any]) -> Any:
        tokenizer, encoder = folder.text_encoder(part, dtype, device)
        with torch.no_grad():
            found = read(tokenizer, encoder)
        del encoder
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    return encode(folder, texts, through)


Through = Callable[[str, Callable[[Tokenizer, Any], Any]], Any]


def _t5(texts: Sequence[str], length: int, masked: bool = False) -> Callable[[Tokenizer, Any], tuple[Tensor, Tensor]]:
    """Last hidden states [n, L, D] and mask; `masked`: padding is out of the encoder's sight."""

    def read(tokenizer: Tokenizer, encoder: nn.Module) -> tuple[Tensor, Tensor]:
        ids, mask = token_rows(tokenizer, encoder, texts, length)
        return encoder(ids, attention_mask=mask if masked else None)[0].float(), mask

    return read


def _clip(texts: Sequence[str]) -> Callable[[Tokenizer, Any], tuple[Tensor, Tensor]]:
    """Hidden states before the last layer [n, L, D], and the pooled words [n, K], projected where there is a layer."""

    def read(tokenizer: Tokenizer, encoder: Any) -> tuple[Tensor, Tensor]:
        length = min(tokenizer.max_length, CLIP_TOKENS, encoder.config.max_position_embeddings)
        ids, _ = token_rows(tokenizer, encoder, texts, length)
        out = encoder(ids, output_hidden_states=True)
        pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
        return out.hidden_states[-2].float(), pooled.float()

    return read


def _llama(texts: Sequence[str]) -> Callable[[Tokenizer, Any], tuple[Tensor, Tensor]]:
    """Hidden states [n, HUNYUAN_TOKENS, D] of the prompts in their instruction, and mask."""

    def read(tokenizer: Tokenizer, encoder: nn.Module) -> tuple[Tensor, Tensor]:
        before, after = _INSTRUCTION
        told = [f"{before}{text}{after}" for text in texts]
        ids, mask = token_rows(tokenizer, encoder, told, HUNYUAN_TOKENS + _INSTRUCTION_TOKENS)
        states = encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return states[_LLAMA_LAYER][:, _INSTRUCTION_TOKENS:].float(), mask[:, _INSTRUCTION_TOKENS:]

    return read


def _wan(_folder: PipelineFolder, texts: Sequence[str], through: Through) -> Told:
    # as its pipeline cleans them: white space, and what was escaped for HTML
    clean = [" ".join(html.unescape(html.unescape(text)).split()) for text in texts]
    hidden, mask = through("text_encoder", _t5(clean, WAN_TOKENS, masked=True))
    return Told(hidden * mask[..., None])


def _ltx(_folder: PipelineFolder, texts: Sequence[str], through: Through) -> Told:
    hidden, mask = through("text_encoder", _t5(texts, LTX_TOKENS))
    return Told(hidden, mask=mask.float())


def _hunyuan(_folder: PipelineFolder, texts: Sequence[str], through: Through) -> Told:
    hidden, mask = through("text_encoder", _llama(texts))
    _, pooled = through("text_encoder_2", _clip(texts))
    return Told(hidden, pooled, mask.float())


def _sdxl(_folder: PipelineFolder, texts: Sequence[str], through: Through) -> Told:
    first, _ = through("text_encoder", _clip(texts))
    second, pooled = through("text_encoder_2", _clip(texts))
    return Told(torch.cat((first, second), -1), pooled)


def _sd3(folder: PipelineFolder, texts: Sequence[str], through: Through) -> Told:
    (first, one), (second, other) = (through(part, _clip(texts)) for part in ("text_encoder", "text_encoder_2"))
    clip = torch.cat((first, second), -1)
    if "text_encoder_3" in folder.texts:
        words, _ = through("text_encoder_3", _t5(texts, SD3_TOKENS))
    else:  # as the pipeline does without it
        wide = folder.config(folder.layout.part)["joint_attention_dim"]
        words = clip.new_zeros(len(clip), SD3_TOKENS, wide)
    padded = torch.nn.functional.pad(clip, (0, words.shape[-1] - clip.shape[-1]))
    return Told(torch.cat((padded, words), 1), torch.cat((one, other), -1))


def _flux(folder: PipelineFolder, texts: Sequence[str], through: Through) -> Told:
    _, pooled = through("text_encoder", _clip(texts))
    length = FLUX_TOKENS[bool(folder.config(folder.layout.part).get("guidance_embeds"))]
    words, _ = through("text_encoder_2", _t5(texts, length))
    return Told(words, pooled)


_ENCODERS: dict[str, Callable[[PipelineFolder, Sequence[str], Through], Told]] = {
    "WanPipeline": _wan,
    "LTXPipeline": _ltx,
    "HunyuanVideoPipeline": _hunyuan,
    "StableDiffusionXLPipeline": _sdxl,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
}
