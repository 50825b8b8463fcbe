"""pipeline/build.py: sizes, caches and schedules that follow from a configuration."""

import pytest
import torch

from model.denoiser import Denoiser
from pipeline.build import (
    block_layout,
    build_rollout,
    build_schedule,
    context_frames,
    latent_size,
    num_pixel_frames,
    pixel_size,
    tokens_per_frame,
)
from pipeline.schedule import WriteContext
from utils.config import Config, RolloutConfig, VideoConfig
from utils.errors import UserError


def test_sizes_by_hand():
    video = VideoConfig(height=480, width=832)
    assert latent_size(video) == (60, 104) and pixel_size(60, 104) == (480, 832)
    assert tokens_per_frame(video, (1, 2, 2)) == 1560 and tokens_per_frame(video, (1, 4, 2)) == 780
    assert [num_pixel_frames(n) for n in (1, 2, 21)] == [1, 5, 81]


@pytest.mark.parametrize(
    ("window", "sink", "num_frames", "expected"),
    [
        (0, 0, 21, (18, 0)),  # 0: the whole video
        (0, 3, 21, (18, 3)),
        (12, 3, 21, (9, 3)),
        (12, 3, 9, (6, 3)),  # never more than the video has
        (6, 5, 21, (3, 3)),  # never more sink than context
        (3, 1, 21, (0, 0)),
        (2, 1, 21, (0, 0)),
    ],
)
def test_the_window_holds_the_block_the_sink_and_the_rest(window, sink, num_frames, expected):
    assert context_frames(RolloutConfig(window=window, sink=sink, block_frames=3), num_frames) == expected


def test_caches_have_the_configured_window_and_sink(net, text):
    config = Config()
    config.rollout.window, config.rollout.sink, config.rollout.block_frames = 8, 3, 2
    config.video.num_output_frames, config.video.height, config.video.width = 20, 32, 48
    config.model.dtype = "bfloat16"
    rollout = build_rollout(config, Denoiser(net, text), [0, 1], history_frames=4)
    cache = rollout.new_cache()
    assert (cache.context_frames, cache.sink_frames, cache.history_frames) == (6, 3, 4)
    assert cache.tokens_per_frame == 6
    k = cache._k
    assert k.shape[:2] == (3, 2) and k.dtype == torch.bfloat16
    cache = build_rollout(config, Denoiser(net, text), [0], num_frames=4, size=(8, 8), dtype=torch.float32).new_cache()
    assert (cache.context_frames, cache.sink_frames, cache.history_frames, cache.tokens_per_frame) == (2, 2, 0, 16)
    assert cache._k.dtype == torch.float32


def test_noise_is_keyed_by_seed_sample_block_and_step(net, text):
    config = Config()
    config.rollout.block_frames, config.video.height, config.video.width = 2, 32, 48
    config.model.dtype = "float32"

    def noise(seed: int, samples: list[int], block: int, step: int) -> list[torch.Tensor]:
        config.runtime.seed = seed
        return list(build_rollout(config, Denoiser(net, text), samples).noise(block, step))

    pair = noise(0, [4, 5], 1, 2)
    assert pair[0].shape == (2, 4, 4, 6)
    assert torch.equal(noise(0, [5], 1, 2)[0], pair[1])
    others = [noise(1, [4], 1, 2), noise(0, [4], 2, 2), noise(0, [4], 1, 3), noise(0, [6], 1, 2)]
    assert not any(torch.equal(one, other) for [one] in others for other in pair)


def test_lengths_that_blocks_do_not_divide_are_refused_with_the_nearest_lengths():
    rollout = RolloutConfig(block_frames=3)
    assert build_schedule(rollout, 21).num_blocks == 7
    assert build_schedule(rollout, 10, prefix_frames=4).prefix_blocks == 2
    assert build_schedule(rollout, 21, prefix_frames=1).num_blocks == 8  # the last one has two frames
    for num_frames, prefix, message in [
        (20, 0, "20 latent frames cannot be divided into blocks of 3; .*: 18 or 21$"),
        (2, 0, ": 3 or 6$"),
        (4, 4, ": 7 or 10$"),
    ]:
        with pytest.raises(UserError, match=message):
            build_schedule(rollout, num_frames, prefix)


def test_an_independent_first_frame_needs_one_frame_more_than_whole_blocks():
    rollout = RolloutConfig(block_frames=3, independent_first_frame=True)
    assert [build_schedule(rollout, n).num_blocks for n in (1, 4, 22)] == [1, 2, 8]
    image = build_schedule(rollout, 22, prefix_frames=1)
    assert (image.num_blocks, image.prefix_blocks) == (8, 1)
    assert block_layout(rollout, 22, 1).sizes == block_layout(rollout, 22).sizes == (1, *[3] * 7)
    for num_frames, choices in (21, "19 or 22"), (2, "1 or 4"), (3, "1 or 4"), (6, "4 or 7"):
        message = f"{num_frames} latent frames cannot be divided into a first frame and blocks of 3; .*: {choices}$"
        with pytest.raises(UserError, match=message):
            build_schedule(rollout, num_frames)
    rollout.schedule = "bidirectional"  # one block
    assert build_schedule(rollout, 21).num_blocks == 1 and block_layout(rollout, 21).sizes == (21,)


def test_the_schedule_states_the_context_noise_of_generated_blocks():
    rollout = RolloutConfig(context="clean", context_noise=0.1, schedule="block_first")
    writes = [op for op in build_schedule(rollout, 10, prefix_frames=1).ops() if isinstance(op, WriteContext)]
    assert [(op.block, op.context_noise) for op in writes] == [(0, 0.0), (1, 0.1), (2, 0.1)]
    rollout.schedule, rollout.context = "timestep_first", "output"
    writes = [op for op in build_schedule(rollout, 6).ops() if isinstance(op, WriteContext)]
    assert [(op.noise_index, op.context_noise) for op in writes] == [(1, 0.0), (2, 0.0), (3, 0.0), (4, 0.1)]


def test_rollouts_follow_the_configured_layout(net, text):
    config = Config()
    config.rollout.block_frames, config.rollout.independent_first_frame, config.rollout.window = 2, True, 5
    config.video.num_output_frames, config.video.height, config.video.width = 7, 32, 48
    rollout = build_rollout(config, Denoiser(net, text), [0])
    assert [rollout.noise(block, 0).shape[1] for block in range(4)] == [1, 2, 2, 2]
    assert rollout.new_cache().context_frames == 3
