"""Two processes with a recipe are one process with twice its camera groups."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import distributed_worker
import pytest
import torch
from places import TESTS
from training_cases import CPU, solid_ball

from dream4d_engine.assets import load_scene, save_scene
from dream4d_engine.division import WHOLE, Division
from dream4d_engine.guidance.execution import Execution
from dream4d_engine.priors.files import toy_prior
from dream4d_engine.randomness import Draw, draw_rows
from dream4d_engine.supervision import gather, heaviest, rendered, views_of
from dream4d_engine.training.config import TOY_MOTION
from dream4d_engine.training.guidance import load_guidance, runtime_for
from dream4d_engine.training.loop import RunControl
from dream4d_engine.training.motion import motion_stage, train_motion
from dream4d_engine.training.plan import divided, plan_of
from dream4d_engine.training.processes import SINGLE, Processes, join_processes


def together(
    words: list[str], n: int = 2, kill: tuple[int, Callable[[], bool]] | None = None
) -> tuple[list[int], list[str], list[str]]:
    """Run a command in n processes, told what torchrun tells; return their exit codes, outputs and errors.

    `kill`: which of them is killed, and when.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    common = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "WORLD_SIZE": str(n)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]
    try:
        if kill is not None:
            while not kill[1]():
                assert all(process.poll() is None for process in started)
                time.sleep(0.02)
            started[kill[0]].kill()
        said = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], [out for out, _ in said], [err for _, err in said]


needs_gloo = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")


def check_cases(names: list[str], n: int, folder: Path) -> None:
    """Train cases in n processes, and compare what came out with one process's."""
    codes, _, errors = together([str(TESTS / "distributed_worker.py"), str(folder), *names], n)
    assert codes == [0] * n, errors
    for name in names:
        case = distributed_worker.CASES[name]
        (folder / name / "alone").mkdir()
        alone = distributed_worker.train(
            replace(case, stop_after=None), n if case.cameras else 1, folder / name / "alone"
        )
        first, *others = (torch.load(folder / name / f"{rank}.pt", weights_only=True) for rank in range(n))
        for key, value in alone["scene"].items():
            assert all(torch.equal(first["scene"][key], one["scene"][key]) for one in others), (name, key)
            torch.testing.assert_close(
                first["scene"][key], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
        assert [list(one["losses"]) for one in others] == [[]] * (n - 1), "one speaks"
        assert all(case.says in said for said in first["said"]), first["said"]
        if case.cameras:  # each reports the loss of its own
            assert list(first["losses"]) == list(alone["losses"])
        else:
            assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5), name


@needs_gloo
def test_three_processes_are_one_sooner_or_one_with_more_groups(tmp_path):
    check_cases(list(distributed_worker.CASES), 3, tmp_path)
    written = [(tmp_path / "windows" / f"{rank}.checkpoint").exists() for rank in range(3)]
    assert written == [True, False, False], "one writes"


@needs_gloo
def test_the_command_line_in_two_processes_writes_once_what_one_would(tmp_path):
    still, out, prompt = solid_ball(0.5), tmp_path / "out", "red cube jumping"  # no caption: measured quickly
    save_scene(tmp_path / "still.safetensors", still)
    words = ["animate", str(tmp_path / "still.safetensors"), prompt, "--steps", "2", "--motion.optimizer.eps", "1e-2"]
    words += ["--share", "work"]
    words += ["--motion.least-motion", "0", "--motion.first-levels", "4"]
    words += ["--size", "16", "--part-frames", "1", "--samples", "16", "--out", str(out), "--device", "cpu"]
    codes, outputs, errors = together(["-m", "dream4d_engine.cli", *words])
    assert codes == [0, 0], errors
    assert (out / "video.mp4").exists() and not (out / "unfinished").exists()
    assert "scene.safetensors" in outputs[0] and not outputs[1], "one speaks"
    assert "2 processes do each step together" in outputs[0] + errors[0]
    optimizer = replace(TOY_MOTION.optimizer, eps=1e-2)  # rounding, which processors differ in, is not made large
    recipe = replace(TOY_MOTION, steps=2, optimizer=optimizer, least_motion=0.0, first_levels=4)
    guidance = load_guidance(recipe, {"video": toy_prior("video")}, prompt, runtime_for(recipe, CPU))
    guidance = plan_of(guidance, Execution(groups_at_once=1))  # as each process asks it: batches differ in rounding
    alone, _ = train_motion(still, recipe, guidance, seed=0, device=CPU, control=RunControl())
    made, _ = load_scene(out / "scene.safetensors")
    assert alone.deformation.body.knots.abs().max() > 0.01, "it has moved"
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_what_is_checked_alone_is_said_once_and_what_has_no_use_is_said(tmp_path):
    words = ["-m", "dream4d_engine.cli", "text-to-3d", "a red cube", "--device", "cpu", "--dry-run", "--share", "work"]
    codes, outputs, errors = together(words)
    assert codes == [0, 0] and "nothing was found wrong" in outputs[0] and not outputs[1] and not any(errors)
    codes, _, errors = together(words, 1)
    assert codes == [0] and "note: --share work is for several processes of torchrun" in errors[0]


@needs_gloo
def test_a_mistake_in_two_processes_is_said_once_and_ends_both(tmp_path):
    (tmp_path / "file").write_text("x")
    words = ["text-to-3d", "a red cube", "--device", "cpu", "--out", str(tmp_path / "file")]
    codes, outputs, errors = together(["-m", "dream4d_engine.cli", *words])
    assert codes == [2, 0], "the second has nothing to do"
    assert "is a file" in errors[0] and "error" not in errors[1] and not any(outputs)


@needs_gloo
def test_who_is_left_says_that_another_process_is_gone_and_how_to_go_on(tmp_path):
    """One that is killed (by hand, or by the system for its memory) is no defect of the others."""
    out = tmp_path / "out"
    words = ["text-to-3d", "a red cube", "--device", "cpu", "--share", "work", "--out", str(out)]
    words += ["--static.loop.checkpoint-steps", "1", "--steps", "200"]
    saved = out / "unfinished" / "static.checkpoint"
    codes, _, errors = together(["-m", "dream4d_engine.cli", *words], kill=(1, saved.exists))
    assert codes == [2, -9] and errors[0].count("\n") == 1, errors[0]
    assert "another of the 2 processes is gone" in errors[0] and "defect" not in errors[0], errors[0]
    assert f"dream4d text-to-3d --resume {out} goes on from there" in errors[0], errors[0]


def test_shares_of_a_draw_make_up_the_whole():
    whole = draw_rows(torch.rand, (6, 2), Draw(4, 7).groups("rays", 6))
    parts = [draw_rows(torch.rand, (2, 2), Draw(4, 7, rank).groups("rays", 2)) for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole) and whole.unique().numel() == 12


def test_parts_are_whole_things_where_there_are_enough():
    assert Division(0, 4).counts(24, 10) == (60, 60, 60, 60) and Division(0, 3).counts(5, 2) == (4, 4, 2)
    assert Division(0, 4).counts(2, 5) == (3, 3, 2, 2) and Division(0, 4).counts(2) == (1, 1, 0, 0)
    assert [Division(rank, 3).own((4, 4, 2)) for rank in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert WHOLE.counts(5, 2) == (10,)


def test_ones_own_rows_carry_the_gradient():
    rows = torch.ones(2, 3, requires_grad=True)
    whole = Division(1, 3, rehearsed=True).gather(rows, (2, 2, 1))
    assert torch.equal(whole[2:4], rows) and not whole[:2].any() and not whole[4:].any()
    (whole * torch.arange(5.0)[:, None]).sum().backward()
    assert torch.equal(rows.grad, torch.tensor([[2.0] * 3, [3.0] * 3]))
    assert WHOLE.gather(rows, (2,)) is rows


def test_what_all_compute_counts_once():
    x = torch.tensor(3.0, requires_grad=True)
    value = Division(0, 4).once(x**2)
    value.backward()
    assert value == 9 and x.grad == 6 / 4


def test_a_rehearsed_step_waits_for_nobody():
    recipe, guidance = distributed_worker.moving(1, n_frames=5, as_takes=True, gradient_frames=2)
    stage, alone = motion_stage(solid_ball(0.5), recipe, 0, 1.0), Division(2, 3).rehearsal()
    supervisions, draw = stage.supervisions(divided(guidance, alone), None), Draw(0)
    views = views_of(supervisions, stage.scene, 0.0, draw, alone)
    views = {key: heaviest(view) for key, view in views.items()}
    seen = rendered(supervisions, stage.scene, views)
    terms = gather([one.loss(stage.scene, output, view, 0.0, draw) for one, view, output in seen])
    sum(terms.losses.values()).backward()
    last = list(stage.scene.deformation.mlp.parameters())[-1]  # the others wait for it to leave 0
    assert last.grad.any(), "frames with gradient are among its own"


def test_work_is_shared_where_there_is_an_image_for_everybody():
    two = Processes(rank=1, world_size=2)
    assert two.sharing("auto", 2).division == Division(1, 2) and two.sharing("auto", 2).place == 0
    assert two.sharing("auto", 1).division == WHOLE and two.sharing("auto", 1).place == 1
    assert two.sharing("work", 1).division == Division(1, 2)
    assert two.sharing("cameras", 8).division == WHOLE


def test_what_is_no_part_of_the_batch_is_the_same_for_all():
    drawn = [torch.randn(3, generator=Draw(4, 7, rank).for_("background")) for rank in range(3)]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_draws_differ_by_seed_step_purpose_and_group_and_by_nothing_else():
    def first(draw, purpose="rays", group=0):
        return torch.rand(1, generator=draw.for_(purpose, group)).item()

    others = [first(Draw(1, 2), "noise"), first(Draw(1, 2), group=1), first(Draw(1, 2), group=None)]
    others += [first(Draw(2, 2)), first(Draw(1, 3)), first(Draw(12, 2)), first(Draw(1, 22))]
    assert len({first(Draw(1, 2)), *others}) == 8
    assert first(Draw(1, 2, rank=5)) == first(Draw(1, 2)), "a group is one of the whole batch"


def test_a_process_by_itself_needs_no_team(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_processes(torch.device("cpu")) == (SINGLE, torch.device("cpu"))
    assert SINGLE.any(True) and not SINGLE.any(False)
    tensor = torch.ones(2)
    SINGLE.merge([tensor])
    assert torch.equal(tensor, torch.ones(2))


def test_a_device_that_cannot_be_shared_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="not mps"):
        join_processes(torch.device("mps"))
