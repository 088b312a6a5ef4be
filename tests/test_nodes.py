"""The pack's nodes: their source, the parts that need no ComfyUI, and their schemas as a server tells them."""

from __future__ import annotations

import ast
import importlib
import json
import math
import sys
import threading
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from comfy_harness import REPOSITORY

from dream4d_engine.training.config import MOTION_RECIPES, STATIC_RECIPES

NODES = REPOSITORY / "nodes"
FILES = sorted(NODES.rglob("*.py")) + [REPOSITORY / "__init__.py"]
WORKFLOWS = sorted((REPOSITORY / "example_workflows").glob("*.json"))
MOST_WIDGETS = 10
SOCKETS = {"DREAM4D_SCENE", "DREAM4D_PRIOR", "LOAD3D_CAMERA", "IMAGE", "MASK", "VIDEO"}


def part_of_the_pack(name: str) -> types.ModuleType:
    """Import a module of nodes/ that knows no ComfyUI, without running the package's own imports."""
    for package, place in (("dream4d_pack", REPOSITORY), ("dream4d_pack.nodes", NODES)):
        if package not in sys.modules:
            module = types.ModuleType(package)
            module.__path__ = [str(place)]
            sys.modules[package] = module
    return importlib.import_module(f"dream4d_pack.nodes.{name}")


# ---- the source --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_the_source_keeps_the_rules(path):
    """Only relative imports of our own, no heavy ones at the top, nothing that executes text or loads pickles."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(statement) for statement in tree.body}
    for found in ast.walk(tree):
        if isinstance(found, ast.Import | ast.ImportFrom):
            relative = isinstance(found, ast.ImportFrom) and found.level > 0
            names = [found.module or ""] if isinstance(found, ast.ImportFrom) else [a.name for a in found.names]
            roots = set() if relative else {name.split(".")[0] for name in names}
            assert not roots & {"dream4d_engine", "nodes", "pickle", "subprocess", "requests", "urllib"}, path.name
            if id(found) in top:
                assert not roots & {"diffusers", "transformers", "av", "PIL", "safetensors", "scipy"}, path.name
        if isinstance(found, ast.Call) and isinstance(found.func, ast.Name):
            assert found.func.id not in ("eval", "exec", "compile", "__import__"), path.name


def test_requirements_do_not_touch_torch():
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").split()
    names = {line.split(">=")[0] for line in lines}
    assert not names & {"torch", "torchvision", "torchaudio"}
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{line}"' in project for line in lines), "requirements.txt and pyproject.toml say the same"


# ---- cameras -----------------------------------------------------------------------------------------------------


def test_the_viewers_camera_sees_what_ours_does():
    cameras = part_of_the_pack("cameras")
    engine = importlib.import_module("dream4d_pack.dream4d_engine.cameras")
    for azimuth, elevation in ((0, 15), (90, 0), (-130, 40)):
        ours = engine.fixed_take(3, 8, 8, azimuth, elevation, 3.0, 40.0)
        x, y, z = (ours.position[0, 0] * cameras.VIEWER_SIZE / 2).tolist()
        camera = {
            "position": {"x": y, "y": z, "z": x},
            "target": {"x": 0, "y": 0, "z": 0},
            "cameraType": "perspective",
            "fov": 40,
            "zoom": 1,
        }
        seen = cameras.viewer_cameras(camera, 3, 8, 8)
        torch.testing.assert_close(seen.c2w, ours.c2w, atol=1e-5, rtol=0)
        torch.testing.assert_close(seen.fov_y, ours.fov_y)
        torch.testing.assert_close(seen.azimuth, ours.azimuth, atol=1e-5, rtol=0)
        torch.testing.assert_close(seen.elevation, ours.elevation, atol=1e-5, rtol=0)
        torch.testing.assert_close(seen.time, ours.time)


def test_a_quaternion_turns_the_viewers_camera():
    cameras = part_of_the_pack("cameras")
    half = math.sqrt(0.5)  # a quarter turn to the left about y, from the side at +x
    camera = {"position": {"x": 5, "y": 0, "z": 0}, "target": {"x": 0, "y": 0, "z": 0}}
    turned = cameras.viewer_cameras({**camera, "quaternion": {"x": 0, "y": half, "z": 0, "w": half}}, 1, 8, 8)
    torch.testing.assert_close(turned.c2w, cameras.viewer_cameras(camera, 1, 8, 8).c2w, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameraType": "orthographic"}, "orthographic"),
        ({"position": {"x": 0, "y": 0}}, "no position"),
        ({"position": {"x": 0, "y": 0, "z": 0}}, "middle"),
        ({"position": {"x": math.inf, "y": 0, "z": 0}}, "finite"),
    ],
)
def test_cameras_that_cannot_be_used(change, message):
    camera = {"position": {"x": 0, "y": 0, "z": 9}, "target": {"x": 0, "y": 0, "z": 0}, **change}
    with pytest.raises(ValueError, match=message):
        part_of_the_pack("cameras").viewer_cameras(camera, 2, 8, 8)


# ---- live preview ------------------------------------------------------------------------------------------------


def test_a_late_preview_is_dropped_and_never_fails_the_run(monkeypatch):
    preview = part_of_the_pack("preview")
    now = [0.0]
    seen, gate = [], threading.Event()

    def send(image):
        gate.wait(10)
        seen.append(image.size)

    monkeypatch.setattr(preview, "preview_picture", lambda scene, number: torch.zeros(8, 8, 3))
    live = preview.LivePreview(send, 4.0, clock=lambda: now[0])
    assert not live.offer(None), "not yet"
    now[0] = 1.5
    assert live.offer(None)
    now[0] = 6.0
    assert not live.offer(None), "the first one is still on its way"
    gate.set()
    live._worker.join(10)
    now[0] = 10.5
    assert live.offer(None)
    live._worker.join(10)
    live.close()
    assert seen == [(16, 16)] * 2
    assert not live.offer(None), "closed"

    def broken(scene, number):
        raise RuntimeError("no picture")

    monkeypatch.setattr(preview, "preview_picture", broken)
    live = preview.LivePreview(send, 1.0, clock=lambda: now[0])
    now[0] = 20.0
    assert not live.offer(None)
    now[0] = 1e6
    assert not live.offer(None), "off after a failure"


def test_previews_take_a_small_share_of_the_time(monkeypatch):
    preview = part_of_the_pack("preview")
    now, made = [0.0], []

    def slow(scene, number):
        now[0] += 2.0
        made.append(now[0])
        return torch.zeros(8, 8, 3)

    monkeypatch.setattr(preview, "preview_picture", slow)
    live = preview.LivePreview(lambda image: None, 1.0, clock=lambda: now[0])
    while now[0] < 1000:
        now[0] += 0.5
        if live.offer(None):
            live._worker.join(10)
    assert len(made) > 3 and 2.0 * len(made) <= 0.05 * now[0]


# ---- schemas, as the server tells them ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schemas(server) -> dict:
    return {name: schema for name, schema in server.get("/object_info").items() if name.startswith("Dream4D")}


def inputs_of(groups: dict) -> dict[str, tuple[str, dict]]:
    """All inputs as name -> (type, options), with those below dynamic choices as "choice.key.name"."""
    found = {}
    for name, (kind, *rest) in (groups.get("required", {}) | groups.get("optional", {})).items():
        options = rest[0] if rest else {}
        found[name] = (kind, options)
        for choice in (c for c in options.get("options", []) if isinstance(c, dict)):
            below = inputs_of(choice["inputs"])
            found |= {f"{name}.{choice['key']}.{inner}": value for inner, value in below.items()}
    return found


def given_inputs(schema: dict) -> dict[str, tuple[str, dict]]:
    return inputs_of(schema["input"])


def test_every_node_is_there(schemas):
    expected = {"LoadToyPrior", "LoadPrior", "OptimizeStaticScene", "AnimateScene", "Render", "Preview4D"}
    expected |= {"SaveScene", "LoadScene", "SceneInfo"}
    assert set(schemas) == {f"Dream4D{name}" for name in expected}


def test_every_node_explains_itself(schemas):
    for name, schema in schemas.items():
        assert schema["category"].split("/")[0] == "Dream4D", name
        assert schema["description"] and schema["display_name"] and schema["search_aliases"], name
        for socket, (_, options) in given_inputs(schema).items():
            assert options.get("tooltip"), f"{name}.{socket} has no tooltip"
        assert all(schema["output_tooltips"]), name


def test_no_node_is_crowded(schemas):
    for name, schema in schemas.items():
        inputs = given_inputs(schema)
        widgets = {n for n, (kind, _) in inputs.items() if kind not in SOCKETS}
        plain = {n for n in widgets if "." not in n}
        below = Counter(n.rpartition(".")[0] for n in widgets - plain)  # one choice's are shown at a time
        assert len(plain) + max(below.values(), default=0) <= MOST_WIDGETS, f"{name}: {sorted(plain)}"


def test_defaults_are_the_recipes(schemas):
    for name, recipes in (("OptimizeStaticScene", STATIC_RECIPES), ("AnimateScene", MOTION_RECIPES)):
        inputs = given_inputs(schemas[f"Dream4D{name}"])
        choices = [choice["key"] for choice in inputs["recipe"][1]["options"]]
        assert choices == list(recipes) and choices[0] == "toy"
        for recipe in recipes.values():
            assert inputs[f"recipe.{recipe.name}.steps"][1]["default"] == recipe.steps
            if name == "AnimateScene":
                steps = inputs[f"recipe.{recipe.name}.hifa_steps"][1]["default"]
                assert steps == recipe.guidance[0].distillation.n_steps


def test_what_few_touch_is_advanced(schemas):
    for name in ("OptimizeStaticScene", "AnimateScene"):
        inputs = given_inputs(schemas[f"Dream4D{name}"])
        assert all(inputs[n][1].get("advanced") for n in ("negative", "resume", "preview_seconds"))
        assert not any(inputs[n][1].get("advanced") for n in ("prompt", "seed", "recipe"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_the_workflows_fit_the_nodes(path: Path, server):
    known = server.get("/object_info")
    workflow = json.loads(path.read_text(encoding="utf-8"))
    links = {link[0]: link for link in workflow["links"]}
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        schema = known[node["type"]]
        assert [o["type"] for o in node["outputs"]] == schema["output"], node["type"]
        names = set(schema["input"].get("required", {})) | set(schema["input"].get("optional", {}))
        for socket in node["inputs"]:
            assert socket["name"].split(".")[0] in names, f"{node['type']}.{socket['name']}"
            if socket.get("link") is not None:
                _, source, slot, target, _, kind = links[socket["link"]]
                assert target == node["id"] and by_id[source]["outputs"][slot]["type"] == kind == socket["type"]
