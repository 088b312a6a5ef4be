"""One process at a time: a file that names who is at work and is locked for as long as that process lives.

The system lets the lock go when its process ends, however it ends; what stays behind of the file then means nothing.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

from .documents import printable, shortened

logger = logging.getLogger(__name__)

_TRIES, _PAUSE = 5, 0.05
"""Somebody who only looks holds the lock for a moment."""
_WINDOWS_BYTE = 2**30
"""On Windows nobody else may read bytes that are locked: one far behind the text is."""
_HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)


class InUse(ValueError):
    """Another process works on the same thing."""


@dataclass(frozen=True, eq=False)
class Lock:
    """A lock that this process holds until `release`."""

    path: Path
    file: BinaryIO | None  # None where the file system knows no locks

    def release(self) -> None:
        """Let others in, and remove the file."""
        if self.file is None or self.file.closed:
            return
        with contextlib.suppress(OSError):  # while it is locked, so that it is nobody else's; Windows lets it stay
            self.path.unlink()
        with contextlib.suppress(OSError):
            _unlock(self.file)
        self.file.close()
        if os.name == "nt":
            with contextlib.suppress(OSError):
                self.path.unlink()


def take(path: Path, what: object) -> Lock:
    """Lock a file, made if needed, or raise InUse with who holds it; `what` is worked on, for the message.

    Where the file system has no locks the work goes on without, and the log says so. OSError where the file can't be
    made.
    """
    who = ""
    for _ in range(_TRIES):
        file = open(path, "a+b")  # noqa: SIM115 (it stays open as long as the lock is held)
        try:
            _lock(file)
            if not _is_at(file, path):  # its holder has just removed it
                file.close()
                continue
        except OSError as error:
            who = _said(file)
            file.close()
            if error.errno in _HELD:
                time.sleep(_PAUSE)
                continue
            logger.warning("%s: no locks on this file system (%s): don't start two runs there", path.parent, error)
            return Lock(path, None)
        _say(file)
        return Lock(path, file)
    raise InUse(in_use(what, who))


def in_use(what: object, who: str) -> str:
    """What to say of something that is worked on."""
    return f"{what} is being worked on by {who or 'another process'}: wait until it is done, or stop it first"


def holder(path: Path) -> str | None:
    """Who holds the lock of a file, as words; None: nobody, or nobody knows."""
    try:
        file = open(path, "r+b")  # noqa: SIM115
    except OSError:
        return None
    with file:
        who = _said(file)
        try:
            _lock(file)
        except OSError as error:
            return (who or "another process") if error.errno in _HELD else None
        with contextlib.suppress(OSError):
            _unlock(file)
    return None


def _lock(file: BinaryIO) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(_WINDOWS_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unlock(file: BinaryIO) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(_WINDOWS_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _say(file: BinaryIO) -> None:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    with contextlib.suppress(OSError):  # on a full disk the lock holds without words
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node() or 'this machine'}, since {now}".encode())
        file.flush()


def _said(file: BinaryIO) -> str:
    with contextlib.suppress(OSError):
        file.seek(0)
        return shortened(printable(file.read(300).decode("utf-8", "replace")), 200).strip()
    return ""
