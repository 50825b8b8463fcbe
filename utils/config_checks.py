"""Checks of a configuration beyond types: ranges, and keys that depend on each other."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:  # utils.config imports this module
    from utils.config import Config, RolloutConfig, TrainConfig

_POSITIVE = (
    *("rollout.block_frames", "rollout.timestep_shift", "video.height", "video.width", "video.fps"),
    *("video.num_output_frames", "model.text_length", "teacher.num_inference_steps", "teacher.timestep_shift"),
    *("data.num_frames", "train.timestep_shift", "train.max_iterations", "train.batch_size", "train.log_every"),
    *("train.checkpoint_every", "train.keep_checkpoints", "distill.generator_every", "distill.timestep_shift"),
    *("distill.forward_kl_steps", "distill.max_rollout_frames", "rollout.num_rollouts", "rollout.overlap_frames"),
)
_NOT_NEGATIVE = (
    *("rollout.leading_blocks", "rollout.leading_steps", "rollout.window", "rollout.sink", "runtime.seed"),
    *("rollout.num_steps", "rollout.write_window"),
    *("train.learning_rate", "train.muon_learning_rate", "train.weight_decay", "train.grad_clip", "train.warmup"),
    *("train.ema_start", "train.total_batch_size", "train.first_frame_weight", "train.kl_weight"),
    *("train.sample_every", "train.snapshot_every", "runtime.threads", "model.decode_frames"),
    *("distill.critic_learning_rate", "distill.critic_warmup", "distill.forward_kl_weight"),
)
MAX_VIDEOS = 1_000_000
"""Largest number of videos of a run."""
MAX_FRAMES = 1_000_000
"""Largest number of latent frames of a video: 69 hours."""
_LIMITS = {
    **dict.fromkeys(("video.num_output_frames", "data.num_frames", "distill.max_rollout_frames"), MAX_FRAMES),
    **dict.fromkeys(("rollout.block_frames", "train.batch_size", "train.keep_checkpoints"), 1_000_000),
    **dict.fromkeys(("video.height", "video.width"), 16_384),  # of H.264
    **dict.fromkeys(("rollout.timestep_shift", "train.timestep_shift", "distill.timestep_shift"), 1000),
    "teacher.timestep_shift": 1000,
    "teacher.num_inference_steps": 10_000,
    "rollout.num_steps": 10_000,
    "rollout.num_rollouts": 1_000_000,
    "model.text_length": 8192,
    "runtime.threads": 1024,
    "video.fps": 999,
}
"""Largest values. Beyond them a run would allocate or list without an end, or divide by zero."""
FRAME_SIZES = (64, 96)
"""Frame sizes of the miniature, the keys of `shapes.look.STYLES`."""
_MIN_SHIFT = 1e-3
_MAX_LIST = 1000
_FINITE = ("model.lora_scale", "rollout.guidance_scale", "teacher.guidance_scale", "distill.guidance_scale")


def check_config(config: "Config") -> None:
    """Check the ranges of all values, and the keys that depend on each other.

    Raises:
        UserError: for the first invalid value. The message names the key and the valid values.
    """
    for keys, is_valid, description in (
        (_POSITIVE, lambda value: 0 < value < math.inf, "positive"),
        (_NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "0 or more"),
        (_FINITE, math.isfinite, "a finite number"),
    ):
        for key in keys:
            section, name = key.split(".")
            value = getattr(getattr(config, section), name)
            if not is_valid(value):  # NaN included
                raise UserError(f"{key} must be {description}, not {value}")
    for key, limit in _LIMITS.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value > limit:
            raise UserError(f"{key} must be at most {limit}, not {value}")
        if name == "timestep_shift" and value < _MIN_SHIFT:
            raise UserError(f"{key} must be at least {_MIN_SHIFT}, not {value}")
    _check_lists(config)
    _check_rollout(config.rollout)
    _check_repeated_rollouts(config)
    _check_train(config.train)
    _check_distill(config)
    if config.model.decoder == "tiny" and not config.model.tiny_decoder:
        raise UserError("model.decoder=tiny needs its weights: set model.tiny_decoder to a file such as taew2_1.pth")
    if config.video.source and config.rollout.num_rollouts > 1:
        raise UserError(
            "video-to-video makes one rollout of any length: leave out --num_rollout (rollout.num_rollouts)"
        )
    if config.rollout.strength < 1 and not config.video.source:
        raise UserError("rollout.strength below 1 needs a clip to start from: --video CLIP --strength S")
    if not 0 <= config.video.crf <= 51:
        raise UserError(f"video.crf must be from 0 (lossless) to 51, not {config.video.crf}")
    if config.data.frame_size not in FRAME_SIZES:
        raise UserError(f"data.frame_size must be {' or '.join(map(str, FRAME_SIZES))}, not {config.data.frame_size}")
    sigmas = config.data.sigmas
    if sigmas and not are_noise_levels(sigmas):
        raise UserError(f"data.sigmas must fall from at most 1 to at least 0, not {sigmas}")


def _check_lists(config: "Config") -> None:
    """Check the elements of lists, because OmegaConf accepts a list in the place of a number."""
    for section in fields(config):
        values = getattr(config, section.name)
        for key in fields(values):
            content = getattr(values, key.name)
            if isinstance(content, list) and not all(map(is_number, content)):
                raise UserError(f"{section.name}.{key.name} must be a list of numbers, not {content}")
            if isinstance(content, list) and len(content) > _MAX_LIST:
                raise UserError(f"{section.name}.{key.name} must hold at most {_MAX_LIST} numbers, not {len(content)}")


def is_number(value: object) -> bool:
    """Return whether a value is an int or a float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def are_noise_levels(sigmas: Sequence[float]) -> bool:
    """Return whether `sigmas` (not empty) are numbers, strictly decreasing, and lie in [0, 1]."""
    return all(map(is_number, sigmas)) and _is_decreasing(sigmas) and sigmas[0] <= 1 and sigmas[-1] >= 0


def _is_decreasing(values: Sequence[float]) -> bool:
    """Return whether `values` are finite and strictly decreasing."""
    return all(a > b for a, b in itertools.pairwise(values)) and all(map(math.isfinite, values))


def _noisy_timesteps(rollout: "RolloutConfig") -> list[float]:
    """Return denoising_step_list without the optional trailing 0."""
    timesteps = rollout.denoising_step_list
    return timesteps[:-1] if timesteps and timesteps[-1] == 0 else timesteps


def _num_steps(rollout: "RolloutConfig") -> int:
    return rollout.num_steps or len(_noisy_timesteps(rollout))


def _check_rollout(rollout: "RolloutConfig") -> None:
    timesteps = _noisy_timesteps(rollout)
    if not timesteps or not _is_decreasing([*timesteps, 0]) or not timesteps[0] <= 1000:
        raise UserError(
            f"rollout.denoising_step_list must fall from at most 1000 towards 0, not {rollout.denoising_step_list}"
        )
    if not 0 <= rollout.context_noise < 1:
        raise UserError(f"rollout.context_noise must be a sigma from 0 to below 1, not {rollout.context_noise}")
    num_steps = _num_steps(rollout)
    if rollout.leading_steps > num_steps:
        raise UserError(f"rollout.leading_steps must be at most {num_steps} steps, not {rollout.leading_steps}")
    if not 0 < rollout.strength <= 1:  # NaN included
        raise UserError(f"rollout.strength must be above 0 and at most 1, not {rollout.strength}")
    if rollout.moving_sink and not rollout.sink:
        raise UserError("rollout.moving_sink needs a sink: set rollout.sink to its latent frames")
    causal = rollout.schedule != "bidirectional"
    if causal and rollout.window and rollout.window < rollout.block_frames + rollout.sink:
        raise UserError(
            f"rollout.window must be at least a block ({rollout.block_frames} frames) plus the sink "
            f"({rollout.sink} frames), or 0 for the whole video, not {rollout.window}"
        )


def _check_repeated_rollouts(config: "Config") -> None:
    rollout, frames = config.rollout, config.video.num_output_frames
    if rollout.num_rollouts == 1:
        return
    if rollout.schedule == "bidirectional":
        raise UserError(
            "rollout.num_rollouts above 1 needs a causal generator, because each rollout continues the previous one; "
            "set rollout.schedule=block_first or timestep_first"
        )
    if rollout.overlap_frames >= frames:
        raise UserError(
            f"rollout.overlap_frames must be below the {frames} latent frames of a rollout "
            f"(video.num_output_frames), not {rollout.overlap_frames}"
        )
    total = video_frames(config)
    if total > _LIMITS["video.num_output_frames"]:
        raise UserError(
            f"rollout.num_rollouts={rollout.num_rollouts} would make {total} latent frames; at most "
            f"{_LIMITS['video.num_output_frames']} are possible"
        )


def _check_train(train: "TrainConfig") -> None:
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise UserError(f"train.betas must be two numbers from 0 to below 1, not {train.betas}")
    if not 0 <= train.ema_decay < 1:
        raise UserError(f"train.ema_decay must be from 0 to below 1, not {train.ema_decay}")
    if not 0 <= train.text_dropout <= 1:
        raise UserError(f"train.text_dropout must be from 0 to 1, not {train.text_dropout}")
    for key, limit in ("stop_grad_norm", train.stop_grad_norm), ("stop_loss_growth", train.stop_loss_growth):
        if not limit > 0:
            raise UserError(f"train.{key} must be positive, not {limit}; use .inf for no limit")
    needs_lengths = train.objective in ("vae_reconstruction", "tiny_decoder") and not train.clip_frames
    if needs_lengths or any(frames < 1 or frames % 4 != 1 for frames in train.clip_frames):
        raise UserError(f"train.clip_frames must be numbers of the form 4n+1, not {train.clip_frames}")
    if train.dtype == "float16":
        raise UserError("train.dtype=float16 is too coarse for the gradients of these losses; use bfloat16 or float32")


def _check_distill(config: "Config") -> None:
    distill, num_steps = config.distill, _num_steps(config.rollout)
    if not 0 <= distill.min_exit_step < num_steps:
        raise UserError(f"distill.min_exit_step must be 0 to {num_steps - 1}, not {distill.min_exit_step}")
    if distill.forward_kl_steps > num_steps:
        raise UserError(f"distill.forward_kl_steps must be 1 to {num_steps}, not {distill.forward_kl_steps}")
    if not 0 < distill.min_timestep < distill.max_timestep <= 1000:
        raise UserError(
            "distill.min_timestep and distill.max_timestep must rise from above 0 to at most 1000, not "
            f"{distill.min_timestep} and {distill.max_timestep}"
        )


def check_training(config: "Config") -> None:
    """Check the keys that a training run cannot honour. Inference with the same file does not read them.

    Raises:
        UserError: for the first such key.
    """
    distill = config.distill
    if config.video.source:
        raise UserError("video.source and rollout.strength are for video-to-video, not for training: leave them out")
    for key, off in ("write_window", 0), ("moving_sink", False), ("prompt_switch", "keep"), ("cache_dtype", "auto"):
        if getattr(config.rollout, key) != off:
            raise UserError(f"rollout.{key} is for inference, not for training: leave it out")
    if config.train.objective != "score_distillation":
        return
    if config.rollout.guidance_scale != 1:
        raise UserError(
            "rollout.guidance_scale must be 1 for train.objective=score_distillation: the generator learns the "
            "teacher's guidance, distill.guidance_scale"
        )
    if distill.max_rollout_frames < config.data.num_frames:
        raise UserError(
            f"distill.max_rollout_frames must be at least data.num_frames={config.data.num_frames}, not "
            f"{distill.max_rollout_frames}"
        )
    causal_rollouts = distill.backward_simulation and config.rollout.schedule != "bidirectional"
    if distill.history_gradient != "none" and not causal_rollouts:
        raise UserError(
            f"distill.history_gradient={distill.history_gradient} needs rollouts of a causal schedule: only they have "
            "context; leave it out"
        )
    _check_data_latents(config)
    _check_bidirectional(config)


def _check_data_latents(config: "Config") -> None:
    """Check the keys that score distillation on data latents cannot honour."""
    distill = config.distill
    if distill.backward_simulation:
        return
    if distill.max_rollout_frames > config.data.num_frames:
        raise UserError(
            "distill.backward_simulation=false has no rollouts: distill.max_rollout_frames must be "
            f"data.num_frames={config.data.num_frames}, not {distill.max_rollout_frames}"
        )
    if distill.forward_kl_weight > 0:
        raise UserError(
            "distill.backward_simulation=false reads clips from data.path, and the forward KL would read ODE pairs "
            "from it: set distill.forward_kl_weight=0"
        )
    if config.data.prompts:
        raise UserError(
            "distill.backward_simulation=false uses the captions of the clips in data.path: set data.prompts= (empty)"
        )


def _check_bidirectional(config: "Config") -> None:
    """Check the keys that score distillation of a bidirectional generator cannot honour."""
    distill = config.distill
    if config.rollout.schedule != "bidirectional":
        return
    if distill.max_rollout_frames > config.data.num_frames:
        raise UserError(
            "rollout.schedule=bidirectional generates whole clips: distill.max_rollout_frames must be "
            f"data.num_frames={config.data.num_frames}, not {distill.max_rollout_frames}"
        )
    if distill.forward_kl_weight > 0 and distill.forward_kl_mode != "bidirectional":
        raise UserError(
            f"distill.forward_kl_mode={distill.forward_kl_mode} needs a causal generator; with "
            "rollout.schedule=bidirectional choose bidirectional"
        )


def video_frames(config: "Config") -> int:
    """Return the latent frames of a whole video: those of all its rollouts, with the overlaps counted once."""
    frames, rollout = config.video.num_output_frames, config.rollout
    return frames + (rollout.num_rollouts - 1) * (frames - rollout.overlap_frames)


def num_micro_batches(train: "TrainConfig", num_ranks: int) -> int:
    """Return the number of micro-batches of `batch_size` clips per iteration, over all ranks.

    Raises:
        UserError: if the micro-batches cannot be divided equally among the ranks.
    """
    total = train.total_batch_size or train.batch_size * num_ranks
    if total % (train.batch_size * num_ranks):
        raise UserError(
            f"train.total_batch_size={total} must be a multiple of train.batch_size={train.batch_size} times the "
            f"number of processes, {num_ranks}"
        )
    return total // train.batch_size
