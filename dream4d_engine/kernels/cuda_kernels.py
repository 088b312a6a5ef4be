"""The kernels of tiny-cuda-nn and nerfacc, where both are installed, on the scene's own parameters.

Neither is on a package index in a form that installs without a compiler, so nothing depends on them. Through their
public Python interfaces: `tinycudann.Encoding` with its `params` replaced by our table for the call, nerfacc's
`render_weight_from_density` and `accumulate_along_rays`. Marching is the plain one: nerfacc's own walks from cell to
cell, and its intervals differ from the reference's where a ray enters one.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from . import torch_kernels
from .layout import GridLayout


@lru_cache(maxsize=8)
def check(device: torch.device) -> None:
    """Raise ImportError or RuntimeError, with the reason, where these kernels cannot run."""
    if device.type != "cuda":
        raise RuntimeError("they need a CUDA device")
    try:
        import nerfacc  # noqa: F401
        import tinycudann  # noqa: F401
    except ImportError:
        raise
    except Exception as error:  # tiny-cuda-nn raises others where its build doesn't fit the card
        raise RuntimeError(f"they cannot be imported: {type(error).__name__}: {error}") from error
    try:
        index = torch.zeros(1, dtype=torch.long, device=device)
        one = torch.ones(1, device=device)
        _, sums = composite(one, one[:, None], index, 0 * one, one, 1)
        if abs(float(sums) - 0.632120559) > 1e-5:
            raise RuntimeError(f"a first compositing gave {float(sums)} instead of 0.63212")
    except Exception as error:  # nerfacc compiles itself on first use, with whatever compiler there is
        raise RuntimeError(f"nerfacc does not work: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=8)
def _encoding(layout: GridLayout, device: torch.device):
    """tiny-cuda-nn's encoding of a layout. Its own parameters are never used."""
    import tinycudann

    config = {
        "otype": "Grid",
        "type": "Hash",
        "n_levels": len(layout.levels),
        "n_features_per_level": layout.n_features,
        "log2_hashmap_size": layout.log2_entries,
        "base_resolution": layout.base_resolution,
        "per_level_scale": layout.growth,
        "interpolation": "Linear",
    }
    with torch.cuda.device(device):
        encoding = tinycudann.Encoding(layout.n_dims, config, dtype=torch.float32)
    if encoding.params.numel() != layout.n_parameters:
        raise ValueError(f"tiny-cuda-nn lays {encoding.params.numel()} parameters out, not {layout.n_parameters}")
    return encoding


def hash_encode(x: Tensor, table: Tensor, layout: GridLayout, n_active: int | None = None) -> Tensor:
    """Interpolate a multiresolution hash grid linearly; see `torch_kernels.hash_encode`.

    tiny-cuda-nn takes grids of 2 to 4 dimensions with 1, 2, 4 or 8 features; other grids are done in plain PyTorch.
    """
    known = layout.n_dims in (2, 3, 4) and layout.n_features in (1, 2, 4, 8)
    fits = x.shape[-1] == layout.n_dims and table.numel() == layout.n_parameters and table.dtype == torch.float32
    if not (known and fits and len(x)):
        return torch_kernels.hash_encode(x, table, layout, n_active)
    out = torch.func.functional_call(_encoding(layout, x.device), {"params": table}, (x.float(),))
    if n_active is None or n_active >= len(layout.levels):
        return out
    asleep = torch.arange(layout.n_outputs, device=x.device) >= max(n_active, 0) * layout.n_features
    return out.masked_fill(asleep, 0.0)


def composite(
    density: Tensor, values: Tensor, ray_indices: Tensor, t_starts: Tensor, t_ends: Tensor, n_rays: int
) -> tuple[Tensor, Tensor]:
    """Weigh samples by the volume rendering integral and sum them; see `torch_kernels.composite`."""
    import nerfacc

    weights, _, _ = nerfacc.render_weight_from_density(
        t_starts, t_ends, density, ray_indices=ray_indices, n_rays=n_rays
    )
    return weights, accumulate(weights[:, None] * values, ray_indices, n_rays)


def accumulate(values: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
    """Sum values [S, K] along their rays to [n_rays, K]; see `torch_kernels.accumulate`."""
    import nerfacc

    ones = values.new_ones(len(values))
    return nerfacc.accumulate_along_rays(ones, values, ray_indices=ray_indices, n_rays=n_rays)
