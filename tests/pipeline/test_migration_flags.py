"""Flags with the spelling of the originals, and messages that name the key to use here."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_model import ROOT, write_config, write_model

import inference
import train
from pipeline.latent_files import read_latents
from scripts import generate_ode_pairs, pipeline_parallel_inference
from trainer.datasets.ode_pairs import load_pair, open_ode_pairs, write_ode_pair
from utils.config_loading import load_config
from utils.errors import UserError
from utils.image_prompts import read_image_prompts


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flags")
    (folder / "prompts.txt").write_text("a red circle\n")
    return write_config(folder / "tiny.yaml", write_model(folder / "model"), data={"num_frames": 3})


def parse(parser, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    return parser()


def test_prompt_files_and_checkpoint_folders(config, tmp_path, monkeypatch):
    words = ("--config_path", config, "--prompt_file_path", "x.txt", "--checkpoint_folder", tmp_path)
    with pytest.raises(UserError, match=r"holds no model\.pt"):
        parse(inference.parse_arguments, monkeypatch, *words)
    (tmp_path / "model.pt").touch()
    args = parse(inference.parse_arguments, monkeypatch, *words)
    assert (args.data_path, args.checkpoint_path) == ("x.txt", str(tmp_path / "model.pt"))
    with pytest.raises(UserError, match="not both"):
        parse(inference.parse_arguments, monkeypatch, *words, "--checkpoint_path", "x.pt")


def test_one_video_in_a_named_file_from_an_extended_prompt(config, tmp_path, monkeypatch, capsys):
    words = ["--config_path", config, "--num_output_frames", "3", "--output_path", tmp_path / "new/cat.mp4"]
    parse(inference.main, monkeypatch, *words, "--prompt", "a cat", "--extended_prompt", "a large red circle")
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"cat.mp4", "cat.json", "cat.png"}
    metadata = json.loads((tmp_path / "new/cat.json").read_text())
    assert (metadata["prompt"], metadata["name"]) == ("a large red circle", "a cat")
    for more, fragment in [
        (["--prompt", "a cat", "--num_samples", "2"], "is one file, but there are 2 videos"),
        (["--prompt", "a cat", "--output_folder", tmp_path], "not both"),
        (["--data_path", config.parent / "prompts.txt", "--extended_prompt", "x"], "needs --prompt"),
        (["--prompt", "a cat", "--extended_prompt", " "], "needs --prompt"),
    ]:
        with pytest.raises(SystemExit):
            parse(inference.main, monkeypatch, *words, *more)
        assert fragment in capsys.readouterr().err


def test_a_file_of_the_command_line_wins_over_the_folder_of_a_configuration(config, tmp_path, monkeypatch):
    (tmp_path / "theirs.yaml").write_text("denoising_step_list: [1000, 500]\noutput_folder: videos\n")
    words = ("--config_path", tmp_path / "theirs.yaml", "--prompt", "a cat")
    args = parse(inference.parse_arguments, monkeypatch, *words, "--output_path", "x.mp4")
    assert args.output_path == "x.mp4"
    args = parse(inference.parse_arguments, monkeypatch, *words)
    assert (args.output_folder, args.output_path) == ("videos", None)
    args = parse(pipeline_parallel_inference.parse_arguments, monkeypatch, *words, "--vae_decode_chunk_size", "8")
    assert args.output_path == "videos"


def test_sending_early_is_the_default_of_the_pipeline(config, monkeypatch):
    parser, words = pipeline_parallel_inference.parse_arguments, ("--config_path", config, "--dac_optimize")
    assert not parse(parser, monkeypatch, *words).no_dac
    with pytest.raises(SystemExit):
        parse(parser, monkeypatch, *words, "--no_dac")


def test_lists_with_commas(config, tmp_path, monkeypatch):
    words = ["--config_path", config, "--caption_path", config.parent / "prompts.txt", "--output_folder", tmp_path]
    words += ["--num_inference_steps", "4", "--save_indices", "0,2,-1", "--latent_shape", "1,6,16,4,4"]
    words += ["--num_prompts", "-1"]  # all
    parse(generate_ode_pairs.main, monkeypatch, *words)
    assert load_pair(tmp_path / "00000.pt")[1].shape == (3, 6, 16, 4, 4)


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--latent_shape", "2,6,16,4,4"], "1,F,C,H,W"),
        (["--latent_shape", "16", "4"], "C H W"),
        (["--latent_shape", "1,6,16,4,4", "--num_frames", "3"], "disagree"),
        (["--save_indices", "0,a"], "whole numbers"),
    ],
)
def test_wrong_lists(config, tmp_path, monkeypatch, capsys, words, fragment):
    always = ["--config_path", config, "--caption_path", config.parent / "prompts.txt", "--output_folder", tmp_path]
    with pytest.raises(SystemExit):
        parse(generate_ode_pairs.main, monkeypatch, *always, *words)
    assert fragment in capsys.readouterr().err


def test_model_names_are_looked_up_under_wan_models(config, tmp_path, monkeypatch):
    words = ["--config_path", config, "--caption_path", "x", "--output_folder", "y", "--model_name"]
    named = parse(generate_ode_pairs.parse_arguments, monkeypatch, *words, "Wan2.1-T2V-1.3B")
    assert named.model_name == "wan_models/Wan2.1-T2V-1.3B"
    assert parse(generate_ode_pairs.parse_arguments, monkeypatch, *words, tmp_path).model_name == str(tmp_path)


def test_the_script_for_pairs_reads_the_originals_variables(tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    variables = {"CAPTION_PATH": "p", "OUTPUT_FOLDER": "o", "NPROC_PER_NODE": "3", "RESUME_FLAG": "--resume"}
    variables |= {"LATENT_SHAPE": "1,21,16,60,104", "PYTHON": str(tmp_path / "python")}
    exports = " ".join(f"{name}={value}" for name, value in variables.items())
    printed = os.popen(f"{exports} bash {ROOT}/scripts/run_generate_ode_pairs.sh").read()
    assert "--nproc_per_node=3" in printed
    assert "--latent_shape 1,21,16,60,104" in printed and "--resume" in printed


def test_pairs_without_levels_name_the_value_for_the_defaults(tmp_path):
    write_ode_pair(tmp_path / "00000.pt", "a cat", torch.zeros(5, 3, 4, 2, 2))
    with pytest.raises(UserError, match=r"data\.sigmas=\[1,0\.96,0\.888889,0\.727273,0\]") as caught:
        open_ode_pairs(str(tmp_path), (), 2)
    word = str(caught.value).split()[-1]
    shifted = [8 * u / (1 + 7 * u) for u in (1, 0.75, 0.5, 0.25, 0)]
    assert load_config(str(ROOT / "configs/hiar.yaml"), [word]).data.sigmas == pytest.approx(shifted, abs=1e-6)


def test_resuming_from_a_file_points_to_the_initial_weights(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "weights.pt").touch()
    words = ["--config_path", ROOT / "configs/hiar.yaml", "--logdir", tmp_path, "--resume", tmp_path / "weights.pt"]
    with pytest.raises(SystemExit):
        parse(train.main, monkeypatch, *words)
    assert f"train.init={tmp_path / 'weights.pt'}" in capsys.readouterr().err


def test_a_run_that_may_not_resume_needs_an_empty_folder(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints").mkdir()
    words = ["--config_path", ROOT / "configs/hiar.yaml", "--logdir", tmp_path, "--no-auto-resume"]
    with pytest.raises(SystemExit):
        parse(train.main, monkeypatch, *words)
    assert "holds checkpoints; choose another --logdir" in capsys.readouterr().err


def test_causvids_levels_come_from_a_grid_of_1000():
    steps = load_config(str(ROOT / "configs/causvid.yaml")).rollout.denoising_step_list
    assert [step / 1000 for step in steps] == pytest.approx([1, 0.756757, 0.521739], abs=1e-6)


# ---- An image per prompt ----


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of two images with a prompt beside each, and a list of the same pairs."""
    folder = tmp_path_factory.mktemp("images")
    for name, colour, prompt in (("one.png", (200, 30, 30), "a red circle"), ("two.png", (20, 40, 200), "a blue one")):
        Image.new("RGB", (40, 40), colour).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(prompt)
    return folder


def test_every_prompt_starts_with_its_image(config, images, tmp_path, monkeypatch):
    words = ["--config_path", config, "--save_latents", "--num_output_frames", "21", "--i2v"]
    parse(inference.main, monkeypatch, *words, images, "--output_folder", tmp_path / "one")
    listed = tmp_path / "pairs.json"
    pairs = [{"file_name": str(images / "one.png"), "caption": "a red circle"}]
    listed.write_text(json.dumps([*pairs, {"image": str(images / "two.png"), "prompt": "a blue one"}]))
    parse(
        inference.main, monkeypatch, *words, "--data_path", listed, "--output_folder", tmp_path / "b", "--batch_size", 2
    )
    single = ["--config_path", config, "--save_latents", "--num_output_frames", "21", "--image", images / "two.png"]
    parse(inference.main, monkeypatch, *single, "--prompt", "a blue one", "--output_folder", tmp_path / "single")
    name = "a blue one-0.safetensors"
    one, batch, single = (read_latents(tmp_path / folder / name) for folder in ("one", "b", "single"))
    assert one.shape[0] == 21 and torch.equal(one, single)
    torch.testing.assert_close(batch, one, rtol=0, atol=1e-4)
    metadata = json.loads((tmp_path / "one" / "a blue one-0.json").read_text())
    assert metadata["prefix"] == str(images / "two.png")
    first = read_latents(tmp_path / "one" / "a red circle-0.safetensors")[0]
    assert not torch.equal(first, one[0])


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("[]", "holds no pairs"),
        ('[{"image": "x.png"}]', "entry 0 needs an image and a prompt"),
        ('{"x.png": "a cat"}', "there is no image"),
        ('{"x.png": 3}', "entry 0 needs"),
    ],
)
def test_lists_of_images_that_cannot_be_read(tmp_path, content, fragment):
    (tmp_path / "pairs.json").write_text(content)
    with pytest.raises(UserError, match=fragment):
        read_image_prompts(tmp_path)
    (tmp_path / "pairs.json").unlink()
    with pytest.raises(UserError, match="holds no pairs"):
        read_image_prompts(tmp_path)
    with pytest.raises(UserError, match="name a folder"):
        read_image_prompts(tmp_path / "none")


def test_images_of_self_forcing_lie_in_a_folder_of_their_aspect_ratio(images, tmp_path):
    (tmp_path / "26-15").mkdir()
    shutil.copy(images / "one.png", tmp_path / "26-15")
    entry = {"file_name": "one.png", "caption": "a red circle", "target_crop": {"target_ratio": "26-15"}}
    (tmp_path / "target_crop_info_26-15.json").write_text(json.dumps([entry]))
    assert [prompt.image for prompt in read_image_prompts(tmp_path)] == [str(tmp_path / "26-15/one.png")]
    shutil.copy(images / "one.png", tmp_path)
    assert [prompt.image for prompt in read_image_prompts(tmp_path)] == [str(tmp_path / "one.png")]


def test_an_image_without_a_prompt_is_named(images, tmp_path):
    shutil.copy(images / "one.png", tmp_path)
    with pytest.raises(UserError, match=r"one\.png.*write it to one\.txt"):
        read_image_prompts(tmp_path)


def test_the_quality_of_the_video_is_configured(config, tmp_path, monkeypatch):
    sizes = []
    for crf in (10, 40):
        words = ["--config_path", config, "--prompt", "a red circle", "--output_folder", tmp_path / str(crf)]
        parse(inference.main, monkeypatch, *words, f"video.crf={crf}", "video.num_output_frames=3")
        sizes.append((tmp_path / str(crf) / "a red circle-0.mp4").stat().st_size)
    assert sizes[0] > 1.2 * sizes[1]
    with pytest.raises(UserError, match=r"video\.crf must be from 0"):
        load_config(str(config), ["video.crf=60"])
