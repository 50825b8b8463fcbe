"""Ops at prompt switches: what happens to the context when the prompt changes. This module imports no torch.

A rule adds ops before the first op of the new prompt's first block, on each cache:

- keep: none. The context keeps the keys and values of the old prompt.
- flush: `ForgetContext` keeps the sink and the newest two frames (Infinity-RoPE).
- recache: `RewindContext`, then one `WriteContext` per block of the window under the new prompt (LongLive, arXiv
  2509.22622). If the window has moved past the sink, the sink stays.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal

from pipeline.batching import Batch, unbatched
from pipeline.prompt_track import PromptTrack
from pipeline.schedule import DenoiseAndWrite, ForgetContext, Op, RewindContext, WriteContext, WriteThenDenoise

PromptSwitch = Literal["keep", "recache", "flush"]
FLUSH_FRAMES = 2
"""Newest frames that the rule `flush` keeps, as in Infinity-RoPE."""


def add_switch_ops(
    ops: Iterable[Op | Batch], track: PromptTrack, rule: PromptSwitch, first_context_block: Callable[[int], int]
) -> Iterator[Op | Batch]:
    """Yield `ops` with the ops of `rule` where the prompt changes; split fused passes over two prompts.

    The prompt of a block is read when its first op is requested, and no op is read ahead. So a live prompt holds from
    the next block that has not started. The ops that precede an op of a batch precede the batch.

    Args:
        ops: of one rank or of all, in any order.
        first_context_block: maps a block to the first block of its context, without the sink.
    """
    newest: dict[int, int] = {}  # of each cache: the newest block of its ops
    written: dict[int, dict[int, WriteContext]] = {}  # of each cache: the last write of each block

    def record(write: WriteContext) -> None:
        written.setdefault(write.cache, {})[write.block] = write

    def before_block(block: int, cache: int) -> Iterator[Op]:
        """Yield the ops that precede the first op of `block` on a cache."""
        if block <= newest.get(cache, -1):
            return
        newest[cache] = block
        writes, first = written.setdefault(cache, {}), first_context_block(block)
        for passed in [b for b in writes if b < first]:
            del writes[passed]
        if not track.is_switch(block):
            return
        if rule == "flush":
            yield ForgetContext(block, cache, FLUSH_FRAMES)
        elif rule == "recache" and writes:
            yield RewindContext(block, cache, min(writes))
            yield from (replace(writes[b], prompt_block=block) for b in sorted(writes))

    def with_switch(op: Op) -> Iterator[Op]:
        """Yield the ops of a switch that precede `op`, then `op`; of a fused pass over two prompts, its parts."""
        if isinstance(op, WriteThenDenoise):
            yield from before_block(op.write.block, op.cache)
            record(op.write)
            if track.is_switch(op.block):  # the pass has one prompt
                if rule != "recache" or first_context_block(op.block) > op.write.block:  # else it is written below
                    yield op.write
                yield from before_block(op.block, op.cache)
                yield op.denoise
                return
        yield from before_block(op.block, op.cache)
        if isinstance(op, WriteContext | DenoiseAndWrite):
            record(op if isinstance(op, WriteContext) else op.write)
        yield op

    for item in ops:
        last_ops = []
        for op in unbatched(item):
            *before, last = with_switch(op)
            yield from before
            last_ops.append(last)
        yield Batch(tuple(last_ops)) if isinstance(item, Batch) else last_ops[0]
