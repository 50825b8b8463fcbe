"""Rollouts that stop at an exit step, as training runs them: by the same executor, with gradients at that step only.

Claims: up to the exit step a cut rollout is the whole one; the gradients of blocks that are denoised again one by one
are those of the whole graph, also where the window is shorter than the video; gradients never cross blocks; no more
than one cache is kept.
"""

import pytest
import torch
from test_rollout import SIGMAS, VARIANTS, Denoiser, FakeDenoiser, FakeLane, noise_of
from torch import Tensor

from pipeline.rollout import BlockLayout, Rollout
from pipeline.schedule import Denoise, Schedule, WriteContext

FRAME = (4, 4, 6)
LAYOUT = BlockLayout(2)
NUM_BLOCKS = 5


def exits(schedule: Schedule, sigmas: list[float], exit_step: int) -> dict[int, Tensor]:
    """What the blocks are at the exit step of a cut rollout with the fake denoiser."""
    rollout = Rollout(FakeDenoiser(), sigmas, noise_of(LAYOUT), FakeLane, LAYOUT, exit_step=exit_step)
    caches = schedule.caches_until(exit_step)
    return dict(rollout.run(list(schedule.ops_until(exit_step)), caches))


def whole(schedule: Schedule, sigmas: list[float], step: int) -> dict[int, Tensor]:
    """x0 of every block at one step of the whole rollout."""
    denoiser = FakeDenoiser()
    rollout = Rollout(denoiser, sigmas, noise_of(LAYOUT), FakeLane, LAYOUT)
    list(rollout.run(list(schedule.ops()), schedule.caches))
    calls = [c for c in denoiser.calls if c[0] == "denoise" and c[2] == sigmas[step]]
    return {first_frame // LAYOUT.block_frames: x0 for _, first_frame, _, _, x0 in calls}


@pytest.mark.parametrize("exit_step", range(4))
@pytest.mark.parametrize("variant", ["timestep_first", "clean", "input", "leading_blocks"])
def test_up_to_the_exit_step_it_is_the_whole_rollout(variant, exit_step):
    schedule = Schedule(4, NUM_BLOCKS, **VARIANTS[variant])
    cut, full = exits(schedule, SIGMAS, exit_step), whole(schedule, SIGMAS, exit_step)
    assert sorted(cut) == list(range(NUM_BLOCKS))
    # Leading blocks are seen as they are at the exit step, which the whole rollout goes beyond.
    same = [0] if variant == "leading_blocks" and exit_step < 3 else range(NUM_BLOCKS)
    assert all(torch.equal(cut[block], full[block]) for block in same)


@pytest.mark.parametrize("exit_step", range(4))
def test_block_first_writes_the_x0_of_the_exit_step_as_clean(exit_step):
    """The rollout of Self-Forcing's training: as if the exit step were the last one."""
    short = [*SIGMAS[: exit_step + 1], 0.0]
    cut = exits(Schedule(4, NUM_BLOCKS, method="block_first"), SIGMAS, exit_step)
    full = whole(Schedule(exit_step + 1, NUM_BLOCKS, method="block_first"), short, exit_step)
    assert all(torch.equal(cut[block], full[block]) for block in range(NUM_BLOCKS))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("exit_step", range(4))
def test_no_op_is_left_that_nothing_comes_of(variant, exit_step):
    ops = list(Schedule(4, 3, **VARIANTS[variant]).ops_until(exit_step))
    denoise = [op if isinstance(op, Denoise) else op.denoise for op in ops if not isinstance(op, WriteContext)]
    assert {op.step for op in denoise} == set(range(exit_step + 1))
    assert {(op.block, op.step) for op in denoise} == {(b, s) for b in range(3) for s in range(exit_step + 1)}
    last = max(i for i, op in enumerate(ops) if not isinstance(op, WriteContext))
    assert last == len(ops) - 1


# ---- gradients, with the tiny net ----


@pytest.fixture(scope="module")
def net(make_net):
    return make_net(num_layers=2)


def rollout_of(net, context: int, history: int, exit_step: int, caches: list, **changes) -> Rollout:
    text = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(2))

    def new_cache():
        caches.append(net.new_cache(2, *FRAME[1:], context, LAYOUT.block_frames, sink_frames=1, history_frames=history))
        return caches[-1]

    denoiser = Denoiser(net, net.encode_text(text))
    noise = noise_of(LAYOUT, samples=(0, 1))
    return Rollout(denoiser, SIGMAS, noise, new_cache, LAYOUT, exit_step=exit_step, **changes)


def gradients(net) -> dict[str, Tensor]:
    result = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return result


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("context", "history"), [(8, 0), (4, 6)])
@pytest.mark.parametrize("variant", ["timestep_first", "block_first", "input", "leading_blocks", "leading_steps"])
def test_block_by_block_gradients_are_those_of_the_whole_graph(net, variant, context, history, checkpointing):
    exit_step = 2
    schedule = Schedule(4, NUM_BLOCKS, **VARIANTS[variant])
    ops, used = list(schedule.ops_until(exit_step)), schedule.caches_until(exit_step)
    wanted = range(2, NUM_BLOCKS)
    weight = {b: torch.randn(2, 2, *FRAME, generator=torch.Generator().manual_seed(b)) for b in wanted}

    graph = rollout_of(net, context, 0, exit_step, [], with_grad=lambda block: block in wanted)
    expected = dict(graph.run(ops, used))
    assert [block for block, x0 in expected.items() if x0.requires_grad] == list(wanted)
    sum((expected[b] * weight[b]).sum() for b in wanted).backward()
    reference = gradients(net)

    net.gradient_checkpointing = checkpointing
    try:
        caches: list = []
        rollout = rollout_of(net, context, history, exit_step, caches)
        outputs = dict(rollout.run(ops, used))
        assert not any(x0.requires_grad for x0 in outputs.values())
        # The text's graph is shared by all blocks.
        rollout.denoiser = rollout_of(net, context, history, exit_step, []).denoiser
        for block in (3, 2, 4):
            x0 = rollout.denoise_again(block)
            torch.testing.assert_close(x0, expected[block], atol=1e-5, rtol=1e-5)
            (x0 * weight[block]).sum().backward(retain_graph=True)
    finally:
        net.gradient_checkpointing = False
    again = gradients(net)
    assert again.keys() == reference.keys()
    for name in reference:
        torch.testing.assert_close(again[name], reference[name], atol=2e-5, rtol=1e-4, msg=name)
    assert len(caches) <= 2 if variant == "leading_blocks" else len(caches) == 1


def test_gradients_do_not_cross_blocks(net):
    """A block's x0 depends on the parameters through its own Denoise only: the context is a constant."""
    schedule = Schedule(4, 3)
    rollout = rollout_of(net, 4, 0, 1, [], with_grad=lambda block: True)
    outputs = dict(rollout.run(list(schedule.ops_until(1)), [0, 1]))
    outputs[2].sum().backward(retain_graph=True)
    alone = gradients(net)
    again = rollout_of(net, 4, 0, 1, [], with_grad=lambda block: block == 2)
    dict(again.run(list(schedule.ops_until(1)), [0, 1]))[2].sum().backward()
    for name, gradient in gradients(net).items():
        torch.testing.assert_close(gradient, alone[name], msg=name)


def test_inference_keeps_nothing(net):
    caches: list = []
    rollout = rollout_of(net, 4, 0, 3, caches)
    rollout.exit_step = None
    schedule = Schedule(4, 3)
    outputs = dict(rollout.run(list(schedule.ops()), schedule.caches))
    assert len(outputs) == 3 and not rollout.exits and len(caches) == 1


def test_a_block_whose_context_is_gone_is_not_denoised_again(net):
    schedule = Schedule(4, NUM_BLOCKS)
    rollout = rollout_of(net, 2, 1, 0, [])
    list(rollout.run(list(schedule.ops_until(0)), [0]))
    with pytest.raises(ValueError, match="does not hold the context before frame 4"):
        rollout.denoise_again(2)
