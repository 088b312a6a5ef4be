"""Supervision: what a training step looks at, and what it thinks of the image."""

from .distil import distillation
from .record import Supervision, Terms, ViewFunction, Views, gather, rendered, views_of
from .regularise import RegularizerWeights, regularisers
from .sight import Sightings, SightWeights, known_in_space, seen_along_rays
from .targets import PhotometricWeights, Targets, photometric
from .views import RandomBackground, draw_background, heaviest, training_view, with_gradient_in

__all__ = [
    "PhotometricWeights",
    "RandomBackground",
    "RegularizerWeights",
    "SightWeights",
    "Sightings",
    "Supervision",
    "Targets",
    "Terms",
    "ViewFunction",
    "Views",
    "distillation",
    "draw_background",
    "gather",
    "heaviest",
    "known_in_space",
    "photometric",
    "regularisers",
    "rendered",
    "seen_along_rays",
    "training_view",
    "views_of",
    "with_gradient_in",
]
