"""utils/config_loading.py and utils/config_checks.py: `load_config` returns the given values and rejects mistakes.

Every YAML file of the repository loads. Overrides win over files, and files over defaults. Every mistake gives one line
that names the key. A printed configuration loads as the same configuration, and so does the metadata of a video.
"""

import json
import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
import yaml

import train
from scripts import write_config_docs
from utils.config import Config, RolloutConfig
from utils.config_checks import check_config
from utils.config_loading import load_config
from utils.errors import UserError

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture
def empty(tmp_path) -> str:
    file = tmp_path / "empty.yaml"
    file.write_text("")
    return str(file)


def write(folder: Path, text: str) -> str:
    file = folder / "config.yaml"
    file.write_text(text)
    return str(file)


# ---- Files and values ----


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_config_of_the_repository_loads(file):
    load_config(str(file))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_printed_yaml_loads_as_the_same_config(file, tmp_path):
    config = load_config(str(file))
    assert load_config(write(tmp_path, config.to_yaml())) == config


def test_the_config_folder_is_not_empty():
    assert {"hiar.yaml", "self_forcing.yaml", "vae.yaml"} <= {file.name for file in CONFIGS}


def test_an_empty_file_gives_the_defaults(empty):
    assert load_config(empty) == Config()


def test_overrides_win_over_files_and_files_over_defaults(tmp_path):
    path = write(tmp_path, "rollout: {window: 12, sink: 3}\nvideo: {height: 64}\n")
    config = load_config(path, ["rollout.sink=1", "rollout.denoising_step_list=[1000, 500]", "model.text_cache=a=b"])
    assert (config.rollout.window, config.rollout.sink, config.video.height) == (12, 1, 64)
    assert config.rollout.denoising_step_list == [1000.0, 500.0]
    assert config.model.text_cache == "a=b"
    assert config.video.width == Config().video.width


@pytest.mark.parametrize("mode", ["off", "'off'", "offline", "online"])
def test_every_wandb_mode_can_be_set(tmp_path, empty, mode):
    path = write(tmp_path, f"train: {{wandb: {mode}}}\n")
    assert load_config(path).train.wandb == mode.strip("'")
    online = write(tmp_path, "train: {wandb: online}\n")
    assert load_config(online, [f"train.wandb={mode}"]).train.wandb == mode.strip("'")


def test_the_result_is_plain_dataclasses(empty):
    config = load_config(empty)
    assert isinstance(config.rollout, RolloutConfig) and type(config.rollout.denoising_step_list) is list
    for section in fields(config):
        assert is_dataclass(getattr(config, section.name))
        assert {type(value) for value in asdict(getattr(config, section.name)).values()} <= {
            str,
            int,
            float,
            bool,
            list,
        }


def test_the_negative_prompt_survives_a_round_trip(tmp_path):
    text = Config().to_yaml()
    assert load_config(write(tmp_path, text)).teacher.negative_prompt == Config().teacher.negative_prompt
    assert yaml.safe_load(text)["teacher"]["negative_prompt"].startswith("色调艳丽")


def test_every_key_is_documented():
    for section in fields(Config):
        docs = write_config_docs.field_docs(section.type)
        assert [key.name for key in fields(section.type)] == list(docs) and all(docs.values())


def test_the_config_docs_are_current():
    """If this fails: python scripts/write_config_docs.py."""
    assert (ROOT / "docs/config.md").read_text(encoding="utf-8") == write_config_docs.config_docs()


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rollout: {windw: 3}", "windw"),
        ("rolout: {window: 3}", "rolout"),
        ("rollout: {window: many}", "rollout.window"),
        ("rollout: {window: 2.5}", "rollout.window"),
        ("rollout: {window: }", "rollout.window"),
        ("rollout: {window: [1]}", "rollout.window"),
        ("rollout: {schedule: sideways}", "rollout.schedule"),
        ("model: {dtype: float8}", "model.dtype"),
        ("rollout: {denoising_step_list: 1000}", "denoising_step_list"),
        ("rollout: {denoising_step_list: [a, b]}", "denoising_step_list"),
        ("rollout: {denoising_step_list: []}", "rollout.denoising_step_list"),
        ("rollout: {denoising_step_list: [0]}", "rollout.denoising_step_list"),
        ("rollout: {denoising_step_list: [500, 1000]}", "rollout.denoising_step_list"),
        ("rollout: {denoising_step_list: [1000, 500, 500]}", "rollout.denoising_step_list"),
        ("rollout: {denoising_step_list: [1001, 500]}", "rollout.denoising_step_list"),
        ("rollout: {denoising_step_list: [1000, -1]}", "rollout.denoising_step_list"),
        ("rollout: {window: 2}", "rollout.window"),
        ("rollout: {window: 4, sink: 2}", "rollout.window"),
        ("rollout: {sink: -1}", "rollout.sink"),
        ("rollout: {window: -3}", "rollout.window"),
        ("rollout: {leading_steps: 5}", "rollout.leading_steps"),
        ("rollout: {leading_blocks: -1}", "rollout.leading_blocks"),
        ("rollout: {block_frames: 0}", "rollout.block_frames"),
        ("rollout: {timestep_shift: 0}", "rollout.timestep_shift"),
        ("video: {height: 0}", "video.height"),
        ("video: {num_output_frames: -1}", "video.num_output_frames"),
        ("video: 3", "VideoConfig"),
        ("train: {batch_size: 0}", "train.batch_size"),
        ("train: {wandb: maybe}", "train.wandb"),
        ("train: {dtype: float16}", "train.dtype"),
        ("train: {grad_clip: -1}", "train.grad_clip"),
    ],
)
def test_a_mistake_gives_one_line_that_names_the_key(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as error:
        load_config(write(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "hello", "a: [1", "a: b: c", "\x00", "rollout: ${nowhere.at.all}"])
def test_other_files_are_rejected(tmp_path, text):
    with pytest.raises(UserError):
        load_config(write(tmp_path, text))


def test_missing_and_binary_files_are_rejected(tmp_path):
    with pytest.raises(UserError, match="no config file"):
        load_config(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="no config file"):
        load_config(str(tmp_path))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(str(tmp_path / "bytes.yaml"))


@pytest.mark.parametrize(
    "word",
    [
        "window",
        "--rollout.window=3",
        "-x=3",
        "rollout.window=[1",
        "rollout.windw=3",
        "rollout.window=",
        "rollout=3",
        "=3",
    ],
)
def test_a_malformed_override_gives_one_line(empty, word):
    with pytest.raises(UserError) as error:
        load_config(empty, [word])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "steps"),
    [(["rollout.window=0"], 4), (["rollout.window=3"], 4), (["rollout.denoising_step_list=[1000,757,522,0]"], 3)],
)
def test_values_at_the_limits_are_allowed(empty, words, steps):
    config = load_config(empty, words)
    assert len([t for t in config.rollout.denoising_step_list if t > 0]) == steps


def test_the_defaults_are_valid():
    check_config(Config())


# ---- Metadata of videos ----


def metadata(**changes) -> dict:
    return {"prompt": "a", "name": "a", "sample": 0, "config": asdict(Config())} | changes


def test_metadata_of_a_video_is_a_configuration(tmp_path):
    sections = asdict(Config()) | {"rollout": asdict(RolloutConfig(window=12))}
    file = tmp_path / "video.json"
    file.write_text(json.dumps(metadata(config=sections)))
    config = load_config(str(file), ["video.fps=8"])
    assert config.rollout.window == 12 and config.video.fps == 8


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps(metadata(config=3)), json.dumps({"config": {}})])
def test_other_json_is_rejected(tmp_path, text):
    file = tmp_path / "video.json"
    file.write_text(text)
    with pytest.raises(UserError):
        load_config(str(file))


# ---- train.py ----


@pytest.fixture
def run_train(call, monkeypatch):
    """run_train(word, ...): run train.py in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(ROOT)
    return lambda *words: call(train, *words)


def test_a_dry_run_prints_the_whole_configuration(run_train, tmp_path):
    path = "configs/shapes/vae.yaml"
    code, out, err = run_train("--config_path", path, "--dry-run", "train.max_iterations=7")
    assert code == 0 and err == ""
    expected = load_config(str(ROOT / path), ["train.max_iterations=7"])
    assert load_config(write(tmp_path, out)) == expected
    assert expected.train.max_iterations == 7


@pytest.mark.parametrize("processes", [7, 128])
def test_a_number_of_processes_that_does_not_divide_the_batch_is_rejected(run_train, processes):
    code, out, err = run_train("--config_path", "configs/hiar.yaml", "--dry-run", f"world_size={processes}")
    assert code == 2 and not out
    assert err == (
        "error: train.total_batch_size=64 must be a multiple of train.batch_size=1 times the number of processes, "
        f"{processes}\n"
    )


def test_every_option_of_train_sets_its_key(run_train, tmp_path):
    words = ["--disable-wandb", "--wandb-save-dir", "logs", "--no_save", "--no_visualize", "--min_exit_step", "1"]
    words += ["--config_path", "configs/shapes/vae.yaml", "--dry-run", "train.sample_every=5", "train.wandb=online"]
    code, out, err = run_train(*words)
    assert code == 0 and err == ""
    config = load_config(write(tmp_path, out))
    assert (config.train.wandb, config.train.wandb_dir) == ("off", "logs")
    assert (config.train.save, config.train.sample_every) == (False, 0)
    assert config.distill.min_exit_step == 1


def test_a_typo_ends_training_with_one_line(run_train):
    code, out, err = run_train("--config_path", "configs/shapes/vae.yaml", "--dry-run", "train.iterashuns=7")
    assert code == 2 and out == ""
    assert len(err.splitlines()) == 1 and "iterashuns" in err


def test_a_configuration_without_objective_cannot_train(run_train):
    code, _, err = run_train("--config_path", "configs/causvid.yaml", "--logdir", "/nowhere")
    assert code == 2 and "train.objective" in err


# ---- Inheritance ----


def test_a_file_overrides_the_file_that_it_inherits_from(tmp_path):
    (tmp_path / "parent.yaml").write_text("video: {height: 64, width: 64}\nruntime: {seed: 3}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/child.yaml").write_text("inherit: ../parent.yaml\nvideo: {width: 128}\n")
    config = load_config(str(tmp_path / "sub/child.yaml"), ["runtime.seed=4"])
    assert (config.video.height, config.video.width, config.runtime.seed) == (64, 128, 4)


@pytest.mark.parametrize(
    ("parent", "message"),
    [("child.yaml", "in a circle"), ("none.yaml", "cannot be read"), ("3", "no file name")],
)
def test_inheritance_mistakes_are_rejected(tmp_path, parent, message):
    (tmp_path / "child.yaml").write_text(f"inherit: {parent}\n")
    with pytest.raises(UserError, match=message):
        load_config(str(tmp_path / "child.yaml"))


# ---- Ranges ----


def numbers(kind: type) -> list[str]:
    """Return the configuration keys of type `kind`, as section.key."""
    sections = {section.name: section.default_factory for section in fields(Config)}
    return [f"{name}.{key.name}" for name, make in sections.items() for key in fields(make) if key.type is kind]


@pytest.mark.parametrize("key", [*numbers(float), "data.sigmas", "train.betas", "rollout.denoising_step_list"])
def test_no_number_may_be_nan(empty, key):
    value = "nan" if key in numbers(float) else "[.nan, 0.5]"
    with pytest.raises(UserError, match=re.escape(key)):
        load_config(empty, [f"{key}={value}"])


@pytest.mark.parametrize("key", numbers(int))
def test_no_count_may_be_negative(empty, key):
    with pytest.raises(UserError, match=re.escape(key)):
        load_config(empty, [f"{key}=-1"])


@pytest.mark.parametrize(
    "word", ["train.ema_decay=1.5", "train.text_dropout=2", "train.learning_rate=.inf", "data.sigmas=[2,1]",
             "data.sigmas=[0.5,0.9]", "train.betas.0=0.5", "train=[1]"]
)  # fmt: skip
def test_values_out_of_range_are_rejected(empty, word):
    with pytest.raises(UserError):
        load_config(empty, [word])


def test_a_key_without_value_sets_an_empty_string(empty):
    assert load_config(empty, ["train.output="]).train.output == ""
    with pytest.raises(UserError, match="batch_size"):
        load_config(empty, ["train.batch_size="])


def test_limits_may_be_infinite(empty):
    config = load_config(empty, ["train.stop_grad_norm=.inf", "train.stop_loss_growth=.inf"])
    assert config.train.stop_grad_norm == config.train.stop_loss_growth == float("inf")
