"""What all tests share: one thread, marks, and a closing line that says what was skipped and why."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from comfy_harness import Server, why_no_server

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # its kernels then run on the CPU; read when triton is imported
torch.set_num_threads(1)  # the tests' tensors are small: more threads only get in each other's way


def pytest_addoption(parser) -> None:
    """`--fuzz N` makes the tests that try files at random N times as long."""
    parser.addoption("--fuzz", type=int, default=1, metavar="N", help="N times as many rounds of the fuzzing tests")


def pytest_configure(config: pytest.Config) -> None:
    """Let several workers take the files in the order below, not those with the most tests first."""
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist's
        config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by what they need, where a fixture or the reason of a skip says it; see pyproject.toml.

    Files that train for minutes come first, or one worker is left alone with them in the end.
    """
    for item in items:
        if "server" in getattr(item, "fixturenames", ()):
            item.add_marker("server")
        if any(mark.kwargs.get("reason", "").startswith("no CUDA GPU") for mark in item.iter_markers("skipif")):
            item.add_marker("gpu")
        if not any(item.get_closest_marker(name) for name in ("server", "browser", "gpu", "slow")):
            item.add_marker("unit")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def fuzz(request) -> int:
    """How many times as many rounds as usual."""
    return request.config.getoption("--fuzz")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A ComfyUI server with this pack; what needs it is skipped where there is no ComfyUI."""
    reason = why_no_server()
    if reason:
        pytest.skip(reason)
    running = Server(tmp_path_factory.mktemp("comfyui"))
    try:
        running.start()
        running.libraries_at_start = running.inside()["libraries"]  # later on, other tests have loaded more
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def priors(tmp_path_factory) -> list[str]:
    """Flags that name tiny untrained models: the commands do the same with them as with good ones, but quickly."""
    from dream4d_engine.toyworld.models import ToySize, build_prior, save_prior

    folder = tmp_path_factory.mktemp("priors")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind in ("multiview", "video"):
            save_prior(build_prior(kind, ToySize((8, 8, 16), (1, 1, 2))), kind, folder / kind)
    return ["--multiview-prior", str(folder / "multiview"), "--video-prior", str(folder / "video")]


def pytest_terminal_summary(terminalreporter) -> None:
    """Say in one line how many tests were skipped, by reason."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(_reason(report) for report in reports)
    text = "; ".join(f"{count}x {reason}" for reason, count in reasons.most_common()) or "none"
    terminalreporter.write_line(f"skipped: {text}")


def _reason(report: pytest.TestReport) -> str:
    detail = report.longrepr
    return (detail[2] if isinstance(detail, tuple) else str(detail)).removeprefix("Skipped: ")
