"""What travels between the nodes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from comfy_api.latest import io

from ..dream4d_engine.assets import Provenance
from ..dream4d_engine.priors.loading import PriorKind
from ..dream4d_engine.scene import Scene

CATEGORY = "Dream4D"

ScenePort = io.Custom("DREAM4D_SCENE")
PriorPort = io.Custom("DREAM4D_PRIOR")


@dataclass(frozen=True)
class PriorSource:
    """Where a diffusion model is. It is loaded by the node that needs it and freed after the run."""

    name: str
    kind: PriorKind
    folder: Path

    def fingerprint(self) -> str:
        """Change when a file of the model does (by name, size and time; weights are not read)."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        listed = [(str(p.relative_to(self.folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return digest([self.kind, listed])

    def n_bytes(self) -> int:
        """Size of the weights on the disk."""
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.suffix in (".safetensors", ".bin"))


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
