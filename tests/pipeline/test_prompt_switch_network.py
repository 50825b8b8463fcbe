"""Prompt switches in the tiny network: plain loops of LongLive and HiAR, and masked passes without a cache.

Claims: the rollout equals loops that write and read caches directly, block-first and timestep-first: with keep bit for
bit, with recache up to rounding. With flush it equals masked passes over the whole clip up to rounding.
"""

import dataclasses

import pytest
import torch
from test_rollout import FRAME, SIGMAS, keyed_block_noise, net_rollout, net_x0, run_to_end, write
from torch import Tensor

from model.attention import BlockCausalMask
from model.denoiser import Denoiser
from model.flow import add_noise
from pipeline.prompt_switch import FLUSH_FRAMES, add_switch_ops
from pipeline.prompt_track import PromptTrack
from pipeline.rollout import BlockLayout
from pipeline.schedule import Schedule

BLOCKS, CONTEXT, LAYOUT = 6, 4, BlockLayout(2)
TRACK = PromptTrack([(0, "a"), (2, "b"), (5, "a")])
"""At block 2 the window starts at frame 0; at block 5 it has moved."""


@pytest.fixture(scope="module")
def net(make_net):
    return make_net(num_layers=2).requires_grad_(False)


@pytest.fixture(scope="module")
def texts(net):
    generator = torch.Generator().manual_seed(2)
    return {prompt: net.encode_text(torch.randn(1, 3, 24, generator=generator)) for prompt in ("a", "b")}


def roll_out(net, texts, schedule: Schedule, rule: str, order: str, context=CONTEXT, sink=0, track=TRACK) -> Tensor:
    def first_context_block(block: int) -> int:
        start = LAYOUT.start(block)
        return 0 if start <= context else LAYOUT.block_at(start - (context - sink))

    rollout = net_rollout(
        net,
        texts["a"],
        context=context,
        sink=sink,
        denoiser_at=lambda block: Denoiser(net, texts[track.prompt_at(block)]),
        retained_frames=context,
    )
    ops = add_switch_ops(schedule.ops(order), track, rule, first_context_block)  # type: ignore[arg-type]
    return run_to_end(rollout, ops, schedule.caches)


class LoopCache:
    """A cache of a plain loop. `recache` fills a new cache, as LongLive does without a sink."""

    def __init__(self, net, texts, rule: str):
        self.net, self.texts, self.rule = net, texts, rule
        self.cache = net.new_cache(1, *FRAME[1:], CONTEXT, 2)
        self.contexts: list[tuple[Tensor, float]] = []

    def switch(self, block: int) -> None:
        if not TRACK.is_switch(block) or self.rule == "keep":
            return
        assert self.rule == "recache"
        self.cache = self.net.new_cache(1, *FRAME[1:], CONTEXT, 2)
        for earlier in range(max(0, block - CONTEXT // 2), block):
            write(self.net, self.texts[TRACK.prompt_at(block)], *self.contexts[earlier], 2 * earlier, self.cache)

    def write(self, block: int, x: Tensor, sigma: float) -> None:
        self.contexts.append((x, sigma))
        write(self.net, self.texts[TRACK.prompt_at(block)], x, sigma, 2 * block, self.cache)

    def x0(self, block: int, x: Tensor, sigma: float) -> Tensor:
        return net_x0(self.net, self.texts[TRACK.prompt_at(block)], x, sigma, 2 * block, self.cache)


def check_equal(expected: Tensor, actual: Tensor, rule: str) -> None:
    """With recache, the new cache of the loop has the same keys in other slots, which changes rounding."""
    if rule == "keep":
        assert torch.equal(actual, expected)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["keep", "recache"])
def test_block_first_equals_the_loop_of_longlive(net, texts, rule):
    noise, cache, blocks = keyed_block_noise(LAYOUT), LoopCache(net, texts, rule), []
    for block in range(BLOCKS):
        cache.switch(block)
        x = noise(block, 0)
        for step in range(4):
            x0 = cache.x0(block, x, SIGMAS[step])
            if step < 3:
                x = add_noise(x0, noise(block, step + 1), SIGMAS[step + 1])
        cache.write(block, x0, 0.0)
        blocks.append(x0)
    actual = roll_out(net, texts, Schedule(4, BLOCKS, "block_first"), rule, "diagonal")
    check_equal(torch.cat(blocks, dim=1), actual, rule)


@pytest.mark.parametrize("rule", ["keep", "recache"])
@pytest.mark.parametrize("context", ["output", "clean", "input"])
def test_timestep_first_equals_the_loop_of_hiar_with_a_switch_at_each_step(net, texts, rule, context):
    noise = keyed_block_noise(LAYOUT)
    blocks = [noise(block, 0) for block in range(BLOCKS)]
    for step in range(4):
        cache = LoopCache(net, texts, rule)
        for block in range(BLOCKS):
            cache.switch(block)
            x, x0 = blocks[block], cache.x0(block, blocks[block], SIGMAS[step])
            blocks[block] = x0 if step == 3 else add_noise(x0, noise(block, step + 1), SIGMAS[step + 1])
            output = blocks[block], SIGMAS[step + 1]
            cache.write(block, *{"output": output, "clean": (x0, 0.0), "input": (x, SIGMAS[step])}[context])
    actual = roll_out(net, texts, Schedule(4, BLOCKS, context=context), rule, "diagonal")  # type: ignore[arg-type]
    check_equal(torch.cat(blocks, dim=1), actual, rule)


@dataclasses.dataclass(frozen=True)
class FlushMask(BlockCausalMask):
    """A mask after a flush: blocks from `flush_block` on see the sink and the frames from `first_visible` on."""

    flush_block: int = 0
    first_visible: int = 0

    def visible(self) -> list[tuple[int, int, list[tuple[int, int]]]]:
        result = []
        for block, (start, end, ranges) in enumerate(super().visible()):
            if block >= self.flush_block:
                frames = [f for a, b in ranges for f in range(a, b) if f < self.sink_frames or f >= self.first_visible]
                ranges = [(f, f + 1) for f in frames]
            result.append((start, end, ranges))
        return result


@pytest.mark.parametrize("sink", [0, 1])
@pytest.mark.parametrize("method", ["timestep_first", "block_first"])
def test_flush_equals_masked_passes_without_a_cache(net, texts, sink, method):
    """A single text, because a pass has one. Each Denoise is one pass over the contexts and the block."""
    num_blocks, switch, noise, text = 5, 3, keyed_block_noise(LAYOUT), texts["a"]
    track = PromptTrack([(0, "a"), (switch, "a")])
    now, estimates = [noise(block, 0) for block in range(num_blocks)], [torch.empty(0)] * num_blocks

    def denoise(block: int, step: int, contexts: list[Tensor], level: float) -> None:
        x = now[block]
        sigmas = torch.tensor([level] * (2 * block) + [SIGMAS[step]] * 2)
        causal = FlushMask((2,) * (block + 1), CONTEXT, sink, False, switch, 2 * switch - FLUSH_FRAMES)
        whole = torch.cat([*contexts, x], dim=1).transpose(1, 2)
        flow = net(whole, 1000 * sigmas[None], text, causal=causal)[:, :, -2:].transpose(1, 2)
        estimates[block] = x - SIGMAS[step] * flow
        if step < 3:
            now[block] = add_noise(estimates[block], noise(block, step + 1), SIGMAS[step + 1])

    if method == "block_first":
        for block in range(num_blocks):
            for step in range(4):
                denoise(block, step, estimates[:block], 0.0)
    else:
        for step in range(4):
            for block in range(num_blocks):
                contexts = estimates[:block] if step == 3 else now[:block]
                denoise(block, step, contexts, SIGMAS[step + 1])
    schedule = Schedule(4, num_blocks, method)  # type: ignore[arg-type]
    actual = roll_out(net, texts, schedule, "flush", "diagonal", sink=sink, track=track)
    torch.testing.assert_close(actual, torch.cat(estimates, dim=1), atol=2e-4, rtol=0)
    kept = roll_out(net, texts, schedule, "keep", "diagonal", sink=sink, track=track)
    assert not torch.allclose(kept, actual, atol=2e-4)
