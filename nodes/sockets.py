"""What travels between the nodes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from comfy_api.latest import io

from ..dream4d_engine.assets import Provenance
from ..dream4d_engine.scene import Scene
from ..dream4d_engine.surface import MotionReadout

CATEGORY = "Dream4D"

ScenePort = io.Custom("DREAM4D_SCENE")
PriorPort = io.Custom("DREAM4D_PRIOR")


@dataclass(frozen=True, eq=False)
class SceneValue:
    """A scene on the CPU and where it comes from. Nodes share it through the cache, so nobody changes it."""

    scene: Scene
    provenance: Provenance
    motion: MotionReadout | None = None  # how much it moves, where that was measured (see readout.py)

    def fingerprint(self) -> str:
        """Change when a number of the scene does."""
        found = hashlib.sha256(json.dumps(asdict(self.scene.config)).encode())
        for name, value in self.scene.state_dict().items():
            found.update(name.encode())
            found.update(value.detach().contiguous().cpu().numpy().tobytes())
        return found.hexdigest()
