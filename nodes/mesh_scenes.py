"""Nodes that take meshes of others in: from a file, and into a scene that looks like them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import cast, get_args

import comfy.model_management as management
import torch
from comfy_api.latest import Types, io

from ..dream4d_engine.assets import Provenance, check_header
from ..dream4d_engine.documents import describe
from ..dream4d_engine.guidance.distillation import Guidance
from ..dream4d_engine.machine import versions
from ..dream4d_engine.mesh import MeshError
from ..dream4d_engine.meshes import Front, MeshOrigin, Model, Placement, Up, files_beside, place
from ..dream4d_engine.priors.handle import Prior, PriorHandle, PriorKind
from ..dream4d_engine.training.config import MESH_RECIPES, MeshRecipe, find_recipe
from ..dream4d_engine.training.estimate import mesh_disk_bytes, mesh_memory_bytes
from ..dream4d_engine.training.loop import PriorSilent
from ..dream4d_engine.training.mesh_fit import fit_mesh, mesh_recipe
from .checks import check_budget, check_ranges, check_recipe, check_types, first_complaint, recipe_name, require
from .doors import DoorError, check_choice
from .models import Given, fingerprint_of, model_files, model_input, model_of, model_path
from .places import PlaceError, changed_at
from .session import RunError, carry_out, check_runs_folder, say_on_node
from .sockets import CATEGORY, ScenePort
from .train import budget_bytes, how_it_runs, steps_input

_NOTHING = "(no meshes found)"
_AUTOMATIC = "automatic"
_UP, _FRONT = [_AUTOMATIC, *get_args(Up)], [_AUTOMATIC, *get_args(Front)]
_MOST_SECONDS = 1e6


class LoadMesh(io.ComfyNode):
    """A mesh from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="Dream4DLoadMesh",
            display_name="Load Mesh",
            category=f"{CATEGORY}/meshes",
            description="Takes a mesh from a file (GLB, glTF, OBJ, PLY, STL) below input/3d or the output folder, or "
            "the example of the pack.",
            search_aliases=["load glb", "load 3d", "import mesh", "load model", "dream4d"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=model_files() or [_NOTHING],
                    tooltip="A file below ComfyUI's input/3d or output folder, newest first, or the example.",
                )
            ],
            outputs=[
                io.File3DAny.Output(
                    "model_3d", display_name="model_3d", tooltip="The file, for Mesh to Scene and ComfyUI's 3D nodes."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        """Refuse files that are not there or lie elsewhere."""
        try:
            if file is not None:
                model_path(check_choice("file", file, None))
        except (DoorError, PlaceError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> str:
        """Give the file again when it has changed, or its materials and textures have."""
        return changed_at(lambda: model_path(file or ""), files_beside)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        """Name the file."""
        path = model_path(file)
        return io.NodeOutput(Types.File3D(str(path), path.suffix.lower().removeprefix(".")))


class MeshToScene(io.ComfyNode):
    """A mesh of others as a scene."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="Dream4DMeshToScene",
            display_name="Mesh to Scene",
            category=f"{CATEGORY}/meshes",
            description="Makes a still scene that looks like a mesh, to be animated: Export Animated GLB then writes "
            "the motion into the mesh itself. Cancel keeps what is done: queue again to go on.",
            search_aliases=["animate mesh", "import mesh", "glb to 4d", "mesh to nerf", "3d to 4d", "dream4d"],
            inputs=[
                model_input("model_3d", "A mesh, or a file of one: GLB, glTF, OBJ, PLY or STL."),
                io.DynamicCombo.Input(
                    "recipe",
                    options=[
                        io.DynamicCombo.Option(_AUTOMATIC, []),
                        *(io.DynamicCombo.Option(r.name, [steps_input(r.steps)]) for r in MESH_RECIPES.values()),
                    ],
                    tooltip="How finely. automatic: mesh on a GPU, and mesh-quick, which is coarser, on a CPU.",
                ),
                io.Combo.Input(
                    "up",
                    options=_UP,
                    default=_AUTOMATIC,
                    tooltip="The axis that points up in the file. automatic: z in PLY and STL, else y.",
                ),
                io.Combo.Input(
                    "front",
                    options=_FRONT,
                    default=_AUTOMATIC,
                    tooltip="The axis that the object looks along. automatic: +z where y is up, +x where z is.",
                ),
                io.String.Input(
                    "clip",
                    default="",
                    advanced=True,
                    tooltip="An animation of the file to take the pose from, by name; empty: the mesh at rest.",
                ),
                io.Float.Input(
                    "time",
                    default=0.0,
                    min=0.0,
                    max=_MOST_SECONDS,
                    step=0.1,
                    advanced=True,
                    tooltip="Seconds into the clip.",
                ),
                *how_it_runs(),
            ],
            outputs=[ScenePort.Output("scene", display_name="scene", tooltip="The still scene.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        input_types: Mapping[str, str],
        recipe: Mapping | str | None = None,
        up: str | None = None,
        front: str | None = None,
        time: float | None = None,
        preview_seconds: float | None = None,
        memory_budget: float | None = None,
    ) -> bool | str:
        """Refuse sockets of another kind, unknown recipes, and a front that points up."""
        return first_complaint(
            check_types(cls, input_types),
            check_recipe(recipe_name(recipe), {_AUTOMATIC: None} | MESH_RECIPES),
            check_axes(up, front),
            check_budget(cls, memory_budget),
            check_ranges(cls, time=time, preview_seconds=preview_seconds),
        )

    @classmethod
    def execute(
        cls,
        model_3d: Given,
        recipe: Mapping,
        up: str,
        front: str,
        clip: str,
        time: float,
        seed: int,
        resume: str,
        preview_seconds: float,
        memory_budget: float = 0.0,
    ) -> io.NodeOutput:
        """Fit a scene to the mesh."""
        require(check_axes(up, front), check_budget(cls, memory_budget))
        node_id = cls.hidden.unique_id
        name = recipe["recipe"]
        device = management.get_torch_device()
        chosen = mesh_recipe(device) if name == _AUTOMATIC else find_recipe(name, MESH_RECIPES)
        settings = replace(chosen, steps=recipe.get("steps", chosen.steps))
        say_on_node("reading the mesh", node_id)
        try:
            model = model_of(model_3d, clip.strip() or None, time)
            placement = placed(model, up, front, settings.scene.radius)
        except MeshError as error:
            raise RunError(str(error)) from error
        run = MeshRun(model, placement, settings, seed, budget_bytes(memory_budget))

        def train(guidance, *, device, control):
            def on_look(share: float) -> None:
                say_on_node(f"mesh: seen from {share:.0%} of its sides\n{run.statement()}", node_id)

            return fit_mesh(model, placement, settings, seed=seed, device=device, control=control, on_look=on_look)

        made = carry_out(run, train, node_id=node_id, resume=resume, preview_seconds=preview_seconds)
        say_on_node(run.statement(), node_id)
        return io.NodeOutput(made)


def placed(model: Model, up: str, front: str, radius: float) -> Placement:
    """Put a model into the box, by the widgets' words; MeshError where the front points up."""
    above, ahead = (None if axis == _AUTOMATIC else axis for axis in (up, front))
    return place(model, cast(Up | None, above), cast(Front | None, ahead), radius=radius)


def check_axes(up: str | None, front: str | None) -> bool | str:
    """Refuse a front that points up or down; None isn't known yet."""
    for name, value, known in (("up", up, _UP), ("front", front, _FRONT)):
        if value is not None and value not in known:
            return f"{name} is {describe(value)}: choose one of {', '.join(known)}"
    if up not in (None, _AUTOMATIC) and front is not None and front.endswith(str(up)):
        return f"front is {front} and up is {up}, the same axis: choose another front"
    return True


@dataclass(frozen=True)
class MeshRun:
    """A scene to be fitted to a mesh, as `carry_out` has to know it."""

    model: Model
    placement: Placement
    recipe: MeshRecipe
    seed: int
    memory_budget: int | None = None
    stage: str = MeshRecipe.stage
    priors: Mapping[PriorKind, PriorHandle] = field(default_factory=dict)

    def statement(self) -> str:
        """What was read, and where it was put."""
        mesh, x, y, z = self.model.mesh, *self.placement.center
        lines = [
            f"{self.model.source.name}: {len(mesh.vertices):,} vertices, {len(mesh.faces):,} faces",
            f"its middle ({x:.4g}, {y:.4g}, {z:.4g}) put into the box's",
            f"{self.placement.scale:.4g} times as large there",
        ]
        return "\n".join((*lines, *self.model.notes))

    def needed_bytes(self) -> int:
        """What a fit takes at the least."""
        return mesh_memory_bytes(self.recipe)

    def ways_to_less(self) -> str:
        """The smaller recipe, or nothing that is known."""
        needed = self.needed_bytes()
        smaller = [r.name for r in MESH_RECIPES.values() if mesh_memory_bytes(r) < needed]
        return f"the recipe (smaller ones: {', '.join(smaller)})" if smaller else "the size of the mesh's textures"

    def check(self) -> None:
        """Refuse what no fit can be made with."""
        try:
            check_header(self.recipe.scene, self.provenance())
            check_runs_folder(mesh_disk_bytes(self.recipe))
        except ValueError as error:
            raise RunError(str(error)) from error

    def provenance(self) -> Provenance:
        """Where the result comes from."""
        origin = MeshOrigin(self.model.source, self.placement)
        return Provenance("", self.recipe.name, self.seed, self.recipe.steps, versions(), mesh=origin)

    def identity(self, device: torch.device) -> dict:
        """The tree that a checkpoint is recognised by, as JSON gives it back."""
        tree = {
            "stage": self.stage,
            "recipe": asdict(self.recipe),
            "model": fingerprint_of(self.model),
            "placement": asdict(self.placement),
            "seed": self.seed,
            "device": device.type,
        }
        return json.loads(json.dumps(tree))

    def guidance(self, device: torch.device, on_prior: Callable[[Prior], None]) -> dict[PriorKind, Guidance]:
        """None: the mesh itself says what it looks like."""
        return {}

    def silenced(self, error: PriorSilent, device: torch.device) -> str:
        """What no fit comes to: it asks no prior."""
        return str(error)
