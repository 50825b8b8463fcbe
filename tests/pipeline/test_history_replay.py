"""pipeline/history_replay.py: one pass repeats the exit step of a rollout, with gradients through its context.

Claims: the pass predicts the x0 of the rollout, for every schedule, context rule, exit step, window and sink (law 6,
docs/method.md). Its gradient equals that of blocks that run one by one over a cache with a graph. With `released`, it
equals that of a cache whose values are overwritten in place without autograd.
"""

from collections.abc import Sequence

import pytest
import torch
from test_rollout import SIGMAS, VARIANTS, keyed_block_noise
from torch import Tensor

from model.denoiser import Denoiser
from model.flow import flow_to_x0
from pipeline.history_replay import plan_replay, replay_exit_step
from pipeline.rollout import BlockLayout
from pipeline.schedule import Denoise, DenoiseAndWrite, Op, Schedule
from pipeline.training_rollout import TrainingRollout

FRAME = (4, 4, 6)
LAYOUT = BlockLayout(2)
TOKENS = 6  # per frame
NUM_BLOCKS = 5
TEXT = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def net(make_net):
    return make_net(num_layers=2)


def denoiser_of(net) -> Denoiser:
    return Denoiser(net, net.encode_text(TEXT))


def roll_out(
    net, schedule: Schedule, exit_step: int, context: int, sink: int, layout: BlockLayout = LAYOUT
) -> tuple[TrainingRollout, dict[int, Tensor], list[Op]]:
    """Return a training rollout that keeps its contexts, the x0 of its blocks, and its ops."""

    def new_cache():
        return net.new_cache(2, *FRAME[1:], context, layout.block_frames, sink_frames=sink)

    noise = keyed_block_noise(layout, samples=(0, 1))
    options = dict(exit_step=exit_step, keep_contexts=True)
    with torch.no_grad():
        rollout = TrainingRollout(denoiser_of(net), SIGMAS, noise, new_cache, layout, **options)
    ops = list(schedule.ops_until(exit_step))
    return rollout, dict(rollout.run(ops, schedule.caches_until(exit_step))), ops


@pytest.mark.parametrize(("context", "sink"), [(8, 0), (4, 1), (3, 2)])
@pytest.mark.parametrize("exit_step", range(4))
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_replay_predicts_the_x0_of_the_rollout(net, variant, exit_step, context, sink):
    schedule = Schedule(4, NUM_BLOCKS, **VARIANTS[variant])
    rollout, expected, ops = roll_out(net, schedule, exit_step, context, sink)
    plan = plan_replay(ops, LAYOUT, exit_step, range(NUM_BLOCKS), context, sink)
    with torch.no_grad():
        denoiser = denoiser_of(net)
    outputs = replay_exit_step(rollout, plan, denoiser)
    assert sorted(outputs) == list(range(NUM_BLOCKS)) and outputs[0].requires_grad
    for block, x0 in outputs.items():
        torch.testing.assert_close(x0.detach(), expected[block], atol=1e-5, rtol=1e-5)


def test_an_input_that_is_also_context_is_not_doubled():
    ops = list(Schedule(4, NUM_BLOCKS, context="input").ops_until(2))
    plan = plan_replay(ops, LAYOUT, 2, range(NUM_BLOCKS), 8, 0)
    assert [segment.block for segment in plan.segments] == list(range(NUM_BLOCKS))


@pytest.mark.parametrize("exit_step", [0, 3])
def test_blocks_of_several_sizes_and_a_write_window(net, exit_step):
    layout = BlockLayout(2, independent_first_frame=True)
    schedule = Schedule(4, NUM_BLOCKS, write_frames=2)
    rollout, expected, ops = roll_out(net, schedule, exit_step, 5, 1, layout)
    plan = plan_replay(ops, layout, exit_step, [2, 4], 5, 1)
    with torch.no_grad():
        outputs = replay_exit_step(rollout, plan, denoiser_of(net))
    assert sorted(outputs) == [2, 4]
    for block, x0 in outputs.items():
        torch.testing.assert_close(x0, expected[block], atol=1e-5, rtol=1e-5)


# ---- Gradients ----


class GraphCache:
    """A cache whose keys and values may have a graph; its window is stated frame by frame."""

    frozen = False

    def __init__(self, net, context: int, sink: int):
        config = net.config
        shape = 2, NUM_BLOCKS * LAYOUT.block_frames * TOKENS, config.num_attention_heads, config.attention_head_dim
        self.buffers = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_layers)]
        self.context, self.sink, self.num_frames = context, sink, 0

    def read_with_block(self, layer, k, v, before=None, uncommitted=0, frames=None):
        oldest = self.num_frames - (self.context - self.sink)
        visible = [frame for frame in range(self.num_frames) if frame < self.sink or frame >= oldest]
        tokens = torch.tensor(
            [frame * TOKENS + token for frame in visible for token in range(TOKENS)], dtype=torch.long
        )
        return tuple(torch.cat([x[:, tokens], new], dim=1) for x, new in zip(self.buffers[layer], (k, v), strict=True))

    def append(self, layer, k, v):
        """Write in place: with autograd also the graph of k and v, without it only their values."""
        start = self.num_frames * TOKENS
        for buffer, x in zip(self.buffers[layer], (k, v), strict=True):
            buffer[:, start : start + x.shape[1]] = x

    def commit(self, num_frames):
        self.num_frames += num_frames


def serial_x0(
    net, rollout: TrainingRollout, ops: Sequence[Op], context: int, sink: int, released: bool
) -> dict[int, Tensor]:
    """Repeat the exit step block by block over a `GraphCache`. The inputs are those of the rollout.

    Args:
        released: the exit pass also writes its keys and values, and the context pass overwrites their values.
    """
    text, caches, result = net.encode_text(TEXT), {}, {}
    for op in ops:
        cache = caches.setdefault(op.cache, GraphCache(net, context, sink))
        denoise = op.denoise if isinstance(op, DenoiseAndWrite) else op
        if isinstance(denoise, Denoise):
            if denoise.step < rollout.final_step:
                continue  # it has no part in the exit step, nor has a context that it writes
            exit_input, first_frame = rollout.exit_inputs[op.block], LAYOUT.start(op.block)
            arguments = exit_input.x.transpose(1, 2), torch.full(exit_input.x.shape[:2], 1000 * exit_input.sigma), text
            committed = cache.num_frames
            flow = net.denoise_block(*arguments, cache, first_frame, append=released or denoise is not op)
            if denoise is op:
                cache.num_frames = committed  # the context pass writes the same frames
            result[op.block] = flow_to_x0(exit_input.x, flow.transpose(1, 2), exit_input.sigma)
        else:
            x, sigma = rollout.contexts[op.cache, op.block]
            with torch.set_grad_enabled(not released):
                timestep = torch.full(x.shape[:2], 1000 * sigma)
                net.write_block(x.transpose(1, 2), timestep, text, cache, LAYOUT.start(op.block))
    return result


def gradients(net) -> dict[str, Tensor]:
    result = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return result


@pytest.mark.parametrize("released", [False, True], ids=["context", "released"])
@pytest.mark.parametrize(("context", "sink"), [(8, 0), (4, 1)])
@pytest.mark.parametrize("exit_step", [0, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_those_of_a_cache_with_a_graph(net, variant, exit_step, context, sink, released):
    schedule = Schedule(4, NUM_BLOCKS, **VARIANTS[variant])
    rollout, expected, ops = roll_out(net, schedule, exit_step, context, sink)
    weight = {b: torch.randn(2, 2, *FRAME, generator=torch.Generator().manual_seed(b)) for b in range(NUM_BLOCKS)}

    reference = serial_x0(net, rollout, ops, context, sink, released)
    sum((x0 * weight[block]).sum() for block, x0 in reference.items()).backward()
    wanted = gradients(net)

    plan = plan_replay(ops, LAYOUT, exit_step, range(NUM_BLOCKS), context, sink, released)
    outputs = replay_exit_step(rollout, plan, denoiser_of(net))
    sum((x0 * weight[block]).sum() for block, x0 in outputs.items()).backward()
    found = gradients(net)

    assert found.keys() == wanted.keys()
    for block, x0 in reference.items():
        torch.testing.assert_close(x0, expected[block], atol=1e-5, rtol=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_activation_checkpointing_keeps_the_gradients(net):
    rollout, _, ops = roll_out(net, Schedule(4, NUM_BLOCKS), 2, 4, 1)
    for released in (False, True):
        plan = plan_replay(ops, LAYOUT, 2, range(2, NUM_BLOCKS), 4, 1, released)
        found = []
        for net.gradient_checkpointing in (False, True):
            sum(x0.square().sum() for x0 in replay_exit_step(rollout, plan, denoiser_of(net)).values()).backward()
            found.append(gradients(net))
        net.gradient_checkpointing = False
        for name in found[0]:
            torch.testing.assert_close(found[1][name], found[0][name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("variant", ["timestep_first", "block_first", "input"])
def test_a_loss_reaches_the_context_of_earlier_blocks(net, variant):
    """The three kinds of gradient differ: none through the context, all of it, and that of the exit inputs."""
    rollout, _, ops = roll_out(net, Schedule(4, NUM_BLOCKS, **VARIANTS[variant]), 2, 8, 0)
    found = []
    for released, exits in ((False, range(NUM_BLOCKS)), (True, range(NUM_BLOCKS)), (True, [4])):
        plan = plan_replay(ops, LAYOUT, 2, exits, 8, 0, released)
        replay_exit_step(rollout, plan, denoiser_of(net))[4].sum().backward()
        found.append(gradients(net)["blocks.0.attn1.to_v.weight"])
    same = torch.allclose(found[0], found[1], atol=1e-5)
    assert same == (variant == "input")  # there, the exit inputs are the context
    assert not torch.allclose(found[1], found[2], atol=1e-5) and found[2].any()
