"""Functions in configuration values: the environment never reaches stored or printed configurations."""

import json
from dataclasses import asdict

import pytest

import inference
import train
from pipeline.output import video_metadata
from utils.config import Config
from utils.config_loading import load_config, override_config
from utils.errors import UserError
from utils.prompts import Prompt

SECRET = "hunter2"
CALLS = [
    *("${oc.env:TOKEN}", "${ oc.env : TOKEN }", "a/${oc.env:TOKEN}/b", "${oc.env:TOKEN,default}", "${oc.env:'TOKEN'}"),
    *("${oc.decode:${oc.env:TOKEN}}", "${oc.${model.lora}:TOKEN}", "${oc.${a.${b}}:TOKEN}", "${${a}:TOKEN}"),
    *("${oc.select:model.base}", "${oc.create:{a:1}}", "}${oc.env:TOKEN}", "\\${oc.env:TOKEN}", "x: ${oc.env:TOKEN}"),
]
PLACES = [
    *("model: {base: %s}", "data: {sigmas: [%s]}", "train: {wandb: %s}", "train: %s", "inherit: %s"),
    "video: {fps: %s}",
]


@pytest.fixture(autouse=True)
def _secret(monkeypatch):
    monkeypatch.setenv("TOKEN", SECRET)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", CALLS)
def test_functions_in_a_yaml_file_are_refused(tmp_path, refuse, place, call):
    file = tmp_path / "config.yaml"
    file.write_text(place % json.dumps(call) + "\n")
    for main in inference.main, train.main:
        line = refuse(main, ("--config_path", file, "--dry-run"), "functions such as oc.env are not evaluated")
        assert str(file) in line and SECRET not in line


@pytest.mark.parametrize("key", ["model.base", "rollout", "data.sigmas.0", "video.fps"])
@pytest.mark.parametrize("call", CALLS)
def test_functions_in_overrides_are_refused(world, refuse, key, call):
    words = "--config_path", world.config, "--dry-run", f"{key}='{call}'" if "'" not in call else f"{key}={call}"
    line = refuse(inference.main, words, "functions such as oc.env are not evaluated")
    assert "the overrides" in line and SECRET not in line


@pytest.mark.parametrize("call", CALLS)
def test_functions_in_the_metadata_of_a_video_are_refused(tmp_path, refuse, call):
    file, config = tmp_path / "video.json", Config()
    config.teacher.negative_prompt = call
    file.write_text(json.dumps(video_metadata(config, Prompt(0, "a", "a"), 0, "")))
    refuse(inference.main, ("--config_path", file, "--dry-run"), "functions such as oc.env are not evaluated")


def test_functions_in_a_config_object_are_not_evaluated():
    config = Config()
    config.model.base = "${oc.env:TOKEN}"
    assert SECRET not in config.to_yaml() + json.dumps(asdict(config))
    with pytest.raises(UserError, match="not evaluated"):
        override_config(config, [])


def test_functions_in_an_inherited_file_are_refused(tmp_path, refuse):
    (tmp_path / "parent.yaml").write_text("model: {base: '${oc.env:TOKEN}'}\n")
    (tmp_path / "child.yaml").write_text("inherit: parent.yaml\nmodel: {base: mine}\n")
    assert "parent.yaml" in refuse(inference.main, ("--config_path", tmp_path / "child.yaml", "--dry-run"))


@pytest.mark.parametrize("text", ["${video.height}", "${video.width}:${video.height}", "{a: b}", "$TOKEN", "a:b"])
def test_references_and_other_text_are_values(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"model": {"lora": text}, "video": {"height": 64, "width": 32}}))
    expected = text.replace("${video.height}", "64").replace("${video.width}", "32")
    assert load_config(str(file)).model.lora == expected
