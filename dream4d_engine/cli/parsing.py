"""From words on the command line to a command's dataclass; usage errors as one line."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import tyro

from ..assets import config_from_dict
from ..documents import as_object, describe, field, read_document, text_fault
from ..training.checkpoint import first_difference
from ..training.config import (
    IMAGE_RECIPES,
    MOTION_RECIPES,
    STATIC_RECIPES,
    StaticRecipe,
    find_recipe,
    is_toy,
    with_hifa_steps,
    with_view_limit,
)
from ..training.loop import ResumeMismatch
from .arguments import (
    Animate,
    AnimateCall,
    Bench,
    Convert,
    FolderOptions,
    ImageTo3D,
    ImageTo3DCall,
    ImageTo4D,
    ImageTo4DCall,
    Import,
    Info,
    Priors,
    Render,
    TextTo3D,
    TextTo3DCall,
    TextTo4D,
    TextTo4DCall,
)
from .terminal import say

T = TypeVar("T")
RECORD = "run.json"
_MARKERS = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)


class UsageError(ValueError):
    """Something on the command line that can't be understood."""


def _text_recipe(name: str) -> StaticRecipe:
    if name in IMAGE_RECIPES:
        raise UsageError(f"the recipe {name!r} starts from an image: use dream4d image-to-3d or image-to-4d")
    return find_recipe(name, STATIC_RECIPES)


def _image_recipe(name: str) -> StaticRecipe:
    if name in STATIC_RECIPES:
        raise UsageError(f"the recipe {name!r} starts from a sentence: use dream4d text-to-3d or text-to-4d")
    return find_recipe(name, IMAGE_RECIPES)


def _motion_for(static: StaticRecipe) -> str:
    """The name of the second stage's recipe that goes with a first stage."""
    return "toy" if is_toy(static) else "zeroscope-144x80"


def _default_text_to_3d(options: TextTo3D) -> TextTo3DCall:
    return TextTo3DCall(options, _text_recipe(options.recipe))


def _default_image_to_3d(options: ImageTo3D) -> ImageTo3DCall:
    return ImageTo3DCall(options, _image_recipe(options.recipe))


def _default_animate(options: Animate) -> AnimateCall:
    return AnimateCall(options, find_recipe(options.recipe, MOTION_RECIPES))


def _default_text_to_4d(options: TextTo4D) -> TextTo4DCall:
    static = _text_recipe(options.recipe)
    motion = options.motion_recipe or _motion_for(static)
    return TextTo4DCall(replace(options, motion_recipe=motion), static, find_recipe(motion, MOTION_RECIPES))


def _default_image_to_4d(options: ImageTo4D) -> ImageTo4DCall:
    static = _image_recipe(options.recipe)
    motion = options.motion_recipe or _motion_for(static)
    return ImageTo4DCall(replace(options, motion_recipe=motion), static, find_recipe(motion, MOTION_RECIPES))


@dataclass(frozen=True)
class Command:
    """`call`: what parsing gives; `options`: what `--help` shows, all of it where there is no recipe."""

    call: type
    options: type
    default: Callable[[Any], Any] | None = None


COMMANDS = {
    "text-to-3d": Command(TextTo3DCall, TextTo3D, _default_text_to_3d),
    "image-to-3d": Command(ImageTo3DCall, ImageTo3D, _default_image_to_3d),
    "animate": Command(AnimateCall, Animate, _default_animate),
    "text-to-4d": Command(TextTo4DCall, TextTo4D, _default_text_to_4d),
    "image-to-4d": Command(ImageTo4DCall, ImageTo4D, _default_image_to_4d),
    "render": Command(Render, Render),
    "import": Command(Import, Import),
    "info": Command(Info, Info),
    "bench": Command(Bench, Bench),
    "priors": Command(Priors, Priors),
    "convert": Command(Convert, Convert),
}


def help_text() -> str:
    """The text of `dream4d --help`."""
    lines = [f"  {name:<12}{(command.options.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "dream4d: from a sentence or an image to a moving object.",
            "",
            "usage: dream4d COMMAND ... (dream4d COMMAND --help says more)",
            "",
            *lines,
            "",
            'For example: dream4d text-to-4d "a red cube is jumping" --out demo',
        ]
    )


def parse(name: str, words: Sequence[str]) -> Any:
    """Parse the words after the command's name. `--help` prints the usual flags, `--help-all` every one."""
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
    command, prog = COMMANDS[name], f"dream4d {name}"
    _check_empty(name, words)
    if command.default is None:
        return _tyro(command.call, words, prog)
    return _check_texts(_parse_call(name, command, words, prog))


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


def _parse_call(name: str, command: Command, words: Sequence[str], prog: str) -> Any:
    """Parse the words of a command that has recipes."""
    if "--help-all" in words:
        words = ["--help", *(w for w in words if w != "--help-all")]
    elif "--help" in words or "-h" in words:
        print_more = f"Every number of the recipe is a flag too: {prog} --help-all [--recipe NAME] lists them."
        with _after(print_more):
            return _tyro(command.options, words, prog)
    unfinished = _peek(words, "--resume")
    if unfinished is not None:
        return _parse_resumed(name, command, words, Path(unfinished))
    peeked = {"recipe": _peek(words, "--recipe"), "motion_recipe": _peek(words, "--motion-recipe")}
    known = {key: value for key, value in peeked.items() if value is not None and hasattr(command.options, key)}
    default = command.default(command.options(**known))
    return _with_shorthands(_tyro(command.call, words, prog, default))


def _check_texts(call: Any) -> Any:
    """Refuse prompts that couldn't be written down with the result."""
    for name in ("prompt", "object_prompt"):
        text = getattr(call.options, name, None)
        fault = None if text is None else text_fault(text)
        if fault is not None:
            raise UsageError(f"{'the prompt' if name == 'prompt' else '--object-prompt'} {fault}")
    return call


def _parse_resumed(name: str, command: Command, words: Sequence[str], folder: Path) -> Any:
    """Parse on top of the settings of the run in `folder`; whatever is given must be equal to them."""
    saved = read_record(folder)
    if saved.get("command") != name:
        raise UsageError(
            f"{folder} holds a run of {describe(saved.get('command'))}: resume it with that command, not {name}, or "
            "start over with another --out"
        )
    try:
        default = config_from_dict(command.call, _renewed(saved.get("settings")), "settings")
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{folder / RECORD} can't be used to resume ({error}): start over in another folder"
        ) from error
    own = FolderOptions(resume=str(folder))
    default = replace(default, options=replace(default.options, folders=own))
    call = _with_shorthands(_tyro(command.call, words, f"dream4d {name}", default))
    if call.options.folders.out is not None and Path(call.options.folders.out) != folder:
        raise UsageError(f"--resume {folder} writes there: leave --out {call.options.folders.out} away")
    difference = first_difference(comparable(call), comparable(default))
    if difference:
        what = difference.removeprefix("options.")
        raise ResumeMismatch(f"{what}: resume with the same settings, or start over with another --out")
    return call


def _renewed(settings: Any) -> Any:
    """Settings of before under today's names."""
    options = settings.get("options") if isinstance(settings, dict) else None
    if not isinstance(options, dict) or "pictures" not in options:
        return settings
    return settings | {"options": {{"pictures": "images"}.get(name, name): value for name, value in options.items()}}


def settings_tree(call: Any) -> dict:
    """A command's settings as JSON holds them."""
    return json.loads(json.dumps(asdict(call)))


def comparable(call: Any) -> dict:
    """The settings that a resumed run must share with its beginning, as a tree."""
    tree = settings_tree(call)
    tree["options"] = {key: value for key, value in tree["options"].items() if key not in ("folders", "gpu", "machine")}
    tree["options"]["priors"].pop("download")  # how the models came here makes no difference
    return tree


def read_record(folder: Path) -> dict:
    """Read a run folder's run.json; what this program reads of it has the right types, or is missing."""
    path = folder / RECORD
    if not path.exists():
        raise UsageError(f"{folder} holds no run to resume: there is no {RECORD} in it")
    try:
        record = as_object(read_document(path, UsageError), path, UsageError)
        for name, kind in _FIELDS.items():
            if record.get(name) is None:
                record.pop(name, None)
            else:
                record[name] = field(record, name, kind, path, UsageError, kind())
        for name in _TABLES:
            table = as_object(record.get(name, {}), f"{path}: {name}", UsageError)
            for key, kind in ((key, _TABLES[name]) for key in table):
                table[key] = field(table, key, kind, f"{path}: {name}", UsageError, kind())
    except UsageError as error:
        raise UsageError(f"{error}; start over with another --out") from error
    return record


_FIELDS = {"status": str, "command": str, "source": str, "reference": str, "error": str, "stage": str}
_FIELDS |= {"settings": dict, "seconds": dict, "fits": dict, "nonfinite": dict, "resumed": list}
_FIELDS |= {"peak_memory_bytes": int, "step": int}
_TABLES = {"seconds": float, "fits": dict, "nonfinite": dict}


def _with_shorthands(call: Any) -> Any:
    """Move the shorthands (--steps, --motion-steps, --sd-view, --hifa-steps) into the recipes they stand for."""
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
    names = ("steps", "motion_steps", "sd_view", "hifa_steps")
    return replace(call, options=replace(options, **{key: None for key in names if hasattr(options, key)}))


def _peek(words: Sequence[str], flag: str) -> str | None:
    """The last value that `flag` has among the words, before they are parsed."""
    found = None
    for word, following in zip(words, [*words, None][1:], strict=True):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:  # --motion_recipe is understood too
            found = value if equals else following
    return found


@contextlib.contextmanager
def _after(text: str):
    try:
        yield
    finally:
        say(text)


def _tyro(kind: type[T], words: Sequence[str], prog: str, default: T | None = None) -> T:
    """Run tyro; its boxes of several lines become a UsageError of one."""
    given = {} if default is None else {"default": default}
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            return tyro.cli(kind, prog=prog, args=list(words), config=_MARKERS, **given)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise UsageError(one_line(complaints.getvalue(), prog)) from None


def one_line(box: str, prog: str) -> str:
    """The message of tyro's box: the lines up to its first rule, and the flag that may have been meant."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip("│|╭╮╰╯ ")
        if not line.lstrip().startswith(("╭", "╰", "+")) and text:
            if set(text) <= {"─", "-"}:
                parts.append([])
            else:
                parts[-1].append(text)
    if "╭" not in box:  # drawn without corners, the title is a part of its own
        parts = parts[1:] or parts
    message = _in_words(" ".join(parts[0]).rstrip(".")) or "the command line can't be understood"
    for part in parts[1:]:
        if part and part[0].startswith("Perhaps you meant"):
            message += f"; perhaps you meant {part[1].split()[0]}" if len(part) > 1 else ""
    return f"{message} (see {prog} --help)"


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
