"""Who does what in a pipeline: steps, text encoding and decoding, shared out among ranks. Knows no tensors.

    ranks < steps     neighbouring steps share a rank, so that the slowest rank has as little to do as possible
    ranks = steps     a step each; the first rank encodes the text as well, the last one decodes
    ranks > steps     the next rank decodes, the one after it encodes the text, further ones are pipelines of their own

What is dealt out are caches: a step's own, or that of the steps which share one (`Schedule.steps_per_cache`).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.schedule import Schedule


@dataclass(frozen=True)
class Pipeline:
    """The ranks that make one video at a time together. One rank can be several things."""

    text: int
    """Rank that encodes prompts."""
    stages: tuple[tuple[int, tuple[int, ...]], ...]
    """(rank, the caches that it owns), in the order that blocks go through."""
    decoder: int
    """Rank that decodes and writes."""

    @property
    def ranks(self) -> list[int]:
        """All of them, ascending."""
        return sorted({self.text, self.decoder, *(rank for rank, _ in self.stages)})

    def caches(self, rank: int) -> tuple[int, ...]:
        """The caches of a rank; none if it does not denoise."""
        return dict(self.stages).get(rank, ())

    def neighbours(self, rank: int) -> tuple[int | None, int | None]:
        """The ranks that a stage has its blocks from and hands them on to; the last stage's next is the decoder."""
        order = [stage for stage, _ in self.stages]
        place = order.index(rank)
        before = order[place - 1] if place else None
        after = order[place + 1] if place + 1 < len(order) else self.decoder
        return before, None if after == rank else after

    def duties(self, rank: int, schedule: Schedule) -> str:
        """What a rank does, in words."""
        steps_of = {steps[0]: steps for steps in schedule.steps_per_cache}
        steps = [step for cache in self.caches(rank) for step in steps_of[cache]]
        words = ["text"] if rank == self.text else []
        if steps:
            words.append(f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}-{steps[-1]}")
        return ", ".join(words + (["decoding"] if rank == self.decoder else []))


def plan_pipelines(num_ranks: int, schedule: Schedule) -> list[Pipeline]:
    """Deal ranks 0..N-1 out. Every pipeline but the last is as large as one can be."""
    largest = len(schedule.caches) + 2
    pipelines = []
    for first in range(0, num_ranks, largest):
        ranks = range(first, min(num_ranks, first + largest))
        num_stages = min(len(ranks), len(schedule.caches))
        spare = ranks[num_stages:]
        stages = tuple(zip(ranks, split_caches(schedule, num_stages), strict=False))
        decoder = spare[0] if spare else ranks[num_stages - 1]
        pipelines.append(Pipeline(spare[1] if len(spare) > 1 else ranks[0], stages, decoder))
    return pipelines


def split_caches(schedule: Schedule, num_stages: int) -> list[tuple[int, ...]]:
    """Lanes in `num_stages` runs, such that the one with the most passes per block has as few as possible.

    Of those equally good, the one that gives the later runs more: the first rank also encodes text.
    """
    passes = [len(steps) + 1 for steps in schedule.steps_per_cache]  # a context write beside the steps
    caches = schedule.caches

    def runs(cuts: Sequence[int]) -> list[range]:
        return [range(a, b) for a, b in itertools.pairwise([0, *cuts, len(caches)])]

    def cost(cuts: Sequence[int]) -> tuple[int, list[int]]:
        sums = [sum(passes[i] for i in run) for run in runs(cuts)]
        return max(sums), sums

    best = min(itertools.combinations(range(1, len(caches)), num_stages - 1), key=cost)
    return [tuple(caches[i] for i in run) for run in runs(best)]


def describe(pipelines: Sequence[Pipeline], schedule: Schedule) -> str:
    """A line per rank."""
    lines = []
    for number, pipeline in enumerate(pipelines):
        for rank in pipeline.ranks:
            which = f"pipeline {number}: " if len(pipelines) > 1 else ""
            lines.append(f"rank {rank}: {which}{pipeline.duties(rank, schedule)}")
    return "\n".join(lines)
