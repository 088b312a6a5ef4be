"""The encoders of video autoencoders (Wan, LTX-Video), computing the same numbers in fewer passes over memory.

As frozen.py does for images: norm and SiLU are one, convolutions keep no input for the backward pass, everything stays
in channels_last. A video is encoded in one piece. Wan's own code hands features on from some frames to the next: its
convolutions over time look back only, so that is the same as zeros before the first frame, which here the norm writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...guidance.execution import Execution
from .checkpointing import checkpointing
from .frozen import frozen_conv, halved
from .fused_norm import add_residual, rms_silu

Block = Callable[[Any, Tensor], Tensor]
_LAST = torch.channels_last_3d
FEW_AT_ONCE = 4
"""Frames: where no more are to be encoded at once, they are as the library does it, Wan's four by four."""


def encodes_whole(vae: Any) -> bool:
    """Whether `encode_whole` knows an autoencoder's layers."""
    config = getattr(vae, "config", {})
    if type(vae).__name__ == "AutoencoderKLWan":
        return not config.get("attn_scales") and isinstance(vae.encoder.nonlinearity, nn.SiLU)
    if type(vae).__name__ != "AutoencoderKLLTXVideo":
        return False
    blocks = config.get("down_block_types") or ()
    return bool(config.get("encoder_causal")) and set(blocks) <= {"LTXVideoDownBlock3D", "LTXVideo095DownBlock3D"}


def lay_out(vae: nn.Module) -> None:
    """Turn an autoencoder's weights to channels_last, where they are."""
    formats = {4: torch.channels_last, 5: _LAST}
    for parameter in vae.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])


def encode_video(vae: Any, video: Tensor, asked: range | None, execution: Execution, fused: bool) -> Tensor:
    """Encode a video [1, 3, F, H, W] in [-1, 1] to the mean of the autoencoder's guess [1, c, f, h, w].

    `asked`: the frames that a gradient is asked for, see `checkpointing`. `fused`: in one piece, where there is room.
    """
    checkpointed, at_once = execution.images_kept is not None, execution.images_at_once
    if fused and (at_once is None or at_once > FEW_AT_ONCE):
        return encode_whole(vae, video, checkpointed)
    try:
        with checkpointing(vae, checkpointed, asked):
            return vae.encode(video).latent_dist.mode()
    finally:
        if hasattr(vae, "clear_cache"):  # Wan's: where memory ran out it would hold the features of before
            vae.clear_cache()


def encode_whole(vae: Any, video: Tensor, checkpointed: bool = False) -> Tensor:
    """Encode a video [1, 3, T, H, W] in [-1, 1] to the mean of the autoencoder's guess [1, c, t, h, w].

    `checkpointed`: every block's activations are computed again in the backward pass. Differentiable.
    """

    def run(block: Block, module: Any, x: Tensor) -> Tensor:
        return checkpoint(block, module, x, use_reentrant=False) if checkpointed else block(module, x)

    whole = _encode_wan if type(vae).__name__ == "AutoencoderKLWan" else _encode_ltx
    return whole(vae, video, run)


def _cells(x: Tensor, sides: tuple[int, int, int], row_first: bool = True) -> Tensor:
    """[1, C, T, H, W] as [1, C t h w, T/t, H/h, W/w]: the places of a cell become channels, frame by frame.

    `row_first`: of a frame row by row, else column by column, as the squares of pixels that encoders begin with.
    """
    t, h, w = sides
    x = x.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))
    row, column = (5, 7) if row_first else (7, 5)
    return x.permute(0, 1, 3, row, column, 2, 4, 6).flatten(1, 4)


# ---- Wan ---------------------------------------------------------------------------------------------------------


def _encode_wan(vae: Any, video: Tensor, run: Callable[[Block, Any, Tensor], Tensor]) -> Tensor:
    encoder, p = vae.encoder, vae.config.get("patch_size") or 1
    video = video[:, :, : 1 + (video.shape[2] - 1) // 4 * 4]  # what makes no four is left out, as the library does it
    x = _cells(video, (1, p, p), row_first=False).contiguous(memory_format=_LAST)
    x = _wan_conv(encoder.conv_in, _zeros_ahead(x))
    for layer in encoder.down_blocks:
        if type(layer).__name__ != "WanResidualDownBlock":
            x = run(_WAN[type(layer).__name__], layer, x)
            continue
        around = layer.avg_shortcut(x).contiguous(memory_format=_LAST)
        for resnet in layer.resnets:
            x = run(_wan_block, resnet, x)
        if layer.downsampler is not None:
            x = run(_wan_resample, layer.downsampler, x)
        x = x + around
    x = run(_wan_block, encoder.mid_block.resnets[0], x)
    for attention, block in zip(encoder.mid_block.attentions, encoder.mid_block.resnets[1:], strict=True):
        x = run(_wan_attention, attention, x)
        x = run(_wan_block, block, x)
    x = _wan_conv(encoder.conv_out, _wan_norm(encoder.norm_out, x, 2))
    return frozen_conv(vae.quant_conv, x)[:, : vae.config.z_dim]


def _zeros_ahead(x: Tensor) -> Tensor:
    return torch.cat((x.new_zeros(*x.shape[:2], 2, *x.shape[3:]), x), 2)


def _wan_conv(conv: Any, x: Tensor, with_bias: bool = True) -> Tensor:
    """A convolution 3x3x3 of what has two frames ahead."""
    return frozen_conv(conv, x, with_bias, padding=(0, conv._padding[2], conv._padding[0]))


def _wan_norm(norm: Any, x: Tensor, ahead: int) -> Tensor:
    # the library divides by the norm, 1e-12 at the least, and multiplies with the root of the number of channels
    return rms_silu(x, norm.gamma.flatten(), 1e-24 / x.shape[1], ahead)


def _wan_block(block: Any, x: Tensor) -> Tensor:
    """WanResidualBlock: twice norm, silu, conv; + input."""
    h = _wan_conv(block.conv1, _wan_norm(block.norm1, x, 2))
    h = _wan_conv(block.conv2, _wan_norm(block.norm2, h, 2), with_bias=False)
    if not isinstance(block.conv_shortcut, nn.Identity):
        x = frozen_conv(block.conv_shortcut, x)
    return add_residual(x, h, block.conv2.bias)


def _wan_attention(layer: Any, x: Tensor) -> Tensor:
    """WanAttentionBlock: one head over the places of each frame; two matrix products, as in frozen.py."""
    _, c, t, h, w = x.shape
    places = x.movedim(1, -1).reshape(t, h * w, c)
    normed = layer.norm(places.transpose(1, 2)[..., None]).squeeze(-1).transpose(1, 2)
    project = layer.to_qkv
    query, key, value = functional.linear(normed, project.weight.flatten(1), project.bias).chunk(3, -1)
    scores = torch.matmul(query * c**-0.5, key.transpose(1, 2))  # scaled first: sums of C products are large
    seen = functional.linear(torch.matmul(scores.softmax(-1), value), layer.proj.weight.flatten(1), layer.proj.bias)
    return (places + seen).reshape(1, t, h, w, c).movedim(-1, 1)


def _wan_resample(layer: Any, x: Tensor) -> Tensor:
    """WanResample downwards: every frame halved, then, where it is asked for, all frames but the first."""
    _, c, t, h, w = x.shape
    frames = halved(layer.resample[1], x.movedim(1, -1).reshape(t, h, w, c).permute(0, 3, 1, 2))
    if layer.mode == "downsample3d" and t > 1:
        # the places as one side of an image [1, C, T, h w] whose other side is time
        side = frames.permute(0, 2, 3, 1).reshape(1, t, -1, frames.shape[1]).permute(0, 3, 1, 2)
        conv = layer.time_conv
        later = _over_time(conv, side)
        joined = torch.cat((side[:, :, :1], later), 2)
        frames = joined.permute(0, 2, 3, 1).reshape(-1, *frames.shape[2:], later.shape[1]).permute(0, 3, 1, 2)
    n, c, h, w = frames.shape
    return frames.permute(0, 2, 3, 1).reshape(1, n, h, w, c).movedim(-1, 1)


def _over_time(conv: Any, x: Tensor) -> Tensor:
    """A convolution [3, 1, 1] at stride 2 over the first side of [1, C, T, places]."""
    return functional.conv2d(x, conv.weight.squeeze(-1), conv.bias, stride=(conv.stride[0], 1))


_WAN: dict[str, Block] = {"WanResidualBlock": _wan_block, "WanResample": _wan_resample}


# ---- LTX-Video ---------------------------------------------------------------------------------------------------


def _encode_ltx(vae: Any, video: Tensor, run: Callable[[Block, Any, Tensor], Tensor]) -> Tensor:
    encoder = vae.encoder
    p, p_t = encoder.patch_size, encoder.patch_size_t
    x = _cells(video, (p_t, p, p), row_first=False).contiguous(memory_format=_LAST)
    x = _ltx_conv(encoder.conv_in, x)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            x = run(_ltx_block, resnet, x)
        for downsampler in block.downsamplers or ():
            plain = type(downsampler).__name__ == "LTXVideoCausalConv3d"
            x = _ltx_conv(downsampler, x) if plain else run(_ltx_down, downsampler, x)
        if getattr(block, "conv_out", None) is not None:  # blocks of 0.9.5 and later have none
            x = run(_ltx_block, block.conv_out, x)
    for resnet in encoder.mid_block.resnets:
        x = run(_ltx_block, resnet, x)
    x = frozen_conv(encoder.conv_out.conv, rms_silu(x, None, encoder.norm_out.eps, 2, repeated=True))
    return x[:, :-1]  # the last channel is of the deviations


def _ltx_conv(conv: Any, x: Tensor) -> Tensor:
    """LTXVideoCausalConv3d: the first frame is repeated before itself."""
    ahead = x[:, :, :1].expand(-1, -1, conv.kernel_size[0] - 1, -1, -1)
    return frozen_conv(conv.conv, torch.cat((ahead, x), 2).contiguous(memory_format=_LAST))


def _ltx_down(layer: Any, x: Tensor) -> Tensor:
    """LTXVideoDownsampler3d: the places of a cell become channels; around the convolution their means."""
    x = torch.cat((x[:, :, : layer.stride[0] - 1], x), 2)
    around = _cells(x, layer.stride).unflatten(1, (-1, layer.group_size)).mean(2)
    h = _cells(_ltx_conv(layer.conv, x), layer.stride)
    return (h + around).contiguous(memory_format=_LAST)


def _ltx_block(block: Any, x: Tensor) -> Tensor:
    """LTXVideoResnetBlock3d: twice norm, silu, conv; + input."""
    h = frozen_conv(block.conv1.conv, rms_silu(x, block.norm1.weight, block.norm1.eps, 2, repeated=True))
    h = rms_silu(h, block.norm2.weight, block.norm2.eps, 2, repeated=True)
    h = frozen_conv(block.conv2.conv, h, with_bias=False)
    if block.norm3 is not None:
        x = block.norm3(x.movedim(1, -1)).movedim(-1, 1)
    if block.conv_shortcut is not None:
        x = frozen_conv(block.conv_shortcut.conv, x)
    return add_residual(x, h, block.conv2.conv.bias)
