"""Files that a node may read or write: below ComfyUI's input and output folders, and the examples of the pack."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import folder_paths

from .prefixes import fill_in, prefix_fault

_RUNS = ("dream4d", "runs")


class PlaceError(ValueError):
    """A file that isn't there, lies elsewhere or can't be written; the message says which."""


def _roots() -> dict[str, Path]:
    folders = {
        "input": folder_paths.get_input_directory(),
        "output": folder_paths.get_output_directory(),
        "example": Path(__file__).parent / "examples",
    }
    return {name: Path(folder).resolve() for name, folder in folders.items()}


def files_below(suffixes: tuple[str, ...]) -> list[str]:
    """The files that end so, as "folder/name.safetensors [output]", the examples last, the newest first.

    The runs' own files are left out.
    """
    found: list[tuple[bool, float, str]] = []
    for label, root in _roots().items():
        for place, below, files in os.walk(root):
            if Path(place) == root / _RUNS[0]:
                below[:] = [name for name in below if name != _RUNS[1]]
            for path in (Path(place, name) for name in files if name.lower().endswith(suffixes)):
                try:
                    there = path.is_file() and path.resolve().is_relative_to(root)
                    changed = path.stat().st_mtime if there else 0.0
                except (OSError, RuntimeError):  # removed by now, or a link in a circle
                    continue
                if there:
                    found.append((label != "example", changed, f"{path.relative_to(root).as_posix()} [{label}]"))
    return [name for *_, name in sorted(found, reverse=True)]


def path_below(file: str, suffixes: tuple[str, ...], what: str) -> Path:
    """Return the place of a file named like those of `files_below`; PlaceError if it leads elsewhere or isn't there.

    Without a folder in brackets the input folder is meant. Links are followed before the check. `what` it should be
    stands in the message.
    """
    name, label = file.strip(), "input"
    for known in _roots():
        if name.endswith(f"[{known}]"):
            name, label = name.removesuffix(f"[{known}]").strip(), known
    root = _roots()[label]
    try:
        path = (root / name).resolve()
        inside, there = path.is_relative_to(root) and path != root, path.is_file()
    except (OSError, ValueError, RuntimeError):  # no name of a file at all
        inside = there = False
    if not inside:
        raise PlaceError(f"{file!r} does not lie in the {label} folder: choose a file from the list")
    if not there:
        raise PlaceError(f"there is no file {name!r} in the {label} folder")
    if path.suffix.lower() not in suffixes:
        raise PlaceError(f"{name!r} is no {what}: its name must end in {', '.join(suffixes)}")
    return path


def changed_at(find: Callable[[], Path], beside: Callable[[Path], Iterable[Path]]) -> str:
    """What is another text once the file that is found has changed, or one of those that are read with it."""
    try:
        path = find()
        found = [(one.name, one.stat()) for one in (path, *beside(path))]
    except (PlaceError, OSError):
        return ""
    return " ".join(f"{name!r} {stat.st_mtime_ns} {stat.st_size}" for name, stat in found)


@dataclass(frozen=True)
class NewFile:
    """A file below the output folder that isn't there yet."""

    path: Path
    saved: dict[str, str]
    """As ComfyUI's front end wants to hear of it."""

    @property
    def listed(self) -> str:
        """Its name below the output folder."""
        return "/".join(filter(None, (self.saved["subfolder"], self.saved["filename"])))


def new_file(prefix: str, graph: Mapping | None, suffix: str) -> NewFile:
    """The next file of this prefix, whose placeholders are filled in from the queued graph; its folder is made.

    Raises PlaceError for prefixes that lead elsewhere or that no file can have.
    """
    prefix = fill_in(prefix, graph, datetime.now())
    checked = check_prefix(prefix)
    if checked is not True:
        raise PlaceError(str(checked))
    root = folder_paths.get_output_directory()
    try:
        folder, name, counter, below, _ = folder_paths.get_save_image_path(prefix.replace("\\", "/"), root)
    except OSError as error:
        raise PlaceError(f"can't write into the folder of {prefix!r}: {error.strerror or error}") from error
    file = f"{name}_{counter:05}_{suffix}"
    return NewFile(Path(folder) / file, {"filename": file, "subfolder": below, "type": "output"})


def check_prefix(prefix: str) -> bool | str:
    """Return True, or why files can't be saved under this prefix, filled in as far as it can be."""
    fault = prefix_fault(fill_in(prefix, None, datetime.now()), _roots()["output"], os.name == "nt")
    return True if fault is None else fault
