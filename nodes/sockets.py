"""What travels between the nodes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from comfy_api.latest import io

from ..dream4d_engine.assets import Provenance
from ..dream4d_engine.priors.formats.lora_files import lora_files
from ..dream4d_engine.priors.loading import PriorExtras, PriorKind
from ..dream4d_engine.scene import Scene

CATEGORY = "Dream4D"
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")

ScenePort = io.Custom("DREAM4D_SCENE")
PriorPort = io.Custom("DREAM4D_PRIOR")


@dataclass(frozen=True)
class PriorSource:
    """Where a diffusion model is, folder or file. It is loaded by the node that needs it and freed after the run.

    `lora` and `tiny_vae`: what is added to it, and what takes the place of its autoencoder.
    """

    name: str
    kind: PriorKind
    path: Path
    lora: Path | None = None
    lora_strength: float = 1.0
    tiny_vae: Path | None = None

    @property
    def extras(self) -> PriorExtras:
        """The same as the engine takes it."""
        return PriorExtras(self.lora, self.lora_strength, self.tiny_vae)

    def fingerprint(self) -> str:
        """Change when a file of the model does (by name, size and time; weights are not read)."""
        added = [] if self.lora is None else lora_files(self.lora)
        parts = [list_files(path) for path in (self.path, *added, self.tiny_vae) if path is not None]
        return digest([self.kind, self.lora_strength, *parts])

    def n_bytes(self) -> int:
        """Size of the weights on the disk."""
        return sum(size for name, size, _ in list_files(self.path) if name.endswith(_WEIGHTS))


def list_files(path: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, time of change) of a file, or of all files below a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [(p.relative_to(path.parent).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


@dataclass(frozen=True, eq=False)
class SceneValue:
    """A scene on the CPU and where it comes from. Nodes share it through the cache, so nobody changes it."""

    scene: Scene
    provenance: Provenance

    def fingerprint(self) -> str:
        """Change when a number of the scene does."""
        found = hashlib.sha256(json.dumps(asdict(self.scene.config)).encode())
        for name, value in self.scene.state_dict().items():
            found.update(name.encode())
            found.update(value.detach().contiguous().cpu().numpy().tobytes())
        return found.hexdigest()


def digest(tree: object) -> str:
    """SHA-256 of a JSON tree."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
