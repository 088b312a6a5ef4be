"""What lies beside an OBJ or PLY file: materials (.mtl) and textures, whatever their names say of the maker's disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..documents import describe
from .container import read_bytes
from .images import MOST_PIXELS, BadImage, decode_image
from .record import Material

_WORDS = {"-blendu": 1, "-blendv": 1, "-cc": 1, "-clamp": 1, "-texres": 1, "-boost": 1, "-bm": 1, "-imfchan": 1}
_WORDS |= {"-type": 1, "-mm": 2}
_NUMBERS = ("-o", "-s", "-t")
"""Options before a texture's name, with how many words follow them, or one to three numbers."""


def find_beside(path: Path, name: str) -> Path | None:
    """The file that another one names, in its folder or below.

    Names lead to the disk of whoever exported the model (`C:\\work\\paint.png`, `../maps/paint.png`) or are written in
    other letters: the last part of such a name is looked for beside the model.
    """
    folder = path.absolute().parent
    plain = Path(name.replace("\\", "/"))
    wanted = [folder / plain, folder / plain.name]
    if name.replace("\\", "/").startswith("//"):  # Windows would ask another machine
        del wanted[0]
    for one in wanted:
        try:
            found = one.resolve()
            if found.is_file() and found.is_relative_to(folder.resolve()):
                return found
        except (OSError, ValueError, RuntimeError):
            continue
    for place in (one.parent for one in wanted):
        try:
            if not place.resolve().is_relative_to(folder.resolve()):
                continue
            alike = [one for one in place.iterdir() if one.name.lower() == plain.name.lower()]
            inside = (one for one in alike if one.is_file() and one.resolve().is_relative_to(folder.resolve()))
            match = next(inside, None)
        except (OSError, ValueError, RuntimeError):
            continue
        if match is not None:
            return match
    return None


def image_beside(path: Path, name: str, notes: list[str]) -> Tensor | None:
    """The texture that a file names, None (and a note) where it can't be had."""
    beside = find_beside(path, name)
    if beside is None:
        notes.append(f"the texture {describe(name)} is not beside the model: its material is shown without")
        return None
    try:
        return decode_image(read_bytes(beside, 16 * MOST_PIXELS), f"{path.name}: {name}")
    except BadImage as error:
        notes.append(f"the texture {describe(name)} {error}: its material is shown without")
        return None


def libraries_beside(path: Path, library: str) -> list[tuple[str, Path | None]]:
    """The .mtl file that a model names, or several: names may hold spaces. None: it isn't there."""
    several = find_beside(path, library) is None and any(find_beside(path, one) for one in library.split())
    return [(name, find_beside(path, name)) for name in (library.split() if several else [library])]


def texture_names(beside: Path) -> list[str]:
    """The textures that a .mtl file names."""
    return [_named(rest) for key, rest, _ in _lines(beside) if key == "map_kd" and rest]


def _lines(beside: Path) -> Iterator[tuple[str, str, str]]:
    """Of each line the first word, small, what follows it, and the whole."""
    for line in read_bytes(beside, 2**26).decode("utf-8-sig", "replace").splitlines():
        key, _, rest = line.strip().replace("\t", " ").partition(" ")
        yield key.lower(), rest.strip(), line


def read_mtl(path: Path, library: str, notes: list[str]) -> dict[str, Material]:
    """The materials of the .mtl file that a model names, or of several: names may hold spaces."""
    found: dict[str, Material] = {}
    for name, beside in libraries_beside(path, library):
        if beside is None:
            notes.append(f"the material file {describe(name)} is not beside the model: the model is shown white")
        else:
            found |= _materials(path, beside, notes)
    return found


def _materials(path: Path, beside: Path, notes: list[str]) -> dict[str, Material]:
    found: dict[str, Material] = {}
    name = ""
    for key, rest, line in _lines(beside):
        material = found.get(name)
        if key == "newmtl":
            name = rest
            found[name] = Material(name, double_sided=True)
        elif material is None or not rest:
            continue
        elif key == "map_kd":
            image = image_beside(path, _named(rest), notes)
            if image is not None:  # it stands in place of the colour: many programs write one that darkens it
                found[name] = replace(material, image=image, color=(1.0, 1.0, 1.0, 1.0))
        elif key in ("kd", "d", "tr"):
            try:
                numbers = [float(word) for word in rest.split()[-1 if key != "kd" else 0 :]]
            except ValueError:
                notes.append(f"{describe(line.strip())} of the material {name} can't be understood: it was left out")
                continue
            if key == "kd" and material.image is None:
                r, g, b = (min(max(part, 0.0), 1.0) if part == part else 0.0 for part in (numbers * 3)[:3])
                found[name] = replace(material, color=(r, g, b, 1.0))
            elif (key == "d" and numbers[0] < 1) or (key == "tr" and numbers[0] > 0):
                notes.append(f"the material {name} lets light through: it was taken as opaque")
    return found


def _named(rest: str) -> str:
    """The file's name behind the options of a texture."""
    words = rest.split(" ")
    while words and words[0] in (*_WORDS, *_NUMBERS):
        option, words = words[0], words[1:]
        if option in _WORDS:
            words = words[_WORDS[option] :]
        for _ in range(3 if option in _NUMBERS else 0):
            if words and _is_number(words[0]):
                words = words[1:]
        while words and not words[0]:
            words = words[1:]
    return " ".join(words)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
