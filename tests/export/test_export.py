"""Files that people open: they must hold what was put in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dream4d_engine.export import contact_sheet, read_video, save_image, to_bytes, write_video

COLORS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.7, 0.2], [0.1, 0.2, 0.9], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0]])


def flat_frames(height: int, width: int) -> torch.Tensor:
    return COLORS[:, None, None].expand(-1, height, width, -1)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 47)])
def test_video_holds_the_frames_again(tmp_path, height, width):
    path = tmp_path / "v.mp4"
    assert write_video(path, iter(flat_frames(height, width)), fps=12, title="five colours") == 5
    video = read_video(path)
    assert video.frames.shape == (5, height + height % 2, width + width % 2, 3)
    assert video.fps == pytest.approx(12)
    assert video.title == "five colours"
    assert video.codec in ("h264", "mpeg4")
    error = (video.frames.float() / 255 - flat_frames(*video.frames.shape[1:3])).abs()
    assert error.max() < 0.03
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (2, 1), (3, 3), (1, 33), (34, 1)])
def test_the_smallest_and_odd_frames(tmp_path, height, width):
    write_video(tmp_path / "v.mp4", flat_frames(height, width))
    frames = read_video(tmp_path / "v.mp4").frames
    assert frames.shape == (5, height + height % 2, width + width % 2, 3)
    assert (frames.float() / 255 - COLORS[:, None, None]).abs().max() < 0.03, "the last row and column are repeated"


NAMES = [
    "run-12:30",
    "http:x",
    "pipe:1",
    "concat:a|b",
    "a%03d",
    'it\'s "q"',
    "-dash",
    "мир 立方体",
    "new\nline",
    "\x1b[31m",
]
NAMES += [os.fsdecode(b"bad\xff")] if sys.platform == "linux" else []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")
@pytest.mark.parametrize("name", NAMES)
def test_folders_and_files_of_any_name(tmp_path, monkeypatch, name):
    """As people type them: from where they stand. FFmpeg takes what stands before a colon for a protocol."""
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    for path in (Path(name) / "v.mp4", Path(f"{name}.mp4")):
        assert write_video(path, flat_frames(16, 16)) == 5
        assert read_video(path).frames.shape == (5, 16, 16, 3)
    assert {p.name for p in tmp_path.iterdir()} == {name, f"{name}.mp4"}
    assert [p.name for p in Path(name).iterdir()] == ["v.mp4"]


@pytest.mark.parametrize(
    ("title", "stored"),
    [
        ("a\nred\tcube", "a red cube"),
        ("\ud800 cube", "\ufffd cube"),
        ("nul\0cube", "nul\ufffdcube"),
        ("\x1b[2Jcube", "\ufffd[2Jcube"),
        ("x" * 15000, "x" * 499 + "…"),
        ('e "quotes" \\ 立方体', 'e "quotes" \\ 立方体'),
    ],
)
def test_titles_of_any_text(tmp_path, title, stored):
    write_video(tmp_path / "v.mp4", flat_frames(16, 16), title=title)
    assert read_video(tmp_path / "v.mp4").title == stored


def test_frame_order_and_detail_survive(tmp_path):
    frames = torch.zeros(16, 64, 64, 3)
    for i in range(16):
        frames[i, 4 * i : 4 * i + 4, 20:40] = 1.0
    write_video(tmp_path / "v.mp4", frames, fps=29.97)
    video = read_video(tmp_path / "v.mp4")
    rows = video.frames[:, :, 30, 0].float().reshape(16, 16, 4).mean(-1).argmax(1)
    assert rows.tolist() == list(range(16))
    assert video.fps == pytest.approx(29.97, abs=0.01)


def test_uint8_and_float_frames_agree(tmp_path):
    frames = flat_frames(16, 16)
    write_video(tmp_path / "a.mp4", frames)
    write_video(tmp_path / "b.mp4", [to_bytes(frame) for frame in frames])
    assert torch.equal(read_video(tmp_path / "a.mp4").frames, read_video(tmp_path / "b.mp4").frames)


def test_failed_video_leaves_the_old_file(tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes(b"old")

    def frames():
        yield torch.zeros(16, 16, 3)
        raise RuntimeError("the renderer broke")

    with pytest.raises(RuntimeError, match="renderer broke"):
        write_video(path, frames())
    with pytest.raises(ValueError, match="frame 1"):
        write_video(path, [torch.zeros(16, 16, 3), torch.zeros(8, 16, 3)])
    with pytest.raises(ValueError, match="no frames"):
        write_video(path, [])
    with pytest.raises(ValueError, match="fps"):
        write_video(path, [torch.zeros(16, 16, 3)], fps=0)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_reading_what_is_no_video(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"no video at all" * 10)
    with pytest.raises(ValueError, match=r"x\.mp4"):
        read_video(tmp_path / "x.mp4")


def test_to_bytes_rounds_clamps_and_refuses():
    image = torch.tensor([[[0.0, 1.0, 0.5], [-1.0, 2.0, float("nan")]]])
    assert to_bytes(image).tolist() == [[[0, 255, 128], [0, 255, 0]]]
    assert to_bytes(torch.ones(2, 3, 1)).shape == (2, 3, 3)
    with pytest.raises(ValueError, match="shape"):
        to_bytes(torch.zeros(3, 8, 8))


def test_png_round_trip(tmp_path):
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    save_image(tmp_path / "p.png", image)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "p.png")), image)


def test_contact_sheet_places_every_image():
    images = torch.rand(2, 3, 20, 30, 3, generator=torch.Generator().manual_seed(0))
    sheet = contact_sheet(images, ["0°", "90°"], ["t 0", "t 0.5", "t 1"], title="a red cube")
    assert sheet.dtype == np.uint8
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (20, 30, 3))[:, :, 0]
    found = []
    for row in range(2):
        for column in range(3):
            match = (windows == to_bytes(images[row, column])).all(axis=(2, 3, 4))
            assert match.sum() == 1
            found.append(tuple(np.argwhere(match)[0]))
    assert found == sorted(found)  # rows from top to bottom, columns from left to right
    assert (sheet.min(axis=2) < 128)[:20].any()  # the title is there
    plain = contact_sheet(images, ["0°", "90°"], ["t 0", "t 0.5", "t 1"])
    for title in (
        "a\nred\tcube",
        "x" * 15000,
        "word " * 3000,
        "\ud800 \u202e\x1b[2J",
        "🚀👩\u200d🚀 立方体",
        "i" * 300,
    ):
        titled = contact_sheet(images, ["0°", "90°"], ["t 0", "t 0.5", "t 1"], title=title)
        assert titled.shape[1] == plain.shape[1], "as wide as the images are"
        assert plain.shape[0] < titled.shape[0] <= plain.shape[0] + 4 * 16 + 4, "of one to four lines"
        assert np.array_equal(titled[-len(plain) + 6 :], plain[6:]), "below the title nothing changes"
        assert (titled[: len(titled) - len(plain) + 6].min(axis=2) < 128).any(), "it is there"
        assert (titled[:, -2:] == 255).all(), "it ends before the edge"
    assert np.array_equal(contact_sheet(images, ["0°", "90°"], ["t 0", "t 0.5", "t 1"], title=" \n "), plain)
    with pytest.raises(ValueError, match="labels"):
        contact_sheet(images, ["0°"], ["a", "b", "c"])
