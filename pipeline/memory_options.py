"""The nearest options with which a configuration fits into a GPU."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.memory_plan import GB, MemoryPlan, memory_plan
from utils.config import Config
from utils.errors import UserError

_NUM_SHOWN = 4
# Costs of options, from those that only take time to those that change the video more.
_OFFLOAD = {"none": 0, "text": 1, "all": 4}
_DECODE_FRAMES, _STEP_MAJOR, _HALF_BATCH, _FLOAT8_CACHE, _INT8_WEIGHTS, _SMALLER_WINDOW, _FRAME = 1, 2, 2, 3, 4, 6, 0.1


@dataclass(frozen=True)
class Change:
    """Options to append to a command, and their cost: the smaller, the nearer to the configuration."""

    words: tuple[str, ...]
    cost: float

    def is_implied_by(self, nearer: "Change") -> bool:
        """Return whether `nearer`, which fits, has no other options, and no smaller window or batch."""
        without_batch = [{_name(word) if "--" in word else word for word in c.words} for c in (nearer, self)]
        return without_batch[0] <= without_batch[1] or {*map(_kind, nearer.words)} == {*map(_kind, self.words)}


def fitting_options(config: Config, batch_size: int, limit: float) -> str:
    """Return comment lines with the nearest options that need at most `limit` GB, or the smallest ones if none fit.

    Raises:
        UserError: as `memory_plan`.
    """
    plan = memory_plan(config, batch_size)
    if plan.peak <= limit * GB:
        return f"# fits in {limit:g} GB: {plan.peak / GB:.2f} GB"
    lines = [f"# does not fit in {limit:g} GB: {plan.peak / GB:.2f} GB. The nearest options that fit:"]
    smallest, shown = (plan, Change((), 0)), list[Change]()
    for change in sorted(_changes(config, batch_size), key=lambda change: change.cost):
        if any(change.is_implied_by(nearer) for nearer in shown):
            continue
        changed = _plan_with(config, batch_size, change)
        smallest = min(smallest, (changed, change), key=lambda pair: pair[0].peak)
        if changed.peak <= limit * GB:
            shown.append(change)
            lines.append(_line(change, changed))
        if len(shown) == _NUM_SHOWN:
            break
    if not shown:
        return (
            f"# does not fit in {limit:g} GB: {plan.peak / GB:.2f} GB. The smallest options:\n{_line(*smallest[::-1])}"
        )
    return "\n".join(lines)


def _line(change: Change, plan: MemoryPlan) -> str:
    return f"# {plan.peak / GB:7.2f}  {' '.join(change.words)}"


def _changes(config: Config, batch_size: int) -> Iterator[Change]:
    """Yield every combination of options that can save memory."""
    rollout, model = config.rollout, config.model
    cached = rollout.schedule != "bidirectional"
    offload = [(f"model.offload={key}", cost - _OFFLOAD[model.offload]) for key, cost in _OFFLOAD.items()]
    axes: list[list[tuple[str, float]]] = [[pair for pair in offload if pair[1] > 0]]
    axes.append([("model.decode_frames=1", _DECODE_FRAMES)] if model.decode_frames != 1 else [])
    axes.append([("rollout.order=step_major", _STEP_MAJOR)] if cached and rollout.order != "step_major" else [])
    axes.append(
        [("rollout.cache_dtype=float8_e4m3fn", _FLOAT8_CACHE)] if cached and rollout.cache_dtype == "auto" else []
    )
    axes.append([("model.quantization=int8", _INT8_WEIGHTS)] if model.quantization == "none" else [])
    axes.append([(f"rollout.window={frames}", _window_cost(config, frames)) for frames in _windows(config)])
    halves = itertools.takewhile(lambda size: size >= 1, (batch_size >> n for n in itertools.count(1)))
    axes.append([(f"--batch_size {size}", _HALF_BATCH * n) for n, size in enumerate(halves, start=1)])
    for choice in itertools.product(*([("", 0.0), *axis] for axis in axes)):
        yield Change(tuple(word for word, _ in choice if word), sum(cost for _, cost in choice))


def _windows(config: Config) -> list[int]:
    """Return the smaller windows of whole blocks, of at least two blocks and the sink."""
    rollout, frames = config.rollout, config.video.num_output_frames
    if rollout.schedule == "bidirectional":
        return []
    window = min(rollout.window or frames, frames)
    smallest = 2 * rollout.block_frames + rollout.sink
    return list(range(window - rollout.block_frames, smallest - 1, -rollout.block_frames))[:8]


def _window_cost(config: Config, frames: int) -> float:
    window = config.rollout.window or config.video.num_output_frames
    return _SMALLER_WINDOW + _FRAME * (window - frames)


def _plan_with(config: Config, batch_size: int, change: Change) -> MemoryPlan:
    changed = copy.deepcopy(config)
    for word in change.words:
        name, value = _name(word), word[len(_name(word)) + 1 :]
        if name == "--batch_size":
            batch_size = int(value)
        else:
            section, key = name.split(".")
            setattr(getattr(changed, section), key, int(value) if value.isdigit() else value)
    return memory_plan(changed, batch_size)


def _name(word: str) -> str:
    return word.replace("=", " ").split()[0]


def _kind(word: str) -> str:
    """Return an option without its number, if it has one."""
    return _name(word) if word[-1].isdigit() else word


def memory_report(config: Config, batch_size: int, limit: float | None) -> str:
    """Return the memory plan as comment lines and, with a limit in GB, the nearest options that fit.

    Raises:
        UserError: with a limit, as `memory_plan`. Without one, the reason is part of the text.
    """
    if limit is not None:
        return f"{memory_plan(config, batch_size)}\n{fitting_options(config, batch_size, limit)}"
    try:
        return str(memory_plan(config, batch_size))
    except UserError as error:
        return f"# no memory plan: {error}"
