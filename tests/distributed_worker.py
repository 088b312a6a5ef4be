"""What one of several processes does in test_processes.py: train a small scene and write down what came out."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch


def recipe_and_guidance(n_groups: int, stage: str):
    """A recipe with so many groups of views or takes, and a guidance whose answer depends on the noise it gets."""
    from training_cases import SMALL, motion_case, static_case

    from dream4d_engine.guidance.denoiser import Conditions
    from dream4d_engine.guidance.distillation import DistillationConfig, Guidance
    from dream4d_engine.guidance.noise import variance_preserving
    from dream4d_engine.schedules import constant
    from dream4d_engine.supervision import RegularizerWeights
    from dream4d_engine.training.config import GuidanceTerm, RandomBackground

    class Leaning:
        """Predicts the noisy images, shrunk."""

        image_size, n_frames = (8, 8), None
        noise = variance_preserving(torch.linspace(0.999, 0.01, 50))

        def encode(self, images):
            return 2 * images - 1

        def decode(self, z):
            return z / 2 + 0.5

        def denoise(self, x, sigma, conditions):
            return x / (1 + sigma[:, None, None, None, None] ** 2) + conditions.tokens.mean()

    def conditions(cameras):
        tokens = torch.ones(*cameras.shape, 1, 1)
        return Conditions(tokens), Conditions(0 * tokens)

    config = DistillationConfig(2.0, constant(0.1), constant(0.9), loss="multistep", n_steps=4, color_weight=0.1)
    if stage == "static":
        recipe, _, _, _ = static_case(steps=6, size=8)
        cameras = replace(recipe.cameras, azimuth_deg=(-180, 180))
        changes = {"scene": SMALL, "cameras": cameras}
    else:
        recipe, _, _, _, _ = motion_case(steps=6)
        changes = {"regularizers": RegularizerWeights()}  # rigidity is a mean over what a process sees of the object
    kind = recipe.guidance[0].prior
    phases = (replace(recipe.phases[0], n_groups=n_groups, height=8, width=8),)
    terms = (GuidanceTerm(kind, 1.0, config),)
    background = RandomBackground(probability=0.5)
    # where a gradient is almost 0, dividing it by its own size would make its last bits count
    optimizer = replace(recipe.optimizer, eps=1e-5)
    recipe = replace(recipe, phases=phases, guidance=terms, background=background, optimizer=optimizer, **changes)
    return recipe, {kind: Guidance("leaning", Leaning(), conditions, config)}


def train(n_groups: int, stage: str, processes, folder: Path):
    """Train and return (scene, losses seen)."""
    from training_cases import solid_ball

    from dream4d_engine.training.loop import RunControl
    from dream4d_engine.training.motion import train_motion
    from dream4d_engine.training.static import train_static

    recipe, guidance = recipe_and_guidance(n_groups, stage)
    steps = []
    checkpoint = folder / "run.checkpoint" if folder.is_dir() else None
    control = RunControl(checkpoint, {}, lambda report, scene: steps.append(report.step), processes=processes)
    if stage == "static":
        scene, _ = train_static(recipe, guidance, seed=3, device=torch.device("cpu"), control=control)
    else:
        ball = solid_ball(0.5)
        scene, _ = train_motion(ball, recipe, guidance, seed=3, device=torch.device("cpu"), control=control)
    return scene, steps


def main() -> None:
    """Join the others, train, and save this process's scene."""
    from dream4d_engine.training.processes import join_processes, leave_processes

    torch.set_num_threads(1)
    processes, _ = join_processes(torch.device("cpu"))
    for stage in ("static", "motion"):
        own = Path(sys.argv[1]) / stage / str(processes.rank)
        own.mkdir(parents=True)
        scene, steps = train(1, stage, processes, own)
        torch.save({"scene": scene.state_dict(), "steps": steps}, own / "result.pt")
    processes.wait()
    leave_processes()


if __name__ == "__main__":
    main()
