"""Where things lie that tests read."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
DATA = TESTS / "data"
GOLDEN = DATA / "golden"  # what the reference implementation gives for its own checkpoints
GUIDANCE = DATA / "guidance"  # small networks and what the libraries' own pipelines make of them
CASES = DATA / "cases"  # files as people bring them
