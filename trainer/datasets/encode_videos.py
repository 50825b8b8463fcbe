"""Encodes a folder of video clips and their captions to latents."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.weights import ModelDirectory
from trainer.datasets.encode import encode_clips
from trainer.datasets.video_folder import find_video_names, is_utf8, read_captions
from utils.clips import VideoReader, read_video
from utils.distributed import rank
from utils.errors import UserError


def encode_videos(
    source: Path,
    captions: Path | None,
    num_frames: int,
    fps: float,
    folder: Path,
    directory: ModelDirectory,
    device: torch.device,
) -> tuple[int, dict[str, str]]:
    """Encode the first frames of each video that has a caption, and write shards for `open_clips` to `folder`.

    The first readable video sets the size; videos of another size are left out.

    Args:
        source: folder of videos.
        captions: file of captions; see `read_captions`.
        num_frames: latent frames of a clip; a video needs 4 (num_frames - 1) + 1 frames.
        fps: frames per second; videos of other rates are resampled.

    Returns:
        The number of videos, and the names of those that this rank has left out, with the reasons.

    Raises:
        UserError: if no video can be encoded, or `folder` holds other clips.
    """
    found = find_video_names(source)
    names = [name for name in found if is_utf8(name)]
    left_out = {name.encode(errors="replace").decode(): "its name is not UTF-8" for name in found if not is_utf8(name)}
    texts = read_captions(source, names, captions)
    left_out |= {name: "it has no caption" for name in names if name not in texts}
    if not texts:
        raise UserError(
            f"{source} has no captions: write a .txt file beside each video, or name a JSON or CSV file with --captions"
        )
    captioned = list(texts)
    num_pixel_frames = 4 * (num_frames - 1) + 1
    size = _common_size(source, captioned)
    settings = f"{fps:g} fps, {size[0]}x{size[1]}"  # clips that were encoded with other ones are encoded again
    sources = [f"{name} ({(source / name).stat().st_size} bytes, {settings})" for name in captioned]
    failed = encode_clips(
        list(texts.values()),
        lambda index: _read_clip(source / captioned[index], num_pixel_frames, fps, size),
        num_frames,
        folder,
        directory,
        device,
        sources,
    )
    left_out = left_out if rank() == 0 else {}
    return len(found), left_out | {name.rpartition(" (")[0]: reason for name, reason in failed.items()}


def _common_size(source: Path, names: Sequence[str]) -> tuple[int, int]:
    """Return the height and width of the first video that can be read; all ranks return the same."""
    reason = ""
    for name in names:
        try:
            with VideoReader(source / name) as reader:
                return reader.height, reader.width
        except UserError as error:
            reason = reason or str(error)
    raise UserError(f"none of the {len(names)} videos in {source} can be read; the first one: {reason}")


def _read_clip(path: Path, num_frames: int, fps: float, size: tuple[int, int]) -> Tensor:
    """Return the first frames of a video, [3, T, H, W] in [-1, 1]; raise UserError if they are too few or too small."""
    frames, _ = read_video(path, num_frames, fps, strict=True)
    if frames.shape[:3] != (num_frames, *size):
        count, height, width = frames.shape[:3]
        raise UserError(
            f"{path} has {count} frames of {height}x{width} at {fps:g} fps, not {num_frames} of {size[0]}x{size[1]}; "
            "make clips of one size with scripts/process_videos.py"
        )
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2))).float() / 127.5 - 1
