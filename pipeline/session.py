"""Live video: a session yields pixel frames block by block while the prompt may change."""

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.build import block_layout, rollout_sigmas
from pipeline.output import VideoFiles, run_figures, video_metadata
from pipeline.prefix import read_prefix
from pipeline.prompt_track import LivePrompts, checked_prompt
from pipeline.recording import Recording
from pipeline.session_worker import OpEvent, SessionBlock, SessionWorker
from utils.config import Config, RolloutConfig
from utils.errors import UserError
from utils.files import write_json
from utils.locks import lock_file
from utils.prompts import Prompt

if TYPE_CHECKING:
    from pipeline.text_to_video import TextToVideo

KEPT_EMBEDDINGS = 100
"""Embeddings of the latest prompts that a session keeps in memory. It writes none to `model.text_cache`."""


class Session:
    """A video under way. Iterate over it for its blocks; all other methods may be called from any thread.

    The blocks are denoised in one thread and decoded in another. Both start with the iteration. They work at most a few
    blocks ahead, so a slow reader slows them down. Memory does not grow with the video.

    Example:
        with pipe.session("a red circle moving right fast on a blue background") as session:
            for part in session:
                print(part.block, part.prompt, part.frames.shape)
                session.prompt = "a green circle moving right fast on a blue background"  # from the next block on

    Attributes:
        sigmas: the S + 1 noise levels of the steps.
    """

    def __init__(self, pipe: "TextToVideo", prompts: LivePrompts, sample: int, prefix_path: str, endless: bool):
        """`TextToVideo.session` calls this.

        Args:
            pipe: networks, and the configuration of this video.
            prompts: the first prompt, and those that follow.
            prefix_path: path of the start image; empty for none.
            endless: ignore the configured length.

        Raises:
            UserError: for settings without a live video, or a file that cannot be read.
        """
        config = pipe.config
        check_live(config, endless)
        prefix = read_prefix(prefix_path, config, pipe.vae) if prefix_path else None
        prefix_frames = 0 if prefix is None else prefix.shape[1]
        if endless:
            config.video.num_output_frames = endless_length(config.rollout, prefix_frames)
        schedule = pipe.schedule(prefix_frames)
        if endless:
            schedule = replace(schedule, num_blocks=None)
        self.sigmas = tuple(rollout_sigmas(config.rollout))
        pipe.embeddings = pipe.embeddings.limited(KEPT_EMBEDDINGS)
        self._pipe, self._prompts, self._sample, self._prefix_path = pipe, prompts, sample, prefix_path
        self._clock = clock = PromptClock(prompts)
        self._recording = Recording(config.video.fps, config.video.crf)
        self._lock = threading.Lock()
        self._num_pixel_frames, self._seconds = 0, 0.0  # of the blocks that the reader has received
        self._last_block = -1
        self._worker = SessionWorker(
            pipe.vae,
            lambda on_op: pipe.rollout([prompts.prompt], [sample], prefix, on_op, track=prompts),
            pipe.ops(schedule, prompts, prefix_frames),
            schedule.caches,
            prompt_at=prompts.prompt_at,
            prompt_set_at=clock.set_at,
            prefix=prefix,
        )
        self._end = weakref.finalize(self, _end_session, self._worker, self._recording)

    def __iter__(self) -> Iterator[SessionBlock]:
        return self

    def __next__(self) -> SessionBlock:
        """Return the next block. An error in one of the threads is raised here."""
        try:
            part = self._worker.next_block()
            if part is None:
                raise StopIteration
            with self._lock:
                self._recording.write(part.frames)
                self._num_pixel_frames += len(part.frames)
                self._last_block = part.block
                self._seconds += part.seconds
            return part
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._worker.close(wait=True)

    @property
    def prompt(self) -> str:
        """The prompt of the blocks that have not started. Set it in any thread, at any time.

        Setting it returns at once. It raises `UserError` for an empty prompt.
        """
        return self._prompts.prompt

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        self._clock.change(prompt)

    def pause(self) -> None:
        """Pause before the next op. Returns at once."""
        self._worker.pause()

    def resume(self) -> None:
        """Continue after `pause`. Returns at once."""
        self._worker.resume()

    def close(self) -> None:
        """End the video after the op under way: the iteration ends. Returns at once; `save` still works.

        Leaving a `with` block closes the session and waits for its threads.
        """
        self._worker.close()

    def on_op(self, callback: Callable[[OpEvent], None] | None) -> None:
        """Call a function after each op, in the denoising thread; None to stop. The next op waits for it."""
        self._worker.on_op = callback

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the blocks that the iteration has yielded so far as mp4, and a JSON file beside it.

        `inference.py --config_path X.json` makes the same frames. The first save of a session has the bytes of that
        file. Later ones start a new group of pictures where the previous save ended.

        Args:
            path: file name that ends in .mp4; existing files are replaced.

        Raises:
            UserError: if there are no frames, for another suffix, or a folder that is not writable.
        """
        files = VideoFiles.at(path)
        files.require_no_folders()
        with lock_file(files.lock, files.activity, keep=False), self._lock:
            self._recording.save(files.video)
            write_json(files.metadata, self._metadata())
        return files.video

    def _metadata(self) -> dict[str, Any]:
        config, vae = deepcopy(self._pipe.config), self._pipe.vae
        num_frames = (self._num_pixel_frames - 1) // vae.temporal_stride + 1
        config.video.num_output_frames = num_frames
        (_, text), *later = (entry for entry in self._prompts.to_metadata() if entry[0] <= self._last_block)
        prompt = Prompt(0, text, text, track=tuple((block, text) for block, text in later))
        settings = video_metadata(config, prompt, self._sample, self._prefix_path)
        return settings | run_figures(vae, num_frames, self._seconds)


class PromptClock:
    """Times of new prompts, for the lag of a session."""

    def __init__(self, prompts: LivePrompts):
        self._prompts, self._changed_at = prompts, 0.0

    def change(self, prompt: str) -> None:
        """Set the prompt."""
        prompt = checked_prompt(prompt)
        if prompt != self._prompts.prompt:
            self._changed_at = time.perf_counter()
            self._prompts.prompt = prompt

    def set_at(self, block: int) -> float | None:
        """Return when the prompt of a block that has just started was set; None if the block before has it, too."""
        return self._changed_at if self._prompts.is_switch(block) else None


def _end_session(worker: SessionWorker, recording: Recording) -> None:
    """Free what a session holds. Called when it is deleted, or when Python exits."""
    worker.close(wait=True)
    recording.close()


def check_live(config: Config, endless: bool) -> None:
    """Check that a configuration allows sessions.

    Raises:
        UserError: for a bidirectional schedule, several rollouts, video-to-video, or an endless video without a window.
    """
    if config.rollout.schedule == "bidirectional":
        raise UserError("a session yields blocks, and rollout.schedule=bidirectional has only one; choose block_first")
    if config.rollout.num_rollouts > 1:
        raise UserError("a session has one endless rollout: set rollout.num_rollouts=1")
    if config.video.source:
        raise UserError("a session starts from noise: leave out video.source")
    if endless and not config.rollout.window:
        raise UserError("an endless session needs a window: set rollout.window, or give num_frames")


def endless_length(rollout: RolloutConfig, prefix_frames: int) -> int:
    """Return a length in latent frames with whole blocks at which a video has all caches, with full windows."""
    layout = block_layout(rollout, 1, prefix_frames)
    return layout.start(layout.prefix_blocks + rollout.leading_blocks + rollout.window + 1)
