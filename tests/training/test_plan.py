"""Memory budgets: how they are written, and which plan is taken."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from dream4d_engine.guidance.distillation import DistillationConfig, Guidance
from dream4d_engine.guidance.noise import NoiseSchedule, rectified_flow, variance_preserving
from dream4d_engine.priors.architectures import random_network
from dream4d_engine.priors.networks.denoisers import UNetDenoiser, accelerated
from dream4d_engine.randomness import Draw
from dream4d_engine.schedules import constant
from dream4d_engine.supervision import gather, rendered, views_of
from dream4d_engine.training import plan as plans
from dream4d_engine.training.config import TOY_MOTION
from dream4d_engine.training.guidance import capture_for
from dream4d_engine.training.loop import Interrupted, RunControl
from dream4d_engine.training.motion import motion_stage, train_motion
from dream4d_engine.training.plan import LADDER, Plan, choose_plan, parse_bytes, plan_of
from dream4d_engine.training.processes import Processes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("10GiB", 10 * 2**30), ("1.5 gib", 3 * 2**29), ("800MiB", 800 * 2**20), ("8GB", 8 * 10**9), ("2e9", 2 * 10**9)],
)
def test_amounts_of_memory(text, n_bytes):
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "ten", "10 apples", "-1GiB", "1", "1e999", "GiB", "1.2.3GiB", "nan"])
def test_what_is_no_amount_of_memory_is_named(text):
    with pytest.raises(ValueError, match="10GiB"):
        parse_bytes(text)


def guidance():
    unet = torch.nn.Linear(1, 1)
    denoiser = UNetDenoiser(unet, variance_preserving(torch.linspace(0.99, 0.01, 5)), "epsilon", (8, 8))
    config = DistillationConfig(1.0, constant(0.5), constant(0.5))
    return {"image": Guidance("image", denoiser, lambda cameras: None, config)}


def test_the_first_plan_that_fits_is_taken():
    tried = []

    def fits(planned, plan):
        assert planned["image"].denoiser.execution == plan.execution
        tried.append(plan)
        return plan.execution.images_at_once is not None and plan.execution.images_at_once <= 4

    planned, plan = choose_plan(guidance(), fits)
    assert plan.execution == planned["image"].denoiser.execution
    assert plan == LADDER[6] and tried == list(LADDER[:7]), "from the fastest on"
    assert choose_plan(guidance(), lambda planned, plan: False) is None


def test_the_ladder_needs_less_at_each_rung():
    def size(plan: Plan) -> tuple[int, ...]:
        execution, large = plan.execution, 10**6
        kept = large if execution.images_kept is None else execution.images_kept
        at_once = (execution.images_at_once, execution.groups_at_once, plan.rays_at_once)
        return (kept, not execution.offload, plan.prefetches, *(n or large for n in at_once))

    for above, below in itertools.pairwise(LADDER):
        assert all(b <= a for a, b in zip(size(above), size(below), strict=True)) and size(above) != size(below)
    assert len({plan.describe() for plan in LADDER}) == len(LADDER)


@dataclass(frozen=True)
class Plain:
    """A denoiser that knows no plans."""

    image_size: tuple[int, int] = (8, 8)
    n_frames: int | None = None
    noise: NoiseSchedule = field(default_factory=rectified_flow)

    def run_as(self, execution):
        return self

    def forget(self):
        pass


def test_a_denoiser_without_plans_is_left_alone():
    given = {"image": replace(guidance()["image"], denoiser=Plain())}
    assert plan_of(given, LADDER[2].execution)["image"].denoiser is given["image"].denoiser


def test_a_budget_without_a_gpu_is_an_error():
    from training_cases import solid_ball

    with pytest.raises(ValueError, match="for GPUs.*cpu"):
        train_motion(
            solid_ball(0.5),
            replace(TOY_MOTION, guidance=()),
            {},
            seed=0,
            device=torch.device("cpu"),
            control=RunControl(memory_budget=2**30),
        )


@pytest.mark.parametrize("own", [True, False])
def test_what_others_take_of_a_budget_is_left_to_them(monkeypatch, own):
    """Beside PyTorch's allocator; and one that is told what may be asked of it is looked at for what it holds."""
    limits, looks = [], []

    def why_not(*given) -> str:
        looks.append(given[-1])
        return "too slow" if len(looks) == 1 else ""

    monkeypatch.setattr(plans, "has_own_allocator", lambda: own)
    monkeypatch.setattr(plans, "_give_back", lambda device: None)
    monkeypatch.setattr(plans, "limit_memory", lambda device, n, of=None: limits.append((n, of)))
    monkeypatch.setattr(plans, "_why_not", why_not)
    for name in ("memory_reserved", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    scene = SimpleNamespace(device=torch.device("cuda"), zero_grad=lambda set_to_none: None)
    weights = [("all", [torch.zeros(1000)], 1.0)]
    stage = SimpleNamespace(name="static", scene=scene, groups=weights, supervisions=lambda guidance, rays: ())
    told = []
    control = RunControl(memory_budget=16 * 2**30, memory_beside=4 * 2**30, on_plan=told.append)
    plans.plan_steps(stage, guidance(), control)
    left = 12 * 2**30
    allowed = plans.SHARE * left - 8000
    assert limits == [(allowed, left)] * 2 + [(left, None)]
    assert looks == [None if own else allowed] * 2 and len(told) == 1 and told[0].startswith("memory budget 16.0 GiB: ")
    with pytest.raises(ValueError, match=r"of 16.0 GiB is too small, the graph's models take 16.0 GiB beside what PyT"):
        plans.plan_steps(stage, guidance(), replace(control, memory_beside=16 * 2**30))
    monkeypatch.setattr(plans, "_why_not", lambda *given: "no")
    with pytest.raises(ValueError, match=r"fit into 16.0 GiB \(the graph's models take 4.0 GiB beside what PyTorch"):
        plans.plan_steps(stage, guidance(), control)


def test_the_command_line_refuses_budgets_that_mean_nothing(tmp_path, capsys):
    from dream4d_engine.cli import main

    words = ["text-to-3d", "a red cube", "--device", "cpu", "--out", str(tmp_path / "out"), "--memory-budget"]
    assert main([*words, "10GiB"]) == 2
    assert "--memory-budget is for GPUs" in capsys.readouterr().err
    assert main([*words, "lots"]) == 2
    assert "'lots' is no amount of memory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")),
    ],
)
def test_every_rung_of_the_ladder_takes_the_same_step(device):
    """A whole step with real networks: the gradient on the deformation is that of everything at once."""
    from network_cases import SMALL_UNET, SMALL_VAE, tokens_for, video_denoiser
    from training_cases import motion_case

    device = torch.device(device)
    recipe, given, _, still, _ = motion_case(steps=1)
    networks = [
        random_network("UNet3DConditionModel", {**SMALL_UNET, "attention_head_dim": 8}, device, torch.float64),
        random_network("AutoencoderKL", SMALL_VAE, device, torch.float64),
    ]
    denoiser = video_denoiser(*networks, device=device)
    denoiser = replace(denoiser, n_frames=6)
    ready = accelerated(denoiser, capture_for(device), compiled=False)
    guidance = {"video": replace(given["video"], denoiser=ready, conditions=tokens_for)}
    stage, draw = motion_stage(still.clone().to(device), recipe, seed=0), Draw(1)
    scene = stage.scene
    parameters = [p for p in scene.deformation.parameters() if p.requires_grad]
    found = []
    for plan in LADDER:
        # so few rays are rendered here that slices of the ladder's size would be all of them
        rays = None if plan.rays_at_once is None else plan.rays_at_once // 2**8
        supervisions = stage.supervisions(plan_of(guidance, plan.execution), rays)
        seen = rendered(supervisions, scene, views_of(supervisions, scene, 0.5, draw))
        terms = gather([one.loss(scene, output, view, 0.5, draw) for one, view, output in seen])
        loss = sum(terms.losses.values())
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append(torch.cat([g.flatten() for g in gradient if g is not None]).double())
    assert found[0].abs().max() > 0
    for plan, gradient in zip(LADDER, found, strict=True):
        difference = (gradient - found[0]).norm() / found[0].norm()
        assert difference < 1e-3, f"{plan.describe()}: the gradient differs by {difference:.2%}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: there is no memory to budget")
def test_a_budget_is_kept_on_a_gpu():
    from training_cases import static_case

    from dream4d_engine.training.static import train_static

    recipe, guides, _, _ = static_case(steps=3)
    told = []
    device = torch.device("cuda")
    try:
        control = RunControl(memory_budget=2**30, on_plan=told.append)
        train_static(recipe, guides, seed=0, device=device, control=control)
        assert told and torch.cuda.max_memory_reserved() <= 2**30
    finally:
        plans.limit_memory(device, None)


def test_a_run_can_be_stopped_before_its_first_step():
    RunControl().stop_if_asked("static")
    RunControl(should_stop=lambda: False).stop_if_asked("static")
    with pytest.raises(Interrupted, match="static stopped after step 0, not saved"):
        RunControl(should_stop=lambda: True).stop_if_asked("static")
    RunControl(should_stop=lambda: True, processes=Processes(rank=1, world_size=2)).stop_if_asked("static")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: there is no memory to budget")
def test_looking_for_a_plan_can_be_stopped():
    from training_cases import static_case

    from dream4d_engine.training.static import train_static

    recipe, guides, _, _ = static_case(steps=3)
    device, control = torch.device("cuda"), RunControl(should_stop=lambda: True, memory_budget=2**30)
    try:
        with pytest.raises(Interrupted, match="step 0"):
            train_static(recipe, guides, seed=0, device=device, control=control)
    finally:
        plans.limit_memory(device, None)
