"""What one of several processes does in test_processes.py: train small scenes and write down what came out.

A case is trained by one process, and by several: the recipe and the guidance are the same, but for the camera groups.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from training_cases import SMALL, motion_case, solid_ball, static_case

from dream4d_engine.guidance.denoiser import Conditions
from dream4d_engine.guidance.distillation import DistillationConfig, Guidance
from dream4d_engine.guidance.noise import variance_preserving
from dream4d_engine.guidance.windows import Windows
from dream4d_engine.scene import Scene
from dream4d_engine.schedules import constant
from dream4d_engine.supervision import RandomBackground, RegularizerWeights
from dream4d_engine.training.config import GuidanceTerm, StaticRecipe
from dream4d_engine.training.loop import Interrupted, RunControl
from dream4d_engine.training.motion import train_motion
from dream4d_engine.training.processes import SINGLE, Processes, Share, join_processes, leave_processes
from dream4d_engine.training.static import train_static


class Leaning:
    """Predicts the noisy images, shrunk and a little lighter where it is told so: its answer depends on the noise."""

    image_size, images_apart = (8, 8), True

    def __init__(self, n_frames):
        self.n_frames, self.noise = n_frames, variance_preserving(torch.linspace(0.999, 0.01, 50))

    def encode(self, images, carried=None):
        return 2 * images - 1

    def decode(self, z):
        return z / 2 + 0.5

    def denoise(self, x, sigma, conditions):
        lighter = conditions.tokens.mean((1, 2, 3))
        assert len(lighter) == len(x)
        return x / (1 + sigma[:, None, None, None, None] ** 2) + lighter[:, None, None, None, None]


def leaning(kind: str, n_frames=None, **changes):
    """Guidance by it, and the terms of a recipe that ask for it."""

    def conditions(cameras):
        tokens = torch.ones(*cameras.shape, 1, 1) + cameras.azimuth[..., None, None].cpu()
        return Conditions(tokens), Conditions(0 * tokens)

    config = DistillationConfig(2.0, constant(0.1), constant(0.9), loss="multistep", n_steps=4, color_weight=0.1)
    config = replace(config, **changes)
    return {kind: Guidance("leaning", Leaning(n_frames), conditions, config)}, (GuidanceTerm(kind, 1.0, config),)


def still(n_groups: int, steps: int = 6, n_views: int = 4, max_azimuth_deg: float = 180.0, **weights: float):
    """A recipe of the first stage, and its guidance; `weights`: of regularisers."""
    recipe, _, _, _ = static_case(steps=steps, size=8)
    guidance, terms = leaning("multiview", max_azimuth_deg=max_azimuth_deg)
    return replace(
        recipe,
        n_views=n_views,
        cameras=replace(recipe.cameras, azimuth_deg=(-180, 180)),
        scene=SMALL,
        phases=(replace(recipe.phases[0], n_groups=n_groups, height=8, width=8),),
        guidance=terms,
        background=RandomBackground(probability=0.5),
        regularizers=RegularizerWeights(**weights) if weights else recipe.regularizers,
        # where a gradient is almost 0, dividing it by its own size would make its last bits count
        optimizer=replace(recipe.optimizer, eps=1e-3),
    ), guidance


def moving(n_groups: int, steps: int = 6, n_frames: int = 6, as_takes: bool = False, **changes):
    """Likewise of the second; `as_takes`: the guidance sees whole takes."""
    recipe, _, _, _, _ = motion_case(steps=steps)
    windows = changes.get("windows")
    guidance, terms = leaning("video", (windows.window if windows else n_frames) if as_takes else None)
    # rigidity is a mean over what a process sees of the object: only of a step that is divided all see the same
    recipe = replace(recipe, **{"regularizers": RegularizerWeights(), **changes})
    return replace(
        recipe,
        n_frames=n_frames,
        phases=(replace(recipe.phases[0], n_groups=n_groups, height=8, width=8),),
        guidance=terms,
        background=RandomBackground(probability=0.5),
        optimizer=replace(recipe.optimizer, eps=1e-3),
    ), guidance


def all_terms():
    """Every regulariser that a step of a moving scene can have, about as heavy as the guidance."""
    return RegularizerWeights(300.0, 300.0, 3000.0, 300.0, 300.0, 300.0, 300.0, 3000.0)


@dataclass(frozen=True)
class Case:
    """What is trained, and how it is shared."""

    make: Callable[[int], tuple]  # camera groups -> (recipe, guidance)
    share: Share = "auto"
    says: str = "do each step together"  # how that is told
    cameras: bool = False  # whether cameras are shared, so that one process needs as many times more
    stop_after: int | None = None  # a step, and resume


CASES = {
    "more cameras": Case(lambda n: moving(n, 2), "cameras", "with camera groups of its own", cameras=True),
    "still": Case(lambda n: still(n, 4), stop_after=2),
    "some views": Case(lambda n: still(n, 3, n_views=6, max_azimuth_deg=100.0, normal_smoothness_3d=1.0, entropy=20.0)),
    "all terms": Case(lambda n: moving(n, 2, 5, as_takes=True, regularizers=all_terms())),
    "few frames with gradient": Case(lambda n: moving(n, 3, 5, as_takes=True, gradient_frames=2)),
    "windows": Case(lambda n: moving(n, 2, 5, as_takes=True, windows=Windows(5, 3))),
    "one image": Case(lambda n: still(n, 3, n_views=1), "work"),
    "nothing to divide": Case(lambda n: still(n, 3, n_views=2), says="steps of 2 images can't be", cameras=True),
}


def train(case: Case, n_groups: int, folder: Path, processes: Processes = SINGLE) -> dict:
    """Train and return the scene's tensors, the losses seen, and how the processes share the work."""
    recipe, guidance = case.make(n_groups)
    losses: dict[int, float] = {}
    said: list[str] = []

    def control(stop_after: int | None) -> RunControl:
        return RunControl(
            folder / ("run.checkpoint" if case.stop_after else f"{processes.rank}.checkpoint"),
            on_step=lambda report, _: losses.update({report.step: report.loss}),
            should_stop=lambda: stop_after is not None and stop_after in losses,
            processes=processes,
            share=case.share,
            on_plan=said.append,
        )

    def run(stop_after: int | None = None) -> Scene:
        given = {"seed": 3, "device": torch.device("cpu"), "control": control(stop_after)}
        if isinstance(recipe, StaticRecipe):
            return train_static(recipe, guidance, **given)[0]
        return train_motion(solid_ball(0.5), recipe, guidance, **given)[0]

    if case.stop_after is not None:
        with suppress(Interrupted):
            run(case.stop_after)
        processes.wait()  # until it is written
    return {"scene": run().state_dict(), "losses": losses, "said": said}


def main() -> None:
    """Join the others, train, and save what came out in this process."""
    torch.set_num_threads(1)
    processes, _ = join_processes(torch.device("cpu"))
    for name in sys.argv[2:]:
        folder = Path(sys.argv[1]) / name
        folder.mkdir(exist_ok=True)
        torch.save(train(CASES[name], 1, folder, processes), folder / f"{processes.rank}.pt")
    processes.wait()
    leave_processes()


if __name__ == "__main__":
    main()
