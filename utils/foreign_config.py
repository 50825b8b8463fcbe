"""Translates YAML files of HiAR, Self-Forcing, CausVid and LongLive into this repository's keys.

Their files are flat. utils/foreign_keys.py lists each key with its name and value here. Every key is translated, or
listed as having no effect here, or an error: none is dropped silently.
"""

import difflib
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from omegaconf import DictConfig, OmegaConf

from utils.config_files import read_yaml_layers
from utils.distributed import rank, world_size
from utils.errors import UserError
from utils.foreign_keys import (
    LOSS_FRAMES,
    NO_EFFECT,
    NOT_TRAINABLE,
    TABLE,
    TRAINING_ONLY,
    Flag,
    Only,
    Unsupported,
    Value,
    flatten,
    ode_pair_sigmas,
    shifted,
)

DEFAULT_FILE = "default_config.yaml"
"""HiAR and Self-Forcing merge each file over the file of this name in the same folder."""
_LONGLIVE_2 = {"infra", "checkpoints", "algorithm", "training", "inference", "evaluation", "logging"}
_FULL_SHIFT = 8.0  # of the public code's scheduler, for files without a shift
_CHANNELS = 16  # of Wan2.1's latents

_DEFAULT = "(default of the original)"


@dataclass
class Translation:
    """A translated file."""

    values: dict[str, dict[str, Value]] = field(default_factory=dict)  # by section
    flags: dict[str, Value] = field(default_factory=dict)  # command-line flags
    lines: list[str] = field(default_factory=list)  # "theirs -> ours"
    no_effect: list[str] = field(default_factory=list)
    not_trainable: list[str] = field(default_factory=list)  # why training cannot honour the file

    def __str__(self) -> str:
        lines = [f"  {line}" for line in self.lines]
        if self.no_effect:
            lines.append(f"  no effect here: {', '.join(self.no_effect)}")
        lines += [f"  inference only: {reason}" for reason in self.not_trainable]
        return "\n".join(lines)

    def show(self, path: str) -> None:
        """Print the translation to stderr, on the first rank."""
        if rank() == 0:
            print(f"{path} is translated (scripts/convert_config.py writes it to a file):\n{self}", file=sys.stderr)


def translate_file(
    path: str, content: DictConfig, our_keys: Sequence[str], for_training: bool = False
) -> Translation | None:
    """Translate a file of the public code, merged over a default_config.yaml beside it; return None for our own files.

    Args:
        content: of the file.
        our_keys, for_training: see `translate`.

    Raises:
        UserError: see `translate`.
    """
    plain: Any = OmegaConf.to_container(content, resolve=False)
    if not is_foreign(plain, [key.partition(".")[0] for key in our_keys]):
        return None
    folder, name = os.path.split(path)
    default = os.path.join(folder, DEFAULT_FILE)
    merged = name != DEFAULT_FILE and os.path.isfile(default)
    stated = set(flatten(plain))
    if merged:
        plain = OmegaConf.to_container(OmegaConf.merge(*read_yaml_layers(default), content), resolve=False)
    result = translate(path, plain, our_keys, for_training, stated)
    if merged:
        result.lines.insert(0, f"merged over {default}")
    return result


def is_foreign(values: Mapping[str, Value], sections: Sequence[str]) -> bool:
    """Return whether the keys of a YAML file are those of the public code. `sections` are the names of ours."""
    if _is_longlive_2(values):
        return True
    return not set(sections) & values.keys() and any(key in TABLE for key in flatten(values))


def translate(
    path: str,
    values: Mapping[str, Value],
    our_keys: Sequence[str],
    for_training: bool,
    stated: Collection[str] | None = None,
) -> Translation:
    """Translate the content of a file of the public code.

    Args:
        path: the file, for messages.
        values: its content, merged over default_config.yaml.
        our_keys: all keys of our schema, as section.key.
        for_training: the file must be trainable; otherwise what training cannot honour is only listed.
        stated: keys of the file itself; None: all. They win over the others, which are those of default_config.yaml.

    Raises:
        UserError: with all unknown keys and all values that cannot be honoured.
    """
    if _is_longlive_2(values):
        raise UserError(
            f"{path} is a file of LongLive 2: its base Wan2.2-TI2V-5B (48 latent channels, another VAE) is not "
            "supported; configs/ has files for Wan2.1"
        )
    translator = _Translator(flatten(values), our_keys, stated)
    result = translator.run()
    if for_training:
        translator.errors += result.not_trainable
    if translator.errors:
        raise UserError(f"in {path}: " + "; ".join(translator.errors))
    return result


def _is_longlive_2(values: Mapping[str, Value]) -> bool:
    return any(isinstance(values.get(key), Mapping) for key in _LONGLIVE_2)


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


class _Translator:
    """Translates one flat file, and collects all its errors."""

    def __init__(self, theirs: dict[str, Value], our_keys: Sequence[str], stated: Collection[str] | None):
        self.theirs, self.our_keys = theirs, our_keys
        self.assumed = set() if stated is None else theirs.keys() - set(stated)  # keys of default_config.yaml
        self.errors: list[str] = []
        self.result = Translation()
        self._source: dict[str, str] = {}  # of each of our keys: the first key of theirs that set it
        self._untrainable: list[str] = []

    def run(self) -> Translation:
        for key, value in self.theirs.items():
            if value is not None:  # null states nothing
                self._translate(key, value)
        for translate_several in (
            *(self._attention, self._steps, self._shape, self._rollout_length, self._batch, self._betas),
            *(self._forward_kl, self._data, self._lora, self._implied),
        ):
            try:
                translate_several()
            except (TypeError, ValueError) as error:
                self.errors.append(str(error))
        return self.result

    def _translate(self, key: str, value: Value) -> None:
        if key not in TABLE:
            self._unlisted(key, value)
            return
        rule = TABLE[key]
        if isinstance(rule, Only):
            if value == rule.value:
                self.result.no_effect.append(key)
            elif not self._is_idle(key):
                self.errors.append(f"{key} {value} cannot be honoured, only {rule.value}: {rule.reason}")
        elif isinstance(rule, Flag):
            self.result.flags[rule.name] = value
            self.result.lines.append(f"{key} {value} -> --{rule.name} {value}")
        elif rule is not None and not self._is_idle(key):
            ours, convert = rule
            try:
                converted = convert(value)
            except (Unsupported, TypeError, ValueError) as error:
                self.errors.append(f"{key} {value} cannot be honoured ({error})")
                return
            for name in ours.split():
                self._set(name, converted, key)

    def _unlisted(self, key: str, value: Value) -> None:
        if _matches(key, NO_EFFECT):
            self.result.no_effect.append(key)
        elif _matches(key, TRAINING_ONLY):
            whole_clip = key in LOSS_FRAMES and value == self.theirs.get("num_training_frames")
            (self.result.no_effect if value is False or whole_clip else self._untrainable).append(key)
        else:
            self.errors.append(f"unknown key {key}{self._advice(key)}")

    def _advice(self, key: str) -> str:
        """Return our name of an unknown key, or the known key that it resembles."""
        name = key.rpartition(".")[2]
        ours = [known for known in self.our_keys if known.partition(".")[2] == name]
        if ours:
            return f" (here: {' or '.join(ours)})"
        close = difflib.get_close_matches(key, TABLE, 1)
        return f" (did you mean {close[0]}?)" if close else ""

    def _is_idle(self, key: str) -> bool:
        """Return whether another key switches this one off, and list it."""
        idle = (key.startswith("pd_") and not self.theirs.get("pd_enabled")) or (
            key == "guidance_scale" and self.theirs.get("real_guidance_scale") is not None
        )
        if idle:
            self.result.no_effect.append(key)
        return idle

    def _set(self, name: str, value: Value, *sources: str) -> None:
        """Set one of our keys, stated by keys of theirs; a second, different value is an error."""
        source = " and ".join(sources)
        section, key = name.split(".")
        before = self.result.values.setdefault(section, {})
        if key in before and before[key] != value and self._source[name] in self.assumed:
            self._drop(name)
        if before.setdefault(key, value) != value:
            if self.assumed.issuperset(sources):
                self.result.no_effect += sources
                return
            self.errors.append(f"{self._source[name]} and {source} disagree: {name} would be {before[key]} and {value}")
            return
        self._source.setdefault(name, source)
        stated = [f"{key} {self.theirs[key]}" if key in self.theirs else key for key in sources]
        self.result.lines.append(f"{', '.join(stated)} -> {name} {value}")

    def _drop(self, name: str) -> None:
        """Remove the value of one of our keys that default_config.yaml gave."""
        section, key = name.split(".")
        value, source = self.result.values[section].pop(key), self._source.pop(name)
        self.result.lines.remove(f"{source} {self.theirs[source]} -> {name} {value}")
        self.result.no_effect.append(source)

    def _get(self, section: str, key: str, default: Value = None) -> Value:
        return self.result.values.get(section, {}).get(key, default)

    # ---- Keys that depend on each other ----

    def _attention(self) -> None:
        """Translate the generator's attention: a bidirectional generator has a schedule of its own."""
        for key, causal in ("generator_task", "causal_video"), ("causal", True):
            value = self.theirs.get(key)
            if value == causal:
                self.result.no_effect.append(key)
            elif value in ("bidirectional_video", False):
                self._set("rollout.schedule", "bidirectional", key)
            elif value is not None:
                self.errors.append(f"{key} {value} cannot be honoured (choose from causal_video, bidirectional_video)")

    def _steps(self) -> None:
        """Translate the list of steps. Without warping, the public code uses the nearest of 1000 shifted levels.

        ODE regression reads such levels, which are those of the teacher's trajectories. A trailing 0 is kept: it means
        clean blocks.
        """
        steps, shift = self.theirs.get("denoising_step_list"), self._get("rollout", "timestep_shift")
        if shift is None:
            shift = self._get("distill", "timestep_shift", _FULL_SHIFT)
            self._set(
                "rollout.timestep_shift", shift, "timestep_shift" if "timestep_shift" in self.theirs else _DEFAULT
            )
        if steps is None:
            return
        if not self.theirs.get("warp_denoising_step", False):
            if "warp_denoising_step" not in self.theirs:
                self._set("rollout.warp_denoising_step", False, _DEFAULT)
            grid = [1000 * shifted(i / 1000, shift) for i in range(1, 1001)]
            steps = [min(grid, key=lambda level: abs(level - step)) if step else 0 for step in steps]
            levels = [step / 1000 for step in steps]
        else:
            levels = [shifted(step / 1000, shift) for step in steps]
        if self._get("train", "objective") == "ode_regression":
            self._set("data.sigmas", [*(level for level in levels if level), 0.0], "denoising_step_list")
        self._set("rollout.denoising_step_list", [float(step) for step in steps], "denoising_step_list")

    def _shape(self) -> None:
        shape, pixel_frames = self.theirs.get("image_or_video_shape"), self.theirs.get("num_frames")
        if shape is not None:
            if len(shape) != 5 or shape[2] != _CHANNELS:
                self.errors.append(f"image_or_video_shape {shape} cannot be honoured, only [B, F, {_CHANNELS}, h, w]")
                return
            _, frames, _, height, width = shape
            for name, value in ("video.height", 8 * height), ("video.width", 8 * width), ("data.num_frames", frames):
                self._set(name, value, "image_or_video_shape")
            if self._get("video", "num_output_frames") is None:
                self._set("video.num_output_frames", frames, "image_or_video_shape")
        if pixel_frames is None:
            return
        if self._get("video", "num_output_frames") is not None:
            self.result.no_effect.append("num_frames")
        elif pixel_frames % 4 != 1:
            self.errors.append(f"num_frames {pixel_frames} cannot be honoured, only 4n + 1")
        else:
            self._set("video.num_output_frames", pixel_frames // 4 + 1, "num_frames")

    def _rollout_length(self) -> None:
        frames = self.theirs.get("num_rollout_frames") or self._get("data", "num_frames")
        if frames is not None:
            source = "num_rollout_frames" if "num_rollout_frames" in self.theirs else _DEFAULT
            self._set("distill.max_rollout_frames", frames, source)
        elif "num_rollout_frames" in self.theirs:
            self.result.no_effect.append("num_rollout_frames")

    def _batch(self) -> None:
        """Translate accumulation over this run's processes into the clips of an iteration."""
        accumulated = self.theirs.get("gradient_accumulation_steps") or 1
        if accumulated > 1:
            clips = self._get("train", "batch_size", 1) * accumulated * world_size()
            self._set("train.total_batch_size", clips, "gradient_accumulation_steps")
        elif "gradient_accumulation_steps" in self.theirs:
            self.result.no_effect.append("gradient_accumulation_steps")

    def _betas(self) -> None:
        beta1, beta2 = self.theirs.get("beta1"), self.theirs.get("beta2")
        if beta1 is not None or beta2 is not None:
            betas = [0.9 if beta1 is None else float(beta1), 0.999 if beta2 is None else float(beta2)]
            self._set("train.betas", betas, *(name for name in ("beta1", "beta2") if name in self.theirs))
        for name in ("beta1", "beta2"):
            critic = self.theirs.get(f"{name}_critic")
            if critic is None:
                continue
            if critic == self.theirs.get(name):
                self.result.no_effect.append(f"{name}_critic")
            else:
                self.errors.append(f"{name}_critic {critic} cannot be honoured, only that of the generator: {name}")

    def _forward_kl(self) -> None:
        names = ("pd_teacher_timestep_shift", "pd_teacher_num_inference_steps", "pd_teacher_save_indices")
        stated = [name for name in ("pd_enabled", *names) if name in self.theirs]
        if not self.theirs.get("pd_enabled"):
            self.result.no_effect += stated[1:]
            if self._get("train", "objective"):
                self._set("distill.forward_kl_weight", 0.0, "pd_enabled" if "pd_enabled" in self.theirs else _DEFAULT)
            return
        shift, steps, indices = (self.theirs.get(name) for name in names)
        if isinstance(indices, str | int):
            indices = [int(index) for index in str(indices).split(",")]
        levels = ode_pair_sigmas(steps or 48, shift or 8.0, indices or [0, 12, 24, 36, -1])
        self._set("data.sigmas", levels, *stated)
        assumed = {"forward_kl_form": "endpoint", "forward_kl_mode": "block_causal", "forward_kl_weight": 1.0}
        for name, value in assumed.items():
            if self._get("distill", name) is None:
                self._set(f"distill.{name}", value, _DEFAULT)

    def _data(self) -> None:
        """Translate data_path: clips, prompts of training, or those of inference."""
        path, objective = self.theirs.get("data_path"), self._get("train", "objective")
        if path is None:
            return
        if objective is None:
            self.result.flags["data_path"] = path
            self.result.lines.append(f"data_path {path} -> --data_path {path}")
        elif objective == "ode_regression" or self.theirs.get("backward_simulation") is False:
            self._set("data.path", path, "data_path")
        else:
            self._set("data.prompts", path, "data_path")

    def _lora(self) -> None:
        rank, alpha = self.theirs.get("adapter.rank"), self.theirs.get("adapter.alpha")
        if rank and alpha:
            self._set("model.lora_scale", alpha / rank, "adapter.rank", "adapter.alpha")
        elif rank or alpha:
            self.errors.append("adapter needs both rank and alpha")
        if "adapter.type" in self.theirs and self._get("train", "objective"):
            self._untrainable.append("adapter")
        if self._untrainable:
            self.result.not_trainable.append(f"{', '.join(self._untrainable)}: {NOT_TRAINABLE}")

    def _implied(self) -> None:
        """Set the keys that the public code fixes or assumes, where our defaults differ."""
        hybrid = "hybrid_block0" in (self.theirs.get("inference_method"), self.theirs.get("denoising_order"))
        if hybrid and self._get("rollout", "leading_blocks") is None:
            self._set("rollout.leading_blocks", 1, _DEFAULT)
        if self._get("rollout", "schedule") is None:
            self._set("rollout.schedule", "block_first", _DEFAULT)
        if self._get("rollout", "block_frames") is None:
            self._set("rollout.block_frames", 1, _DEFAULT)
        if self._get("train", "objective") is None:
            return
        fixed = {"train.grad_clip": 10.0, "train.warmup": 0, "train.decay": "constant"}
        assumed = {"train.ema_decay": 0.0, "train.betas": [0.9, 0.999], "train.batch_size": 1}
        rate = self._get("train", "learning_rate")
        if rate is not None:
            assumed["distill.critic_learning_rate"] = rate
        for name, value in (fixed | assumed).items():
            if self._get(*name.split(".")) is None:
                self._set(name, value, _DEFAULT)
        if self.result.not_trainable:
            del self.result.values["train"]["objective"]  # train.py refuses the converted file, too
