"""From ComfyUI's IMAGE and MASK to the image that a scene is made from, and to what is shown of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..dream4d_engine.export.images import to_bytes
from ..dream4d_engine.training.config import ReferenceConfig
from ..dream4d_engine.training.reference import AUTOMATIC, ImageError, Reference, prepare_reference
from ..dream4d_engine.training.reference.masks import MaskShows

if TYPE_CHECKING:
    from PIL import Image

_SHOWN = 256


def reference_of(image: Tensor, mask: Tensor | None, shows: MaskShows, config: ReferenceConfig) -> Reference:
    """Prepare an image [1, H, W, 3 or 4] with its mask [1, H, W], or with its own alpha.

    `shows`: what is white in the mask. Load Image's masks are white where the image is transparent, those of nodes
    that remove a background are white on the subject; see `what_mask_shows`. Raises ImageError.
    """
    has_alpha = image.ndim == 4 and image.shape[-1] == 4
    if mask is not None and mask.numel() and not (mask > 0).any():
        if not has_alpha:
            raise ImageError(
                "the mask is empty: Load Image gives such a one for an image without transparency. Cut the subject "
                "out first (a node that removes backgrounds, or an editor), or paint the mask"
            )
        mask = None
    if mask is None and not has_alpha and image.ndim == 4 and image.shape[-1] == 3:
        raise ImageError(
            "the image has no alpha and no mask was given: connect the mask of the node that loads the image or "
            "removes its background to reference_mask"
        )
    return prepare_reference(image, config, mask=mask, mask_shows=shows if mask is not None else AUTOMATIC)


def small_image(pixels: Tensor) -> Image.Image:
    """An image [H, W, 3] in [0, 1], small enough for a node."""
    from PIL import Image

    image = Image.fromarray(to_bytes(pixels))
    image.thumbnail((2 * _SHOWN, _SHOWN), Image.Resampling.BILINEAR)
    return image
