"""From ComfyUI's IMAGE and MASK to the picture that a scene is made from."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dream4d_engine.training.config import ReferenceConfig
from ..dream4d_engine.training.reference import PictureError, Reference, prepare_reference

AUTOMATIC_MASK, SUBJECT, BACKGROUND = "automatic", "subject", "background"
MASK_SHOWS = (AUTOMATIC_MASK, SUBJECT, BACKGROUND)


def reference_of(image: Tensor, mask: Tensor | None, shows: str, config: ReferenceConfig) -> Reference:
    """Prepare a picture [1, H, W, 3 or 4] with its mask [1, H, W], or with its own alpha.

    `shows`: what is white in the mask. Load Image's masks are white where the picture is transparent, those of nodes
    that remove a background are white on the subject; "automatic" takes for background what fills the mask's edge.
    Raises PictureError.
    """
    if mask is not None:
        mask = mask.detach().float().cpu()
        if not (mask > 0.5).any() and image.shape[-1] == 3:
            raise PictureError(
                "the mask is empty: Load Image gives such a one for a picture without transparency. Cut the subject "
                "out first (a node that removes backgrounds, or an editor), or paint the mask"
            )
        if shows == BACKGROUND or (shows == AUTOMATIC_MASK and _fills_the_edge(mask)):
            mask = 1 - mask
    return prepare_reference(image, config, mask=mask)


def _fills_the_edge(mask: Tensor) -> bool:
    """Whether most of the outermost pixels [..., H, W] are white."""
    edge = torch.cat((mask[..., 0, :], mask[..., -1, :], mask[..., :, 0], mask[..., :, -1]), -1)
    return bool((edge > 0.5).float().mean() > 0.5)
