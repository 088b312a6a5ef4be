"""What is seen of a scene while it is trained: small images, made now and then, never in the run's way."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..dream4d_engine.cameras import film_times, make_cameras
from ..dream4d_engine.export.images import to_bytes
from ..dream4d_engine.rendering import RenderOptions, render_chunked
from ..dream4d_engine.scene import Scene

if TYPE_CHECKING:
    from PIL import Image

_SAMPLES, _TURN_DEG, _SHOWN = 64, 24.0, 192
_SMALLEST, _LARGEST = 48, 256
_CLIP_FRAMES, _CLIP_FPS = 6, 4.0
_SHARE = 0.035
"""The share of the run's time that rendering for the preview may take."""


def preview_frames(scene: Scene, number: int, size: int) -> torch.Tensor:
    """Render the preview of this number, [F, size, size, 3]: a turning frame, or some moments of a moving scene.

    A moving scene's frames are smaller, so that all of them together cost about as much as a still one's.
    """
    moving = scene.deformation is not None
    if moving:
        size = max(_SMALLEST, round(size / math.sqrt(_CLIP_FRAMES)))
    # of a long animation its beginning: a few moments of the whole would show no motion
    times = film_times(_CLIP_FRAMES, scene.loops)[None] / scene.length if moving else torch.zeros(1, 1)
    turn = math.radians(_TURN_DEG * number)
    cameras = make_cameras(turn, math.radians(15.0), 3.0, math.radians(40.0), times, size, size)
    samples = min(_SAMPLES, scene.config.n_samples)
    return render_chunked(scene, cameras, RenderOptions(n_samples=samples)).rgb[0].cpu()


@dataclass
class Cost:
    """What the previews of a run took. Seconds: of the training thread, and of the processor on the other one."""

    made: int = 0
    dropped: int = 0
    rendering: float = 0.0
    showing: float = 0.0


class LivePreview:
    """Shows a scene every `seconds` (0: never), through `send`, which is called on a thread of its own.

    A moving scene's frames are sent one after another, again and again, until the next ones come: the clip plays.
    Frames that come while the last ones are still on their way are dropped; an error ends the previews, not the run.
    The images' size follows from what the last ones took, so that rendering keeps to its share of the time.
    """

    def __init__(
        self, send: Callable[[Image.Image], None], seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._send, self._seconds, self._clock = send, seconds, clock
        self._next = clock() + min(seconds, 2.0) if seconds > 0 else math.inf
        self._size = _SMALLEST
        self._number = 0
        self._closed = False
        self._worker: threading.Thread | None = None
        self._waiting: queue.Queue[torch.Tensor | None] = queue.Queue()
        self._on_its_way = threading.Event()
        self.cost = Cost()

    def offer(self, scene: Scene) -> bool:
        """Show the scene if it is time; return whether frames were made."""
        if self._closed or self._clock() < self._next:
            return False
        if self._on_its_way.is_set():
            self.cost.dropped += 1
            self._next = self._clock() + self._seconds
            return False
        began = self._clock()
        try:
            frames = preview_frames(scene, self._number, self._size)
        except Exception:
            self._give_up()
            return False
        self._plan_next(self._clock() - began)
        self._on_its_way.set()
        self._waiting.put(frames)
        if self._worker is None:
            self._worker = threading.Thread(target=self._show, name="dream4d preview", daemon=True)
            self._worker.start()
        return True

    def close(self) -> None:
        """Show nothing any more."""
        self._closed = True
        if self._worker is not None:
            self._waiting.put(None)
            self._worker.join(timeout=2.0)

    def _plan_next(self, seconds: float) -> None:
        """Note what a preview took, choose when the next one comes and how large it is."""
        self._number += 1
        self.cost.made += 1
        self.cost.rendering += seconds
        self._next = self._clock() + max(self._seconds, seconds / _SHARE)
        fitting = self._size * math.sqrt(_SHARE * self._seconds / max(seconds, 1e-4))
        self._size = int(min(max(fitting, _SMALLEST), 2 * self._size, _LARGEST))

    def _show(self) -> None:
        """Send what comes, on the thread; a clip is played until the next one comes."""
        images: list[Image.Image] = []
        shown = 0
        try:
            while not self._closed:
                began = time.thread_time()
                frames = self._take(1 / _CLIP_FPS if len(images) > 1 else None)
                if self._closed:
                    return
                if frames is not None:
                    images, shown = [_image(frame) for frame in frames], 0
                self._send(images[shown % len(images)])
                shown += 1
                self._on_its_way.clear()
                self.cost.showing += time.thread_time() - began
        except Exception:
            self._give_up()

    def _take(self, seconds: float | None) -> torch.Tensor | None:
        try:
            return self._waiting.get(timeout=seconds)
        except queue.Empty:
            return None

    def _give_up(self) -> None:
        self._next = math.inf
        logging.warning("[Dream4D] the live preview failed and is off for this run", exc_info=True)


def _image(frame: torch.Tensor) -> Image.Image:
    from PIL import Image

    return Image.fromarray(to_bytes(frame)).resize((_SHOWN, _SHOWN), Image.Resampling.BILINEAR)
