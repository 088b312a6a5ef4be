"""From cameras and a scene to pictures: march, query, composite, in one go or in chunks."""

from .render import RenderOptions, RenderOutput, render, render_chunked

__all__ = ["RenderOptions", "RenderOutput", "render", "render_chunked"]
