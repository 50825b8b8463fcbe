"""The cases of a benchmark run: one configuration for each combination of the options."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmark.baseline import baseline_config
from benchmark.passes import PASSES
from utils.config import Config
from utils.config_loading import load_config
from utils.device import DTYPES
from utils.errors import UserError


class Preset(NamedTuple):
    """A model and a video size to measure."""

    config: str
    training_config: str
    overrides: list[str]
    random: str = ""
    """Key of presets.TRANSFORMERS: use random weights of this size. Empty: load the weights of the configuration."""
    sweep: Mapping[str, list[str]] = {}
    """Options that have several values by default."""


PRESETS = {
    "shapes": Preset(
        "configs/shapes.yaml",
        "configs/shapes/hiar.yaml",
        ["video.num_output_frames=30"],
        sweep={"schedule": ["timestep_first", "block_first"], "fuse": ["on", "off"]},
    ),
    "h100": Preset(
        "configs/hiar.yaml",
        "configs/hiar.yaml",
        ["video.num_output_frames=42", "runtime.device=cuda"],
        random="wan-1.3b",
    ),
    "wide": Preset(
        "configs/hiar.yaml",
        "configs/hiar.yaml",
        ["runtime.device=cpu", "model.dtype=float32", "model.text_length=64", "video.height=96", "video.width=160"],
        random="wan-1.3b-4-layers",
    ),
}
KINDS = ("rollout", "baseline", "pass", "decoder", "text_encoder", "training", "kernels")
KERNEL_ROWS = (*PASSES, "decoder")
DEFAULT_KINDS = ("rollout", "baseline", "decoder", "text_encoder")


class Option(NamedTuple):
    """A command-line option with several values; the run measures all combinations."""

    key: str
    choices: Sequence[str] | None
    kinds: tuple[str, ...]
    """Kinds of cases that the option affects."""


_ROLLOUTS = ("rollout", "baseline")
_ON_OFF = ("on", "off")
OPTIONS = {
    "schedule": Option("rollout.schedule", ("timestep_first", "block_first"), ("rollout",)),
    "order": Option("rollout.order", ("step_major", "diagonal", "batched"), ("rollout",)),
    "fuse": Option("rollout.fuse_context", _ON_OFF, ("rollout",)),
    "window": Option("rollout.window", None, (*_ROLLOUTS, "pass", "kernels")),
    "frames": Option("video.num_output_frames", None, _ROLLOUTS),
    "size": Option("video.height", None, (*_ROLLOUTS, "pass", "decoder", "training", "kernels")),
    "dtype": Option("model.dtype", tuple(DTYPES), (*_ROLLOUTS, "pass", "decoder", "text_encoder", "kernels")),
    "attention": Option("model.attention_backend", None, (*_ROLLOUTS, "pass")),
    "compile": Option("model.compile", _ON_OFF, (*_ROLLOUTS, "pass", "kernels")),
    "block_backward": Option("distill.block_backward", _ON_OFF, ("training",)),
    "checkpointing": Option("train.activation_checkpointing", _ON_OFF, ("training",)),
}


class Case(NamedTuple):
    """A row of the report: a configuration and the kind of its measurement."""

    kind: str
    config: Config
    settings: dict[str, str]
    """Values of the options, as on the command line."""

    @property
    def dtype(self) -> str:
        """Name of the dtype of the network."""
        return (self.config.train if self.kind == "training" else self.config.model).dtype

    def __str__(self) -> str:
        return " ".join([self.kind, *self.settings.values()])


def make_cases(
    preset: Preset,
    kinds: Sequence[str],
    values: Mapping[str, Sequence[str] | None],
    overrides: Sequence[str],
    iterations: int,
) -> Iterator[Case]:
    """Yield all combinations of the options, each configuration once.

    Args:
        kinds: from KINDS.
        values: values of each option in OPTIONS, None for the preset's values; and `passes`, from KERNEL_ROWS.
        overrides: `section.key=value` arguments for all cases.
        iterations: timed training iterations.

    Raises:
        UserError: for an invalid configuration.
    """
    for kind in dict.fromkeys(kinds):
        names = [name for name, option in OPTIONS.items() if kind in option.kinds]
        seen = set()
        sweeps: list[Sequence[str | None]] = [values.get(n) or preset.sweep.get(n) or [None] for n in names]
        for combination in itertools.product(*sweeps):
            words = [
                word for name, value in zip(names, combination, strict=True) for word in option_overrides(name, value)
            ]
            if kind == "training":
                config = load_config(preset.training_config, [*words, *overrides], for_training=True)
                _check_training(config, preset.training_config, iterations)
            else:
                config = load_config(preset.config, [*preset.overrides, *words, *overrides])
            if kind == "baseline":
                config = baseline_config(config)
            if config.rollout.schedule == "block_first":
                config.rollout.order = "step_major"  # with one cache, all orders are the same
            settings = describe_settings(config, names)
            if str(settings) not in seen:
                seen.add(str(settings))
                if kind == "kernels":  # one row per pass
                    works = values.get("passes") or KERNEL_ROWS
                    yield from (Case(kind, config, settings | {"work": work}) for work in works)
                else:
                    yield Case(kind, config, settings)


def _check_training(config: Config, path: str, iterations: int) -> None:
    if config.train.objective != "score_distillation":
        raise UserError(f"{path} trains {config.train.objective or 'nothing'}; only score distillation is measured")
    if iterations < config.distill.generator_every:
        raise UserError(f"--iterations must be at least distill.generator_every={config.distill.generator_every}")


def option_overrides(name: str, value: str | None) -> list[str]:
    """Return the `section.key=value` arguments that set an option to a value; none if `value` is None.

    Raises:
        UserError: for a malformed `size`.
    """
    if value is None:
        return []
    if name == "size":
        height, _, width = value.partition("x")
        if not (height.isdigit() and width.isdigit()):
            raise UserError(f"--size {value}: give HEIGHTxWIDTH in pixels, such as 480x832")
        return [f"video.height={height}", f"video.width={width}"]
    value = {"on": "true", "off": "false"}.get(value, value)
    return [f"{OPTIONS[name].key}={value}"]


def describe_settings(config: Config, names: Sequence[str]) -> dict[str, str]:
    """Return the value of each option in a configuration, as on the command line."""

    def option_value(name: str) -> str:
        if name == "size":
            return f"{config.video.height}x{config.video.width}"
        section, key = OPTIONS[name].key.split(".")
        value: Any = getattr(getattr(config, section), key)
        return ("on" if value else "off") if isinstance(value, bool) else str(value)

    return {name: option_value(name) for name in names}
