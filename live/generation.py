"""One generation: a session that runs in a thread and delivers its frames and events to a client."""

import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import cv2
import numpy as np

from live.outbox import Outbox
from live.pacer import Pacer
from live.protocol import FRAME, THUMBNAIL, ModelInfo, Start, pack_picture
from live.recordings import Recordings
from utils.errors import UserError, expected_failure

AHEAD_SECONDS = 0.3  # seconds of video that are generated early
QUALITY = 94  # of JPEG
THUMBNAIL_SIDE = 96  # pixels at most
LOWERS_MEMORY = "a smaller video (video.height, video.width), rollout.window or model.dtype=bfloat16"


class Session(Protocol):
    """The part of `pipeline.session.Session` that the server uses."""

    prompt: str

    def __enter__(self) -> Any: ...
    def __exit__(self, *exception: Any) -> None: ...
    def __iter__(self) -> Iterator[Any]: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def close(self) -> None: ...
    def save(self, path: str) -> Any: ...
    def on_op(self, callback: Callable[[Any], None]) -> None: ...


class Engine(Protocol):
    """A loaded model that opens sessions; `PipelineEngine` is the real one."""

    info: ModelInfo

    def open(self, start: Start, seed: int, image_path: str | None) -> Session:
        """Return a new session. Called in the generation's thread."""
        ...


class Generation:
    """Runs one session in a thread of its own. The methods may be called from any thread."""

    def __init__(
        self,
        engine: Engine,
        start: Start,
        name: str,
        image_path: str | None,
        outbox: Outbox,
        recordings: Recordings,
        on_end: Callable[["Generation", str, str], None],
    ):
        """
        Args:
            name: name of the recording.
            image_path: the checked start image; None for none.
            on_end: called in the generation's thread with the reason and a message when the session has ended.
        """
        self.start_request = start
        self.seed = secrets.randbelow(2**32) if start.seed is None else start.seed
        self.name = name
        self.started_at = time.monotonic()
        self.paused_at: float | None = None
        self.image_path, self.num_frames = image_path, 0
        self._engine, self._outbox = engine, outbox
        self._recordings, self._on_end = recordings, on_end
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._new_prompt: str | None = None  # came before the session was open
        self._stop_reason = ""
        info, steps = engine.info, len(engine.info.sigmas) - 1
        per_pass = info.block_frames / info.fps / steps if start.pace == "realtime" else 0.0
        self._pacer = Pacer(per_pass, AHEAD_SECONDS + info.block_frames / info.fps / 4)
        self._thread = threading.Thread(target=self._run, name=f"generation {self.name[:6]}", daemon=True)

    # ---- Control ----

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for the end of the thread, but at most this long."""
        self._thread.join(seconds)

    def stop(self, reason: str) -> None:
        """End the session after the op under way. Returns at once; `on_end` is called when it has ended."""
        with self._lock:
            self._stop_reason = self._stop_reason or reason
            session = self._session
        self._pacer.stop()
        if session is not None:
            session.close()

    def change_prompt(self, prompt: str) -> None:
        """Set the prompt of the blocks that have not started.

        Raises:
            UserError: if the model has no such feature, or the session refuses the prompt.
        """
        if "prompt" not in self._engine.info.features:
            raise UserError("the prompt of a running session cannot change; stop it and start a new one")
        with self._lock:
            session = self._session
            if session is None:
                self._new_prompt = prompt
                return
        session.prompt = prompt

    def set_paused(self, paused: bool) -> None:
        """Pause or resume the session."""
        with self._lock:
            session = self._session
            if session is None or paused == (self.paused_at is not None):
                return
            self.paused_at = time.monotonic() if paused else None
        if paused:
            self._pacer.hold()
            session.pause()
        else:
            self._pacer.release()
            session.resume()

    # ---- The thread ----

    def _run(self) -> None:
        reason, message = "finished", ""
        try:
            self._generate()
        except Exception as error:
            failure = expected_failure(error, LOWERS_MEMORY)
            reason, message = "error", failure[0] if failure else "the generation failed; see the server's log"
            if failure is None:
                traceback.print_exception(error, file=sys.stderr)
        try:
            self._recordings.finish(self.name)
        except Exception as error:
            print(f"a video cannot be saved: {error}", file=sys.stderr)
        self._session = None
        self._on_end(self, self._stop_reason or reason, message)

    def _generate(self) -> None:
        if self._stop_reason:
            return
        session = self._engine.open(self.start_request, self.seed, self.image_path)
        with session:  # leaving it waits for the op under way, so the device is free afterwards
            with self._lock:
                self._session = session
                stopped = self._stop_reason
                if self._new_prompt is not None:  # under the lock, so that it cannot replace a later one
                    session.prompt = self._new_prompt
            session.on_op(self._deliver_op)
            for part in session if not stopped else ():
                if self._stop_reason:
                    return
                self._deliver_block(session, part)

    def _deliver_op(self, event: Any) -> None:
        """Send an op and the x0 estimate that it made, then wait if the video is ahead of its clock."""
        if self._stop_reason:
            return
        fields = {"kind": event.kind, "block": event.block, "step": event.step, "sigma": round(float(event.sigma), 5)}
        self._outbox.add({"type": "op", **fields, "seconds": round(event.seconds, 5)})
        if event.thumbnail is not None:
            jpeg = encode_jpeg(_fit(event.thumbnail, THUMBNAIL_SIDE))
            self._outbox.add(pack_picture(THUMBNAIL, event.step, event.block, 0, jpeg))
        if event.kind == "denoise":
            if event.step == len(self._engine.info.sigmas) - 2:
                self._pacer.start()
            self._pacer.wait()

    def _deliver_block(self, session: Session, part: Any) -> None:
        if not self.num_frames:
            self._recordings.add(self.name, session)
        self.num_frames += len(part.frames)
        lag = getattr(part, "lag_seconds", None)
        self._outbox.add(
            {
                "type": "block",
                "block": part.block,
                "prompt": part.prompt,
                "seconds": round(part.seconds, 4),
                "decode_seconds": round(part.decode_seconds, 4),
                "lag": None if lag is None else round(lag, 4),
                "new_frames": len(part.frames),
                "frames": self.num_frames,
                "dropped": self._outbox.dropped_frames,
            }
        )
        first = self.num_frames - len(part.frames)
        for index, frame in enumerate(part.frames):
            picture = pack_picture(FRAME, index, part.block, first + index, encode_jpeg(frame))
            self._outbox.add(picture, is_frame=True)


def encode_jpeg(frame: np.ndarray) -> bytes:
    """Encode a frame, uint8 RGB [H, W, 3], with full colour resolution."""
    options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(frame[..., ::-1]), options)
    return data.tobytes()


def _fit(picture: np.ndarray, side: int) -> np.ndarray:
    """Shrink a picture [h, w, 3] to at most `side` pixels per side."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return picture
    return cv2.resize(
        picture, (max(1, round(width * scale)), max(1, round(height * scale))), None, 0, 0, cv2.INTER_AREA
    )
