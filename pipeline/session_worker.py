"""The threads of a session: one denoises blocks, one decodes them.

The threads refer to the worker, not to the session, so that a session without references is deleted and ends them.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from model.preview import LatentPreview
from model.vae import WanVAE
from pipeline.batching import Batch, unbatched
from pipeline.channel import Channel, ClosedError
from pipeline.decoding import DecodingThread, frame_range
from pipeline.rollout import Rollout
from pipeline.schedule import Denoise, DenoiseAndWrite, ForgetContext, Op, RewindContext, WriteContext, WriteThenDenoise

QUEUED_BLOCKS = 1
"""Blocks that may wait for the decoder, and decoded blocks that may wait for the reader."""


@dataclass(frozen=True)
class SessionBlock:
    """A block of a running session."""

    block: int
    """Its number. The start image is block 0."""
    frames: np.ndarray
    """Pixel frames [T, H, W, 3], uint8."""
    prompt: str
    seconds: float
    """Time of the ops since the previous block finished, without pauses."""
    decode_seconds: float
    lag_seconds: float | None
    """For the first block of a new prompt: time from setting the prompt to the decoded frames."""


@dataclass(frozen=True)
class OpEvent:
    """An op that was just executed. A fused pair gives two events."""

    kind: Literal["denoise", "write", "forget"]
    block: int
    step: int
    """Of a Denoise: its step. Of a write: its noise index; S is clean. Of a forget: the noise index of the cache."""
    sigma: float
    """Noise level of the op's input."""
    seconds: float
    """Time of the pass. It is divided among its ops."""
    thumbnail: np.ndarray | None
    """Of a Denoise: a small picture of the predicted x0, uint8 [h, w, 3]; the middle frame of the block."""


@dataclass(frozen=True)
class FinishedBlock:
    """A block that waits for the decoder."""

    block: int
    latents: Tensor
    prompt: str
    seconds: float
    prompt_set_at: float | None


class SessionWorker:
    """Runs a rollout and decodes its blocks, in two threads. The methods may be called from any thread."""

    def __init__(
        self,
        vae: WanVAE,
        rollout: Callable[[Callable[[Op], None]], Rollout],
        ops: Iterator[Op | Batch],
        caches: list[int],
        prompt_at: Callable[[int], str],
        prompt_set_at: Callable[[int], float | None],
        prefix: Tensor | None,
    ):
        """
        Args:
            rollout: returns the rollout with this `on_op`. It is called in the denoising thread.
            ops: ops of the video. The next one is requested when it is about to run.
            prompt_at: maps a started block to its prompt.
            prompt_set_at: maps a started block to the time at which its prompt was set, if the prompt is new.
            prefix: clean latents [1, F, C, h, w] that the video continues.
        """
        self._vae, self._new_rollout, self._ops, self._caches = vae, rollout, ops, caches
        self._prompt_at, self._prompt_set_at, self._prefix = prompt_at, prompt_set_at, prefix
        self.on_op: Callable[[OpEvent], None] | None = None
        self._preview: LatentPreview | None = None
        self._blocks: Channel[SessionBlock] = Channel(QUEUED_BLOCKS)
        self._running, self._closed, self._started = threading.Event(), threading.Event(), False
        self._running.set()
        self._control_lock = threading.Lock()
        self._op_started = self._seconds = 0.0
        self._num_ops = 1  # of the pass under way
        self._op_seconds: float | None = None  # each of its ops, once they have run
        self._newest_block = -1
        self._cache_index: dict[int, int] = {}  # of each cache: the noise index of its latest write
        self._set_at: dict[int, float] = {}  # of blocks in progress: when their new prompts were set
        self._first_frame = 0  # of the next block that is queued for the decoder
        self._decode_started: dict[int, float] = {}  # by block
        self._on_gpu = vae.net.device.type == "cuda"
        # A daemon: an interpreter that exits does not wait for an endless video.
        self._denoising = threading.Thread(target=self._denoise, name="session-denoise", daemon=True)
        self._decoding: DecodingThread[FinishedBlock] = DecodingThread(
            vae.stream(),
            vae.net.device,
            self._deliver,
            on_end=self._after_decoding,
            queued=QUEUED_BLOCKS,
            span=self._timed,
            name="session-decode",
        )

    # ---- Control ----

    def next_block(self) -> SessionBlock | None:
        """Return the next block; None at the end. The first call starts the threads.

        Raises:
            Exception: the error that ended one of the threads.
        """
        with self._control_lock:
            if not self._started and not self._closed.is_set():
                self._started = True
                self._denoising.start()
                self._decoding.start()
        return self._blocks.get()

    def pause(self) -> None:
        """Hold the denoising thread before its next op. Does nothing after `close`."""
        with self._control_lock:
            if not self._closed.is_set():
                self._running.clear()

    def resume(self) -> None:
        """Release the denoising thread."""
        self._running.set()

    def close(self, wait: bool = False) -> None:
        """End both threads after the op under way.

        Args:
            wait: return when they have ended. Ignored in the threads themselves.
        """
        self._stop_denoising()
        self._blocks.close()
        if wait and threading.current_thread() is not self._denoising and not self._decoding.is_current:
            if self._denoising.ident is not None:
                self._denoising.join()
            with contextlib.suppress(Exception):  # the reader has it
                self._decoding.join()

    def _stop_denoising(self) -> None:
        with self._control_lock:
            self._closed.set()
            self._running.set()
        self._decoding.close()

    # ---- Denoising ----

    def _denoise(self) -> None:
        try:
            rollout = self._new_rollout(lambda op: self._after_op(rollout, op))
            if self._prefix is not None:
                block = rollout.layout.prefix_blocks - 1
                self._queue(FinishedBlock(block, self._prefix, self._prompt_at(block), 0.0, None))
            for block, latents in rollout.run(self._paced_ops(), self._caches):
                self._finish(block, latents)
            self._decoding.end()
        except ClosedError:
            pass
        except BaseException as error:
            self._decoding.end(error)
        finally:
            self._ops, self._prefix = iter(()), None  # free memory even if the session lives on

    def _paced_ops(self) -> Iterator[Op | Batch]:
        """Yield the ops; wait while the session is paused. An op is requested after the pause: it fixes a prompt."""
        while True:
            self._running.wait()
            if self._closed.is_set():
                raise ClosedError
            self._op_started = time.perf_counter()
            op = next(self._ops, None)
            if op is None:
                return
            self._num_ops, self._op_seconds = len(unbatched(op)), None
            if op.block > self._newest_block:  # the request has fixed the block's prompt
                self._newest_block = op.block
                if (set_at := self._prompt_set_at(op.block)) is not None:
                    self._set_at[op.block] = set_at
            yield op

    def _after_op(self, rollout: Rollout, op: Op) -> None:
        callback, thumbnail = self.on_op, None
        if (write := op if isinstance(op, WriteContext) else getattr(op, "write", None)) is not None:
            self._cache_index[op.cache] = write.noise_index
        denoised = isinstance(op, Denoise | DenoiseAndWrite | WriteThenDenoise)
        if callback is not None and denoised:
            x0 = rollout.blocks[op.block].x0[0]
            if self._preview is None:
                self._preview = LatentPreview(self._vae, (x0.shape[-2], x0.shape[-1]))
                self._op_started = time.perf_counter()  # fitting is not a part of the op
            thumbnail = self._preview(x0[len(x0) // 2])  # waits for the GPU, so `seconds` holds the whole pass
        if self._op_seconds is None:
            self._op_seconds = (time.perf_counter() - self._op_started) / self._num_ops
        self._seconds += self._op_seconds
        if callback is not None:
            cache_index = self._cache_index.get(op.cache, 0)
            for event in op_events(op, rollout.sigmas, self._op_seconds, thumbnail, cache_index):
                callback(event)

    def _finish(self, block: int, latents: Tensor) -> None:
        seconds, self._seconds = self._seconds, 0.0
        set_at = self._set_at.pop(block, None)
        self._queue(FinishedBlock(block, latents, self._prompt_at(block), seconds, set_at))

    def _queue(self, finished: FinishedBlock) -> None:
        num_frames = finished.latents.shape[1]
        part = frame_range(self._first_frame, num_frames, finished.block)
        self._first_frame += num_frames
        self._decoding.put(finished.latents, part, finished)

    # ---- Called in the decoder's thread ----

    @contextlib.contextmanager
    def _timed(self, finished: FinishedBlock) -> Iterator[None]:
        self._decode_started[finished.block] = time.perf_counter()
        yield

    def _deliver(self, finished: FinishedBlock, videos: list[np.ndarray]) -> None:
        frames = videos[0].copy() if self._on_gpu else videos[0]  # the buffer on the host is used again
        if self._preview is not None:
            self._preview.learn(finished.latents[0], frames)
        now, set_at = time.perf_counter(), finished.prompt_set_at
        lag = None if set_at is None else now - set_at
        seconds = now - self._decode_started.pop(finished.block)
        self._blocks.put(SessionBlock(finished.block, frames, finished.prompt, finished.seconds, seconds, lag))

    def _after_decoding(self, error: BaseException | None) -> None:
        self._blocks.end(error)
        if error is not None:
            self._stop_denoising()


def op_events(
    op: Op, sigmas: list[float], seconds: float, thumbnail: np.ndarray | None, cache_index: int = 0
) -> Iterator[OpEvent]:
    """Yield the events of one pass, in the order of its ops.

    Args:
        cache_index: noise index that the op's cache holds.
    """
    match op:
        case Denoise():
            yield OpEvent("denoise", op.block, op.step, sigmas[op.step], seconds, thumbnail)
        case WriteContext():
            sigma = op.context_noise or sigmas[op.noise_index]
            yield OpEvent("write", op.block, op.noise_index, sigma, seconds, None)
        case DenoiseAndWrite():
            yield from op_events(op.denoise, sigmas, seconds / 2, thumbnail)
            yield from op_events(op.write, sigmas, seconds / 2, None)
        case WriteThenDenoise():
            yield from op_events(op.write, sigmas, seconds / 2, None)
            yield from op_events(op.denoise, sigmas, seconds / 2, thumbnail)
        case ForgetContext() | RewindContext():
            yield OpEvent("forget", op.block, cache_index, sigmas[cache_index], seconds, None)
