"""Keys in the YAML files of HiAR, Self-Forcing, CausVid and LongLive, with their names and values here.

`TABLE` is the only list; utils/foreign_config.py applies it, and docs/migrate.md explains it to users.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MODEL_FOLDER = "wan_models"
_CAUSVID_NAMES = {"wan", "causal_wan"}  # CausVid's names for Wan2.1-T2V-1.3B

Value = Any
Convert = Callable[[Value], Value]


class Unsupported(Exception):
    """A value that this repository cannot honour; the message says why."""


@dataclass(frozen=True)
class Only:
    """A key that has one possible value here."""

    value: Value
    reason: str


@dataclass(frozen=True)
class Flag:
    """A key that is a command-line flag here."""

    name: str


def model_folder(name: str) -> str:
    """Return the folder of a model: a path as it is, or a name under wan_models/."""
    if name in _CAUSVID_NAMES:
        name = "Wan2.1-T2V-1.3B"
    return name if "/" in name or os.path.isdir(name) else f"{MODEL_FOLDER}/{name}"


def _choice(**choices: Value) -> Convert:
    """Return a conversion by a table; other values are unsupported."""

    def convert(value: Value) -> Value:
        if str(value).lower() not in choices:
            raise Unsupported(f"choose from {', '.join(choices)}")
        return choices[str(value).lower()]

    return convert


def _same(value: Value) -> Value:
    return value


def _guidance(value: Value) -> float:
    """Convert g of cond + g (cond - uncond) to s of uncond + s (cond - uncond)."""
    return float(value) + 1.0


def _sigma(value: Value) -> float:
    """Convert a timestep to a sigma."""
    return float(value) / 1000


def _refuse(reason: str) -> Convert:
    """Return a conversion that refuses every value."""

    def convert(value: Value) -> Value:
        raise Unsupported(reason)

    return convert


def _window(value: Value) -> int:
    """Convert local_attn_size: -1 is the whole cache, which holds 21 frames."""
    return 21 if value == -1 else int(value)


_SCHEDULES = _choice(
    timestep_first="timestep_first",
    hybrid_block0="timestep_first",
    frame_first="block_first",
    block_first="block_first",
)
NOT_TRAINABLE = "training of this kind is not supported yet"

TABLE: dict[str, tuple[str, Convert] | Only | Flag | None] = {
    # networks
    "generator_ckpt": ("train.init model.generator", _same),
    "use_ema": ("model.use_ema", _same),
    "real_name": ("teacher.base", model_folder),
    "model_kwargs.model_name": ("model.base", model_folder),
    "model_name": ("model.base", model_folder),
    "generator_name": ("model.base", model_folder),
    "fake_name": ("model.base", model_folder),
    "lora_ckpt": ("model.lora", _same),
    "real_task_type": Only("bidirectional_video", "the teacher is bidirectional"),
    "fake_task_type": Only("bidirectional_video", "the critic is bidirectional"),
    # schedule
    "denoising_order": ("rollout.schedule", _SCHEDULES),
    "inference_method": ("rollout.schedule", _SCHEDULES),
    "distribution_loss": (
        "rollout.schedule",
        _choice(timestep_forcing_dmd="timestep_first", dmd="block_first", dmd_switch="block_first", ode="block_first"),
    ),
    "num_frame_first_blocks": ("rollout.leading_blocks", _same),
    "num_rollout": ("rollout.num_rollouts", _same),
    "num_overlap_frames": ("rollout.overlap_frames", _same),
    "always_clean_context": ("rollout.context", _choice(true="clean", false="output")),
    "warp_denoising_step": ("rollout.warp_denoising_step", _same),
    "use_ode_trajectory": ("rollout.use_ode_trajectory", _same),
    "timestep_shift": ("distill.timestep_shift", float),
    "model_kwargs.timestep_shift": ("rollout.timestep_shift", float),
    "num_frame_per_block": ("rollout.block_frames", _same),
    "model_kwargs.num_frame_per_block": ("rollout.block_frames", _same),
    "local_attn_size": ("rollout.window", _window),
    "model_kwargs.local_attn_size": ("rollout.window", _window),
    "sink_size": ("rollout.sink", _same),
    "model_kwargs.sink_size": ("rollout.sink", _same),
    "model_kwargs.use_infinite_attention": Only(False, "the positions of the sink do not move"),
    "context_noise": ("rollout.context_noise", _sigma),
    "independent_first_frame": ("rollout.independent_first_frame", _same),
    "switch_frame_indices": (
        "rollout.schedule",
        _refuse("remove this key, and name the prompts by --prompt_track FILE, see docs/prompts.md"),
    ),
    # sizes
    "num_training_frames": ("data.num_frames", _same),
    "height": ("video.height", _same),
    "width": ("video.width", _same),
    "num_output_frames": ("video.num_output_frames", _same),
    # training
    "trainer": ("train.objective", _choice(score_distillation="score_distillation", ode="ode_regression")),
    "distillation_loss": ("train.objective", _choice(dmd="score_distillation", ode="ode_regression")),
    "lr": ("train.learning_rate", float),
    "lr_critic": ("distill.critic_learning_rate", float),
    "weight_decay": ("train.weight_decay", float),
    "batch_size": ("train.batch_size", _same),
    "total_batch_size": ("train.total_batch_size", _same),
    "ema_weight": ("train.ema_decay", float),
    "ema_start_step": ("train.ema_start", _same),
    "max_iters": ("train.max_iterations", _same),
    "log_iters": ("train.checkpoint_every", _same),
    "gradient_checkpointing": ("train.activation_checkpointing", _same),
    "mixed_precision": ("train.dtype", _choice(true="bfloat16", false="float32")),
    "sharding_strategy": ("train.sharding", _choice(hybrid_full="hybrid", full="shard", no_shard="replicate")),
    "guidance_scale": ("distill.guidance_scale", _guidance),
    "real_guidance_scale": ("distill.guidance_scale", _guidance),
    "fake_guidance_scale": Only(0.0, "the critic has no guidance"),
    "dfake_gen_update_ratio": ("distill.generator_every", _same),
    "min_exit_step": ("distill.min_exit_step", _same),
    "seed": ("runtime.seed", _same),
    "negative_prompt": ("teacher.negative_prompt", _same),
    # forward KL ("pd")
    "pd_loss_weight": ("distill.forward_kl_weight", float),
    "pd_num_steps": ("distill.forward_kl_steps", _same),
    "pd_data_path": ("data.path", _same),
    "pd_loss_type": ("distill.forward_kl_form", _choice(x0="x0", velocity="flow", euler_endpoint="endpoint")),
    "pd_compute_mode": ("distill.forward_kl_mode", _choice(single_forward="block_causal", rollout="rollout")),
    "pd_x0_target_mode": Only("pred_x0", "the target is the chord between two points of the teacher"),
    "backward_simulation": ("distill.backward_simulation", _choice(true=True, false=False)),
    # handled by the functions of `_Translator`, which need several keys at once
    "generator_task": None,
    "causal": None,
    "data_path": None,
    "denoising_step_list": None,
    "image_or_video_shape": None,
    "num_frames": None,
    "num_rollout_frames": None,
    "gradient_accumulation_steps": None,
    "beta1": None,
    "beta2": None,
    "beta1_critic": None,
    "beta2_critic": None,
    "pd_enabled": None,
    "pd_teacher_timestep_shift": None,
    "pd_teacher_num_inference_steps": None,
    "pd_teacher_save_indices": None,
    "adapter.type": Only("lora", "other adapters are not supported"),
    "adapter.rank": None,
    "adapter.alpha": None,
    # command-line flags
    "num_samples": Flag("num_samples"),
    "save_with_index": Flag("save_with_index"),
    "output_folder": Flag("output_folder"),
    "output_path": Flag("logdir"),
    # one possible value
    "num_train_timestep": Only(1000, "timesteps are 1000 sigma"),
    "denoising_loss_type": Only("flow", "the network predicts the flow"),
    "i2v": Only(False, "--image conditions any generator"),
    "ts_schedule": Only(False, "noise levels do not depend on the exit step"),
    "same_step_across_blocks": Only(True, "all blocks have the same exit step"),
    "last_step_only": Only(False, "the exit step is random"),
    "load_raw_video": Only(False, "training reads encoded clips"),
    "ckpt_step": Only(0, "name the checkpoint by --checkpoint_path"),
    "inference_iter": Only(-1, "all prompts of the file are used"),
    "reference_images": Only([], "--image gives the first frame of a video"),
}
NO_EFFECT = (
    *("wandb_*", "*_fsdp_wrap_strategy", "*_grad.*", "gc_interval", "discriminator_lr_multiplier"),
    *("vis_*", "val_*", "sid_alpha", "max_checkpoints", "use_one_logger"),
    *("prompt_name", "prompt_path", "eval_first_n"),  # in default_config.yaml, for an evaluation that is not published
    "global_sink",  # LongLive reads it where prompts change
    *("adapter.dropout", "adapter.dtype", "adapter.verbose", "adapter.apply_to_critic"),
)
"""Keys without a counterpart, as patterns."""
TRAINING_ONLY = ("streaming_*", "switch_*", "train_first_chunk", "slice_last_frames", "min_num_training_frames")
"""Keys of LongLive's training that inference does not read, as patterns."""
LOSS_FRAMES = ("slice_last_frames", "min_num_training_frames")
"""Those of them that training honours if they equal num_training_frames."""


def shifted(u: float, shift: float) -> float:
    """Return the noise level of an unshifted level u."""
    return shift * u / (1 + (shift - 1) * u)


def ode_pair_sigmas(num_steps: int, shift: float, indices: Sequence[int]) -> list[float]:
    """Return the noise levels of the saved points of ODE pairs, noisy to clean."""
    sigmas = [shifted(1 - i / num_steps, shift) for i in range(num_steps)] + [0.0]
    return [sigmas[index] for index in indices]


def flatten(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return nested keys as `outer.inner`."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": content for inner, content in flatten(value).items()})
        else:
            flat[str(key)] = value
    return flat
