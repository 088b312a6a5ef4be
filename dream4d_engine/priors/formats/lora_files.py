"""LoRA files: what lies where, and its pairs of matrices, checked before anything is added to anything.

A file holds pairs of small matrices for layers of a UNet and a text encoder. The names of the pairs, for the layer
`attn1.to_q` (all of them understood, the text encoder's too):

    attn1.processor.to_q_lora.down.weight    diffusers' attention processors (2023)
    attn1.to_q.lora.down.weight              diffusers after that; `lora_linear_layer` in text encoders
    attn1.to_q.lora_A.weight                 peft, what diffusers writes today
    lora_unet_..._attn1_to_q.lora_down.weight, ....alpha    the collections' format (kohya's scripts)

The layer may have its name in diffusers or in latent diffusion (input_blocks.4.1...), with dots or `_`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import PriorError
from .checkpoints import Checkpoint, open_checkpoint, shown
from .finite import check_finite
from .lora_names import Part, Role, foreign_kind, foreign_model, place, role_of
from .lora_scale import CONFIG, read_scaling

_DIFFUSERS, _PEFT = "pytorch_lora_weights", "adapter_model"
_SUFFIXES = (".safetensors", ".bin")
_PARTS: tuple[Part, ...] = ("unet", "text_encoder")


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """One pair of matrices, which adds scale * up @ down to a layer's weights (2106.09685, section 4.1)."""

    down: Tensor  # [r, i] or [r, i, h, w]
    up: Tensor  # [o, r] or [o, r, 1, 1]
    scale: float  # alpha / r

    def delta(self, device: torch.device) -> Tensor:
        """Return what is added at strength 1, [o, i * h * w], float32."""
        up, down = (half.to(device).float().flatten(1) for half in (self.up, self.down))
        return self.scale * up @ down


Layers = Mapping[str, LoraLayer]


def read_lora(path: Path | str) -> Mapping[Part, Layers]:
    """Read a LoRA file, or the one in a folder: the layers of the UNet and of the text encoder by name.

    A layer's name is that of the module, or with `_` for `.` where the file writes it so. PriorError names the file
    and what is wrong with it: here, not when it is added.
    """
    parts: dict[Part, dict[str, LoraLayer]] = {"unet": {}, "text_encoder": {}}
    for file, part in _weights(Path(path)):
        for of, layers in _read_file(open_checkpoint(file), part).items():
            parts[of] |= layers
    found = [layer for part in parts.values() for layer in part.values()]
    if not found:
        raise PriorError(f"{path} holds no LoRA")
    if not any(layer.scale for layer in found):
        raise PriorError(f"{path} would add nothing: its alpha is 0 in every layer")
    return parts


def holds_lora(folder: Path) -> bool:
    """Whether a folder is one that training of a LoRA writes."""
    return bool(_found(folder))


def lora_files(path: Path) -> list[Path]:
    """All files that are read of a LoRA, settings too."""
    if path.is_dir() and not holds_lora(path):
        return []
    weights = [file for file, _ in _weights(path)]
    beside = [file.with_name(CONFIG) for file in weights]
    return [*weights, *(file for file in dict.fromkeys(beside) if file.is_file())]


def _weights(path: Path) -> list[tuple[Path, Part | None]]:
    """Return the files of a LoRA, and which network each is for, where its place says so."""
    if not path.is_dir():
        return [(path, None)]
    found = _found(path)
    if not found:
        raise PriorError(f"{path} holds no LoRA: {_DIFFUSERS}.safetensors is missing (or peft's {_PEFT}.safetensors)")
    if len(found) > 1 and found[0][1] is None:
        raise PriorError(f"{path} holds two LoRAs, {found[0][0].name} and {found[1][0].name}: say which file")
    return found


def _found(folder: Path) -> list[tuple[Path, Part | None]]:
    """What a folder holds: one file, or two that are two LoRAs; or peft's folders, one for each network."""
    own = [file for stem in (_DIFFUSERS, _PEFT) if (file := _file(folder, stem)) is not None]
    if own:
        return [(file, None) for file in own]
    return [(file, part) for part in _PARTS if (file := _file(folder / part, _PEFT)) is not None]


def _file(folder: Path, stem: str) -> Path | None:
    files = (folder / f"{stem}{suffix}" for suffix in _SUFFIXES)
    return next((file for file in files if file.is_file()), None)


# ---- One file ----------------------------------------------------------------------------------------------------

_Keys = dict[Role, str]


def _read_file(file: Checkpoint, part: Part | None) -> dict[Part, dict[str, LoraLayer]]:
    # strides of 0 or storages that are shared could make gigabytes of a few bytes
    n_numbers, n_bytes = sum(map(math.prod, file.shapes.values())), file.path.stat().st_size
    if n_numbers > n_bytes:
        raise PriorError(f"{file.path} claims {n_numbers:,} numbers and has {n_bytes:,} bytes: it is damaged")
    table = _by_layer(file)
    ranks = {name: _rank(file, name, keys) for name, keys in table.items()}
    places = {name: place(name, part) for name in table}
    scales = _scales(file, table, places, ranks)
    tensors = {key: _tensor(file, key) for keys in table.values() for key in (keys["down"], keys["up"])}
    check_finite(tensors, file.path)
    found: dict[Part, dict[str, LoraLayer]] = {"unet": {}, "text_encoder": {}}
    for name, keys in table.items():
        network, layer = places[name]
        if layer in found[network]:
            raise PriorError(f"{file.path} holds more than one pair for {shown(layer)}: is it several LoRAs in one?")
        found[network][layer] = LoraLayer(tensors[keys["down"]], tensors[keys["up"]], scales[name])
    return found


def _by_layer(file: Checkpoint) -> dict[str, _Keys]:
    """Return the tensors of each layer, by the name that the file gives it: both halves, perhaps an alpha."""
    model = foreign_model(file.shapes)
    if model is not None:
        raise PriorError(f"{file.path} is a LoRA for {model}: here, LoRAs for Stable Diffusion 1 and 2 can be used")
    table: dict[str, _Keys] = {}
    strange = []
    for key in file.shapes:
        kind = foreign_kind(key)
        if kind is not None:
            raise PriorError(f"{file.path} is {kind}, not a plain LoRA: it can't be used (it holds {shown(key)})")
        found = role_of(key)
        if found is None:
            strange.append(key)
            continue
        keys = table.setdefault(found[0], {})
        if found[1] in keys:
            raise PriorError(f"{file.path} holds both {shown(keys[found[1]])} and {shown(key)}: is it several LoRAs?")
        keys[found[1]] = key
    if strange:
        names = ", ".join(map(shown, strange[:3]))
        also = " beside its pairs (weights that were trained as a whole?)" if table else ""
        raise PriorError(f"{file.path} is no LoRA that can be used: it holds {names}{also}")
    for name, keys in table.items():
        missing = next((role for role in ("down", "up") if role not in keys), None)
        if missing:
            raise PriorError(f"{file.path} is not complete: {shown(name)} has no {missing} matrix")
    return table


def _rank(file: Checkpoint, name: str, keys: _Keys) -> int:
    """Return the rank of a pair, by the shapes of its halves."""
    down, up = file.shapes[keys["down"]], file.shapes[keys["up"]]
    where = f"{file.path}: {shown(name)}"
    if not (2 <= len(down) <= 5 and 2 <= len(up) <= 5):
        raise PriorError(f"{where} has halves of the shapes {list(down)} and {list(up)}, which are no matrices")
    if 0 in down + up:
        raise PriorError(f"{where} is empty: its down matrix is {list(down)}, its up matrix {list(up)}, of rank 0?")
    if math.prod(up[1:]) != down[0]:  # of a convolution's pair up is 1x1
        raise PriorError(
            f"{where} has halves of unequal ranks, {down[0]} (down, {list(down)}) and {math.prod(up[1:])} (up, "
            f"{list(up)}): the file is damaged, or was merged wrongly"
        )
    return down[0]


def _scales(
    file: Checkpoint,
    table: Mapping[str, _Keys],
    places: Mapping[str, tuple[Part, str]],
    ranks: Mapping[str, int],
) -> dict[str, float]:
    """Return what each pair's product is multiplied by: as its alpha says, else as peft's settings do, else 1."""
    scales = {}
    for name, keys in table.items():
        if "alpha" not in keys:
            continue
        key = keys["alpha"]
        n_values = math.prod(file.shapes[key])
        if n_values != 1:
            raise PriorError(f"{file.path}: {shown(key)} holds {n_values} values, it must be one number")
        alpha = _tensor(file, key, whole=True).float().item()
        if not math.isfinite(alpha):
            raise PriorError(f"{file.path}: {shown(key)} is {alpha}, it must be a finite number")
        scales[name] = alpha / ranks[name]
    for part, settings in read_scaling(file).items():
        names = {layer: name for name, (network, layer) in places.items() if network == part}
        for layer, factor in settings.factors({layer: ranks[name] for layer, name in names.items()}).items():
            own = scales.setdefault(names[layer], factor)
            # an alpha may be stored in half precision, so no closer than that
            if not math.isclose(own, factor, rel_tol=1e-3):
                raise PriorError(
                    f"{settings.where} makes the factor of {shown(layer)} {factor:g}, {shown(names[layer])}.alpha "
                    f"makes it {own:g}: which one is right can't be known"
                )
    return {name: scales.get(name, 1.0) for name in table}


def _tensor(file: Checkpoint, key: str, whole: bool = False) -> Tensor:
    """Read one tensor; `whole`: whole numbers will do."""
    tensor = file.tensor(key)
    right = tensor.is_floating_point() or (whole and not tensor.is_complex() and tensor.dtype != torch.bool)
    if not right or tensor.layout != torch.strided or tensor.is_quantized:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise PriorError(f"{file.path}: {shown(key)} holds {kind}, not plain floating point numbers")
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor  # of 8 bits: there is little arithmetic for them
