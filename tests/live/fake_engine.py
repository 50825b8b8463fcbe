"""A session without a network: it draws the miniature world by its prompts and reports the ops of a real schedule."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from live.protocol import ModelInfo, Start
from pipeline.schedule import Denoise, DenoiseAndWrite, Schedule, WriteThenDenoise
from shapes import world
from utils.errors import UserError

SIGMAS = (1.0, 0.9375, 0.8333, 0.625, 0.0)
EXAMPLES = (
    "a red circle moving right fast on a white background",
    "a blue square moving left slowly on a black background",
    "a yellow triangle moving up fast on a gray background",
    "a green circle moving down slowly on a white background",
    "a purple square moving up right fast on a green background",
    "an orange triangle moving left fast on a graded blue background",
)


@dataclass(frozen=True)
class FakeBlock:
    """The fields of a session's block."""

    block: int
    frames: np.ndarray
    prompt: str
    seconds: float
    decode_seconds: float = 0.001
    lag_seconds: float | None = None


@dataclass(frozen=True)
class FakeOp:
    """The fields of a session's op."""

    kind: str
    block: int
    step: int
    sigma: float
    seconds: float
    thumbnail: np.ndarray | None


class FakeSession:
    """Endless video of the miniature world; prompts that it cannot parse show noise."""

    def __init__(self, start: Start, seed: int, schedule: str, op_seconds: float, size: int, fail_at: int | None):
        self.prompt, self.schedule, self.size = start.prompt, schedule, size
        self.closed = self.saved = False
        self.prompts: dict[int, str] = {}
        self.op_seconds, self.fail_at = op_seconds, fail_at
        self._running = threading.Event()
        self._running.set()
        self._rng = np.random.default_rng(seed)
        self._on_op: Callable[[FakeOp], None] = lambda op: None
        self.num_blocks = 0

    def __enter__(self) -> "FakeSession":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def on_op(self, callback: Callable[[FakeOp], None]) -> None:
        self._on_op = callback

    def pause(self) -> None:
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    def close(self) -> None:
        self.closed = True
        self._running.set()

    def save(self, path: str) -> None:
        if not self.num_blocks:
            raise UserError("there are no frames to save yet")
        Path(path).write_bytes(b"mp4 of %d blocks" % self.num_blocks)
        Path(path).with_suffix(".json").write_text("{}")
        self.saved = True

    def __iter__(self) -> Iterator[FakeBlock]:
        steps = len(SIGMAS) - 1
        ops = Schedule(steps, None, method=self.schedule).ops("diagonal")  # type: ignore[arg-type]
        for op in ops:
            self._running.wait()
            if self.closed:
                return
            if self.op_seconds:
                time.sleep(self.op_seconds)
            if op.block == self.fail_at:
                raise RuntimeError("a secret of the server")
            if isinstance(op, DenoiseAndWrite | WriteThenDenoise):
                op = op.denoise
            if isinstance(op, Denoise):
                self.prompts.setdefault(op.block, self.prompt)
                self._on_op(FakeOp("denoise", op.block, op.step, SIGMAS[op.step], 0.012, self._estimate(op)))
                if op.step == steps - 1:
                    yield self._finish(op.block)
            else:
                self._on_op(FakeOp("write", op.block, op.noise_index, SIGMAS[op.noise_index], 0.004, None))

    def _finish(self, block: int) -> FakeBlock:
        prompt = self.prompts.pop(block)
        self.num_blocks += 1
        return FakeBlock(block, self._frames(block, prompt), prompt, 0.05)

    def _frames(self, block: int, prompt: str) -> np.ndarray:
        count, first = (9, 0) if block == 0 else (12, 12 * block - 3)
        if not world.is_caption(prompt):
            return self._rng.integers(0, 256, (count, self.size, self.size, 3), np.uint8)
        frames = world.render(world.Clip(world.parse_caption(prompt), 20.0, 40.0), count, first)
        return (
            frames if self.size == world.SIZE else np.repeat(np.repeat(frames, self.size // 64, 1), self.size // 64, 2)
        )

    def _estimate(self, op: Denoise) -> np.ndarray:
        frame = self._frames(op.block, self.prompts[op.block])[4].astype(np.float32)
        blurred = frame
        for _ in range(3 * (3 - op.step)):
            blurred = sum(np.roll(blurred, s, axis) for s, axis in itertools.product((-2, 2), (0, 1))) / 4
        return np.clip(blurred + self._rng.normal(0, 6 * (3 - op.step), frame.shape), 0, 255).astype(np.uint8)


class FakeEngine:
    """Opens fake sessions and remembers them."""

    def __init__(self, op_seconds: float = 0.0, size: int = 64, fail_at: int | None = None):
        self.info = ModelInfo("shapes", 16, size, size, SIGMAS, 12, "timestep_first", "recache", EXAMPLES)
        self.sessions: list[FakeSession] = []
        self.op_seconds, self.fail_at = op_seconds, fail_at

    def open(self, start: Start, seed: int, image_path: str | None) -> FakeSession:
        assert image_path is None or Path(image_path).stat().st_size
        schedule = start.schedule or self.info.schedule
        session = FakeSession(start, seed, schedule, self.op_seconds, self.info.width, self.fail_at)
        self.sessions.append(session)
        return session
