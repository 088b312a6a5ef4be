"""Nodes for scene files: save, load, describe.

Only the input and output folders can be reached, and the examples that come with the pack.
"""

from __future__ import annotations

import json
from pathlib import Path

from comfy_api.latest import io, ui

from ..dream4d_engine.assets import AssetError, load_scene, read_info, save_scene
from ..dream4d_engine.dream_in_4d import import_checkpoint, settings_beside
from .doors import DoorError, check_choice
from .places import PlaceError, changed_at, check_prefix, files_below, new_file, path_below
from .readout import with_motion
from .session import gradients, say_on_node
from .sockets import CATEGORY, ScenePort, SceneValue

_SCENE, _CHECKPOINTS = ".safetensors", (".ckpt", ".pt", ".pth")
_NOTHING = "(no scene files found)"
_SUFFIXES = (_SCENE, *_CHECKPOINTS)


class SaveScene(io.ComfyNode):
    """A scene to a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="Dream4DSaveScene",
            display_name="Save Scene",
            category=f"{CATEGORY}/files",
            description="Writes a scene into the output folder as .safetensors, with the workflow in its header: drop "
            "the file onto the canvas to open it.",
            search_aliases=["save 4d", "save 3d", "export scene", "dream4d"],
            inputs=[
                ScenePort.Input("scene", tooltip="The scene to save."),
                io.String.Input(
                    "filename_prefix",
                    default="dream4d/scene",
                    tooltip="Folder and beginning of the name below the output folder; a number is added. "
                    "%date:yyyy-MM-dd% and a node's %title.widget% are filled in.",
                ),
            ],
            outputs=[io.String.Output("file", display_name="file", tooltip="The file, for Load Scene.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        """Refuse names that lead out of the output folder, or that no file can have."""
        return True if filename_prefix is None else check_prefix(filename_prefix)

    @classmethod
    def execute(cls, scene: SceneValue, filename_prefix: str) -> io.NodeOutput:
        """Write the file."""
        place = new_file(filename_prefix, cls.hidden.prompt, _SCENE)
        save_scene(place.path, scene.scene, scene.provenance, cls._notes())
        return io.NodeOutput(f"{place.listed} [output]", ui={"scenes": [place.saved], "text": (place.listed,)})

    @classmethod
    def _notes(cls) -> dict[str, str]:
        """The workflow, as ComfyUI's own files have it, unless it was told to leave it out."""
        from comfy.cli_args import args

        if args.disable_metadata:
            return {}
        notes = {} if cls.hidden.prompt is None else {"prompt": json.dumps(cls.hidden.prompt)}
        return notes | {name: json.dumps(value) for name, value in (cls.hidden.extra_pnginfo or {}).items()}


class LoadScene(io.ComfyNode):
    """A scene from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="Dream4DLoadScene",
            display_name="Load Scene",
            category=f"{CATEGORY}/files",
            description="Reads a scene file (.safetensors), or a checkpoint of the original Dream-in-4D (.ckpt), from "
            "the input or the output folder, or one of the examples.",
            search_aliases=["load 4d", "load 3d", "import scene", "dream-in-4d checkpoint", "dream4d"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=scene_files() or [_NOTHING],
                    tooltip="A file below ComfyUI's input or output folder, newest first, or an example of the pack.",
                ),
            ],
            outputs=[ScenePort.Output("scene", display_name="scene", tooltip="The scene.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        """Refuse files that are not there, lie elsewhere or hold no scene."""
        try:
            if file is not None:
                path = scene_path(check_choice("file", file, None))
                if path.suffix.lower() == _SCENE:
                    read_info(path)  # the header alone
        except (AssetError, DoorError, PlaceError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> str:
        """Read the file again when it has changed, or the settings beside a checkpoint have."""
        return changed_at(lambda: scene_path(file or ""), settings_beside)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        """Read the file."""
        path = scene_path(file)
        with gradients():
            scene, provenance = import_checkpoint(path) if path.suffix.lower() in _CHECKPOINTS else load_scene(path)
        return io.NodeOutput(SceneValue(scene, provenance))


class SceneInfo(io.ComfyNode):
    """A scene in words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="Dream4DSceneInfo",
            display_name="Scene Info",
            category=f"{CATEGORY}/files",
            description="Says what a scene is, how much it moves, and where it comes from.",
            search_aliases=["describe scene", "metadata", "provenance", "dream4d"],
            inputs=[ScenePort.Input("scene", tooltip="The scene to describe.")],
            outputs=[io.String.Output("text", display_name="text", tooltip="The description.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, scene: SceneValue) -> io.NodeOutput:
        """Describe the scene, on the node too."""
        text = describe(scene)
        if scene.scene.deformation is not None:
            kind, _, rest = text.partition("\n")
            text = f"{kind}\n{with_motion(scene, cls.hidden.unique_id)[1]}\n{rest}"
        say_on_node(text, cls.hidden.unique_id)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def describe(value: SceneValue) -> str:
    """A scene in some lines of text."""
    config, scene = value.scene.config, value.scene
    n_numbers = sum(parameter.numel() for parameter in scene.parameters())
    occupied = float(scene.occupancy.occupied.float().mean())
    kind = "still scene" if config.deformation is None else f"moving scene, zoom {config.deformation.scale:.2f}"
    lines = [
        f"{kind}, a loop" if scene.loops else kind,
        f"{n_numbers:,} parameters, {n_numbers * 4 / 2**20:.1f} MiB",
        f"{occupied:.0%} of the box may be occupied",
        *value.provenance.lines,
    ]
    return "\n".join(lines)


def scene_files() -> list[str]:
    """The files that may be scenes, as `files_below` names them."""
    return files_below(_SUFFIXES)


def scene_path(file: str) -> Path:
    """Return the place of a file named like those of `scene_files`; PlaceError if it leads elsewhere or isn't there."""
    return path_below(file, _SUFFIXES, "scene file")
