"""Where a model's parts come from, and what every place must be able to say and give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ...documents import describe, field, printable, shortened
from ...guidance.noise import NoiseSchedule
from ..errors import PriorError
from ..handle import Device, PriorKind
from ..networks.denoisers import PredictionType
from ..networks.text import Tokenizer
from .configurations import built, network_arguments
from .finite import check_finite

VectorKind = Literal["camera", "frame_time"]
ImageResize = Literal["corners", "antialiased"]

FRAMES: dict[str, int] = {"multiview": 4, "video": 16}  # of a group, as MVDream and ModelScope were trained
MOST_FRAMES = 1024
ORBITS = (
    "of the kind of Stable Video Diffusion and SV3D; SV3D is read in ComfyUI alone, by the node Novel-View Prior from "
    "Model, with the recipe image-to-3d-orbit"
)
"""What to say of a model that is not read from files."""
_MOST_LEVELS = 12


@dataclass(frozen=True)
class Metadata:
    """What must be known of a model beside its networks."""

    name: str
    kind: PriorKind  # how it is conditioned
    image_size: tuple[int, int]  # (height, width) in pixels
    n_frames: int | None = None  # views or frames of a group, None for single images
    vector: VectorKind | None = None  # what its class embedding reads, None where it has none
    group_attention: bool = False  # self-attention runs over a group (see view_attention.py)
    known_words: frozenset[str] | None = None  # the whole vocabulary of a toy model, None where any prompt will do
    negative_prompt: str | None = None  # the one to use where nobody asks for another; None: the recipes' usual one
    license: str = "unknown"
    image_resize: ImageResize = "corners"  # how a novel-view model's image encoder got its images in training
    notes: tuple[str, ...] = ()  # sentences on what was assumed of it, to be said once before a run


def check_kind(kind: str, path: Path) -> PriorKind:
    """Return the kind; a kind of prior that there is not is refused."""
    for known in get_args(PriorKind):
        if known == kind:
            return known
    raise PriorError(f"{path}: unknown kind of prior {describe(kind)}; known are {', '.join(get_args(PriorKind))}")


def declared(ours: Mapping[str, Any], where: str, assumed: Metadata) -> Metadata:
    """What a model's own entry `dream4d` says of it (see folders.py), kind and image size apart.

    Args:
        where: the entry, for messages. assumed: what holds where it is silent.
    """

    def chosen(name: str, kinds: Any, default: Any) -> Any:
        value = ours.get(name, default)
        if value is not None and value not in get_args(kinds):
            raise PriorError(f"{where}: unknown {name} {describe(value)}; known are {', '.join(get_args(kinds))}")
        return value

    n_frames = field(ours, "n_frames", int, where, PriorError, assumed.n_frames or 0)
    if not 0 <= n_frames <= MOST_FRAMES:
        raise PriorError(f"{where}: n_frames is {n_frames:,}; 1 to {MOST_FRAMES} can be used")
    words = field(ours, "known_words", list, where, PriorError, None)
    strange = next((word for word in words or () if not isinstance(word, str)), None)
    if strange is not None:
        raise PriorError(f"{where}: known_words must hold text, got {describe(strange)}")
    return replace(
        assumed,
        name=field(ours, "name", str, where, PriorError, assumed.name),
        n_frames=n_frames or None,
        vector=chosen("vector", VectorKind, assumed.vector),  # null: none, whatever is usual
        group_attention=field(ours, "group_attention", bool, where, PriorError, assumed.group_attention),
        known_words=None if words is None else frozenset(words),
        negative_prompt=field(ours, "negative_prompt", str, where, PriorError, None),
        license=field(ours, "license", str, where, PriorError, assumed.license),
        image_resize=chosen("image_resize", ImageResize, assumed.image_resize) or assumed.image_resize,
    )


class Loader(Protocol):
    """A folder or a file that holds a model. Networks come frozen, in eval mode."""

    @property
    def path(self) -> Path:
        """Where it is."""

    def metadata(self, kind: PriorKind | None) -> Metadata:
        """Say what the model is; `kind` overrides what the source says of itself."""

    def schedule(self) -> tuple[NoiseSchedule, PredictionType]:
        """Return its noise levels, and what it predicts."""

    def unet(self, dtype: torch.dtype, device: Device) -> nn.Module:
        """Load the UNet."""

    def vae(self, dtype: torch.dtype, device: Device) -> nn.Module | None:
        """Load the autoencoder; None where images are not encoded."""

    def latents(self) -> tuple[int, int] | None:
        """Return their channels, and how many times smaller than images they are; None where nothing is encoded."""

    def vae_scaling(self) -> float | None:
        """Return what the autoencoder's latents are multiplied by; None where there is none."""

    def text_encoder(self, dtype: torch.dtype, device: Device) -> tuple[Tokenizer, nn.Module]:
        """Load the tokenizer and the text encoder."""

    def image_encoder(self, dtype: torch.dtype, device: Device) -> nn.Module:
        """Load the encoder of reference images."""

    def projection(self, device: Device) -> tuple[Tensor, Tensor]:
        """Return (weight, bias), float32, of the layer that turns [embedding, pose] into a token."""


def latents_of(config: Mapping[str, Any], where: object, levels: str = "block_out_channels") -> tuple[int, int]:
    """An autoencoder's channels, and how many times smaller its latents are; `levels` lists those of its network."""
    widths = field(config, levels, list, where, PriorError, [0] * 4)
    if not 1 <= len(widths) <= _MOST_LEVELS:
        raise PriorError(f"{where}: {levels} has {len(widths):,} entries")
    # every level but the last halves the image
    return field(config, "latent_channels", int, where, PriorError, 4), 2 ** (len(widths) - 1)


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
    return frozen(filled(empty_network(class_name, config, len(state), what), state, what), device, what)


def empty_network(class_name: str, config: Mapping[str, Any], n_tensors: int, where: object) -> nn.Module:
    """Build a diffusers network without memory for its weights.

    Args:
        n_tensors: how many the weights have. where: the configuration's file, for the message.
    """
    import diffusers

    network_class = getattr(diffusers, class_name, None)
    if network_class is None:
        raise PriorError(f"{where}: diffusers {diffusers.__version__} has no {class_name}: pip install -U diffusers")
    arguments = network_arguments(network_class, config, n_tensors, where)
    return built(lambda: network_class(**arguments), class_name, where)


def filled(network: nn.Module, state: Mapping[str, Tensor], what: str) -> nn.Module:
    """Give a network that was built without memory exactly these tensors, as they are."""
    check_names(shapes_of(network.state_dict()), shapes_of(state), what)
    network.load_state_dict(state, assign=True)  # the tensors themselves: nothing is copied
    for module in network.modules():
        remake = _REMADE.get(type(module).__name__)
        if remake is not None:
            module.__dict__["_buffers"].update(remake(module).named_buffers())
        for name, buffer in module.named_buffers(recurse=False):
            if name == _COUNTING and buffer.is_meta:  # often not stored, as it is 0, 1, 2, ... in every model
                setattr(module, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    empty = [name for name, tensor in (*network.named_parameters(), *network.named_buffers()) if tensor.is_meta]
    if empty:
        raise PriorError(f"{what} can't be built of its tensors alone: nothing says what {_some(empty)} should hold")
    return network


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


_REMADE: dict[str, Callable[[Any], nn.Module]] = {
    "WanRotaryPosEmbed": lambda m: type(m)(m.attention_head_dim, m.patch_size, m.max_seq_len),
    "LlamaRotaryEmbedding": lambda m: type(m)(config=m.config),
}
"""Layers whose buffers are never stored, and how they are made."""
_COUNTING = "position_ids"  # a buffer of CLIP's embeddings
_TOWERS = ("text_model.", "vision_model.")
_SHARED = ("shared.weight", "encoder.embed_tokens.weight")  # of T5: one tensor, stored under either name or both


def encoder_state(encoder: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was stored of an encoder (tensors, or anything that stands for them) under its module's own names.

    Versions of transformers differ in whether a tower's name comes first, both in files and in modules.
    """
    own = {_bare(name): name for name in encoder.state_dict()}
    named = {own.get(_bare(name), name): value for name, value in state.items() if not name.endswith(_COUNTING)}
    for name, other in (_SHARED, _SHARED[::-1]):  # whichever is missing is the other one
        if name in own and name not in named and other in named:
            named[name] = named[other]
    return named


def _bare(name: str) -> str:
    for tower in _TOWERS:
        name = name.removeprefix(tower)
    return name


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
    shown = [shortened(printable(name), 100) for name in names[:most]]
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


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
