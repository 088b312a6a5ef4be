"""The way in and out of a command: which one, what it returns, and every expected error as one line."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from .interrupts import INTERRUPTED

ERROR = 2


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (None: the process's own) names and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what the terminal's encoding doesn't
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _dispatch(words)
    except SystemExit as end:  # --help
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except Exception as error:
        return _report(error, words)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        from .parsing import help_text

        print(help_text())
        return 0
    if words[0] in ("--version", "version"):
        from .. import __version__

        print(f"dream4d {__version__}")
        return 0
    _quieten(may_download="--download" in words)
    from ..machine import is_text
    from .parsing import UsageError, parse

    strange = next((word for word in words if not is_text(word)), None)
    if strange is not None:  # tokenizers and safetensors take no such words and paths
        raise UsageError(
            f"{ascii(strange)} is no text in UTF-8: rename that file or folder, or set the terminal to UTF-8 (on Linux "
            "LC_ALL=C.UTF-8)"
        )

    name, options = words[0], parse(words[0], words[1:])
    _set_threads(options)
    if name in ("text-to-3d", "image-to-3d", "animate", "text-to-4d", "image-to-4d"):
        from . import runs

        return runs.COMMANDS[name](options)
    if name == "bench":
        from .bench import bench

        return bench(options)
    if name in ("priors", "convert"):
        from . import priors

        return {"priors": priors.list_priors, "convert": priors.convert_checkpoint}[name](options)
    from . import files

    return {"render": files.render, "import": files.import_file, "info": files.info}[name](options)


def _set_threads(options: object) -> None:
    import torch

    machine = getattr(options, "options", options).machine
    if machine.threads is None:
        return
    if machine.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {machine.threads}")
    torch.set_num_threads(machine.threads)


def _quieten(may_download: bool) -> None:
    """Keep the libraries' advice to programmers away from people who type commands, and the network from them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if not may_download:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded without being asked for
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


def _report(error: Exception, words: list[str]) -> int:
    """Print one line about an error and return the exit code."""
    from ..training.loop import Interrupted, TrainingDiverged
    from .interrupts import Stopped

    if "--debug" in words:
        traceback.print_exc()
    if isinstance(error, Interrupted | Stopped):
        print(error, file=sys.stderr)
        return getattr(error, "code", INTERRUPTED)
    memory = _out_of_memory(error)
    if memory is not None:
        text = memory
    elif isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    elif isinstance(error, ValueError | TrainingDiverged):
        text = str(error)
    elif isinstance(error, ImportError):
        text = f"{error}: install dream4d with its dependencies (pip install -e .)"
    else:
        text = f"unexpected {type(error).__name__}: {error} (this is a defect; --debug shows where)"
    print(f"dream4d: error: {' '.join(text.split())}", file=sys.stderr)
    return ERROR


def _out_of_memory(error: Exception) -> str | None:
    """What to lower, if the error says that memory ran out."""
    import torch

    text = str(error)
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if not is_memory and not ("DefaultCPUAllocator" in text or "out of memory" in text.lower()):
        return None
    return (
        "out of memory: lower the pictures' size (--static.phases.N.height and .width, or --motion...), "
        "the samples (--static.scene.n-samples), the grids (log2-entries), or --size for videos"
    )
