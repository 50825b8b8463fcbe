"""The threads of a session: one denoises blocks, one decodes them.

The threads refer to the worker, not to the session, so that a session without references is deleted and ends them.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from model.preview import LatentPreview
from model.vae import StreamingDecoder, WanVAE
from pipeline.batching import Batch, unbatched
from pipeline.output import decode_frames, frame_range
from pipeline.rollout import Rollout
from pipeline.schedule import Denoise, DenoiseAndWrite, ForgetContext, Op, RewindContext, WriteContext, WriteThenDenoise

QUEUED_BLOCKS = 1
"""Blocks that may wait for the decoder, and decoded blocks that may wait for the reader."""
T = TypeVar("T")


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
    ready: "torch.cuda.Event | None"


class ClosedError(Exception):
    """The session was closed while a thread waited."""


class Channel(Generic[T]):
    """A bounded queue from one thread to another that can end, with or without an error."""

    def __init__(self, size: int):
        self._items: deque[T] = deque()
        self._size = size
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None

    def put(self, item: T) -> None:
        """Append an item; wait while the queue is full.

        Raises:
            ClosedError: if the queue is closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < self._size or self._closed)
            if self._closed:
                raise ClosedError
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> T | None:
        """Return the next item; wait for it. Return None at the end, or raise the error that ended the queue."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ended or self._closed)
            if self._items and not self._closed:
                self._changed.notify_all()
                return self._items.popleft()
            error, self._error = self._error, None
            if error is not None and not self._closed:
                raise error
            return None

    def end(self, error: BaseException | None = None) -> None:
        """End the queue after the items that it holds."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """End the queue now and drop its items."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


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
        self._latents: Channel[FinishedBlock] = Channel(QUEUED_BLOCKS)
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
        on_gpu = vae.net.device.type == "cuda"
        self._stream = torch.cuda.Stream(vae.net.device) if on_gpu else None
        # Daemons: an interpreter that exits does not wait for an endless video.
        self._threads = [
            threading.Thread(target=self._denoise, name="session-denoise", daemon=True),
            threading.Thread(target=self._decode, name="session-decode", daemon=True),
        ]

    # ---- Control ----

    def next_block(self) -> SessionBlock | None:
        """Return the next block; None at the end. The first call starts the threads.

        Raises:
            Exception: the error that ended one of the threads.
        """
        with self._control_lock:
            if not self._started and not self._closed.is_set():
                self._started = True
                for thread in self._threads:
                    thread.start()
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
        if wait and threading.current_thread() not in self._threads:
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join()

    def _stop_denoising(self) -> None:
        with self._control_lock:
            self._closed.set()
            self._running.set()
        self._latents.close()

    # ---- Denoising ----

    def _denoise(self) -> None:
        try:
            rollout = self._new_rollout(lambda op: self._after_op(rollout, op))
            if self._prefix is not None:
                block = rollout.layout.prefix_blocks - 1
                self._latents.put(FinishedBlock(block, self._prefix, self._prompt_at(block), 0.0, None, None))
            for block, latents in rollout.run(self._paced_ops(), self._caches):
                self._finish(block, latents)
            self._latents.end()
        except ClosedError:
            pass
        except BaseException as error:
            self._latents.end(error)
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
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(latents.device))
        seconds, self._seconds = self._seconds, 0.0
        set_at = self._set_at.pop(block, None)
        self._latents.put(FinishedBlock(block, latents, self._prompt_at(block), seconds, set_at, ready))

    # ---- Decoding ----

    def _decode(self) -> None:
        try:
            decoder = self._vae.stream()
            first_frame = 0
            with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
                while (finished := self._latents.get()) is not None:
                    self._blocks.put(self._decode_block(decoder, finished, first_frame))
                    first_frame += finished.latents.shape[1]
                    del finished
            self._blocks.end()
        except ClosedError:
            pass
        except BaseException as error:
            self._blocks.end(error)
            self._stop_denoising()

    def _decode_block(self, decoder: StreamingDecoder, finished: FinishedBlock, first_frame: int) -> SessionBlock:
        started, latents = time.perf_counter(), finished.latents
        if self._stream is not None and finished.ready is not None:
            self._stream.wait_event(finished.ready)
            latents.record_stream(self._stream)
        [frames] = decode_frames(decoder, latents, frame_range(first_frame, latents.shape[1], finished.block))
        if self._preview is not None:
            self._preview.learn(latents[0], frames)
        now, set_at = time.perf_counter(), finished.prompt_set_at
        lag = None if set_at is None else now - set_at
        return SessionBlock(finished.block, frames, finished.prompt, finished.seconds, now - started, lag)


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
