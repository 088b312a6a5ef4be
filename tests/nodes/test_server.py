"""The pack in a real ComfyUI server, over its HTTP and websocket interface."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from comfy_harness import (
    GUARD,
    REPOSITORY,
    Server,
    motion_nodes,
    node,
    render_node,
    static_nodes,
    why_no_meshes,
    why_no_server,
)
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from server_runs import PROMPT, assert_same_scene, ended, image_file, image_nodes, output_files, steps_in

from dream4d_engine import locks
from dream4d_engine.assets import read_info
from dream4d_engine.export.video import read_video

AS_IT_IS = {"kind": "as the folder says"}
"""What Load Prior is told beside the model."""


def test_the_pack_is_imported_without_complaint(server):
    text = server.text()
    assert "IMPORT FAILED" not in text and "Error while calling comfy_entrypoint" not in text
    assert re.search(r"[\d.]+ seconds: \S*dream4d", text), "it is among the packs that were loaded"


def test_importing_the_pack_loads_nothing_heavy(server):
    """What takes its time is imported by the first run, not with the pack."""
    assert server.libraries_at_start and "diffusers" not in server.libraries_at_start


def test_text_to_4d_from_the_priors_to_a_video(server):
    graph = static_nodes(6, PROMPT, preview_seconds=0.5) | motion_nodes(6, PROMPT, preview_seconds=0.5)
    graph |= {
        "5": render_node(["4", 0], cameras="final path", frames=2, normals=True),
        "6": node("SaveVideo", video=["5", 6], filename_prefix="dream4d/video", format="auto", codec="auto"),
        "7": node("Dream4DSaveScene", scene=["4", 0], filename_prefix="dream4d/scene"),
        "8": node("Dream4DSceneInfo", scene=["4", 0]),
        "9": node("MaskToImage", mask=["5", 1]),
    }
    passes = {"10": 0, "11": 2, "12": 3, "13": 4}
    for name, slot in passes.items():
        graph[name] = node("SaveImage", images=["5", slot], filename_prefix=f"dream4d/pass{slot}")
    graph["14"] = node("SaveImage", images=["9", 0], filename_prefix="dream4d/mask")
    with server.listen() as listener:
        prompt = server.queue(graph, listener.client)
        events = listener.until(ended, 300)
    outputs = server.wait(prompt)["outputs"]
    assert events[-1][0] == "execution_success"

    assert steps_in(events, "static")[-1] == 6 and steps_in(events, "motion")[-1] == 6
    line = next(content for kind, content in events if kind == "text" and content.startswith("motion 6/6"))
    assert all(word in line for word in ("loss", "it", "left", "GiB"))
    images = [content for kind, content in events if kind == "image"]
    assert images and all(image.startswith(b"\xff\xd8") for image in images), "live previews, as JPEG"
    states = [content["nodes"] for kind, content in events if kind == "progress_state"]
    assert any(nodes.get("4", {}).get("max") == 6 for nodes in states), "the progress bar counts the steps"

    (film,) = output_files(server, outputs["6"])
    video = read_video(film)
    assert video.frames.shape == (16, 24, 32, 3) and video.fps == 8
    for name in passes:
        files = output_files(server, outputs[name])
        assert len(files) == 16 and all(path.exists() for path in files)
    assert len(output_files(server, outputs["14"])) == 16
    assert ("text", outputs["8"]["text"][0]) in events, "it is shown on the node"
    kind, motion, *history = outputs["8"]["text"][0].splitlines()
    assert kind.startswith("moving scene") and f"prompt: {PROMPT}" in history
    assert ("text", motion) in events, "training's node says it at its end"
    looks = [content for kind, content in events if kind == "text" and content.startswith("looking how much it moves")]
    assert 0 < len(looks) < 40, "it is measured once"
    assert re.match("moves 0|still|empty", motion)
    (scene,) = output_files(server, outputs["7"], "scenes")
    with safe_open(scene, "pt") as file:
        header = file.metadata()
    assert header["format"] == "dream4d"
    assert json.loads(header["prompt"])["4"]["class_type"] == "Dream4DAnimateScene"


def test_a_saved_scene_is_loaded_animated_and_rendered(server):
    first = server.run(
        static_nodes(4, seed=3) | {"7": node("Dream4DSaveScene", scene=["2", 0], filename_prefix="dream4d/still")}
    )
    listed = f"dream4d/{first['7']['scenes'][0]['filename']} [output]"
    options = server.get("/object_info/Dream4DLoadScene")["Dream4DLoadScene"]["input"]["required"]["file"][1]["options"]
    assert listed in options and not any("/runs/" in option for option in options)
    graph = motion_nodes(3, seed=3, loop=True, frames=9) | {
        "2": node("Dream4DLoadScene", file=listed),
        "7": node("Dream4DSaveScene", scene=["4", 0], filename_prefix="dream4d/longer"),
        "5": render_node(["4", 0]),
        "6": node("PreviewImage", images=["5", 4]),
        "8": node("Dream4DSceneInfo", scene=["2", 0]),
        "9": node("Dream4DSceneInfo", scene=["4", 0]),
        "10": node("Dream4DPreview4D", scene=["4", 0], views=4, times=4, heights=1, size=32),
    }
    outputs = server.run(graph)
    assert "still scene" in outputs["8"]["text"][0]
    assert re.match(r"moving scene, zoom 1\.00, a loop\n", outputs["9"]["text"][0])
    assert outputs["10"]["dream4d_view"][0]["times"] == [0, 0.25, 0.5, 0.75], "it plays without showing a moment twice"
    assert len(outputs["6"]["images"]) == 4
    (moving,) = output_files(server, outputs["7"], "scenes")
    assert read_info(moving).config.deformation.length == 8 / 7, "steps of time, to those of 8 frames"


def test_a_model_folder_is_found_and_used(server):
    toy = REPOSITORY / "dream4d_engine" / "priors" / "toy" / "multiview"
    shutil.copytree(toy, server.base / "models" / "diffusers" / "mine" / "views")
    schema = server.get("/object_info/Dream4DLoadPrior")["Dream4DLoadPrior"]
    assert "mine/views" in schema["input"]["required"]["folder"][1]["options"]
    graph = static_nodes(2, seed=51) | {"8": node("Dream4DSceneInfo", scene=["2", 0])}
    graph["1"] = node("Dream4DLoadPrior", folder="mine/views", **AS_IT_IS)
    assert "still scene" in server.run(graph)["8"]["text"][0]
    graph["1"]["inputs"]["folder"] = "../mine/views"
    assert "is not among the models" in server.refused(graph)


def test_links_to_folders_and_checkpoints_are_found_too(server, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    toy = REPOSITORY / "dream4d_engine" / "priors" / "toy" / "multiview"
    shutil.copytree(toy, elsewhere / "store" / "linked")
    (server.base / "models" / "diffusers").mkdir(exist_ok=True)
    (server.base / "models" / "diffusers" / "other").symlink_to(elsewhere / "store", target_is_directory=True)
    (elsewhere / "store" / "round").symlink_to(elsewhere / "store", target_is_directory=True)
    (server.base / "models" / "checkpoints").mkdir(exist_ok=True)
    (server.base / "models" / "checkpoints" / "foreign.safetensors").write_bytes(b"no weights at all")
    schema = server.get("/object_info/Dream4DLoadPrior")["Dream4DLoadPrior"]
    listed = schema["input"]["required"]["folder"][1]["options"]
    assert {"other/linked", "foreign.safetensors"} <= set(listed)
    graph = static_nodes(2, seed=52) | {"8": node("Dream4DSceneInfo", scene=["2", 0])}
    graph["1"] = node("Dream4DLoadPrior", folder="foreign.safetensors", **AS_IT_IS)
    assert "foreign.safetensors" in server.error(graph)


def test_the_original_checkpoints_can_be_loaded(server):
    samples = sorted((REPOSITORY / "tests" / "data" / "golden").rglob("*.ckpt"))
    if not samples:
        pytest.skip("no checkpoint of the original among the test data")
    for path in samples:
        shutil.copy(path, server.base / "input" / path.name)
        if path.with_suffix(".json").exists():
            shutil.copy(path.with_suffix(".json"), server.base / "input")
        graph = {"1": node("Dream4DLoadScene", file=path.name), "2": node("Dream4DSceneInfo", scene=["1", 0])}
        said = server.run(graph)["2"]["text"][0]
        assert "imported from Dream-in-4D" in said
        settings = server.base / "input" / f"{path.stem}.json"
        if settings.exists():  # changed settings are read, though the checkpoint is as it was
            tree = json.loads(settings.read_text(encoding="utf-8"))
            tree["prompt_processor"]["prompt"] = "a green cone"
            settings.write_text(json.dumps(tree), encoding="utf-8")
            assert "a green cone" not in said and "a green cone" in server.run(graph)["2"]["text"][0]


def test_cancel_at_any_moment_and_resume_give_what_an_unbroken_run_does(server):
    seed = random.randrange(10**6)  # another moment in every session; the messages tell it
    draw = random.Random(seed)
    steps = 50 if server.on_gpu else 30
    stop_after, delay = draw.randint(1, steps * 6 // 10), draw.uniform(0, 0.3)
    moment = f"moment {seed}: {delay:.3f} s after step {stop_after}"

    def graph(preview_seconds: float, resume: str = "resume automatically") -> dict:
        # another number here is another node for ComfyUI's cache, but the same run
        nodes = static_nodes(steps, seed=7, preview_seconds=preview_seconds, resume=resume)
        return nodes | {"7": node("Dream4DSaveScene", scene=["2", 0], filename_prefix="dream4d/resumed")}

    (unbroken,) = output_files(server, server.run(graph(0.0))["7"], "scenes")
    with server.listen() as listener:
        prompt = server.queue(graph(600.0, "start over"), listener.client)
        events = listener.until(
            lambda kind, content: max(steps_in([(kind, content)], "static"), default=0) >= stop_after
        )
        time.sleep(delay)
        server.interrupt()
        events += listener.until(ended)
        assert events[-1][0] == "execution_interrupted", moment
        server.wait(prompt)
        (checkpoint,) = server.runs.glob("*.checkpoint")
        with safe_open(checkpoint, "pt") as file:
            stopped_at = int(file.metadata()["step"])
        # steps come several times a second (dozens on a GPU), and a report of each tenth of a second
        lag = 10 if server.on_gpu else 1
        assert stop_after <= stopped_at <= max(steps_in(events, "static")) + lag < steps, moment
        server.queue(graph(599.0), listener.client)
        events = listener.until(ended)
    assert events[-1][0] == "execution_success", moment
    assert stopped_at < min(steps_in(events, "static")) <= stopped_at + 2 + lag, moment
    assert not list(server.runs.glob("*.checkpoint"))
    resumed = max(unbroken.parent.glob("resumed_*.safetensors"))
    assert resumed != unbroken
    assert_same_scene(server, resumed, unbroken)


def saved_scene(name: str, **settings) -> dict:
    """Nodes that make a still scene and save it."""
    return static_nodes(20, **settings) | {
        "7": node("Dream4DSaveScene", scene=["2", 0], filename_prefix=f"dream4d/{name}")
    }


def cancelled(server: Server, graph: dict, after: int = 5) -> Path:
    """Cancel a run after so many steps and return its checkpoint."""
    with server.listen() as listener:
        prompt = server.queue(graph, listener.client)
        listener.until(lambda kind, content: max(steps_in([(kind, content)], "static"), default=0) >= after)
        server.interrupt()
        assert listener.until(ended)[-1][0] == "execution_interrupted"
        server.wait(prompt)
    (checkpoint,) = server.runs.glob("*.checkpoint")
    return checkpoint


@pytest.mark.parametrize("damage", ["cut", "NaN", "beyond the end"])
def test_a_damaged_checkpoint_is_kept_aside_and_the_run_starts_over(server, damage):
    """By itself, with a line that says so; what comes out is what an unbroken run gives."""
    (unbroken,) = output_files(server, server.run(saved_scene("whole", seed=17, preview_seconds=0.0))["7"], "scenes")
    path = cancelled(server, saved_scene("again", seed=17, preview_seconds=600.0, resume="start over"))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:10_000])
    else:
        with safe_open(path, "pt") as file:
            header = dict(file.metadata())
        tensors = load_file(path)
        if damage == "NaN":
            tensors["scene.canonical.grid.table"][3] = float("nan")
        else:
            header["step"] = "21"
        save_file(tensors, path, header)
    damaged = path.read_bytes()
    with server.listen() as listener:
        prompt = server.queue(saved_scene("again", seed=17, preview_seconds=599.0), listener.client)
        events = listener.until(ended, 200)
    assert events[-1][0] == "execution_success"
    lines = [content for kind, content in events if kind == "text"]
    told = [line for line in lines if "and the run starts over" in line]
    assert told and f"kept as {path.name}.damaged" in told[-1] and "static 20/20" in told[-1], "to the end"
    assert min(steps_in(events, "static")) < 5
    kept = path.with_name(f"{path.name}.damaged")
    assert kept.read_bytes() == damaged
    kept.unlink()
    (again,) = output_files(server, server.wait(prompt)["outputs"]["7"], "scenes")
    assert_same_scene(server, again, unbroken)


def test_a_run_that_another_server_works_on_is_refused(server):
    graph = saved_scene("locked", seed=18, preview_seconds=600.0)
    path = cancelled(server, graph)
    before = path.read_bytes()
    assert not path.with_suffix(".lock").exists()
    held = locks.take(path.with_suffix(".lock"), "it")
    for again in (graph, saved_scene("locked", seed=18, preview_seconds=599.0, resume="start over")):
        message = server.error(again)
        assert f"is being worked on by process {os.getpid()} on" in message and "queue again" in message
    assert path.read_bytes() == before
    held.release()
    assert server.run(graph)["7"]["scenes"]


def test_a_prior_that_overflows_is_an_error_on_the_node(server):
    toy = REPOSITORY / "dream4d_engine" / "priors" / "toy" / "multiview"
    folder = server.base / "models" / "diffusers" / "overflowing"
    shutil.copytree(toy, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: value.float() for name, value in load_file(weights).items()}
    tensors["conv_in.weight"].fill_(1e38)
    save_file(tensors, weights, {"format": "pt"})
    graph = static_nodes(30, seed=19) | {"8": node("Dream4DSceneInfo", scene=["2", 0])}
    graph["1"] = node("Dream4DLoadPrior", folder="overflowing", **AS_IT_IS)
    message = server.error(graph, 100)
    assert "100% of what the multiview prior answers is not finite, 6 steps in a row" in message
    assert str(folder) in message and "fetch it again, or choose another" in message
    assert not list(server.runs.glob("*.checkpoint"))


def saved_step(checkpoint: Path) -> int:
    """The step that a run which saves after every fifth goes on after."""
    with safe_open(checkpoint, "pt") as file:
        step = int(file.metadata()["step"])
    assert step > 0 and step % 5 == 0
    return step


@pytest.fixture
def often(server):
    """A server that saves a still scene's state after every fifth step."""
    server.post("/dream4d_test/checkpoint_steps", {"steps": 5})
    yield server
    server.post("/dream4d_test/checkpoint_steps", {"steps": 50})


def test_a_disk_that_fills_up_keeps_the_last_state(often):
    server = often
    words = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(server.runs)]
    server.runs.mkdir(parents=True, exist_ok=True)
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    graph = static_nodes(140 if server.on_gpu else 14, seed=20) | {"8": node("Dream4DSceneInfo", scene=["2", 0])}
    ballast = server.runs / "ballast"
    try:
        with server.listen() as listener:
            server.queue(graph, listener.client)
            listener.until(lambda kind, content: max(steps_in([(kind, content)], "static"), default=0) >= 6, 200)
            with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(b"x" * 4096):
                    pass
            events = listener.until(ended, 200)
        assert events[-1][0] == "execution_error"
        message = events[-1][1]["exception_message"]
        (checkpoint,) = server.runs.glob("*.checkpoint")
        assert f"{checkpoint} can't be written: No space left on device" in message
        saved = saved_step(checkpoint)
        assert "what was saved before is kept: queue again" in message
        ballast.unlink()
        with server.listen() as listener:
            server.queue(graph, listener.client)
            events = listener.until(ended, 200)
        assert events[-1][0] == "execution_success" and min(steps_in(events, "static")) == saved + 1
    finally:
        subprocess.run(["umount", "-l", str(server.runs)], check=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 2**63}, "seed"),
        ({"seed": 2**64 + 1}, "seed"),
        ({"prompt": "a red \ud800 cube"}, "the prompt holds bytes that are no UTF-8"),
        ({"negative": "\udcff"}, "negative holds bytes that are no UTF-8"),
    ],
)
def test_what_could_not_be_read_back_is_said_before_training(server, changes, said):
    graph = static_nodes(5, seed=21) | {"8": node("Dream4DSceneInfo", scene=["2", 0])}
    graph["2"]["inputs"] |= changes
    status, answer = server.post("/prompt", {"prompt": graph})
    if status == 400:  # refused when it was queued
        assert said in json.dumps(answer)
    else:
        assert said in server.error(graph)


def test_out_of_memory_says_what_to_lower_and_resumes(often):
    server = often

    def graph(preview_seconds: float) -> dict:
        nodes = static_nodes(12, seed=8, preview_seconds=preview_seconds)
        return nodes | {"7": node("Dream4DSaveScene", scene=["2", 0], filename_prefix="dream4d/memory")}

    server.post("/dream4d_test/out_of_memory", {"after": 8})
    message = server.error(graph(0.0), 200)
    assert "out of memory in the stage 'static', after step 8 of 12" in message
    assert "The checkpoint is kept" in message and "or lower" in message and "queue again" in message
    assert server.inside()["networks"] == [] and "_Networks" not in server.inside()["held"]
    assert len(list(server.runs.glob("*.checkpoint"))) == 1
    with server.listen() as listener:
        server.queue(graph(0.0), listener.client)
        events = listener.until(ended, 200)
    assert events[-1][0] == "execution_success"
    assert min(steps_in(events, "static")) == 6, "5 steps were saved"
    server.post("/dream4d_test/out_of_memory", {"after": 0})
    early = server.error(static_nodes(3, seed=9) | {"8": node("Dream4DSceneInfo", scene=["2", 0])})
    assert "before the first step was done. There is no checkpoint yet" in early


def test_the_priors_are_comfyuis_to_unload_and_gone_after_the_run(server):
    def graph(preview_seconds: float, resume: str) -> dict:
        nodes = static_nodes(30, seed=10, preview_seconds=preview_seconds, resume=resume)
        return nodes | {"7": node("Dream4DSaveScene", scene=["2", 0], filename_prefix="dream4d/evicted")}

    (alone,) = output_files(server, server.run(graph(0.0, "resume automatically"))["7"], "scenes")
    with server.listen() as listener:
        prompt = server.queue(graph(600.0, "start over"), listener.client)
        listener.until(lambda kind, content: kind == "text" and content.startswith("static 5/"))
        during = server.inside()
        assert "UNet2DConditionModel" in during["networks"] and "_Networks" in during["held"]
        loads = server.text().count("Requested to load _Networks")
        disturbed = [server.post("/dream4d_test/evict", {})[1]["disturbed"] for _ in range(3)]
        assert disturbed[0] == [False] and [True] not in disturbed, "after the step that was under way"
        events = listener.until(ended)
    assert events[-1][0] == "execution_success"
    assert loads + 1 <= server.text().count("Requested to load _Networks") <= loads + 3, "they came back"
    after = server.inside()
    assert after["networks"] == [] and "_Networks" not in after["held"]
    (evicted,) = output_files(server, server.wait(prompt)["outputs"]["7"], "scenes")
    assert_same_scene(server, evicted, alone)


def test_nothing_is_fetched_from_anywhere(server):
    """Neither while the pack is imported nor while it works: connections fail here, and are noted."""
    before = len(server.attempts())
    graph = static_nodes(2, PROMPT, seed=61) | motion_nodes(2, PROMPT, seed=61) | {"5": render_node(["4", 0])}
    server.run(graph | {"6": _preview("5")})
    assert server.attempts()[before:] == []
    ours = [attempt for attempt in server.attempts() if any("dream4d" in line for line in attempt["from"])]
    assert ours == []


def test_the_guard_notes_connections(tmp_path):
    """The test before would pass with a guard that sees nothing."""
    notes = tmp_path / "notes"
    code = "import urllib.request; urllib.request.urlopen('http://example.com', timeout=5)"
    environment = os.environ | {"PYTHONPATH": str(GUARD), "DREAM4D_TEST_CONNECTIONS": str(notes)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "must not reach 'example.com'" in done.stderr
    assert len(notes.read_text().splitlines()) == 1


def test_another_setting_starts_another_run(server):
    server.run(static_nodes(3, seed=11) | {"8": node("Dream4DSceneInfo", scene=["2", 0])})
    before = set(server.runs.glob("*.safetensors"))
    server.run(static_nodes(3, seed=12) | {"8": node("Dream4DSceneInfo", scene=["2", 0])})
    assert len(set(server.runs.glob("*.safetensors")) - before) == 1


def test_training_does_not_change_what_it_is_given(server):
    still = static_nodes(3, seed=13) | {"7": node("Dream4DSaveScene", scene=["2", 0], filename_prefix="dream4d/before")}
    (before,) = output_files(server, server.run(still)["7"], "scenes")
    more = static_nodes(3, seed=14, scene=["2", 0])["2"]
    graph = still | motion_nodes(3, seed=13) | {"20": more}
    graph |= {
        "8": node("Dream4DSceneInfo", scene=["4", 0]),
        "21": node("Dream4DSceneInfo", scene=["20", 0]),
    }
    server.run(graph)
    graph["7"] = node("Dream4DSaveScene", scene=["2", 0], filename_prefix="dream4d/after")
    (after,) = output_files(server, server.run(graph)["7"], "scenes")
    assert_same_scene(server, after, before)


def test_a_memory_budget_is_kept_on_a_gpu(server):
    budget = {"memory_budget": 4.0}
    graph = static_nodes(6, seed=31, **budget) | motion_nodes(6, seed=31, **budget)
    graph |= {"8": node("Dream4DSceneInfo", scene=["4", 0])}
    if not server.on_gpu:
        reason = "memory_budget is for NVIDIA GPUs, and ComfyUI works on cpu here: set it to 0"
        assert reason in server.refused(graph)
        return
    with server.listen() as listener:
        prompt = server.queue(graph, listener.client)
        events = listener.until(ended, 300)
    assert events[-1][0] == "execution_success", server.wait(prompt)["status"]
    plans = [content for kind, content in events if kind == "text" and content.startswith("memory budget 4.0 GiB: ")]
    assert len(plans) == 2, "one for each node"


def test_two_prompts_and_an_ordinary_workflow_in_the_queue(server):
    first = server.queue(static_nodes(4, seed=21) | {"5": render_node(["2", 0]), "6": _preview("5")})
    second = server.queue(static_nodes(4, seed=22) | {"5": render_node(["2", 0]), "6": _preview("5")})
    ordinary = {
        "1": node("EmptyImage", width=16, height=16, batch_size=1, color=255),
        "2": node("SaveImage", images=["1", 0], filename_prefix="plain"),
    }
    third = server.queue(ordinary)
    for prompt in (first, second, third):
        assert server.wait(prompt)["status"]["status_str"] == "success"


def _preview(source: str) -> dict:
    return node("PreviewImage", images=[source, 0])


@pytest.mark.server  # one of its own
def test_a_killed_server_loses_little(tmp_path):
    reason = why_no_server()
    if reason:
        pytest.skip(reason)
    server = Server(tmp_path)

    def graph(preview_seconds: float) -> dict:
        nodes = static_nodes(140 if server.on_gpu else 14, seed=5, preview_seconds=preview_seconds)
        return nodes | {"7": node("Dream4DSaveScene", scene=["2", 0], filename_prefix="scene")}

    def start() -> None:
        server.start()
        server.post("/dream4d_test/checkpoint_steps", {"steps": 5})

    try:
        start()
        with server.listen() as listener:
            server.queue(graph(0.0), listener.client)
            listener.until(lambda kind, content: max(steps_in([(kind, content)], "static"), default=0) >= 6)
        server.kill()
        (checkpoint,) = server.runs.glob("*.checkpoint")
        saved = saved_step(checkpoint)
        start()
        with server.listen() as listener:
            server.queue(graph(0.0), listener.client)
            events = listener.until(ended)
        assert events[-1][0] == "execution_success"
        assert min(steps_in(events, "static")) == saved + 1
        with server.listen() as listener:
            server.queue(graph(1.0), listener.client)
            events = listener.until(ended)
        assert events[-1][0] == "execution_success"
        assert not steps_in(events, "static"), "a finished run is not repeated"
        scenes = sorted((tmp_path / "output").glob("scene_*.safetensors"))
        assert_same_scene(server, *scenes)
    finally:
        server.stop()


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"recipe__steps": 0}, "smaller than min"),
        ({"recipe": "nothing"}, "unknown recipe"),
        ({"recipe": {"recipe": ["toy"]}}, "unknown recipe"),
        ({"prompt": "a red \ud800 cube"}, "the prompt holds bytes that are no UTF-8"),
        ({"prompt": "cube " * 20_000}, "the prompt has 100,000 letters"),
        ({"preview_seconds": "nan"}, "preview_seconds is nan: it must lie between 0.0 and 600.0"),
        ({"scene": ["1", 0]}, "type mismatch: the socket scene takes DREAM4D_SCENE, but DREAM4D_PRIOR is connected"),
        ({"recipe__steps": ["9", 0]}, "type mismatch: the socket recipe.steps takes INT, but IMAGE is connected"),
        ({"resume": "perhaps"}, "not in list"),
        ({"multiview_prior": None}, "the recipe 'toy' needs a prior of the kind 'multiview': connect a Load Toy Prior"),
        ({"recipe": "text-to-3d"}, "the recipe 'text-to-3d' needs a prior of the kind 'image'"),
        ({"reference_image": ["9", 0]}, "the recipe 'toy' takes no image: choose toy-image, image-to-3d"),
        ({"reference_mask": ["9", 1]}, "the recipe 'toy' takes no image"),
        (
            {"recipe": "toy-image"},
            "'toy-image' makes a scene from an image: connect one to the socket reference_image",
        ),
        ({"recipe": "toy-image", "reference_mask": ["9", 1]}, "connect one to the socket reference_image"),
        (
            {"recipe": "toy-image", "reference_image": ["9", 0]},
            "the recipe 'toy-image' needs a prior of the kind 'novel_view'",
        ),
        (
            {"recipe": "image-to-3d-orbit", "reference_image": ["9", 0]},
            "'novel_view': connect a Novel-View Prior from Model node, with SV3D, to the socket novel_view_prior",
        ),
        # it is not asked for a sentence that no model of it reads
        ({"recipe": "image-to-3d-orbit", "reference_image": ["9", 0], "prompt": ""}, "'novel_view': connect a Novel-"),
        ({"recipe": "image-to-3d", "reference_image": ["9", 0], "prompt": ""}, "prompt is empty"),
    ],
)
def test_refused_before_anything_runs(server, changes, message):
    graph = static_nodes(2, **changes) | {"8": node("Dream4DSceneInfo", scene=["2", 0])}
    given = graph["2"]["inputs"]
    graph["2"]["inputs"] = {name: value for name, value in given.items() if value is not None}
    graph["9"] = node("LoadImage", image=image_file(server, "refused.png"))
    assert message in server.refused(graph)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deformation_scale": 0.01}, "must be 0 (automatic) or at least 0.05"),
        ({"deformation_scale": 11.0}, "deformation_scale is 11.0: it must lie between 0.0 and 10.0"),
        ({"motion_strength": 2.5}, "motion_strength is 2.5: it must lie between 0.25 and 2.0"),
        ({"recipe__hifa_steps": 0}, "smaller than min"),
        ({"prompt": ""}, "prompt is empty"),
        ({"video_prior": ["2", 0]}, "type mismatch: the socket video_prior takes DREAM4D_PRIOR"),
    ],
)
def test_animations_refused_before_anything_runs(server, changes, message):
    graph = static_nodes(2) | motion_nodes(2, **changes) | {"8": node("Dream4DSceneInfo", scene=["4", 0])}
    assert message in server.refused(graph)


# ---- from an image ----------------------------------------------------------------------------------------------


def test_a_scene_from_an_image(server):
    text = server.run(image_nodes(image_file(server, "cut_out.png")))["8"]["text"][0]
    assert "still scene" in text and "recipe toy-image" in text


@pytest.mark.parametrize(
    ("alpha", "changes", "message"),
    [
        (True, {"reference_mask": None}, "the image has no alpha and no mask was given"),
        (False, {}, "Load Image gives such a one for an image without transparency"),
    ],
)
def test_images_refused_before_training(server, alpha, changes, message):
    assert message in server.error(image_nodes(image_file(server, f"other{alpha}.png", alpha), **changes))


def case_file(server: Server, name: str) -> str:
    """An image that people bring, in the input folder."""
    shutil.copy(REPOSITORY / "tests" / "data" / "cases" / name, server.base / "input" / name)
    return name


def test_what_was_taken_is_shown_before_training(server):
    """The sentence that the command line prints, and an image, before the first step; in the log as well."""
    from dream4d_engine.training.config import TOY_IMAGE
    from dream4d_engine.training.reference import load_reference

    with server.listen() as listener:
        server.queue(image_nodes(case_file(server, "mug_tight.png"), seed=int(time.time())), listener.client)
        events = listener.until(ended)
    assert events[-1][0] == "execution_success"
    plain = load_reference(server.base / "input" / "mug_tight.png", TOY_IMAGE.reference)
    lines = [content for kind, content in events if kind == "text"]
    said = next(i for i, line in enumerate(lines) if "the subject (120x120 of 120x120 pixels" in line)
    assert lines[said].split("pixels, by")[0] == plain.statement.split("pixels, by")[0]
    assert "white on the background, for what is white in it is one colour" in lines[said]
    assert not any(line.startswith("static 1/") for line in lines[:said]) and lines[said] in server.text()
    assert lines[said] in next(line for line in lines if "loading the models" in line), "it stays to be read"
    image, shown = next((i, e[1]) for i, e in enumerate(events) if e[0] == "image")
    assert image < next(i for i, e in enumerate(events) if e[0] == "text" and "loading the models" in e[1])
    image = Image.open(io.BytesIO(shown[shown.index(b"\xff\xd8") :])).convert("RGB")
    assert image.size == (200, 200)
    assert (
        image.getpixel((3, 3)) > (240, 240, 240) and image.getpixel((90, 100))[1] > 100 > image.getpixel((90, 100))[0]
    )


def test_a_mask_that_may_mean_both_is_asked_about(server):
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    for box in ((0, 0, 63, 15), (0, 48, 63, 63), (0, 0, 15, 63), (48, 0, 63, 63)):
        ImageDraw.Draw(image).rectangle(box, fill=(200, 30, 30, 255))
    image.save(server.base / "input" / "frame.png")
    with server.listen() as listener:
        server.queue(image_nodes("frame.png"), listener.client)
        events = listener.until(ended)
    kind, content = events[-1]
    assert kind == "execution_error" and "Say it with mask_shows" in content["exception_message"]
    assert any(kind == "image" for kind, _ in events), "both readings are shown"
    assert any(kind == "text" and "Say it with mask_shows" in line for kind, line in events)
    assert "still scene" in server.run(image_nodes("frame.png", mask_shows="background"))["8"]["text"][0]


def test_unconnected_sockets_are_refused(server):
    graph = static_nodes(2) | motion_nodes(2) | {"8": node("Dream4DSceneInfo", scene=["4", 0])}
    del graph["4"]["inputs"]["video_prior"]
    assert "Required input is missing" in server.refused(graph)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"1": {"kind": "image"}}, "connect one of the kind 'multiview'"),
        ({"2": {"prompt": "a golden dragon"}}, "does not know 'golden', 'dragon'"),
        ({"2": {"negative": "blurry"}}, "does not know 'blurry'"),
    ],
)
def test_said_on_the_node(server, change, message):
    graph = static_nodes(2) | {"8": node("Dream4DSceneInfo", scene=["2", 0])}
    for name, inputs in change.items():
        graph[name]["inputs"] |= inputs
    assert message in server.error(graph)


def test_a_moving_scene_that_is_animated_is_said_to_lose_its_motion(server):
    moving, still = (f"{name}_cube.safetensors [example]" for name in ("jumping", "red"))
    for file in (moving, still):
        graph = motion_nodes(2, seed=32) | {"2": node("Dream4DLoadScene", file=file)}
        graph["8"] = node("Dream4DSceneInfo", scene=["4", 0])
        with server.listen() as listener:
            server.queue(graph, listener.client)
            events = listener.until(ended)
        assert events[-1][0] == "execution_success"
        lines = [content for kind, content in events if kind == "text"]
        assert any(line.endswith("that motion was replaced, not added to") for line in lines) == (file == moving)


def test_a_moving_scene_is_no_start_for_a_still_one(server):
    graph = static_nodes(3, seed=31) | motion_nodes(3, seed=31)
    graph["20"] = static_nodes(3, seed=31, scene=["4", 0])["2"]
    graph["8"] = node("Dream4DSceneInfo", scene=["20", 0])
    assert "connect a still one" in server.error(graph)


def test_every_input_of_every_node_is_checked_before_anything_is_done(server):
    """The schemas tell what there is: a new input is walked too."""
    rows = server.get("/dream4d_test/doors")
    walked = {(row["node"], row["input"]) for row in rows}
    for name, schema in server.get("/object_info").items():
        for socket, (kind, *_) in (schema["input"]["required"] | schema["input"].get("optional", {})).items():
            assert not name.startswith("Dream4D") or (name, socket) in walked, f"{name}.{socket} of {kind}"
    assert ("Dream4DAnimateScene", "recipe.hifa_steps") in walked, "below the choices too"
    for row in rows:
        own = row["value"] == "'no choice at all'" and row["raised"] in ("PlaceError", "PriorError", "ValueError")
        assert row["raised"] == "RunError" or own, row
        assert row["input"] in row["text"] or own, row
        assert len(row["text"]) < 700 and "\n" not in row["text"], row


def linked(value: str) -> dict:
    """A node whose output is any value, given as JSON or by a name."""
    return node("GuardValue", value=value)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("2.seed", "9223372036854775808", "seed is 9223372036854775808: it must lie between 0 and 9223372036854775807"),
        ("2.seed", "18446744073709551616", "seed is 18446744073709551616: it must lie between"),
        ("2.seed", "1.5", "seed is 1.5: it must be a whole number"),
        ("2.recipe.steps", "0", "recipe.steps is 0: it must lie between 1 and"),
        ("2.prompt", "null", "prompt is None: it must be text"),
        ("2.prompt", "surrogate", "prompt holds bytes that are no UTF-8"),
        ("2.resume", '"perhaps"', "resume is 'perhaps': choose one of resume automatically, start over"),
        ("2.preview_seconds", "NaN", "preview_seconds is nan: it must lie between"),
        ("2.memory_budget", "4", "memory_budget is for NVIDIA GPUs"),
        ("2.multiview_prior", "5", "the socket multiview_prior takes DREAM4D_PRIOR, but 5 came through its link"),
        ("4.deformation_scale", "0.01", "must be 0 (automatic) or at least 0.05"),
        ("5.frame_rate", '"nan"', "frame_rate is 'nan': it must be a number"),
        ("5.width", "1000000000", "width is 1000000000: it must lie between 1 and 4096"),
        ("5.normals", '"yes"', "normals is 'yes': it must be true or false"),
        ("5.cameras", '"from nowhere"', "cameras: 'from nowhere' not in list: choose one of"),
        ("7.filename_prefix", '"' + "x" * 3000 + '"', "filename_prefix is 3,000 bytes long"),
        ("7.filename_prefix", "surrogate", "filename_prefix holds bytes that are no UTF-8"),
    ],
)
def test_values_that_come_through_links_are_checked_too(server, place, value, message):
    """ComfyUI compares widgets with their ranges, not what arrives through a link."""
    graph = static_nodes(2, PROMPT, seed=81) | motion_nodes(2, PROMPT, seed=81)
    graph |= {
        "5": render_node(["4", 0]),
        "6": _preview("5"),
        "7": node("Dream4DSaveScene", scene=["2", 0], filename_prefix="dream4d/linked"),
        "30": linked(value),
    }
    name, _, socket = place.partition(".")
    graph[name]["inputs"][socket] = ["30", 0]
    if server.on_gpu and "memory_budget" in place:
        pytest.skip("GPUs have budgets")
    assert message in server.error(graph)


def test_a_good_value_through_a_link_is_taken(server):
    graph = static_nodes(["31", 0], PROMPT, ["30", 0])
    graph |= {"30": linked(str(2**63 - 1)), "31": linked("2.0"), "8": node("Dream4DSceneInfo", scene=["2", 0])}
    text = server.run(graph)["8"]["text"][0]
    assert f"seed {2**63 - 1}" in text and "2 steps" in text, "and it can be read back"


@pytest.mark.parametrize("prefix", ["../out", "a/../../out", "/tmp/out", "link/out", "", "folder/", "C:out"])
def test_nothing_is_saved_outside_the_output_folder(server, prefix, tmp_path_factory):
    link = server.base / "output" / "link"
    if not link.exists():
        link.symlink_to(tmp_path_factory.mktemp("elsewhere"), target_is_directory=True)
    graph = static_nodes(2) | {"7": node("Dream4DSaveScene", scene=["2", 0], filename_prefix=prefix)}
    answer = server.refused(graph)
    assert "leads out of the output folder" in answer or "is no name for a file" in answer


@pytest.mark.parametrize(
    ("prefix", "message"),
    [("x" * 3000, "3,000 bytes long"), ("\ud800", "no UTF-8"), ("CON/x", "a device"), ("a?", "holds '?'"), (5, None)],
)
def test_names_that_no_file_can_have_are_refused_before_anything_runs(server, prefix, message):
    graph = static_nodes(2) | {"7": node("Dream4DSaveScene", scene=["2", 0], filename_prefix=prefix)}
    if message is None:  # ComfyUI makes text of it
        assert server.run(graph)["7"]["scenes"][0]["filename"].startswith("5_")
    else:
        assert message in server.refused(graph)


def test_placeholders_in_a_prefix_are_filled_in(server):
    """Those of core's Save Image: some the front end replaces there, which nobody does for a graph that is queued."""
    prefix = "%date:yyyy-MM-dd%/%year%_%Optimize.seed%_%Dream4DOptimizeStaticScene.recipe%"
    graph = static_nodes(2, seed=91) | {"7": node("Dream4DSaveScene", scene=["2", 0], filename_prefix=prefix)}
    graph["2"]["_meta"] = {"title": "Optimize"}
    before, saved, after = time.localtime(), server.run(graph)["7"]["scenes"][0], time.localtime()
    days = {time.strftime("%Y-%m-%d", day) for day in (before, after)}
    assert saved["subfolder"] in days
    assert re.fullmatch(r"\d{4}_91_toy_00001_\.safetensors", saved["filename"])
    assert (server.base / "output" / saved["subfolder"] / saved["filename"]).is_file()


def test_films_of_every_size_are_saved(server):
    """Encoders of videos take even sides: the video is rounded up, the images keep their size."""
    sizes = [(1, 1), (2, 1), (1, 2), (3, 3), (33, 24), (32, 25), (33, 25)]
    graph = static_nodes(3, seed=41)
    for index, (width, height) in enumerate(sizes):
        film = f"{index}film"
        graph[film] = render_node(["2", 0], width=width, height=height, frames=2)
        prefix = f"sizes/{width}x{height}"
        graph[f"{index}video"] = node("SaveVideo", video=[film, 6], filename_prefix=prefix, format="auto", codec="auto")
        graph[f"{index}image"] = node("SaveImage", images=[film, 0], filename_prefix=prefix)
    outputs = server.run(graph)
    for index, (width, height) in enumerate(sizes):
        from PIL import Image

        (film,), images = (output_files(server, outputs[f"{index}{kind}"]) for kind in ("video", "image"))
        assert [Image.open(path).size for path in images] == [(width, height)] * 2
        frames = read_video(film).frames
        assert frames.shape == (2, height + height % 2, width + width % 2, 3)


def test_the_choice_of_kernels_is_logged_once(server):
    server.run(static_nodes(2, seed=42) | {"8": node("Dream4DSceneInfo", scene=["2", 0])})
    lines = re.findall(r"\w+ kernels (?:passed over|chosen) on .*", server.text())
    assert lines and len(lines) == len(set(lines))


def test_only_files_of_the_input_and_output_folders_are_loaded(server, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "scene.safetensors"
    outside.write_bytes(b"secret")
    (server.base / "input" / "link.safetensors").symlink_to(outside)
    (server.base / "input" / "foreign.safetensors").write_bytes(b"not a scene at all")
    (server.base / "input" / "notes.txt").write_text("text")
    cases = {
        "../secret.safetensors": "does not lie in the input folder",
        str(outside): "does not lie in the input folder",
        "link.safetensors": "does not lie in the input folder",
        "missing.safetensors": "there is no file",
        "missing.safetensors [output]": "there is no file",
        "notes.txt": "is no scene file",
        "a\0b": "does not lie in the input folder",
        "": "does not lie in the input folder",
    }
    for file, message in cases.items():
        graph = {"1": node("Dream4DLoadScene", file=file), "2": node("Dream4DSceneInfo", scene=["1", 0])}
        assert message in server.refused(graph), file
    graph = {"1": node("Dream4DLoadScene", file="foreign.safetensors"), "2": node("Dream4DSceneInfo", scene=["1", 0])}
    assert "not a readable .safetensors file" in server.refused(graph)
    (server.base / "input" / "foreign.ckpt").write_bytes(b"not a checkpoint")
    graph["1"]["inputs"]["file"] = "foreign.ckpt"
    assert "foreign.ckpt" in server.error(graph)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cameras": "connected camera"}, "connect the camera output of a 3D viewer"),
        ({"cameras": "from nowhere"}, "not in list"),
        ({"width": 0}, "width is 0: it must lie between 1 and 4096"),
        ({"frame_rate": "nan"}, "frame_rate is nan: it must lie between 0.1 and 1000.0"),
        ({"frame_rate": float("inf")}, "frame_rate is inf: it must lie between"),
        ({"azimuth": float("nan")}, "azimuth is nan: it must lie between"),
        ({"field_of_view": "nan"}, "field_of_view is nan"),
        ({"cameras": 5}, "not in list"),
        ({"camera": ["1", 0]}, "type mismatch: the socket camera takes LOAD3D_CAMERA"),
        ({"frames": 2000, "width": 4096, "height": 4096}, "rendering 2000 frames of 4096x4096 needs about"),
    ],
)
def test_films_refused_before_anything_runs(server, changes, message):
    graph = static_nodes(3, seed=41) | {"5": render_node(["2", 0], **changes), "6": _preview("5")}
    assert message in server.refused(graph)


def test_normals_that_were_not_made_are_said_to_be_missing(server):
    graph = static_nodes(3, seed=41) | {"5": render_node(["2", 0]), "6": node("PreviewImage", images=["5", 3])}
    with server.listen() as listener:  # ComfyUI tells it, but counts the run as done
        server.queue(graph, listener.client)
        events = listener.until(lambda kind, content: kind in ("execution_error", "execution_success"))
    assert "normals are switched off" in events[-1][1]["exception_message"]


def test_rendering_can_be_cancelled(server):
    big = render_node(["2", 0], cameras="final path", frames=200, width=256, height=256, normals=True)
    graph = static_nodes(3, seed=41) | {"5": big, "6": _preview("5")}
    with server.listen() as listener:
        server.queue(graph, listener.client)
        listener.until(lambda kind, content: kind == "progress_state" and "5" in content["nodes"])
        threading.Timer(1.0, server.interrupt).start()
        events = listener.until(ended, 60)
    assert events[-1][0] == "execution_interrupted"


# ---- the example workflows ---------------------------------------------------------------------------------------

WORKFLOWS = sorted((REPOSITORY / "example_workflows").glob("*.json"))
FULL = [path for path in WORKFLOWS if path.stem.endswith("_full")]  # with models that have to be fetched first
SMALL = {"recipe.steps": 2, "frames": 2, "width": 32, "height": 32}
SMALL |= {"views": 4, "times": 2, "heights": 1, "size": 32, "resolution": 32, "faces": 1000}


def as_graph(workflow: dict, known: dict) -> dict:
    """Turn a workflow of the canvas into the graph that the front end would send."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for item in (item for item in workflow["nodes"] if item["type"] in known):
        groups = known[item["type"]]["input"]
        inputs, values = {}, iter(item["widgets_values"])
        _take_widgets(groups, values, "", inputs)
        assert next(values, None) is None, f"{item['type']} has more values than widgets"
        inputs |= {socket["name"]: links[socket["link"]] for socket in item["inputs"] if socket["link"] is not None}
        graph[str(item["id"])] = {"class_type": item["type"], "inputs": inputs}
    return graph


def _take_widgets(groups: dict, values, prefix: str, inputs: dict) -> None:
    for name, (kind, *rest) in (groups.get("required", {}) | groups.get("optional", {})).items():
        options = rest[0] if rest else {}
        if isinstance(kind, list) or kind in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN", "COMFY_DYNAMICCOMBO_V3"):
            inputs[prefix + name] = next(values)
            if options.get("image_upload") or options.get("control_after_generate"):
                next(values)  # the button beside it, or the choice below it
            chosen = [
                c for c in options.get("options", []) if isinstance(c, dict) and c["key"] == inputs[prefix + name]
            ]
            for choice in chosen:
                _take_widgets(choice["inputs"], values, f"{prefix}{name}.", inputs)


RUNNABLE = [path for path in WORKFLOWS if path not in FULL]


@pytest.mark.parametrize("path", FULL, ids=[path.stem for path in FULL])
def test_workflows_of_full_size_models_lack_nothing_but_the_models(server, path):
    image_file(server, "example.png")
    graph = as_graph(json.loads(path.read_text(encoding="utf-8")), server.get("/object_info"))
    status, answer = server.post("/prompt", {"prompt": graph})
    assert status == 400
    for item in answer["node_errors"].values():
        lacking = "my_subject.safetensors" if item["class_type"] == "Dream4DApplyLora" else "has not been downloaded"
        if not item["class_type"].startswith("Dream4D"):  # core's loaders
            lacking = " not in ["
        assert all(lacking in error["details"] for error in item["errors"]), item


@pytest.mark.parametrize("path", RUNNABLE, ids=[path.stem for path in RUNNABLE])
def test_the_workflows_run(server, path):
    known = server.get("/object_info")
    server.post("/dream4d_test/small_meshes", {})
    graph = as_graph(json.loads(path.read_text(encoding="utf-8")), known)
    if any(item["class_type"] == "Dream4DExportAnimatedGLB" for item in graph.values()) and (lacks := why_no_meshes()):
        pytest.skip(lacks)
    for item in graph.values():  # the same workflow, made small
        given = item["inputs"]
        given |= {name: min(value, given[name]) for name, value in SMALL.items() if name in given}
    outputs = server.run(graph)
    expected = {name for name, item in graph.items() if known[item["class_type"]]["output_node"]}
    assert expected and expected <= set(outputs)


def test_the_workflows_are_in_the_template_browser(server):
    assert set(server.get("/api/workflow_templates")["dream4d"]) == {path.stem for path in WORKFLOWS}
