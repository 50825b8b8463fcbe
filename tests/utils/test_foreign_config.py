"""utils/foreign_config.py: YAML files of HiAR, Self-Forcing, CausVid and LongLive, key by key.

tests/foreign_files.py holds the files. A key is translated, listed, or an error.
"""

import sys
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import foreign_files
import pytest
import yaml
from foreign_files import (
    CAUSVID,
    CAUSVID_BIDIRECTIONAL,
    CAUSVID_BIDIRECTIONAL_HERE,
    CAUSVID_HERE,
    CAUSVID_ODE,
    CAUSVID_ODE_HERE,
    CAUSVID_WARPED,
    CAUSVID_WARPED_HERE,
    HIAR,
    HIAR_HERE,
    LONGLIVE,
    LONGLIVE_HERE,
    LONGLIVE_INIT,
    LONGLIVE_INIT_HERE,
    SELF_FORCING,
    SELF_FORCING_HERE,
    SELF_FORCING_ODE,
    SELF_FORCING_ODE_HERE,
)

import inference
import train
from scripts import convert_config
from utils.config import Config
from utils.config_loading import all_keys, config_flags, load_config
from utils.errors import UserError
from utils.foreign_keys import NO_EFFECT, TABLE, flatten


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
        (SELF_FORCING_ODE, SELF_FORCING_ODE_HERE),
        (LONGLIVE_INIT, LONGLIVE_INIT_HERE),
    ],
    ids=[
        *("self_forcing", "hiar", "causvid", "causvid_warped", "causvid_bidirectional", "causvid_ode", "longlive"),
        *("self_forcing_ode", "longlive_init"),
    ],
)
def test_every_key_of_an_original_file(tmp_path, theirs, here, capsys):
    config = load_config(write(tmp_path, theirs))
    assert {key: value_of(config, key) for key in here} == here
    printed = capsys.readouterr().err
    nested = {f"{key}.{inner}" for key, values in theirs.items() if isinstance(values, dict) for inner in values}
    plain = {key for key, value in theirs.items() if not isinstance(value, dict)}
    assert not [key for key in plain | nested if key not in printed], "a key was dropped silently"


ONE_KEY = [
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
    ("model_kwargs", {"model_name": "models/base"}, "model.base", "models/base"),
    ("model_kwargs", {"num_frame_per_block": 4}, "rollout.block_frames", 4),
    ("num_frame_first_blocks", 2, "rollout.leading_blocks", 2),
    ("sharding_strategy", "no_shard", "train.sharding", "replicate"),
    ("pd_compute_mode", "rollout", "distill.forward_kl_mode", "rollout"),
    ("num_output_frames", 12, "video.num_output_frames", 12),
]


@pytest.mark.parametrize(("key", "value", "ours", "expected"), ONE_KEY)
def test_one_key(tmp_path, key, value, ours, expected):
    keys = {"timestep_shift": 1.0, "pd_enabled": True, key: value}
    assert value_of(load_config(write(tmp_path, keys)), ours) == expected


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


DEFAULT_CONFIG = {  # of HiAR; Self-Forcing's and LongLive's have the keys of an evaluation, too
    **{"independent_first_frame": False, "warp_denoising_step": False, "weight_decay": 0.01, "causal": True},
    **{"gradient_accumulation_steps": 0, "same_step_across_blocks": True, "discriminator_lr_multiplier": 1.0},
    **{"last_step_only": False, "i2v": False, "num_training_frames": 21, "num_rollout_frames": 0, "gc_interval": 100},
    **{"context_noise": 0, "denoising_order": "timestep_first", "ckpt_step": 0, "num_frames": 81},
    **{"prompt_name": "MovieGen", "prompt_path": "prompts/MovieGen.txt", "eval_first_n": 64},
    **{"height": 480, "width": 832, "num_samples": 1},
}


@pytest.mark.parametrize(("theirs", "here"), [(SELF_FORCING, SELF_FORCING_HERE), (HIAR, HIAR_HERE)])
def test_the_default_files_of_the_originals(tmp_path, theirs, here):
    """HiAR's default_config.yaml states timestep_first; a file with another distribution_loss wins."""
    write(tmp_path, DEFAULT_CONFIG, "default_config.yaml")
    config = load_config(write(tmp_path, theirs), for_training=True)
    assert {key: value_of(config, key) for key in here} == here


def test_a_default_yields_in_either_order_of_keys_but_stated_keys_disagree(tmp_path, capsys):
    write(tmp_path, {"denoising_order": "timestep_first"}, "default_config.yaml")
    for theirs in ({"distribution_loss": "dmd"}, {"inference_method": "frame_first"}):
        assert load_config(write(tmp_path, theirs)).rollout.schedule == "block_first"
        printed = capsys.readouterr().err
        assert "denoising_order timestep_first -> " not in printed and "no effect here: denoising_order" in printed
    write(tmp_path, {"distribution_loss": "dmd"}, "default_config.yaml")
    assert load_config(write(tmp_path, {"denoising_order": "timestep_first"})).rollout.schedule == "timestep_first"
    with pytest.raises(UserError, match="distribution_loss and denoising_order disagree"):
        load_config(write(tmp_path, {"denoising_order": "timestep_first", "distribution_loss": "dmd"}))


def test_overrides_win(tmp_path):
    config = load_config(write(tmp_path, SELF_FORCING), ["rollout.window=9", "model.base=data/shapes-wan"])
    assert (config.rollout.window, config.model.base) == (9, "data/shapes-wan")


def test_our_own_files_are_not_translated(tmp_path, capsys):
    load_config(write(tmp_path, {"rollout": {"window": 9}}))
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="guidance_scale"):
        load_config(write(tmp_path, {"rollout": {"window": 9}, "guidance_scale": 3.0}))


def test_every_key_of_the_table_is_in_a_file_or_a_case_of_these_tests():
    files = [values for name, values in vars(foreign_files).items() if name.isupper() and not name.endswith("_HERE")]
    tested = {key for values in [*files, DEFAULT_CONFIG] for key in flatten(values)}
    tested |= {key for name, value, *_ in [*ONE_KEY, *NOT_HONOURED] for key in flatten({name: value})}
    assert [key for key in TABLE if key not in tested] == []
    patterns = [pattern for pattern in NO_EFFECT if not any(fnmatchcase(key, pattern) for key in tested)]
    assert patterns == []


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


NOT_HONOURED = [
    ("generator_task", "image", "choose from causal_video, bidirectional_video"),
    ("generator_task", "bidirectional_video", "disagree"),
    ("causal", False, "disagree"),
    ("backward_simulation", "maybe", "choose from true, false"),
    ("num_train_timestep", 500, "only 1000"),
    ("denoising_loss_type", "x0", "only flow"),
    ("ts_schedule", True, "only False"),
    ("context_noise", 1000, "rollout.context_noise must be a sigma"),
    ("switch_frame_indices", [48, 96], "--prompt_track FILE"),
    ("reference_images", ["a.png"], "--image"),
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
    ("real_task_type", "causal_video", "only bidirectional_video"),
    ("fake_task_type", "causal_video", "only bidirectional_video"),
    ("inference_iter", 4, "only -1"),
    ("i2v", True, "only False"),
    ("adapter", {"type": "dora", "rank": 4, "alpha": 4}, "only lora"),
    ("adapter", {"type": "lora", "rank": 4}, "both rank and alpha"),
]


@pytest.mark.parametrize(("key", "value", "fragment"), NOT_HONOURED)
def test_a_value_that_cannot_be_honoured(tmp_path, key, value, fragment):
    theirs = SELF_FORCING | {"model_name": "Wan2.1-T2V-1.3B", key: value}
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, theirs))
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


def test_a_length_in_pixel_frames(tmp_path):
    assert load_config(write(tmp_path, {"num_frames": 5, "lr": 1e-4})).video.num_output_frames == 2
    with pytest.raises(UserError, match=r"num_frames 80 cannot be honoured, only 4n \+ 1"):
        load_config(write(tmp_path, {"num_frames": 80, "lr": 1e-4}))


def test_what_only_training_needs_does_not_stop_inference(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, SELF_FORCING | {"streaming_training": True})
    load_config(path)
    assert "inference only: streaming_training" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["train.py", "--config_path", path, "--dry-run"])
    with pytest.raises(SystemExit):
        train.main()
    assert "streaming_training: training of this kind is not supported yet" in capsys.readouterr().err


def test_keys_of_streaming_training_that_are_off_or_cover_the_clip_do_not_stop_training(tmp_path, capsys):
    keys = {"streaming_training": False, "slice_last_frames": 21, "min_num_training_frames": 21}
    load_config(write(tmp_path, SELF_FORCING | keys), for_training=True)
    no_effect = capsys.readouterr().err.split("no effect here: ")[-1]
    assert [key for key in keys if key not in no_effect] == []
    for key, value in (("slice_last_frames", 18), ("min_num_training_frames", 12), ("streaming_training", True)):
        with pytest.raises(UserError, match=f"{key}: training of this kind is not supported yet"):
            load_config(write(tmp_path, SELF_FORCING | keys | {key: value}), for_training=True)


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
