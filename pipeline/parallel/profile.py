"""Profile of a pipeline: timed spans of the ops of each rank, on CPUs and GPUs."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.block_pass import BlockPass
from pipeline.rollout import BlockDenoiser, BlockLayout, Cache
from utils.errors import UserError
from utils.files import read_json, write_json
from utils.tables import markdown_table

WORK = ("text", "denoise", "context", "context+denoise", "batch", "add-noise", "decode")
"""Names of the spans that count as work. Sends and waits do not count."""


@dataclass(frozen=True)
class Span:
    """One timed op of a rank, in seconds since the recorder started."""

    name: str
    block: int  # -1: the op belongs to no block
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.end - self.start


class Recorder:
    """Records the spans of this process. On a GPU it records CUDA events, so the host does not wait for the device."""

    def __init__(self, device: torch.device, enabled: bool = True, clock: Callable[[], float] = time.perf_counter):
        """
        Args:
            clock: returns seconds; not used on a GPU.
        """
        self.device = device
        self.enabled = enabled
        self.clock = clock
        self._marks: list[tuple[str, int, object, object]] = []
        self._origin = self._mark()

    @contextlib.contextmanager
    def __call__(self, name: str, block: int = -1) -> Iterator[None]:
        """Record the body of the `with` statement as a span."""
        if not self.enabled:
            yield
            return
        start = self._mark()
        try:
            yield
        finally:
            self._marks.append((name, block, start, self._mark()))

    def restart(self) -> None:
        """Delete all spans and restart the clock."""
        self._marks.clear()
        self._origin = self._mark()

    def spans(self) -> list[Span]:
        """Return all spans in order. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [Span(name, block, self._seconds(start), self._seconds(end)) for name, block, start, end in self._marks]

    def _mark(self) -> object:
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _seconds(self, mark: object) -> float:
        if isinstance(mark, float):
            return mark - self._origin  # type: ignore[operator]
        return self._origin.elapsed_time(mark) / 1000  # type: ignore[attr-defined]


class RecordedDenoiser:
    """A denoiser that records a span for each forward pass."""

    def __init__(self, denoiser: BlockDenoiser, layout: BlockLayout, recorder: Recorder):
        self.denoiser = denoiser
        self.layout = layout
        self.recorder = recorder

    def denoise(self, x: Tensor, sigma: float, first_frame: int, cache: Cache, write: bool = False) -> Tensor:
        """See `Denoiser.denoise`."""
        with self.recorder("denoise", self.layout.block_at(first_frame)):
            return self.denoiser.denoise(x, sigma, first_frame, cache, write)

    def write_context(self, x: Tensor, sigma: float, first_frame: int, cache: Cache, **options: Any) -> None:
        """See `Denoiser.write_context`."""
        with self.recorder("context", self.layout.block_at(first_frame)):
            self.denoiser.write_context(x, sigma, first_frame, cache, **options)

    def write_then_denoise(
        self,
        context: Tensor,
        context_sigma: float,
        x: Tensor,
        sigma: float,
        first_frame: int,
        cache: Cache,
        **options: Any,
    ) -> Tensor:
        """See `Denoiser.write_then_denoise`."""
        block = self.layout.block_at(first_frame) + 1
        with self.recorder("context+denoise", block):
            return self.denoiser.write_then_denoise(context, context_sigma, x, sigma, first_frame, cache, **options)

    def run_batch(self, passes: Sequence[BlockPass]) -> list[Tensor]:
        """See `Denoiser.run_batch`."""
        with self.recorder("batch", self.layout.block_at(max(item.first_frame for item in passes))):
            return self.denoiser.run_batch(passes)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class RankProfile:
    """The spans of one rank."""

    rank: int
    roles: str
    spans: list[Span]

    @property
    def busy_seconds(self) -> float:
        """Seconds of work."""
        return sum(span.seconds for span in self.spans if span.name in WORK)

    def timeline_row(self) -> tuple[str, list[tuple[str, float, float]]]:
        """Return a label and (name, start, end) of every span, for `evaluation.plots.save_timeline_plot`."""
        return f"rank {self.rank}: {self.roles}", [(span.name, span.start, span.end) for span in self.spans]

    def to_json(self) -> str:
        """Return the profile as JSON, for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RankProfile":
        """Return the profile in a string that `to_json` returned."""
        return cls._from_dict(json.loads(text))

    def save(self, path: Path) -> None:
        """Write the profile as a JSON file."""
        write_json(path, asdict(self), indent=None)

    @classmethod
    def load(cls, path: Path) -> "RankProfile":
        """Return the profile in a JSON file.

        Raises:
            UserError: if the file cannot be read or holds no profile.
        """
        content = read_json(path, "profile of scripts/pipeline_parallel_inference.py")
        try:
            profile = cls._from_dict(content)
            for span in profile.spans:
                if not isinstance(span.name, str) or not 0 <= span.start <= span.end < math.inf:
                    raise TypeError("a span has no name or no times")
            return profile
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is not a profile of scripts/pipeline_parallel_inference.py ({error})") from None

    @classmethod
    def _from_dict(cls, content: dict) -> "RankProfile":
        return cls(content["rank"], content.get("roles", ""), [Span(**span) for span in content["spans"]])


def profile_table(profiles: Sequence[RankProfile]) -> str:
    """Return a Markdown table of the seconds per rank and op, and a line with the speed-up over one rank."""
    spans = [span for profile in profiles for span in profile.spans]
    total = max(span.end for span in spans) - min(span.start for span in spans)
    names = list(dict.fromkeys(span.name for span in spans))
    rows = [["rank", "roles", "busy", *names]]
    for profile in profiles:
        seconds = [sum(span.seconds for span in profile.spans if span.name == name) for name in names]
        busy = f"{profile.busy_seconds / total:.0%}"
        rows.append([str(profile.rank), profile.roles, busy, *(f"{s:.2f} s" for s in seconds)])
    work = sum(profile.busy_seconds for profile in profiles)
    idle = 1 - work / (total * len(profiles))
    return (
        f"{markdown_table(rows)}\n\n{total:.2f} s for {work:.2f} s of work: {work / total:.2f}x the speed of one rank; "
        f"ranks are idle {idle:.0%} of the time"
    )
