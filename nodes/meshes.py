"""Nodes that turn scenes into meshes: one for the graph, one into a file that moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO

from comfy_api.latest import Types, io

from ..dream4d_engine.export import (
    ROOM,
    ExportOptions,
    GltfOptions,
    SceneMesh,
    glb_bytes,
    own_mesh_glb,
    require_own,
    scene_mesh,
)
from ..dream4d_engine.machine import check_folder, check_memory, write_atomically
from ..dream4d_engine.mesh import MeshError
from ..dream4d_engine.priors.formats.weights import human_size
from ..dream4d_engine.surface import SurfaceOptions
from .checks import check_ranges, check_types, first_complaint, require
from .models import Given, core_mesh, model_input, model_of
from .places import check_prefix, new_file
from .render import scene_on_device
from .session import RunError, interrupt_if_asked, say_on_node
from .sockets import CATEGORY, ScenePort, SceneValue

_LARGEST, _SMALLEST_TEXTURE, _LARGEST_TEXTURE = 512, 16, 8192
_BYTES_A_POINT = 30  # of the lattice, with all that is made of it: 26 were measured at 256
_PACK = "in the folder of this pack, with ComfyUI's Python: pip install"
_LIBRARIES = {
    "skimage": f"meshes need scikit-image: {_PACK} -r requirements.txt",
    "fast_simplification": f"fewer faces need fast-simplification: {_PACK} -r requirements.txt; or set faces to 0",
    "xatlas": f"textures need xatlas: {_PACK} xatlas; or set texture to 0",
}


def _resolution() -> io.Int.Input:
    return io.Int.Input(
        "resolution",
        default=128,
        min=16,
        max=_LARGEST,
        tooltip="Cells along the object's longest side: more find finer parts, and take longer.",
    )


def _faces() -> io.Int.Input:
    return io.Int.Input(
        "faces", default=20_000, min=0, max=10_000_000, tooltip="Triangles at most; 0 keeps all that are found."
    )


def _details() -> list[io.Input]:
    """How the surface is found and what it looks like, for those who want to know."""
    return [
        io.Int.Input(
            "texture",
            default=0,
            min=0,
            max=_LARGEST_TEXTURE,
            advanced=True,
            tooltip="Side of a texture that is baked, texels; 0 gives the vertices colours instead.",
        ),
        io.Float.Input(
            "threshold",
            default=0.0,
            min=0.0,
            max=1e8,
            step=0.1,
            advanced=True,
            tooltip="The density that is the surface; 0 finds the one whose outlines are those of the rendered scene.",
        ),
        io.Int.Input(
            "smoothing", default=4, min=0, max=100, advanced=True, tooltip="Rounds of smoothing, which don't shrink it."
        ),
    ]


class ExtractMesh(io.ComfyNode):
    """A scene's surface at one moment."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="Dream4DExtractMesh",
            display_name="Extract Mesh",
            category=f"{CATEGORY}/meshes",
            description="Makes a mesh of a scene at one moment, coloured or textured, for ComfyUI's own mesh nodes.",
            search_aliases=["scene to mesh", "nerf to mesh", "marching cubes", "surface", "dream4d"],
            inputs=[
                ScenePort.Input("scene", tooltip="A still or a moving scene."),
                io.Float.Input(
                    "time",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="The moment, from 0 to 1; a still scene is the same at all.",
                ),
                _resolution(),
                _faces(),
                *_details(),
            ],
            outputs=[io.Mesh.Output("mesh", display_name="mesh", tooltip="The mesh, y up, its front towards +z.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, resolution: int | None = None, faces: int | None = None, texture: int | None = None
    ) -> bool | str:
        """Refuse what there is no memory or no library for."""
        return check_surface(cls, resolution, faces, texture)

    @classmethod
    def execute(
        cls,
        scene: SceneValue,
        time: float,
        resolution: int,
        faces: int,
        texture: int,
        threshold: float,
        smoothing: int,
    ) -> io.NodeOutput:
        """Extract the surface."""
        require(check_surface(cls, resolution, faces, texture))
        surface = SurfaceOptions(resolution, threshold or None, faces, smoothing)
        node_id = cls.hidden.unique_id
        with scene_on_device(scene) as there:
            made = scene_mesh(there, ExportOptions(1, time, texture, surface), False, progress_of(node_id))
            mesh = core_mesh(made.mesh)
        say_on_node(told(made), node_id)
        return io.NodeOutput(mesh)


class ExportAnimatedGLB(io.ComfyNode):
    """A scene as a GLB file that moves."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="Dream4DExportAnimatedGLB",
            display_name="Export Animated GLB",
            category=f"{CATEGORY}/meshes",
            description="Writes a moving scene into the output folder as a GLB file: one mesh, animated by morph "
            "targets, for Preview 3D & Animation, three.js, Blender and game engines.",
            search_aliases=["save glb", "export 4d", "animated mesh", "gltf", "morph targets", "blender", "dream4d"],
            inputs=[
                ScenePort.Input("scene", tooltip="A moving scene. A still one makes a file without animation."),
                model_input(
                    "own_mesh",
                    "The mesh that Mesh to Scene made the scene of: the motion is written into it, with its own "
                    "vertices, materials and textures. Without it the scene's own surface is used.",
                    optional=True,
                ),
                io.Int.Input(
                    "times",
                    default=24,
                    min=2,
                    max=1000,
                    tooltip="Moments that the surface is followed through; the file keeps those that are needed.",
                ),
                _resolution(),
                _faces(),
                io.Float.Input(
                    "duration",
                    default=2.0,
                    min=0.01,
                    max=3600.0,
                    step=0.1,
                    tooltip="Seconds that the animation takes.",
                ),
                io.Boolean.Input(
                    "bounce",
                    default=False,
                    tooltip="Play forwards, then backwards: a motion that doesn't come back then loops without a jump.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="dream4d/animated",
                    tooltip="Folder and beginning of the name below the output folder; a number is added. "
                    "%date:yyyy-MM-dd% and a node's %title.widget% are filled in.",
                ),
                io.Boolean.Input(
                    "lit",
                    default=False,
                    advanced=True,
                    tooltip="A material that takes the viewer's light, instead of colours as they are.",
                ),
                *_details(),
            ],
            outputs=[
                io.File3DGLB.Output("model_3d", display_name="model_3d", tooltip="The file, for ComfyUI's 3D nodes.")
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        input_types: Mapping[str, str],
        resolution: int | None = None,
        faces: int | None = None,
        texture: int | None = None,
        filename_prefix: str | None = None,
    ) -> bool | str:
        """Refuse what there is no memory or no library for, and names that no file can have."""
        own = "own_mesh" in input_types  # then no surface is looked for
        return first_complaint(
            check_types(cls, input_types),
            True if own else check_surface(cls, resolution, faces, texture),
            True if filename_prefix is None else check_prefix(filename_prefix),
        )

    @classmethod
    def execute(
        cls,
        scene: SceneValue,
        times: int,
        resolution: int,
        faces: int,
        duration: float,
        bounce: bool,
        filename_prefix: str,
        lit: bool,
        texture: int,
        threshold: float,
        smoothing: int,
        own_mesh: Given | None = None,
    ) -> io.NodeOutput:
        """Follow the surface, or the mesh's own vertices, through the times and write the file."""
        gltf, node_id = GltfOptions(duration, bounce, lit=lit), cls.hidden.unique_id
        _require_room(filename_prefix, cls.hidden.prompt)
        if own_mesh is None:
            require(check_surface(cls, resolution, faces, texture))
            surface = SurfaceOptions(resolution, threshold or None, faces, smoothing)
            made = _surface_file(scene, ExportOptions(times, 0.0, texture, surface, gltf), node_id)
        else:
            made = _own_file(scene, own_mesh, times, gltf, node_id)
        file = new_file(filename_prefix, cls.hidden.prompt, ".glb")
        write_atomically(file.path, made.data)
        motion = told_of_motion(made.n_keys, scene.scene.deformation is not None)
        lines = (f"{file.listed}, {human_size(len(made.data))}", *made.lines, motion)
        say_on_node("\n".join(lines), node_id)
        data = BytesIO(made.data)  # and not the path: what was saved may be moved or removed
        return io.NodeOutput(Types.File3D(data, "glb"), ui={"3d": [file.saved]})


def _require_room(prefix: str, graph: Mapping | None) -> None:
    """RunError, before the work, where no file of this prefix can be written."""
    try:
        check_folder(new_file(prefix, graph, ".glb").path.parent, ROOM, "choose another filename_prefix")
    except ValueError as error:
        raise RunError(str(error)) from error


@dataclass(frozen=True)
class _Made:
    """A file that isn't written yet, and what is to be said of it."""

    data: bytes
    n_keys: int
    lines: tuple[str, ...]


def _surface_file(scene: SceneValue, options: ExportOptions, node_id: str | None) -> _Made:
    """The scene's own surface, moving."""
    with scene_on_device(scene) as there:
        made = scene_mesh(there, options, on_progress=progress_of(node_id))
        data, n_keys = glb_bytes(made.mesh, options.gltf)
    return _Made(data, n_keys, (told(made),))


def _own_file(scene: SceneValue, given: Given, times: int, options: GltfOptions, node_id: str | None) -> _Made:
    """The mesh that the scene was made of, moving as the scene does; RunError for another one."""
    origin = scene.provenance.first_mesh
    # of another clip or moment it would be another model: the scene says which
    clip, time = (None, 0.0) if origin is None else (origin.source.clip, origin.source.time)
    try:
        model = model_of(given, clip, time)
        require_own(model, origin)
    except MeshError as error:
        raise RunError(f"own_mesh: {error}") from error
    with scene_on_device(scene) as there:
        made = own_mesh_glb(there, origin, model, times, options, progress_of(node_id))
    size = f"{model.source.name}: {len(model.mesh.vertices):,} vertices, {len(model.mesh.faces):,} faces"
    return _Made(made.data, made.n_keys, (size, *made.notes))


def check_surface(
    node: type[io.ComfyNode], resolution: int | None, faces: int | None, texture: int | None
) -> bool | str:
    """Return True, or why there can be no such surface; None isn't known yet."""
    complaint = check_ranges(node, resolution=resolution, faces=faces, texture=texture)
    if complaint is not True:
        return complaint
    if texture and texture < _SMALLEST_TEXTURE:
        return f"texture is {texture}: it must be 0 (colours at the vertices) or at least {_SMALLEST_TEXTURE}"
    wanted = {"skimage": True, "fast_simplification": faces, "xatlas": texture}
    missing = next((name for name, needed in wanted.items() if needed and find_spec(name) is None), None)
    if missing is not None:
        return _LIBRARIES[missing]
    try:
        if resolution is not None:
            check_memory(_BYTES_A_POINT * resolution**3, f"a lattice of {resolution}", "lower resolution")
    except ValueError as error:
        return str(error)
    return True


def progress_of(node_id: str | None) -> Callable[[float], None]:
    """A node's progress bar, to be told the share that is done; Cancel ends the work there."""
    from comfy.utils import ProgressBar

    steps = 100
    bar = ProgressBar(steps, node_id=node_id)

    def report(share: float) -> None:
        interrupt_if_asked()
        bar.update_absolute(round(share * steps))

    return report


def told(made: SceneMesh) -> str:
    """What was made, in lines of text."""
    mesh, surface = made.mesh, made.surface
    iou = "" if surface.silhouette_iou is None else f" (its outlines agree to {surface.silhouette_iou:.1%})"
    size = f"{len(mesh.vertices):,} vertices, {len(mesh.faces):,} faces"
    return "\n".join((size, f"surface at density {surface.threshold:.3g}{iou}", *made.notes))


def told_of_motion(n_keys: int, moving: bool) -> str:
    """What the file does."""
    if n_keys:
        return f"{n_keys} key frames"
    return "nothing moves in the scene: no animation" if moving else "the scene is still: no animation"
