"""Names to save under: what their placeholders stand for, and what can be no name. Knows no ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path, PurePosixPath

from ..dream4d_engine.documents import describe, name_fault, text_fault

_EXAMPLE = "take one such as 'dream4d/scene'"
_MOST_BYTES, _MOST_PATH = 1000, 240
"""Of a whole prefix, in bytes; of a whole path on Windows, in letters (which takes 260 unless told otherwise)."""
_UNSAFE = re.compile(r'[/?<>\\:*|"\x00-\x1f\x7f]')
_DATE = {"d": "day", "M": "month", "h": "hour", "m": "minute", "s": "second"}


def fill_in(prefix: str, graph: Mapping | None, now: datetime) -> str:
    """Replace what the front end replaces in core's own saving nodes: %date:yyyy-MM-dd% and %Title.widget%.

    `graph`: the queued prompt, whose nodes are found by title or class. What can't be found stays as it is; ComfyUI
    itself replaces %year% and its sisters afterwards.
    """

    def replacement(found: re.Match) -> str:
        parts = found[1].split(".")
        if len(parts) != 2:  # of a date, too, the front end takes only what stands before a dot
            return _date(parts[0][5:], now) if parts[0].startswith("date:") else found[0]
        value = _widget(graph or {}, *parts)
        return found[0] if value is None else _UNSAFE.sub("_", value)

    return re.sub("%([^%]+)%", replacement, prefix)


def _date(form: str, now: datetime) -> str:
    """A date in the front end's letters: yyyy, yy, M, d, h, m, s, the last five once or twice."""

    def part(found: re.Match) -> str:
        letters = found[0]
        if letters[0] == "y":
            return {"yy": f"{now.year}"[2:], "yyyy": f"{now.year}"}.get(letters, letters)
        return f"{getattr(now, _DATE[letters[0]])}".rjust(len(letters), "0")

    return re.sub("dd?|MM?|hh?|mm?|ss?|yyy?y?", part, form)


def _widget(graph: Mapping, title: str, widget: str) -> str | None:
    """The value of a widget in the queued prompt, of the first node of this class, else of this title."""
    nodes = [node for node in graph.values() if isinstance(node, Mapping)]
    named = [node for node in nodes if node.get("class_type") == title]
    named += [node for node in nodes if (node.get("_meta") or {}).get("title") == title]
    for node in named[:1]:
        value = (node.get("inputs") or {}).get(widget)
        if isinstance(value, str | int | float):
            return f"{value}".lower() if isinstance(value, bool) else f"{value}"
    return None


def prefix_fault(prefix: str, root: Path, windows: bool) -> str | None:
    """Why files can't be saved under this prefix below `root`, as a sentence; None where they can.

    Names that Windows can't have are refused everywhere: workflows and their files travel.
    """
    fault = text_fault(prefix)
    if fault is not None:
        return f"filename_prefix {fault}"
    shown = describe(prefix)
    plain = prefix.replace("\\", "/")
    if not plain.strip() or plain.strip().endswith("/"):
        return f"{shown} is no name for a file: {_EXAMPLE}"
    path = PurePosixPath(plain)
    if not path.name:
        return f"{shown} is no name for a file: {_EXAMPLE}"
    if ".." in path.parts or path.is_absolute() or re.match("[A-Za-z]:", plain):
        return f"{shown} leads out of the output folder: {_EXAMPLE}"
    if len(plain.encode()) > _MOST_BYTES:
        return f"filename_prefix is {len(plain.encode()):,} bytes long, more than {_MOST_BYTES:,}: shorten it"
    for part in path.parts:
        # the last one is only how the name begins: what it ends in is no end
        fault = name_fault(part if part != path.name else part.rstrip(" ."))
        if fault is not None:
            return f"{describe(part)} in filename_prefix {fault}: {_EXAMPLE}"
    place = root / path
    if windows and len(str(place)) > _MOST_PATH:
        return f"filename_prefix makes a path of {len(str(place))} letters, more than Windows takes: shorten it"
    try:
        if not place.parent.resolve().is_relative_to(root):
            return f"{shown} leads out of the output folder: {_EXAMPLE}"
        above = next(folder for folder in place.parents if folder.exists() or folder.is_symlink())
    except (OSError, RuntimeError) as error:  # a circle of links, no right to look
        return f"{shown} can't be used: {getattr(error, 'strerror', None) or error}"
    return None if above.is_dir() else f"{above.name!r} in filename_prefix is a file, not a folder: take another name"
