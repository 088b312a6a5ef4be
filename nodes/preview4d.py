"""The node that shows a scene in the canvas, to be turned and played.

The browser gets images, not the scene: a grid of views around the object and moments of its animation, rendered
once. A sheet holds all the views of one moment; sheets come one after the other, a coarse one first, and the viewer
(web/preview4d.js) shows what is there already.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..dream4d_engine.cameras import CameraBatch, film_times, make_cameras
from ..dream4d_engine.export.images import save_image
from ..dream4d_engine.priors.files import digest
from ..dream4d_engine.rendering import RenderOptions
from ..dream4d_engine.rendering.shading import depth_image, normal_image, surface_normals
from ..dream4d_engine.scene import Scene
from .checks import check_ranges
from .render import render_shot, scene_on_device
from .session import RunError
from .sockets import CATEGORY, ScenePort, SceneValue

PASSES = ("rgb", "depth", "normals")
EVENT, RESULT = "dream4d.view", "dream4d_view"
"""Names that the viewer knows: of the messages while the grid is rendered, and of the node's result."""

_DISTANCE, _FIELD_OF_VIEW = 3.0, math.radians(40.0)
_LOWEST_DEG, _HIGHEST_DEG, _ONLY_DEG = 5.0, 50.0, 15.0
_SAMPLES = 96
"""Samples along a ray, at most: enough for small images."""
_MOST_IMAGES, _WIDEST_SHEET = 4096, 8192
_FOLDER = "dream4d_view"


@dataclass(frozen=True)
class ViewGrid:
    """Which images are made: `n_azimuths` around the object for each of `elevations_deg`, at each of `times`."""

    n_azimuths: int
    elevations_deg: tuple[float, ...]
    times: tuple[float, ...]
    size: int

    @property
    def n_views(self) -> int:
        """Images of one moment."""
        return self.n_azimuths * len(self.elevations_deg)

    @property
    def n_images(self) -> int:
        """Images in all, of each pass."""
        return self.n_views * len(self.times)

    def coarse(self) -> ViewGrid:
        """A few small images of the first moment, which are there at once."""
        middle = self.elevations_deg[(len(self.elevations_deg) - 1) // 2]
        return ViewGrid(max(4, self.n_azimuths // 4), (middle,), self.times[:1], max(32, self.size // 2))

    def order(self) -> list[int]:
        """The numbers of the moments, those that halve the gaps first."""
        last, found = len(self.times) - 1, [0]
        gap = 1 << max(0, last.bit_length())
        while gap >= 1:
            found += [index for index in range(gap, last + 1, gap) if index not in found]
            gap //= 2
        return found

    def cameras(self, time: float) -> CameraBatch:
        """The cameras of one sheet, [elevations, azimuths]; azimuth 0, the front, comes first."""
        azimuth = torch.arange(self.n_azimuths) * (2 * math.pi / self.n_azimuths)
        elevation = torch.deg2rad(torch.tensor(self.elevations_deg))[:, None]
        return make_cameras(azimuth[None], elevation, _DISTANCE, _FIELD_OF_VIEW, time, self.size, self.size)


def view_grid(views: int, heights: int, times: int, size: int, scene: Scene) -> ViewGrid:
    """Return the grid that the widgets ask for; a still scene needs one moment."""
    between = torch.linspace(_LOWEST_DEG, _HIGHEST_DEG, heights).tolist() if heights > 1 else [_ONLY_DEG]
    moments = film_times(1 if scene.deformation is None else times, scene.loops).tolist()
    return ViewGrid(views, tuple(round(e, 2) for e in between), tuple(round(t, 4) for t in moments), size)


def check_grid(views: int, heights: int, times: int, size: int) -> bool | str:
    """Return True, or why such a grid is not made."""
    in_range = check_ranges(Preview4D, views=views, heights=heights, times=times, size=size)
    if in_range is not True:
        return in_range
    if views * heights * times > _MOST_IMAGES:
        return (
            f"{views} views x {heights} heights x {times} times are {views * heights * times} images, more than "
            f"{_MOST_IMAGES}: lower one of them"
        )
    if max(views, heights) * size > _WIDEST_SHEET:
        return f"{views} views of {size} pixels beside each other are wider than {_WIDEST_SHEET} pixels: lower one"
    return True


class Preview4D(io.ComfyNode):
    """A scene to be looked at from all sides."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Say what the node takes and gives."""
        return io.Schema(
            node_id="Dream4DPreview4D",
            display_name="Preview 4D",
            category=CATEGORY,
            description="Shows a scene in the canvas: drag to turn it, move the slider or press play to see it move, "
            "and switch between colours, depth and normals.",
            search_aliases=["view 4d", "view 3d", "preview 3d", "turntable", "scene viewer", "dream4d"],
            inputs=[
                ScenePort.Input("scene", tooltip="A still or a moving scene."),
                io.Int.Input("views", default=16, min=4, max=64, tooltip="Images around the object, for each height."),
                io.Int.Input("times", default=8, min=1, max=64, tooltip="Moments of the animation."),
                io.Int.Input(
                    "heights", default=2, min=1, max=7, advanced=True, tooltip="Heights of the camera, low to high."
                ),
                io.Int.Input(
                    "size",
                    default=96,
                    min=32,
                    max=512,
                    step=16,
                    advanced=True,
                    tooltip="Height and width of the images, pixels.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls, views: int | None = None, heights: int | None = None, times: int | None = None, size: int | None = None
    ) -> bool | str:
        """Refuse grids that are too large."""
        if views is None or heights is None or times is None or size is None:  # comes from another node
            return True
        return check_grid(views, heights, times, size)

    @classmethod
    def execute(cls, scene: SceneValue, views: int, times: int, heights: int, size: int) -> io.NodeOutput:
        """Render the grid, telling the viewer of every sheet."""
        checked = check_grid(views, heights, times, size)
        if checked is not True:
            raise RunError(checked)
        grid = view_grid(views, heights, times, size, scene.scene)
        view = show(scene, grid, cls.hidden.unique_id)
        return io.NodeOutput(ui={RESULT: [view]})


def show(scene: SceneValue, grid: ViewGrid, node_id: str | None) -> dict:
    """Render a grid into ComfyUI's temporary folder, telling the viewer of every sheet; return its description.

    Sheets that are there already, of the same scene and grid, are not made again.
    """
    from comfy.utils import ProgressBar

    folder = Path(folder_paths.get_temp_directory()) / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = digest([scene.fingerprint(), asdict(grid)])[:20]
    steps = ((grid.coarse(), f"{name}-coarse"), (grid, name))
    bar = ProgressBar(sum(part.n_images for part, _ in steps), node_id=node_id)
    with scene_on_device(scene) as there:
        for part, part_name in steps:
            ready: list[int] = []
            for index in part.order():
                paths = {kind: sheet_path(folder, part_name, kind, index) for kind in PASSES}
                if all(path.exists() for path in paths.values()):
                    bar.update(part.n_views)
                else:
                    sheets = make_sheets(there, part, index, lambda: bar.update(1))
                    if part is not grid and not bool(sheets["depth"].any()):
                        raise RunError(
                            "the scene is empty: nothing is seen of it from any side at its first moment. Train it for "
                            "more steps, or load another one"
                        )
                    for kind, sheet in sheets.items():
                        save_image(paths[kind], sheet)
                ready.append(index)
                _tell(node_id, describe_view(part, part_name, ready, coarse=part is not grid))
    return describe_view(grid, name, ready)


def describe_view(grid: ViewGrid, name: str, ready: list[int], coarse: bool = False) -> dict:
    """What the viewer must know; `ready` are the moments whose sheets are there, `coarse` says that more will come."""
    return {
        "name": name,
        "subfolder": _FOLDER,
        "type": "temp",
        "size": grid.size,
        "azimuths": grid.n_azimuths,
        "elevations": list(grid.elevations_deg),
        "times": list(grid.times),
        "passes": list(PASSES),
        "ready": sorted(ready),
        "coarse": coarse,
    }


def sheet_path(folder: Path, name: str, kind: str, index: int) -> Path:
    """Where the sheet of a pass at a moment lies; the viewer makes the same name."""
    return folder / f"{name}-{kind}-{index}.jpg"


def make_sheets(scene: Scene, grid: ViewGrid, index: int, on_image: Callable[[], None]) -> dict[str, Tensor]:
    """Render all views of a moment: for each of PASSES a sheet [heights * size, views * size, 3], lowest view first."""
    cameras = grid.cameras(grid.times[index])
    rows: dict[str, list[Tensor]] = {kind: [] for kind in PASSES}
    for row in range(len(grid.elevations_deg)):
        line = []
        for shot in range(grid.n_azimuths):
            line.append(view_images(scene, cameras.groups(slice(row, row + 1)).frames(shot, shot + 1)))
            on_image()
        for kind, images in zip(PASSES, zip(*line, strict=True), strict=True):
            rows[kind].append(torch.cat(images, 1))
    return {kind: torch.cat(lines, 0) for kind, lines in rows.items()}


def view_images(scene: Scene, cameras: CameraBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Render one camera as the three passes, [H, W, 3] each; distances keep one range whatever the camera."""
    options = RenderOptions(n_samples=min(_SAMPLES, scene.config.n_samples))
    output = render_shot(scene, cameras, options)
    radius = scene.config.radius
    depth = depth_image(output.depth, output.opacity, (_DISTANCE - radius, _DISTANCE + radius))
    normals = normal_image(surface_normals(cameras, output), output.opacity)
    return output.rgb.clamp(0, 1)[0, 0], depth[0, 0], normals[0, 0]


def _tell(node_id: str | None, view: dict) -> None:
    """Send a description to the browsers; nothing depends on its arrival."""
    from server import PromptServer

    if node_id is not None and PromptServer.instance is not None:
        PromptServer.instance.send_sync(EVENT, {"node": node_id, "view": view}, PromptServer.instance.client_id)
