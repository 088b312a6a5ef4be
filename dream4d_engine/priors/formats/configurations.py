"""What the configurations of networks and schedules say, checked before anything is built by them.

A few letters of text can ask for gigabytes, for hours, or for nothing that works. So every value must be of its kind
and within what any known model comes near, and no more layers are built than the weights beside the configuration have
tensors. Widths need no bound of their own: networks are built without memory first, and compared with the weights.
"""

from __future__ import annotations

import inspect
import logging
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import torch
from torch import Tensor

from ...documents import as_object, describe, field
from ...guidance.noise import NoiseSchedule, rectified_flow, variance_preserving
from ..errors import PriorError, reason
from ..networks.denoisers import FLOW_TIMESTEPS, PredictionType

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=str)

MOST_NUMBER = 2**20  # the longest vocabulary has a quarter of it
MOST_ENTRIES = 64  # of a list
MOST_TENSORS = 20_000  # of a network
MOST_TIMESTEPS = 100_000

_NESTED = ("block_out_channels", "layers_per_block", "transformer_layers_per_block")
# every layer has tensors of its own, so none of these can be more than the weights have tensors
_DEPTHS = (*_NESTED[1:], "num_encoder_blocks", "num_decoder_blocks", "num_hidden_layers", "num_layers")


# ---- Networks of diffusers ---------------------------------------------------------------------------------------


def network_arguments(network_class: Any, config: Mapping[str, Any], n_tensors: int, where: object) -> dict[str, Any]:
    """Return the arguments of a diffusers network's class that a configuration names, all of them checked.

    Args:
        n_tensors: how many the weights have. where: the file, for the message.
    """
    hints = typing.get_type_hints(network_class.__init__)
    known = inspect.signature(network_class.__init__).parameters.keys() - {"self"}
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    # of a newer diffusers; null and false switch nothing on
    foreign = sorted(name for name in given.keys() - known if given[name] not in (None, False))
    if foreign:
        logger.warning("%s: passed over, being unknown here: %s", where, describe(", ".join(foreign)))
    arguments = {name: value for name, value in given.items() if name in known}
    for name, value in arguments.items():
        if not _fits(value, hints.get(name, Any)):
            raise PriorError(f"{where}: {name} must be {_said(hints[name])}, got {describe(value)}")
    _check_sizes(arguments, n_tensors, where)
    return arguments


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON can be meant by a type; a list is let through for a number, as one for each block."""
    origin, inner = get_origin(hint), get_args(hint)
    entries = [one for one in inner if one is not ...] or [Any]
    if value is None or isinstance(value, bool):  # how the older ones write "none of this"
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin in (tuple, list) or hint in (tuple, list):
        return isinstance(value, list | tuple) and all(any(_fits(v, one) for one in entries) for v in value)
    if hint in (int, float):
        return isinstance(value, int | float) or (
            isinstance(value, list | tuple) and all(_fits(v, hint) for v in value)
        )
    return isinstance(value, str) if hint is str else True


def _said(hint: Any) -> str:
    """A type in plain words."""
    origin, inner = get_origin(hint), [one for one in get_args(hint) if one is not type(None)]
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_said(one) for one in inner))
    if origin in (tuple, list) or hint in (tuple, list):
        return "a list"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, str(hint))


def _check_sizes(config: Mapping[str, Any], n_tensors: int, where: object) -> None:
    """Refuse numbers, lists and depths that no known network comes near, or that these weights can't have."""
    if n_tensors > MOST_TENSORS:
        raise PriorError(f"{where}: the weights beside it hold {n_tensors:,} tensors, more than any known network")
    for name, value in config.items():
        if isinstance(value, list | tuple) and len(value) > MOST_ENTRIES:
            raise PriorError(f"{where}: {name} has {len(value):,} entries; no known network has over {MOST_ENTRIES}")
        for number in _numbers(value):
            if not math.isfinite(number) or abs(number) > MOST_NUMBER:
                raise PriorError(
                    f"{where}: {name} is {describe(number)}; numbers up to {MOST_NUMBER:,} can be meant there"
                )
    for name in _DEPTHS:
        if sum(_numbers(config.get(name))) > n_tensors:
            raise _too_deep(config, name, n_tensors, where)
    # blocks times resnets times transformers in each: modest numbers whose product is not
    deepest = [max(_numbers(config.get(name)), default=1) for name in _NESTED[1:]]
    channels = config.get(_NESTED[0])
    blocks = len(channels) if isinstance(channels, list | tuple) else 1
    if blocks * math.prod(max(depth, 1) for depth in deepest) > n_tensors:
        raise _too_deep(config, _NESTED[1 + deepest.index(max(deepest))], n_tensors, where)


def _too_deep(config: Mapping[str, Any], name: str, n_tensors: int, where: object) -> PriorError:
    return PriorError(
        f"{where}: {name} is {describe(config[name])}, but the weights beside it hold {n_tensors:,} tensors only: they "
        "can't have as many layers"
    )


def _numbers(value: Any) -> Iterator[int | float]:
    """All numbers of a value, be it one or a list, nested or not."""
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def built(make: Callable[[], Any], what: str, where: object) -> Any:
    """Build a network without memory for its weights; PriorError where its configuration contradicts itself."""
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:  # whatever the classes and torch raise
        raise PriorError(f"{where}: no {what} can be built by it ({reason(error)})") from error


# ---- Encoders of transformers ------------------------------------------------------------------------------------

_CLIP = {
    "hidden_size": int,
    "intermediate_size": int,
    "projection_dim": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "hidden_act": str,
    "layer_norm_eps": float,
}
_TOKENS = {"vocab_size": int, "bos_token_id": int, "eos_token_id": int, "pad_token_id": int}
_FIELDS: dict[str, dict[str, type]] = {
    "CLIPTextConfig": {**_CLIP, **_TOKENS, "max_position_embeddings": int},
    "CLIPVisionConfig": {**_CLIP, "num_channels": int, "image_size": int, "patch_size": int},
    "T5Config": {
        **_TOKENS,
        "d_model": int,
        "d_kv": int,
        "d_ff": int,
        "num_layers": int,
        "num_heads": int,
        "relative_attention_num_buckets": int,
        "relative_attention_max_distance": int,
        "layer_norm_epsilon": float,
        "feed_forward_proj": str,
    },
}
_FIELDS["UMT5Config"] = _FIELDS["T5Config"]
_FIELDS["LlamaConfig"] = {
    **_TOKENS,
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"), int),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), int),
    **dict.fromkeys(("attention_bias", "mlp_bias"), bool),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), float),
    "hidden_act": str,
}
_INSIDE = {"CLIPTextConfig": "text_config", "CLIPVisionConfig": "vision_config"}
_MAY_BE_NOTHING = ("bos_token_id", "eos_token_id", "pad_token_id", "projection_dim")


def encoder_config(class_name: str, config: Mapping[str, Any], n_tensors: int, where: object) -> Any:
    """Return the configuration of an encoder as one of transformers', made of the fields that shape it alone.

    The rest says how it was stored or trained, or names programs and places to load from.
    """
    import transformers

    inside = _INSIDE.get(class_name, "")
    if config.get("model_type") == "clip" and inside in config:  # the configuration of both of CLIP's towers
        config = as_object(config[inside], f"{where}: {inside}", PriorError)
    if class_name == "LlamaConfig":
        config = _with_rope(config, where)
    given: dict[str, Any] = {}
    for name, kind in _FIELDS[class_name].items():
        if config.get(name) is not None:
            given[name] = field(config, name, kind, where, PriorError, None)
        least = 0 if name in _MAY_BE_NOTHING else 1
        if kind is int and name in given and given[name] < least:
            raise PriorError(f"{where}: {name} is {describe(given[name])}, it must be {least} or more")
    _check_sizes(given, n_tensors, where)
    if given.get("hidden_act", "relu") not in transformers.activations.ACT2FN:
        raise PriorError(f"{where}: hidden_act {describe(given['hidden_act'])} is no function that is known")
    try:
        return getattr(transformers, class_name)(**given)
    except Exception as error:  # whatever the class finds wrong
        raise PriorError(f"{where}: {reason(error)}") from error


def _with_rope(config: Mapping[str, Any], where: object) -> Mapping[str, Any]:
    """Llama's configuration with its rope_theta where older versions of transformers have it."""
    for name in ("rope_scaling", "rope_parameters"):  # of an older and of a newer version
        rope = field(config, name, dict, where, PriorError, {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise PriorError(f"{where}: {name} is of type {describe(kind)}; places that are not stretched are known")
        config = {"rope_theta": rope["rope_theta"], **config} if "rope_theta" in rope else config
    return config


# ---- Schedules of noise ------------------------------------------------------------------------------------------

_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_OTHER_SCHEDULERS = ("FlowMatch", "EDM")  # their sigmas follow from no betas
SHIFTS = (0.01, 1000.0)  # how far a flow's times may be moved
Predicted = Literal["epsilon", "v_prediction", "sample"]


def noise_of(
    config: Mapping[str, Any], where: object = "the scheduler's configuration"
) -> tuple[NoiseSchedule, PredictionType]:
    """Return what a diffusers scheduler's configuration says of a model's noise levels, and of what it predicts.

    Args:
        where: the file, for the message.
    """
    if config.get("_class_name") == FLOW_SCHEDULER:
        return rectified_flow(_flow_shift(config, where)), "flow"
    alphas_bar, prediction = schedule_of(config, where)
    return variance_preserving(alphas_bar), prediction


def _flow_shift(config: Mapping[str, Any], where: object) -> float:
    """How far a flow's times are moved towards noise. What only samplers read of its configuration is left."""
    for name in ("use_dynamic_shifting", "invert_sigmas"):
        if field(config, name, bool, where, PriorError, False):
            raise PriorError(f"{where}: {name} is true; flows of one shift, whose time 0 is no noise, can be used")
    n_steps = field(config, "num_train_timesteps", int, where, PriorError, FLOW_TIMESTEPS)
    if n_steps != FLOW_TIMESTEPS:
        raise PriorError(
            f"{where}: num_train_timesteps is {n_steps:,}; a flow is told {FLOW_TIMESTEPS:,} at noise alone"
        )
    shift = field(config, "shift", float, where, PriorError, 1.0)
    if not SHIFTS[0] <= shift <= SHIFTS[1]:
        raise PriorError(f"{where}: shift is {shift:g}; {SHIFTS[0]:g} to {SHIFTS[1]:g} can be used")
    return shift


def schedule_of(config: Mapping[str, Any], where: object = "the scheduler's configuration") -> tuple[Tensor, Predicted]:
    """Return (alphas_bar [T], prediction_type) of a scheduler of betas.

    Args:
        where: the file, for the message.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    name = field(config, "_class_name", str, where, PriorError, "DDPMScheduler")
    if any(word in name for word in _OTHER_SCHEDULERS):
        raise PriorError(f"{where} describes a {describe(name)}: models trained on another kind of noise can't be used")
    n_steps = field(config, "num_train_timesteps", int, where, PriorError, 1000)
    start = field(config, "beta_start", float, where, PriorError, 0.0001)
    end = field(config, "beta_end", float, where, PriorError, 0.02)
    curve = field(config, "beta_schedule", str, where, PriorError, "linear")
    rescaled = field(config, "rescale_betas_zero_snr", bool, where, PriorError, False)
    said = field(config, "prediction_type", str, where, PriorError, "epsilon")
    prediction: Predicted = _one_of(said, get_args(Predicted), "prediction_type", where)
    _one_of(curve, _BETAS, "beta_schedule", where)
    if not 2 <= n_steps <= MOST_TIMESTEPS:
        raise PriorError(f"{where}: num_train_timesteps is {n_steps:,}; 2 to {MOST_TIMESTEPS:,} can be used")
    for name, beta in (("beta_start", start), ("beta_end", end)):
        if not 0 < beta < 1:
            raise PriorError(f"{where}: {name} is {beta}, it must lie between 0 and 1")
    betas = _trained_betas(config, where)
    n_steps = n_steps if betas is None else len(betas)
    scheduler = DDPMScheduler(n_steps, start, end, curve, betas, rescale_betas_zero_snr=rescaled)
    alphas_bar = scheduler.alphas_cumprod.float()
    # the noise only ever grows, so a timestep can be found by it
    if not (torch.isfinite(alphas_bar).all() and (alphas_bar >= 0).all() and (alphas_bar.diff() <= 0).all()):
        raise PriorError(f"{where} gives no schedule of noise: what is left of the image must shrink from step to step")
    return alphas_bar, prediction


def _trained_betas(config: Mapping[str, Any], where: object) -> list[float] | None:
    betas = field(config, "trained_betas", list, where, PriorError, [])
    if not betas:
        return None
    if not 2 <= len(betas) <= MOST_TIMESTEPS:
        raise PriorError(f"{where}: trained_betas has {len(betas):,} entries; 2 to {MOST_TIMESTEPS:,} can be used")
    for i, beta in enumerate(betas):
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta <= 1:
            raise PriorError(f"{where}: trained_betas[{i}] is {describe(beta)}, it must be a number from 0 to 1")
    n_steps = config.get("num_train_timesteps")
    if n_steps is not None and n_steps != len(betas):
        raise PriorError(f"{where}: trained_betas has {len(betas):,} entries, but num_train_timesteps is {n_steps:,}")
    return betas


def _one_of(value: str, known: tuple[T, ...], name: str, where: object) -> T:
    """The value as one of those that are known."""
    for one in known:
        if one == value:
            return one
    raise PriorError(f"{where}: {name} is {describe(value)}; known are {', '.join(known)}")
