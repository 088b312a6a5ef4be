"""The node Preview 4D in a real ComfyUI server: what its sheets hold, and that nothing is done twice."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from comfy_harness import REPOSITORY, node
from PIL import Image

from dream4d_engine.assets import load_scene, save_scene
from dream4d_engine.cameras import fixed_take
from dream4d_engine.rendering import RenderOptions, render_chunked
from dream4d_engine.rendering.shading import depth_image, normal_image, surface_normals

EXAMPLE = "jumping_cube.safetensors"
PASSES = ("rgb", "depth", "normals")


def viewer_graph(file: str = EXAMPLE, **changes) -> dict:
    given = {"scene": ["1", 0], "views": 6, "times": 3, "heights": 2, "size": 48}
    return {
        "1": node("Dream4DLoadScene", file=f"{file} [example]"),
        "2": node("Dream4DPreview4D", **(given | changes)),
    }


def sheets(server, view: dict, kind: str) -> list[np.ndarray]:
    folder = server.base / view["type"] / view["subfolder"]
    paths = [folder / f"{view['name']}-{kind}-{index}.jpg" for index in view["ready"]]
    return [np.asarray(Image.open(path)).astype(np.float32) / 255 for path in paths]


def test_the_sheets_hold_the_views_of_the_scene(server):
    with server.listen() as listener:
        prompt = server.queue(viewer_graph(), listener.client)
        events = listener.until(lambda kind, content: kind in ("execution_success", "execution_error"), 120)
    (view,) = server.wait(prompt)["outputs"]["2"]["dream4d_view"]
    assert (view["azimuths"], len(view["elevations"]), view["ready"]) == (6, 2, [0, 1, 2])

    told = [content["view"] for kind, content in events if kind == "dream4d.view"]
    assert told[0]["coarse"] and told[0]["size"] < view["size"], "a coarse sheet comes first"
    assert [len(each["ready"]) for each in told if not each["coarse"]] == [1, 2, 3]
    assert told[1]["ready"] == [0] and told[2]["ready"] == [0, 2], "the animation's two ends before its middle"

    scene, _ = load_scene(REPOSITORY / "nodes" / "examples" / EXAMPLE)
    row, column, moment = 1, 2, 1
    cameras = fixed_take(3, 48, 48, 360 / 6 * column, view["elevations"][row], 3.0, 40.0).frames(moment, moment + 1)
    direct = render_chunked(scene, cameras, RenderOptions(n_samples=64, normals=True))
    radius = scene.config.radius
    expected = {
        "rgb": direct.rgb,
        "depth": depth_image(direct.depth, direct.opacity, (3.0 - radius, 3.0 + radius)),
        "normals": normal_image(surface_normals(cameras, direct), direct.opacity),
    }
    solid = direct.opacity[0, 0, ..., 0] > 0.9
    assert 200 < solid.sum() < 48 * 48, "the object is seen, and not only it"
    for kind in PASSES:
        sheet = sheets(server, view, kind)[moment]
        assert sheet.shape == (2 * 48, 6 * 48, 3)
        tiles = torch.from_numpy(sheet).unflatten(0, (2, 48)).unflatten(2, (6, 48)).permute(0, 2, 1, 3, 4)
        away = (tiles - expected[kind][0, 0])[:, :, solid].abs().mean((-1, -2))
        assert away[row, column] < 0.03, kind
        assert away[row, column] == away.min(), f"{kind}: another view of the sheet is more like this camera's"
    # where the surface faces on the whole, asked of the scene instead of read off the depth; its roughness averages out
    asked = torch.nn.functional.normalize(direct.normals[0, 0][solid].mean(0), dim=0)
    shown = torch.nn.functional.normalize((2 * tiles[row, column][solid] - 1).mean(0), dim=0)
    assert asked @ shown > 0.9, (asked, shown)
    for kind in PASSES:
        first, *others = sheets(server, view, kind)
        assert first.std() > 0.05 and all(np.abs(first - other).mean() > 1e-3 for other in others), kind


def test_a_still_scene_has_one_moment_and_sheets_are_used_again(server):
    graph = viewer_graph("red_cube.safetensors")
    (view,) = server.run(graph)["2"]["dream4d_view"]
    assert view["times"] == [0.0]
    folder = server.base / "temp" / view["subfolder"]
    made = {path.name: path.stat().st_mtime_ns for path in folder.glob(f"{view['name']}-*.jpg")}
    assert len(made) == 2 * len(PASSES)
    graph["3"] = node("Dream4DPreview4D", **graph["2"]["inputs"])
    del graph["2"]
    (again,) = server.run(graph)["3"]["dream4d_view"]
    assert again == view
    assert made == {path.name: path.stat().st_mtime_ns for path in folder.glob(f"{view['name']}-*.jpg")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": 64, "times": 64, "heights": 7}, "28672 images, more than 4096"),
        ({"views": 64, "size": 512, "times": 1}, "wider than 8192 pixels"),
        ({"views": 0}, "views is 0: it must lie between 4 and 64"),
        ({"size": 10**9}, "size is 1000000000: it must lie between 32 and 512"),
        ({"times": 10**30}, "it must lie between 1 and 64"),
        ({"times": []}, "times is []: it must lie between 1 and 64"),
        ({"times": [0.5] * 20000}, "times is [0.5, 0.5"),
        ({"times": {"first": 0}}, "times is {'first': 0}: it must lie between 1 and 64"),
        ({"views": "many"}, "views is 'many': it must lie between 4 and 64"),
        ({"views": "9" * 5000}, "views is '9999"),
        ({"heights": math.nan}, "heights is nan: it must lie between 1 and 7"),
        ({"heights": math.inf}, "heights is inf: it must lie between 1 and 7"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_grids_that_are_too_large_or_none_are_refused(server, changes, message):
    told = server.refused(viewer_graph(**changes))
    assert message in told and "Exception" not in told and len(told) < 20_000 + 5 * len(str(changes))


def test_the_viewer_takes_what_the_widgets_allow(server):
    """Its bounds for what comes from a workflow file are those of the widgets."""
    script = (REPOSITORY / "nodes" / "web" / "preview4d.js").read_text(encoding="utf-8")
    (bounds,) = re.findall(r"^const MOST = \{(.*?)\}", script, re.M)
    known = dict(re.findall(r"(\w+): (\d+)", bounds))
    inputs = server.get("/object_info/Dream4DPreview4D")["Dream4DPreview4D"]["input"]["required"]
    assert {n: int(m) for n, m in known.items()} == {n: o["max"] for n, (k, o) in inputs.items() if k == "INT"}


def test_an_empty_scene_is_said_to_be_empty(server):
    scene, provenance = load_scene(REPOSITORY / "nodes" / "examples" / EXAMPLE)
    scene.occupancy.occupied.fill_(False)
    save_scene(server.base / "input" / "empty.safetensors", scene, provenance)
    graph = viewer_graph() | {"1": node("Dream4DLoadScene", file="empty.safetensors [input]")}
    before = set((server.base / "temp" / "dream4d_view").glob("*"))
    assert "the scene is empty" in server.error(graph)
    assert set((server.base / "temp" / "dream4d_view").glob("*")) == before, "and nothing is kept of it"


def test_it_can_be_cancelled(server):
    with server.listen() as listener:
        prompt = server.queue(viewer_graph(views=32, times=32, heights=4, size=64), listener.client)
        listener.until(lambda kind, content: kind == "dream4d.view", 120)
        server.interrupt()
        events = listener.until(lambda kind, content: kind.startswith("execution_"), 60)
    assert events[-1][0] == "execution_interrupted"
    assert server.wait(prompt)["status"]["status_str"] == "error"
