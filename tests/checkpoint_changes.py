"""Checkpoints of runs, written again with something in them changed."""

import torch

TABLE = "scene.canonical.grid.table"


def rewritten(source, path, change):
    """Write a checkpoint again after `change` has been made to its tensors and header."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, "pt") as file:
        header, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, header)
    save_file(tensors, path, header)
    return path


def put(name, make):
    def change(tensors, header):
        tensors[name] = make(tensors[name].clone())

    return change


def drop(beginning):
    def change(tensors, header):
        for name in [name for name in tensors if name.startswith(beginning)]:
            del tensors[name]

    return change


def say(**values):
    return lambda tensors, header: header.update(values)


def filled(value):
    return lambda tensor: tensor.flatten().index_fill(0, torch.tensor([1]), value).view_as(tensor)
