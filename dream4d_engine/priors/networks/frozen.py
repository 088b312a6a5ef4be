"""The layers of frozen diffusers networks, computing the same numbers in fewer passes over memory.

`speed_up(network)` keeps the modules, their names and their weights and gives some of them another forward:

- convolutions keep no input for the backward pass (only a weight's gradient would need it, and there is none);
- group norm and SiLU are one (fused_norm.py), biases and time embeddings fold into the norm or the residual after;
- 3D convolutions over time alone are 2D convolutions over (frames, places);
- everything stays in channels_last, without copies in between;
- the VAE's one wide attention head is two matrix products: no flash kernel takes 512 channels.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .fused_norm import add_bias_, add_residual, double_size, gated, norm_silu, norm_silu_beside

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def speed_up(network: nn.Module) -> nn.Module:
    """Change a frozen diffusers UNet or VAE in place (see the module's docstring) and return it."""
    for parameter in network.parameters():
        if parameter.ndim in _FORMATS:
            parameter.data = parameter.data.contiguous(memory_format=_FORMATS[parameter.ndim])
    for module in network.modules():
        name = type(module).__name__
        if isinstance(module, nn.Conv2d):
            forward: Callable = frozen_conv
        elif isinstance(module, nn.GroupNorm):
            forward = _norm_forward
        elif name in _FORWARDS and _FORWARDS[name][0](module):
            forward = _FORWARDS[name][1]
        else:
            continue
        module.forward = types.MethodType(forward, module)
    return network


def fuse_gates(network: nn.Module) -> None:
    """Let the gates in transformer blocks be one kernel where there is one: for blocks that are not compiled."""
    for module in network.modules():
        if type(module).__name__ == "GEGLU":
            module.forward = types.MethodType(_gate_forward, module)


def _gate_forward(self: Any, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    """GEGLU: a linear layer, whose one half is multiplied with gelu of the other."""
    return gated(self.proj(hidden_states))


CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {4: functional.conv2d, 5: functional.conv3d}
_TRANSPOSED = {4: functional.conv_transpose2d, 5: functional.conv_transpose3d}


class _FrozenConv(torch.autograd.Function):
    """A convolution that saves its weight and not its input."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups):
        ctx.save_for_backward(weight)
        ctx.settings = x.shape, stride, padding, dilation, groups
        return add_bias_(CONVOLUTIONS[weight.ndim](x, weight, None, stride, padding, dilation, groups), bias)

    @staticmethod
    def backward(ctx, grad):
        shape, *settings = ctx.settings
        (weight,) = ctx.saved_tensors
        return _conv_gradient(shape, weight, grad, *settings), None, None, None, None, None, None


def _conv_gradient(shape, weight, grad, stride, padding, dilation, groups) -> Tensor:
    """The gradient on the input: the transposed convolution, which keeps channels_last (conv2d_input does not)."""
    # how far the transposed convolution reaches by itself: what a stride cut off at the end is missing
    reach = [
        (size - 1) * s - 2 * p + d * (k - 1) + 1
        for size, s, p, d, k in zip(grad.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True)
    ]
    rest = [whole - reached for whole, reached in zip(shape[2:], reach, strict=True)]
    return _TRANSPOSED[weight.ndim](grad, weight, None, stride, padding, rest, groups, dilation)


def frozen_conv(
    conv: nn.Conv2d | nn.Conv3d, x: Tensor, with_bias: bool = True, padding: tuple[int, ...] | None = None
) -> Tensor:
    """Apply a convolution whose weights get no gradient; `padding` None: its own."""
    bias, pad = conv.bias if with_bias else None, conv.padding if padding is None else padding
    settings, convolve = (conv.stride, pad, conv.dilation, conv.groups), CONVOLUTIONS[conv.weight.ndim]
    if conv.weight.requires_grad:
        return convolve(x, conv.weight, bias, *settings)
    if torch.is_grad_enabled() and x.requires_grad:
        return _FrozenConv.apply(x, conv.weight, bias, *settings)
    # the library adds the bias in a pass of its own anyway, and a slower one
    return add_bias_(convolve(x, conv.weight, None, *settings), bias)


def _norm_forward(self: nn.GroupNorm, x: Tensor, silu: bool = False, offset: Tensor | None = None) -> Tensor:
    return norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu, offset)


def _resnet_forward(self: Any, input_tensor: Tensor, temb: Tensor | None = None, *args, **kwargs) -> Tensor:
    """ResnetBlock2D: norm, silu, conv, + time, norm, silu, conv, + input."""
    norm = self.norm1
    h, input_tensor = norm_silu_beside(input_tensor, norm.weight, norm.bias, norm.num_groups, norm.eps)
    # what is added before the second norm goes into it as an offset, [1, C] or with time [N, C]: one pass less
    offset = None if self.conv1.bias is None else self.conv1.bias[None]
    h = frozen_conv(self.conv1, h, with_bias=False)
    if self.time_emb_proj is not None:
        assert temb is not None  # a block that projects it is told it
        time = self.time_emb_proj(temb if self.skip_time_act else functional.silu(temb))
        offset = time if offset is None else offset + time
    h = self.norm2(h, silu=True, offset=offset)
    h = frozen_conv(self.conv2, h, with_bias=False)
    bias = self.conv2.bias  # with what is added, in the same pass
    if self.conv_shortcut is not None:
        input_tensor = frozen_conv(self.conv_shortcut, input_tensor, with_bias=False)
        bias = _both(bias, self.conv_shortcut.bias)
    return add_residual(input_tensor, h, bias)


def _both(bias: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two convolutions' biases."""
    if bias is None or other is None:
        return other if bias is None else bias
    return bias + other


def _is_plain_resnet(block: Any) -> bool:
    # scale and shift from time, other activations, resampling inside: diffusers' own forward does those
    return (
        (block.time_embedding_norm == "default" or block.time_emb_proj is None)
        and isinstance(block.nonlinearity, nn.SiLU)
        and block.upsample is None
        and block.downsample is None
        and block.output_scale_factor == 1
        and isinstance(block.norm1, nn.GroupNorm)
        and isinstance(block.norm2, nn.GroupNorm)
        and not block.training
    )


def _upsample_forward(self: Any, hidden_states: Tensor, output_size: Any = None, *args, **kwargs) -> Tensor:
    """Upsample2D: twice the size, then a convolution."""
    if output_size is None or list(output_size) == [2 * side for side in hidden_states.shape[2:]]:
        return self.conv(double_size(hidden_states))
    return self.conv(functional.interpolate(hidden_states, size=output_size, mode="nearest"))


def _downsample_forward(self: Any, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    """Downsample2D."""
    return halved(self.conv, hidden_states) if self.padding == 0 else self.conv(hidden_states)


def halved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 3x3 convolution at stride 2 to images [N, C, H, W] with one more row below and column on the right.

    With two more on every side it is all but the first row and column: so the large input isn't copied into a larger
    one.
    """
    if any(side % 2 for side in x.shape[2:]):
        return frozen_conv(conv, functional.pad(x, (0, 1, 0, 1)))
    # a 3x3 kernel at stride 2 begins at -2, 0, 2, ...: without the one at -2 these are the places that are wanted
    return _WithoutFirst.apply(frozen_conv(conv, x, padding=(2, 2)))


class _WithoutFirst(torch.autograd.Function):
    """Images [N, C, H, W] without their first row and column, in channels_last, as their gradient is."""

    @staticmethod
    def forward(ctx, x):
        return x[:, :, 1:, 1:].contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, grad):
        n, c, height, width = grad.shape
        whole = grad.new_zeros(n, height + 1, width + 1, c).permute(0, 3, 1, 2)
        whole[:, :, 1:, 1:] = grad
        return whole


def _temporal_conv_forward(self: Any, hidden_states: Tensor, num_frames: int = 1) -> Tensor:
    """TemporalConvLayer: four times norm, silu, convolution over 3 frames; [B*F, C, H, W]."""
    n, c, height, width = hidden_states.shape
    # [B, C, F, H*W] whose memory is that of channels_last: no copy
    x = hidden_states.permute(0, 2, 3, 1).reshape(n // num_frames, num_frames, height * width, c).permute(0, 3, 1, 2)
    h, offset = x, None
    for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
        norm, conv = layer[0], layer[-1]
        h = norm(h, silu=True, offset=offset)
        h = functional.conv2d(h, conv.weight.squeeze(-1), None, padding=(1, 0))  # kernel [3, 1, 1] over (F, H, W)
        offset = conv.bias[None]
    h = add_residual(x, h, self.conv4[-1].bias)
    return h.permute(0, 2, 3, 1).reshape(n, height, width, c).permute(0, 3, 1, 2)


def _transformer_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    *,
    added_cond_kwargs: dict | None = None,  # a norm reads it that no plain transformer has
    return_dict: bool = True,
    **of_blocks: Any,
):
    """Transformer2DModel on images [N, C, H, W], a token a place. `of_blocks`: passed on to its blocks."""
    n, c, height, width = hidden_states.shape
    residual = hidden_states.permute(0, 2, 3, 1).reshape(n, height * width, c)
    h = self.norm(hidden_states).permute(0, 2, 3, 1).reshape(n, height * width, c)
    h = _project(self.proj_in, h)
    for block in self.transformer_blocks:
        h = block(h, encoder_hidden_states=encoder_hidden_states, **of_blocks)
    h = _project(self.proj_out, h) + residual
    return _returned(h.view(n, height, width, c).permute(0, 3, 1, 2), return_dict)


def _project(layer: nn.Linear | nn.Conv2d, tokens: Tensor) -> Tensor:
    """Apply a linear layer, or a 1x1 convolution as one, to tokens [N, L, C]."""
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.flatten(1)
    return functional.linear(tokens, weight, layer.bias)


def _temporal_transformer_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    *,
    num_frames: int = 1,
    return_dict: bool = True,
    **of_blocks: Any,
):
    """TransformerTemporalModel: each place of [B*F, C, H, W] is a sequence of F tokens."""
    n, c, height, width = hidden_states.shape
    shape = (n // num_frames, num_frames, height * width, c)
    x = hidden_states.permute(0, 2, 3, 1).reshape(shape)
    h = self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # statistics over all frames of a group
    h = self.proj_in(h.transpose(1, 2).reshape(-1, num_frames, c))  # [B*H*W, F, C]
    for block in self.transformer_blocks:
        h = block(h, encoder_hidden_states=encoder_hidden_states, **of_blocks)
    h = self.proj_out(h).view(shape[0], height * width, num_frames, c).transpose(1, 2)
    out = (x + h).reshape(n, height, width, c).permute(0, 3, 1, 2)
    return _returned(out, return_dict)


def _returned(sample: Tensor, return_dict: bool):
    return types.SimpleNamespace(sample=sample) if return_dict else (sample,)


def _vae_attention_forward(self: Any, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    """The VAE's Attention on [N, C, H, W]: group norm, one head over all places, residual."""
    n, c, height, width = hidden_states.shape
    x = hidden_states.permute(0, 2, 3, 1).reshape(n, height * width, c)
    h = self.group_norm(hidden_states).permute(0, 2, 3, 1).reshape(n, height * width, c)
    query, key, value = self.to_q(h), self.to_k(h), self.to_v(h)
    scores = torch.matmul(query * c**-0.5, key.transpose(1, 2))  # scaled first: sums of C products overflow in half
    h = self.to_out[0](torch.matmul(scores.softmax(-1), value)) + x
    return h.view(n, height, width, c).permute(0, 3, 1, 2)


def _is_vae_attention(attention: Any) -> bool:
    # a UNet's transformers have Attention too, of many heads and without a norm of its own
    return (
        attention.group_norm is not None
        and attention.heads == 1
        and attention.residual_connection
        and attention.rescale_output_factor == 1
        and attention.spatial_norm is None
        and attention.norm_q is None
        and attention.norm_k is None
    )


_FORWARDS: dict[str, tuple[Callable[[Any], bool], Callable]] = {
    "ResnetBlock2D": (_is_plain_resnet, _resnet_forward),
    "TemporalConvLayer": (lambda _: True, _temporal_conv_forward),
    "Transformer2DModel": (
        lambda t: bool(t.is_input_continuous) and type(t.proj_in) in (nn.Linear, nn.Conv2d),
        _transformer_forward,
    ),
    "TransformerTemporalModel": (lambda _: True, _temporal_transformer_forward),
    "Downsample2D": (
        lambda d: (
            d.norm is None and isinstance(d.conv, nn.Conv2d) and (d.conv.kernel_size, d.conv.stride) == ((3, 3), (2, 2))
        ),
        _downsample_forward,
    ),
    "Upsample2D": (
        lambda u: u.norm is None and u.use_conv and not u.use_conv_transpose and u.interpolate,
        _upsample_forward,
    ),
    "Attention": (_is_vae_attention, _vae_attention_forward),
}
"""By the class's name: which modules of it, and what they do instead."""
