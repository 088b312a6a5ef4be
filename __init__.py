"""The entry point for ComfyUI: a clone of this repository in `custom_nodes` is a pack of nodes.

Nothing is imported before ComfyUI asks. Plain Python programs import `dream4d_engine` instead.
"""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    """Return the extension whose nodes ComfyUI shows."""
    from .nodes import Dream4DExtension

    return Dream4DExtension()
