"""Generates ODE pairs: deterministic trajectories of the teacher, saved at a few noise levels."""

import glob
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from model.flow import solver_sigmas
from model.weights import TEXT_ENCODER_FILES, TRANSFORMER_FILES
from pipeline.build import latent_size, rollout_sigmas
from pipeline.teacher import Teacher, sample_euler
from trainer.datasets.ode_pairs import check_pair_settings, load_pair, pair_file, write_ode_pair, write_pair_settings
from utils.config import Config, DType, VideoConfig
from utils.config_checks import are_noise_levels
from utils.device import DTYPES, pick_device
from utils.distributed import rank, world_size
from utils.errors import UserError
from utils.files import fingerprint
from utils.prompts import Prompt


def generate_ode_pairs(
    config: Config,
    prompts: Sequence[Prompt],
    folder: Path,
    save_indices: Sequence[int] = (),
    dtype: DType = "float32",
    batch_size: int = 1,
    channels: int | None = None,
) -> None:
    """Write one ODE pair per prompt to `folder`; ranks share the prompts, and existing pairs are kept.

    A pair is a function of (seed, prompt index) alone: Euler steps with guidance by `config.teacher`.

    Args:
        save_indices: points of the solver to save, from 0 to num_inference_steps; negative indices count from the end.
            Empty: the points that the configured loss reads.
        dtype: type of the saved latents.
        channels: expected number of latent channels; None accepts any.

    Raises:
        UserError: if an index is out of range, no training could read these points, or the folder holds pairs of other
            settings or prompts.
    """
    sigmas = solver_sigmas(config.teacher.num_inference_steps, config.teacher.timestep_shift)
    num_points = len(sigmas)
    saved = list(save_indices) or nearest_indices(sigmas, loss_sigmas(config))
    if any(not -num_points <= index < num_points for index in saved):
        raise UserError(f"--save_indices {saved} must be among the {num_points} points 0..{num_points - 1}, -1")
    levels = [sigmas[index] for index in saved]
    if len(levels) < 2 or not are_noise_levels(levels):
        raise UserError(
            f"--save_indices {saved} fit no training: name at least two points in rising order, such as 0 12 24 36 -1"
        )
    settings = pair_settings(config, levels, dtype)
    check_pair_settings(folder, settings)
    own = prompts[rank() :: world_size()]
    existing = [prompt for prompt in own if pair_file(folder, prompt.index).exists()]
    missing = [prompt for prompt in own if not pair_file(folder, prompt.index).exists()]
    if existing:
        _check_existing_pairs(folder, existing, settings)
        print(f"{len(existing)} pairs exist already and are kept")
    if not missing:
        write_pair_settings(folder, settings)
        return

    # `teacher.base` names the teacher of the DMD loss (14B in configs/hiar.yaml); pairs are made with `model.base`.
    pair_config = replace(config, teacher=replace(config.teacher, base=""))
    teacher = Teacher.load(pair_config, pick_device(config.runtime.device, config.runtime.threads))
    teacher_channels = teacher.net.config.in_channels
    if channels not in (None, teacher_channels):
        raise UserError(f"--latent_shape has {channels} channels, but the teacher's latents have {teacher_channels}")
    write_pair_settings(folder, settings)
    _write_missing_pairs(folder, teacher, missing, sigmas, saved, dtype, batch_size)


def _write_missing_pairs(
    folder: Path,
    teacher: Teacher,
    missing: Sequence[Prompt],
    sigmas: list[float],
    saved: Sequence[int],
    dtype: DType,
    batch_size: int,
) -> None:
    """Solve the teacher's ODE for the missing prompts, batch by batch, and write the saved points of each prompt."""
    seed = teacher.config.runtime.seed
    batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    with tqdm(total=len(missing) * len(sigmas[1:]), unit="step", disable=rank() != 0) as bar:
        for batch in batches:
            flow = teacher.flow([prompt.text for prompt in batch])
            noise = teacher.noise(seed, [prompt.index for prompt in batch])

            def advance(_step: int, count: int = len(batch)) -> None:
                bar.update(count)

            points = sample_euler(flow, noise, sigmas, advance)
            trajectories = torch.stack([points[index] for index in saved], dim=1).to(DTYPES[dtype])
            for prompt, trajectory in zip(batch, trajectories, strict=True):
                write_ode_pair(pair_file(folder, prompt.index), prompt.text, trajectory)


def loss_sigmas(config: Config) -> list[float]:
    """Return the teacher's noise levels that the configured loss reads.

    They belong to the generator's denoising steps, but are warped by the teacher's shift. Score distillation reads only
    the points of its forward KL; other objectives read all, the clean end included.
    """
    sigmas = rollout_sigmas(replace(config.rollout, timestep_shift=config.teacher.timestep_shift))
    return sigmas[: config.distill.forward_kl_steps + 1] if config.train.objective == "score_distillation" else sigmas


def nearest_indices(sigmas: Sequence[float], targets: Sequence[float]) -> list[int]:
    """Return for every target noise level the index of the nearest of `sigmas`."""
    return [min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - target)) for target in targets]


def pair_settings(config: Config, sigmas: list[float], dtype: DType) -> dict[str, Any]:
    """Return everything that a pair depends on besides its prompt, as pairs.json stores it.

    Args:
        sigmas: noise levels of the saved points.
    """
    teacher = config.teacher
    return {
        "runtime.seed": config.runtime.seed,
        "model.base": os.path.normpath(config.model.base),
        "teacher.path": teacher.path and os.path.normpath(teacher.path),
        "weights": _weights_fingerprint(config),
        "teacher.guidance_scale": teacher.guidance_scale,
        "teacher.negative_prompt": teacher.negative_prompt,
        "teacher.num_inference_steps": teacher.num_inference_steps,
        "teacher.timestep_shift": teacher.timestep_shift,
        "sigmas": sigmas,
        "data.num_frames": config.data.num_frames,
        "video.height": config.video.height,
        "video.width": config.video.width,
        "dtype": dtype,
    }


def _weights_fingerprint(config: Config) -> str:
    """Return a short fingerprint of the teacher's weights and one of the text encoder's, separated by a space."""
    base, own = Path(config.model.base), Path(config.teacher.path)
    if not config.teacher.path:
        teacher = fingerprint(base, TRANSFORMER_FILES)
    elif own.is_dir():
        teacher = fingerprint(own, ["*"])
    else:
        teacher = fingerprint(own.parent, [glob.escape(own.name)])
    return f"{teacher[:16]} {fingerprint(base, TEXT_ENCODER_FILES)[:16]}"


def _check_existing_pairs(folder: Path, prompts: Sequence[Prompt], settings: dict[str, Any]) -> None:
    """Check the prompt, size and type of the first and the last of these pairs.

    Two suffice: lines that were added, removed or reordered in the prompt file almost certainly change one of them. The
    size is checked because folders of older versions have no pairs.json.

    Raises:
        UserError: if a pair differs from its prompt or the settings, or is corrupt.
    """
    size = [settings["data.num_frames"], *latent_size(VideoConfig(settings["video.height"], settings["video.width"]))]
    expected = f"{[len(settings['sigmas']), *size]} in {settings['dtype']}"
    for prompt in (prompts[0], prompts[-1]):
        file = pair_file(folder, prompt.index)
        text, points = load_pair(file)
        saves, frames, _, height, width = points.shape
        found = f"{[saves, frames, height, width]} in {str(points.dtype).removeprefix('torch.')}"
        for old, new in ((repr(text), repr(prompt.text)), (found, expected)):
            if old != new:
                raise UserError(
                    f"{file} is a pair of {old}, not {new}: choose another --output_folder, or delete this one"
                )
