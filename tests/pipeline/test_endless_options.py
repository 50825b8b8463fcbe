"""rollout.write_window and rollout.moving_sink in the tiny network, against passes without a cache.

Claims: with a write window, each Denoise equals one masked pass. There, earlier blocks see their newest frames and
the denoised block sees the whole window. With a moving sink, it equals one pass in which the positions of the sink
directly precede the window. Orders give the same bits; fused passes are equal up to rounding.
"""

import dataclasses
from random import Random

import pytest
import torch
from test_rollout import FRAME, SIGMAS, keyed_block_noise, net_rollout, run_to_end
from torch import Tensor

from model.attention import BlockCausalAttention, BlockCausalMask
from model.flow import add_noise
from model.kv_cache import KVCache
from model.rotary import rotary_table
from pipeline.rollout import BlockLayout
from pipeline.schedule import DenoiseAndWrite, Schedule

LAYOUT, BLOCKS, CONTEXT = BlockLayout(2), 5, 5


@pytest.fixture(scope="module")
def text():
    return torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(2))


@dataclasses.dataclass(frozen=True)
class WriteWindowMask(BlockCausalMask):
    """All blocks but the last see their newest `frames` of context only, and no sink that is older."""

    frames: int = 0

    def visible(self) -> list[tuple[int, int, list[tuple[int, int]]]]:
        result = super().visible()
        narrow = [(start, end, [(max(0, start - self.frames), end)]) for start, end, _ in result[:-1]]
        return [*narrow, result[-1]]


def roll_out(net, text, schedule: Schedule, order="diagonal", fuse=False, **cache) -> Tensor:
    rollout = net_rollout(net, net.encode_text(text))
    rollout.new_cache = lambda: net.new_cache(1, *FRAME[1:], CONTEXT, 2, **cache)
    return run_to_end(rollout, list(schedule.ops(order, fuse)), schedule.caches)


def dense_latents(denoise, method: str) -> Tensor:
    """Return the latents of a rollout whose Denoise is `denoise(x, sigma, contexts, context sigma)`."""
    noise = keyed_block_noise(LAYOUT)
    now, estimates = [noise(block, 0) for block in range(BLOCKS)], [torch.empty(0)] * BLOCKS

    def step_block(block: int, step: int, contexts: list[Tensor], level: float) -> None:
        estimates[block] = denoise(now[block], SIGMAS[step], contexts, level)
        if step < 3:
            now[block] = add_noise(estimates[block], noise(block, step + 1), SIGMAS[step + 1])

    if method == "block_first":
        for block in range(BLOCKS):
            for step in range(4):
                step_block(block, step, estimates[:block], 0.0)
    else:
        for step in range(4):
            for block in range(BLOCKS):
                step_block(block, step, estimates[:block] if step == 3 else now[:block], SIGMAS[step + 1])
    return torch.cat(estimates, dim=1)


methods = pytest.mark.parametrize("method", ["timestep_first", "block_first"])


@methods
@pytest.mark.parametrize(("frames", "sink"), [(2, 1), (3, 0), (1, 2)])
def test_a_write_window_equals_masked_passes_without_a_cache(make_net, text, method, frames, sink):
    net = make_net(num_layers=2).requires_grad_(False)

    def denoise(x: Tensor, sigma: float, contexts: list[Tensor], level: float) -> Tensor:
        past = 2 * len(contexts)
        mask = WriteWindowMask((2,) * (len(contexts) + 1), CONTEXT, sink, False, frames)
        timestep = 1000 * torch.tensor([[level] * past + [sigma] * 2])
        whole = torch.cat([*contexts, x], dim=1).transpose(1, 2)
        return x - sigma * net(whole, timestep, text, causal=mask)[:, :, -2:].transpose(1, 2)

    expected = dense_latents(denoise, method)
    schedule = Schedule(4, BLOCKS, method, write_frames=frames)  # type: ignore[arg-type]
    actual = roll_out(net, text, schedule, sink_frames=sink)
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)
    assert torch.equal(roll_out(net, text, schedule, "step_major", sink_frames=sink), actual)
    torch.testing.assert_close(roll_out(net, text, schedule, fuse=True, sink_frames=sink), expected, atol=2e-4, rtol=0)
    whole = roll_out(net, text, dataclasses.replace(schedule, write_frames=None), sink_frames=sink)
    assert not torch.allclose(whole, actual, atol=2e-4)


def test_a_denoise_and_a_write_with_different_frames_are_two_passes():
    ops = list(Schedule(4, 3, context="input", write_frames=2).ops("diagonal", True))
    assert not any(isinstance(op, DenoiseAndWrite) for op in ops)


@methods
@pytest.mark.parametrize("sink", [1, 2])
def test_a_moving_sink_equals_passes_with_moved_positions(make_net, text, method, sink):
    """One layer: with more, a context's keys depend on the sink's position when they were written."""
    net = make_net(num_layers=1).requires_grad_(False)

    def denoise(x: Tensor, sigma: float, contexts: list[Tensor], level: float) -> Tensor:
        past = 2 * len(contexts)
        oldest = max(sink, past - (CONTEXT - sink))
        timestep = 1000 * torch.tensor([[level] * past + [sigma] * 2])
        tokens = net._embed(torch.cat([*contexts, x], dim=1).transpose(1, 2), timestep, 0)
        grid, dim = tokens.grid[1:], net.config.attention_head_dim
        moved = rotary_table(dim, oldest - sink, (sink, *grid), torch.device("cpu"))
        rest = rotary_table(dim, sink, (past + 2 - sink, *grid), torch.device("cpu"))
        rope = torch.cat([moved, rest]) if past else tokens.rope
        mask = BlockCausalMask((2,) * (len(contexts) + 1), CONTEXT, sink)
        attention = BlockCausalAttention(None, mask, grid[0] * grid[1])
        tokens = net._run_layers(dataclasses.replace(tokens, rope=rope), net.encode_text(text), attention)
        return x - sigma * net._head(tokens)[:, :, -2:].transpose(1, 2)

    expected = dense_latents(denoise, method)
    schedule = Schedule(4, BLOCKS, method)  # type: ignore[arg-type]
    cache = dict(sink_frames=sink, moving_sink=True)
    actual = roll_out(net, text, schedule, **cache)
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)
    assert torch.equal(roll_out(net, text, schedule, "step_major", **cache), actual)
    torch.testing.assert_close(roll_out(net, text, schedule, fuse=True, **cache), expected, atol=2e-4, rtol=0)
    fixed = roll_out(net, text, schedule, sink_frames=sink)
    assert not torch.allclose(fixed, actual, atol=2e-4)


def test_the_newest_frames_of_a_cache_can_be_read():
    """Random appends, `forget` and reads of the newest frames, against a list of frames."""
    random = Random(5)
    for sink in (0, 1, 3):
        cache, held = KVCache(1, 1, 1, 6, 1, context_frames=6, block_frames=2, sink_frames=sink), []
        for value in range(40):
            newest = cache.num_frames
            if random.random() < 0.2:
                keep = random.randrange(4)
                cache.forget(keep)
                held = [f for f in held if f < sink or f >= newest - keep]
            else:
                frames = torch.tensor([newest, newest + 1.0]).view(1, 2, 1, 1).expand(-1, -1, -1, 6)
                cache.append(0, frames, -frames)
                cache.commit(2)
                held = [f for f in [*held, newest, newest + 1] if f < sink or f >= newest + 2 - (6 - sink)]
            count, end = random.randrange(7), cache.num_frames
            block = torch.full((1, 2, 1, 6), -1.0)
            with torch.no_grad():
                k, v = cache.read_with_block(0, block, -block, frames=count)
            assert torch.equal(k, -v), value
            assert sorted(k[..., 0].flatten().tolist()) == [-1, -1, *[f for f in held if f >= end - count]]


def test_the_keys_of_the_configuration_reach_caches_and_ops(world):
    from pipeline.build import build_rollout, build_schedule
    from pipeline.text_to_video import TextToVideo
    from utils.config_loading import load_config

    keys = "rollout.write_window=2", "rollout.moving_sink=true", "rollout.sink=1", "rollout.window=6"
    pipe = TextToVideo.load(load_config(str(world.config)), *keys, device="cpu")
    rollout = build_rollout(pipe.config, pipe._denoiser(["a"]), [0])
    assert rollout.new_cache().moving_sink
    assert build_schedule(pipe.config.rollout, 9).write_frames == 2
    assert build_schedule(load_config(str(world.config)).rollout, 9).write_frames is None
    changed, plain = pipe.generate("a", num_frames=12).latents, None
    pipe.config.rollout.write_window = 0
    plain = pipe.generate("a", num_frames=12).latents
    assert not torch.equal(changed, plain)
