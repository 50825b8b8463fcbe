"""Replay of a training rollout in one pass, in which a later block's loss reaches the context of earlier blocks.

The rollout runs without a graph. One pass then repeats the exit step of all blocks: its input holds the latents of
every context that the exit step read, and the exit inputs. All of them are constants, but their keys and values have a
graph (SGF, arXiv 2607.20368; law 6, docs/method.md).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import SegmentMask
from model.denoiser import Denoiser, clip_flow
from model.flow import flow_to_x0
from pipeline.rollout import BlockLayout
from pipeline.schedule import Denoise, DenoiseAndWrite, Op, WriteContext, WriteThenDenoise
from pipeline.training_rollout import TrainingRollout


@dataclass(frozen=True)
class Segment:
    """A block in the input of the replay pass, at one noise level."""

    block: int
    cache: int | None  # the cache that holds its keys and values; None: no block attends to it as context
    is_exit: bool  # its x0 is a result of the replay


@dataclass(frozen=True)
class ReplayPlan:
    """The input of a replay pass: its segments, and the frames that each of them attends to."""

    segments: tuple[Segment, ...]
    mask: SegmentMask


def plan_replay(
    ops: Iterable[Op],
    layout: BlockLayout,
    exit_step: int,
    exit_blocks: Iterable[int],
    context_frames: int,
    sink_frames: int,
    released: bool = False,
) -> ReplayPlan:
    """Return the input of the pass that repeats the exit step of some blocks.

    Args:
        ops: the rollout's ops, in the order of execution; see `Schedule.ops_until`.
        exit_blocks: the pass predicts the x0 of these blocks.
        context_frames: most frames of context that a block attends to, the sink included.
        sink_frames: frames at the start of the video that stay in the context.
        released: the keys and values of a context have the gradient of those of the block's exit input. So they have
            in the released code of Self-Forcing and HiAR: it replaces the values of cached keys, but not their graph.
    """
    single, exit_blocks = list(_single_ops(ops)), set(exit_blocks)

    def is_exit(op: Op | None) -> bool:
        return isinstance(op, Denoise) and op.step == exit_step and op.block in exit_blocks

    read_caches = {op.cache for op, denoise in single if is_exit(op) or is_exit(denoise)}
    # Frames of its cache that a segment attends to, besides its own.
    contexts: dict[Segment, list[int]] = {}
    exits: dict[Segment, tuple[int, list[int]]] = {}  # those that are not also context, with the cache
    for op, denoise in single:
        start = layout.start(op.block)
        if isinstance(op, WriteContext) and op.cache in read_caches:
            segment = Segment(op.block, op.cache, is_exit(denoise))
            contexts[segment] = visible_frames(start, context_frames, sink_frames, op.read_frames)
        elif is_exit(op):
            exits[Segment(op.block, None, True)] = op.cache, visible_frames(start, context_frames, sink_frames)
    segments = [*sorted(contexts, key=lambda segment: (segment.cache, segment.block)), *exits]
    runs: dict[Segment, range] = {}  # frames of the input
    inputs: dict[tuple[int | None, int], int] = {}  # (cache, frame of the video) -> frame of the input
    end = 0
    for segment in segments:
        runs[segment] = range(end, end + layout.frames(segment.block))
        inputs |= {(segment.cache, layout.start(segment.block) + i): end + i for i in range(len(runs[segment]))}
        end = runs[segment].stop
    visible = []
    for segment in segments:
        cache, frames = exits[segment] if segment in exits else (segment.cache, contexts[segment])
        own = runs[segment]
        visible.append((own.start, own.stop, _runs([*(inputs[cache, frame] for frame in frames), *own])))
    positions = tuple((layout.start(segment.block), layout.frames(segment.block)) for segment in segments)
    sources = _gradient_sources(contexts, exits, runs) if released else ()
    return ReplayPlan(tuple(segments), SegmentMask(positions, tuple(visible), sources))


def replay_exit_step(rollout: TrainingRollout, plan: ReplayPlan, denoiser: Denoiser) -> dict[int, Tensor]:
    """Return the x0 of the plan's exit blocks, float32 [B, F, C, h, w] each, from one pass with a graph.

    Args:
        rollout: has run with `keep_contexts`.
        denoiser: the network, and the text with its graph.
    """
    inputs = []
    for segment in plan.segments:
        if segment.cache is None:
            exit_input = rollout.exit_inputs[segment.block]
            inputs.append((exit_input.x, exit_input.sigma))
        else:
            inputs.append(rollout.contexts[segment.cache, segment.block])
    x = torch.cat([x for x, _ in inputs], dim=1)
    # Filled on the device: a copy from the host would make the host wait.
    sigma = torch.cat([torch.full(x.shape[:2], sigma, device=x.device) for x, sigma in inputs], dim=1)
    with torch.enable_grad():
        flow = clip_flow(denoiser.net, x, sigma, denoiser.text, plan.mask)
    flows = flow.split([x.shape[1] for x, _ in inputs], dim=1)
    return {
        segment.block: flow_to_x0(x, flow, sigma)
        for segment, (x, sigma), flow in zip(plan.segments, inputs, flows, strict=True)
        if segment.is_exit
    }


def visible_frames(start: int, context_frames: int, sink_frames: int, read_frames: int | None = None) -> list[int]:
    """Return the frames of context that a block from frame `start` on attends to; `KVCache` holds the same frames."""
    sink = min(sink_frames, start)
    oldest = max(sink_frames, start - (context_frames - sink_frames))
    frames = [*range(sink), *range(oldest, start)]
    return frames if read_frames is None else [frame for frame in frames if frame >= start - read_frames]


def _gradient_sources(
    contexts: Iterable[Segment], exits: Mapping[Segment, tuple[int, list[int]]], runs: Mapping[Segment, range]
) -> tuple[tuple[int, int, int | None], ...]:
    """Return the runs of `SegmentMask.gradient_sources` for the gradient of the released code.

    A context has the gradient of the exit pass over the same cache, if there is one.
    """
    sources: dict[tuple[int | None, int], int] = {
        (cache, segment.block): runs[segment].start for segment, (cache, _) in exits.items()
    }
    sources |= {(segment.cache, segment.block): runs[segment].start for segment in contexts if segment.is_exit}
    return (
        *((runs[s].start, runs[s].stop, sources.get((s.cache, s.block))) for s in contexts),
        *((runs[s].start, runs[s].stop, runs[s].start) for s in exits),
    )


def _single_ops(ops: Iterable[Op]) -> Iterator[tuple[Denoise | WriteContext, Denoise | None]]:
    """Split fused pairs. Yield (op, Denoise of the same tokens in the same pass or None)."""
    for op in ops:
        if isinstance(op, DenoiseAndWrite):
            yield op.write, op.denoise
        elif isinstance(op, WriteThenDenoise):
            yield from ((op.write, None), (op.denoise, None))
        else:
            assert isinstance(op, Denoise | WriteContext), f"training rollouts have no {op}"
            yield op, None


def _runs(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return ascending numbers as runs (first, end)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = runs[-1][0], number + 1
        else:
            runs.append((number, number + 1))
    return tuple(runs)
