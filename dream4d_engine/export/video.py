"""Videos: frames in, one mp4 out, never more than a frame in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..documents import first_line, printable, shortened
from ..machine import write_error
from .images import to_bytes

if TYPE_CHECKING:
    import numpy as np
    from av.container import InputContainer, OutputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_MOST_TITLE = 500
"""Letters of a video's title: players show them on one line."""
_Codec = Literal["libx264", "h264", "mpeg4"]
_CODECS: tuple[_Codec, ...] = ("libx264", "h264", "mpeg4")
_BT709 = 1  # the code of BT.709 in the stream's colour tags; 1 is also "limited range"


@dataclass(frozen=True)
class Video:
    """A decoded file."""

    frames: Tensor  # uint8 [F, H, W, 3]
    fps: float
    title: str  # this and the codec as stored
    codec: str


def pick_codec() -> _Codec:
    """Return the first H.264 encoder this build of PyAV has, else MPEG-4's; ValueError or ImportError if none is."""
    try:
        import av
    except ModuleNotFoundError:  # which says what to install
        raise
    except (ImportError, OSError) as error:  # it is there, without a library of its own
        raise ValueError(f"PyAV can't be loaded ({first_line(error)}): reinstall the package av") from error

    for name in _CODECS:
        try:
            av.Codec(name, "w")
        except ValueError:  # not in this build
            continue
        return name
    raise ValueError(f"this build of PyAV has none of the encoders {', '.join(_CODECS)}: reinstall the package av")


def _pad_to_even(image: np.ndarray) -> np.ndarray:
    """Repeat the last row or column where a side is odd: 4:2:0 images have even sides."""
    import numpy as np

    height, width = image.shape[:2]
    return np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


class VideoWriter:
    """A video file in the making, to be used as a context: `add` frames, one after another.

    Frames are [H, W, 3] float in [0, 1] or uint8, all of one size. The file has H.264 in yuv420p where PyAV can write
    it, and its side lengths are rounded up to even numbers. The title is brought to one short line. The file is
    written under a temporary name and renamed when the context ends: an error inside leaves no file, and an old one as
    it was. Raises WriteError.
    """

    def __init__(self, path: Path | str, fps: float = 24.0, title: str = "") -> None:
        if not 0.1 <= fps <= 1000:
            raise ValueError(f"fps must lie in [0.1, 1000], got {fps}")
        self.path, self.fps, self.count = Path(path), fps, 0
        self.title = shortened(" ".join(printable(title).split()), _MOST_TITLE)
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._container: OutputContainer  # from the context's beginning on
        self._stream: VideoStream | None = None  # from the first frame on, as the shape
        self._shape: tuple[int, ...] = ()

    def __enter__(self) -> VideoWriter:
        import av

        # FFmpeg takes what stands before a colon for a protocol, but not in an absolute path
        place = str(self._temporary.absolute())
        with _named(self.path):
            self._container = av.open(place, "w", format="mp4", options={"movflags": "faststart"})
        self._container.metadata["title"] = self.title
        return self

    def add(self, frame: Tensor | np.ndarray) -> None:
        """Encode one more frame."""
        import av

        image = to_bytes(frame)
        if self._stream is None:
            self._shape = image.shape
            self._stream = _add_stream(self._container, pick_codec(), _pad_to_even(image).shape, self.fps)
        if image.shape != self._shape:
            raise ValueError(f"frame {self.count} has the shape {list(image.shape)}, the first {list(self._shape)}")
        picture = av.VideoFrame.from_ndarray(_pad_to_even(image), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        picture.pts, picture.time_base = self.count, 1 / self._stream.codec_context.framerate
        with _named(self.path):
            self._container.mux(self._stream.encode(picture))
        self.count += 1

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is not None:
                return
            if self._stream is None:
                raise ValueError(f"no frames to write into {self.path}")
            with _named(self.path):
                self._container.mux(self._stream.encode())
                self._container.close()
                with open(self._temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(self._temporary, self.path)
        finally:
            with contextlib.suppress(Exception):  # a container without frames can't be closed properly
                self._container.close()
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Make an error of the system one that names the video, not the file that it is written to first."""
    try:
        yield
    except OSError as error:  # PyAV's errors of the system are such
        raise write_error(path, error) from error


def write_video(path: Path | str, frames: Iterable[Tensor | np.ndarray], fps: float = 24.0, title: str = "") -> int:
    """Write all frames into a video file (see VideoWriter) and return how many there were."""
    with VideoWriter(path, fps, title) as writer:
        for frame in frames:
            writer.add(frame)
    return writer.count


def _add_stream(container: OutputContainer, codec: _Codec, shape: tuple[int, ...], fps: float) -> VideoStream:
    """Add a video stream for images [H, W, 3] whose quality is high enough to judge details by."""
    rate = Fraction(fps).limit_denominator(1001)  # 30000/1001 is television's
    quality = {"crf": "16", "preset": "medium"} if codec == "libx264" else {}
    stream = container.add_stream(codec, rate=rate, options=quality)
    stream.height, stream.width, stream.pix_fmt = shape[0], shape[1], "yuv420p"
    context = stream.codec_context
    # players take small videos without tags for BT.601, and show other colours
    context.color_primaries = context.color_trc = context.colorspace = context.color_range = _BT709
    if not quality:
        stream.bit_rate = max(int(shape[0] * shape[1] * fps * 0.4), 500_000)
    return stream


def read_video(path: Path) -> Video:
    """Decode a whole video file (into memory: meant for short ones)."""
    with _opened(path) as (container, stream):
        images = [_pixels(frame) for frame in container.decode(stream)]
        title = container.metadata.get("title", "")
        fps = float(stream.average_rate or 0)
        codec = stream.codec_context.codec.canonical_name
    if not images:
        raise ValueError(f"{path} holds no frames")
    return Video(torch.stack(images), fps, title, codec)


def pick_frames(path: Path, pick: Callable[[int], Sequence[int]]) -> Tensor:
    """Decode some frames of a video file, uint8 [K, H, W, 3]; no others are held.

    `pick` is told how many there are, and names those that are wanted, from 0.
    """
    found: dict[int, Tensor] = {}
    with _opened(path) as (container, stream):
        wanted = pick(stream.frames) if stream.frames else []
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                found[index] = _pixels(frame)
            if index >= max(wanted, default=0):
                break
    if not wanted or len(found) != len({*wanted}):
        raise ValueError(f"{path} holds fewer frames than it says")
    return torch.stack([found[index] for index in wanted])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video file to be decoded; ValueError where it is none."""
    import av

    try:
        with av.open(str(Path(path).absolute())) as container:
            yield container, container.streams.video[0]
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} can't be read as a video: {error}") from error


def _pixels(frame: VideoFrame) -> Tensor:
    """A decoded frame as uint8 [H, W, 3]."""
    # with a range asked for, PyAV before 17 takes the file's own color matrix too
    return torch.from_numpy(frame.reformat(format="rgb24", dst_color_range="JPEG").to_ndarray())
