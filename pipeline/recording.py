"""The mp4 file of a video that is still being generated."""

import contextlib
import shutil
import tempfile
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import atomic_path
from utils.video import VideoWriter, join_videos


class Recording:
    """Frames so far, as mp4 files in a temporary folder, so that memory is constant.

    A save ends the encoder's file, and the next frames start another one. The first save therefore has the bytes that
    `VideoWriter` writes for the same frames. A later save joins the files without encoding their frames again.
    """

    def __init__(self, fps: float, crf: int):
        self._fps, self._crf = fps, crf
        self._folder = tempfile.TemporaryDirectory(prefix="hiar-recording-")
        self._parts: list[Path] = []  # finished files
        self._writer: VideoWriter | None = None
        self._open_writer = contextlib.ExitStack()
        self._closed = False

    def write(self, frames: np.ndarray) -> None:
        """Append frames, uint8 [T, H, W, 3]. Does nothing after `close`.

        Raises:
            OSError: if the disk is full.
        """
        if self._closed:
            return
        if self._writer is None:
            path = Path(self._folder.name) / f"{len(self._parts)}.mp4"
            self._writer = self._open_writer.enter_context(VideoWriter(path, fps=self._fps, crf=self._crf))
        self._writer.write(frames)

    def save(self, path: Path) -> None:
        """Write the frames so far to an mp4 file.

        Raises:
            UserError: if there are no frames.
            OSError: if the disk is full.
        """
        self._finish_part()
        if not self._parts:
            raise UserError("there are no frames to save yet")
        with atomic_path(path) as partial:
            if len(self._parts) == 1:
                shutil.copyfile(self._parts[0], partial)
            else:
                join_videos(self._parts, partial, self._fps)

    def _finish_part(self) -> None:
        if self._writer is not None:
            path, self._writer = self._writer.path, None
            self._open_writer.close()
            self._parts.append(path)

    def close(self) -> None:
        """Delete the temporary files."""
        if not self._closed:
            self._closed, self._writer, self._parts = True, None, []
            with contextlib.suppress(OSError, ValueError, UserError):
                self._open_writer.__exit__(
                    UserError, UserError("closed"), None
                )  # as after a failure: nothing is finished
            self._folder.cleanup()
