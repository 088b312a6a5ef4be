"""Run the package at the lowest versions that pyproject.toml allows: `python tests/floors.py`.

It makes a virtual environment with exactly these, takes a toy prompt to a moving object in a few steps, and runs the
tests that touch the libraries most. Where they can't be had (another Python, no network, no room), it says so and
ends well. Room for about 12 GB and some minutes are needed: the oldest torch comes with CUDA.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ((3, 10), (3, 11))  # that all of the lowest versions have wheels for
ROOM = 12 * 10**9
TESTS = ("test_assets.py", "export/test_export.py", "nodes/test_nodes.py", "kernels/test_kernels.py")
TESTS = (*TESTS, *(f"priors/test_{name}.py" for name in ("folders", "weights", "lora")))
TIMING = "not small_share_of_the_time"  # measured in the main run, of today's versions
_ONE = re.compile(r"([A-Za-z][\w.-]*)>=([\w.]+)")


def floors(text: str) -> dict[str, str]:
    """The lowest versions that a list of requirements allows, by the name of the package."""
    return {found[1].lower().replace("_", "-"): found[2] for found in _ONE.finditer(text)}


def of_the_project(of: str = "dependencies") -> dict[str, str]:
    """Those of pyproject.toml's dependencies, or of one of its extras."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return floors(text.partition(f"\n{of} = [")[2].partition("\n]")[0])


def find_python() -> str | None:
    """A Python that the lowest versions were built for."""
    if sys.version_info[:2] in PYTHONS:
        return sys.executable
    for major, minor in reversed(PYTHONS):
        path = shutil.which(f"python{major}.{minor}")
        if path and subprocess.run([path, "-m", "venv", "--help"], capture_output=True).returncode == 0:
            return path
    return None


def why_not(place: Path) -> str | None:
    """Why the lowest versions can't be tried here, or None."""
    if sys.platform != "linux":
        return "the lowest versions are tried on Linux only"
    if find_python() is None:
        return "there is no Python 3.10 or 3.11, for which the lowest versions were built"
    free = shutil.disk_usage(place).free
    return f"{free / 1e9:.0f} GB are free, {ROOM / 1e9:.0f} are needed" if free < ROOM else None


def install(python: str, place: Path, versions: dict[str, str]) -> str | None:
    """Make an environment of exactly these versions; return why it can't be had, or None."""
    subprocess.run([python, "-m", "venv", place], check=True)
    exact = [f"{name}=={version}" for name, version in versions.items()]
    command = [place / "bin" / "python", "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *exact]
    done = subprocess.run([*command, "pytest>=8", "hypothesis>=6.100"], capture_output=True, text=True)
    wrong = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    if done.returncode:
        return wrong[0] if wrong else "pip can't install them"
    missing = [f"{name} {version}" for name, version in versions.items() if not _has(place, name, version)]
    assert not missing, f"not installed: {', '.join(missing)}"
    return None


def _has(place: Path, name: str, version: str) -> bool:
    code = f"import importlib.metadata as m; print(m.version({name!r}).partition('+')[0])"
    said = subprocess.run([place / "bin" / "python", "-c", code], capture_output=True, text=True).stdout.strip()
    return said.rstrip(".0") == version.rstrip(".0")


def main() -> int:
    """Try the lowest versions; return the exit code."""
    versions, start = of_the_project() | of_the_project("cpu"), time.monotonic()
    print("lowest versions:", ", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        reason = why_not(place) or install(str(find_python()), place / "venv", versions)
        if reason:
            print(f"lowest versions: not tried here: {reason}")
            return 0
        python = [str(place / "venv" / "bin" / "python"), "-m"]
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        steps = ["--steps", "2", "--motion-steps", "2", "--size", "32", "--orbit-frames", "2", "--part-frames", "2"]
        make = ["dream4d_engine", "text-to-4d", "a red cube is jumping", *steps, "--out", str(place / "run")]
        tests = ["pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", TIMING, *(f"tests/{name}" for name in TESTS)]
        for name, command in (("text-to-4d", make), ("tests", tests)):
            done = subprocess.run([*python, *command], cwd=ROOT, env=env, capture_output=True, text=True)
            if done.returncode:
                print(done.stdout[-8000:], done.stderr[-4000:], sep="\n")
                print(f"lowest versions: {name} failed")
                return 1
        made = {path.name for path in (place / "run").iterdir()}
        assert {"scene.safetensors", "video.mp4", "run.json"} <= made, made
        print(f"lowest versions: text-to-4d and {len(TESTS)} files of tests pass, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
