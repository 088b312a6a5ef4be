"""Files that others wrote: what they really are, and their JSON or YAML with types, sizes and depths checked.

Everything here raises the error class that the caller names (a ValueError of its room), with the file and the field.
"""

from __future__ import annotations

import json
import math
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

MOST_BYTES = {"JSON": 2**24, "YAML": 2**17}
"""Of one document; the longest that any model or run comes with has some hundred thousand, of YAML some thousand. Half
a minute goes by over a million of YAML's."""
MOST_NODES, MOST_DEPTH = 2**20, 64
MOST_LETTERS = 2**16
"""Of a text that is kept with a result; a model reads some hundreds of a prompt's."""
_NUMBER = 40
_ENCODED = "save it in this encoding (not in UTF-16, as some editors and PowerShell do)"
_JOINERS = "\u200c\u200d"
"""Invisible, but part of Persian words and of many emoji."""
_MOST_NAME = 200
"""Bytes of a file's name: file systems take 255, and some letters may be added."""
_FORBIDDEN = '<>:"|?*'
_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"}
_DEVICES |= {f"{port}{number}" for port in ("COM", "LPT") for number in "123456789¹²³"}
_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
_NAMES |= {int: "a whole number", float: "a number"}


def parse_document(
    text: str | bytes, where: object, error: type[ValueError], form: str = "JSON", most_bytes: int | None = None
) -> Any:
    """Parse JSON or YAML. What is too large, too deep, or grows by references without end is refused.

    Args:
        text: UTF-8 with or without a mark at its beginning. where: the file, and the place in it, for the message.
        error: what is raised. form: "JSON" or "YAML". most_bytes: None: MOST_BYTES.
    """
    most = most_bytes or MOST_BYTES[form]
    if len(text) > most:
        raise error(f"{where} holds {len(text):,} bytes of {form}, more than {most:,}: it can't be meant")
    if form == "JSON" and MOST_NODES < (
        text.count(b",") + text.count(b"[") if isinstance(text, bytes) else text.count(",") + text.count("[")
    ):
        raise error(f"{where} holds more than {MOST_NODES:,} values: it can't be meant")
    if (
        isinstance(text, bytes) and b"\0" in text[:4] and any(text[:4])
    ):  # UTF-16 or UTF-32 without a mark; JSON and YAML hold no NUL
        raise error(f"{where} is no text in UTF-8: {_ENCODED}")
    try:
        plain = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        if form == "YAML":
            import yaml

            content = yaml.safe_load(plain)
        else:
            content = json.loads(plain)
    except UnicodeDecodeError as reason:
        raise error(f"{where} is no text in UTF-8: {_ENCODED}") from reason
    except RecursionError as reason:
        raise error(f"{where} is nested too deep to be read") from reason
    except Exception as reason:  # whatever the parsers raise
        raise error(f"{where} is not valid {form}: {first_line(reason)}") from reason
    _check_size(content, where, error)
    return content


def _check_size(content: Any, where: object, error: type[ValueError]) -> None:
    """Refuse trees of too many nodes, counted as if every reference were a copy, and too deep ones."""
    waiting, nodes = [(content, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        nodes += 1
        if nodes > MOST_NODES or depth > MOST_DEPTH:
            raise error(f"{where} is nested too deep or grows without end by its references: it can't be meant")
        if isinstance(node, Mapping):
            waiting += [(value, depth + 1) for value in node.values()]
        elif isinstance(node, list | tuple):
            waiting += [(value, depth + 1) for value in node]


def read_document(path: Path | str, error: type[ValueError], most_bytes: int | None = None) -> Any:
    """Read a .json, .yaml or .yml file; `most_bytes` None: of at most MOST_BYTES."""
    path = Path(path)
    form = "YAML" if path.suffix.lower() in (".yaml", ".yml") else "JSON"
    try:
        size, most = path.stat().st_size, most_bytes or MOST_BYTES[form]
        if size > most:
            raise error(f"{path} holds {size:,} bytes of {form}, more than {most:,}: it can't be meant")
        text = path.read_bytes()
    except OSError as reason:
        raise error(f"{path} can't be read: {reason.strerror or reason}") from reason
    strange = disguise(text[:512])
    if strange is not None:
        raise error(f"{path} {strange}")
    return parse_document(text, path, error, form, most_bytes)


def as_object(content: object, where: object, error: type[ValueError]) -> dict[str, Any]:
    """The content, which must be an object with text for names."""
    if not isinstance(content, Mapping):
        raise error(f"{where} must hold {_NAMES[dict]}, got {describe(content)}")
    strange = next((name for name in content if not isinstance(name, str)), None)
    if strange is not None:
        raise error(f"{where} has a name that is no text: {describe(strange)}")
    return dict(content)


def field(tree: Mapping[str, Any], name: str, kind: type[T], where: object, error: type[ValueError], default: T) -> T:
    """A field of an object, of one kind; the default where it is missing or null.

    A number must be finite; a float may be written as a whole number, and true is no number.
    """
    value = tree.get(name)
    if value is None:
        return default
    fits = isinstance(value, kind)
    if kind in (int, float):
        # compared, not converted: a whole number of JSON may be too long for a float
        fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if fits and (kind is float or value == int(value)):
            return kind(value)  # type: ignore[call-arg]
        fits = False
    if not fits:
        raise error(f"{where}: {name} must be {_NAMES[kind]}, got {describe(value)}")
    return value


def document_bytes(tree: Any) -> bytes:
    """A tree as the bytes of a JSON file of ours: null where a number isn't finite, names that are no text escaped."""
    tree = _without_nan(tree)
    try:
        return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a file's name that isn't UTF-8
        return (json.dumps(tree, indent=2) + "\n").encode()


def _without_nan(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _without_nan(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def describe(value: object) -> str:
    """A value as a message shows it: short, and on one line."""
    return shortened(printable(repr(value)), _NUMBER)


def shortened(text: str, most: int) -> str:
    """A text of no more than `most` letters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def printable(text: str) -> str:
    """A text without letters that move the cursor, color or clear a terminal, turn the line, or can't be encoded."""
    return "".join(c if c.isprintable() or c in _JOINERS else " " if c.isspace() else "\ufffd" for c in text)


def is_text(name: object) -> bool:
    """Whether a name or a word can be written in UTF-8; on Linux those of files can be any bytes."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def as_text(name: str) -> str:
    """A name of a file as it is, or with marks in the place of what can't be written in UTF-8."""
    return name if is_text(name) else printable(name)


def text_fault(text: str) -> str | None:
    """Why a text that is to be kept with a result can't be, as the end of a sentence; None where it can."""
    if "\0" in text:
        return "holds a NUL, which no text has: type it again"
    if not is_text(text):
        return "holds bytes that are no UTF-8, or halves of letters: type it again"
    if len(text) > MOST_LETTERS:
        return f"has {len(text):,} letters, more than {MOST_LETTERS:,}: shorten it"
    return None


def name_fault(name: str) -> str | None:
    """Why a file or folder can't have a name on every system, as the end of a sentence; None where it can.

    `name`: without separators. Names that Windows can't have are refused everywhere: files travel.
    """
    strange = next((letter for letter in name if letter in _FORBIDDEN or _moves(letter)), None)
    if strange is not None:
        return f"holds {strange!r}, which no file's name can have on every system"
    if len(name.encode()) > _MOST_NAME:
        return f"is longer than {_MOST_NAME} bytes"
    if name.partition(".")[0].strip().upper() in _DEVICES:
        return "is the name of a device on Windows"
    if name.endswith((" ", ".")):
        return f"ends in {name[-1]!r}, which Windows drops"
    return None


def _moves(letter: str) -> bool:
    """Whether a letter is none that is seen, but starts a line, turns it, or tells a terminal something."""
    return unicodedata.category(letter) in ("Cc", "Zl", "Zp") or letter in _TURNS


def first_line(error: object) -> str:
    """The first line of an error's text."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0].rstrip("."))


@contextmanager
def named(what: str) -> Iterator[None]:
    """Put the name of what somebody gave before the ValueError that says what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def disguise(head: bytes) -> str | None:
    """What a file is that was saved under another name, by its first bytes, as the end of a sentence; None: no idea."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return (
            "is a Git LFS pointer, not the file itself: fetch the contents (git lfs pull), or download it from the "
            "repository's page"
        )
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "is a web page saved under this name: download the file itself, logged in where its page asks for it"
    if not head:
        return "is empty: is the download complete?"
    return None
