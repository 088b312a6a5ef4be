"""Priors of what core loader nodes have loaded, in a real server: small files with random weights."""

from __future__ import annotations

import subprocess
import time

import pytest
from comfy_harness import REPOSITORY, find_comfyui, find_python, motion_nodes, node, static_nodes
from safetensors import safe_open
from safetensors.torch import load_file
from server_runs import assert_same_scene, ended, image_file, output_files, steps_in
from server_runs import image_nodes as image_scene

SCRIPT = REPOSITORY / "tests" / "nodes" / "graph_files.py"


@pytest.fixture(scope="module")
def models(server):
    """The small files, among the server's models."""
    comfyui = find_comfyui()
    words = [find_python(comfyui), str(SCRIPT), str(comfyui), str(server.base / "models")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    server.post("/dream4d_test/small_recipes", {})
    return server


def image_nodes(steps: int, lora: float | None = None, **changes) -> dict:
    """Nodes 1 and 2: an image prior of a checkpoint, and a still scene."""
    graph = {
        "10": node("CheckpointLoaderSimple", ckpt_name="small_sd15.safetensors"),
        "11": node("LoraLoader", model=["10", 0], clip=["10", 1], lora_name="small.safetensors"),
        "1": node("Dream4DImagePriorFromModel", model=["10", 0], clip=["10", 1], vae=["10", 2], width=48, height=32),
    }
    if lora is not None:
        graph["11"]["inputs"] |= {"strength_model": lora, "strength_clip": 0.0}
        graph["1"]["inputs"] |= {"model": ["11", 0], "clip": ["11", 1]}
    else:
        del graph["11"]
    given = {"recipe": "model-image", "recipe__steps": steps, "image_prior": ["1", 0]} | changes
    still = static_nodes(steps, **given)["2"]
    del still["inputs"]["multiview_prior"]
    return graph | {"2": still}


def video_nodes(steps: int, **changes) -> dict:
    """Nodes 1 to 4: a toy scene, and its motion by a video model of core loaders."""
    graph = static_nodes(2, seed=9) | {
        "20": node("UNETLoader", unet_name="small_wan.safetensors", weight_dtype="default"),
        "21": node("GuardSmallClip", family="wan"),
        "22": node("VAELoader", vae_name="small_wan.safetensors"),
        "3": node(
            "Dream4DVideoPriorFromModel",
            model=["20", 0],
            clip=["21", 0],
            vae=["22", 0],
            width=48,
            height=32,
            frames=5,
        ),
    }
    given = {"recipe": "model-video", "recipe__steps": steps} | changes
    return graph | {"4": motion_nodes(steps, **given)["4"]}


def save_node(scene: list, name: str) -> dict:
    return {"7": node("Dream4DSaveScene", scene=scene, filename_prefix=f"dream4d/{name}")}


def sampled(seed: int) -> dict:
    """Nodes 30 to 34: an image of the same checkpoint by core nodes."""
    return {
        "30": node("CLIPTextEncode", clip=["10", 1], text="a red cube"),
        "31": node("EmptyLatentImage", width=48, height=32, batch_size=1),
        "32": node(
            "KSampler",
            model=["10", 0],
            positive=["30", 0],
            negative=["30", 0],
            latent_image=["31", 0],
            seed=seed,
            steps=3,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "33": node("VAEDecode", samples=["32", 0], vae=["10", 2]),
        "34": node("SaveImage", images=["33", 0], filename_prefix="sampled"),
    }


def pixels(server, outputs: dict) -> bytes:
    from PIL import Image

    (path,) = output_files(server, outputs["34"])
    return Image.open(path).tobytes()


def test_a_checkpoint_makes_a_still_scene_and_stays_a_checkpoint(models):
    loader = {"10": image_nodes(1)["10"]}
    before = pixels(models, models.run(loader | sampled(5)))
    with models.listen() as listener:
        prompt = models.queue(image_nodes(10) | save_node(["2", 0], "image"), listener.client)
        events = listener.until(ended, 300)
    assert events[-1][0] == "execution_success", events[-1]
    assert steps_in(events, "static")[-1] == 10
    told = [content for kind, content in events if kind == "text"]
    assert any(line.startswith("Stable Diffusion 1 or 2 sees 48x32 (it was trained on") for line in told)
    (scene,) = output_files(models, models.wait(prompt)["outputs"]["7"], "scenes")
    assert all(value.isfinite().all() for value in load_file(scene).values() if value.is_floating_point())
    # the same numbers, drawn again: another seed goes first, so that nothing comes from the server's cache
    models.run(loader | sampled(6))
    assert pixels(models, models.run(loader | sampled(5))) == before


def test_a_core_lora_makes_another_scene(models):
    plain, changed, weak = (
        output_files(models, models.run(image_nodes(2, lora) | save_node(["2", 0], "lora"))["7"], "scenes")[0]
        for lora in (None, 1.0, 0.2)
    )
    scenes = [load_file(path) for path in (plain, changed, weak)]
    for one, other in ((0, 1), (1, 2)):
        assert any(not value.equal(scenes[other][name]) for name, value in scenes[one].items())


def test_a_video_model_moves_a_scene(models):
    with models.listen() as listener:
        prompt = models.queue(video_nodes(3) | save_node(["4", 0], "video"), listener.client)
        events = listener.until(ended, 300)
    assert events[-1][0] == "execution_success", events[-1]
    told = [content for kind, content in events if kind == "text"]
    assert any(line.startswith("Wan sees 48x32, 5 frames (it was trained on") for line in told)
    (scene,) = output_files(models, models.wait(prompt)["outputs"]["7"], "scenes")
    assert any(value.abs().max() > 0 for name, value in load_file(scene).items() if name.startswith("deformation"))


def test_a_model_of_novel_views_makes_a_scene_of_an_image(models):
    graph = image_scene(image_file(models, "cut_out.png"), recipe="toy-image", recipe__steps=4)
    graph |= {
        "50": node("CheckpointLoaderSimple", ckpt_name="small_zero123.safetensors"),
        "51": node("GuardSmallClipVision"),
        "52": node("VAELoader", vae_name="small_sd.safetensors"),
    }
    given = {"model": ["50", 0], "clip_vision": ["51", 0], "vae": ["52", 0], "width": 32, "height": 32}
    (prior,) = [name for name, one in graph.items() if one["inputs"].get("kind") == "novel_view"]
    graph[prior] = node("Dream4DNovelViewPriorFromModel", **given)
    assert "still scene" in models.run(graph)["8"]["text"][0]
    (training,) = [one for one in graph.values() if one["class_type"] == "Dream4DOptimizeStaticScene"]
    training["inputs"] |= {"recipe": "image-to-3d-orbit", "recipe.steps": 4}
    said = models.error(graph)
    assert "Stable Zero123 sees single views, and the recipe 'image-to-3d-orbit' makes whole orbits" in said
    del graph[prior]["inputs"]["clip_vision"]
    assert "clip_vision" in models.refused(graph)


def test_cancel_in_the_middle_of_a_step_is_resumed_exactly(models):
    steps = 12 if models.on_gpu else 7

    def graph(preview_seconds: float, resume: str = "resume automatically") -> dict:
        nodes = image_nodes(steps, seed=4, preview_seconds=preview_seconds, resume=resume)
        return nodes | save_node(["2", 0], "resumed")

    (unbroken,) = output_files(models, models.run(graph(0.0))["7"], "scenes")
    with models.listen() as listener:
        prompt = models.queue(graph(600.0, "start over"), listener.client)
        listener.until(lambda kind, content: max(steps_in([(kind, content)], "static"), default=0) >= 3)
        time.sleep(0.2)  # steps take longer: the model is at work
        models.interrupt()
        events = listener.until(ended)
        assert events[-1][0] == "execution_interrupted"
        models.wait(prompt)
        (checkpoint,) = models.runs.glob("*.checkpoint")
        with safe_open(checkpoint, "pt") as file:
            assert 3 <= int(file.metadata()["step"]) < steps
        again = models.queue(graph(599.0), listener.client)
        events = listener.until(ended, 300)
    assert events[-1][0] == "execution_success"
    assert min(steps_in(events, "static")) > 3, "it went on"
    (resumed,) = output_files(models, models.wait(again)["outputs"]["7"], "scenes")
    assert_same_scene(models, unbroken, resumed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"3": {"vae": ["40", 0]}}, "the VAE (AutoencoderKL) has 4 channels for images, Wan reads 16 for videos"),
        ({"21": {"family": "ltx"}}, "the CLIP splits words for another model (LTXVT5Tokenizer)"),
        ({"21": {"family": "none"}}, "clip is None: it must be what one of ComfyUI's loaders has given"),
    ],
)
def test_what_does_not_belong_together_is_refused_at_the_node(models, changes, message):
    graph = video_nodes(3) | {"40": node("VAELoader", vae_name="small_sd.safetensors")}
    for name, inputs in changes.items():
        graph[name]["inputs"] |= inputs
    assert message in models.error(graph | save_node(["4", 0], "refused"))


def test_an_image_model_in_the_video_node_is_refused(models):
    graph = video_nodes(3) | {"10": node("CheckpointLoaderSimple", ckpt_name="small_sd15.safetensors")}
    graph["3"]["inputs"] |= {"model": ["10", 0], "clip": ["10", 1], "vae": ["10", 2]}
    said = models.error(graph | save_node(["4", 0], "refused"))
    assert "makes images: connect it to Image Prior from Model" in said


def test_two_runs_and_an_image_between_them(models):
    """Nothing is left of a run that a second one, or a sampler, could trip over."""
    loader = {"10": image_nodes(1)["10"]}
    for seed in (21, 22):
        models.run(image_nodes(2, seed=seed) | save_node(["2", 0], "twice"))
        models.run(loader | sampled(seed))
        models.run(video_nodes(2, seed=seed) | save_node(["4", 0], "twice"))
    assert "nference tensors" not in models.text()
    held = models.inside()["held"]
    assert len(held) == len(set(held)), held
