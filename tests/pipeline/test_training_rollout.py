"""pipeline/training_rollout.py: rollouts that stop at an exit step, with gradients at that step only.

Claims: a training rollout equals the whole rollout up to its exit step; gradients block by block equal those of the
whole graph, also if the window is shorter than the video. Gradients never cross blocks. Only needed caches are kept.
"""

import pytest
import torch
from test_rollout import SIGMAS, VARIANTS, Denoiser, FakeCache, FakeDenoiser, fake_rollout, keyed_block_noise
from torch import Tensor

from pipeline.rollout import BlockLayout, Rollout
from pipeline.schedule import Denoise, Schedule, WriteContext
from pipeline.training_rollout import TrainingRollout

FRAME = (4, 4, 6)
LAYOUT = BlockLayout(2)
NUM_BLOCKS = 5


def exit_x0(schedule: Schedule, sigmas: list[float], exit_step: int) -> dict[int, Tensor]:
    """Return x0 of every block of a training rollout with the fake denoiser."""
    rollout = TrainingRollout(FakeDenoiser(), sigmas, keyed_block_noise(LAYOUT), FakeCache, LAYOUT, exit_step=exit_step)
    caches = schedule.caches_until(exit_step)
    return dict(rollout.run(list(schedule.ops_until(exit_step)), caches))


def whole_rollout_x0(schedule: Schedule, sigmas: list[float], step: int) -> dict[int, Tensor]:
    """Return x0 of every block at one step of the whole rollout."""
    denoiser = FakeDenoiser()
    rollout = Rollout(denoiser, sigmas, keyed_block_noise(LAYOUT), FakeCache, LAYOUT)
    list(rollout.run(list(schedule.ops()), schedule.caches))
    calls = [c for c in denoiser.calls if c[0] == "denoise" and c[2] == sigmas[step]]
    return {first_frame // LAYOUT.block_frames: x0 for _, first_frame, _, _, x0 in calls}


@pytest.mark.parametrize("exit_step", range(4))
@pytest.mark.parametrize("variant", ["timestep_first", "clean", "input", "leading_blocks", "noisy_clean"])
def test_a_training_rollout_equals_the_whole_rollout_up_to_its_exit_step(variant, exit_step):
    schedule = Schedule(4, NUM_BLOCKS, **VARIANTS[variant])
    cut, full = exit_x0(schedule, SIGMAS, exit_step), whole_rollout_x0(schedule, SIGMAS, exit_step)
    assert sorted(cut) == list(range(NUM_BLOCKS))
    # Leading blocks are written as they are at the exit step; the whole rollout denoises them further.
    same = [0] if variant == "leading_blocks" and exit_step < 3 else range(NUM_BLOCKS)
    assert all(torch.equal(cut[block], full[block]) for block in same)


def test_context_noise_is_that_of_inference():
    """A training rollout writes a block with the same noise as inference, whichever step is the exit step."""
    schedule = Schedule(4, 2, method="block_first", context_noise=0.2)
    noise = keyed_block_noise(LAYOUT)
    for exit_step in range(4):
        denoiser = FakeDenoiser()
        rollout = TrainingRollout(denoiser, SIGMAS, noise, FakeCache, LAYOUT, exit_step=exit_step)
        x0 = dict(rollout.run(list(schedule.ops_until(exit_step)), schedule.caches_until(exit_step)))
        [(_, _, sigma, written, _)] = [call for call in denoiser.calls if call[0] == "write"]
        assert sigma == 0.2 and torch.equal(written, 0.8 * x0[0] + 0.2 * noise(0, 4))


@pytest.mark.parametrize("exit_step", range(4))
def test_block_first_writes_the_x0_of_the_exit_step_as_clean(exit_step):
    """As in Self-Forcing's training, the exit step replaces the last step."""
    short = [*SIGMAS[: exit_step + 1], 0.0]
    cut = exit_x0(Schedule(4, NUM_BLOCKS, method="block_first"), SIGMAS, exit_step)
    full = whole_rollout_x0(Schedule(exit_step + 1, NUM_BLOCKS, method="block_first"), short, exit_step)
    assert all(torch.equal(cut[block], full[block]) for block in range(NUM_BLOCKS))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("exit_step", range(4))
def test_every_op_contributes_to_an_exit_step(variant, exit_step):
    ops = list(Schedule(4, 3, **VARIANTS[variant]).ops_until(exit_step))
    denoise = [op if isinstance(op, Denoise) else op.denoise for op in ops if not isinstance(op, WriteContext)]
    assert {op.step for op in denoise} == set(range(exit_step + 1))
    assert {(op.block, op.step) for op in denoise} == {(b, s) for b in range(3) for s in range(exit_step + 1)}
    last = max(i for i, op in enumerate(ops) if not isinstance(op, WriteContext))
    assert last == len(ops) - 1


# ---- Gradients, with the tiny network ----


@pytest.fixture(scope="module")
def net(make_net):
    return make_net(num_layers=2)


def rollout_of(net, context: int, history: int, exit_step: int, caches: list, **changes) -> TrainingRollout:
    text = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(2))

    def new_cache():
        caches.append(net.new_cache(2, *FRAME[1:], context, LAYOUT.block_frames, sink_frames=1, history_frames=history))
        return caches[-1]

    denoiser = Denoiser(net, net.encode_text(text))
    noise = keyed_block_noise(LAYOUT, samples=(0, 1))
    return TrainingRollout(denoiser, SIGMAS, noise, new_cache, LAYOUT, exit_step=exit_step, **changes)


def gradients(net) -> dict[str, Tensor]:
    result = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return result


@pytest.mark.parametrize(("context", "history"), [(8, 0), (4, 6)])
@pytest.mark.parametrize(
    "variant", ["timestep_first", "block_first", "input", "leading_blocks", "leading_steps", "noisy_block_first"]
)
def test_gradients_block_by_block_equal_those_of_the_whole_graph(net, variant, context, history):
    exit_step = 2
    schedule = Schedule(4, NUM_BLOCKS, **VARIANTS[variant])
    ops, used = list(schedule.ops_until(exit_step)), schedule.caches_until(exit_step)
    trained = range(2, NUM_BLOCKS)
    weight = {b: torch.randn(2, 2, *FRAME, generator=torch.Generator().manual_seed(b)) for b in trained}

    graph = rollout_of(net, context, 0, exit_step, [], with_grad=lambda block: block in trained)
    expected = dict(graph.run(ops, used))
    assert [block for block, x0 in expected.items() if x0.requires_grad] == list(trained)
    sum((expected[b] * weight[b]).sum() for b in trained).backward()
    reference = gradients(net)

    for checkpointing in (False, True) if history else (False,):
        net.gradient_checkpointing = checkpointing
        try:
            caches: list = []
            rollout = rollout_of(net, context, history, exit_step, caches)
            outputs = dict(rollout.run(ops, used))
            assert not any(x0.requires_grad for x0 in outputs.values())
            # All blocks share the graph of the text.
            rollout.denoiser = rollout_of(net, context, history, exit_step, []).denoiser
            for block in (3, 2, 4):
                x0 = rollout.replay(block)
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
    """A block's x0 depends on the parameters only through its own Denoise; the context is constant."""
    schedule = Schedule(4, 3)
    rollout = rollout_of(net, 4, 0, 1, [], with_grad=lambda block: True)
    outputs = dict(rollout.run(list(schedule.ops_until(1)), [0, 1]))
    outputs[2].sum().backward(retain_graph=True)
    alone = gradients(net)
    again = rollout_of(net, 4, 0, 1, [], with_grad=lambda block: block == 2)
    dict(again.run(list(schedule.ops_until(1)), [0, 1]))[2].sum().backward()
    for name, gradient in gradients(net).items():
        torch.testing.assert_close(gradient, alone[name], msg=name)


def test_inference_keeps_no_cache():
    rollout, schedule = fake_rollout(), Schedule(4, 3)
    outputs = dict(rollout.run(list(schedule.ops()), schedule.caches))
    assert len(outputs) == 3 and not rollout.caches


def test_a_block_without_its_context_cannot_be_replayed(net):
    schedule = Schedule(4, NUM_BLOCKS)
    rollout = rollout_of(net, 2, 1, 0, [])
    list(rollout.run(list(schedule.ops_until(0)), [0]))
    with pytest.raises(ValueError, match="does not hold the context before frame 4"):
        rollout.replay(2)
