"""The node Motion in a real server."""

from __future__ import annotations

import pytest
import torch
from comfy_harness import node, render_node
from server_runs import ended, output_files

from dream4d_engine.assets import load_scene
from dream4d_engine.fields.edit import Box, MotionEdit, TimeMap

EXAMPLE = {"1": node("Dream4DLoadScene", file="jumping_cube.safetensors [example]")}
PLAIN = {"strength": 1.0, "speed": 1.0, "ping_pong": False, "remap": "", "freeze": "", "freeze_border": 0.3}


def motion(scene: list, **changes: object) -> dict:
    return node("Dream4DMotion", scene=scene, **(PLAIN | changes))


def test_a_changed_motion_is_saved_told_and_rendered(server) -> None:
    graph = EXAMPLE | {
        "2": motion(["1", 0], strength=0.0, freeze="-1,-1,-1,1,1,-0.2\n\n0,0,0,1,1,1"),
        "3": motion(["2", 0], ping_pong=True, remap="0:0,1:0.5"),
        "4": node("Dream4DSceneInfo", scene=["3", 0]),
        "5": node("Dream4DSaveScene", scene=["3", 0], filename_prefix="dream4d/changed"),
        "6": render_node(["3", 0], cameras="fixed view", frames=3),
        "7": node("PreviewImage", images=["6", 0]),
    }
    outputs = server.run(graph)
    said = outputs["4"]["text"][0]
    assert "motion changed: motion x 0; frozen from -1,-1,-1 to 1,1,-0.2" in said
    assert "motion changed: there and back; time 0:0,1:0.5" in said
    (path,) = output_files(server, outputs["5"], "scenes")
    scene, provenance = load_scene(path)
    boxes = Box((-1, -1, -1), (1, 1, -0.2)), Box((0, 0, 0), (1, 1, 1))
    assert scene.edit == MotionEdit(0.0, boxes, times=(TimeMap(1.0, True, ((0.0, 0.0), (1.0, 0.5))),))
    assert len(provenance.edits) == 2 and provenance.prompt == "a red cube is jumping"
    points, times = torch.rand(50, 3) * 2 - 1, torch.rand(50)
    assert torch.equal(scene.density(points, times), scene.density(points, times * 0))
    frames = [path.read_bytes() for path in output_files(server, outputs["7"], "images")]
    assert len(frames) == 3 and len(set(frames)) == 1, "nothing moves"


def test_what_a_film_cuts_off_is_said(server) -> None:
    """The cube jumps through the top of the box; as it was trained it keeps in it."""
    line = "of the surface's places in time lie outside of the scene's box, where images cut them off"
    for strength, leaves in ((2.0, True), (1.0, False)):
        graph = EXAMPLE | {"2": motion(["1", 0], strength=strength)}
        graph |= {
            "3": render_node(["2", 0], cameras="fixed view", frames=1),
            "4": node("PreviewImage", images=["3", 0]),
        }
        with server.listen() as listener:
            server.queue(graph, listener.client)
            events = listener.until(ended)
        assert events[-1][0] == "execution_success"
        assert any(kind == "text" and line in str(content) for kind, content in events) == leaves


def test_a_still_scene_is_passed_on(server) -> None:
    still = {"1": node("Dream4DLoadScene", file="red_cube.safetensors [example]")}
    save = node("Dream4DSaveScene", scene=["2", 0], filename_prefix="dream4d/still")
    (path,) = output_files(server, server.run(still | {"2": motion(["1", 0], strength=0.5), "3": save})["3"], "scenes")
    scene, provenance = load_scene(path)
    assert scene.deformation is None and provenance.edits == ()


def test_a_mask_freezes(server) -> None:
    white = node("SolidMask", value=1.0, width=32, height=32)
    graph = EXAMPLE | {
        "2": white,
        "3": motion(["1", 0], freeze_mask=["2", 0]),
        "4": node("Dream4DSceneInfo", scene=["3", 0]),
    }
    assert "frozen by a mask (border 0.3)" in server.run(graph)["4"]["text"][0]
    black = graph | {"2": node("SolidMask", value=0.0, width=32, height=32)}
    assert "the mask is black" in server.error(black)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strength": 2.5}, "strength"),
        ({"freeze": "0,0,0,1,1,-1"}, "freeze: a box must have its lower corner first, got z from 0 to -1"),
        ({"freeze": "everything"}, "freeze: a box is six numbers"),
        ({"remap": "0:0,0:1"}, "remap: a remap's first numbers must grow from key to key"),
        ({"remap": "x", "freeze": "y"}, "freeze: a box is six numbers x0,y0,z0,x1,y1,z1, got 'y'; remap: a remap is"),
        ({"speed": 0}, "speed"),
    ],
)
def test_changes_that_can_not_be(server, changes, said) -> None:
    graph = EXAMPLE | {"2": motion(["1", 0], **changes), "3": node("Dream4DSceneInfo", scene=["2", 0])}
    status, answer = server.post("/prompt", {"prompt": graph})
    assert status == 400
    assert any(said in error["details"] for error in answer["node_errors"]["2"]["errors"])


def test_more_than_twice_is_too_much(server) -> None:
    graph = EXAMPLE | {"2": motion(["1", 0], strength=1.5, freeze="-1,-1,-1,1,1,1")}
    graph |= {"3": motion(["2", 0], strength=1.5), "4": node("Dream4DSceneInfo", scene=["3", 0])}
    assert "already has 1.5 times its strength" in server.error(graph)
