"""The commands about models: priors and convert."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from ..priors.convert import convert
from ..priors.identify import identify_all
from ..priors.weights import WEIGHTS, human_size
from .arguments import Convert, Priors
from .parsing import UsageError


def list_priors(options: Priors) -> int:
    """List the models of the recipes, or what there is below a folder."""
    if options.folder is not None:
        return _list_folder(options.folder, options.json)
    if options.json:
        print(json.dumps([asdict(w) | {"repositories": w.repositories} for w in WEIGHTS], indent=2))
        return 0
    for w in WEIGHTS:
        print(f"{w.id}: {w.name} ({w.kind})")
        places = [f"{w.home}{' (not there any more)' if w.gone else ''}{f', file {w.file}' if w.file else ''}"]
        print(f"    from     {'; '.join([*places, *w.mirrors])}")
        print(f"    size     {human_size(w.download)} to download, {human_size(w.memory)} of memory in half precision")
        print(f"    licence  {w.license}{f'; gated: {w.gate}' if w.gate else ''}")
        print(f"    checked  {w.checked}")
    print("Give one by its id, for example --image-prior sd21-base --download; nothing is fetched without --download.")
    return 0


def _list_folder(folder: str, as_json: bool) -> int:
    found = identify_all(folder)
    if as_json:
        print(json.dumps([{"path": str(f.path), "layout": f.layout, "kind": f.kind} for f in found], indent=2))
    else:
        print("\n".join(f"{f.kind or '-':<11} {f.layout:<17} {f.path}" for f in found) or f"no models below {folder}")
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
        print(f"note: {note}")
    print(f"{done.folder}: a model of kind {done.kind} ({', '.join(done.parts)}), {human_size(done.n_bytes)}")
    if not {"text_encoder", "image_encoder"} & set(done.parts):
        print("(the checkpoint has no encoder of prompts or pictures: the folder can't be told anything)")
    return 0
