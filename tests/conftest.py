"""What all tests share: one thread, and a closing line that says what was skipped and why."""

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
    """`--fuzz N`: N times as many rounds with damaged files."""
    parser.addoption("--fuzz", type=int, default=1, metavar="N", help="N times as many rounds with damaged files")


@pytest.fixture
def fuzz(request) -> int:
    """How many times the usual number of rounds a test with damaged files shall make."""
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


def pytest_terminal_summary(terminalreporter) -> None:
    """Say in one line how many tests were skipped, by reason."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(_reason(report) for report in reports)
    text = "; ".join(f"{count}x {reason}" for reason, count in reasons.most_common()) or "none"
    terminalreporter.write_line(f"skipped: {text}")


def _reason(report: pytest.TestReport) -> str:
    detail = report.longrepr
    return (detail[2] if isinstance(detail, tuple) else str(detail)).removeprefix("Skipped: ")
