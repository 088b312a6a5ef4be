"""Priors from folders and files: the handle, and the models that come with the package."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from ..guidance.distillation import DistillationConfig, Guidance
from .conditioning import MAX_TIMED_FRAMES, check_prompt, image_guidance, text_guidance, words_for
from .errors import PriorError
from .formats.identify import open_loader
from .formats.loaders import Metadata
from .formats.lora_files import lora_files
from .formats.pipelines import open_pipeline
from .formats.single_file import configs_read
from .formats.tiny_vae import TinyDecoder, check_tiny_vae, folder_of
from .handle import Prior, PriorKind, ReferenceView
from .loading import LoadedPrior, apply_lora, load_prior
from .networks.denoisers import prepared
from .networks.execution import Runtime
from .pipelines import load_pipeline

_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class PriorFiles:
    """A model in a folder or file (see loading.load_prior for what these may be), as a PriorHandle."""

    name: str
    kind: PriorKind
    path: Path
    lora: Path | None = None  # added to its weights
    lora_strength: float = 1.0
    n_frames: int | None = None
    most_frames: int | None = None
    frame_step: int = 1
    orbit: ClassVar[None] = None  # models of whole orbits come in no files of ours
    tiny_vae: Path | TinyDecoder | None = None  # folder of an AutoencoderTiny in the place of its autoencoder

    @property
    def _decodes_only(self) -> bool:
        return isinstance(self.tiny_vae, TinyDecoder)

    @property
    def _tiny_folder(self) -> Path | None:
        return None if self.tiny_vae is None else folder_of(self.tiny_vae)

    def fingerprint(self) -> str:
        """Change when a file of the model does (by name, size and time; weights are not read)."""
        added = [] if self.lora is None else lora_files(self.lora)
        parts = [
            model_files(self.path),
            *(list_files(path) for path in (*added, self._tiny_folder) if path is not None),
        ]
        return digest([self.kind, self.lora_strength, *parts, *(["decoder alone"] if self._decodes_only else [])])

    def n_bytes(self) -> int:
        """Size of the weights on the disk."""
        return sum(size for name, size, _ in list_files(self.path) if name.endswith(_WEIGHTS))

    def describe(self) -> str:
        """The places of the model and of what was added to it."""
        lora = f" with the LoRA {self.lora}" if self.lora else ""
        part = "decoder" if self._decodes_only else "autoencoder"
        return f"{self.path}{lora}" + (f" with the {part} {self._tiny_folder}" if self.tiny_vae else "")

    def check_prompt(self, prompt: str) -> None:
        """Raise PriorError for an empty prompt, and where a toy model wasn't taught a word of it."""
        if self.kind != "novel_view":  # it is told an image
            metadata = read_metadata(self.path, self.kind)
            check_prompt(metadata.name, metadata.known_words, words_for(self.kind, prompt))

    def encodes(self) -> bool:
        """Whether the model works on latents, so that there is an autoencoder."""
        return open_pipeline(self.path) is not None or open_loader(self.path).latents() is not None

    def check_added(self) -> None:
        """Raise PriorError where a LoRA or a tiny autoencoder is meant for a model that takes none here, or another."""
        if open_pipeline(self.path) is None:
            latents = None if self._tiny_folder is None else open_loader(self.path).latents()
            if self._tiny_folder is not None and latents is not None:
                check_tiny_vae(self._tiny_folder, latents, self.name)
            return
        for what, given in (("a LoRA", self.lora), ("a tiny autoencoder", self._tiny_folder)):
            if given is not None:
                raise PriorError(
                    f"{self.name} is one of today's models, which take {what} in ComfyUI only and not from a folder: "
                    f"leave {given} away"
                )

    def load(self, runtime: Runtime) -> Prior:
        """Load the networks; PriorError names the file that is missing, damaged or of another model."""
        pipeline = open_pipeline(self.path)
        if pipeline is not None:
            self.check_added()
            return load_pipeline(pipeline, runtime)
        with_vae = self.tiny_vae is not None and self.encodes()
        loaded = load_prior(
            self.path, self.kind, runtime.device, runtime.dtype, tiny_vae=self.tiny_vae if with_vae else None
        )
        if self.lora is not None:
            loaded = apply_lora(loaded, self.lora, self.lora_strength)
        networks = (loaded.denoiser.unet, loaded.denoiser.vae)
        return Prior(
            name=loaded.name,
            kind=loaded.kind,
            guide=partial(_guide, loaded, runtime),
            negative_prompt=loaded.negative_prompt,
            networks=tuple(network for network in networks if network is not None),
        )


def _guide(
    loaded: LoadedPrior,
    runtime: Runtime,
    prompt: str,
    negative: str | None,
    config: DistillationConfig,
    reference: ReferenceView | None = None,
) -> Guidance:
    """See handle.Guide. What needs the networks as they were loaded (encoders of prompts and images) comes first."""
    if loaded.kind == "novel_view":
        if reference is None:
            raise PriorError(f"the {loaded.name} prior is told an image, not a prompt: give it a reference")
        guidance = image_guidance(loaded, reference.image, reference.camera, config)
    else:
        guidance = text_guidance(loaded, prompt, negative, config)
    return replace(guidance, denoiser=prepared(loaded.denoiser, runtime))


def list_files(path: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, time of change) of a file, or of all files below a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [(p.relative_to(path.parent).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def model_files(path: Path) -> list[tuple[str, int, int]]:
    """The same of a model, of one in a single file with the configuration that is read beside it."""
    beside = [] if path.is_dir() else configs_read(path)
    return [one for file in (path, *beside) for one in list_files(file)]


def digest(tree: object) -> str:
    """SHA-256 of a JSON tree."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def toy_folder(kind: PriorKind) -> Path:
    """Where the toy prior of this kind lies inside the package."""
    return Path(__file__).parent / "toy" / kind


def toy_subject() -> Path:
    """Where the LoRA of the toy image prior's personal subject, "a sks snowman", lies inside the package."""
    return Path(__file__).parent / "toy" / "subject"


def toy_prior(kind: PriorKind) -> PriorFiles:
    """The toy prior of this kind, which comes with the package."""
    return prior_files(toy_folder(kind), kind)


def prior_files(path: Path | str, kind: PriorKind | None = None) -> PriorFiles:
    """The handle of what lies in a folder or file; `kind` overrides what it says of itself."""
    path = Path(path)
    pipeline = open_pipeline(path.expanduser())
    metadata = (pipeline or open_loader(path)).metadata(kind)
    # one of today's models of videos says how many frames it makes; of the older ones the recipes do
    n_frames = None if pipeline is None else metadata.n_frames
    step = 1 if pipeline is None else pipeline.family.frame_step
    most = MAX_TIMED_FRAMES if metadata.vector == "frame_time" else None
    return PriorFiles(metadata.name, metadata.kind, path, n_frames=n_frames, most_frames=most, frame_step=step)


def read_metadata(path: Path | str, kind: PriorKind | None = None) -> Metadata:
    """Say what lies in a folder or file, by its files of text and its weights' shapes; `kind` as in prior_files."""
    pipeline = open_pipeline(Path(path).expanduser())
    return (pipeline or open_loader(path)).metadata(kind)
