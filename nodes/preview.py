"""What is seen of a scene while it is trained: small pictures, made now and then, never in the run's way."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..dream4d_engine.cameras import make_cameras
from ..dream4d_engine.export.pictures import to_bytes
from ..dream4d_engine.rendering import RenderOptions, render_chunked
from ..dream4d_engine.scene import Scene

if TYPE_CHECKING:
    from PIL import Image

_SIZE, _SAMPLES, _TURN_DEG = 128, 96, 24.0
_CLIP_TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
_SHARE = 0.04
"""The share of the run's time that rendering for the preview may take."""


def preview_picture(scene: Scene, number: int) -> torch.Tensor:
    """Render the preview of this number, [H, W, 3]: a turning frame, or five moments of a moving scene in a row."""
    moving = scene.deformation is not None
    size = _SIZE // 2 if moving else _SIZE
    turn = math.radians(_TURN_DEG * number)
    times = torch.tensor([_CLIP_TIMES if moving else (0.0,)])
    cameras = make_cameras(turn, math.radians(15.0), 3.0, math.radians(40.0), times, size, size)
    samples = min(_SAMPLES, scene.config.n_samples)
    return torch.cat(tuple(render_chunked(scene, cameras, RenderOptions(n_samples=samples)).rgb[0]), 1)


class LivePreview:
    """Shows a scene every `seconds` (0: never), through `send`, which is called on a thread of its own.

    A picture that comes while the last one is still on its way is dropped; an error ends the previews, not the run.
    """

    def __init__(
        self, send: Callable[[Image.Image], None], seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._send, self._seconds, self._clock = send, seconds, clock
        self._next = clock() + min(seconds, 1.0) if seconds > 0 else math.inf
        self._number = 0
        self._closed = False
        self._worker: threading.Thread | None = None

    def offer(self, scene: Scene) -> bool:
        """Show the scene if it is time; return whether a picture was made."""
        if self._closed or self._clock() < self._next:
            return False
        if self._worker is not None and self._worker.is_alive():
            self._next = self._clock() + self._seconds
            return False
        began = self._clock()
        try:
            picture = preview_picture(scene, self._number)
        except Exception:
            self._give_up()
            return False
        cost = self._clock() - began
        self._number += 1
        self._next = self._clock() + max(self._seconds, cost / _SHARE)
        self._worker = threading.Thread(target=self._deliver, args=(picture,), name="dream4d preview", daemon=True)
        self._worker.start()
        return True

    def close(self) -> None:
        """Show nothing any more."""
        self._closed = True
        if self._worker is not None:
            self._worker.join(timeout=2.0)

    def _deliver(self, picture: torch.Tensor) -> None:
        try:
            from PIL import Image

            image = Image.fromarray(to_bytes(picture))
            image = image.resize((image.width * 2, image.height * 2), Image.Resampling.BILINEAR)
            if not self._closed:
                self._send(image)
        except Exception:
            self._give_up()

    def _give_up(self) -> None:
        self._next = math.inf
        logging.warning("[Dream4D] the live preview failed and is off for this run", exc_info=True)
