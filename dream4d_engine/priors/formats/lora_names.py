"""The names of a LoRA's tensors: which half of which layer in which network, and what is no such LoRA at all."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

Part = Literal["unet", "text_encoder"]
Role = Literal["down", "up", "alpha"]

# one a way of writing, see lora_files.py
_PAIRS = (
    re.compile(r"(?P<layer>.+?)(?:\.processor)?\.(?P<name>to_q|to_k|to_v|to_out)_lora\.(?P<half>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.(?:lora|lora_linear_layer)\.(?P<half>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.lora_(?P<half>A|B)(?:\.\w+)?\.weight"),
    re.compile(r"(?P<layer>.+)\.lora_(?P<half>down|up)\.weight"),
)
_HALVES: dict[str, Role] = {"down": "down", "up": "up", "A": "down", "B": "up"}
_ALPHA = re.compile(
    r"(?P<layer>.+?)(?:(?:\.processor)?\.(?P<name>to_q|to_k|to_v|to_out)_lora|\.lora|\.lora_linear_layer)?\.alpha"
)
PEFT = re.compile(r".+\.lora_[AB](?:\.\w+)?\.weight")
_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

WRAPPED = "base_model.model."  # what peft alone puts before all names, its model being within another
_PREFIXES: tuple[tuple[str, Part], ...] = (
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("text_encoder.", "text_encoder"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_h.transformer.", "text_encoder"),
    ("clip_l.transformer.", "text_encoder"),
    ("clip_h.transformer.", "text_encoder"),
    ("cond_stage_model.transformer.", "text_encoder"),
    ("lora_unet_", "unet"),
    ("unet.", "unet"),
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
)
_TEXT_STARTS = ("text_model.", "text_model_", "encoder.layers.")

# what begins so in a LoRA for another model, and which model that is
_FOREIGN_MODELS = (
    (re.compile(r"lora_te2_|text_encoder_2\.|text_encoders?\.clip_g\.|clip_g\."), "Stable Diffusion XL"),
    (re.compile(r"lora_te3_|text_encoder_3\.|.*joint_blocks[._]\d"), "Stable Diffusion 3"),
    (re.compile(r".*(double_blocks|single_blocks|single_transformer_blocks)[._]\d"), "Flux, or a model like it"),
    (re.compile(r"lora_prior_|.*(prior|decoder)_unet"), "Stable Cascade"),
    (re.compile(r".*motion_modules?[._]\d"), "AnimateDiff's motion"),
    (re.compile(r"lllite_"), "ControlNet-LLLite"),
    (
        re.compile(
            rf"(?:{re.escape(WRAPPED)})?(?:transformer\.|lora_transformer_|"
            r"(?:model\.)?diffusion_model\.(?:layers|blocks|transformer_blocks)\.|lora_unet_(?:layers|blocks)_\d)"
        ),
        "a diffusion transformer (Stable Diffusion 3, Flux and others)",
    ),
)
# what tensors are named like in files of the same use and other arithmetic; `_OTHERS` may be whole models' names too
_RELATIVES = (
    (re.compile(r".*\.(dora_scale|lora_magnitude_vector)\b.*"), "a DoRA (it scales whole columns of the weights too)"),
    (re.compile(r".*\.hada_.*"), "a LoHa (products of pairs)"),
    (re.compile(r".*\.lokr_.*"), "a LoKr (Kronecker products)"),
    (re.compile(r".*\.b?oft_.*"), "an OFT (rotations of weights)"),
    (re.compile(r".*\.vera_.*|.*vera_[AB].*"), "a VeRA (shared random pairs)"),
    (re.compile(r".*\.ia3_.*|.*\.on_input"), "an IA3 (factors of activations)"),
    (re.compile(r".*\.lora_mid\..*"), "a LoRA of three matrices a layer (a Tucker decomposition)"),
    (re.compile(r".*\.lora_embedding_[AB].*"), "a LoRA that changes the words' embeddings"),
    (
        re.compile(r".*\.(lora_[AB](\.\w+)?|lora_up|lora_down|lora\.up|lora\.down)\.bias"),
        "a LoRA with biases (lora_bias)",
    ),
)
_OTHERS = (
    (re.compile(r".*\.(a1|a2|b1|b2|bm1|bm2)\.weight"), "a GLoRA (pairs that read the weights)"),
    (re.compile(r".*\.(diff|diff_b|w_norm|b_norm|set_weight)"), "a table of whole differences (not of pairs)"),
    (re.compile(r"(unet|text_encoder):\d+:(up|down)"), "a LoRA whose layers have numbers for names (lora_diffusion's)"),
    (
        re.compile(r"bundle_emb\..*|emb_params|string_to_param.*|clip_[lg]|<.+>"),
        "a word learned by textual inversion, or a LoRA with one",
    ),
)


def role_of(key: str) -> tuple[str, Role] | None:
    """Return the layer that a tensor belongs to, as the file names it, and what it is there; None: nothing known."""
    found = _ALPHA.fullmatch(key)  # first: the pairs' patterns take no alpha, this one takes no half
    role: Role = "alpha"
    if found is None:
        found = next((match for pattern in _PAIRS if (match := pattern.fullmatch(key))), None)
        if found is None:
            return None
        role = _HALVES[found["half"]]
    groups = found.groupdict()
    return found["layer"] + (f".{groups['name']}" if groups.get("name") else ""), role


def is_lora(names: Iterable[str]) -> bool:
    """Whether names of tensors are those of a LoRA file, or of one of its relatives."""
    return any(
        ((found := role_of(name)) is not None and found[1] != "alpha")
        or any(pattern.fullmatch(name) for pattern, _ in _RELATIVES)
        for name in names
    )


def foreign_model(names: Iterable[str]) -> str | None:
    """The model that a LoRA is for, if it is none that can be used here and the names tell."""
    names = list(names)
    return next((what for pattern, what in _FOREIGN_MODELS if any(pattern.match(name) for name in names)), None)


def foreign_kind(name: str) -> str | None:
    """What a file is that holds such a name, if it is a relative of the LoRAs."""
    return next((what for pattern, what in (*_RELATIVES, *_OTHERS) if pattern.fullmatch(name)), None)


def place(name: str, part: Part | None = None) -> tuple[Part, str]:
    """Return which network a layer is in, and its own name there; `part`: the network, where it is known."""
    layer = name.removeprefix(WRAPPED)
    prefix, found = next((entry for entry in _PREFIXES if layer.startswith(entry[0])), ("", None))
    layer = layer.removeprefix(prefix).removeprefix(WRAPPED)  # before or after the network's name
    part = part or found or ("text_encoder" if layer.startswith(_TEXT_STARTS) else "unet")
    if part == "unet":  # attention's output is a linear layer and a dropout, of which the first is meant
        return part, f"{layer}.0" if layer.endswith(".to_out") else layer
    # diffusers' old names of attention were the UNet's, in the text encoder too
    head, _, last = layer.rpartition(".")
    return part, f"{head}.{_TEXT_NAMES[last]}" if last in _TEXT_NAMES else layer
