"""A graph's autoencoder as diffusers' class of the same weights, whose encoder the engine knows to run fast on a GPU.

Names and shapes of the weights say which class that is; a look at one small encoding says whether it is the same.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..dream4d_engine.documents import first_line
from ..dream4d_engine.guidance.execution import Execution
from ..dream4d_engine.machine import must_be_able
from ..dream4d_engine.priors.formats import ldm_keys
from ..dream4d_engine.priors.formats.loaders import empty_network, filled, shapes_of
from ..dream4d_engine.priors.networks.frozen import speed_up
from ..dream4d_engine.priors.networks.video_encoders import encode_video, encodes_whole, lay_out

_SIDE, _FRAMES = 64, 9  # of what is encoded to compare
_SAME = 0.1
"""Of two encodings, relative: bfloat16 differs by a sixth of it, other layers by ten times as much."""


def fused_encoder(network: Any, channels: int) -> nn.Module | None:
    """Build the encoder alone of diffusers' class with the weights of a copied `network`, laid out to be run fast.

    `channels`: of the pixels that it reads. None where diffusers has none that gives the same, or where something was
    hung on the layers, which only they would run; the log says why. Raises torch.OutOfMemoryError.
    """
    state = dict(network.named_parameters())
    made = next((make for mark, make in _MAKERS.items() if mark in state), None)
    if made is None or getattr(network, "bn", None) is not None:  # latents that are scaled by what was seen
        return None
    try:
        changed = next((name for name, module in _encoding(network) if _is_changed(module)), None)
        if changed is not None:
            raise ValueError(f"something was hung on {changed or 'its network'}, which may act on other sizes alone")
        with torch.no_grad():
            twin = made(network, state)
            difference = _difference(network, twin, channels)
        if not math.isfinite(difference):
            raise ValueError(f"an encoding of noise in {next(twin.parameters()).dtype} is not finite")
        if not difference < _SAME:
            raise ValueError(f"an encoding differs by {difference:.3g}")
    except Exception as error:  # whatever other versions of the two classes may raise
        must_be_able(error, "the VAE's fused layers")
        logging.info("[Dream4D] the VAE's encoder runs as ComfyUI's own, slower: %s", first_line(error))
        return None
    return twin


def encode_fused(twin: Any, scaled: Tensor, execution: Execution, frames: range | None) -> Tensor:
    """Encode [n, 3, (F,) H, W], scaled as the network wants it, to the mean of its guess [n, c, (f,) h, w]."""
    if scaled.ndim == 4:
        return twin.encode(scaled).latent_dist.mode()
    z = torch.cat([encode_video(twin, one, frames, execution, True) for one in scaled.split(1)])
    if "latents_mean" not in twin._buffers:
        return z
    mean, deviation = (twin.get_buffer(name).view(-1, 1, 1, 1).to(z) for name in ("latents_mean", "latents_std"))
    return (z - mean) / deviation  # core's LTX-Video does this itself


def _encoding(network: Any) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of all that an encoding goes through."""
    return (one for one in network.named_modules() if not one[0].startswith("decoder"))


def _is_changed(module: nn.Module) -> bool:
    """Whether another pack has hung something on a module: tiles for large images, edges that meet, a hook."""
    return bool(module._forward_hooks or module._forward_pre_hooks or _CALLED & vars(module).keys())


_CALLED = {"forward", "_conv_forward", "encode"}
"""What is a class's own unless somebody has put another into a module."""


def _images(network: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """AutoencoderKL, of the layout of latent diffusion; the decoder may be another (SV3D's looks at time, too)."""
    encoder = {name: value for name, value in state.items() if name.startswith(_ENCODERS)}
    names, shapes = ldm_keys.vae_names(encoder), shapes_of(state)
    moments = shapes["encoder.conv_out.weight"][0]
    config = ldm_keys.vae_config({"post_quant_conv.weight": (moments // 2, moments // 2, 1, 1)} | shapes)
    config["use_quant_conv"] = config["use_post_quant_conv"] = "quant_conv.weight" in state
    twin = _without_decoder(empty_network("AutoencoderKL", config, len(state), "the VAE"))
    own = twin.state_dict()
    # attention's are convolutions of single places there
    given = {names[name]: value.reshape(own[names[name]].shape) for name, value in encoder.items()}
    return speed_up(_filled(twin, given))


def _wan_videos(network: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """AutoencoderKLWan."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    sizes = {name: getattr(network, name) for name in ("z_dim", "dim_mult", "num_res_blocks", "temperal_downsample")}
    config = {"base_dim": network.dim, "attn_scales": network.attn_scales, **sizes}
    channels, residual = state["encoder.conv1.weight"].shape[1], _RESIDUAL in state
    if residual:  # Wan 2.2's
        config |= {"is_residual": True, "patch_size": 2}
    if channels != 3:
        config["in_channels"] = channels
    given = convert_wan_vae_to_diffusers({n: v for n, v in state.items() if n.startswith((*_ENCODERS, "conv1."))})
    if residual:  # where Wan 2.1 has a list of layers, it has a list of blocks with such lists
        within = re.compile(r"(down_blocks\.\d+)\.downsamples\.")
        after = re.compile(r"(down_blocks\.\d+)\.resnets\.\d+\.(resample|time_conv)\.")
        named = {within.sub(r"\1.resnets.", name): value for name, value in given.items()}
        given = {after.sub(r"\1.downsampler.\2.", name): value for name, value in named.items()}
    return _of_videos("AutoencoderKLWan", config, given)


def _ltx_videos(network: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """AutoencoderKLLTXVideo, of any version."""
    described = network.config
    config, places = _ltx_layers(described.get("encoder_blocks") or described["blocks"])
    width = state["encoder.conv_in.conv.weight"].shape[0]
    config["block_out_channels"] = tuple(width * wider for wider in config["block_out_channels"])
    config |= {"latent_channels": described["latent_channels"], "patch_size": described.get("patch_size", 1)}
    given = {}
    for name, value in state.items():
        if found := re.match(r"encoder\.(?:down_blocks\.(\d+)\.)?", name):
            place = found[0] if found[1] is None else f"encoder.{places[int(found[1])]}."
            rest = name[found.end() :].replace("res_blocks.", "resnets.").replace("norm3.norm.", "norm3.")
            given[place + rest.replace("conv_shortcut.", "conv_shortcut.conv.")] = value
    for ours, theirs in (("latents_mean", "mean-of-means"), ("latents_std", "std-of-means")):
        given[ours] = network.per_channel_statistics.get_buffer(theirs)
    return _of_videos("AutoencoderKLLTXVideo", config, given)


_LTX_DOWN = {"compress_all": "conv", "compress_all_res": "spatiotemporal"}
_LTX_DOWN |= {"compress_space_res": "spatial", "compress_time_res": "temporal"}
_LTX_PARTS = ("", ".downsamplers.0", ".conv_out")
"""Of a block, in their order; none need be there."""


def _ltx_layers(described: Sequence) -> tuple[dict[str, Any], list[str]]:
    """Diffusers' numbers for core's list of layers, with widths in the first one's, and where there each of it lies.

    A block of diffusers' is some residual layers and what makes the video smaller after them; the last is without.
    """
    blocks: list[dict[str, Any]] = []
    places = []
    last = len(_LTX_PARTS)
    for kind, given in described:
        numbers = {"num_layers": given} if isinstance(given, int) else given
        wider = numbers.get("multiplier", 2)
        if kind == "res_x":
            part, added = 0, {"layers": numbers["num_layers"]}
        elif kind in _LTX_DOWN:
            part, added = 1, {"down": _LTX_DOWN[kind], "wider": wider if kind.endswith("_res") else 1}
        elif kind == "res_x_y":
            part, added = 2, {"wider": wider}
        else:
            raise ValueError(f"a VAE of LTX-Video with layers that diffusers has not: {kind}")
        if part <= last:
            blocks.append({"layers": 0, "down": None, "wider": 1})
        last = part
        blocks[-1] |= added
        places.append(f"down_blocks.{len(blocks) - 1}{_LTX_PARTS[part]}")
    *down, middle = blocks
    places[-1] = "mid_block"
    widths = [1]
    for block in down:
        widths.append(widths[-1] * block["wider"])
    later = any(kind.endswith("_res") for kind, _ in described)  # blocks of 0.9.5 and later get wider when smaller
    config = {
        "down_block_types": ("LTXVideo095DownBlock3D" if later else "LTXVideoDownBlock3D",) * len(down),
        "block_out_channels": tuple(widths if later else widths[:-1]),
        "layers_per_block": tuple(block["layers"] for block in (*down, middle)),
        "spatio_temporal_scaling": tuple(block["down"] is not None for block in down),
        "downsample_type": tuple(block["down"] or "conv" for block in down),
    }
    return config, places


_ENCODERS = ("encoder.", "quant_conv.")
_RESIDUAL = "encoder.downsamples.0.downsamples.0.residual.2.weight"
_MAKERS: dict[str, Callable[[Any, Mapping[str, Tensor]], nn.Module]] = {
    "encoder.down.0.block.0.conv1.weight": _images,
    "encoder.downsamples.0.residual.2.weight": _wan_videos,
    _RESIDUAL: _wan_videos,
    "encoder.down_blocks.0.res_blocks.0.conv1.conv.weight": _ltx_videos,
}
"""By a name among the weights."""


def _of_videos(name: str, config: Mapping[str, Any], given: Mapping[str, Tensor]) -> nn.Module:
    twin = _without_decoder(empty_network(name, config, len(given), "the VAE"))
    if not encodes_whole(twin):
        raise ValueError(f"a VAE like {name} with other layers")
    twin = _filled(twin, given)
    lay_out(twin)
    return twin


def _without_decoder(twin: Any) -> Any:
    twin.decoder, twin.post_quant_conv = nn.Identity(), None  # diffusers 0.33 counts the decoder's layers to encode
    return twin


def _filled(twin: nn.Module, given: Mapping[str, Tensor]) -> nn.Module:
    twin = filled(twin, {name: value.detach() for name, value in given.items()}, "the VAE")
    return twin.eval().requires_grad_(False)


def _difference(network: Any, twin: Any, channels: int) -> float:
    """Between the two's encodings of noise, relative."""
    weight = next(twin.parameters())
    generator = torch.Generator().manual_seed(0)
    of_videos = weight.ndim == 5
    shape = (1, channels, *((_FRAMES,) if of_videos else ()), _SIDE, _SIDE)
    scaled = (2 * torch.rand(shape, generator=generator) - 1).to(weight)
    with torch.autocast(weight.device.type, enabled=False):
        theirs, ours = network.encode(scaled).float(), encode_fused(twin, scaled, Execution(), None).float()
    return float((ours - theirs).norm() / theirs.norm())
