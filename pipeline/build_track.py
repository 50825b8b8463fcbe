"""Build prompt tracks, their ops and their lag from a configuration."""

from collections.abc import Callable, Iterable, Iterator

from pipeline.batching import Batch
from pipeline.build import block_layout, context_frames, num_pixel_frames
from pipeline.lag import Lag, prompt_lag
from pipeline.prompt_switch import add_switch_ops
from pipeline.prompt_track import PromptTrack, TrackEntries, resolve_track
from pipeline.schedule import Op, Schedule
from utils.config import Config
from utils.errors import UserError


def build_track(config: Config, entries: TrackEntries, prompt: str, prefix_frames: int = 0) -> PromptTrack:
    """Return the prompt track of a video. Its blocks include those of the prefix.

    Args:
        entries: see `resolve_track`.
        prompt: prompt of block 0, if no entry has that position.
        prefix_frames: latent frames of the prefix.

    Raises:
        UserError: for entries that the video cannot have, or a configuration without a track.
    """
    if entries and config.rollout.schedule == "bidirectional":
        raise UserError("prompt_track needs blocks: set rollout.schedule=timestep_first or block_first")
    if entries and config.rollout.num_rollouts > 1:
        raise UserError("prompt_track is for a single rollout: leave out --num_rollout (rollout.num_rollouts)")
    layout = block_layout(config.rollout, config.video.num_output_frames, prefix_frames)

    def start_seconds(block: int) -> float:
        start = layout.start(block)
        return num_pixel_frames(start) / config.video.fps if start else 0.0

    return resolve_track(entries, prompt, layout.num_blocks, start_seconds)


def first_context_blocks(config: Config, prefix_frames: int = 0) -> Callable[[int], int]:
    """Return a function from a block to the first block of its context, without the sink."""
    rollout, length = config.rollout, config.video.num_output_frames
    layout = block_layout(rollout, length, prefix_frames)
    context, sink = context_frames(rollout, layout.start(layout.num_blocks) if config.video.source else length)

    def first_context_block(block: int) -> int:
        start = layout.start(block)
        return 0 if start <= context else layout.block_at(start - (context - sink))

    return first_context_block


def build_switch_ops(
    config: Config, ops: Iterable[Op | Batch], track: PromptTrack, prefix_frames: int = 0
) -> Iterator[Op | Batch]:
    """Yield `ops` with those of `rollout.prompt_switch` where a track changes the prompt; see `add_switch_ops`."""
    return add_switch_ops(ops, track, config.rollout.prompt_switch, first_context_blocks(config, prefix_frames))


def build_lag(config: Config, schedule: Schedule) -> Lag:
    """Return the passes until the first block of a live video, and from a new prompt to its first block."""
    rollout = config.rollout
    return prompt_lag(schedule, rollout.fuse_context, rollout.prompt_switch, first_context_blocks(config))
