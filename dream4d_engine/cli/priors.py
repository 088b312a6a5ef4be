"""List the full-size models: where they are, their size, licence, gate and memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

from ..priors.formats.identify import identify_all
from ..priors.formats.weights import WEIGHTS, human_size
from .command import Command
from .options import FOLDER, Machine, MachineOptions
from .terminal import say, say_json


@dataclass(frozen=True)
class ListPriors:
    json: bool = False
    """As JSON, for programs."""
    folder: Annotated[str | None, FOLDER] = None
    """List what can be used of the models below this folder instead (ComfyUI's "models", say)."""
    machine: Machine = MachineOptions()


def run(options: ListPriors) -> int:
    """List the models of the recipes, or what there is below a folder."""
    if options.folder is not None:
        found = identify_all(options.folder)
        if options.json:
            say_json([{"path": str(f.path), "layout": f.layout, "kind": f.kind} for f in found])
        else:
            lines = [f"{f.kind or '-':<11} {f.layout:<17} {f.path}" for f in found]
            say(*lines or [f"no models below {options.folder}"])
        return 0
    if options.json:
        say_json([asdict(w) | {"repositories": w.repositories} for w in WEIGHTS])
        return 0
    for w in WEIGHTS:
        say(f"{w.id}: {w.name} ({w.kind})")
        places = [f"{w.home}{' (not there any more)' if w.gone else ''}{f', file {w.file}' if w.file else ''}"]
        say(f"    from     {'; '.join([*places, *w.mirrors])}")
        say(f"    size     {human_size(w.download)} to download, {human_size(w.memory)} of memory in half precision")
        say(f"    licence  {w.license}{f'; gated: {w.gate}' if w.gate else ''}")
        say(f"    checked  {w.checked}")
    say("Give one by its id, for example --image-prior sd21-base --download; nothing is fetched without --download.")
    return 0


COMMAND = Command(ListPriors, run)
