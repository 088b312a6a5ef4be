"""The commands about models: priors and convert."""

from __future__ import annotations

from dataclasses import asdict

import torch

from ..priors.formats.convert import convert
from ..priors.formats.identify import identify_all
from ..priors.formats.weights import WEIGHTS, human_size
from .arguments import Convert, Priors
from .parsing import UsageError
from .terminal import say, say_json


def list_priors(options: Priors) -> int:
    """List the models of the recipes, or what there is below a folder."""
    if options.folder is not None:
        return _list_folder(options.folder, options.json)
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


def _list_folder(folder: str, as_json: bool) -> int:
    found = identify_all(folder)
    if as_json:
        say_json([{"path": str(f.path), "layout": f.layout, "kind": f.kind} for f in found])
    else:
        lines = [f"{f.kind or '-':<11} {f.layout:<17} {f.path}" for f in found]
        say(*lines or [f"no models below {folder}"])
    return 0


def convert_checkpoint(options: Convert) -> int:
    """Turn a checkpoint into a folder in diffusers' format."""
    if options.out.exists() and not options.overwrite:
        raise UsageError(f"{options.out} exists: choose another --out, or --overwrite")
    done = convert(
        options.checkpoint,
        options.out,
        options.kind,
        config=options.config,
        dtype=torch.float16 if options.half else None,
        overwrite=options.overwrite,
    )
    for note in done.notes:
        say(f"note: {note}")
    say(f"{done.folder}: a model of kind {done.kind} ({', '.join(done.parts)}), {human_size(done.n_bytes)}")
    if not {"text_encoder", "image_encoder"} & set(done.parts):
        say("(the checkpoint has no encoder of prompts or images: the folder can't be told anything)")
    return 0
