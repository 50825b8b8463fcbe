"""Write the files of a video from its latents, block by block. Only a few blocks are in memory.

A file appears under its name only when it is complete. The mp4 appears last, so its presence marks a complete video.
"""

import contextlib
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from torch import Tensor

from model.vae import WanVAE
from pipeline.build import overlap_pixel_frames
from pipeline.decoding import DecodingThread, frame_range
from pipeline.latent_files import LatentsWriter
from utils.config import Config
from utils.config_checks import video_frames
from utils.contact_sheet import ContactSheetSampler, save_contact_sheet
from utils.errors import UserError
from utils.files import require_no_folder, writable_folder, write_json
from utils.locks import lock_file
from utils.mp4 import is_complete_mp4
from utils.prompts import Prompt
from utils.video import VideoWriter

_UNFINISHED_TIMEOUT = 10  # seconds for the blocks that a failing run has queued


@dataclass(frozen=True)
class VideoFiles:
    """Paths of the files of one video."""

    folder: Path
    stem: str

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> "VideoFiles":
        """Return the files of the video `path`. Its folder is created if it does not exist.

        Raises:
            UserError: for a suffix other than .mp4, or a folder that is not writable.
        """
        path = Path(path)
        if path.suffix != ".mp4":
            raise UserError(f"cannot save {path}: name a file that ends in .mp4")
        return cls(writable_folder(path.parent), path.stem)

    @property
    def video(self) -> Path:
        """The mp4 file."""
        return self.folder / f"{self.stem}.mp4"

    @property
    def metadata(self) -> Path:
        """The JSON file from which `inference.py --config_path` reproduces the video."""
        return self.folder / f"{self.stem}.json"

    @property
    def contact_sheet(self) -> Path:
        """The PNG file that shows a few frames."""
        return self.folder / f"{self.stem}.png"

    @property
    def latents(self) -> Path:
        """The safetensors file with `latents` [F, C, h, w], float32."""
        return self.folder / f"{self.stem}.safetensors"

    @property
    def unfinished(self) -> Path:
        """The mp4 file with the frames that a failed pipeline wrote."""
        return self.folder / f"{self.stem}.unfinished.mp4"

    @property
    def lock(self) -> Path:
        """The hidden file that a process locks while it makes the video."""
        return self.folder / f".{self.stem}.lock"

    @property
    def activity(self) -> str:
        """The work of the process that holds the lock, for error messages."""
        return f"making {self.video}"

    def is_complete(self, latents: bool = False) -> bool:
        """Return whether the mp4 file exists and is complete; with `latents`, the latents must exist, too."""
        if latents and not (self.latents.exists() and self.latents.stat().st_size):
            return False
        return is_complete_mp4(self.video)

    def require_no_folders(self) -> None:
        """Raise `UserError` if a folder has the path of one of the files; found before a video is made."""
        for path in (self.video, self.metadata, self.contact_sheet, self.latents, self.unfinished):
            require_no_folder(path)

    def remove_leftovers(self) -> None:
        """Delete partial files of a killed run. Only the process that holds the lock may call this."""
        # Names as `atomic_path` makes them; VideoWriter nests them while it rewrites a file.
        partial = re.compile(rf"\.+{re.escape(self.stem)}(\.\d+\.partial)+(\.\w+)?")
        for file in self.folder.iterdir():
            if partial.fullmatch(file.name):
                file.unlink(missing_ok=True)
        self.unfinished.unlink(missing_ok=True)


@dataclass(frozen=True)
class VideoJob:
    """One video to make."""

    prompt: Prompt
    sample: int
    files: VideoFiles


class VideoOutput:
    """Decodes and writes a batch of videos as their latents arrive. Use it in a `with` statement.

    A thread of its own decodes the latents and completes the files, so the caller can denoise the next block meanwhile.
    An error in the thread is raised by the next `emit`, or at the end of the statement.

    The videos are locked until the files are complete. Entering it raises `UserError` if another process makes one of
    them. If the body of the statement or the thread fails, all files are deleted.
    """

    def __init__(
        self,
        vae: WanVAE,
        files: Sequence[VideoFiles],
        fps: int,
        num_frames: int,
        *,
        metadata: Sequence[dict[str, Any]] | None = None,
        contact_sheet: bool = False,
        save_latents: bool = False,
        seconds: float = 0.0,
        crf: int = 10,
        keep: int = 0,
        wait_at_end: bool = True,
        span: Callable[[int | None], AbstractContextManager[object]] | None = None,
    ):
        """
        Args:
            files: the files of each video of the batch; the video's mp4 file is always written.
            num_frames: latent frames of each video.
            metadata: `video_metadata` of each video, for its JSON file.
            contact_sheet: write the PNG file; needs metadata.
            save_latents: write the safetensors file.
            crf: see `VideoConfig.crf`.
            seconds: time spent on the batch so far, for the metadata.
            keep: latest pixel frames to keep in `decoder.latest`.
            wait_at_end: the `with` statement waits for the files. If false, `wait` must be called later.
            span: context in which a block is decoded, for a profile.
        """
        self.vae, self.files, self.fps, self.num_frames, self.crf = vae, files, fps, num_frames, crf
        self.metadata, self.contact_sheet, self.save_latents = metadata, contact_sheet, save_latents
        self.wait_at_end = wait_at_end
        self.first_frame_at: float | None = None
        """Value of `time.perf_counter` when the encoder got the first frames."""
        num_pixel_frames = vae.num_pixel_frames(num_frames)
        self._sheets = [ContactSheetSampler(num_pixel_frames, fps=fps) for _ in files] if contact_sheet else []
        self.decoder: DecodingThread[tuple[int | None, Tensor]] = DecodingThread(
            vae.stream(keep),
            vae.net.device,
            self._write,
            on_end=self._complete,
            videos=[item.video.name for item in files],
            span=None if span is None else lambda tag: span(tag[0]),
        )
        self._open_files = contextlib.ExitStack()
        self._videos: list[VideoWriter] = []
        self._latents: list[LatentsWriter] = []
        self._started = time.perf_counter() - seconds
        self._num_emitted = 0  # latent frames
        self._aborted = False  # the thread must not complete the files

    @classmethod
    def for_jobs(
        cls,
        config: Config,
        vae: WanVAE,
        jobs: Sequence[VideoJob],
        prefix_path: str,
        save_latents: bool,
        **options: Any,
    ) -> "VideoOutput":
        """Return an output that writes all files of a batch of jobs.

        Args:
            prefix_path: path of the prefix, or empty.
            options: `wait_at_end` and `span`.
        """
        return cls(
            vae,
            [job.files for job in jobs],
            config.video.fps,
            video_frames(config),
            metadata=[video_metadata(config, job.prompt, job.sample, prefix_path) for job in jobs],
            contact_sheet=True,
            save_latents=save_latents,
            crf=config.video.crf,
            keep=overlap_pixel_frames(config.rollout),
            **options,
        )

    def __enter__(self) -> "VideoOutput":
        with contextlib.ExitStack() as stack:
            for files in self.files:
                stack.enter_context(lock_file(files.lock, files.activity, keep=False))
                files.remove_leftovers()
            self._videos = [
                stack.enter_context(VideoWriter(files.video, fps=self.fps, crf=self.crf)) for files in self.files
            ]
            if self.save_latents:
                writers = [LatentsWriter(files.latents, self.num_frames) for files in self.files]
                self._latents = [stack.enter_context(writer) for writer in writers]
            self._open_files = stack.pop_all()
        self.decoder.start()
        return self

    def emit(self, latents: Tensor, block: int | None = None) -> None:
        """Queue the next latents [B, F, C, h, w] for the decoder; wait while its queue is full.

        Args:
            block: number of the block, for error messages.

        Raises:
            UserError: if earlier latents or their pixels hold NaN or infinity. The message names the block and the
                video.
            OSError: if the disk is full.
        """
        part = frame_range(self._num_emitted, latents.shape[1], block)
        self._num_emitted += latents.shape[1]
        self.decoder.put(latents, part, (block, latents))

    def _write(self, block: tuple[int | None, Tensor], frames: list[np.ndarray]) -> None:
        """Write the frames and latents of a block. Called in the decoder's thread."""
        for index, of_video in enumerate(frames):
            self._videos[index].write(of_video)
            self.first_frame_at = self.first_frame_at or time.perf_counter()
            if self._sheets:
                self._sheets[index].add(of_video)
            if self._latents:
                self._latents[index].write(block[1][index])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._abort(error)
            return
        self.decoder.end()
        if self.wait_at_end:
            self.wait()

    def wait(self) -> None:
        """Wait until the files are complete.

        Raises:
            Exception: the error that ended the thread. All files are deleted.
        """
        try:
            self.decoder.end()
            self.decoder.join()
        except BaseException as error:  # also Ctrl-C
            self._abort(error)
            raise

    def _abort(self, error: BaseException) -> None:
        """End the thread and delete all files that are not complete."""
        self._aborted = True
        self.decoder.close()
        try:
            with contextlib.suppress(Exception):
                self.decoder.join()
        finally:
            self._open_files.__exit__(type(error), error, error.__traceback__)

    def _complete(self, error: BaseException | None) -> None:
        """Complete the files after the last frame. Called in the decoder's thread, at its end."""
        if error is None and not self._aborted:
            with self._open_files:  # an error in its body deletes the files
                self._write_metadata()

    def _write_metadata(self) -> None:
        if self.metadata is None:
            return
        seconds = (time.perf_counter() - self._started) / len(self.files)
        figures = run_figures(self.vae, self.num_frames, seconds)
        for index, (files, metadata) in enumerate(zip(self.files, self.metadata, strict=True)):
            if self._sheets:
                strip = self._sheets[index].strip(metadata["name"])
                save_contact_sheet(files.contact_sheet, [strip], fps=self.fps)
            write_json(files.metadata, metadata | figures)

    def keep_unfinished(self) -> list[Path]:
        """Close the videos of a failing run early; return the files that hold their frames so far."""
        self._aborted = True
        with contextlib.suppress(Exception):
            self.decoder.wait(timeout=_UNFINISHED_TIMEOUT)
        pairs = zip(self._videos, self.files, strict=False)
        kept = [video.keep_unfinished(files.unfinished) for video, files in pairs]
        return [path for path in kept if path is not None]


# ---- Metadata ----


def video_metadata(config: Config, prompt: Prompt, sample: int, prefix_path: str) -> dict[str, Any]:
    """Return all settings that determine a video. `prefix_path`: path of the prefix, if the prompt has no image."""
    track = {"prompt_track": [list(entry) for entry in prompt.track]} if prompt.track else {}
    return {
        "prompt": prompt.text,
        **track,
        "name": prompt.name,
        "sample": sample,
        "prefix": os.path.abspath(start) if (start := prompt.image or prefix_path) else "",
        "command": shlex.join(["python", *sys.argv]),
        "config": asdict(config),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }


def run_figures(vae: WanVAE, num_frames: int, seconds: float) -> dict[str, Any]:
    """Return the figures of the run that made a video of `num_frames` latent frames, for its metadata."""
    return {
        "latent_frames": num_frames,
        "pixel_frames": vae.num_pixel_frames(num_frames),
        "seconds": round(seconds, 3),
        "device": device_name(vae.net.device),
        "threads": torch.get_num_threads(),
    }


def device_name(device: torch.device) -> str:
    """Return the product name of a GPU, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
