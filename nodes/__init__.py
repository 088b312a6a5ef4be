"""The stages of dream4d as ComfyUI nodes: thin wrappers that unpack, call the engine and wrap.

The only room that imports ComfyUI. ComfyUI has a module called `nodes` of its own and loads packs under a name made
from their path, so everything of this pack is imported relatively, the engine (`..dream4d_engine`) included.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .checks import at_the_door
from .full_priors import LOADERS, ApplyLora
from .graph_nodes import ImagePriorFromModel, NovelViewPriorFromModel, VideoPriorFromModel
from .mesh_scenes import LoadMesh, MeshToScene
from .meshes import ExportAnimatedGLB, ExtractMesh
from .motion import Motion
from .preview4d import Preview4D
from .priors import LoadPrior, LoadToyPrior
from .render import Render
from .scene_io import LoadScene, SaveScene, SceneInfo
from .train import AnimateScene, OptimizeStaticScene

_ALL: list[type[io.ComfyNode]] = [
    LoadToyPrior,
    LoadPrior,
    *LOADERS,
    ApplyLora,
    ImagePriorFromModel,
    NovelViewPriorFromModel,
    VideoPriorFromModel,
    OptimizeStaticScene,
    AnimateScene,
    Motion,
    Render,
    Preview4D,
    LoadMesh,
    MeshToScene,
    ExtractMesh,
    ExportAnimatedGLB,
    SaveScene,
    LoadScene,
    SceneInfo,
]
NODES = [at_the_door(node) for node in _ALL]


class Dream4DExtension(ComfyExtension):
    """The pack, as ComfyUI sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes of the pack."""
        return NODES
