"""Priors of the graph's models in a real server, watched: gradients, memory, Cancel, and too little memory.

    python tests/nodes/graph_on_gpu.py FOLDER [--small] [--options "..."] ... [--parts PART ...]

By hand, on a GPU: it writes models of real size with random weights (5 GB) into FOLDER, runs the same workflows in a
server for each of the `--options` (without any: ComfyUI's own choice, and --disable-dynamic-vram) and prints one JSON
object a server: what held, and the bytes at each place. `--small`: small models and --cpu, to try the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import traceback
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import numpy as np  # noqa: E402
from comfy_harness import Server, find_comfyui, find_python, motion_nodes, node, static_nodes  # noqa: E402
from PIL import Image  # noqa: E402
from server_runs import ended, output_files, steps_in  # noqa: E402

TOLERANCE = 0.02
"""Of the memory that is taken: what may be more afterwards than before."""


class Session:
    """A server, what was found, and what did not hold."""

    def __init__(self, server: Server, small: bool) -> None:
        self.server, self.small, self.found, self.wrong = server, small, {}, []
        self.steps = 3 if small else 5
        self.size = {"width": 48, "height": 32} if small else {"width": 0, "height": 0}
        self.moments: list[float] = []  # when the watched run's steps were taken, seconds

    def held(self, what: str, good: bool, detail: object = None) -> None:
        """Note whether something held."""
        self.found[what] = detail if good else {"WRONG": detail}
        if not good:
            self.wrong.append(what)
        print(f"{'held ' if good else 'WRONG'} {what}: {json.dumps(detail)}", flush=True)

    def memory(self) -> dict:
        """Bytes that are taken once the server is at rest: it cleans up after it has said that a run is over."""
        found = first = self.server.get("/dream4d_test/memory")
        for _ in range(10):
            time.sleep(0.3)
            before, found = found, self.server.get("/dream4d_test/memory")
            if found.get("torch") == before.get("torch"):
                break
        return found | {key: first[key] for key in ("peak", "card_most") if key in first}

    def freed(self) -> dict:
        """Bytes that are taken after ComfyUI was told to free all; it doesn't hear that while it cleans up."""
        for _ in range(3):
            self.server.post("/free", {"unload_models": True, "free_memory": True})
            time.sleep(1)
        return self.memory()

    def compare(self, what: str, before: dict, after: dict) -> None:
        """The card's memory, or PyTorch's, is what it was."""
        keys = [key for key in ("card", "torch") if key in before]
        more = {key: after[key] / max(1, before[key]) - 1 for key in keys}
        numbers = {"before": before, "after": after, "more": more}
        self.held(what, all(share <= TOLERANCE for share in more.values()), numbers)

    def watched(self, what: str, graph: dict, steps: int) -> dict:
        """Run a graph of training whose every step has to have a gradient; return its outputs."""
        self.server.post("/dream4d_test/watch", {})
        began = time.monotonic()
        outputs = self.server.run(graph, 400)
        seconds = round(time.monotonic() - began, 1)
        _, seen = self.server.post("/dream4d_test/watch", {})
        tail, self.moments = seen["steps"][-steps:], seen["moments"][-steps:]
        good = len(tail) == steps and all(0 < norm < float("inf") for norm in tail)
        self.held(f"{what}: a gradient in every step", good, {"norms": tail, "seconds": seconds})
        return outputs

    def seconds_a_step(self) -> float:
        """Of the watched run; the first steps compile."""
        late = self.moments[len(self.moments) // 3 :]
        return round(median(b - a for a, b in pairwise(late)), 3)

    # ---- graphs ----

    def checkpoint(self) -> dict:
        """Node 10: Stable Diffusion 1.5."""
        return {"10": node("CheckpointLoaderSimple", ckpt_name=f"{'small' if self.small else 'full'}_sd15.safetensors")}

    def still(self, seed: int, **changes) -> dict:
        """Nodes 1, 2 and 10: a still scene by the checkpoint."""
        given = {"recipe": "model-image", "recipe__steps": self.steps, "image_prior": ["1", 0], "seed": seed}
        scene = static_nodes(self.steps, **given | changes)["2"]
        if "multiview_prior" not in changes:
            del scene["inputs"]["multiview_prior"]
        prior = node("Dream4DImagePriorFromModel", model=["10", 0], clip=["10", 1], vae=["10", 2], **self.size)
        return self.checkpoint() | {"1": prior, "2": scene, "8": node("Dream4DSceneInfo", scene=["2", 0])}

    def moving(
        self, seed: int, family: str = "wan", steps: int | None = None, vae: str | None = None, **changes
    ) -> dict:
        """Nodes 1 to 4, 20 to 22: the motion of a toy scene by a video model, through its own or another `vae`."""
        name = f"small_{family}" if self.small or family == "ltx" else f"full_{family}"
        frames = {"wan": 5, "ltx": 9}[family] if self.small or family == "ltx" else 0
        size = {"width": 96, "height": 64} if family == "ltx" else self.size
        given = {"model": ["20", 0], "clip": ["21", 0], "vae": ["22", 0], "frames": frames, **size}
        graph = static_nodes(2, seed=9) | {
            "20": node("UNETLoader", unet_name=f"{name}.safetensors", weight_dtype="default"),
            "21": node("GuardSmallClip", family=family),
            "22": node("VAELoader", vae_name=f"{vae or name}.safetensors"),
            "3": node("Dream4DVideoPriorFromModel", **given),
        }
        steps = steps or self.steps
        scene = motion_nodes(steps, **{"recipe": "model-video", "recipe__steps": steps, "seed": seed} | changes)["4"]
        return graph | {"4": scene, "8": node("Dream4DSceneInfo", scene=["4", 0])}

    def image(self, seed: int = 5) -> np.ndarray:
        """An image of the checkpoint by core nodes; another seed goes first, so that nothing comes from a cache."""
        size = {"width": 48, "height": 32} if self.small else {"width": 512, "height": 512}
        found = None
        for one in (int(time.monotonic() * 1000), seed):
            sampler = {"sampler_name": "euler", "scheduler": "normal", "steps": 3, "cfg": 4.0, "denoise": 1.0}
            sampler |= {"model": ["10", 0], "positive": ["30", 0], "negative": ["30", 0], "latent_image": ["31", 0]}
            graph = self.checkpoint() | {
                "30": node("CLIPTextEncode", clip=["10", 1], text="a red cube"),
                "31": node("EmptyLatentImage", batch_size=1, **size),
                "32": node("KSampler", seed=one, **sampler),
                "33": node("VAEDecode", samples=["32", 0], vae=["10", 2]),
                "34": node("SaveImage", images=["33", 0], filename_prefix="sampled"),
            }
            (path,) = output_files(self.server, self.server.run(graph)["34"])
            found = np.asarray(Image.open(path)).astype(float)
        return found


def images(s: Session) -> None:
    """Two runs in a row, an image workflow between them, a run beside a second prior."""
    pixels = s.image()
    s.watched("first run", s.still(1), s.steps)
    idle = s.freed()  # what CUDA and the kernels keep is there from the first run on
    s.watched("run after all was freed", s.still(6), s.steps)
    first = s.memory()
    s.watched("second run", s.still(2), s.steps)
    s.compare("memory after a second run", first, s.memory())
    s.server.post("/free", {"unload_models": True})  # the button: nodes keep what they have loaded
    time.sleep(2)
    s.watched("run after models were unloaded", s.still(7), s.steps)
    difference = float(np.abs(s.image() - pixels).max())
    s.held("the same image as before the runs", difference <= 2, {"of 255": difference})
    between = s.memory()
    s.watched("run after an image", s.still(3), s.steps)
    s.compare("memory after a run after an image", between, s.memory())
    if not s.small:  # the recipe takes 30 GiB
        beside = s.still(4, recipe="text-to-3d", multiview_prior=["5", 0])
        s.watched("beside a second prior", beside | {"5": node("Dream4DLoadToyPrior", kind="multiview")}, s.steps)
        s.compare("memory after a run beside a second prior", between, s.memory())
    s.compare("memory once all is freed, after images", idle, s.freed())


def videos(s: Session) -> None:
    """The same for videos, and an image between them."""
    s.watched("first take", s.moving(1), s.steps)
    idle = s.freed()
    s.watched("take after all was freed", s.moving(6), s.steps)
    first = s.memory()
    s.watched("second take", s.moving(2), s.steps)
    s.compare("memory after a second take", first, s.memory())
    s.image()
    between = s.memory()
    s.watched("take after an image", s.moving(3), s.steps)
    # whichever models are left there: the image's alone without dynamic memory, and the take's afterwards
    s.compare(
        "memory after a take after an image", max(between, first, key=lambda found: found.get("torch", 0)), s.memory()
    )
    s.compare("memory once all is freed, after takes", idle, s.freed())


def cancel(s: Session) -> None:
    """Cancel in the middle of a step; queued again, the run goes on."""
    steps = 12
    s.watched("before Cancel", s.moving(4), s.steps)
    before = s.memory()
    with s.server.listen() as listener:
        prompt = s.server.queue(s.moving(5, steps=steps, resume="start over"), listener.client)
        listener.until(lambda kind, content: max(steps_in([(kind, content)], "motion"), default=0) >= 3)
        s.server.interrupt()
        events = listener.until(ended)
        s.held("Cancel stops", events[-1][0] == "execution_interrupted", events[-1][0])
        s.server.wait(prompt)
    s.compare("memory after Cancel", before, s.memory())
    with s.server.listen() as listener:
        prompt = s.server.queue(s.moving(5, steps=steps), listener.client)
        events = listener.until(ended)
        at = steps_in(events, "motion")
        s.held("it goes on after Cancel", events[-1][0] == "execution_success" and min(at) > 3, at)
        s.server.wait(prompt)
    s.compare("memory after it went on", before, s.memory())


def shortage(s: Session) -> None:
    """The memory runs out at the encoder."""
    kinds = {"sd15": s.still, "wan": s.moving, "ltx": lambda seed: s.moving(seed, "ltx")}
    for family, graph in kinds.items():
        s.watched(f"{family}, before memory runs out", graph(50), s.steps)
        before = s.memory()
        s.server.post("/dream4d_test/watch", {"shortage_after": 2})
        said = s.server.error(graph(51))
        s.held(f"{family}: too little memory is said", "emory" in said, said)
        s.compare(f"{family}: memory after it ran out", before, s.memory())
        s.watched(f"{family}, after memory ran out", graph(51), 1)


def speed(s: Session) -> None:
    """What a step takes, seconds, and the most memory: by core's encoders, by ours, through a tiny one, in turns."""
    steps, found, peaks = 3 * s.steps, {}, {}
    image = {"recipe__steps": steps}
    ways = {
        "Wan, core's encoder": (True, lambda seed: s.moving(seed, steps=steps)),
        "Wan": (False, lambda seed: s.moving(seed, steps=steps)),
        "Wan, tiny autoencoder": (False, lambda seed: s.moving(seed, steps=steps, vae="tiny_wan")),
        "Stable Diffusion 1.5, core's encoder": (True, lambda seed: s.still(seed, **image)),
        "Stable Diffusion 1.5": (False, lambda seed: s.still(seed, **image)),
    }
    for turn in range(2):
        for i, (way, (own, graph)) in enumerate(ways.items()):
            name = f"{way}, turn {turn}"
            tuned = s.server.post("/dream4d_test/encoder", {"own": own})[1]["cudnn.benchmark"]
            s.held("cuDNN's choice is put back", not tuned, tuned)
            s.memory()
            s.watched(name, graph(70 + 10 * turn + i), steps)
            peaks[name] = s.memory().get("peak")
            found[name] = s.seconds_a_step()
            first = [round(b - a, 1) for a, b in pairwise(s.moments[:4])]
            print(f"{name}: {found[name]} s a step, {peaks[name]} bytes at most, the first ones {first}", flush=True)
    s.held("seconds a step", all(seconds > 0 for seconds in found.values()), {"steps": found, "peaks": peaks})


def budget(s: Session) -> None:
    """What a step takes within a memory budget, seconds, and the most of the card, beside what is always there."""
    steps = 2 * s.steps
    ways = {
        "Wan": ((0, 16, 8, 6), lambda seed, gib: s.moving(seed, steps=steps, memory_budget=gib)),
        "Stable Diffusion 1.5": ((0, 8, 5), lambda seed, gib: s.still(seed, recipe__steps=steps, memory_budget=gib)),
    }
    for name, (budgets, graph) in ways.items():
        at_rest = 0
        for gib in budgets:
            try:
                s.watched(f"{name}, {gib} GiB", graph(90 + gib, float(gib)), steps)
            except AssertionError:  # of a run that ends in an error
                said = re.findall(f"doesn't fit into {gib}.0 GiB.*", s.server.text())
                if not said:
                    raise
                s.held(f"{name}: {gib} GiB are said to be too few", gib < 8, said[-1])
                continue
            peak = s.memory()
            at_rest = at_rest or s.freed()["card"]  # kernels, which the first run loads, are there from then on
            found = {"seconds a step": s.seconds_a_step(), "card": peak["card_most"] - at_rest, "torch": peak["peak"]}
            plans = [line for line in s.server.text().splitlines() if "memory budget" in line]
            found["plan"] = plans[-1:] if gib else []
            s.held(f"{name} keeps to {gib} GiB", not gib or found["card"] <= gib * 2**30, found)


PARTS = {part.__name__: part for part in (images, videos, cancel, shortage, speed, budget)}


def run(base: Path, options: str, small: bool, parts: list[str]) -> dict:
    """All workflows in one server."""
    os.environ["COMFYUI_OPTIONS"] = options
    base.mkdir(parents=True, exist_ok=True)
    models = base / "models"
    if not models.exists():
        models.symlink_to(base.parent / "models", target_is_directory=True)
    server = Server(base)
    began = time.monotonic()
    session = Session(server.start(), small)
    session.found["seconds to start"] = round(time.monotonic() - began, 1)
    try:
        if small:
            server.post("/dream4d_test/small_recipes", {})
        session.found["start"] = session.memory()
        for part in map(PARTS.__getitem__, parts):
            at = time.monotonic()
            try:
                part(session)
            except Exception:  # the others are worth seeing; the whole is in the server's log
                text = traceback.format_exc()
                said = re.findall(r'"exception_message": "[^"]*"', text)
                session.held(part.__name__, False, said or text[-1000:])
            session.found[f"seconds of {part.__name__}"] = round(time.monotonic() - at, 1)
        text = server.text()
        session.held("no inference tensors", "nference tensors" not in text)
        lines = text.splitlines()
        session.found["memory management"] = [line for line in lines if "DynamicVRAM" in line or "aimdo" in line][:6]
    finally:
        server.stop()
    return {"options": options, "wrong": session.wrong, "found": session.found}


def main() -> None:
    """Write the models, then a server after the other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--options", action="append")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    given = parser.parse_args()
    comfyui, folder = find_comfyui(), given.folder.resolve()
    (folder / "models").mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("graph_files.py")
    words = [find_python(comfyui), str(script), str(comfyui), str(folder / "models")]
    began = time.monotonic()
    if not any((folder / "models").iterdir()):
        subprocess.run([*words, *([] if given.small else ["--full"])], check=True)
    print(f"files written in {time.monotonic() - began:.0f} s", flush=True)
    if given.small and given.options is None:  # a memory budget is for GPUs
        given.parts = [part for part in given.parts if part != "budget"]
    wanted = given.options or (["--cpu"] if given.small else ["", "--disable-dynamic-vram"])
    outcomes = []
    for i, options in enumerate(wanted):
        outcomes.append(run(folder / f"server{i}", options, given.small, given.parts))
        (folder / "summary.json").write_text(json.dumps(outcomes, indent=1), encoding="utf-8")
    print("SUMMARY " + json.dumps({outcome["options"]: outcome["wrong"] for outcome in outcomes}))


if __name__ == "__main__":
    main()
