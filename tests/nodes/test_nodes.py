"""The pack's nodes: their source, the parts that need no ComfyUI, and their schemas as a server tells them."""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
import sys
import threading
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfy_harness import REPOSITORY
from pack import GROWN, HEAD, NODES, overlaps, part_of_the_pack

from dream4d_engine.training.config import IMAGE_RECIPES, MOTION_RECIPES, ORBIT_RECIPES, STATIC_RECIPES, TOY_IMAGE

FILES = [*sorted(NODES.rglob("*.py")), REPOSITORY / "__init__.py"]
SHIPPED = sorted((REPOSITORY / "dream4d_engine").rglob("*.py"))
WORKFLOWS = sorted((REPOSITORY / "example_workflows").glob("*.json"))
MOST_SHOWN, MOST_WIDGETS = 10, 13
SOCKETS = {"DREAM4D_SCENE", "DREAM4D_PRIOR", "LOAD3D_CAMERA", "IMAGE", "MASK", "VIDEO", "MESH"}


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


@pytest.mark.parametrize("path", SHIPPED, ids=[path.relative_to(REPOSITORY).as_posix() for path in SHIPPED])
def test_nothing_shipped_executes_text_or_installs(path):
    """The registry's rule, for the engine too: no eval, exec, pickle, shell or pip. A batch starts our own program."""
    for found in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(found, ast.Call):
            name = ast.unparse(found.func)
            if name == "subprocess.Popen" and path.name == "batch_work.py":
                assert ast.unparse(found.args[0]).startswith("[*PROGRAM,"), "the engine's own command line, as a list"
                assert "shell" not in {keyword.arg for keyword in found.keywords}
                continue
            assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), f"{path}: {name}"
            assert not name.startswith(("pickle.", "subprocess.", "os.exec", "os.spawn", "pip.")), f"{path}: {name}"


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


def test_every_way_of_filming_shows_a_loop_once():
    cameras = part_of_the_pack("cameras")
    place = {"azimuth_deg": 0.0, "elevation_deg": 15.0, "distance": 3.0, "fov_deg": 40.0}
    films = [cameras.path_cameras(name, 4, (8, 8), **place, loop=True) for name in cameras.CAMERAS[:3]]
    films.append(
        cameras.viewer_cameras({"position": {"x": 0, "y": 0, "z": 9}, "target": dict.fromkeys("xyz", 0)}, 4, 8, 8, True)
    )
    for film in films:
        assert film.time[0, :4].tolist() == [0, 0.25, 0.5, 0.75] and film.time.shape[1] % 4 == 0
    assert cameras.path_cameras("orbit", 3, (8, 8), **place).time.tolist() == [[0, 0.5, 1]]


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
        ({"position": {"x": 1e9, "y": 0, "z": 0}}, "too far away"),
        ({"position": {"x": "far", "y": 0, "z": 0}}, "no position"),
        ({"position": None}, "no position"),
        ({"zoom": "x"}, "zoom is 'x': it must lie between"),
        ({"zoom": -2}, "zoom is -2: it must lie between"),
        ({"fov": math.nan}, "fov is nan: it must lie between 0.1 and 179"),
        ({"fov": 180}, "fov is 180"),
        ({"fov": [50]}, r"fov is \[50\]"),
        ({"quaternion": {"x": 0, "y": 0, "z": 0, "w": 0}}, "is no rotation"),
        ({"quaternion": {"x": 0, "y": 0, "z": math.nan, "w": 1}}, "is no rotation"),
        ({"quaternion": "turned"}, "no quaternion"),
        ({"target": {"x": 0, "y": 0, "z": 9}}, "looks at the place where it stands"),
    ],
)
def test_cameras_that_cannot_be_used(change, message):
    camera = {"position": {"x": 0, "y": 0, "z": 9}, "target": {"x": 0, "y": 0, "z": 0}, **change}
    with pytest.raises(ValueError, match=message):
        part_of_the_pack("cameras").viewer_cameras(camera, 2, 8, 8)


# ---- doors -------------------------------------------------------------------------------------------------------

SCHEMA = {
    "required": {
        "seed": ("INT", {"min": 0, "max": 2**63 - 1}),
        "share": ("FLOAT", {"min": 0.0, "max": 1.0}),
        "prompt": ("STRING", {}),
        "way": ("COMBO", {"options": ["slow", "fast"]}),
        "file": ("COMBO", {"options": []}),
        "old": (["a", "b"],),
        "on": ("BOOLEAN", {}),
        "recipe": (
            "COMFY_DYNAMICCOMBO_V3",
            {"options": [{"key": "toy", "inputs": {"required": {"steps": ("INT", {"min": 1, "max": 9})}}}]},
        ),
        "thing": ("THING", {}),
        "any": ("THING,OTHER,UNKNOWN", {}),
    },
    "optional": {"image": ("IMAGE", {}), "mask": ("MASK",), "budget": ("FLOAT", {"min": 0.0, "max": 9.0})},
}
GOOD = {"seed": 5, "share": 0.5, "prompt": "a red cube", "way": "fast", "file": "any", "old": "b", "on": True}
GOOD |= {"recipe": {"recipe": "toy", "steps": 3}, "thing": {1, 2}, "any": (1,)}


def at_the_door(**changes) -> dict:
    return part_of_the_pack("doors").check_values(
        SCHEMA, GOOD | changes, {"THING": set, "OTHER": tuple}, frozenset({"file"})
    )


def test_what_a_door_lets_in():
    import numpy as np

    assert at_the_door() == GOOD
    assert at_the_door(seed=2**63 - 1)["seed"] == 2**63 - 1
    plain = at_the_door(seed=np.int64(7), share=np.float32(0.5), on=np.bool_(False))
    assert (plain["seed"], plain["share"], plain["on"]) == (7, 0.5, False)
    assert [type(plain[name]) for name in ("seed", "share", "on")] == [int, float, bool], "JSON can hold them"
    whole = at_the_door(seed=7.0, share=1, on=0, recipe={"recipe": "toy", "steps": 4.0})
    assert (whole["seed"], whole["share"], whole["on"], whole["recipe"]["steps"]) == (7, 1.0, False, 4)
    assert [type(whole[name]) for name in ("seed", "share", "on")] == [int, float, bool]
    assert at_the_door(any={3})["any"] == {3}, "a socket may take several types"
    assert "budget" not in at_the_door(budget=None, image=None), "the node's own default"
    assert at_the_door(image=torch.rand(8, 9, 3))["image"].shape == (1, 8, 9, 3)
    assert at_the_door(mask=torch.ones(8, 9, dtype=torch.bool))["mask"].tolist() == [[[1.0] * 9] * 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2**63}, "seed is 9223372036854775808: it must lie between 0 and 9223372036854775807"),
        ({"seed": 2**64}, "seed is 18446744073709551616: it must lie between"),
        ({"seed": -1}, "seed is -1: it must lie between"),
        ({"seed": 1.5}, "seed is 1.5: it must be a whole number"),
        ({"seed": math.nan}, "seed is nan: it must lie between"),
        ({"seed": True}, "seed is True: it must be a whole number"),
        ({"seed": "7"}, "seed is '7': it must be a whole number"),
        ({"seed": None}, "seed is None: it must be a whole number"),
        ({"seed": torch.tensor(3)}, "seed is tensor"),
        ({"share": math.inf}, "share is inf: it must lie between 0.0 and 1.0"),
        ({"share": math.nan}, "share is nan: it must lie between"),
        ({"share": 1.01}, "share is 1.01: it must lie between"),
        ({"share": [0.5]}, "share is [0.5]: it must be a number"),
        ({"prompt": None}, "prompt is None: it must be text"),
        ({"prompt": 5}, "prompt is 5: it must be text"),
        ({"prompt": "a\0b"}, "prompt holds a NUL"),
        ({"prompt": "\udcff"}, "prompt holds bytes that are no UTF-8"),
        ({"prompt": "x" * 65537}, "prompt has 65,537 letters, more than 65,536"),
        ({"way": "sideways"}, "way is 'sideways': choose one of slow, fast"),
        ({"way": None}, "way is None: it must be text"),
        ({"way": ["slow"]}, "way is ['slow']"),
        ({"old": "c"}, "old is 'c': choose one of a, b"),
        ({"file": {"a": 1}}, "file is {'a': 1}: it must be text"),
        ({"on": 2}, "on is 2: it must be true or false"),
        ({"on": "yes"}, "on is 'yes'"),
        ({"recipe": "toy"}, "recipe is 'toy': it can't come through a link, choose it on the node"),
        ({"recipe": {"recipe": "grand"}}, "recipe is 'grand': choose one of toy"),
        ({"recipe": {"recipe": "toy", "steps": 0}}, "recipe.steps is 0: it must lie between 1 and 9"),
        ({"recipe": {"recipe": "toy"}}, "recipe.steps is None: it must be a whole number"),
        ({"thing": [1]}, "the socket thing takes THING, but [1] came"),
        ({"any": [1]}, "the socket any takes THING,OTHER,UNKNOWN, but [1] came through its link"),
        ({"thing": None}, "the socket thing takes THING, but None came"),
        ({"image": torch.zeros(0, 8, 8, 3)}, "image holds no pixels: its shape is [0, 8, 8, 3]"),
        ({"image": torch.zeros(8, 8)}, "image has the shape [8, 8]: it must be [B, H, W, C]"),
        ({"image": torch.full((1, 8, 8, 3), math.nan)}, "image has pixels that are no finite numbers"),
        ({"image": torch.zeros(1, 8, 8, 3, dtype=torch.uint8)}, "image has numbers of the type torch.uint8"),
        ({"image": "a.png"}, "image is 'a.png': it must be a tensor"),
        ({"mask": torch.full((1, 8, 8), math.inf)}, "mask has pixels that are no finite numbers"),
        ({"mask": torch.zeros(1, 1, 8, 8)}, "mask has the shape [1, 1, 8, 8]"),
        ({"budget": "much"}, "budget is 'much': it must be a number"),
    ],
)
def test_what_a_door_keeps_out(changes, message):
    with pytest.raises(ValueError) as caught:
        at_the_door(**changes)
    assert message in str(caught.value) and len(str(caught.value)) < 200


# ---- names to save under -----------------------------------------------------------------------------------------

NOW = datetime(2026, 3, 7, 9, 5, 2)
GRAPH = {
    "1": {
        "class_type": "Dream4DAnimateScene",
        "inputs": {"seed": 7, "prompt": "a/b:c*"},
        "_meta": {"title": "Animate"},
    },
    "2": {"class_type": "Dream4DRender", "inputs": {"scene": ["1", 0], "normals": True}, "_meta": None},
    "3": {"class_type": "Dream4DRender", "inputs": None, "_meta": {"title": "Dream4DAnimateScene"}},
}


@pytest.mark.parametrize(
    ("prefix", "filled"),
    [
        ("dream4d/scene", "dream4d/scene"),
        ("%date:yyyy-MM-dd%/s", "2026-03-07/s"),
        ("%date:yy.M.d_h-m-s%", "26"),  # so the front end does it
        ("%date:yyyy.MM%", "%date:yyyy.MM%"),
        ("%date:yyMd_hms%", "2637_952"),
        ("%date:hhmmss%x%date:yyy%", "090502xyyy"),
        ("%date:%", ""),
        ("%Animate.seed%_%Dream4DAnimateScene.seed%", "7_7"),
        ("%Animate.prompt%", "a_b_c_"),
        ("%Dream4DRender.normals%", "true"),
        ("%Dream4DRender.scene%%nobody.seed%%Animate.nothing%", "%Dream4DRender.scene%%nobody.seed%%Animate.nothing%"),
        ("%year%-%width%", "%year%-%width%"),  # ComfyUI's own part
        ("100% %%", "100% %%"),
    ],
)
def test_placeholders_in_names(prefix, filled):
    assert part_of_the_pack("prefixes").fill_in(prefix, GRAPH, NOW) == filled


def prefix_fault(prefix: str, root: Path, windows: bool = False) -> str | None:
    return part_of_the_pack("prefixes").prefix_fault(prefix, root.resolve(), windows)


@pytest.mark.parametrize(
    "prefix",
    [
        "scene",
        "dream4d/scene",
        "a\\b\\scene",
        "каталог/立方体\u3000x",
        "it's.v1.2/s",
        ".hidden",
        "con1/nula",
        "a b",
        "x%",
    ],
)
def test_names_that_files_can_have(prefix, tmp_path):
    assert prefix_fault(prefix, tmp_path, True) is None


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("", "is no name for a file"),
        (" ", "is no name for a file"),
        (".", "is no name for a file"),
        ("folder/", "is no name for a file"),
        ("folder\\", "is no name for a file"),
        ("../out", "leads out of the output folder"),
        ("a/../../out", "leads out of the output folder"),
        ("a\\..\\..\\out", "leads out of the output folder"),
        ("/tmp/out", "leads out of the output folder"),
        ("\\\\server\\share\\x", "leads out of the output folder"),
        ("C:out", "leads out of the output folder"),
        ("link/out", "leads out of the output folder"),
        ("round/out", "can't be used"),
        ("file/out", "'file' in filename_prefix is a file, not a folder"),
        ("file/deep/out", "'file' in filename_prefix is a file, not a folder"),
        ("x" * 3000, "filename_prefix is 3,000 bytes long, more than 1,000"),
        ("a/" * 1500 + "b", "more than 1,000"),
        ("x" * 201, "is longer than 200 bytes"),
        ("立" * 67, "is longer than 200 bytes"),
        ("\ud800", "holds bytes that are no UTF-8"),
        ("a\0b", "holds a NUL"),
        ("a\nb", "holds '\\n', which no file's name can have"),
        ("a\x1b[2J", "holds '\\x1b'"),
        ("a\u202egpj", "holds '\\u202e'"),
        ("12:30", "holds ':'"),
        ("what?", "holds '?'"),
        ('say "cube"', "holds '\"'"),
        ("a*b", "holds '*'"),
        ("<a>", "holds '<'"),
        ("a|b", "holds '|'"),
        ("CON/scene", "is the name of a device on Windows"),
        ("a/nul", "is the name of a device on Windows"),
        ("com1.x/scene", "is the name of a device on Windows"),
        ("LPT9 /scene", "is the name of a device on Windows"),
        ("folder./scene", "ends in '.', which Windows drops"),
        ("folder /scene", "ends in ' ', which Windows drops"),
    ],
)
def test_names_that_no_file_can_have(prefix, message, tmp_path):
    root = tmp_path / "output"
    root.mkdir()
    (root / "link").symlink_to(tmp_path, target_is_directory=True)
    (root / "round").symlink_to(root / "round")
    (root / "file").write_text("x")
    fault = prefix_fault(prefix, root)
    assert fault is not None and message in fault and len(fault) < 220
    assert fault.isprintable()
    assert {path.name for path in root.iterdir()} == {"link", "round", "file"}, "nothing was made"


def test_paths_that_are_too_long_for_windows(tmp_path):
    prefix = "/".join(["x" * 60] * 4)
    assert prefix_fault(prefix, tmp_path) is None
    assert "more than Windows takes" in prefix_fault(prefix, tmp_path, True)


# ---- live preview ------------------------------------------------------------------------------------------------


@pytest.fixture
def preview(monkeypatch):
    """The module, with images that cost nothing."""
    module = part_of_the_pack("preview")
    monkeypatch.setattr(module, "preview_frames", lambda scene, number, size: torch.zeros(1, 8, 8, 3))
    return module


def soon(condition, seconds: float = 10.0) -> bool:
    """Whether something becomes true."""
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.005)
    return condition()


def test_a_late_preview_is_dropped(preview):
    now, seen, gate = [0.0], [], threading.Event()

    def send(image):
        gate.wait(10)
        seen.append(image.size)

    live = preview.LivePreview(send, 4.0, clock=lambda: now[0])
    assert not live.offer(None), "not yet"
    now[0] = 2.5
    assert live.offer(None)
    now[0] = 7.0
    assert not live.offer(None), "the first one is still on its way"
    gate.set()
    assert soon(lambda: len(seen) == 1 and not live._on_its_way.is_set())
    now[0] = 11.5
    assert live.offer(None) and soon(lambda: len(seen) == 2)
    live.close()
    assert seen == [(192, 192)] * 2
    assert (live.cost.made, live.cost.dropped) == (2, 1)
    now[0] = 100.0
    assert not live.offer(None), "closed"


def test_a_clip_is_played_until_the_next_one(preview, monkeypatch):
    frames = [torch.full((8, 8, 3), value / 10) for value in range(3)]
    monkeypatch.setattr(preview, "preview_frames", lambda scene, number, size: torch.stack(frames))
    monkeypatch.setattr(preview, "_CLIP_FPS", 200.0)
    now, seen = [10.0], []
    live = preview.LivePreview(lambda image: seen.append(image.getpixel((0, 0))[0]), 4.0, clock=lambda: now[0])
    now[0] = 20.0
    assert live.offer(None) and soon(lambda: len(seen) >= 7)
    live.close()
    count = len(seen)
    assert seen[:7] == [0, 26, 51, 0, 26, 51, 0]
    time.sleep(0.05)
    assert len(seen) == count, "nothing is sent after the end"


@pytest.mark.parametrize("broken", ["rendering", "sending"])
def test_a_failing_preview_does_not_fail_the_run(preview, monkeypatch, broken):
    now = [0.0]

    def fail(*_):
        raise RuntimeError("no image")

    if broken == "rendering":
        monkeypatch.setattr(preview, "preview_frames", fail)
    live = preview.LivePreview(fail, 1.0, clock=lambda: now[0])
    now[0] = 20.0
    assert live.offer(None) == (broken == "sending")
    assert soon(lambda: live._next == math.inf)
    now[0] = 1e6
    assert not live.offer(None), "off after a failure"
    live.close()


def test_previews_take_a_small_share_of_the_time(preview, monkeypatch):
    """Whatever an image costs: they become smaller first, rarer then."""
    for seconds_a_pixel in (1e-7, 1e-5, 1e-3):
        now, sizes = [0.0], []

        def slow(scene, number, size, now=now, sizes=sizes, seconds_a_pixel=seconds_a_pixel):
            now[0] += size * size * seconds_a_pixel
            sizes.append(size)
            return torch.zeros(1, 8, 8, 3)

        monkeypatch.setattr(preview, "preview_frames", slow)
        live = preview.LivePreview(lambda image: None, 4.0, clock=lambda now=now: now[0])
        while now[0] < 2000:
            now[0] += 0.5
            if live.offer(None):
                assert soon(lambda live=live: not live._on_its_way.is_set())
        live.close()
        assert len(sizes) > 3 and live.cost.rendering <= 0.05 * now[0]
        assert {1e-7: max(sizes) == 256, 1e-5: 48 < sizes[-1] < 256, 1e-3: sizes[-1] == 48}[seconds_a_pixel]


# ---- images ----------------------------------------------------------------------------------------------------


def cut_out(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """An image [1, size, size, 3] and the mask [1, size, size] of the square in its middle."""
    mask = torch.zeros(1, size, size)
    mask[:, 8:24, 8:24] = 1
    return torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(0)), mask


def test_masks_of_both_kinds_and_alpha_mean_the_same():
    images, config = part_of_the_pack("images"), TOY_IMAGE.reference
    image, mask = cut_out()
    ours = images.reference_of(image, mask, "subject", config)
    same = [
        images.reference_of(image, mask, "automatic", config),
        images.reference_of(image, 1 - mask, "automatic", config),
        images.reference_of(image, 1 - mask, "background", config),
        images.reference_of(torch.cat((image, mask[..., None]), -1), None, "automatic", config),
    ]
    assert ours.mask.any()
    assert {reference.fingerprint() for reference in same} == {ours.fingerprint()}


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (torch.rand(1, 32, 32, 3), None, "no alpha and no mask"),
        (torch.rand(1, 32, 32, 3), torch.zeros(1, 64, 64), "the mask is empty: Load Image gives such a one"),
        (torch.rand(1, 32, 32, 3), torch.full((1, 32, 32), 1 / 255), "the largest value of the mask is 0.0039"),
        (torch.rand(1, 32, 32, 3), (torch.arange(32) < 16).expand(1, 32, 32) * 1.0, "Say it with mask_shows"),
        (torch.rand(2, 32, 32, 3), cut_out()[1], "one image is needed, got 2"),
        (torch.rand(1, 32, 32, 3), cut_out(64)[1], "64x64 pixels, the image 32x32"),
    ],
)
def test_images_that_cannot_be_used(image, mask, message):
    with pytest.raises(ValueError, match=message):
        part_of_the_pack("images").reference_of(image, mask, "automatic", TOY_IMAGE.reference)


# ---- schemas, as the server tells them ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schemas(server) -> dict:
    return {name: schema for name, schema in server.get("/object_info").items() if name.startswith("Dream4D")}


def inputs_of(groups: dict, flat: bool = False) -> dict[str, tuple[str, dict]]:
    """All inputs as name -> (type, options), with those below dynamic choices as "choice.key.name".

    `flat` leaves out the key, as graphs do.
    """
    found = {}
    for name, (kind, *rest) in (groups.get("required", {}) | groups.get("optional", {})).items():
        options = rest[0] if rest else {}
        found[name] = (kind, options)
        for choice in (c for c in options.get("options", []) if isinstance(c, dict)):
            below = inputs_of(choice["inputs"], flat)
            prefix = name if flat else f"{name}.{choice['key']}"
            found |= {f"{prefix}.{inner}": value for inner, value in below.items()}
    return found


def given_inputs(schema: dict) -> dict[str, tuple[str, dict]]:
    return inputs_of(schema["input"])


def test_every_node_is_there(schemas):
    expected = {f"Load{kind}Prior" for kind in ("Toy", "Multiview", "Image", "NovelView", "Pixel", "Video", "")}
    expected |= {"ApplyLora", "OptimizeStaticScene", "AnimateScene", "Motion", "Render", "Preview4D"}
    expected |= {"LoadMesh", "MeshToScene", "ExtractMesh", "ExportAnimatedGLB"}
    expected |= {"SaveScene", "LoadScene", "SceneInfo", "ImagePriorFromModel"}
    expected |= {"NovelViewPriorFromModel", "VideoPriorFromModel"}
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
        widgets = {n for n, (kind, _) in inputs.items() if kind.split(",")[0] not in SOCKETS}
        plain = {n for n in widgets if "." not in n}
        below = Counter(n.rpartition(".")[0] for n in widgets - plain)  # one choice's are shown at a time
        assert len(plain) + max(below.values(), default=0) <= MOST_WIDGETS, f"{name}: {sorted(plain)}"
        shown = sorted(n for n in plain if not inputs[n][1].get("advanced"))
        assert len(shown) + max(below.values(), default=0) <= MOST_SHOWN, f"{name}: {shown}"


def test_defaults_are_the_recipes(schemas):
    still = STATIC_RECIPES | IMAGE_RECIPES | ORBIT_RECIPES
    for name, recipes in (("OptimizeStaticScene", still), ("AnimateScene", MOTION_RECIPES)):
        inputs = given_inputs(schemas[f"Dream4D{name}"])
        choices = [choice["key"] for choice in inputs["recipe"][1]["options"]]
        assert choices == list(recipes) and choices[0] == "toy"
        for recipe in recipes.values():
            assert inputs[f"recipe.{recipe.name}.steps"][1]["default"] == recipe.steps
            if name == "AnimateScene":
                steps = inputs[f"recipe.{recipe.name}.hifa_steps"][1]["default"]
                assert steps == recipe.guidance[0].distillation.n_steps


LOCALES = sorted(path.name for path in (REPOSITORY / "locales").iterdir())


def locale(language: str, name: str) -> dict:
    return json.loads((REPOSITORY / "locales" / language / f"{name}.json").read_text(encoding="utf-8"))


def texts_of(schema: dict) -> dict:
    """What a locale says of a node, in ComfyUI's layout: dots in names are underscores, outputs go by number."""
    inputs = inputs_of(schema["input"], flat=True)
    outputs = enumerate(zip(schema["output_name"], schema["output_tooltips"], strict=True))
    return {
        "display_name": schema["display_name"],
        "description": schema["description"],
        "inputs": {
            n.replace(".", "_"): {"name": n.split(".")[-1], "tooltip": o["tooltip"]} for n, (_, o) in inputs.items()
        },
        "outputs": {str(index): {"name": name, "tooltip": tooltip} for index, (name, tooltip) in outputs},
    }


def test_the_english_locale_says_what_the_schemas_say(schemas):
    assert locale("en", "nodeDefs") == {name: texts_of(schema) for name, schema in schemas.items()}


@pytest.mark.parametrize("language", [name for name in LOCALES if name != "en"])
def test_every_other_locale_is_complete(schemas, language):
    def leaves(tree: dict, path: str = "") -> dict:
        found = {}
        for key, value in tree.items():
            found |= leaves(value, f"{path}.{key}") if isinstance(value, dict) else {f"{path}.{key}": value}
        return found

    ours = leaves({name: texts_of(schema) for name, schema in schemas.items()})
    theirs = leaves(locale(language, "nodeDefs"))
    assert ours.keys() == theirs.keys()
    assert all(isinstance(text, str) and text for text in theirs.values())
    assert not [key for key, text in theirs.items() if key.endswith(".tooltip") and text == ours[key]], "untranslated"
    assert not [key for key, text in theirs.items() if set(text) & set("{}|@")], "signs that the front end interprets"
    assert locale(language, "main").keys() == locale("en", "main").keys()


def test_there_are_two_languages_that_the_server_hands_out(server):
    assert len(LOCALES) >= 2
    told = server.get("/i18n")
    for language in LOCALES:
        assert told[language]["nodeDefs"] == locale(language, "nodeDefs")


def test_every_node_has_a_help_page_with_an_image(schemas, server):
    shown = set()
    for name in schemas:
        text = server.read(f"/extensions/dream4d/docs/{name}.md").decode()
        images = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
        assert images, f"{name} has no image"
        shown |= set(images)
        for image in images:
            assert server.read(f"/extensions/dream4d/docs/{image}")[:2] in (b"\xff\xd8", b"\x89P"), image
    there = {path.relative_to(NODES / "web" / "docs").as_posix() for path in (NODES / "web" / "docs").rglob("*.jpg")}
    assert there <= shown, "no image is left over"


def test_the_icon_keeps_to_the_registrys_rules():
    from PIL import Image

    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    for key, ratio, most in (("Icon", 1, 400), ("Banner", 21 / 9, 4096)):
        address = re.search(rf'^{key} = "(https://[^"]+)"$', project, re.M)[1]
        path = REPOSITORY / address.split("/main/", 1)[1]
        width, height = Image.open(path).size
        assert abs(width / height - ratio) < 0.01 and width <= most, path


def test_the_registry_gets_what_it_asks_for():
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    for line in ('license = { text = "Apache-2.0" }', "Repository = ", "PublisherId = ", 'requires-comfyui = ">='):
        assert f"\n{line}" in project, line
    left_out = (REPOSITORY / ".comfyignore").read_text(encoding="utf-8").split()
    assert "tests/" in left_out and not {"nodes/", "dream4d_engine/", "example_workflows/", "locales/"} & set(left_out)


def test_what_few_touch_is_advanced(schemas):
    for name in ("OptimizeStaticScene", "AnimateScene"):
        inputs = given_inputs(schemas[f"Dream4D{name}"])
        assert all(inputs[n][1].get("advanced") for n in ("negative", "resume", "preview_seconds", "memory_budget"))
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


def test_overlaps_are_found():
    assert overlaps([("a", 0, 0, 10, 10), ("b", 10, 0, 10, 10), ("c", 5, 9, 3, 3)]) == [("a", "c")]


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_nothing_lies_over_anything_when_the_nodes_have_grown(path: Path):
    boxes = []
    for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        if node["type"] in GROWN:
            assert width <= 340, "it becomes higher the wider it is"
        boxes.append((node["id"], x, y - HEAD, width, max(height, GROWN.get(node["type"], 0)) + HEAD))
    assert overlaps(boxes) == []


def test_a_file_that_goes_while_the_lists_are_made_is_left_out(monkeypatch, tmp_path):
    """The node would be missing in the front end."""
    folder = SimpleNamespace(get_input_directory=lambda: tmp_path, get_output_directory=lambda: tmp_path / "output")
    monkeypatch.setitem(sys.modules, "folder_paths", folder)
    places = part_of_the_pack("places")
    (tmp_path / "there.glb").write_bytes(b"")
    (tmp_path / "gone.glb").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # it was there a moment ago
    assert [name for name in places.files_below((".glb",)) if "[input]" in name] == ["there.glb [input]"]
