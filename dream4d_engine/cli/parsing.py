"""From words on the command line to a command's dataclass; usage errors as one line."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields, make_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from ..assets import config_from_dict
from ..documents import describe, is_text, text_fault
from ..training.checkpoint import first_difference
from ..training.config import with_hifa_steps, with_loop, with_motion_strength, with_view_limit
from ..training.loop import ResumeMismatch
from .command import Command, find_command
from .errors import UsageError
from .options import Flat, FolderOptions
from .run_folder import RECORD, comparable, read_record, settings_tree
from .terminal import say

T = TypeVar("T")
# a recipe's parts that may be absent would be subcommands; --no-x is said only of what is on by default
_MARKERS = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)


def parse_line(words: Sequence[str]) -> tuple[Command, Any]:
    """Return the command that the words name and what its `run` takes, as fields of one object."""
    strange = next((word for word in words if not is_text(word)), None)
    if strange is not None:  # tokenizers and safetensors take no such words and paths
        raise UsageError(
            f"{strange!a} is no text in UTF-8: set the terminal to UTF-8 (on Linux LC_ALL=C.UTF-8), or rename the "
            "file or folder that it names"
        )
    return find_command(words[0]), parse(words[0], words[1:])


@cache
def call_type(command: Command) -> type:
    """A dataclass of what a command's `run` takes: its options, as flags without a prefix, and recipes."""
    kinds = get_type_hints(command.run)
    recipes = [(stage, kinds[stage]) for stage in ("static", "motion") if stage in kinds]
    return make_dataclass("Call", [("options", Annotated[command.options, Flat]), *recipes], frozen=True)


def parse(name: str, words: Sequence[str]) -> Any:
    """Parse the words after the command's name. `--help` prints the usual flags, `--help-all` every one."""
    command = find_command(name)
    call, about = call_type(command), sys.modules[command.run.__module__].__doc__
    _check_empty(name, words)
    n_recipes = len(fields(call)) - 1
    if not n_recipes:
        return call(_tyro(command.options, words, name, about))
    if "--help-all" in words:
        words = ["--help", *(w for w in words if w != "--help-all")]
        about = f"`{name}` with every number of its recipe{'s' if n_recipes > 1 else ''}."
    elif "--help" in words or "-h" in words:
        try:
            return call(_tyro(command.options, words, name, about))
        finally:
            say(f"Every number of the recipe is a flag too: dream4d {name} --help-all [--recipe NAME] lists them.")
    unfinished = _peek(words, "--resume")
    if unfinished is not None:
        found = _parse_resumed(name, call, words, Path(unfinished))
    else:
        # the recipe first: its numbers are the defaults of the flags
        peeked = {"recipe": _peek(words, "--recipe"), "motion_recipe": _peek(words, "--motion-recipe")}
        known = {key: value for key, value in peeked.items() if value is not None and hasattr(command.options, key)}
        default = call(*command.with_recipes(command.options(**known)))
        found = _with_shorthands(_tyro(call, words, name, about, default))
    for key, what in (("prompt", "the prompt"), ("object_prompt", "--object-prompt")):
        text = getattr(found.options, key, None)
        fault = None if text is None else text_fault(text)
        if fault is not None:  # it couldn't be written down with the result
            raise UsageError(f"{what} {fault}")
    return found


def _check_empty(name: str, words: Sequence[str]) -> None:
    """Refuse what a shell makes of a variable that isn't set: as a path, an empty word is the folder we are in.

    A prompt that is empty is refused where it is missed.
    """
    for before, word in zip([name, *words], words, strict=False):
        flag = word[:-1] if word.endswith("=") else before if not word else ""
        if flag.startswith("--") and "=" not in flag and flag not in ("--prompt", "--object-prompt"):
            raise UsageError(f"{flag} is empty: give it a value, or leave it away")
    if words and not words[0] and not name.startswith("text-"):
        raise UsageError(f"{name} is given an empty name: say which file is meant")


def _parse_resumed(name: str, kind: type, words: Sequence[str], folder: Path) -> Any:
    """Parse on top of the settings of the run in `folder`; whatever is given must be equal to them."""
    default = recorded_call(name, folder)
    call = _with_shorthands(_tyro(kind, words, name, None, default))
    if call.options.folders.out is not None and Path(call.options.folders.out) != folder:
        raise UsageError(f"--resume {folder} writes there: leave --out {call.options.folders.out} away")
    ours, theirs = (comparable(settings_tree(*vars(one).values())) for one in (call, default))
    difference = first_difference(ours, theirs)
    if difference:
        what = difference.removeprefix("options.")
        raise ResumeMismatch(f"{what}: resume with the same settings, or start over with another --out")
    return call


def recorded_call(name: str, folder: Path) -> Any:
    """What the run of the command in `folder` was begun with, by its record, to be resumed there."""
    saved = read_record(folder)
    if saved.get("command") != name:
        raise UsageError(
            f"{folder} holds a run of {describe(saved.get('command'))}: resume it with that command, not {name}, or "
            "start over with another --out"
        )
    kind = call_type(find_command(name))
    try:
        settings = saved.get("settings")
        if isinstance(settings, dict) and isinstance(options := settings.get("options"), dict):
            # "pictures": their name in runs of before
            settings = settings | {"options": {{"pictures": "images"}.get(k, k): v for k, v in options.items()}}
        default: Any = config_from_dict(kind, settings, "settings")
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{folder / RECORD} can't be used to resume ({error}): start over in another folder"
        ) from error
    own = FolderOptions(resume=str(folder))  # wherever it was when it began: folders may be moved
    return replace(default, options=replace(default.options, folders=own))


def _with_shorthands(call: Any) -> Any:
    """Move the shorthands (--steps, --sd-view, --hifa-steps and their like) into the recipes they stand for."""
    options = call.options
    steps, motion_steps = options.steps, getattr(options, "motion_steps", None)
    view, hifa = getattr(options, "sd_view", None), getattr(options, "hifa_steps", None)
    if hasattr(call, "static"):
        if steps is not None:
            call = replace(call, static=replace(call.static, steps=steps))
    else:
        motion_steps = steps
    if view is not None:
        call = replace(call, static=with_view_limit(call.static, view))
    if motion_steps is not None:
        call = replace(call, motion=replace(call.motion, steps=motion_steps))
    if hifa is not None:
        call = replace(call, motion=with_hifa_steps(call.motion, hifa))
    if (frames := getattr(options, "gradient_frames", None)) is not None:
        call = replace(call, motion=replace(call.motion, gradient_frames=frames or None))
    if getattr(options, "loop", False):
        call = replace(call, motion=with_loop(call.motion))
    strength = getattr(options, "motion_strength", None)
    if strength is not None:
        call = replace(call, motion=with_motion_strength(call.motion, strength))
    # the recipe alone says it from now on, so that --steps 9 and --static.steps 9 are the same settings
    names = ("steps", "motion_steps", "sd_view", "hifa_steps", "gradient_frames", "motion_strength")
    said = dict.fromkeys(names) | {"loop": False}
    return replace(call, options=replace(options, **{key: no for key, no in said.items() if hasattr(options, key)}))


def _peek(words: Sequence[str], flag: str) -> str | None:
    """The last value that `flag` has among the words, before they are parsed."""
    found = None
    for word, following in zip(words, [*words, None][1:], strict=True):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:  # --motion_recipe is understood too
            found = value if equals else following
    return found


def _tyro(kind: type[T], words: Sequence[str], name: str, about: str | None, default: T | None = None) -> T:
    """Run tyro; its boxes of several lines become a UsageError of one."""
    prog, complaints = f"dream4d {name}", io.StringIO()
    cli = partial(tyro.cli, kind, prog=prog, description=about, args=list(words), config=_MARKERS)
    try:
        with contextlib.redirect_stderr(complaints):
            return cli() if default is None else cli(default=default)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        flags = [field.name.replace("_", "-") for field in fields(find_command(name).options)]
        raise UsageError(one_line(complaints.getvalue(), prog, flags)) from None


def one_line(box: str, prog: str, flags: Collection[str] = ()) -> str:
    """The message of tyro's box: the lines up to its first rule, and the flag, one of `flags`, that may be meant."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip("│|╭╮╰╯ ")
        if not line.lstrip().startswith(("╭", "╰", "+")) and text:  # "+": where the terminal knows ASCII alone
            if set(text) <= {"─", "-"}:  # a rule: what follows is help
                parts.append([])
            else:
                parts[-1].append(text)
    if "╭" not in box:  # drawn without corners, the title is a part of its own
        parts = parts[1:] or parts
    message = _in_words(" ".join(parts[0]).rstrip(".")) or "the command line can't be understood"
    twin = _twin(message, flags)
    if twin is not None:
        return f"{message}; perhaps you meant {twin} (see {prog} --help)"
    for part in parts[1:]:
        if part and part[0].startswith("Perhaps you meant"):
            message += f"; perhaps you meant {part[1].split()[0]}" if len(part) > 1 else ""
    return f"{message} (see {prog} --help)"


def _twin(message: str, flags: Collection[str]) -> str | None:
    """What is meant by a flag of another command: --frames where there is one stage is --motion-frames of two."""
    unknown = re.match(r"Unrecognized options: --([\w-]+)", message)
    if unknown is None:
        return None
    name = unknown[1].replace("_", "-")
    other = name.removeprefix("motion-") if name.startswith("motion-") else f"motion-{name}"
    return f"--{other}" if other in flags else None


_KINDS = {"int": "whole number", "float": "number"}


def _in_words(message: str) -> str:
    """What tyro says of a value that is no number, in the words of people."""
    message = re.sub(r"^Error parsing [A-Z]\w*: (?=--)", "", message)  # a command's own check: it names the flag
    several = re.match(
        r"Error parsing (\S+): Could not parse arguments \[(.*)\] into tuple type .*?(int|float)", message
    )
    if several:
        return f"{several[1]} takes {_KINDS[several[3]]}s, got {several[2]}"
    flag = re.match(r"Error parsing (\S+): ", message)
    kind = re.search(r"invalid literal for (int)\(\)|could not convert string to (float)", message)
    value = re.search(r"instantiated from \[(.*?)\]\.|: ('[^']*'|\"[^\"]*\")$", message)
    if not (flag and kind and value):
        return message
    return f"{flag[1]} must be a {_KINDS[kind[1] or kind[2]]}, got {value[1] or value[2]}"
