"""The image that a scene is made from: read, checked, cut to a frame, and looked at in training."""

from .masks import AUTOMATIC, MASK_SHOWS, UnclearMask, what_mask_shows
from .pixels import ImageError
from .prepare import Reference, load_reference, prepare_reference
from .targets import check_reference, reference_cameras, reference_targets

__all__ = ["AUTOMATIC", "MASK_SHOWS", "ImageError", "Reference", "UnclearMask"]
__all__ += ["check_reference", "load_reference", "prepare_reference"]
__all__ += ["reference_cameras", "reference_targets", "what_mask_shows"]
