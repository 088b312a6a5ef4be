"""A graph's autoencoder as diffusers' class of the same weights, whose encoder the engine knows to run fast on a GPU.

Names and shapes of the weights say which class that is; a look at one small encoding says whether it is the same.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
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


def fused_encoder(network: Any) -> nn.Module | None:
    """Build the encoder alone of diffusers' class with the weights of a copied `network`, laid out to be run fast.

    None where diffusers has none that gives the same, or where something was hung on the layers, which only they would
    run; the log says why. Out of memory is raised as it is.
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
            difference = _difference(network, twin)
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
    return torch.cat([encode_video(twin, one, frames, execution, True) for one in scaled.split(1)])


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


def _videos(network: Any, state: Mapping[str, Tensor]) -> nn.Module:
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
    twin = _without_decoder(empty_network("AutoencoderKLWan", config, len(state), "the VAE"))
    if not encodes_whole(twin):
        raise ValueError("a VAE of Wan's layout with other layers")
    twin = _filled(twin, given)
    lay_out(twin)
    return twin


_ENCODERS = ("encoder.", "quant_conv.")
_RESIDUAL = "encoder.downsamples.0.downsamples.0.residual.2.weight"
_MAKERS: dict[str, Callable[[Any, Mapping[str, Tensor]], nn.Module]] = {
    "encoder.down.0.block.0.conv1.weight": _images,
    "encoder.downsamples.0.residual.2.weight": _videos,
    _RESIDUAL: _videos,
}
"""By a name among the weights."""


def _without_decoder(twin: Any) -> Any:
    twin.decoder, twin.post_quant_conv = nn.Identity(), None  # diffusers 0.33 counts the decoder's layers to encode
    return twin


def _filled(twin: nn.Module, given: Mapping[str, Tensor]) -> nn.Module:
    own = {name: nn.Parameter(value.detach(), requires_grad=False) for name, value in given.items()}
    return filled(twin, own, "the VAE").eval()


def _difference(network: Any, twin: Any) -> float:
    """Between the two's encodings of noise, relative."""
    weight = next(twin.parameters())
    generator = torch.Generator().manual_seed(0)
    of_videos = weight.ndim == 5
    channels = getattr(twin.config, "in_channels", 3) // (twin.config.get("patch_size") or 1) ** 2
    shape = (1, channels, *((_FRAMES,) if of_videos else ()), _SIDE, _SIDE)
    scaled = (2 * torch.rand(shape, generator=generator) - 1).to(weight)
    with torch.autocast(weight.device.type, enabled=False):
        theirs, ours = network.encode(scaled).float(), encode_fused(twin, scaled, Execution(), None).float()
    return float((ours - theirs).norm() / theirs.norm())
