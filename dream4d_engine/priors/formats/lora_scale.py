"""What a LoRA's sums are multiplied by, where peft's settings say it.

They lie in an adapter_config.json beside the file, or in the header that diffusers writes, under the names of the
networks (`unet.lora_alpha`) or without. The factor is alpha / r, or alpha / sqrt(r) with `use_rslora`; `alpha_pattern`
and `rank_pattern` give single layers their own, by regular expressions that match the end of a layer's name.

Settings that change the sum in ways that are not followed here are refused, those that are not known as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...documents import as_object, describe, field, parse_document, read_document
from ..errors import PriorError
from .checkpoints import SUFFIXES, Checkpoint, shown
from .lora_names import PEFT, WRAPPED, Part

CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
_DEFAULT_ALPHA = 8.0  # peft's
_PATTERN_SECONDS, _LONGEST_PATTERN = 1.0, 1000  # for all layers; some expressions take years of one name

_READ = {"r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "peft_type", "bias", "init_lora_weights"}
# said of training, or of where the layers are; they don't change what is added
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_REFUSED = {
    "use_dora": "DoRA, which scales whole columns of the weights too",
    "modules_to_save": "whole layers beside the pairs",
    "lora_bias": "biases beside the pairs",
    "fan_in_fan_out": "layers that are stored the other way round",
    "use_qalora": "QA-LoRA's averaged inputs",
    "layer_replication": "layers that are used several times",
    "trainable_token_indices": "words of its own",
    "target_parameters": "parameters that are no layers",
    "alora_invocation_tokens": "pairs that only some words switch on",
}
# values of init_lora_weights that leave the model's own weights as they are
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Scaling:
    """What peft's settings say of one network's layers."""

    where: str  # the place of the settings, for messages
    alpha: float
    rank: int | None  # None: not said
    root: bool  # divide by sqrt(r) instead of r (rank-stabilized LoRA, 2312.03732)
    alphas: Mapping[str, float]  # of single layers, by regular expressions
    ranks: Mapping[str, float]

    def factors(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Return what the sum of each layer is multiplied by; `ranks`: those of its matrices."""
        end = time.monotonic() + _PATTERN_SECONDS
        found = {}
        for layer, rank in ranks.items():
            said = self.ranks.get(_matching(self.ranks, layer, self.where, end), self.rank)
            if said is not None and said != rank:
                raise PriorError(
                    f"{self.where} says rank {said:g} for {shown(layer)}, its matrices have {rank}: do the settings "
                    "belong to another file?"
                )
            alpha = self.alphas.get(_matching(self.alphas, layer, self.where, end), self.alpha)
            found[layer] = alpha / (math.sqrt(rank) if self.root else rank)
        return found


def read_scaling(file: Checkpoint) -> Mapping[Part, Scaling]:
    """Return what is said of a file's networks: by its own header, else by the settings beside it."""
    text = file.extra.get(METADATA)
    if isinstance(text, str) and text:
        where = f"{file.path}: its header's {METADATA}"
        return _by_part(_settings(parse_document(text, where, PriorError), where), where)
    path = file.path.with_name(CONFIG)
    if not path.is_file() or not _is_of(file):
        return {}
    settings = _scaling(_settings(read_document(path, PriorError), str(path)), str(path))
    return {"unet": settings, "text_encoder": settings}


def _settings(content: Any, where: str) -> dict[str, Any]:
    if content is None:
        raise PriorError(
            f"{where} must hold an object, but holds null: whatever wrote the file left its settings away, and what "
            "its pairs are multiplied by can't be known; save the LoRA anew"
        )
    return as_object(content, where, PriorError)


def _is_of(file: Checkpoint) -> bool:
    """Whether an adapter_config.json beside a file is this file's: peft's names, or no other file it could be for."""
    if file.path.stem == "adapter_model" or any(name.startswith(WRAPPED) for name in file.shapes):
        return True
    try:
        names = [path for path in file.path.parent.iterdir() if path.suffix in SUFFIXES]
    except OSError:  # a folder whose files may be read, not listed
        return False
    written_by_peft = any(PEFT.fullmatch(name) for name in file.shapes)
    return written_by_peft and all(path.stem == file.path.stem for path in names)


def _by_part(tree: Mapping[str, Any], where: str) -> dict[Part, Scaling]:
    found: dict[Part, Scaling] = {}
    if tree and not any("." in name for name in tree):  # of one network, written by itself
        return dict.fromkeys(("unet", "text_encoder"), _scaling(tree, where))
    parts: tuple[Part, ...] = ("unet", "text_encoder")
    for part in parts:
        own = {name.removeprefix(f"{part}."): value for name, value in tree.items() if name.startswith(f"{part}.")}
        if own:
            found[part] = _scaling(own, where, f"{part}.")
    return found


def _scaling(tree: Mapping[str, Any], where: str, prefix: str = "") -> Scaling:
    _refuse(tree, where, prefix)
    rank = _number(tree.get("r", 0), f"{where}: {prefix}r")
    if "r" in tree and (rank < 1 or rank != int(rank)):
        raise PriorError(f"{where}: {prefix}r is {rank:g}, a rank must be 1 or more")
    return Scaling(
        where,
        _number(tree.get("lora_alpha", _DEFAULT_ALPHA), f"{where}: {prefix}lora_alpha"),
        int(rank) if "r" in tree else None,
        field(tree, "use_rslora", bool, _place(where, prefix), PriorError, False),
        _patterns(tree, "alpha_pattern", where, prefix),
        _patterns(tree, "rank_pattern", where, prefix),
    )


def _place(where: str, prefix: str) -> str:
    return f"{where} ({prefix.rstrip('.')})" if prefix else where


def _number(value: object, name: str) -> float:
    """A finite number, as a float."""
    right = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    if not right:  # NaN too
        raise PriorError(f"{name} must be a finite number, got {'null' if value is None else describe(value)}")
    return float(value)  # type: ignore[arg-type]


def _patterns(tree: Mapping[str, Any], name: str, where: str, prefix: str) -> dict[str, float]:
    content = tree.get(name)
    if content is None:
        return {}
    table = as_object(content, f"{where}: {prefix}{name}", PriorError)
    return {key: _number(value, f"{where}: {prefix}{name}, {describe(key)}") for key, value in table.items()}


def _refuse(tree: Mapping[str, Any], where: str, prefix: str) -> None:
    """Refuse settings that change the result and are not followed."""
    kind = field(tree, "peft_type", str, _place(where, prefix), PriorError, "LORA")
    if kind.rpartition(".")[2].upper() != "LORA":
        raise PriorError(f"{where}: {prefix}peft_type is {describe(kind)}: only LoRA can be used")
    if tree.get("bias") not in (None, "none"):
        raise PriorError(f"{where}: {prefix}bias is {describe(tree['bias'])}: a LoRA with trained biases can't be used")
    start = tree.get("init_lora_weights")
    if isinstance(start, list | dict) or start not in _PLAIN_STARTS:
        raise PriorError(
            f"{where}: {prefix}init_lora_weights is {describe(start)}, which changed the model's own weights before "
            "the training: have it converted to an ordinary LoRA"
        )
    for name, value in tree.items():
        # what is not set can't change anything, whatever it would be
        if name in _READ or name in _HARMLESS or not value:
            continue
        what = _REFUSED.get(name, "which is not known here and may change the result")
        raise PriorError(f"{where}: {prefix}{name} is {describe(value)}: {what}, so this LoRA can't be used")


def _matching(patterns: Mapping[str, float], layer: str, where: str, end: float) -> str:
    """The first pattern that matches the end of a layer's name, as peft has it; the name itself if none does."""
    if not patterns:
        return layer
    import regex  # re knows no bound on time

    for pattern in patterns:
        try:
            left = end - time.monotonic()  # one bound for all layers and patterns together
            if left <= 0 or len(pattern) > _LONGEST_PATTERN:
                raise TimeoutError
            if regex.match(rf"(.*\.)?({pattern})$", layer, timeout=left):
                return pattern
        except regex.error as error:
            raise PriorError(f"{where}: {describe(pattern)} is no regular expression ({error})") from error
        except (TimeoutError, RecursionError, MemoryError) as error:
            raise PriorError(f"{where}: {describe(pattern)} takes too long to match the layers' names") from error
    return layer
