"""From cameras and a scene to images: march, query, composite, in one go or in chunks."""

from .march import PrefetchedSamples
from .render import (
    GradientFrames,
    RenderOptions,
    RenderOutput,
    View,
    count_samples,
    prefetch_samples,
    prepare_view,
    render,
    render_chunked,
    render_view,
)

__all__ = [
    "GradientFrames",
    "RenderOptions",
    "RenderOutput",
    "PrefetchedSamples",
    "View",
    "count_samples",
    "prefetch_samples",
    "prepare_view",
    "render",
    "render_chunked",
    "render_view",
]
