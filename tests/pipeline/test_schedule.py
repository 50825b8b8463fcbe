"""pipeline/schedule.py: the ops of a schedule, and the valid orders of ops.

Claims: exact op sequences of small cases; every generated block takes every step once; a Denoise finds exactly the
earlier blocks in its cache; `diagonal` reorders `step_major` without breaking a dependency; forward passes per block
(5 block-first, 8 timestep-first, 4 with context `input`); endless videos stream; the module imports no torch.
"""

import ast
import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import schedule as module
from pipeline.schedule import (
    Denoise,
    DenoiseAndWrite,
    Op,
    Schedule,
    WriteContext,
    dependencies,
    diagonal,
    drop_unread_writes,
    for_stage,
    fuse_write_of_input,
    step_major,
)

ORDERS = ("step_major", "diagonal")
few_examples = settings(max_examples=30)


def as_text(ops) -> str:
    """Format ops: D10/1 is Denoise(block 1, step 0, cache 1), W1@2/0 writes block 1 at noise index 2 into cache 0, and
    F10/0 is a DenoiseAndWrite."""
    return " ".join(op_as_text(op) for op in ops)


def op_as_text(op: Op) -> str:
    if isinstance(op, WriteContext):
        return f"W{op.block}@{op.noise_index}/{op.cache}"
    fused = isinstance(op, DenoiseAndWrite)
    denoise = op.denoise if fused else op
    return f"{'F' if fused else 'D'}{denoise.block}{denoise.step}/{denoise.cache}"


def unfused(op: Op) -> list[Denoise | WriteContext]:
    return [op.denoise, op.write] if isinstance(op, DenoiseAndWrite) else [op]


@st.composite
def schedules(draw) -> Schedule:
    """Draw any valid schedule with up to 4 steps and 7 blocks."""
    num_steps = draw(st.integers(1, 4))
    context = draw(st.sampled_from(["output", "input", "clean"]))
    prefix_blocks = draw(st.integers(0, 2))
    return Schedule(
        num_steps=num_steps,
        num_blocks=prefix_blocks + draw(st.integers(1, 5)),
        method=draw(st.sampled_from(["timestep_first", "block_first"])),
        context=context,
        leading_blocks=draw(st.integers(0, 2)),
        leading_steps=draw(st.integers(0, 1 if context == "input" else num_steps)),
        prefix_blocks=prefix_blocks,
    )


# ---- Exact sequences ----


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(2, 3, "block_first"), "D00/0 D01/0 W0@2/0 D10/0 D11/0 W1@2/0 D20/0 D21/0"),
        (Schedule(2, 2, "block_first", context="input"), "D00/0 D01/0 W0@2/0 D10/0 D11/0"),
        (Schedule(2, 3), "D00/0 W0@1/0 D10/0 W1@1/0 D20/0  D01/1 W0@2/1 D11/1 W1@2/1 D21/1"),
        (Schedule(2, 3, context="input"), "F00/0 F10/0 D20/0  F01/1 F11/1 D21/1"),
        (Schedule(2, 3, context="clean"), "D00/0 W0@2/0 D10/0 W1@2/0 D20/0  D01/1 W0@2/1 D11/1 W1@2/1 D21/1"),
        (Schedule(2, 3, leading_blocks=1), "D00/0 D01/0 W0@2/0 D10/0 W1@1/0 D20/0  W0@2/1 D11/1 W1@2/1 D21/1"),
        (Schedule(3, 2, leading_steps=2), "D00/0 D01/0 W0@2/0 D10/0 D11/0  D02/2 W0@3/2 D12/2"),
        (Schedule(3, 2, leading_steps=1), "D00/0 W0@1/0 D10/0  D01/1 W0@2/1 D11/1  D02/2 W0@3/2 D12/2"),
        (Schedule(2, 3, prefix_blocks=1), "W0@2/0 D10/0 W1@1/0 D20/0  W0@2/1 D11/1 W1@2/1 D21/1"),
        (Schedule(2, 2, "block_first", prefix_blocks=1), "W0@2/0 D10/0 D11/0"),
        (
            Schedule(2, 4, context="input", leading_blocks=1, prefix_blocks=1),
            "W0@2/0 D10/0 D11/0 W1@2/0 F20/0 D30/0  W0@2/1 W1@2/1 F21/1 D31/1",
        ),
        (
            Schedule(3, 3, leading_blocks=1, leading_steps=2),
            "D00/0 D01/0 D02/0 W0@3/0 D10/0 D11/0 W1@2/0 D20/0 D21/0  W0@3/2 D12/2 W1@3/2 D22/2",
        ),
        (Schedule(1, 2), "D00/0 W0@1/0 D10/0"),
    ],
    ids=str,
)
def test_step_major_sequences(schedule, expected):
    assert as_text(schedule.ops("step_major")).split() == expected.split()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(2, 3), "D00/0 W0@1/0  D10/0 W1@1/0 D01/1 W0@2/1  D20/0 D11/1 W1@2/1  D21/1"),
        (Schedule(2, 3, context="input"), "F00/0  F10/0 F01/1  D20/0 F11/1  D21/1"),
        (Schedule(2, 2, "block_first"), "D00/0 D01/0 W0@2/0  D10/0 D11/0"),
        (Schedule(3, 2, leading_steps=2), "D00/0 D01/0 W0@2/0  D10/0 D11/0 D02/2 W0@3/2  D12/2"),
        (Schedule(2, 2, leading_blocks=1), "D00/0 D01/0 W0@2/0  D10/0 W0@2/1  D11/1"),
    ],
    ids=str,
)
def test_diagonal_sequences(schedule, expected):
    assert as_text(schedule.ops("diagonal")).split() == expected.split()


# ---- Properties of all schedules ----


@few_examples
@given(schedules(), st.sampled_from(ORDERS))
def test_every_generated_block_takes_every_step_once(schedule, order):
    denoised = Counter((p.block, p.step) for op in schedule.ops(order) for p in unfused(op) if isinstance(p, Denoise))
    generated = range(schedule.prefix_blocks, schedule.num_blocks)
    assert denoised == Counter(itertools.product(generated, range(schedule.num_steps)))


@few_examples
@given(schedules(), st.sampled_from(ORDERS))
def test_a_denoise_finds_all_earlier_blocks_in_its_cache_and_its_block_at_its_noise_index(schedule, order):
    caches: dict[int, list[int]] = {}
    noise_indices = dict.fromkeys(range(schedule.prefix_blocks), schedule.num_steps)
    for single in (p for op in schedule.ops(order) for p in unfused(op)):
        written = caches.setdefault(single.cache, [])
        if isinstance(single, WriteContext):
            assert single.block == len(written)
            reached = noise_indices[single.block]
            assert single.noise_index in (reached, reached - 1, schedule.num_steps)
            written.append(single.block)
        else:
            assert written == list(range(single.block))
            assert noise_indices.get(single.block, 0) == single.step
            noise_indices[single.block] = single.step + 1


@few_examples
@given(schedules())
def test_diagonal_reorders_step_major_and_keeps_the_dependencies(schedule):
    first, second = list(schedule.ops("step_major")), list(schedule.ops("diagonal"))
    assert Counter(first) == Counter(second) and len(set(first)) == len(first)
    assert keeps_dependencies(first, second) and keeps_dependencies(second, first)


def keeps_dependencies(ops, other) -> bool:
    position = {op: index for index, op in enumerate(other)}
    return all(
        position[ops[a]] < position[op] for op, before in zip(ops, dependencies(ops), strict=True) for a in before
    )


@few_examples
@given(schedules(), st.sampled_from(ORDERS))
def test_every_write_is_read_later(schedule, order):
    ops = list(schedule.ops(order))
    for index, op in enumerate(ops):
        if not isinstance(op, Denoise):
            assert any(not isinstance(later, WriteContext) and later.cache == op.cache for later in ops[index + 1 :])


def test_dependencies_of_a_small_case():
    ops = [
        Denoise(0, 0, 0),
        WriteContext(0, 1, 0),  # reads block 0
        Denoise(1, 0, 0),  # reads cache 0
        Denoise(0, 1, 1),  # changes block 0, which op 1 reads
        WriteContext(1, 1, 0),  # reads block 1, changes cache 0, which op 2 reads
        DenoiseAndWrite(Denoise(1, 1, 1), WriteContext(1, 1, 1)),  # changes block 1 and cache 1
    ]
    assert dependencies(ops) == [set(), {0}, {1}, {0, 1}, {1, 2}, {2, 3, 4}]


def test_an_order_that_breaks_a_dependency_is_detected():
    ops = list(Schedule(2, 2).ops())
    assert keeps_dependencies(ops, ops)
    assert not keeps_dependencies(ops, [ops[1], ops[0], *ops[2:]])


# ---- Cost ----


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        (dict(method="block_first"), 5),
        (dict(), 8),
        (dict(context="clean"), 8),
        (dict(context="input"), 4),
        (dict(leading_steps=2), 7),
        (dict(leading_blocks=2), 8),
    ],
)
def test_forward_passes_per_block(changes, passes):
    """docs/method.md: passes that one more block costs with 4 steps."""
    assert len(list(Schedule(4, 12, **changes).ops())) - len(list(Schedule(4, 11, **changes).ops())) == passes
    endless = itertools.takewhile(lambda op: op.block < 60, Schedule(4, None, **changes).ops("diagonal"))
    assert Counter(op.block for op in Schedule(4, 60, **changes).ops("diagonal"))[30] == passes
    assert Counter(op.block for op in endless)[30] == passes


def test_the_last_block_is_not_written():
    assert Counter(op.block for op in Schedule(4, 3).ops())[2] == 4
    assert Counter(op.block for op in Schedule(4, 3, "block_first").ops())[2] == 4


def test_a_video_of_leading_blocks_only_uses_one_cache():
    assert {op.cache for op in Schedule(4, 2, leading_blocks=2).ops()} == {0}


# ---- Endless videos ----


@pytest.mark.parametrize("changes", [dict(), dict(context="input"), dict(leading_blocks=2), dict(leading_steps=3)])
def test_an_endless_schedule_starts_like_a_long_one(changes):
    endless = itertools.islice(Schedule(4, None, **changes).ops("diagonal"), 500)
    long = itertools.islice(Schedule(4, 1000, **changes).ops("diagonal"), 500)
    assert list(endless) == list(long)


def test_an_endless_schedule_of_one_cache_may_be_step_major():
    ops = Schedule(2, None, "block_first").ops("step_major")
    assert as_text(itertools.islice(ops, 6)) == "D00/0 D01/0 W0@2/0 D10/0 D11/0 W1@2/0"


def test_step_major_order_of_an_endless_video_is_an_error():
    with pytest.raises(ValueError, match="diagonal"):
        Schedule(2, None).ops("step_major")


# ---- Functions on ops ----


def test_drop_unread_writes_keeps_writes_that_are_read():
    ops = [WriteContext(0, 2, 0), WriteContext(0, 2, 1), Denoise(1, 0, 0), WriteContext(1, 1, 0), WriteContext(1, 2, 1)]
    assert list(drop_unread_writes(iter(ops))) == [WriteContext(0, 2, 0), Denoise(1, 0, 0)]


def test_drop_unread_writes_counts_a_fused_pair_as_a_reader():
    fused = DenoiseAndWrite(Denoise(1, 0, 0), WriteContext(1, 0, 0))
    assert list(drop_unread_writes([WriteContext(0, 0, 0), fused])) == [WriteContext(0, 0, 0), fused]


def test_a_denoise_is_fused_only_with_the_write_of_its_input():
    pair = [Denoise(0, 1, 0), WriteContext(0, 1, 0)]
    assert list(fuse_write_of_input(pair)) == [DenoiseAndWrite(*pair)]
    others = [WriteContext(0, 2, 0), WriteContext(1, 1, 0), WriteContext(0, 1, 1), Denoise(0, 2, 0)]
    for other in others:
        assert list(fuse_write_of_input([Denoise(0, 1, 0), other])) == [Denoise(0, 1, 0), other]
    assert list(fuse_write_of_input([])) == []


def test_fused_ops_are_the_same_ops_in_pairs():
    schedule = Schedule(3, 4, context="input")
    single = list(drop_unread_writes(diagonal(schedule.ops_per_cache())))
    assert [p for op in schedule.ops("diagonal") for p in unfused(op)] == single
    assert len(list(schedule.ops("diagonal"))) == 12 < len(single)


def test_step_major_chains_the_sequences():
    assert list(step_major([iter("ab"), iter("c")])) == ["a", "b", "c"]


@few_examples
@given(schedules(), st.sampled_from(ORDERS))
def test_stages_partition_the_ops(schedule, order):
    ops = list(schedule.ops(order))
    stages = [list(for_stage(ops, caches)) for caches in ([0], [1, 2], [3])]
    assert sum(map(Counter, stages), Counter()) == Counter(ops)
    for stage in stages:
        assert sorted(stage, key=ops.index) == stage


def test_a_stage_of_an_endless_schedule_streams():
    stage = for_stage(Schedule(2, None).ops("diagonal"), [1])
    assert as_text(itertools.islice(stage, 4)) == "D01/1 W0@2/1 D11/1 W1@2/1"


# ---- Errors and imports ----


def test_impossible_schedules_are_errors():
    with pytest.raises(ValueError, match="cache"):
        Schedule(4, 3, context="input", leading_steps=2)
    with pytest.raises(ValueError, match="nothing to generate"):
        Schedule(4, 2, prefix_blocks=2)


def test_the_module_imports_no_torch():
    tree = ast.parse(Path(module.__file__).read_text())
    froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in froms | names} <= sys.stdlib_module_names
    check = "import sys, pipeline.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


@few_examples
@given(schedules())
def test_ops_can_be_listed_twice(schedule):
    assert list(schedule.ops()) == list(schedule.ops())
