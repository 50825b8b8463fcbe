"""When a rank did what: op times for profiles, on CPUs and GPUs alike."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.rollout import BlockDenoiser, BlockLayout, Cache
from utils.files import write_json

WORK = ("text", "denoise", "context", "context+denoise", "add-noise", "decode")
"""What counts as work; sending and waiting do not."""


@dataclass(frozen=True)
class Span:
    """One op of a rank, in seconds since the recorder's start."""

    name: str
    block: int  # -1: of no block
    start: float
    end: float


class Recorder:
    """Notes the ops of this process. On a GPU it records events of the stream, so that nothing waits for it."""

    def __init__(self, device: torch.device, enabled: bool = True):
        self.device = device
        self.enabled = enabled
        self._marks: list[tuple[str, int, object, object]] = []
        self._origin = self._mark()

    @contextlib.contextmanager
    def __call__(self, name: str, block: int = -1) -> Iterator[None]:
        """Note the block of code as op `name`."""
        if not self.enabled:
            yield
            return
        start = self._mark()
        try:
            yield
        finally:
            self._marks.append((name, block, start, self._mark()))

    def restart(self) -> None:
        """Forget everything, and count time from now on."""
        self._marks.clear()
        self._origin = self._mark()

    def spans(self) -> list[Span]:
        """Everything that was noted, in order; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [Span(name, block, self._seconds(start), self._seconds(end)) for name, block, start, end in self._marks]

    def _mark(self) -> object:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _seconds(self, mark: object) -> float:
        if isinstance(mark, float):
            return mark - self._origin  # type: ignore[operator]
        return self._origin.elapsed_time(mark) / 1000  # type: ignore[attr-defined]


class RecordedDenoiser:
    """A denoiser whose passes are noted."""

    def __init__(self, denoiser: BlockDenoiser, layout: BlockLayout, record: Recorder):
        self.denoiser = denoiser
        self.layout = layout
        self.record = record

    def denoise(self, x: Tensor, sigma: float, first_frame: int, cache: Cache, write: bool = False) -> Tensor:
        """As `Denoiser.denoise`."""
        with self.record("denoise", self.layout.block_at(first_frame)):
            return self.denoiser.denoise(x, sigma, first_frame, cache, write)

    def write_context(self, x: Tensor, sigma: float, first_frame: int, cache: Cache) -> None:
        """As `Denoiser.write_context`."""
        with self.record("context", self.layout.block_at(first_frame)):
            self.denoiser.write_context(x, sigma, first_frame, cache)

    def write_then_denoise(
        self, context: Tensor, context_sigma: float, x: Tensor, sigma: float, first_frame: int, cache: Cache
    ) -> Tensor:
        """As `Denoiser.write_then_denoise`."""
        block = self.layout.block_at(first_frame) + 1
        with self.record("context+denoise", block):
            return self.denoiser.write_then_denoise(context, context_sigma, x, sigma, first_frame, cache)


def write_profile(path: Path, rank: int, duties: str, spans: list[Span]) -> None:
    """Write a rank's profile as JSON."""
    write_json(path, {"rank": rank, "duties": duties, "spans": [asdict(span) for span in spans]}, indent=None)


def read_profile(path: Path) -> tuple[int, str, list[Span]]:
    """Rank, duties and ops of a file that `write_profile` has written."""
    content = json.loads(path.read_text())
    return content["rank"], content["duties"], [Span(**span) for span in content["spans"]]


def busy(spans: list[Span]) -> float:
    """Seconds of work."""
    return sum(span.end - span.start for span in spans if span.name in WORK)


def summary(profiles: list[tuple[int, str, list[Span]]]) -> str:
    """A table: what every rank spent its time on, its busy share, and the speed-up against one rank doing it all."""
    spans = [span for _, _, own in profiles for span in own]
    total = max(span.end for span in spans) - min(span.start for span in spans)
    names = list(dict.fromkeys(span.name for span in spans))
    lines = ["| rank | does | busy | " + " | ".join(names) + " |", "|" + "---|" * (3 + len(names))]
    for rank, duties, own in profiles:
        times = [sum(s.end - s.start for s in own if s.name == name) for name in names]
        cells = [str(rank), duties, f"{busy(own) / total:.0%}", *(f"{t:.2f} s" for t in times)]
        lines.append("| " + " | ".join(cells) + " |")
    work = sum(busy(own) for _, _, own in profiles)
    bubble = 1 - work / (total * len(profiles))
    lines.append(
        f"\n{total:.2f} s for {work:.2f} s of work: {work / total:.2f}x of one rank; "
        f"{bubble:.0%} of the ranks' time is idle"
    )
    return "\n".join(lines)
