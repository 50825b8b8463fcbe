"""utils/contact_sheet.py: selection and drawing of frames; files are complete or absent."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.contact_sheet import ContactSheetSampler, Strip, draw_contact_sheet, save_contact_sheet


def numbered(count: int) -> np.ndarray:
    """Frames with their index in the pixels: i % 256 in the first channel, i // 256 in the second."""
    frames = np.zeros((count, 4, 4, 3), np.uint8)
    frames[..., 0] = (np.arange(count) % 256)[:, None, None]
    frames[..., 1] = (np.arange(count) // 256)[:, None, None]
    return frames


def shown(strip: Strip) -> list[int]:
    return [int(frame[0, 0, 0]) + 256 * int(frame[0, 0, 1]) for frame in strip.frames]


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 81, 1001])
@pytest.mark.parametrize("known", [True, False], ids=["known length", "unknown length"])
def test_sampler_keeps_evenly_spaced_frames_with_both_ends(count, known):
    sampler = ContactSheetSampler(count if known else None, columns=8, fps=10)
    frames = numbered(count)
    for start in range(0, count, 12):
        sampler.add(frames[start : start + 12])
        assert len(sampler._kept) <= 16
    strip = sampler.strip("caption")
    indices = shown(strip)
    assert indices[0] == 0 and indices[-1] == count - 1 and len(indices) == min(count, 8)
    assert strip.seconds == tuple(index / 10 for index in indices)
    gaps = np.diff(indices)
    if count > 8:
        assert gaps.max() <= (1 if known else 2.5) * np.ceil((count - 1) / 7)


def test_sampler_copies_its_frames():
    sampler = ContactSheetSampler(None, columns=2)
    frames = numbered(12)
    sampler.add(frames)
    frames[:] = 99
    assert shown(sampler.strip("")) == [0, 11]
    assert all(frame.base is None for frame in sampler._kept.values())


def test_sampler_of_an_interrupted_video_shows_the_frames_so_far():
    sampler = ContactSheetSampler(100, columns=4)
    with pytest.raises(ValueError, match="no frames"):
        sampler.strip("a")
    sampler.add(numbered(40))
    assert shown(sampler.strip("a")) == [0, 33, 39]
    with pytest.raises(ValueError, match="columns"):
        ContactSheetSampler(10, columns=1)


def test_contact_sheet_enlarges_small_frames_and_has_captions():
    red, blue = np.full((9, 32, 32, 3), (255, 0, 0), np.uint8), np.full((9, 32, 32, 3), (0, 0, 255), np.uint8)
    sheet = np.asarray(draw_contact_sheet([("red", red), ("blue", blue)], columns=3))
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert (sheet == colour).all(axis=2).sum() == 3 * 128 * 128
    assert (sheet.reshape(-1, 3).max(axis=1) < 64).any()  # captions are black


def test_contact_sheet_reduces_large_frames_and_accepts_any_caption():
    frames = np.zeros((2, 100, 1000, 3), np.uint8)
    captions = ["word " * 2000, "一只猫" * 300, "🐱\n\x00\u202e", "", "x" * 5000]
    sheets = [draw_contact_sheet([(caption, frames)], columns=2) for caption in captions]
    assert {sheet.width for sheet in sheets} == {2 * 320 + 4 + 24}
    assert max(sheet.height for sheet in sheets) < 140


def test_a_saved_contact_sheet_is_complete_or_absent(tmp_path, monkeypatch):
    save_contact_sheet(tmp_path / "sheet.png", [("a", numbered(9)), sampled("b")], columns=4)
    with Image.open(tmp_path / "sheet.png") as image:
        image.load()
        assert image.format == "PNG"
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]

    def full(self, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_contact_sheet(tmp_path / "other.png", [("a", numbered(9))])
    assert caught.value.filename == str(tmp_path / "other.png")
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


def sampled(caption: str) -> Strip:
    sampler = ContactSheetSampler(9, columns=4)
    sampler.add(numbered(9))
    return sampler.strip(caption)
