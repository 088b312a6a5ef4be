"""The list of a batch: a scene a line, each checked by the command that will run it before the first one starts."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from tyro.conf import Positional

from ..documents import as_object, describe, disguise, name_fault, parse_document
from ..locks import InUse
from ..training.checkpoint import first_difference
from .batch_job import Job, begun
from .command import Command, find_command
from .errors import UsageError
from .options import FolderOptions, GpuOptions, MachineOptions
from .parsing import parse, recorded_call
from .run_folder import RECORD, comparable, settings_tree
from .runs import Checked
from .terminal import say

COMMANDS = ("text-to-4d", "text-to-3d", "image-to-4d", "image-to-3d", "animate")
"""What a line may run; the first one is meant where a line names none."""
_MOST_BYTES = 2**26
_MOST_SHOWN = 20  # faults
_OF_BATCH = {field.name for kind in (FolderOptions, MachineOptions) for field in fields(kind)}
_SLUG = 60


def read_list(path: Path, out: Path, on_cluster: bool, on_progress: Callable[[float], None]) -> list[Job]:
    """Read and check a list whose scenes go into folders of `out`.

    `on_cluster`: what this machine has says nothing of the one that runs them. `on_progress` is told the share done.
    Every fault is said, a line each, and UsageError raised where there is one.
    """
    lines = _lines_of(path)
    jobs: list[Job] = []
    names: dict[str, int] = {}  # as systems compare them that know no capitals: the line that has it
    faults, notes = [], dict[str, None]()
    for done, (number, text) in enumerate(lines):
        where = f"{path}, line {number}"
        try:
            job, said = _read_line(text, number, where, out, on_cluster)
            notes |= dict.fromkeys(said)
            key = unicodedata.normalize("NFC", job.name).casefold()
            if key in names:
                raise UsageError(
                    f"the name {describe(job.name)} is taken by line {names[key]}: give one of the two another "
                    '"name" (left out, it is made of prompt and seed)'
                )
            names[key] = number
            jobs.append(job)
        except (ValueError, TypeError, OSError) as error:  # of files, too, that can't be read
            fault = " ".join(str(error).split())
            faults.append(fault if fault.startswith(where) else f"{where}: {fault}")
        on_progress((done + 1) / len(lines))
    if notes:
        say(*notes, error=True)
    if len(faults) == 1:
        raise UsageError(faults[0])
    if faults:
        say(*faults[:_MOST_SHOWN], error=True)
        raise UsageError(f"{len(faults)} of the {len(lines)} lines of {path} can't be run: nothing was started")
    return jobs


def _lines_of(path: Path) -> list[tuple[int, bytes]]:
    """The lines that hold something, with their numbers."""
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise UsageError(f"{path} holds {size:,} bytes, more than {_MOST_BYTES:,}: it can't be a list of scenes")
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror or error}") from error
    strange = disguise(content[:512]) if content else None
    if strange is not None:
        raise UsageError(f"{path} {strange}")
    # only at line feeds: U+2028 may stand in a prompt
    lines = enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
    found = [(number, stripped) for number, line in lines if (stripped := line.strip())]
    if not found:
        raise UsageError(f'{path} is empty: write a line for each scene, for example {{"prompt": "a red cube"}}')
    return found


def _read_line(text: bytes, number: int, where: str, out: Path, on_cluster: bool) -> tuple[Job, list[str]]:
    """Make a job of a line, and notes of what is said of its models."""
    tree = as_object(parse_document(text, where, UsageError), where, UsageError)
    json.loads(text, object_pairs_hook=_only_once)
    command_name = tree.pop("command", COMMANDS[0])
    if command_name not in COMMANDS:
        raise UsageError(f"unknown command {describe(command_name)}: a batch runs {', '.join(COMMANDS)}")
    name, command = tree.pop("name", None), find_command(command_name)
    flags = _flags_of(tree)
    words = _words(command, command_name, flags)
    call = parse(command_name, words)
    settings, notes = _rehearse(command, call, on_cluster, may_download="download" in flags)
    if name is None:
        name = _name_of(call.options.prompt, call.options.seed, flags)
    _check_name(name)
    job = Job(
        number,
        name,
        command_name,
        tuple(words),
        out / name,
        call.options.prompt,
        call.options.seed,
        tuple((stage, settings[stage]["steps"]) for stage in ("static", "motion") if stage in settings),
    )
    _check_same(job, settings)
    return job, notes


def _only_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, no name twice: of two values one would be left out without a word."""
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{describe(twice)} is given twice: leave one of them out")
    return dict(pairs)


def _flags_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What a line says of its flags, by their names on the command line; null is as good as nothing."""
    flags: dict[str, Any] = {}
    for key, value in tree.items():
        flag = key.strip().lstrip("-").replace("_", "-")
        if flag.replace("-", "_") in _OF_BATCH:
            raise UsageError(
                f"{describe(key)} is for the whole batch: leave it out of the line, and give the batch "
                "--out, --device, --threads or --debug"
            )
        if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9.-]*", flag) or flag in ("help", "help-all", "h"):
            raise UsageError(
                f'{describe(key)} is no flag: write names as the command\'s --help does, as "motion-steps"'
            )
        if flag in flags:
            raise UsageError(f"--{flag} is given twice: leave one of them out")
        if value is not None:
            flags[flag] = value
    return flags


def _words(command: Command, name: str, flags: Mapping[str, Any]) -> list[str]:
    """The words after the command's name that mean the same as the flags."""
    hints = get_type_hints(command.options, include_extras=True)
    places = [key for key, hint in hints.items() if Positional in getattr(hint, "__metadata__", ())]
    words, switches = [_place(place, flags[place]) for place in places if place in flags], {}
    for flag, value in flags.items():
        if flag in places:
            continue
        if isinstance(value, bool):
            switches[flag] = value
        elif isinstance(value, list):
            words += [f"--{flag}", *_values(flag, value)]
        else:
            word = _value(flag, value)
            # what looks like a flag is tied to its own
            words += [f"--{flag}={word}"] if word.startswith("-") or not word else [f"--{flag}", word]
    missing = next((place for place in places if place not in flags), None)
    if switches or missing:
        call = parse(name, words)  # says of what may stand there in its place
        # a switch is said only where it isn't so already
        words += [_switch(flag, on) for flag, on in switches.items() if _find(call, flag) is not on]
    if missing:
        raise UsageError(f'there is no "{missing}": add it, {name} needs one')
    return words


def _place(place: str, value: Any) -> str:
    """The word of what has a place of its own, without a flag."""
    if not isinstance(value, str):
        raise UsageError(f"{place} must be text, got {describe(value)}")
    if value.startswith("-"):
        raise UsageError(f"{place} {describe(value)} begins with '-' and would be taken for a flag: change that")
    return value


def _switch(flag: str, on: bool) -> str:
    """A switch as tyro wants it: --static.a.no-b turns b off."""
    group, dot, last = flag.rpartition(".")
    return f"--{flag}" if on else f"--{group}{dot}no-{last}"


def _value(flag: str, value: Any) -> str:
    """One value as a word."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"--{flag} must be a text, a number, true or false, or a list of them, got {describe(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"--{flag} must be a finite number, got {value}")
    return str(value)


def _values(flag: str, values: Sequence[Any]) -> list[str]:
    """Several values as words, none of which is taken for a flag."""
    if not values:
        raise UsageError(f"--{flag} is an empty list: give it values, or leave it out")
    strange = next((value for value in values if isinstance(value, str) and value.startswith("-")), None)
    if strange is not None:
        raise UsageError(f"--{flag}: {describe(strange)} begins with '-' and would be taken for a flag: change that")
    return [_value(flag, value) for value in values]


def _find(call: Any, flag: str) -> Any:
    """The value that a flag has; None where there is no such flag."""
    recipe, dot, rest = flag.replace("-", "_").partition(".")
    if dot:
        node = getattr(call, recipe, None)
        for part in rest.split("."):
            inside = isinstance(node, list | tuple) and part.isdigit() and int(part) < len(node)
            node = node[int(part)] if inside else getattr(node, part, None)  # type: ignore[index]
        return node
    groups = [getattr(call.options, field.name) for field in fields(call.options)]
    holders = [call.options, *(group for group in groups if is_dataclass(group))]
    return next((getattr(holder, recipe) for holder in holders if hasattr(holder, recipe)), None)


def _name_of(prompt: str, seed: int, flags: Mapping[str, Any]) -> str:
    """A folder's name from what is in the line, so that it stays the same wherever the line stands."""
    plain = "".join(letter if letter.isalnum() else "-" for letter in prompt.lower())
    name = re.sub("-+", "-", plain).strip("-")[:_SLUG].rstrip("-")
    return f"{name}-{seed}" if name and "seed" in flags else name


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise UsageError(f"name must be text, got {describe(name)}")
    if "/" in name or "\\" in name:
        raise UsageError(f"the name {describe(name)} leads out of the batch's folder: take one without / and \\")
    if not name.strip() or name.startswith("."):
        raise UsageError(f'{describe(name)} is no name for a folder: give the line a "name" such as "cube"')
    fault = name_fault(name)
    if fault is not None:
        raise UsageError(f"the name {describe(name)} {fault}: take another one")


def _rehearse(command: Command, call: Any, on_cluster: bool, may_download: bool) -> tuple[dict, list[str]]:
    """Let the command check all that it can, files and models too; return its settings and what it noted."""
    options = replace(call.options, folders=FolderOptions(dry_run=True))
    if on_cluster:
        options = replace(options, gpu=GpuOptions(), machine=MachineOptions())
    said = io.StringIO()
    # the same is noted of every scene; of a download people want to see how far it is
    errors = contextlib.nullcontext() if may_download else contextlib.redirect_stderr(said)
    try:
        with contextlib.redirect_stdout(io.StringIO()), errors:
            command.run(**(vars(call) | {"options": options}))
    except Checked as checked:
        return checked.settings, said.getvalue().splitlines()
    raise AssertionError(f"{command.run.__module__} ran instead of being checked")


def _check_same(job: Job, settings: dict) -> None:
    """Refuse a line whose folder holds the run of another one: it would be skipped, or gone on with, as this one."""
    with contextlib.suppress(InUse):  # another batch of the same list may be at it
        if begun(job) == "new":
            return
    if not (job.folder / RECORD).is_file():
        return
    way_on = 'give the scene another "name", or move that folder away'
    try:
        theirs = settings_tree(*vars(recorded_call(job.command, job.folder)).values())
    except UsageError as error:
        raise UsageError(f"{error}; {way_on}") from error
    difference = first_difference(comparable(settings), comparable(theirs))
    if difference is not None:
        raise UsageError(f"{job.folder} holds another run ({difference.removeprefix('options.')}): {way_on}")
