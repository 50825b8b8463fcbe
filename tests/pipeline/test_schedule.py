"""pipeline/schedule.py: the ops of every method, and that their order may be changed.

Claims: exact sequences of small cases; every step of every generated block once; a Denoise finds exactly the earlier
blocks in its cache; `diagonal` is `step_major` in another order that keeps the dependencies; forward passes per block
(5 block-first, 8 timestep-first, 4 with context `input`); endless videos stream; no torch.
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
    Fused,
    Op,
    Schedule,
    WriteContext,
    dependencies,
    diagonal,
    drop_unread_writes,
    for_stage,
    fuse,
    step_major,
)

ORDERS = ("step_major", "diagonal")


def words(ops) -> str:
    """Ops as words: D10/1 is Denoise(block 1, step 0, cache 1), W1@2/0 writes block 1 at level 2, F is a Fused."""
    return " ".join(word(op) for op in ops)


def word(op: Op) -> str:
    if isinstance(op, WriteContext):
        return f"W{op.block}@{op.noise_index}/{op.cache}"
    denoise = op.denoise if isinstance(op, Fused) else op
    return f"{type(op).__name__[0]}{denoise.block}{denoise.step}/{denoise.cache}"


def parts(op: Op) -> list[Denoise | WriteContext]:
    return [op.denoise, op.write] if isinstance(op, Fused) else [op]


@st.composite
def schedules(draw) -> Schedule:
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


# ---- exact sequences ----


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
    assert words(schedule.ops("step_major")).split() == expected.split()


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
    assert words(schedule.ops("diagonal")).split() == expected.split()


# ---- what holds for all schedules ----


@given(schedules(), st.sampled_from(ORDERS))
def test_every_step_of_every_generated_block_once(schedule, order):
    denoised = Counter((p.block, p.step) for op in schedule.ops(order) for p in parts(op) if isinstance(p, Denoise))
    generated = range(schedule.prefix_blocks, schedule.num_blocks)
    assert denoised == Counter(itertools.product(generated, range(schedule.num_steps)))


@given(schedules(), st.sampled_from(ORDERS))
def test_a_denoise_finds_all_earlier_blocks_in_its_cache_and_its_block_at_its_level(schedule, order):
    caches: dict[int, list[int]] = {}
    levels = dict.fromkeys(range(schedule.prefix_blocks), schedule.num_steps)
    for part in (p for op in schedule.ops(order) for p in parts(op)):
        written = caches.setdefault(part.cache, [])
        if isinstance(part, WriteContext):
            assert part.block == len(written)
            assert part.noise_index in (levels[part.block], levels[part.block] - 1, schedule.num_steps)
            written.append(part.block)
        else:
            assert written == list(range(part.block))
            assert levels.get(part.block, 0) == part.step
            levels[part.block] = part.step + 1


@given(schedules())
def test_diagonal_is_step_major_in_an_order_that_keeps_the_dependencies(schedule):
    first, second = list(schedule.ops("step_major")), list(schedule.ops("diagonal"))
    assert Counter(first) == Counter(second) and len(set(first)) == len(first)
    assert keeps_dependencies(first, second) and keeps_dependencies(second, first)


def keeps_dependencies(ops, other) -> bool:
    position = {op: index for index, op in enumerate(other)}
    return all(
        position[ops[a]] < position[op] for op, before in zip(ops, dependencies(ops), strict=True) for a in before
    )


@given(schedules(), st.sampled_from(ORDERS))
def test_writes_are_read(schedule, order):
    ops = list(schedule.ops(order))
    read_later = [
        any(not isinstance(o, WriteContext) and o.cache == op.cache for o in ops[i + 1 :]) for i, op in enumerate(ops)
    ]
    assert all(read for op, read in zip(ops, read_later, strict=True) if not isinstance(op, Denoise))


def test_dependencies_of_a_small_case():
    ops = [
        Denoise(0, 0, 0),
        WriteContext(0, 1, 0),  # reads block 0
        Denoise(1, 0, 0),  # reads cache 0
        Denoise(0, 1, 1),  # changes block 0: not before its write
        WriteContext(1, 1, 0),  # reads block 1, changes cache 0, which op 2 reads
        Fused(Denoise(1, 1, 1), WriteContext(1, 1, 1)),  # changes block 1 and cache 1
    ]
    assert dependencies(ops) == [set(), {0}, {1}, {0, 1}, {1, 2}, {2, 3, 4}]


def test_an_op_that_moves_over_its_dependency_is_noticed():
    ops = list(Schedule(2, 2).ops())
    assert keeps_dependencies(ops, ops)
    assert not keeps_dependencies(ops, [ops[1], ops[0], *ops[2:]])


# ---- cost ----


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
def test_forward_passes_of_a_block(changes, passes):
    """METHOD section 3, with 4 steps: what one block more costs."""
    assert len(list(Schedule(4, 12, **changes).ops())) - len(list(Schedule(4, 11, **changes).ops())) == passes
    endless = itertools.takewhile(lambda op: op.block < 60, Schedule(4, None, **changes).ops("diagonal"))
    assert Counter(op.block for op in Schedule(4, 60, **changes).ops("diagonal"))[30] == passes
    assert Counter(op.block for op in endless)[30] == passes


def test_the_last_block_needs_no_context():
    assert Counter(op.block for op in Schedule(4, 3).ops())[2] == 4
    assert Counter(op.block for op in Schedule(4, 3, "block_first").ops())[2] == 4


def test_a_video_of_leading_blocks_only_uses_one_cache():
    assert {op.cache for op in Schedule(4, 2, leading_blocks=2).ops()} == {0}


# ---- endless videos ----


@pytest.mark.parametrize("changes", [dict(), dict(context="input"), dict(leading_blocks=2), dict(leading_steps=3)])
def test_an_endless_schedule_begins_like_a_long_one(changes):
    endless = itertools.islice(Schedule(4, None, **changes).ops("diagonal"), 500)
    long = itertools.islice(Schedule(4, 1000, **changes).ops("diagonal"), 500)
    assert list(endless) == list(long)


def test_an_endless_schedule_of_one_cache_needs_no_diagonal():
    ops = Schedule(2, None, "block_first").ops("step_major")
    assert words(itertools.islice(ops, 6)) == "D00/0 D01/0 W0@2/0 D10/0 D11/0 W1@2/0"


def test_step_major_without_an_end_is_refused():
    with pytest.raises(ValueError, match="diagonal"):
        Schedule(2, None).ops("step_major")


# ---- the passes ----


def test_drop_unread_writes_keeps_what_is_read():
    ops = [WriteContext(0, 2, 0), WriteContext(0, 2, 1), Denoise(1, 0, 0), WriteContext(1, 1, 0), WriteContext(1, 2, 1)]
    assert list(drop_unread_writes(iter(ops))) == [WriteContext(0, 2, 0), Denoise(1, 0, 0)]


def test_drop_unread_writes_counts_a_fused_pass_as_a_reader():
    fused = Fused(Denoise(1, 0, 0), WriteContext(1, 0, 0))
    assert list(drop_unread_writes([WriteContext(0, 0, 0), fused])) == [WriteContext(0, 0, 0), fused]


def test_fuse_joins_a_denoise_and_the_write_of_its_input_only():
    pair = [Denoise(0, 1, 0), WriteContext(0, 1, 0)]
    assert list(fuse(pair)) == [Fused(*pair)]
    others = [WriteContext(0, 2, 0), WriteContext(1, 1, 0), WriteContext(0, 1, 1), Denoise(0, 2, 0)]
    for other in others:
        assert list(fuse([Denoise(0, 1, 0), other])) == [Denoise(0, 1, 0), other]
    assert list(fuse([])) == []


def test_fused_passes_are_the_same_parts():
    schedule = Schedule(3, 4, context="input")
    unfused = list(drop_unread_writes(diagonal(schedule.ops_per_cache())))
    assert [p for op in schedule.ops("diagonal") for p in parts(op)] == unfused
    assert len(list(schedule.ops("diagonal"))) == 12 < len(unfused)


def test_step_major_goes_through_the_streams_one_by_one():
    assert list(step_major([iter("ab"), iter("c")])) == ["a", "b", "c"]


@given(schedules(), st.sampled_from(ORDERS))
def test_stages_share_the_ops(schedule, order):
    ops = list(schedule.ops(order))
    stages = [list(for_stage(ops, caches)) for caches in ([0], [1, 2], [3])]
    assert sum(map(Counter, stages), Counter()) == Counter(ops)
    for stage in stages:
        assert sorted(stage, key=ops.index) == stage


def test_a_stage_of_an_endless_schedule_streams():
    stage = for_stage(Schedule(2, None).ops("diagonal"), [1])
    assert words(itertools.islice(stage, 4)) == "D01/1 W0@2/1 D11/1 W1@2/1"


# ---- refusals and imports ----


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="cache"):
        Schedule(4, 3, context="input", leading_steps=2)
    with pytest.raises(ValueError, match="nothing to generate"):
        Schedule(4, 2, prefix_blocks=2)


def test_the_schedule_knows_no_torch():
    tree = ast.parse(Path(module.__file__).read_text())
    froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in froms | names} <= sys.stdlib_module_names
    check = "import sys, pipeline.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


@settings(max_examples=20)
@given(schedules())
def test_a_schedule_is_a_value_that_is_not_used_up(schedule):
    assert list(schedule.ops()) == list(schedule.ops())
