"""The rules of the house, checked on the source itself: who may import whom, and what costs at import time."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dream4d_engine"

LEVELS = {
    "": 0,  # the package itself: its version
    "schedules": 0,
    "cameras": 0,
    "columns": 0,
    "division": 0,
    "documents": 0,
    "kernels": 0,
    "locks": 0,
    "machine": 0,
    "mesh": 0,
    "profiling": 0,
    "randomness": 0,
    "transfers": 0,
    "meshes": 1,
    "rays": 1,
    "fields": 1,
    "occupancy": 1,
    "guidance": 1,
    "priors": 1,
    "scene": 2,
    "assets": 3,
    "dream_in_4d": 3,
    "rendering": 3,
    "surface": 3,
    "export": 3,
    "supervision": 4,
    "training": 5,
    "toyworld": 5,
    "cli": 6,
    "__main__": 7,
}
SAME_LEVEL = {("cameras", "randomness"), ("cameras", "transfers"), ("priors", "guidance")}
SAME_LEVEL |= {("dream_in_4d", "assets"), ("surface", "rendering"), ("export", "surface")}
SAME_LEVEL |= {("locks", "documents"), ("occupancy", "fields"), ("toyworld", "training"), ("machine", "documents")}
SAME_LEVEL |= {("meshes", "fields"), ("kernels", "machine")}
"""Rooms of one level that may still be used, in this direction only."""
HEAVY = {"diffusers", "transformers", "accelerate", "av", "PIL", "matplotlib", "yaml", "safetensors", "triton"}
HEAVY |= {"numba", "tinycudann", "nerfacc", "scipy", "hypothesis", "pytest", "torchvision"}
HEAVY |= {"skimage", "fast_simplification", "xatlas", "trimesh", "ray"}
LIBRARY_CODE = {
    "kernels/numba_source.py": "numba",
    "kernels/triton_source.py": "triton",
    "kernels/triton_mlp_source.py": "triton",
    "priors/networks/fused_norm_source.py": "triton",
}
"""Code in one optional library's language and nothing else, itself imported only where that library is used."""
ONLY_IN_CLI = {"tyro", "rich"}
COMFY = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes"}

FILES = sorted(path for path in PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute name of each imported module, whether it is imported when the file is)."""
    package = ("dream4d_engine", *path.relative_to(PACKAGE).parent.parts)

    def walk(node: ast.AST, at_top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = ".".join(package[: len(package) - child.level + 1]) if child.level else ""
                module = ".".join(part for part in (base, child.module) if part)
                if (child.level and child.module is None) or module == "dream4d_engine":
                    yield from ((f"{module}.{alias.name}", at_top) for alias in child.names)
                else:
                    yield module, at_top
            else:
                inner = at_top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, inner and not is_type_checking(child))

    yield from walk(parse(path), True)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_rooms_import_downwards(path):
    room = room_of(path)
    assert room in LEVELS, f"{path.name} stands in a room without a level: {room!r}"
    for module, _ in imports(path):
        if not module.startswith("dream4d_engine."):
            continue
        other = module.split(".")[1]
        if other.startswith("__"):
            continue
        assert other in LEVELS, f"{path.name} imports {module}, which is no room"
        if other != room and (room, other) not in SAME_LEVEL:
            assert LEVELS[other] < LEVELS[room], f"{room} must not import {other}"


def test_training_knows_no_toy_world():
    for path in (PACKAGE / "training").rglob("*.py"):
        assert not any(module.startswith("dream4d_engine.toyworld") for module, _ in imports(path)), path.name


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_heavy_imports_happen_where_they_are_used(path):
    for module, at_top in imports(path):
        top = module.split(".")[0]
        assert top not in COMFY, f"{path.name} imports {module}: only nodes/ may know ComfyUI"
        of_file = LIBRARY_CODE.get(path.relative_to(PACKAGE).as_posix())
        assert not (at_top and top in HEAVY and top != of_file), f"{path.name} imports {module} at its top"
        inside = module.removeprefix("dream4d_engine.").replace(".", "/") + ".py"
        assert not (at_top and inside in LIBRARY_CODE), f"{path.name} imports {module} at its top"
        assert top not in ONLY_IN_CLI or room_of(path) == "cli", f"{path.name} imports {module}: that is cli's"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_loads_pickles(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("weights_only") == "True", f"{path.name}:{node.lineno}"
    assert not any(module.split(".")[0] in ("pickle", "dill", "joblib") for module, _ in imports(path))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_files() -> dict[str, set[str]]:
    """Of each module the modules of ours that it imports, wherever: at its top, in functions, for types alone."""
    modules = {module_of(path): path for path in FILES}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        found[name] = set()
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names if alias.name in modules}
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
                module = ".".join(part for part in (base, node.module) if part)
                if module in modules:  # a name may be a module of its own, or one that the module holds
                    places = (f"{module}.{alias.name}" for alias in node.names)
                    found[name] |= {place if place in modules else module for place in places}
    return found


def test_files_import_downwards():
    """No file imports one that imports it, directly or over others: so the files of a room have an order, too."""
    graph, state = imported_files(), {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        circle = (*trail[trail.index(name) :], name) if name in trail else ()
        assert not circle, f"imports in a circle: {' -> '.join(circle)}"
        if name not in state:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            state[name] = "done"

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("imported", ["import dream4d_engine.b", "from . import b", "from .b import x"])
@pytest.mark.parametrize("where", ["{}", "def f():\n    {}", "if TYPE_CHECKING:\n    {}"])
def test_circles_are_found(where, imported, tmp_path, monkeypatch):
    package = tmp_path / "dream4d_engine"
    package.mkdir()
    sources = {"__init__": "", "a": where.format(imported), "b": "from .c import x", "c": "from . import a"}
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "FILES", sorted(package.rglob("*.py")))
    with pytest.raises(AssertionError, match=r"circle: .*a -> .*b -> .*c -> .*a"):
        test_files_import_downwards()


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a statement loads in a fresh interpreter."""
    code = f"import sys; {statement}; print(*sys.modules)"
    words = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return {name.split(".")[0] for name in words}


def test_importing_the_package_loads_nothing_that_takes_time():
    assert not loaded_by("import dream4d_engine") & (HEAVY | ONLY_IN_CLI | {"torch", "numpy"})


def test_no_module_pulls_in_the_heavy_libraries():
    """Not even all modules together, beyond what torch and tyro load themselves."""
    files = [path for path in FILES if path.relative_to(PACKAGE).as_posix() not in LIBRARY_CODE]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = f"import torch, tyro, rich, sys; before = set(sys.modules); import {', '.join(names)}"
    modules = loaded_by(f"{code}; [sys.modules.pop(name) for name in before if name not in ('sys', 'time')]")
    assert not modules & HEAVY


def source_files() -> list[Path]:
    folders = (PACKAGE, ROOT / "nodes", ROOT / "tests")
    found = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".md", ".toml", ".js")]
    found = [path for path in found if "node_modules" not in path.parts]  # installed, not ours
    return sorted(found + [path for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".py", ".txt")])


def test_nothing_names_a_machine_or_a_workplace():
    words = ["/" + "work/", "/" + "root/", "/" + "home/", "TO" + "DO", "FIX" + "ME", "XX" + "X"]
    pattern = re.compile("|".join(map(re.escape, words)))
    for path in source_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not pattern.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_no_global_random_numbers_in_the_engine():
    """Randomness is an argument; only the training of the toy models, which diffusers initialises, is let off."""
    seeding = re.compile(r"\b(torch\.manual_seed|torch\.seed|random\.seed|np\.random\.\w+)\(")
    drawing = {f"torch.{name}" for name in ("rand", "randn", "randint", "randperm", "normal", "bernoulli")}
    for path in FILES:
        if room_of(path) == "toyworld":
            continue
        text = path.read_text(encoding="utf-8")
        assert not seeding.search(text), path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in drawing:
                assert any(k.arg == "generator" for k in node.keywords), f"{path.name}:{node.lineno}"


def test_ruff_is_content():
    pytest.importorskip("ruff", reason="ruff is not installed")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_version_is_said_once():
    from dream4d_engine import __version__

    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
