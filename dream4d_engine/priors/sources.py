"""Where a model's parts come from, and what every place must be able to say and give."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..documents import first_line, printable, shortened
from .errors import PriorError
from .finite import check_finite
from .text import Tokenizer

PriorKind = Literal["image", "multiview", "novel_view", "pixel", "video"]
VectorKind = Literal["camera", "frame_time"]
PictureResize = Literal["corners", "antialiased"]

Device = torch.device | str


@dataclass(frozen=True)
class Facts:
    """What must be known of a model beside its networks.

    Args:
        image_size: (height, width) in pixels. n_frames: views or frames of a group, None for single pictures.
        vector: what its class embedding reads, None where it has none.
        group_attention: self-attention runs over a group (see view_attention.py).
        known_words: the whole vocabulary of a toy model, None where any prompt will do.
        negative_prompt: the one to use where nobody asks for another; None means the recipes' usual one.
        picture_resize: how a novel-view model's image encoder got its pictures in training (see clip_pixels).
        notes: sentences on what was assumed of it, to be said once before a run.
    """

    name: str
    kind: PriorKind
    image_size: tuple[int, int]
    n_frames: int | None = None
    vector: VectorKind | None = None
    group_attention: bool = False
    known_words: frozenset[str] | None = None
    negative_prompt: str | None = None
    license: str = "unknown"
    picture_resize: PictureResize = "corners"
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """A folder or a file that holds a model. Networks come frozen, in eval mode."""

    path: Path

    def facts(self, kind: PriorKind | None) -> Facts:
        """Say what the model is; `kind` overrides what the source says of itself."""
        ...

    def schedule(self) -> tuple[Tensor, str]:
        """Return (alphas_bar [T], prediction_type)."""
        ...

    def unet(self, dtype: torch.dtype, device: Device) -> nn.Module:
        """Load the UNet."""
        ...

    def vae(self, dtype: torch.dtype, device: Device) -> nn.Module | None:
        """Load the autoencoder; None where pictures are not encoded."""
        ...

    def vae_scaling(self) -> float | None:
        """Return what the autoencoder's latents are multiplied by; None where there is none."""
        ...

    def text_encoder(self, dtype: torch.dtype, device: Device) -> tuple[Tokenizer, nn.Module]:
        """Load the tokenizer and the text encoder."""
        ...

    def image_encoder(self, dtype: torch.dtype, device: Device) -> nn.Module:
        """Load the encoder of reference pictures."""
        ...

    def projection(self, device: Device) -> tuple[Tensor, Tensor]:
        """Return (weight, bias), float32, of the layer that turns [embedding, pose] into a token."""
        ...


def frozen(network: nn.Module, device: Device, what: Path | str) -> nn.Module:
    """Put a network on its device, to be used and not trained, after a look at all of its weights.

    Args:
        what: where they are from (a file, a folder of files, or words that name it), for the error about one that is
            no number.
    """
    network = network.to(device).eval().requires_grad_(False)
    check_finite(network.state_dict(), what)
    return network


def filled_network(
    class_name: str, config: Mapping[str, Any], state: Mapping[str, Tensor], what: str, device: Device
) -> nn.Module:
    """Build a diffusers network of exactly these tensors; they need not be copied, nor others made first.

    Args:
        what: names the network in the error that lists tensors which are missing, left over or of another shape.
    """
    import diffusers

    try:
        with torch.device("meta"):
            network = getattr(diffusers, class_name)(**config)
    except Exception as error:  # whatever diffusers and torch raise for sizes that don't fit one another
        raise PriorError(f"{what} can't be built as its configuration says ({first_line(error)})") from error
    wanted = network.state_dict()
    check_names({k: tuple(v.shape) for k, v in wanted.items()}, {k: tuple(v.shape) for k, v in state.items()}, what)
    network.load_state_dict(state, assign=True)
    return frozen(network, device, what)


def check_names(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise PriorError unless the given tensors are those of the network, none missing, none left over."""
    problems = {
        "missing": sorted(wanted.keys() - given.keys()),
        "not known": sorted(given.keys() - wanted.keys()),
        "of another shape": [k for k in sorted(wanted.keys() & given.keys()) if wanted[k] != given[k]],
    }
    found = [f"{_some(names)} {'is' if len(names) == 1 else 'are'} {why}" for why, names in problems.items() if names]
    if found:
        raise PriorError(f"{what} does not fit: {'; '.join(found)}")


def _some(names: list[str], most: int = 3) -> str:
    """A few names, and how many more."""
    rest = len(names) - most
    return ", ".join(shortened(printable(name), 120) for name in names[:most]) + (
        f" and {rest} more" if rest > 0 else ""
    )


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars over ours while it loads weights."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
