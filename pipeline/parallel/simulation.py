"""Predict the speed of a pipeline on any number of ranks from measured op times."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from pipeline.parallel.profile import Span
from pipeline.parallel.stages import Pipeline, plan_pipelines
from pipeline.schedule import Denoise, DenoiseAndWrite, Op, Schedule, WriteContext, WriteThenDenoise, for_stage
from utils.tables import markdown_table


@dataclass(frozen=True)
class OpTimes:
    """Seconds per op. Mappings go from block to seconds: passes take longer until the attention window is full."""

    denoise: Mapping[int, float]
    context: Mapping[int, float]
    decode: Mapping[int, float]
    context_and_denoise: Mapping[int, float] = field(default_factory=dict)
    """Fused passes that write a context and denoise the next block. Empty: the sum of both passes."""
    add_noise: float = 0.0
    send: float = 0.0
    """Time for which a send occupies the sending rank."""

    def seconds(self, name: str, block: int) -> float:
        """Return the seconds of an op on a block, or on the nearest block that was measured."""
        measured = getattr(self, name)
        if name == "context_and_denoise" and not measured:
            return self.seconds("context", block - 1) + self.seconds("denoise", block)
        return measured[min(measured, key=lambda other: abs(other - block))] if measured else 0.0


def median_times(spans: Iterable[Span]) -> OpTimes:
    """Return the median seconds of each op in a profile."""
    seconds: dict[str, dict[int, list[float]]] = {}
    for span in spans:
        seconds.setdefault(span.name, {}).setdefault(span.block, []).append(span.seconds)

    def by_block(name: str) -> dict[int, float]:
        return {block: statistics.median(values) for block, values in seconds.get(name, {}).items()}

    def overall(name: str) -> float:
        values = [value for of_block in seconds.get(name, {}).values() for value in of_block]
        return statistics.median(values) if values else 0.0

    return OpTimes(
        by_block("denoise"),
        by_block("context"),
        by_block("decode"),
        by_block("context+denoise"),
        overall("add-noise"),
        overall("send"),
    )


@dataclass(frozen=True)
class Prediction:
    """Predicted times of one video made by one pipeline."""

    num_ranks: int
    first_block: float
    """Seconds until the first block is decoded."""
    total: float
    """Seconds until the last block is decoded."""
    work: float
    """Seconds that one rank would need for the same ops."""
    busy: list[float]
    """Fraction of the total time that each rank works."""

    @property
    def speedup(self) -> float:
        """Speed relative to one rank."""
        return self.work / self.total


def simulate(
    schedule: Schedule,
    num_ranks: int,
    times: OpTimes,
    transfer_seconds: float = 0.0,
    send_after_write: bool = False,
    fuse_context: bool = False,
    decode_passes: float = 0.0,
) -> Prediction:
    """Predict the times of one video on `num_ranks` ranks. Only the ranks of the first pipeline work on it.

    Args:
        transfer_seconds: time from a send until the block arrives: latency plus bytes over bandwidth.
        send_after_write: ranks send a block only after its context write.
        fuse_context: one pass writes a context and denoises the next block.
        decode_passes: see `plan_pipelines`.
    """
    assert schedule.num_blocks is not None
    pipeline = plan_pipelines(num_ranks, schedule, decode_passes)[0]
    arrivals: dict[int, float] = {}
    busy = dict.fromkeys(pipeline.ranks, 0.0)
    finished: dict[int, float] = {}
    for rank, caches in pipeline.stages:
        decodes = rank == pipeline.decoder_rank
        stage = _StageClock(schedule, caches, times, arrivals, transfer_seconds, send_after_write, decodes)
        for op in for_stage(schedule.ops("diagonal", fuse_context), caches):
            stage.execute(op)
        stage.flush()
        busy[rank] += stage.busy
        arrivals, finished = stage.arrivals_downstream, stage.finished
    if pipeline.decoder_rank not in pipeline.stage_ranks:
        finished = _decode(pipeline, finished, times, transfer_seconds, busy)
    total = max(finished.values())
    return Prediction(
        num_ranks, min(finished.values()), total, sum(busy.values()), [busy[rank] / total for rank in pipeline.ranks]
    )


class _StageClock:
    """Simulated clock of a rank that denoises."""

    def __init__(
        self,
        schedule: Schedule,
        caches: tuple[int, ...],
        times: OpTimes,
        arrivals: dict[int, float],
        transfer_seconds: float,
        send_after_write: bool,
        decodes: bool,
    ):
        self.schedule, self.caches, self.times, self.arrivals = schedule, caches, times, arrivals
        self.transfer_seconds, self.send_after_write, self.decodes = transfer_seconds, send_after_write, decodes
        self.is_first = caches[0] == schedule.caches[0]
        self.is_last = caches[-1] == schedule.caches[-1]
        self.clock = self.busy = 0.0
        self.arrivals_downstream: dict[int, float] = {}
        self.finished: dict[int, float] = {}
        self._started: set[int] = set()
        self._delayed: int | None = None

    def execute(self, op: Op) -> None:
        """Advance the clock by one op."""
        if isinstance(op, WriteThenDenoise):
            self._wait_for_block(op.write.block)
            self._wait_for_block(op.block)
            self._work(self.times.seconds("context_and_denoise", op.block))
            self._after_denoise(op.denoise)
        elif isinstance(op, WriteContext):
            self._wait_for_block(op.block)
            self._work(self.times.seconds("context", op.block))
            if op.block == self._delayed:
                self.flush()
        elif isinstance(op, Denoise | DenoiseAndWrite):
            self._wait_for_block(op.block)
            self._work(self.times.seconds("denoise", op.block))
            self._after_denoise(op.denoise if isinstance(op, DenoiseAndWrite) else op)
            if isinstance(op, DenoiseAndWrite) and op.block == self._delayed:
                self.flush()

    def flush(self) -> None:
        """Send the delayed block, if there is one."""
        if self._delayed is not None:
            delayed, self._delayed = self._delayed, None
            self._send(delayed)

    def _wait_for_block(self, block: int) -> None:
        if block in self._started:
            return
        self._started.add(block)
        if block < self.schedule.prefix_blocks:
            return
        if self.is_first:
            self._work(self.times.add_noise)
            return
        self.clock = max(self.clock, self.arrivals[block])
        if block < self.schedule.prefix_blocks + self.schedule.leading_blocks:  # clean: send it on unchanged
            self._hand_off(block)

    def _after_denoise(self, op: Denoise) -> None:
        noise_index = op.step + 1
        if noise_index < self.schedule.num_steps:
            self._work(self.times.add_noise)
        handoff_index = self.schedule.handoff_index(op.block, self.caches)
        if noise_index == (self.schedule.num_steps if handoff_index is None else handoff_index):
            self._hand_off(op.block)

    def _hand_off(self, block: int) -> None:
        if self.is_last:
            self._work(self.times.seconds("decode", block) if self.decodes else self.times.send)
            self.finished[block] = self.clock
        elif self.send_after_write:
            self.flush()
            self._delayed = block
        else:
            self._send(block)

    def _send(self, block: int) -> None:
        self._work(self.times.send)
        self.arrivals_downstream[block] = self.clock + self.transfer_seconds

    def _work(self, seconds: float) -> None:
        self.clock += seconds
        self.busy += seconds


def _decode(
    pipeline: Pipeline, finished: dict[int, float], times: OpTimes, transfer_seconds: float, busy: dict[int, float]
) -> dict[int, float]:
    """Return the time at which a separate decoder rank has decoded each block."""
    clock, decoded = 0.0, {}
    for block in sorted(finished):
        seconds = times.seconds("decode", block)
        clock = max(clock, finished[block] + transfer_seconds) + seconds
        busy[pipeline.decoder_rank] += seconds
        decoded[block] = clock
    return decoded


def prediction_table(predict: Callable[..., Prediction], max_ranks: int, pixel_frames: int) -> str:
    """Return a Markdown table of the predicted speed on 1 to `max_ranks` ranks.

    Args:
        predict: `simulate` without the arguments `num_ranks`, `send_after_write` and `fuse_context`.
        pixel_frames: pixel frames of the video.
    """
    rows = [["ranks", "first block", "frames/s", "speed-up", "sent late", "fused context"]]
    for count in range(1, max_ranks + 1):
        default = predict(num_ranks=count)
        late = predict(num_ranks=count, send_after_write=True)
        fused = predict(num_ranks=count, fuse_context=True)
        rows.append(
            [
                str(count),
                f"{default.first_block:.2f} s",
                f"{pixel_frames / default.total:.2f}",
                f"{default.speedup:.2f}x",
                f"{pixel_frames / late.total:.2f} frames/s",
                f"{pixel_frames / fused.total:.2f} frames/s",
            ]
        )
    return markdown_table(rows)
