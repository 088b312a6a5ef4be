"""What can be known to be wrong before anything runs: sockets, numbers, words.

ComfyUI asks `validate_inputs` when a prompt is queued; a text it returns is shown on the node. A function that asks
for `input_types` hears which sockets are connected, and to what, and has to check the types itself; one that names a
number has to check its range.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping

import comfy.model_management as management
from comfy_api.latest import Types, io

from ..dream4d_engine.documents import describe, is_text, printable, text_fault
from ..dream4d_engine.priors.handle import PriorHandle
from ..dream4d_engine.training.config import MotionRecipe, StaticRecipe
from .doors import DoorError, check_values
from .session import RunError, missing_prior, needed_priors
from .sockets import PriorPort, ScenePort, SceneValue

Verdict = bool | str
"""True, or what is wrong."""
_LEAST_BUDGET = 0.001
_CLASSES = {ScenePort.io_type: SceneValue, PriorPort.io_type: PriorHandle, io.Load3DCamera.io_type: Mapping}
_CLASSES |= {io.Mesh.io_type: Types.MESH, io.File3DAny.io_type: Types.File3D}


def at_the_door(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Let a node look at everything that comes in before it does anything; RunError names the input and the value.

    The choices that `validate_inputs` asks for are the node's own to look through, as they are for ComfyUI. What a node
    raises can be written in UTF-8: names of files needn't be, and ComfyUI's worker ends for good where it logs an error
    that says one.
    """
    inner = node.execute.__func__
    own = frozenset(inspect.signature(node.validate_inputs).parameters)

    @functools.wraps(inner)
    def execute(cls, **values):
        try:
            checked = check_values(cls.INPUT_TYPES(), values, _CLASSES, own)
        except DoorError as error:
            raise RunError(printable(str(error))) from None
        try:
            return inner(cls, **checked)
        except Exception as error:
            if _can_be_logged(error):
                raise
            raise RunError(printable(str(error))) from None

    node.execute = classmethod(execute)
    return node


def _can_be_logged(error: BaseException | None) -> bool:
    """Whether an error's text, and those of all that it came from, can be written in UTF-8."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if not is_text(error):
            return False
        error = error.__cause__ or error.__context__
    return True


def first_complaint(*verdicts: Verdict) -> Verdict:
    """The first thing that is wrong, or True."""
    return next((verdict for verdict in verdicts if verdict is not True), True)


def require(*verdicts: Verdict) -> None:
    """RunError with the first thing that is wrong."""
    complaint = first_complaint(*verdicts)
    if complaint is not True:
        raise RunError(str(complaint))


def described_inputs(node: type[io.ComfyNode]) -> dict[str, tuple[str | list, dict]]:
    """All inputs of a node, those of dynamic choices too, as name -> (type, options)."""
    return dict(_walk(node.INPUT_TYPES(), ""))


def _walk(groups: Mapping, prefix: str) -> Iterator[tuple[str, tuple[str | list, dict]]]:
    for group in ("required", "optional"):
        for name, (kind, *rest) in groups.get(group, {}).items():
            options = rest[0] if rest else {}
            yield prefix + name, (kind, options)
            for choice in options.get("options") or ():
                if isinstance(choice, Mapping):
                    yield from _walk(choice["inputs"], f"{prefix}{name}.")


def check_types(node: type[io.ComfyNode], connected: Mapping[str, str]) -> Verdict:
    """Compare what is connected with what the sockets take."""
    from comfy_execution.validation import validate_node_input

    known = described_inputs(node)
    for name, received in connected.items():
        wanted = known.get(name, ("*",))[0]
        if not validate_node_input(received, wanted):
            return f"type mismatch: the socket {name} takes {wanted}, but {received} is connected to it"
    return True


def check_budget(node: type[io.ComfyNode], gibibytes: float | None) -> Verdict:
    """A memory budget is for a GPU, and has to be in its range."""
    if not gibibytes:
        return True
    kind = management.get_torch_device().type
    if kind != "cuda":
        return f"memory_budget is for NVIDIA GPUs, and ComfyUI works on {kind} here: set it to 0"
    if 0 < gibibytes < _LEAST_BUDGET:
        return f"memory_budget must be 0 (no limit) or at least {_LEAST_BUDGET}, got {gibibytes}"
    return check_ranges(node, memory_budget=gibibytes)


def check_ranges(node: type[io.ComfyNode], **numbers: float | None) -> Verdict:
    """Compare numbers with the ranges of their widgets; None is one that isn't known yet.

    What ComfyUI couldn't turn into a number is still text, a list or an object here.
    """
    known = described_inputs(node)
    for name, value in numbers.items():
        options = known[name][1]
        low, high = options["min"], options["max"]
        if value is not None and not (isinstance(value, int | float) and low <= value <= high):
            return f"{name} is {describe(value)}: it must lie between {low} and {high}"
    return True


def recipe_name(choice: Mapping | str | None, name: str = "recipe") -> str | None:
    """The recipe that a dynamic choice names; ComfyUI leaves out the value of one that is none of its options."""
    return choice.get(name) if isinstance(choice, Mapping) else choice


def check_recipe(name: str | None, known: Mapping) -> Verdict:
    """Refuse a recipe that isn't known."""
    return True if isinstance(name, str) and name in known else f"unknown recipe: choose one of {', '.join(known)}"


def check_prompt(prompt: str | None, read: bool = True) -> Verdict:
    """Refuse an empty prompt, or one that no file can hold; None comes from another node and isn't known yet.

    `read`: whether a model is told it; where none is, it may be empty.
    """
    if prompt is None:
        return True
    fault = text_fault(prompt)
    if fault is not None:
        return f"the prompt {fault}"
    if read and not prompt.strip():
        return "the prompt is empty: say what to make, for example 'a red cube is jumping'"
    return True


def check_priors(recipe: StaticRecipe | MotionRecipe, connected: Mapping[str, str]) -> Verdict:
    """Refuse a recipe one of whose priors has no connection."""
    missing = (missing_prior(recipe, kind) for kind in needed_priors(recipe) if f"{kind}_prior" not in connected)
    return next(missing, True)


def check_image(recipe: StaticRecipe, image: bool, mask: bool, takes_images: Mapping[str, StaticRecipe]) -> Verdict:
    """Refuse an image where none is looked at, and none where one is needed."""
    names = ", ".join(takes_images)
    if recipe.reference is None and (image or mask):
        return f"the recipe {recipe.name!r} takes no image: choose {names}, or disconnect reference_image and its mask"
    if recipe.reference is not None and not image:
        return f"the recipe {recipe.name!r} makes a scene from an image: connect one to the socket reference_image"
    return True
