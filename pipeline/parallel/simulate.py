"""What a pipeline would do: the same ops on any number of ranks, with measured op times. Knows no tensors."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from pipeline.parallel.stages import Pipeline, plan_pipelines
from pipeline.schedule import Denoise, DenoiseAndWrite, Op, Schedule, WriteContext, WriteThenDenoise, for_stage


@dataclass(frozen=True)
class Times:
    """Seconds that ops take, by block: passes get longer until the window is full."""

    denoise: Mapping[int, float]
    context: Mapping[int, float]
    decode: Mapping[int, float]
    joined: Mapping[int, float] = field(default_factory=dict)
    """A context write with the next block's denoise. Not measured: the sum of the two."""
    add_noise: float = 0.0
    send: float = 0.0
    """That sending keeps a rank busy for."""

    def at(self, name: str, block: int) -> float:
        """Seconds of an op on a block; of a block that was not measured, those of the nearest that was."""
        values = getattr(self, name)
        if name == "joined" and not values:
            return self.at("context", block - 1) + self.at("denoise", block)
        return values[min(values, key=lambda known: abs(known - block))] if values else 0.0


def times_of(spans: Iterable[tuple[str, int, float]]) -> Times:
    """Times from (name, block, seconds) of a profile: medians."""
    seconds: dict[str, dict[int, list[float]]] = {}
    for name, block, duration in spans:
        seconds.setdefault(name, {}).setdefault(block, []).append(duration)

    def by_block(name: str) -> dict[int, float]:
        return {block: statistics.median(values) for block, values in seconds.get(name, {}).items()}

    def overall(name: str) -> float:
        values = [value for own in seconds.get(name, {}).values() for value in own]
        return statistics.median(values) if values else 0.0

    return Times(
        by_block("denoise"),
        by_block("context"),
        by_block("decode"),
        by_block("context+denoise"),
        overall("add-noise"),
        overall("send"),
    )


@dataclass(frozen=True)
class Prediction:
    """One video by one pipeline."""

    num_ranks: int
    first_block: float
    """Seconds until the first block is decoded."""
    total: float
    """Seconds until the last one is."""
    work: float
    """Seconds that one rank would need for all of it."""
    busy: list[float]
    """Share of the time that each rank works."""

    @property
    def speedup(self) -> float:
        """Against one rank doing all of it."""
        return self.work / self.total


def simulate(
    schedule: Schedule,
    num_ranks: int,
    times: Times,
    hop: float = 0.0,
    late: bool = False,
    fuse_context: bool = False,
) -> Prediction:
    """Run a video's ops on `num_ranks` ranks, of which those of the first pipeline work on it.

    Args:
        hop: seconds from one rank's send to the next one's receipt: latency, and bytes over bandwidth.
        late: blocks are sent only after their context write.
    """
    assert schedule.num_blocks is not None
    pipeline = plan_pipelines(num_ranks, schedule)[0]
    arrivals: dict[int, float] = {}
    busy = dict.fromkeys(pipeline.ranks, 0.0)
    finished: dict[int, float] = {}
    for rank, caches in pipeline.stages:
        decodes = rank == pipeline.decoder
        stage = _Stage(schedule, caches, times, arrivals, hop, late, decodes)
        for op in list(for_stage(schedule.ops("diagonal", fuse_context), caches)):
            stage.execute(op)
        stage.flush()
        busy[rank] += stage.busy
        arrivals, finished = stage.sent, stage.finished
    if pipeline.decoder not in [rank for rank, _ in pipeline.stages]:
        finished = _decode(pipeline, finished, times, hop, busy)
    total = max(finished.values())
    return Prediction(
        num_ranks, min(finished.values()), total, sum(busy.values()), [busy[rank] / total for rank in pipeline.ranks]
    )


class _Stage:
    """One rank's clock."""

    def __init__(
        self,
        schedule: Schedule,
        caches: tuple[int, ...],
        times: Times,
        arrivals: dict[int, float],
        hop: float,
        late: bool,
        decodes: bool,
    ):
        self.schedule, self.caches, self.times, self.arrivals = schedule, caches, times, arrivals
        self.hop, self.late, self.decodes = hop, late, decodes
        self.is_first = caches[0] == schedule.caches[0]
        self.is_last = caches[-1] == schedule.caches[-1]
        self.clock = self.busy = 0.0
        self.seen: set[int] = set()
        self.sent: dict[int, float] = {}
        self.finished: dict[int, float] = {}
        self._held: int | None = None

    def execute(self, op: Op) -> None:
        """Let an op's time go by."""
        if isinstance(op, WriteThenDenoise):
            self._have(op.write.block)
            self._have(op.block)
            self._work(self.times.at("joined", op.block))
            self._reached(op.denoise)
        elif isinstance(op, WriteContext):
            self._have(op.block)
            self._work(self.times.at("context", op.block))
            if op.block == self._held:
                self.flush()
        else:
            self._have(op.block)
            self._work(self.times.at("denoise", op.block))
            self._reached(op.denoise if isinstance(op, DenoiseAndWrite) else op)
            if isinstance(op, DenoiseAndWrite) and op.block == self._held:
                self.flush()

    def flush(self) -> None:
        """Send the block that is held back."""
        if self._held is not None:
            held, self._held = self._held, None
            self._send(held)

    def _have(self, block: int) -> None:
        if block in self.seen:
            return
        self.seen.add(block)
        if block < self.schedule.prefix_blocks:
            return
        if self.is_first:
            self._work(self.times.add_noise)
            return
        self.clock = max(self.clock, self.arrivals[block])
        self._leave(block, block < self.schedule.prefix_blocks + self.schedule.leading_blocks, clean=True)

    def _reached(self, op: Denoise) -> None:
        noise_index = op.step + 1
        if noise_index < self.schedule.num_steps:
            self._work(self.times.add_noise)
        at = self.schedule.handoff_index(op.block, self.caches)
        self._leave(op.block, noise_index == (self.schedule.num_steps if at is None else at), clean=at is None)

    def _leave(self, block: int, leaves: bool, clean: bool) -> None:
        if not leaves:
            return
        if self.is_last:
            self._work(self.times.at("decode", block) if self.decodes else self.times.send)
            self.finished[block] = self.clock
        elif self.late:
            self.flush()
            self._held = block
        else:
            self._send(block)

    def _send(self, block: int) -> None:
        self._work(self.times.send)
        self.sent[block] = self.clock + self.hop

    def _work(self, seconds: float) -> None:
        self.clock += seconds
        self.busy += seconds


def _decode(
    pipeline: Pipeline, finished: dict[int, float], times: Times, hop: float, busy: dict[int, float]
) -> dict[int, float]:
    """When a decoder of its own is done with the blocks."""
    clock, done = 0.0, {}
    for block in sorted(finished):
        seconds = times.at("decode", block)
        clock = max(clock, finished[block] + hop) + seconds
        busy[pipeline.decoder] += seconds
        done[block] = clock
    return done


def table(predict: Callable[..., Prediction], most: int, pixel_frames: int) -> str:
    """Markdown for 1 to `most` ranks: as sent at once, as sent late, and with fused passes."""
    lines = ["| ranks | first block | frames/s | speed-up | sent late | fused context |", "|" + "---|" * 6]
    for count in range(1, most + 1):
        now, late, fused = predict(count), predict(count, late=True), predict(count, fuse_context=True)
        cells = [
            str(count), f"{now.first_block:.2f} s", f"{pixel_frames / now.total:.2f}", f"{now.speedup:.2f}x",
            f"{pixel_frames / late.total:.2f} frames/s", f"{pixel_frames / fused.total:.2f} frames/s",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
