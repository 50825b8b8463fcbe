"""Decode latents to uint8 frames: at once, or in a thread beside the one that denoises.

The pixels become uint8 on the device, before they are copied to the host.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from model.decoder import StreamingDecoder
from pipeline.channel import Channel, ClosedError
from utils.errors import UserError
from utils.video import quantize

QUEUED_BLOCKS = 4
"""Blocks of a video file that may wait for the decoder. Latents are small; decoded frames are never queued."""
Tag = TypeVar("Tag")


def frame_range(start: int, count: int, block: int | None = None) -> str:
    """Return a name for `count` latent frames from `start`, for error messages."""
    frames = f"latent frame {start}" if count == 1 else f"latent frames {start} to {start + count - 1}"
    return frames if block is None else f"block {block} ({frames})"


def not_finite(part: str, video: str = "", decoded: bool = False) -> str:
    """Return the error message for NaN in a part of a video; `decoded`: the latents are finite, the pixels are not."""
    found = f"{part} of {video}" if video else part
    cause = f"the VAE decodes {found} to NaN or infinity" if decoded else f"NaN or infinity in {found}"
    return f"{cause}; no video is written: try model.dtype=float32, or other weights"


class HostBuffers:
    """Pinned host memory for copies from a GPU. Two buffers take turns: one is filled while the other is read."""

    def __init__(self) -> None:
        self._buffers: list[Tensor | None] = [None, None]
        self._next = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """Start to copy a tensor to the host on the current stream. The result holds until the next call but one."""
        number, self._next = self._next, 1 - self._next
        buffer = self._buffers[number]
        if buffer is None or buffer.numel() < tensor.numel():
            buffer = self._buffers[number] = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=True)
        return buffer[: tensor.numel()].view(tensor.shape).copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class DecodedFrames:
    """Frames of the next latents. On a GPU their copy to the host may be under way."""

    frames: Tensor
    """uint8 [B, T, H, W, 3] on the host."""
    finite: Tensor
    """[B, 4]: whether the extrema of the latents and of the pixels are finite."""
    copied: "torch.cuda.Event | None"

    @classmethod
    def decode(cls, decoder: StreamingDecoder, latents: Tensor, buffers: HostBuffers | None = None) -> "DecodedFrames":
        """Decode the next latents [B, F, C, h, w]. On a GPU this does not wait for the device.

        Args:
            buffers: host memory for the frames; default: new memory.
        """
        pixels = decoder.push(latents)
        extrema = [bound(dim=(1, 2, 3, 4)) for x in (latents, pixels) for bound in (x.amin, x.amax)]
        finite = torch.stack(extrema, dim=1).isfinite()  # the extrema of a NaN are NaN
        # Rearrange the pixels to channels last on the device: on the host it is far slower.
        frames = quantize(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        if not pixels.is_cuda:
            return cls(frames.cpu(), finite, None)
        finite = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
        frames, copied = (buffers or HostBuffers()).copy(frames), torch.cuda.Event()
        copied.record()
        return cls(frames, finite, copied)

    def read(self, part: str, videos: Sequence[str] = ()) -> list[np.ndarray]:
        """Return the frames of each video, uint8 [T, H, W, 3], when they have arrived.

        Args:
            part: name of the latents, for error messages.
            videos: name of each video, for error messages.

        Raises:
            UserError: if latents or pixels hold NaN or infinity.
        """
        if self.copied is not None:
            self.copied.synchronize()
        frames = list(self.frames.numpy())
        for index, (low, high, *of_pixels) in enumerate(self.finite.tolist()):
            if not (low and high and all(of_pixels)):
                raise UserError(not_finite(part, videos[index] if videos else "", decoded=low and high))
        return frames


def decode_frames(
    decoder: StreamingDecoder, latents: Tensor, part: str, videos: Sequence[str] = ()
) -> list[np.ndarray]:
    """Decode the next latents [B, F, C, h, w] and return `DecodedFrames.read`."""
    return DecodedFrames.decode(decoder, latents).read(part, videos)


@dataclass(frozen=True)
class _QueuedBlock(Generic[Tag]):
    latents: Tensor
    part: str
    tag: Tag
    ready: "torch.cuda.Event | None"


@functools.cache  # one per device: torch keeps the memory of each stream apart, and never returns it to another
def _stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


class DecodingThread(Generic[Tag]):
    """Decodes one video, or a batch, in a thread of its own, beside the thread that denoises it.

    On a GPU the thread has its own stream. Events order it after the stream that made the latents. Call `start` before
    the first `put`. The thread ends after `end` or `close`, or with an error.
    """

    def __init__(
        self,
        decoder: StreamingDecoder,
        device: torch.device,
        deliver: Callable[[Tag, list[np.ndarray]], None],
        *,
        on_end: Callable[[BaseException | None], None] | None = None,
        videos: Sequence[str] = (),
        queued: int = QUEUED_BLOCKS,
        span: Callable[[Tag], AbstractContextManager[object]] | None = None,
        name: str = "decode",
    ):
        """
        Args:
            deliver: called in the thread with a block's tag and the frames of each video, uint8 [T, H, W, 3]. The
                frames hold until it returns.
            on_end: called in the thread at its end, with the error that ended it. It may raise another one.
            videos: name of each video, for error messages.
            queued: blocks that may wait in the queue.
            span: context in which a block is decoded, for a profile.
        """
        self._decoder, self._deliver, self._on_end, self._videos = decoder, deliver, on_end, videos
        self._span = span or (lambda tag: contextlib.nullcontext())
        self._queue: Channel[_QueuedBlock[Tag]] = Channel(queued)
        self._error: BaseException | None = None
        self._progress = threading.Condition()
        self._unfinished = 0  # blocks that are queued or being decoded
        on_gpu = device.type == "cuda"
        self._stream = _stream(device) if on_gpu else None
        self._buffers = HostBuffers() if on_gpu else None
        self._num_threads = torch.get_num_threads()
        # A daemon: an interpreter that exits does not wait for an endless video.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # ---- Called by the thread that denoises ----

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, latents: Tensor, part: str, tag: Tag) -> None:
        """Queue the next latents [B, F, C, h, w]; wait while the queue is full. They must not change afterwards.

        Args:
            part: name of these latents, for error messages.

        Raises:
            Exception: the error that ended the thread.
            ClosedError: if the thread was closed.
        """
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(latents.device))
        with self._progress:
            self._unfinished += 1
        try:
            self._queue.put(_QueuedBlock(latents, part, tag, ready))
        except ClosedError:
            self.join()
            raise

    @property
    def latest(self) -> Tensor | None:
        """The pixel frames that the decoder keeps, after all blocks that were put.

        Raises:
            Exception: the error that ended the thread.
        """
        self.wait()
        latest = self._decoder.latest
        if latest is not None and self._stream is not None:
            latest.record_stream(torch.cuda.current_stream(latest.device))
        return latest

    def wait(self, timeout: float | None = None) -> None:
        """Wait until all blocks that were put are delivered, at most `timeout` seconds.

        Raises:
            Exception: the error that ended the thread.
        """
        with self._progress:
            self._progress.wait_for(lambda: not self._unfinished, timeout)
        self._raise_error()

    def end(self, error: BaseException | None = None) -> None:
        """End the thread after the blocks that were put. `error` then counts as the thread's own."""
        self._queue.end(error)

    def close(self) -> None:
        """End the thread after the block that it decodes; drop the others."""
        self._queue.close()

    def join(self) -> None:
        """Wait until the thread has ended, after `end` or `close`. Called in the thread itself, it does not wait.

        Raises:
            Exception: the error that ended the thread. It is raised once.
        """
        if self._thread.ident is not None and not self.is_current:
            self._thread.join()
        self._raise_error()

    @property
    def is_current(self) -> bool:
        """Whether the caller runs in the thread."""
        return threading.current_thread() is self._thread

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    # ---- The thread ----

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            torch.set_num_threads(self._num_threads)  # each thread has its own number, and results depend on it
            with torch.cuda.stream(self._stream):
                self._decode_blocks()
        except ClosedError:
            error = None
        except BaseException as caught:
            error = caught
        if self._on_end is not None:
            try:
                self._on_end(error)
            except BaseException as caught:
                error = caught
        self._error = error
        self._queue.close()
        with self._progress:
            self._unfinished = 0
            self._progress.notify_all()

    def _decode_blocks(self) -> None:
        """Decode and deliver all blocks. On a GPU the next block is decoded while the frames of one are delivered."""
        decoded: tuple[_QueuedBlock[Tag], DecodedFrames] | None = None
        while True:
            if decoded is not None and self._queue.is_empty:
                self._deliver_block(*decoded)
                decoded = None
            block = self._queue.get()
            if block is None:
                return
            frames = self._decode(block)
            if decoded is not None:
                self._deliver_block(*decoded)
            decoded = block, frames
            if frames.copied is None:
                self._deliver_block(*decoded)
                decoded = None
            del block, frames  # waiting for the next block holds no memory

    def _decode(self, block: _QueuedBlock[Tag]) -> DecodedFrames:
        with self._span(block.tag):
            if self._stream is not None and block.ready is not None:
                self._stream.wait_event(block.ready)
                block.latents.record_stream(self._stream)
            return DecodedFrames.decode(self._decoder, block.latents, self._buffers)

    def _deliver_block(self, block: _QueuedBlock[Tag], decoded: DecodedFrames) -> None:
        self._deliver(block.tag, decoded.read(block.part, self._videos))
        with self._progress:
            self._unfinished -= 1
            self._progress.notify_all()
