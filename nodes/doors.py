"""What comes in at a node's door, against what the node's own schema says of it.

ComfyUI compares with a schema only what stands in the widgets; what comes through a link arrives as it is, from nodes
of any pack. Knows no ComfyUI: a schema is what `INPUT_TYPES` gives, name -> (type, options) in groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from ..dream4d_engine.documents import describe, text_fault

_SHAPES = {"IMAGE": (4, "[B, H, W, C]"), "MASK": (3, "[B, H, W]")}
_IN_WORDS = {"INT": "a whole number", "FLOAT": "a number", "BOOLEAN": "true or false", "STRING": "text"}
_DYNAMIC = "COMFY_DYNAMICCOMBO_V3"


class DoorError(ValueError):
    """An input that a node can't take; the message names it, what came, and what may come."""


def check_values(
    groups: Mapping[str, Mapping],
    values: Mapping[str, Any],
    classes: Mapping[str, type],
    own_choices: frozenset[str] = frozenset(),
    prefix: str = "",
) -> dict[str, Any]:
    """Return the values as plain Python has them, or raise DoorError.

    Args:
        groups: the schema's inputs, "required" and "optional".
        values: what came, by name; a dynamic choice's inputs lie in a mapping.
        classes: what has to come through sockets of the pack's own types.
        own_choices: names of choices whose options the node looks through itself.
        prefix: what stands before the names in messages.
    """
    found = dict(values)
    for group in ("required", "optional"):
        for name, (kind, *rest) in groups.get(group, {}).items():
            options, place, value = (rest[0] if rest else {}), prefix + name, values.get(name)
            if value is None and group == "optional":
                found.pop(name, None)  # the node's own default
                continue
            if kind == _DYNAMIC:
                found[name] = _check_choice_with_inputs(name, place, value, options, classes)
            elif isinstance(kind, list) or kind == "COMBO":
                choices = kind if isinstance(kind, list) else options.get("options", ())
                found[name] = check_choice(place, value, None if name in own_choices else choices)
            else:
                found[name] = _check(place, value, kind, options, classes)
    return found


def check_choice(place: str, value: object, choices: list[str] | None) -> str:
    """Refuse what is none of the choices; None: any text is one."""
    if not isinstance(value, str):
        raise DoorError(f"{place} is {describe(value)}: it must be text, the name of a choice")
    if choices is not None and value not in choices:
        raise DoorError(f"{place} is {describe(value)}: choose one of {', '.join(map(str, choices))}")
    return value


def _check_choice_with_inputs(
    name: str, place: str, value: object, options: Mapping, classes: Mapping[str, type]
) -> dict[str, Any]:
    """A dynamic choice: its key lies beside the inputs that belong to it."""
    if not isinstance(value, Mapping):
        raise DoorError(f"{place} is {describe(value)}: it can't come through a link, choose it on the node")
    choices = {choice["key"]: choice["inputs"] for choice in options["options"]}
    key = check_choice(place, value.get(name), list(choices))
    return check_values(choices[key], value, classes, prefix=f"{place}.")


def _check(place: str, value: object, kind: str, options: Mapping, classes: Mapping[str, type]) -> Any:
    if kind in ("INT", "FLOAT"):
        return _check_number(place, value, kind, options)
    if kind in _SHAPES:
        return _check_pixels(place, value, *_SHAPES[kind])
    if kind == "BOOLEAN":
        if isinstance(value, np.bool_) or (isinstance(value, Integral) and value in (0, 1)):
            return bool(value)
        raise DoorError(f"{place} is {describe(value)}: it must be {_IN_WORDS[kind]}")
    if kind == "STRING":
        if not isinstance(value, str):
            raise DoorError(f"{place} is {describe(value)}: it must be {_IN_WORDS[kind]}")
        fault = text_fault(value)
        if fault is not None:
            raise DoorError(f"{place} {fault}")
        return value
    known = tuple(classes[one] for one in kind.split(",") if one in classes)  # a socket may take several types
    if known and not isinstance(value, known):
        raise DoorError(f"the socket {place} takes {kind}, but {describe(value)} came through its link")
    return value


def _check_number(place: str, value: object, kind: str, options: Mapping) -> int | float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise DoorError(f"{place} is {describe(value)}: it must be {_IN_WORDS[kind]}")
    low, high = options.get("min", -math.inf), options.get("max", math.inf)
    if not low <= value <= high:  # what is not a number lies nowhere
        raise DoorError(f"{place} is {describe(value)}: it must lie between {low} and {high}")
    if kind == "FLOAT":
        return float(value)
    if isinstance(value, Integral):
        return int(value)
    whole = math.floor(value)
    if value != whole:
        raise DoorError(f"{place} is {describe(value)}: it must be {_IN_WORDS[kind]}")
    return int(whole)


def _check_pixels(place: str, value: object, n_dims: int, shape: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise DoorError(f"{place} is {describe(value)}: it must be a tensor {shape}")
    if value.ndim == n_dims - 1:  # one image without its batch, as some nodes give it
        value = value[None]
    if value.ndim != n_dims:
        raise DoorError(f"{place} has the shape {list(value.shape)}: it must be {shape}")
    if not value.numel():
        raise DoorError(f"{place} holds no pixels: its shape is {list(value.shape)}")
    if value.is_complex() or not (value.is_floating_point() or value.dtype == torch.bool):
        raise DoorError(f"{place} has numbers of the type {value.dtype}: they must be floats from 0 to 1")
    if not bool(value.isfinite().all()):
        raise DoorError(f"{place} has pixels that are no finite numbers: look at the node that it comes from")
    return value.float()
