"""Low-rank additions (LoRA, 2106.09685) to a model's weights.

A layer's weight W [o, i] becomes W + strength * (alpha / r) * up @ down with up [o, r], down [r, i]. They are added to
the weights once, so that nothing is slower afterwards. What the files look like is in lora_files.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..documents import printable, shortened
from .errors import PriorError
from .formats import ldm_keys
from .formats.finite import FULL_PRECISION
from .formats.lora_files import Layers, LoraLayer

MOST_STRENGTH = 10.0
_TOKEN_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
_Found = list[tuple[Tensor, str, LoraLayer]]


@dataclass(frozen=True, eq=False)
class TextLora:
    """What a LoRA adds to a text encoder, `source` says where it is from."""

    source: Path
    layers: Layers
    strength: float


def check_strength(strength: float) -> None:
    """Refuse a strength that can't be meant."""
    if not -MOST_STRENGTH <= strength <= MOST_STRENGTH:
        raise PriorError(f"the strength of a LoRA must lie in [-10, 10], got {strength}")


def add_text_loras(encoder: nn.Module, loras: tuple[TextLora, ...]) -> None:
    """Add LoRAs to the weights of a text encoder."""
    for lora in loras:
        add_layers(encoder, lora.layers, lora.strength, f"{lora.source} does not fit the text encoder")


@torch.no_grad()
def add_layers(network: nn.Module, layers: Layers, strength: float, complaint: str) -> None:
    """Add a LoRA's layers to a network's weights, once all of them are known to fit."""
    found = _find(network, layers, complaint)
    # one pass to look and one to change: keeping the sums of all layers in between would take the memory of a model
    tops = [_sum(weight, layer, strength).abs().max().float() for weight, _, layer in found]
    sound = torch.stack(tops).isfinite().tolist() if tops else []
    too_large = next((name for (_, name, _), fits in zip(found, sound, strict=True) if not fits), None)
    if too_large is not None:
        kind = str(next(network.parameters()).dtype).removeprefix("torch.")
        raise PriorError(
            f"{complaint}: with strength {strength:g}, the weights of {too_large} are more than {kind} can hold; take "
            f"a smaller strength, or use the model {FULL_PRECISION}"
        )
    for weight, _, layer in found:
        # not in place: the memory may be the file's, which is read again for the text encoder
        weight.data = _sum(weight, layer, strength)


def _sum(weight: Tensor, layer: LoraLayer, strength: float) -> Tensor:
    """A layer's weight with what is added, in its own type."""
    delta = strength * layer.delta(weight.device)
    return (weight.float() + delta.reshape(weight.shape)).to(weight.dtype)


def _find(network: nn.Module, layers: Layers, complaint: str) -> _Found:
    """Return the network's weights that a LoRA is for. PriorError unless it has all of them, in these shapes."""
    weights = {name: w for name, m in network.named_modules() if (w := _matrix(m)) is not None}
    flat = {name.replace(".", "_"): name for name in weights}
    n_resnets = getattr(getattr(network, "config", None), "layers_per_block", None)
    found: dict[str, tuple[Tensor, str, LoraLayer]] = {}
    problems = []
    for key, layer in layers.items():
        name = shortened(printable(key), 120)
        translated = ldm_keys.unet_layer(key, n_resnets) if isinstance(n_resnets, int) else None
        known = _known(key, weights, flat, translated)
        if known is None:
            also = "" if translated is None else f" ({translated} in diffusers' words)"
            problems.append(f"{name}{also} is not in it")
            continue
        weight = weights[known]
        wants = (layer.up.shape[0], layer.down[0].numel())
        has = (weight.shape[0], weight[0].numel())
        if wants != has:
            problems.append(f"{name} is {wants[1]} -> {wants[0]} there and {has[1]} -> {has[0]} here")
        elif known in found:
            problems.append(f"{known} is named twice there")
        found[known] = (weight, known, layer)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise PriorError(
            f"{complaint}: {'; '.join(problems[:3])}{more} (of {len(layers)} layers): it was made for another model"
            f"{_made_for(layers)}"
        )
    return list(found.values())


def _matrix(module: nn.Module) -> Tensor | None:
    """A layer's weight, where a LoRA can be for it."""
    weight = getattr(module, "weight", None)
    fits = isinstance(weight, Tensor) and weight.ndim >= 2 and not isinstance(module, nn.Embedding)
    return weight if fits else None


def _made_for(layers: Layers) -> str:
    """What a LoRA for a UNet was made for, by the width of the text's tokens."""
    text = (layer.down[0].numel() for name, layer in layers.items() if name.endswith(("attn2.to_k", "attn2_to_k")))
    width = next(text, None)
    return f" (its text is {width} wide, as in {_TOKEN_WIDTHS[width]})" if width in _TOKEN_WIDTHS else ""


def _known(name: str, weights: Mapping[str, object], flat: Mapping[str, str], translated: str | None) -> str | None:
    """The module's name that is meant: the same, or in other words, or None.

    Newer versions of transformers leave `text_model` out of CLIP's names. `translated`: from latent diffusion's names.
    """
    plain = name.removeprefix("text_model.").removeprefix("text_model_")
    for candidate in (name, plain, f"text_model.{plain}"):
        if candidate in weights:
            return candidate
    spellings = (name, plain, f"text_model_{plain}", translated or name)
    return next((flat[found] for word in spellings if (found := word.replace(".", "_")) in flat), None)
