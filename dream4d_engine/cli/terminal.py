"""The one place where the commands write to a terminal or a pipe.

What users, files and models say may hold letters that move the cursor, color or clear a terminal, or that the
terminal's encoding doesn't have: none of them arrives there raw.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from contextlib import suppress

from ..documents import printable


def prepare() -> None:
    """Let no letter stop a line, and bring warnings here too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every stream that stands in for one can do it
            with suppress(ValueError, OSError):
                stream.reconfigure(errors="backslashreplace")
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(_Warnings(logging.WARNING))


def quieten(may_download: bool) -> None:
    """Keep the libraries' advice to programmers away from people who type commands, and the network from them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if not may_download:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded without being asked for
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # the variables are read when the libraries are imported, the levels hold where they were imported before
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


class _Warnings(logging.Handler):
    """Writes warnings to standard error, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), error=True)


def say(*lines: str, error: bool = False) -> None:
    """Write lines to standard output, or to standard error. Each stays one line, whatever it holds."""
    print("\n".join(map(printable, lines)), file=sys.stderr if error else sys.stdout, flush=True)


def say_json(content: object) -> None:
    """Write JSON to standard output. Every text in it stays true: what isn't printable is written as its number."""
    everything = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    text = json.dumps(content, indent=2, ensure_ascii=not everything)
    print("".join(c if c.isprintable() or c == "\n" else _escape(c) for c in text), flush=True)


def _escape(letter: str) -> str:
    """A letter as JSON can write any; beyond the first 65536 it takes two."""
    return f"\\u{ord(letter):04x}" if ord(letter) < 2**16 else json.dumps(letter)[1:-1]
