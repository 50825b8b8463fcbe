"""utils/foreign_config.py: YAML files of HiAR, Self-Forcing, CausVid and LongLive, key by key.

The files are written here from the list of keys in docs/migrate.md. A key is translated, listed, or an error.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

import inference
import train
from scripts import convert_config
from utils.config import Config, all_keys, config_flags, load_config
from utils.errors import UserError
from utils.foreign_keys import TABLE

SELF_FORCING: dict[str, Any] = {
    "generator_ckpt": "checkpoints/ode_init.pt",
    "real_name": "Wan2.1-T2V-14B",
    "fake_name": "Wan2.1-T2V-1.3B",
    "generator_fsdp_wrap_strategy": "size",
    "wandb_key": "SECRET",
    "denoising_step_list": [1000, 750, 500, 250],
    "warp_denoising_step": True,
    "num_train_timestep": 1000,
    "timestep_shift": 5.0,
    "guidance_scale": 3.0,
    "denoising_loss_type": "flow",
    "mixed_precision": True,
    "seed": 3,
    "sharding_strategy": "hybrid_full",
    "lr": 2.0e-6,
    "lr_critic": 4.0e-7,
    "beta1": 0.0,
    "beta2": 0.999,
    "beta1_critic": 0.0,
    "beta2_critic": 0.999,
    "weight_decay": 0.02,
    "data_path": "prompts/vidprom.txt",
    "batch_size": 1,
    "total_batch_size": 64,
    "ema_weight": 0.98,
    "ema_start_step": 150,
    "log_iters": 40,
    "dfake_gen_update_ratio": 4,
    "min_exit_step": 1,
    "num_training_frames": 21,
    "num_rollout_frames": 42,
    "image_or_video_shape": [1, 21, 16, 60, 104],
    "distribution_loss": "dmd",
    "trainer": "score_distillation",
    "gradient_checkpointing": True,
    "num_frame_per_block": 3,
    "negative_prompt": "blurred",
    "model_kwargs": {"timestep_shift": 6.0, "local_attn_size": 12, "sink_size": 3},
}
SELF_FORCING_HERE = {
    "model.generator": "checkpoints/ode_init.pt",
    "model.base": "wan_models/Wan2.1-T2V-1.3B",
    "train.init": "checkpoints/ode_init.pt",
    "teacher.base": "wan_models/Wan2.1-T2V-14B",
    "teacher.negative_prompt": "blurred",
    "rollout.schedule": "block_first",
    "rollout.context": "output",
    "rollout.denoising_step_list": [1000.0, 750.0, 500.0, 250.0],
    "rollout.warp_denoising_step": True,
    "rollout.use_ode_trajectory": False,
    "rollout.timestep_shift": 6.0,
    "rollout.block_frames": 3,
    "rollout.window": 12,
    "rollout.sink": 3,
    "distill.timestep_shift": 5.0,
    "distill.guidance_scale": 4.0,
    "distill.critic_learning_rate": 4.0e-7,
    "distill.generator_every": 4,
    "distill.min_exit_step": 1,
    "distill.max_rollout_frames": 42,
    "distill.forward_kl_weight": 0.0,
    "data.prompts": "prompts/vidprom.txt",
    "data.path": "",
    "data.num_frames": 21,
    "video.height": 480,
    "video.width": 832,
    "video.num_output_frames": 21,
    "train.objective": "score_distillation",
    "train.learning_rate": 2.0e-6,
    "train.betas": [0.0, 0.999],
    "train.weight_decay": 0.02,
    "train.batch_size": 1,
    "train.total_batch_size": 64,
    "train.ema_decay": 0.98,
    "train.ema_start": 150,
    "train.checkpoint_every": 40,
    "train.dtype": "bfloat16",
    "train.sharding": "hybrid",
    "train.activation_checkpointing": True,
    "train.grad_clip": 10.0,
    "train.warmup": 0,
    "train.decay": "constant",
    "runtime.seed": 3,
}
HIAR = SELF_FORCING | {
    "distribution_loss": "timestep_forcing_dmd",
    "denoising_order": "timestep_first",
    "always_clean_context": True,
    "context_noise": 100,
    "independent_first_frame": False,
    "use_ode_trajectory": True,
    "num_rollout_frames": 0,
    "pd_enabled": True,
    "pd_num_steps": 2,
    "pd_loss_weight": 0.2,
    "pd_data_path": "data/pairs",
    "pd_loss_type": "velocity",
    "pd_x0_target_mode": "pred_x0",
    "pd_compute_mode": "single_forward",
    "pd_teacher_timestep_shift": 8.0,
    "pd_teacher_num_inference_steps": 48,
    "pd_teacher_save_indices": "0,12,24,36,-1",
}
HIAR_HERE = SELF_FORCING_HERE | {
    "rollout.schedule": "timestep_first",
    "rollout.context": "clean",
    "rollout.context_noise": 0.1,
    "rollout.independent_first_frame": False,
    "rollout.use_ode_trajectory": True,
    "distill.max_rollout_frames": 21,
    "distill.forward_kl_weight": 0.2,
    "distill.forward_kl_steps": 2,
    "distill.forward_kl_form": "flow",
    "distill.forward_kl_mode": "block_causal",
    "data.path": "data/pairs",
    "data.sigmas": pytest.approx([1, 0.96, 0.888889, 0.727273, 0], abs=1e-6),
}
CAUSVID: dict[str, Any] = {
    "model_name": "wan",
    "generator_name": "causal_wan",
    "generator_ckpt": "model.pt",
    "generator_grad": {"model": True},
    "real_score_grad": {"model": False},
    "generator_task": "causal_video",
    "real_task_type": "bidirectional_video",
    "denoising_step_list": [1000, 757, 522, 0],
    "timestep_shift": 8.0,
    "real_guidance_scale": 3.5,
    "lr": 2.0e-6,
    "beta1": 0.9,
    "beta2": 0.999,
    "sharding_strategy": "full",
    "data_path": "mixkit_lmdb",
    "batch_size": 2,
    "output_path": "runs/causvid",
    "distillation_loss": "dmd",
    "backward_simulation": False,
    "num_frame_per_block": 3,
    "warp_denoising_step": False,
    "num_train_timestep": 1000,
    "denoising_loss_type": "flow",
    "mixed_precision": True,
    "seed": 0,
    "log_iters": 500,
    "dfake_gen_update_ratio": 5,
    "image_or_video_shape": [1, 21, 16, 60, 104],
    "gradient_checkpointing": True,
}
CAUSVID_HERE = {
    "model.base": "wan_models/Wan2.1-T2V-1.3B",
    "model.generator": "model.pt",
    "rollout.schedule": "block_first",
    "rollout.denoising_step_list": pytest.approx([1000, 756.757, 521.739, 0], abs=1e-3),
    "rollout.warp_denoising_step": False,
    "rollout.timestep_shift": 8.0,
    "rollout.block_frames": 3,
    "rollout.window": 21,
    "distill.timestep_shift": 8.0,
    "distill.guidance_scale": 4.5,
    "distill.critic_learning_rate": 2.0e-6,
    "data.path": "mixkit_lmdb",
    "data.prompts": "",
    "data.num_frames": 21,
    "distill.backward_simulation": False,
    "distill.forward_kl_weight": 0.0,
    "distill.max_rollout_frames": 21,
    "distill.generator_every": 5,
    "train.objective": "score_distillation",
    "train.init": "model.pt",
    "train.learning_rate": 2.0e-6,
    "train.betas": [0.9, 0.999],
    "train.batch_size": 2,
    "train.grad_clip": 10.0,
    "train.ema_decay": 0.0,
    "train.sharding": "shard",
    "train.dtype": "bfloat16",
    "train.checkpoint_every": 500,
    "train.activation_checkpointing": True,
}
CAUSVID_WARPED = CAUSVID | {
    "denoising_step_list": [1000, 750, 500, 250, 0],
    "warp_denoising_step": True,
    "real_guidance_scale": 2.0,
}
CAUSVID_WARPED_HERE = CAUSVID_HERE | {
    "rollout.denoising_step_list": [1000.0, 750.0, 500.0, 250.0, 0.0],
    "rollout.warp_denoising_step": True,
    "distill.guidance_scale": 3.0,
}
CAUSVID_BIDIRECTIONAL = {
    key: value
    for key, value in CAUSVID.items()
    if key not in ("generator_name", "generator_ckpt", "num_frame_per_block")
} | {"generator_task": "bidirectional_video", "denoising_step_list": [1000, 757, 522]}
CAUSVID_BIDIRECTIONAL_HERE = CAUSVID_HERE | {
    "model.generator": "",
    "train.init": "",  # training starts from model.base
    "rollout.schedule": "bidirectional",
    "rollout.denoising_step_list": pytest.approx([1000, 756.757, 521.739], abs=1e-3),
    "rollout.block_frames": 1,
}
CAUSVID_ODE = {
    "model_name": "causal_wan",
    "generator_grad": {"model": True},
    "denoising_step_list": [1000, 757, 522, 0],
    "generator_task": "causal_video",
    "mixed_precision": True,
    "sharding_strategy": "hybrid_full",
    "lr": 2.0e-6,
    "beta1": 0.9,
    "beta2": 0.999,
    "data_path": "mixkit_ode_lmdb",
    "batch_size": 2,
    "distillation_loss": "ode",
    "gradient_checkpointing": True,
    "num_frame_per_block": 3,
    "warp_denoising_step": False,
}
CAUSVID_ODE_HERE = {
    "model.base": "wan_models/Wan2.1-T2V-1.3B",
    "rollout.schedule": "block_first",
    "rollout.block_frames": 3,
    "rollout.timestep_shift": 8.0,
    "data.path": "mixkit_ode_lmdb",
    "data.sigmas": pytest.approx([1, 0.756757, 0.521739, 0], abs=1e-6),  # indices 0, 36, 44, -1 of 50 steps, shift 8
    "train.objective": "ode_regression",
    "train.init": "",
    "train.learning_rate": 2.0e-6,
    "train.betas": [0.9, 0.999],
    "train.batch_size": 2,
}
LONGLIVE = {
    "denoising_step_list": [1000, 750, 500, 250],
    "warp_denoising_step": True,
    "num_frame_per_block": 3,
    "model_name": "Wan2.1-T2V-1.3B",
    "model_kwargs": {"local_attn_size": 12, "timestep_shift": 5.0, "sink_size": 3},
    "data_path": "prompts.txt",
    "output_folder": "videos/long",
    "num_output_frames": 120,
    "num_samples": 2,
    "save_with_index": True,
    "use_ema": True,
    "global_sink": True,
    "context_noise": 0,
    "inference_iter": -1,
    "seed": 0,
    "generator_ckpt": "longlive_base.pt",
    "lora_ckpt": "lora.pt",
    "adapter": {"type": "lora", "rank": 256, "alpha": 128, "dropout": 0.0},
}
LONGLIVE_HERE = {
    "rollout.schedule": "block_first",
    "rollout.window": 12,
    "rollout.sink": 3,
    "rollout.timestep_shift": 5.0,
    "model.lora": "lora.pt",
    "model.lora_scale": 0.5,
    "model.use_ema": True,
    "model.generator": "longlive_base.pt",
    "video.num_output_frames": 120,
    "train.objective": "",
}


def write(folder: Path, values: dict[str, Any], name: str = "theirs.yaml") -> str:
    (folder / name).write_text(yaml.safe_dump(values))
    return str(folder / name)


def value_of(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return asdict(config)[section][name]


# ---- Translation ----


@pytest.mark.parametrize(
    ("theirs", "here"),
    [
        (SELF_FORCING, SELF_FORCING_HERE),
        (HIAR, HIAR_HERE),
        (CAUSVID, CAUSVID_HERE),
        (CAUSVID_WARPED, CAUSVID_WARPED_HERE),
        (CAUSVID_BIDIRECTIONAL, CAUSVID_BIDIRECTIONAL_HERE),
        (CAUSVID_ODE, CAUSVID_ODE_HERE),
        (LONGLIVE, LONGLIVE_HERE),
    ],
    ids=["self_forcing", "hiar", "causvid", "causvid_warped", "causvid_bidirectional", "causvid_ode", "longlive"],
)
def test_every_key_of_an_original_file(tmp_path, theirs, here, capsys):
    config = load_config(write(tmp_path, theirs))
    assert {key: value_of(config, key) for key in here} == here
    printed = capsys.readouterr().err
    nested = {f"{key}.{inner}" for key, values in theirs.items() if isinstance(values, dict) for inner in values}
    plain = {key for key, value in theirs.items() if not isinstance(value, dict)}
    assert not [key for key in plain | nested if key not in printed], "a key was dropped silently"


@pytest.mark.parametrize(
    ("key", "value", "ours", "expected"),
    [
        ("real_name", "models/teacher", "teacher.base", "models/teacher"),
        ("distribution_loss", "timestep_forcing_dmd", "rollout.schedule", "timestep_first"),
        ("inference_method", "hybrid_block0", "rollout.leading_blocks", 1),
        ("inference_method", "frame_first", "rollout.schedule", "block_first"),
        ("always_clean_context", False, "rollout.context", "output"),
        ("guidance_scale", 6, "distill.guidance_scale", 7.0),
        ("local_attn_size", -1, "rollout.window", 21),
        ("local_attn_size", 9, "rollout.window", 9),
        ("sink_size", 3, "rollout.sink", 3),
        ("num_rollout", 4, "rollout.num_rollouts", 4),
        ("num_overlap_frames", 6, "rollout.overlap_frames", 6),
        ("context_noise", 0, "rollout.context_noise", 0.0),
        ("independent_first_frame", True, "rollout.independent_first_frame", True),
        ("distribution_loss", "dmd_switch", "rollout.schedule", "block_first"),
        ("trainer", "ode", "train.objective", "ode_regression"),
        ("distillation_loss", "ode", "train.objective", "ode_regression"),
        ("mixed_precision", False, "train.dtype", "float32"),
        ("sharding_strategy", "full", "train.sharding", "shard"),
        ("num_frames", 81, "video.num_output_frames", 21),
        ("height", 96, "video.height", 96),
        ("width", 160, "video.width", 160),
        ("gradient_accumulation_steps", 4, "train.total_batch_size", 4),
        ("generator_task", "bidirectional_video", "rollout.schedule", "bidirectional"),
        ("causal", False, "rollout.schedule", "bidirectional"),
        ("backward_simulation", True, "distill.backward_simulation", True),
        ("denoising_step_list", [1000, 500], "rollout.denoising_step_list", pytest.approx([1000, 500])),
    ],
)
def test_one_key(tmp_path, key, value, ours, expected):
    assert value_of(load_config(write(tmp_path, {"timestep_shift": 1.0, key: value})), ours) == expected


def test_the_forward_kl_of_hiar(tmp_path):
    """Its defaults differ from ours; keys of a loss that is off are not read."""
    keys = {"trainer": "score_distillation", "pd_enabled": True, "pd_num_steps": 1}
    distill = load_config(write(tmp_path, keys)).distill
    assert (distill.forward_kl_form, distill.forward_kl_mode) == ("endpoint", "block_causal")
    assert distill.forward_kl_weight == 1.0
    forms = {"x0": "x0", "velocity": "flow", "euler_endpoint": "endpoint"}
    for theirs, ours in forms.items():
        assert load_config(write(tmp_path, keys | {"pd_loss_type": theirs})).distill.forward_kl_form == ours
    with pytest.raises(UserError, match="only pred_x0"):
        load_config(write(tmp_path, keys | {"pd_x0_target_mode": "gt_x0"}))
    off = keys | {"pd_enabled": False, "pd_x0_target_mode": "gt_x0"}
    assert load_config(write(tmp_path, off)).distill.forward_kl_weight == 0


def test_the_default_file_beside_a_file_is_merged_first(tmp_path, capsys):
    write(tmp_path, {"weight_decay": 0.5, "num_training_frames": 12, "gc_interval": 7}, "default_config.yaml")
    config = load_config(write(tmp_path, {"num_training_frames": 15, "lr": 1e-4}))
    assert (config.train.weight_decay, config.data.num_frames, config.train.learning_rate) == (0.5, 15, 1e-4)
    assert "default_config.yaml" in capsys.readouterr().err


def test_overrides_win(tmp_path):
    config = load_config(write(tmp_path, SELF_FORCING), ["rollout.window=9", "model.base=data/shapes-wan"])
    assert (config.rollout.window, config.model.base) == (9, "data/shapes-wan")


def test_our_own_files_are_not_translated(tmp_path, capsys):
    load_config(write(tmp_path, {"rollout": {"window": 9}}))
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="guidance_scale"):
        load_config(write(tmp_path, {"rollout": {"window": 9}, "guidance_scale": 3.0}))


def test_the_table_names_keys_of_the_schema():
    rules = [rule for rule in TABLE.values() if isinstance(rule, tuple)]
    assert {name for ours, _ in rules for name in ours.split()} <= set(all_keys())


# ---- Errors ----


def test_all_unknown_keys_are_reported_at_once(tmp_path):
    path = write(tmp_path, SELF_FORCING | {"guidance_scal": 3.0, "window": 12, "something": 1, "i2v": True})
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "\n" not in message and path in message
    assert "guidance_scal (did you mean guidance_scale?)" in message
    assert "window (here: rollout.window)" in message
    assert "something" in message and "i2v True" in message


@pytest.mark.parametrize(
    ("key", "value", "fragment"),
    [
        ("generator_task", "image", "choose from causal_video, bidirectional_video"),
        ("generator_task", "bidirectional_video", "disagree"),
        ("causal", False, "disagree"),
        ("backward_simulation", "maybe", "choose from true, false"),
        ("num_train_timestep", 500, "only 1000"),
        ("denoising_loss_type", "x0", "only flow"),
        ("ts_schedule", True, "only False"),
        ("context_noise", 1000, "rollout.context_noise must be a sigma"),
        ("switch_frame_indices", [48, 96], "one prompt"),
        ("model_kwargs", {"use_infinite_attention": True}, "only False"),
        ("same_step_across_blocks", False, "only True"),
        ("last_step_only", True, "only False"),
        ("load_raw_video", True, "encoded clips"),
        ("ckpt_step", 600, "--checkpoint_path"),
        ("fake_guidance_scale", 1.0, "only 0.0"),
        ("beta1_critic", 0.5, "beta1"),
        ("distribution_loss", "sid", "timestep_forcing_dmd, dmd"),
        ("trainer", "gan", "score_distillation, ode"),
        ("sharding_strategy", "other", "hybrid_full"),
        ("image_or_video_shape", [1, 21, 48, 44, 80], "[B, F, 16, h, w]"),
        ("num_training_frames", 18, "disagree"),
        ("fake_name", "Wan2.1-T2V-14B", "disagree"),
        ("denoising_order", "timestep_first", "disagree"),
        ("lr", "fast", "lr fast"),
    ],
)
def test_a_value_that_cannot_be_honoured(tmp_path, key, value, fragment):
    theirs = SELF_FORCING | {"model_name": "Wan2.1-T2V-1.3B", key: value}
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, theirs))
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


def test_what_only_training_needs_does_not_stop_inference(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, SELF_FORCING | {"streaming_training": True})
    load_config(path)
    assert "inference only: streaming_training" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["train.py", "--config_path", path, "--dry-run"])
    with pytest.raises(SystemExit):
        train.main()
    assert "not supported yet" in capsys.readouterr().err


def test_nested_files_are_refused_in_one_line(tmp_path):
    theirs = {"model_kwargs": {"model_name": "Wan2.2-TI2V-5B"}, "inference": {"sampling_steps": 4}, "data": {}}
    with pytest.raises(UserError, match=r"Wan2\.2-TI2V-5B") as caught:
        load_config(write(tmp_path, theirs))
    assert "\n" not in str(caught.value)


# ---- Commands ----


def test_flags_of_a_file_fill_in_the_command_line(tmp_path, monkeypatch):
    path = write(tmp_path, LONGLIVE)
    monkeypatch.setattr(sys, "argv", ["inference.py", "--config_path", path])
    args = inference.parse_arguments()
    assert (args.data_path, args.output_folder, args.num_samples) == ("prompts.txt", "videos/long", 2)
    assert args.save_with_index
    words = ["inference.py", "--config_path", path, "--prompt", "a cat", "--num_samples", "1", "--output_folder", "x"]
    monkeypatch.setattr(sys, "argv", words)
    args = inference.parse_arguments()
    assert (args.data_path, args.output_folder, args.num_samples) == (None, "x", 1)


@pytest.mark.parametrize("theirs", [SELF_FORCING, HIAR, CAUSVID, CAUSVID_BIDIRECTIONAL, CAUSVID_ODE, LONGLIVE])
def test_a_converted_file_is_the_same_configuration(tmp_path, theirs, monkeypatch, capsys):
    path, output = write(tmp_path, theirs), tmp_path / "ours.yaml"
    monkeypatch.setattr(sys, "argv", ["convert_config.py", path, str(output)])
    convert_config.main()
    assert load_config(str(output)) == load_config(path)
    assert "SECRET" not in output.read_text()
    for flag, value in config_flags(path).items():
        assert f"--{flag} {value}" in output.read_text() or (value is True and f"--{flag}" in output.read_text())
    monkeypatch.setattr(sys, "argv", ["convert_config.py", str(output)])
    with pytest.raises(SystemExit):
        convert_config.main()
    assert "nothing to convert" in capsys.readouterr().err
