"""From a scene to a mesh: its surface, where that goes over time, and what it looks like."""

from .colors import bake_texture, surface_colors
from .extract import Surface, SurfaceOptions, extract_surface
from .libraries import check_libraries
from .motion import MotionReadout, SurfaceMotion, follow_surface, leaves_box, measure_motion, what_is_frozen
from .own import OwnTracks, track_own_vertices
from .tracks import Tracks, folds_note, outside_note, outside_share, track_vertices

__all__ = [
    "MotionReadout",
    "OwnTracks",
    "Surface",
    "SurfaceMotion",
    "SurfaceOptions",
    "Tracks",
    "bake_texture",
    "check_libraries",
    "extract_surface",
    "follow_surface",
    "folds_note",
    "leaves_box",
    "measure_motion",
    "outside_note",
    "outside_share",
    "surface_colors",
    "track_own_vertices",
    "track_vertices",
    "what_is_frozen",
]
