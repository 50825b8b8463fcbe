"""docs/migrate.md: every command of the page runs, in the order of the page, with the files that it names.

The folder has the files of a user of the originals, at 48x80 pixels: tiny weights in their layouts, prompts, images, a
data set, and their YAML files. The configurations are the repository's own. Only sizes and the length of the training
are smaller. The words of a command are those of the page, but for the numbers in `SMALLER`.
"""

import importlib
import io
import json
import os
import re
import shlex
import tarfile
import traceback
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from commands import Result, run_main
from foreign_files import CAUSVID_BIDIRECTIONAL, LONGLIVE, SELF_FORCING
from hub_server import Hub
from pages import ROOT, code_blocks, text_of
from PIL import Image
from tiny_model import write_model
from video_files import moving_square, write_video

import utils.config_loading
from model.conversion import convert_checkpoint
from trainer.datasets.mixkit import REPO
from utils.config_loading import all_keys
from utils.foreign_keys import NO_EFFECT, TABLE

PAGE = ROOT / "docs/migrate.md"
HEADINGS = ("HiAR", "Self-Forcing", "CausVid", "LongLive", "Configuration keys")
SMALL = [
    *("video.height=48", "video.width=80", "model.text_length=24", "model.dtype=float32", "train.dtype=float32"),
    *("train.max_iterations=1", "train.total_batch_size=0", "runtime.device=cpu"),
]
SMALLER = {"832": "80", "480": "48", "1,21,16,60,104": "1,21,16,6,10", "81": "24", "16000": "2"}
OUTPUTS = ("--output_folder", "--output_path", "--logdir", "--local_dir", "--output_dir", "--output_latent_folder")
OUTPUTS += ("--lmdb_path", "--output")


def lines_of(page: Path) -> list[str]:
    """Return all lines of a page's code, continued lines joined; only comments and blank lines are left out."""
    lines = [line.strip() for block in code_blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def script_and_words(line: str) -> tuple[str, list[str]]:
    """Return the script of a command and the words after it, without the launcher."""
    words = shlex.split(line)
    assert words[0] in ("python", "torchrun"), f"the test cannot run {line}"
    index = 1
    while words[0] == "torchrun" and re.fullmatch(r"--nproc_per_node=\d+", words[index]):
        index += 1
    assert words[index].endswith(".py"), f"the test cannot run {line}"
    return words[index], [SMALLER.get(word, word) for word in words[index + 1 :]]


def run(line: str) -> Result:
    """Run a command of the page in this process."""
    script, words = script_and_words(line)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    try:
        return run_main(module.main, *words, name=script)
    except Exception:  # fails the test of this command only
        return Result(1, "", traceback.format_exc())


# ---- files of a user of the originals ----


def write_user_files(folder: Path) -> None:
    """Write all files that the page's commands read and that no earlier command of the page makes."""
    (folder / "configs").symlink_to(ROOT / "configs")
    model = write_model(folder / "wan_models/Wan2.1-T2V-1.3B")
    for name in ("Wan2.1-T2V-1.3B-Diffusers", "Wan2.1-T2V-14B"):
        (folder / "wan_models" / name).symlink_to(model)
    write_checkpoints(folder, model)
    texts = {
        "track.txt": "2: a blue square\n",
        "prompts.txt": "a red circle\n",
        "extended.txt": "a large red circle on a table\n",
    }
    texts |= {"data/prompts.txt": "a red circle\n", "mixkit_prompts.txt": "a red circle\na blue square\n"}
    texts |= {"prompts/vidprom_filtered_extended.txt": "a red circle\na blue square\na green triangle\n"}
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    write_images(folder / "images")
    captions = {"one.mp4": "a red square", "two.mp4": "a red square on blue"}
    (folder / "video_mixkit_6484_caption.json").write_text(json.dumps(captions))
    theirs = {
        "THEIRS.yaml": SELF_FORCING,
        "theirs/self_forcing_dmd.yaml": SELF_FORCING | {"data_path": "prompts.txt", "num_rollout_frames": 21},
        "theirs/wan_bidirectional_dmd_from_scratch.yaml": CAUSVID_BIDIRECTIONAL
        | {"data_path": "data/mixkit_latents_lmdb"},
        "theirs/longlive_inference.yaml": LONGLIVE | {"num_output_frames": 15, "num_samples": 1},
    }
    (folder / "theirs").mkdir()
    for name, content in theirs.items():
        (folder / name).write_text(yaml.safe_dump(content))


def write_checkpoints(folder: Path, model: Path) -> None:
    """Write generators with the keys and names of the public files, and LongLive's LoRA."""
    convert_checkpoint(model / "generator", folder / "generator.pt", "generator")
    weights = torch.load(folder / "generator.pt", weights_only=True)["generator"]
    names = {"hiar.pt": "generator_ema", "self_forcing_dmd.pt": "generator_ema", "ode_init.pt": "generator"}
    names |= {
        f"causvid/{name}/model.pt": "generator" for name in ("autoregressive_checkpoint", "bidirectional_checkpoint2")
    }
    paths = {f"ckpts/{name}": key for name, key in names.items()}
    for name, key in (paths | {"checkpoints/ode_init.pt": "generator", "longlive_base.pt": "generator_ema"}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({key: weights}, folder / name)
    width = weights["model.blocks.0.self_attn.q.weight"].shape[0]
    layer = "base_model.model.blocks.0.self_attn.q.lora_{}.weight"
    factors = {layer.format("A"): torch.randn(4, width), layer.format("B"): torch.randn(width, 4)}
    for name in ("lora.pt", "ckpts/lora.pt"):
        torch.save({"generator_lora": factors}, folder / name)


def write_images(folder: Path) -> None:
    """Write a folder of image and prompt pairs in Self-Forcing's layout."""
    (folder / "26-15").mkdir(parents=True)
    Image.new("RGB", (104, 60), (200, 30, 30)).save(folder / "26-15/cat.png")
    entry = {"file_name": "cat.png", "caption": "a cat", "type": "animal", "target_crop": {"target_ratio": "26-15"}}
    (folder / "target_crop_info_26-15.json").write_text(json.dumps([entry]))


def mixkit_archive(folder: Path) -> bytes:
    """Return a tar archive of two videos at 24 frames per second."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("one.mp4", "two.mp4"):
            path = write_video(folder / name, moving_square(130, 60, 104), 24)
            archive.add(path, name)
            path.unlink()
    return stream.getvalue()


# ---- the commands ----


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[Result, list[str]]]:
    """Run all commands of the page; return for each its result and the outputs that it left empty."""
    folder = tmp_path_factory.mktemp("user")
    write_user_files(folder)
    hub, merge = Hub(REPO, "dataset"), utils.config_loading._merge
    hub.commit(all_mixkit__1_tar=mixkit_archive(folder))
    result = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setattr(
            utils.config_loading, "_merge", lambda layers, words, source: merge(layers, [*SMALL, *words], source)
        )
        hub.redirect_huggingface(patch)
        for line in lines_of(PAGE):
            result[line] = run(line), empty_outputs(line)
    hub.close()
    return result


def empty_outputs(line: str) -> list[str]:
    """Return the outputs named in a command that do not exist or are empty."""
    _, words = script_and_words(line)
    paths = [path for flag, path in pairwise(words) if flag in OUTPUTS]
    return [path for path in paths if not (os.path.isfile(path) or (os.path.isdir(path) and os.listdir(path)))]


@pytest.mark.parametrize("line", lines_of(PAGE))
def test_a_command_of_the_page_runs(outcomes, line):
    result, empty = outcomes[line]
    assert result.code == 0, result.err
    assert not empty, f"{line} wrote nothing to {empty}"


def test_all_code_of_the_page_is_run():
    assert text_of(PAGE).count("```") == 2 * len(code_blocks(PAGE, "bash"))
    assert len(lines_of(PAGE)) > 20
    for line in lines_of(PAGE):
        script, _ = script_and_words(line)
        assert (ROOT / script).is_file(), line


@pytest.mark.parametrize(
    ("line", "changed", "fragment"),
    [
        ("generate_ode_pairs.py --caption", ("--num_inference_steps", "--num_steps"), "unrecognized arguments"),
        ("process_videos.py", ("--fps", "--rate"), "unrecognized arguments"),
        ("model.lora=", ("model.lora=", "model.adapter="), "adapter"),
        ("scripts/create_lmdb.py", ("data/mixkit_latents ", "data/none "), "no folder"),
    ],
)
def test_a_wrong_word_fails(outcomes, tmp_path, monkeypatch, line, changed, fragment):
    """The tests above would see a wrong flag, key or path on the page."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    right = next(command for command in outcomes if line in command)
    wrong = right.replace(*changed)
    result = run(wrong)
    assert wrong != right and result.code == 2 and fragment in result.err


# ---- the tables ----


def table_rows(heading: str) -> list[tuple[str, str]]:
    """Return the two columns of the table under a heading."""
    section = text_of(PAGE).split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.*) \| (.*) \|$", section, re.MULTILINE)
    return [row for row in rows if row != ("theirs", "here")]


def test_the_page_names_every_key_of_theirs():
    text = re.sub(r"```.*?```", "", text_of(PAGE), flags=re.DOTALL)
    named = {name for code in re.findall(r"`([^`]+)`", text) for name in re.findall(r"[a-z*][a-z_0-9*.]*", code)}
    for key in (*TABLE, *NO_EFFECT):
        forms = {key, key.removesuffix(".*"), key.partition(".")[0], key.rpartition(".")[2]}
        assert any(form == name or fnmatchcase(form, name) for form in forms for name in named - {"*"}), key


def test_the_tables_name_keys_and_scripts_that_exist():
    codes = [code for heading in HEADINGS for _, here in table_rows(heading) for code in re.findall(r"`([^`]+)`", here)]
    found = {key for code in codes for key in re.findall(r"\b([a-z]+\.[a-z_]+)\b", code)}
    keys = {key for key in found if not key.endswith((".py", ".pt", ".yaml", ".json", ".sh"))}
    scripts = {script for code in codes for script in re.findall(r"\b(?:scripts/)?\w+\.(?:py|sh)\b", code)}
    assert len(keys) > 40 and keys <= set(all_keys()), keys - set(all_keys())
    assert len(scripts) > 5 and [script for script in scripts if not (ROOT / script).is_file()] == []
