"""Low-rank additions (LoRA, 2106.09685) to a model's weights, in the formats that DreamBooth-LoRA files have had.

A file holds pairs of small matrices: a layer's weight W [o, i] becomes W + strength * (alpha / r) * up @ down with
up [o, r], down [r, i]. They are added to the weights once, so that nothing is slower afterwards. The names of the
pairs, for the layer `attn1.to_q` (all of them understood, the text encoder's too):

    attn1.processor.to_q_lora.down.weight    diffusers' attention processors (2023)
    attn1.to_q.lora.down.weight              diffusers after that; `lora_linear_layer` in text encoders
    attn1.to_q.lora_A.weight                 peft, what diffusers writes today
    lora_unet_..._attn1_to_q.lora_down.weight, ....alpha    the collections' format (kohya's scripts)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from .checkpoints import Checkpoint, open_checkpoint
from .errors import PriorError

if TYPE_CHECKING:
    from .loading import Prior

Part = Literal["unet", "text_encoder"]

_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_PAIRS = (
    re.compile(r"(?P<layer>.+?)(?:\.processor)?\.(?P<name>to_q|to_k|to_v|to_out)_lora\.(?P<half>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.(?:lora|lora_linear_layer)\.(?P<half>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.lora_(?P<half>A|B)(?:\.\w+)?\.weight"),
    re.compile(r"(?P<layer>.+)\.lora_(?P<half>down|up)\.weight"),
)
_HALVES = {"down": "down", "up": "up", "A": "down", "B": "up"}
_ALPHA = re.compile(r"(.+)\.alpha")
_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """One pair: down [r, i] or [r, i, h, w], up [o, r] or [o, r, 1, 1]; what alpha / r makes of it."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self, device: torch.device) -> Tensor:
        """Return what is added at strength 1, [o, i * h * w], float32."""
        up, down = (half.to(device).float().flatten(1) for half in (self.up, self.down))
        return self.scale * up @ down


Layers = Mapping[str, LoraLayer]


@dataclass(frozen=True, eq=False)
class TextLora:
    """What a LoRA adds to a text encoder, `source` says where it is from."""

    source: Path
    layers: Layers
    strength: float


def apply_lora(prior: Prior, path: Path | str, strength: float = 1.0) -> Prior:
    """Add a LoRA to a prior's own UNet, and to its text encoder whenever that is loaded; return the prior.

    Nothing is changed where the LoRA does not fit: PriorError names the layers. A second LoRA adds to the first, and
    the same one with the negative strength takes it away again (up to rounding).
    """
    if not -10.0 <= strength <= 10.0:
        raise PriorError(f"the strength of a LoRA must lie in [-10, 10], got {strength}")
    parts = read_lora(path)
    if not parts["unet"] and not parts["text_encoder"]:
        raise PriorError(f"{path} holds no LoRA")
    add_layers(prior.denoiser.unet, parts["unet"], strength, f"{path} does not fit the model {prior.name!r}")
    if not parts["text_encoder"]:
        return prior
    added = TextLora(Path(path), parts["text_encoder"], strength)
    return replace(prior, text_loras=(*prior.text_loras, added))


def add_text_loras(encoder: nn.Module, loras: tuple[TextLora, ...]) -> None:
    """Add LoRAs to the weights of a text encoder."""
    for lora in loras:
        add_layers(encoder, lora.layers, lora.strength, f"{lora.source} does not fit the text encoder")


def is_lora(names: Mapping[str, object]) -> bool:
    """Whether names of tensors are those of a LoRA file."""
    return bool(names) and all(_ALPHA.fullmatch(n) or any(p.fullmatch(n) for p in _PAIRS) for n in names)


def read_lora(path: Path | str) -> dict[Part, Layers]:
    """Read a LoRA file, or the one in a folder: the layers of the UNet and of the text encoder by name.

    A layer's name is that of the module, or with `_` for `.` where the file writes it so.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise PriorError(f"{path} holds no LoRA: {_FILES[0]} is missing")
        path = found[0]
    file = open_checkpoint(path)
    halves, alphas = _halves(file)
    declared = _declared_alphas(file)
    parts: dict[Part, dict[str, LoraLayer]] = {"unet": {}, "text_encoder": {}}
    for name, pair in halves.items():
        if pair.keys() != {"down", "up"}:
            raise PriorError(f"{path} is not complete: {name} has no {'up' if 'down' in pair else 'down'} matrix")
        part, layer = _place(name)
        rank = pair["down"].shape[0]
        alpha = alphas.get(name, declared(part, layer, float(rank)))
        parts[part][layer] = LoraLayer(pair["down"], pair["up"], alpha / rank)
    return parts


def _halves(file: Checkpoint) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Return the pairs of matrices and the alphas by the name that the file gives to their layer."""
    halves: dict[str, dict[str, Tensor]] = {}
    alphas, strange = {}, []
    for key in file.shapes:
        if found := _ALPHA.fullmatch(key):
            alphas[found[1]] = file.tensor(key).float().item()
            continue
        found = next((match for pattern in _PAIRS if (match := pattern.fullmatch(key))), None)
        if found is None:
            strange.append(key)
            continue
        groups = found.groupdict()
        layer = groups["layer"] + (f".{groups['name']}" if groups.get("name") else "")
        halves.setdefault(layer, {})[_HALVES[groups["half"]]] = file.tensor(key)
    if strange:
        raise PriorError(f"{file.path} is no LoRA that can be used: it holds {', '.join(strange[:3])}")
    return halves, alphas


def _declared_alphas(file: Checkpoint):
    """Return (part, layer, default) -> alpha by the header that diffusers writes for peft's LoRAs."""
    try:
        settings = json.loads(file.extra.get(_METADATA, "{}"))
    except (TypeError, ValueError):
        settings = {}

    def alpha(part: Part, layer: str, default: float) -> float:
        own = settings.get(f"{part}.alpha_pattern") or {}
        return float(own.get(layer, settings.get(f"{part}.lora_alpha", default)))

    return alpha


def _place(name: str) -> tuple[Part, str]:
    """Return which network a name is in, and the layer's own name."""
    name = name.removeprefix("base_model.model.")
    for prefix in ("lora_te_", "lora_te1_", "text_encoder."):
        if name.startswith(prefix):
            layer = name.removeprefix(prefix).removeprefix("base_model.model.")
            head, _, last = layer.rpartition(".")
            return "text_encoder", f"{head}.{_TEXT_NAMES[last]}" if last in _TEXT_NAMES else layer
    layer = name.removeprefix("unet.").removeprefix("base_model.model.").removeprefix("lora_unet_")
    return "unet", f"{layer}.0" if layer.endswith(".to_out") else layer


@torch.no_grad()
def add_layers(network: nn.Module, layers: Layers, strength: float, complaint: str) -> None:
    """Add a LoRA's layers to a network's weights, once all of them are known to fit."""
    modules = {name: m for name, m in network.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}
    flat = {name.replace(".", "_"): name for name in modules}
    found: list[tuple[nn.Module, LoraLayer]] = []
    problems = []
    for name, layer in layers.items():
        module = modules.get(_known(name, modules, flat))
        if module is None:
            problems.append(f"{name} is not in it")
            continue
        wants = (layer.up.shape[0], layer.down[0].numel())
        has = (module.weight.shape[0], module.weight[0].numel())
        if wants == has:
            found.append((module, layer))
        else:
            problems.append(f"{name} is {wants[1]} -> {wants[0]} there and {has[1]} -> {has[0]} here")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise PriorError(
            f"{complaint}: {'; '.join(problems[:3])}{more} (of {len(layers)} layers): it was made for another model"
        )
    for module, layer in found:
        delta = strength * layer.delta(module.weight.device)
        # not in place: the memory may be the file's, which is read again for the text encoder
        module.weight.data = (module.weight.float() + delta.reshape(module.weight.shape)).to(module.weight.dtype)


def _known(name: str, modules: Mapping[str, object], flat: Mapping[str, str]) -> str:
    """The module's name that is meant. Newer versions of transformers leave `text_model` out of CLIP's names."""
    plain = name.removeprefix("text_model.").removeprefix("text_model_")
    for candidate in (name, plain, f"text_model.{plain}"):
        if candidate in modules:
            return candidate
    return flat.get(name) or flat.get(plain) or flat.get(f"text_model_{plain}") or name
