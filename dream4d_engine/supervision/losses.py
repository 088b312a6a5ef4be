"""The terms of a loss beside score distillation, a function each.

Every function returns a scalar. Images are [B, F, H, W, c], as in RenderOutput; its fields can be passed as they
are. Functions named after a prior belief take only the rendering, the others compare it with a reference.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..guidance.distillation import color_loss, distillation_loss

if TYPE_CHECKING:
    from ..rendering import RenderOutput

__all__ = [
    "color_loss",
    "depth",
    "displacement_tv",
    "distillation_loss",
    "normal",
    "normal_smoothness_2d",
    "normal_smoothness_3d",
    "opacity_entropy",
    "opacity_sparsity",
    "orientation",
    "reference_mask",
    "reference_rgb",
    "relative_depth",
    "rigidity",
    "z_variance",
]


def opacity_sparsity(opacity: Tensor) -> Tensor:
    """Prefer empty space: mean of sqrt(opacity^2 + 0.01) (DreamFusion 2209.14988, appendix A.2)."""
    return (opacity.square() + 0.01).sqrt().mean()


def opacity_entropy(opacity: Tensor) -> Tensor:
    """Prefer opacities of 0 or 1: mean binary entropy, in nats."""
    p = opacity.clamp(1e-3, 1 - 1e-3)  # at 0 and 1 the logarithm has no finite gradient
    return -(p * p.log() + (1 - p) * (1 - p).log()).mean()


def orientation(weights: Tensor, normals: Tensor, directions: Tensor, n_rays: int | None = None) -> Tensor:
    """Penalise visible surfaces that face away, mean over the rays: Ref-NeRF (2112.03907), equation 11.

    Args:
        weights: [S] of samples, or the opacity [..., 1] of pixels. normals, directions: [S, 3] or [..., 3].
        n_rays: what to divide by; None: the number of weights (right for pixels).
    """
    weights = weights.detach().reshape(-1)  # a gradient here could hide a surface instead of turning it
    facing_away = (normals * directions).sum(-1).clamp_min(0).reshape(-1)  # max(0, n . d), d into the scene
    return (weights * facing_away.square()).sum() / (n_rays or max(weights.numel(), 1))


def z_variance(variance: Tensor, opacity: Tensor, threshold: float = 0.5) -> Tensor:
    """Prefer thin surfaces: mean of the depth's variance along the ray, where the opacity is above `threshold`.

    HiFA (2305.18766), section 3.2. Both [..., 1]; no opaque pixel gives 0.
    """
    opaque = (opacity.detach() > threshold).to(variance)
    return (variance * opaque).sum() / opaque.sum().clamp_min(1)  # 1: where nothing is opaque


def normal_smoothness_2d(normals: Tensor) -> Tensor:
    """Prefer normals [B, F, H, W, 3] that change little from pixel to pixel: mean squared differences, both ways."""
    rows = (normals[:, :, 1:] - normals[:, :, :-1]).square().mean()
    columns = (normals[:, :, :, 1:] - normals[:, :, :, :-1]).square().mean()
    return rows + columns


def normal_smoothness_3d(normals: Tensor, nearby: Tensor) -> Tensor:
    """Prefer normals [S, 3] that are those of a point nearby [S, 3]: mean absolute difference."""
    return (normals - nearby).abs().mean()


def displacement_tv(displacement: Tensor) -> Tensor:
    """Prefer smooth motion: total variation of the composited displacement [B, F, H, W, 3].

    Squared differences along frames, rows and columns, summed; mean over the groups B.
    """
    terms = [displacement.diff(dim=dim).square().sum() for dim in (1, 2, 3)]  # F, H, W
    return torch.stack(terms).sum() / displacement.shape[0]


def rigidity(apart: Tensor, before: Tensor) -> Tensor:
    """Prefer distances that stay: mean of the squared strain |apart| / |before| - 1 of pairs of points.

    apart: [S, 3] from one to the other now; before: [S, 3] likewise, of length above 0. No pairs give 0.
    """
    length = apart.square().sum(-1).clamp_min(1e-16).sqrt()  # where both fall together the gradient is 0, not NaN
    return (length / before.norm(dim=-1) - 1).square().sum() / max(len(before), 1)


def reference_rgb(render: RenderOutput, rgb: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error to a reference image put over the rendering's own background.

    rgb [B, F, H, W, 3], mask [B, F, H, W, 1] in [0, 1].
    """
    return (render.rgb - (rgb * mask + render.background * (1 - mask))).square().mean()


def reference_mask(opacity: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of the opacity to a reference mask; both [B, F, H, W, 1]."""
    return (opacity - mask).square().mean()


def _masked_moments(a: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (centred a, centred b, var a, var b, cov) for each image, over the mask.

    Inputs [..., H, W, 1]; the first two outputs are [P, H*W] and 0 outside of the mask, the others [P, 1].
    """
    a, b, mask = (t.reshape(-1, math.prod(t.shape[-3:])) for t in torch.broadcast_tensors(a, b, mask.to(a)))
    n = mask.sum(1, keepdim=True).clamp_min(1)
    a = (a - (a * mask).sum(1, keepdim=True) / n) * mask
    b = (b - (b * mask).sum(1, keepdim=True) / n) * mask
    return a, b, (a * a).sum(1, True) / n, (b * b).sum(1, True) / n, (a * b).sum(1, True) / n


def depth(rendered: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error to a reference depth after the scale and shift of the reference that suit best.

    The least-squares fit is one for each image and has no gradient: a monocular depth estimate says nothing of
    either. All [B, F, H, W, 1], mask in {0, 1}; only pixels in the mask count.
    """
    centred, reference, _, variance, covariance = _masked_moments(rendered, reference, mask)
    scale = (covariance / variance.clamp_min(1e-12)).detach()  # least squares
    # the fitted shift makes the means equal, which is what centring both does; the residuals sum to 0, so centring
    # the rendered depth adds nothing to its gradient
    return (centred - scale * reference).square().sum() / mask.expand(rendered.shape).sum().clamp_min(1)


def relative_depth(rendered: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """1 - Pearson's correlation with a reference depth over the mask, mean over the images; all [B, F, H, W, 1]."""
    _, _, var_rendered, var_reference, covariance = _masked_moments(rendered, reference, mask)
    # the clamps keep the gradient finite on a flat image
    correlation = covariance * (var_rendered.clamp_min(1e-8) * var_reference.clamp_min(1e-8)).rsqrt()
    return (1 - correlation).mean()


def normal(rendered: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """1 - cosine between rendered and reference normals [B, F, H, W, 3], mean over the mask [B, F, H, W, 1]."""
    cosine = torch.nn.functional.cosine_similarity(rendered, reference, dim=-1)[..., None]
    mask = mask.expand(cosine.shape).to(cosine)
    return ((1 - cosine) * mask).sum() / mask.sum().clamp_min(1)
