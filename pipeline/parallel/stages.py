"""Assign denoising steps, text encoding and decoding to ranks. Imports no torch.

    ranks <= steps    neighbouring steps share a rank, and the last rank decodes, perhaps nothing else; the slowest rank
                      has as little work as possible; the first rank also encodes text
    ranks > steps     one more rank decodes, a second one encodes text, further ranks form more pipelines

The unit of assignment is a cache. Steps that share a cache (`Schedule.steps_per_cache`) stay on one rank. The unit of
work is a pass over one block; decoding a block counts as `decode_passes` of them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.schedule import Schedule


@dataclass(frozen=True)
class Pipeline:
    """Ranks that generate one video at a time together. A rank can have several roles."""

    text_rank: int
    """Rank that encodes prompts."""
    stages: tuple[tuple[int, tuple[int, ...]], ...]
    """(rank, its caches), in the order in which blocks pass the ranks."""
    decoder_rank: int
    """Rank that decodes blocks and writes files."""

    @property
    def ranks(self) -> list[int]:
        """All ranks, in ascending order."""
        return sorted({self.text_rank, self.decoder_rank, *self.stage_ranks})

    @property
    def stage_ranks(self) -> list[int]:
        """Ranks that denoise, in the order in which blocks pass them."""
        return [rank for rank, _ in self.stages]

    def caches(self, rank: int) -> tuple[int, ...]:
        """Return the caches of a rank; empty if it does not denoise."""
        return dict(self.stages).get(rank, ())

    def upstream(self, rank: int) -> int | None:
        """Return the rank that hands its blocks to the stage `rank`; None for the first stage."""
        position = self.stage_ranks.index(rank)
        return self.stage_ranks[position - 1] if position else None

    def downstream(self, rank: int) -> int | None:
        """Return the rank that receives blocks from the stage `rank`; None if that stage also decodes."""
        following = [*self.stage_ranks, self.decoder_rank][self.stage_ranks.index(rank) + 1]
        return None if following == rank else following

    def roles(self, rank: int, schedule: Schedule) -> str:
        """Return the roles of a rank, such as "text, steps 0-1"."""
        steps = [step for group in schedule.steps_per_cache if group[0] in self.caches(rank) for step in group]
        roles = ["text"] if rank == self.text_rank else []
        if steps:
            roles.append(f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}-{steps[-1]}")
        return ", ".join(roles + (["decoding"] if rank == self.decoder_rank else []))


def plan_pipelines(num_ranks: int, schedule: Schedule, decode_passes: float = 0.0) -> list[Pipeline]:
    """Distribute ranks 0..N-1 over pipelines. Every pipeline but the last has the largest useful number of ranks.

    Args:
        decode_passes: time to decode a block, in passes over one block; see `decode_passes`.
    """
    largest = len(schedule.caches) + 2
    pipelines = []
    for first in range(0, num_ranks, largest):
        ranks = range(first, min(num_ranks, first + largest))
        groups = split_caches(schedule, len(ranks), decode_passes)
        stages = tuple(zip(ranks, groups, strict=False))
        decoder_rank = ranks[min(len(groups), len(ranks) - 1)]
        text_rank = ranks[len(groups) + 1] if len(ranks) > len(groups) + 1 else ranks[0]
        pipelines.append(Pipeline(text_rank, stages, decoder_rank))
    return pipelines


def split_caches(schedule: Schedule, num_ranks: int, decode_passes: float = 0.0) -> list[tuple[int, ...]]:
    """Split the caches into consecutive groups, one per rank that denoises.

    The slowest rank gets the least work, then the second slowest, and so on. With fewer groups than ranks, the next
    rank only decodes; with as many, the last one also decodes. Among equally good splits, later groups get more passes,
    because the first rank also encodes text.
    """
    passes = [len(steps) + 1 for steps in schedule.steps_per_cache]  # the steps and one context write
    caches = schedule.caches

    def groups(cuts: Sequence[int]) -> list[range]:
        return [range(start, end) for start, end in itertools.pairwise([0, *cuts, len(caches)])]

    def cost(cuts: Sequence[int]) -> tuple[list[float], list[float]]:
        work: list[float] = [sum(passes[i] for i in group) for group in groups(cuts)]
        if len(work) < num_ranks:
            work.append(decode_passes)
        else:
            work[-1] += decode_passes
        return sorted(work, reverse=True), work

    most = min(num_ranks, len(caches))
    fewest = min(max(1, num_ranks - 1), most)
    splits = [cuts for count in (most, fewest) for cuts in itertools.combinations(range(1, len(caches)), count - 1)]
    return [tuple(caches[i] for i in group) for group in groups(min(splits, key=cost))]


def describe_assignment(pipelines: Sequence[Pipeline], schedule: Schedule) -> str:
    """Return one line per rank with its roles."""
    lines = []
    for number, pipeline in enumerate(pipelines):
        for rank in pipeline.ranks:
            prefix = f"pipeline {number}: " if len(pipelines) > 1 else ""
            lines.append(f"rank {rank}: {prefix}{pipeline.roles(rank, schedule)}")
    return "\n".join(lines)
