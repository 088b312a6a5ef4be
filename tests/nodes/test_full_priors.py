"""The loaders of full-size models and the LoRA node in a real ComfyUI server, on tiny files in the same layouts."""

from __future__ import annotations

import shutil

import pytest
from comfy_harness import REPOSITORY, node, static_nodes

LOADERS = {
    "Multiview": "mvdream",
    "Image": "sd21-base",
    "NovelView": "zero123-xl",
    "Pixel": "if-xl",
    "Video": "zeroscope",
}
CASES = REPOSITORY / "tests" / "data" / "cases"
TOY = REPOSITORY / "dream4d_engine" / "priors" / "toy"
CASES = REPOSITORY / "tests" / "data" / "cases"


def load_node(kind: str, model: str, **changes) -> dict:
    given = {"model": model, "download": False, "hub_id": ""} | ({} if kind == "Pixel" else {"tiny_vae": "none"})
    return node(f"Dream4DLoad{kind}Prior", **(given | changes))


def graph_with(loader: dict, **changes) -> dict:
    graph = static_nodes(1, **changes) | {"8": node("Dream4DSceneInfo", scene=["2", 0])}
    return graph | {"1": loader}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_missing_model_is_named_with_size_and_licence(server, kind):
    text = server.refused({**graph_with(load_node("Multiview", "mvdream")), "9": load_node(kind, LOADERS[kind])})
    assert "has not been downloaded" in text and "GB, licence" in text and "huggingface.co" in text


def test_known_models_are_offered_before_the_files(server):
    for kind, known in LOADERS.items():
        name = f"Dream4DLoad{kind}Prior"
        options = server.get(f"/object_info/{name}")[name]["input"]["required"]["model"][1]["options"]
        assert options[0] == known


@pytest.mark.parametrize("hub_id", ["../../etc/passwd", "/etc/passwd", "one", "a/../b"])
def test_a_hub_id_is_no_path(server, hub_id):
    graph = graph_with(load_node("Multiview", "mvdream", hub_id=hub_id, download=True))
    assert "is no repository" in server.refused(graph)


def test_a_model_of_another_kind_is_refused(server):
    shutil.copytree(TOY / "video", server.base / "models" / "diffusers" / "moving", dirs_exist_ok=True)
    message = server.error(graph_with(load_node("Multiview", "moving")))
    assert "kind 'video', Load Multi-View Prior takes 'multiview'" in message


def test_a_folder_is_loaded_by_the_loader_of_its_kind(server):
    shutil.copytree(TOY / "multiview", server.base / "models" / "diffusers" / "views", dirs_exist_ok=True)
    outputs = server.run(graph_with(load_node("Multiview", "views"), seed=71))
    assert "still scene" in outputs["8"]["text"][0]


def lora_graph(strength: float, prior: str = "image", **changes) -> dict:
    given = {"recipe": "toy-personalised", "recipe__steps": 2, "seed": 72, "image_prior": ["5", 0]} | changes
    graph = static_nodes(2, "a sks snowman", **given)
    return graph | {
        "4": node("Dream4DLoadToyPrior", kind=prior),
        "5": node("Dream4DApplyLora", prior=["4", 0], lora="toy subject", strength=strength),
        "7": node("Dream4DSaveScene", scene=["2", 0], filename_prefix="dream4d/lora"),
    }


def test_a_lora_takes_part_in_the_run_and_in_its_identity(server):
    from safetensors.torch import load_file

    tables = []
    for strength in (1.0, 0.0):
        (saved,) = server.run(lora_graph(strength))["7"]["scenes"]
        path = server.base / "output" / saved["subfolder"] / saved["filename"]
        tables.append(load_file(path)["canonical.grid.table"])
    assert not tables[0].equal(tables[1])


def test_a_lora_is_for_image_priors_and_one_is_enough(server):
    assert "a LoRA is for an image prior" in server.error(lora_graph(1.0, "multiview"))
    graph = lora_graph(1.0)
    graph["6"] = node("Dream4DApplyLora", prior=["5", 0], lora="toy subject", strength=1.0)
    graph["2"]["inputs"]["image_prior"] = ["6", 0]
    assert "has the LoRA subject already" in server.error(graph)


def test_a_file_that_is_no_lora_is_refused_by_name(server):
    folder = server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    (folder / "broken.safetensors").write_bytes(b"no weights at all")
    graph = lora_graph(1.0)
    graph["5"]["inputs"]["lora"] = "broken.safetensors"
    assert "broken.safetensors" in server.error(graph)


def test_loras_of_peft_are_offered_as_files_and_folders(server):
    """Its width is the toy model's; a change of the settings beside it is a change of the prior."""
    folder = server.base / "models" / "loras" / "pack" / "mine"
    shutil.copytree(CASES / "peft_adapter", folder, dirs_exist_ok=True)
    name = "Dream4DApplyLora"
    options = server.get(f"/object_info/{name}")[name]["input"]["required"]["lora"][1]["options"]
    assert {"pack/mine", "pack/mine/adapter_model.safetensors"} <= {option.replace("\\", "/") for option in options}
    graph = lora_graph(1.0, seed=73)
    graph["5"]["inputs"]["lora"] = "pack/mine"
    assert server.run(graph)["7"]["scenes"]
    (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": null}', encoding="utf-8")
    assert "adapter_config.json: lora_alpha must be a finite number, got null" in server.error(graph)


def test_a_damaged_lora_is_refused_by_its_node(server):
    folder = server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    shutil.copy(CASES / "lora_rank_mismatch.safetensors", folder / "unequal.safetensors")
    graph = lora_graph(1.0)
    graph["5"]["inputs"]["lora"] = "unequal.safetensors"
    assert "unequal.safetensors: unet.down_blocks" in server.error(graph)


def test_a_lora_that_is_not_there_is_refused(server):
    graph = lora_graph(1.0)
    graph["5"]["inputs"]["lora"] = "../secret.safetensors"
    assert "is not among the files in models/loras" in server.refused(graph)


@pytest.mark.parametrize(
    ("case", "said"), [("lfs.ckpt", "is a Git LFS pointer"), ("page.safetensors", "is a web page")]
)
def test_files_in_disguise_are_named_on_the_loader(server, case, said):
    folder = server.base / "models" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(CASES / case, folder / case)
    message = server.error(graph_with(load_node("Multiview", case)))
    assert case in message and said in message
