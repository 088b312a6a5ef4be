"""The way in and out of a command: which one, what it returns, and every expected error as one line."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .interrupts import INTERRUPTED
from .terminal import prepare, say

if TYPE_CHECKING:
    from .arguments import MachineOptions

ERROR = 2


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (None: the process's own) names and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    prepare()
    try:
        return _dispatch(words)
    except SystemExit as end:  # --help
        return int(end.code or 0)
    except KeyboardInterrupt:
        say("stopped", error=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except Exception as error:
        return _report(error, words)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        from .parsing import help_text

        say(*help_text().splitlines())
        return 0
    if words[0] in ("--version", "version"):
        from .. import __version__

        say(f"dream4d {__version__}")
        return 0
    _quieten(may_download="--download" in words)
    from ..documents import is_text
    from .parsing import UsageError, parse

    strange = next((word for word in words if not is_text(word)), None)
    if strange is not None:  # tokenizers and safetensors take no such words and paths
        raise UsageError(
            f"{ascii(strange)} is no text in UTF-8: set the terminal to UTF-8 (on Linux LC_ALL=C.UTF-8), or rename the "
            "file or folder that it names"
        )

    name, options = words[0], parse(words[0], words[1:])
    _set_machine(getattr(options, "options", options).machine)
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


def _set_machine(machine: MachineOptions) -> None:
    """Refuse a device that is not there, whatever the command; set the number of threads."""
    import torch

    from ..machine import pick_device

    pick_device(machine.device)
    most = max(64, os.cpu_count() or 1)
    if machine.threads is None:
        return
    if not 1 <= machine.threads <= most:
        raise ValueError(f"--threads must lie in [1, {most}], got {machine.threads}: one for each core is best")
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
        say(*traceback.format_exception(error), error=True)
    if isinstance(error, Interrupted | Stopped):
        say(str(error), error=True)
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
    say(f"dream4d: error: {' '.join(text.split())}", error=True)
    return ERROR


def _out_of_memory(error: Exception) -> str | None:
    """What to lower, if the error says that memory ran out."""
    import torch

    text = str(error)
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if not is_memory and not ("DefaultCPUAllocator" in text or "out of memory" in text.lower()):
        return None
    return (
        "out of memory: lower the images' size (--static.phases.N.height and .width, or --motion...), "
        "the samples (--static.scene.n-samples), the grids (log2-entries), or --size for videos"
    )
