"""From cameras and a scene to pictures: march, query, composite, in one go or in chunks."""

from .march import SamplesAhead
from .render import (
    RenderOptions,
    RenderOutput,
    View,
    find_samples_ahead,
    prepare_view,
    render,
    render_chunked,
    render_view,
)

__all__ = [
    "RenderOptions",
    "RenderOutput",
    "SamplesAhead",
    "View",
    "find_samples_ahead",
    "prepare_view",
    "render",
    "render_chunked",
    "render_view",
]
