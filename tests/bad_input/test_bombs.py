"""No file runs code: a bomb in every kind of file that a command opens.

A bomb creates a file when it is unpickled, imported or evaluated. Each command must refuse the file with one line, or
ignore the bomb. Tests of "explodes" show that the same bombs go off in readers that trust files.
"""

import contextlib
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
import transformers.dynamic_module_utils
import yaml
from PIL import EpsImagePlugin, Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

import inference
import train
from evaluation import measurements
from model.weights import NATIVE_TEXT_ENCODER, NATIVE_VAE
from scripts import (
    benchmark,
    convert_checkpoint,
    create_lmdb,
    encode_prompts,
    evaluate_vae,
    export_generator,
    generate_ode_pairs,
    plan_pipeline,
    plot_metrics,
    sample_teacher,
)
from trainer.datasets.clips import write_shard
from trainer.datasets.lmdb import write_lmdb
from trainer.datasets.ode_pairs import pair_file, write_ode_pair, write_sigmas

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
SIGMAS = [1.0, 0.9375, 0.8333, 0.625, 0.0]


class Bomb:
    """Creates the file `marker` when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path) -> Path:
    """The file that exists if a bomb went off."""
    return tmp_path / "exploded"


@pytest.fixture
def defuse(run_command, marker):
    """defuse(main, *words): run a command, which may succeed or end with one line; no bomb goes off."""

    def check(main: Callable[[], None], *words: object) -> None:
        code, err = run_command(main, words)
        errors = [line for line in err.splitlines() if "error: " in line]
        assert not marker.exists(), f"{words} ran code from a file"
        assert "Traceback" not in err and len(errors) == bool(code), err

    return check


# ---- pickles ----


def with_torch(marker: Path, zipped: bool) -> bytes:
    file = io.BytesIO()
    content = {"generator": {"a": torch.zeros(2)}, "step": Bomb(marker)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def with_tar(marker: Path) -> bytes:
    """Return torch's oldest format, a tar file of pickles."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        none = pickle.dumps(0) + pickle.dumps([])
        for name, data in {"storages": none, "tensors": none, "pickle": pickle.dumps(Bomb(marker))}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "zip": lambda marker: with_torch(marker, True),
    "legacy": lambda marker: with_torch(marker, False),
    "tar": with_tar,
    "pickle": lambda marker: pickle.dumps(Bomb(marker)),
    "text pickle": lambda marker: pickle.dumps(Bomb(marker), protocol=0),
    "dict": lambda marker: pickle.dumps({"config": Bomb(marker), "prompt": Bomb(marker)}),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_the_pickle_explodes_in_a_trusting_reader(tmp_path, marker, kind):
    file = tmp_path / "file"
    file.write_bytes(PICKLES[kind](marker))
    with contextlib.suppress(RuntimeError, pickle.UnpicklingError, LookupError, TypeError):
        torch.load(file, weights_only=False) if kind in ("zip", "legacy", "tar") else pickle.loads(file.read_bytes())
    assert marker.exists()


def inference_words(world, folder: Path, *words: object) -> tuple[object, ...]:
    always = "--config_path", world.config, "--prompt", "a red circle", "--output_folder", folder / "out"
    return *always, "video.num_output_frames=3", *words


def train_words(world, folder: Path, data: Path, objective: str, *words: object) -> tuple[object, ...]:
    keys = ["train.max_iterations=1", "train.batch_size=1", "train.checkpoint_every=1", f"train.objective={objective}"]
    keys += [f"train.init={world.model / 'transformer'}", f"data.path={data}", "train.warmup=1", "data.num_frames=6"]
    return "--config_path", world.config, "--logdir", folder / "log", *keys, *words


def replaced(world, folder: Path, part: str, name: str, data: bytes) -> Path:
    """Return a copy of the model in which the file `name` replaces the weights of a part."""
    model = shutil.copytree(world.model, folder / "model")
    for file in (model / part).glob("*.safetensors"):
        file.unlink()
    (model / part / name).write_bytes(data)
    return model


def native(folder: Path, name: str, data: bytes) -> Path:
    (folder / "native").mkdir()
    (folder / "native" / "config.json").write_text('{"dim": 32, "ffn_dim": 32, "num_heads": 2}')
    (folder / "native" / name).write_bytes(data)
    return folder / "native"


def written(file: Path, data: bytes) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    return file


def checkpoint_slot(name: str) -> Callable[..., tuple]:
    def slot(world, folder: Path, data: bytes) -> tuple:
        return inference.main, *inference_words(world, folder, "--checkpoint_path", written(folder / name, data))

    return slot


def lora_slot(name: str) -> Callable[..., tuple]:
    def slot(world, folder: Path, data: bytes) -> tuple:
        return inference.main, *inference_words(world, folder, f"model.lora={written(folder / name, data)}")

    return slot


def part_slot(part: str, name: str) -> Callable[..., tuple]:
    def slot(world, folder: Path, data: bytes) -> tuple:
        model = replaced(world, folder, part, name, data)
        return inference.main, *inference_words(world, folder, f"model.base={model}")

    return slot


def prefix_slot(flag: str, name: str) -> Callable[..., tuple]:
    def slot(world, folder: Path, data: bytes) -> tuple:
        words = flag, written(folder / name, data), "video.num_output_frames=4"
        return inference.main, *inference_words(world, folder, *words)

    return slot


def teacher_slot(world, folder: Path, data: bytes) -> tuple:
    weights = written(folder / "teacher.pt", data)
    words = "--config_path", world.config, "--data_path", world.prompts, "--output_folder", folder / "out"
    return sample_teacher.main, *words, f"teacher.path={weights}"


def pairs_teacher_slot(world, folder: Path, data: bytes) -> tuple:
    weights = written(folder / "teacher.bin", data)
    words = "--config_path", world.config, "--caption_path", world.prompts, "--output_folder", folder / "out"
    return generate_ode_pairs.main, *words, f"teacher.path={weights}"


def init_slot(world, folder: Path, data: bytes) -> tuple:
    weights = written(folder / "init.pt", data)
    return train.main, *train_words(world, folder, folder, "flow_matching"), f"train.init={weights}"


def data_slot(name: str, objective: str) -> Callable[..., tuple]:
    def slot(world, folder: Path, data: bytes) -> tuple:
        file = written(folder / "data" / name, data)
        return train.main, *train_words(world, folder, file.parent, objective)

    return slot


def pack_slot(name: str) -> Callable[..., tuple]:
    def slot(world, folder: Path, data: bytes) -> tuple:
        file = written(folder / "data" / name, data)
        return create_lmdb.main, "--data_path", file.parent, "--lmdb_path", folder / "lmdb"

    return slot


def config_slot(name: str) -> Callable[..., tuple]:
    def slot(world, folder: Path, data: bytes) -> tuple:
        return inference.main, "--config_path", written(folder / name, data), "--output_folder", folder / "out"

    return slot


SLOTS: dict[str, Callable[..., tuple]] = {
    **{f"--checkpoint_path {name}": checkpoint_slot(name) for name in ("g.pt", "g.pth", "g.bin", "g.safetensors", "g")},
    **{f"model.lora={name}": lora_slot(name) for name in ("l.safetensors", "l.pt", "l.bin")},
    **{f"text_encoder/{name}": part_slot("text_encoder", name) for name in ("w.bin", "model.safetensors")},
    **{f"vae/{name}": part_slot("vae", name) for name in ("w.pt", "model.safetensors")},
    "transformer/w.pt": lambda world, folder, data: (
        *(convert_checkpoint.main, "--input", replaced(world, folder, "transformer", "w.pt", data)),
        *("--to", "generator", "--output", folder / "converted.pt"),
    ),
    "native text encoder": lambda world, folder, data: (
        *(encode_prompts.main, "--config_path", world.config, "--data_path", world.prompts),
        *(f"model.base={native(folder, NATIVE_TEXT_ENCODER, data)}", f"model.text_cache={folder / 'cache'}"),
    ),
    "native VAE": lambda world, folder, data: (evaluate_vae.main, "--base", native(folder, NATIVE_VAE, data)),
    **{f"--video {name}": prefix_slot("--video", name) for name in ("p.safetensors", "p.mp4")},
    **{f"--image {name}": prefix_slot("--image", name) for name in ("p.png", "p.jpg", "p.webp")},
    "teacher of sample_teacher": teacher_slot,
    "teacher of generate_ode_pairs": pairs_teacher_slot,
    "train.init": init_slot,
    "ODE pair": data_slot("00000.pt", "ode_regression"),
    "clips": data_slot("0.safetensors", "flow_matching"),
    "LMDB file": data_slot("data.mdb", "ode_regression"),
    "ODE pair to pack": pack_slot("00000.pt"),
    "clips to pack": pack_slot("0.safetensors"),
    **{f"--config_path {name}": config_slot(name) for name in ("c.yaml", "c.json")},
    "prompts": lambda world, folder, data: (
        *(inference.main, "--config_path", world.config, "--data_path", written(folder / "p.txt", data)),
        *("--output_folder", folder / "out", "--dry-run"),
    ),
    "metrics": lambda world, folder, data: (
        *(plot_metrics.main, written(folder / "metrics.jsonl", data).parent, "--output", folder / "plot.png"),
    ),
    "profile": lambda world, folder, data: (
        *(plan_pipeline.main, "--config_path", world.config, "--profile", written(folder / "profile.json", data)),
    ),
    "benchmark": lambda world, folder, data: (benchmark.main, "--against", written(folder / "b.json", data)),
}


@pytest.mark.parametrize("kind", ["zip", "legacy", "tar", "pickle", "text pickle", "dict"])
@pytest.mark.parametrize("slot", SLOTS)
def test_a_pickle_in_place_of_a_file_runs_nothing(world, tmp_path, marker, refuse, defuse, slot, kind):
    main, *words = SLOTS[slot](world, tmp_path, PICKLES[kind](marker))
    if slot == "prompts":  # a text pickle is a prompt
        defuse(main, *words)
    else:
        assert str(tmp_path) in refuse(main, tuple(words))  # the message names the file
    assert not marker.exists()


# ---- training checkpoints ----


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_shard(folder / "0.safetensors", torch.zeros(2, 6, 16, 4, 4), ["a", "b"])
    return folder


@pytest.fixture(scope="session")
def trained(world, clips, tmp_path_factory, run_command) -> Path:
    """The folder of a training run with one checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    code, err = run_command(train.main, train_words(world, folder, clips, "flow_matching"))
    assert code == 0, err
    return folder / "log"


def bomb_metadata(checkpoint: Path, marker: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Bomb(marker)))


def bomb_hidden_in_metadata(checkpoint: Path, marker: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = Bomb(marker)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def bomb_shards(checkpoint: Path, marker: Path) -> None:
    """Put a bomb in place of every tensor, at the offsets that the metadata states."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    data = with_torch(marker, True)
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, len(data)
        (checkpoint / info.relative_path).write_bytes(data)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def bomb_legacy_shards(checkpoint: Path, marker: Path) -> None:
    for file in checkpoint.glob("*.distcp"):
        file.write_bytes(with_torch(marker, False))


def bomb_config(checkpoint: Path, marker: Path) -> None:
    text = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{marker}']]\n"
    (checkpoint / "config.yaml").write_text(text)


BOMBS = (bomb_metadata, bomb_hidden_in_metadata, bomb_shards, bomb_legacy_shards, bomb_config)


@pytest.mark.parametrize("command", ["resume", "--resume", "export .pt", "export .safetensors"])
@pytest.mark.parametrize("plant", BOMBS)
def test_a_bomb_in_a_training_checkpoint(world, clips, trained, tmp_path, marker, refuse, plant, command):
    log = shutil.copytree(trained, tmp_path / "log")
    checkpoint = log / "checkpoints" / "00000001"
    plant(checkpoint, marker)
    if command.startswith("export"):
        main, words = export_generator.main, ("--logdir", log, "--output", tmp_path / f"out{command.split()[1]}")
    else:
        words = train_words(world, tmp_path, clips, "flow_matching", "train.max_iterations=2")
        main, words = train.main, (*words, "--resume", checkpoint) if command == "--resume" else words
    assert str(checkpoint) in refuse(main, tuple(words))
    assert not marker.exists()


def test_a_bomb_in_a_checkpoint_explodes_in_torchs_own_reader(trained, tmp_path, marker):
    checkpoint = shutil.copytree(trained / "checkpoints" / "00000001", tmp_path / "checkpoint")
    bomb_hidden_in_metadata(checkpoint, marker)
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert marker.exists()
    marker.unlink()
    bomb_shards(checkpoint, marker)
    torch.load(next(checkpoint.glob("*.distcp")), weights_only=False)
    assert marker.exists()


# ---- LMDB values ----


@pytest.mark.parametrize("key", ["latents_shape", "prompts_shape", "prompts_0_data", "latents_0_data"])
@pytest.mark.parametrize("kind", ["zip", "pickle", "text pickle"])
def test_a_bomb_in_a_value_of_an_lmdb(world, tmp_path, marker, defuse, key, kind):
    folder = tmp_path / "pairs"
    write_lmdb(folder, ["a"], torch.zeros(1, 5, 6, 16, 4, 4), (5, 6, 16, 4, 4))
    write_sigmas(folder, SIGMAS)
    with lmdb.open(str(folder), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        transaction.put(key.encode(), PICKLES[kind](marker))
    defuse(train.main, *train_words(world, tmp_path, folder, "ode_regression"))


@pytest.mark.parametrize("name", ["sigmas.json", "pairs.json"])
def test_a_bomb_beside_ode_pairs(world, tmp_path, marker, defuse, name):
    folder = tmp_path / "pairs"
    folder.mkdir()
    write_ode_pair(pair_file(folder, 0), "a", torch.zeros(5, 6, 16, 4, 4))
    write_sigmas(folder, SIGMAS)
    (folder / name).write_bytes(PICKLES["pickle"](marker))
    defuse(train.main, *train_words(world, tmp_path, folder, "ode_regression"))


# ---- YAML and JSON ----

TAGS = [
    "!!python/object/apply:os.system ['touch %s']",
    "!!python/object/apply:subprocess.check_output [[touch, '%s']]",
    "!!python/object/new:os.system ['touch %s']",
    "!!python/object/apply:builtins.eval [\"open('%s', 'w')\"]",
    "!!python/object/apply:builtins.exec [\"open('%s', 'w')\"]",
    "!!python/object/apply:builtins.open ['%s', 'w']",
]


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_tags_run_nothing(world, tmp_path, marker, refuse, defuse, tag):
    text, file = tag % marker, tmp_path / "config.yaml"
    for place in ("%s", "model: %s", "model: {base: %s}", "data: {sigmas: [%s]}", "inherit: %s"):
        file.write_text(place.replace("%s", text) + "\n")
        for main in inference.main, train.main:
            refuse(main, ("--config_path", file, "--dry-run"), "is not valid YAML")
    refuse(inference.main, ("--config_path", world.config, "--dry-run", f"model.base={text}"), "not valid YAML")
    assert not marker.exists()
    with contextlib.suppress(TypeError):
        yaml.unsafe_load(text)
    assert marker.exists()


CODE = [
    *({"py/object": "os.system"}, {"py/reduce": [{"py/function": "os.system"}, {"py/tuple": ["touch %s"]}]}),
    *(
        "__import__('os').system('touch %s')",
        {"$eval": "open('%s', 'w')"},
        "!!python/object/apply:os.system ['touch %s']",
    ),
    *("$(touch %s)", "`touch %s`", "; touch %s", "{{ cycler.__init__.__globals__.os.system('touch %s') }}"),
]


TEXTS = "prompt", "prefix"  # of the metadata; the rest are keys of its configuration
PLACES = *TEXTS, "generator", "text_cache", "attention_backend", "negative_prompt"


@pytest.mark.parametrize(
    ("place", "code"),
    [(place, code) for place in PLACES for code in CODE if isinstance(code, str) or place not in TEXTS],
)
def test_code_in_the_metadata_of_a_video_runs_nothing(world, tmp_path, marker, monkeypatch, defuse, code, place):
    monkeypatch.chdir(tmp_path)
    code = json.loads(json.dumps(code).replace("%s", str(marker)))
    config: dict[str, Any] = json.loads(world.config.read_text())
    config["video"]["num_output_frames"] = 3
    content: dict[str, Any] = {"prompt": "a", "name": "a", "sample": 0, "prefix": "", "config": config}
    section = "teacher" if place == "negative_prompt" else "model"
    (content if place in content else config[section])[place] = code
    (tmp_path / "video.json").write_text(json.dumps(content))
    defuse(inference.main, "--config_path", tmp_path / "video.json", "--output_folder", tmp_path / "out")


def test_a_backend_that_downloads_code_is_refused(world, tmp_path, refuse):
    for name in "flash_hub", "_flash_3_hub", "sage_hub":
        words = inference_words(world, tmp_path, f"model.attention_backend={name}")
        refuse(inference.main, words, "would download code and run it")


# ---- model folders ----

CUSTOM = {
    "auto_map": {"AutoConfig": "bomb.Bomb", "AutoModel": "bomb.Bomb", "AutoTokenizer": ["bomb.Bomb", "bomb.Bomb"]}
}
TOKENIZER = {"tokenizer_class": "Bomb", "trust_remote_code": True, **CUSTOM}
FOLDER_FILES: dict[str, dict[str, Any]] = {
    "model_index.json": {"transformer": ["bomb", "Bomb"], "vae": ["bomb", "Bomb"], "text_encoder": ["bomb", "Bomb"]},
    "transformer/config.json": {"_class_name": "Bomb", "_module": "bomb", **CUSTOM},
    "generator/config.json": {"_class_name": "Bomb", "quantization_config": {"quant_method": "bomb"}, **CUSTOM},
    "text_encoder/config.json": {"model_type": "bomb", "architectures": ["Bomb"], "trust_remote_code": True, **CUSTOM},
    "vae/config.json": {"_class_name": "Bomb", "_module": "bomb", **CUSTOM},
    "tokenizer/tokenizer_config.json": TOKENIZER,
    "tokenizer/config.json": {"model_type": "bomb", "trust_remote_code": True, **CUSTOM},
    "tokenizer/special_tokens_map.json": {"eos_token": {"__type": "Bomb", "content": "</s>"}},
}


def plant_module(model: Path, marker: Path) -> None:
    """Write a module that explodes when it is imported into all folders of a model."""
    for folder in (model, *(path for path in model.iterdir() if path.is_dir())):
        for name in "bomb.py", "__init__.py", "sitecustomize.py", "modeling_bomb.py":
            (folder / name).write_text(f"open({str(marker)!r}, 'w').close()\n")


@pytest.mark.parametrize("name", FOLDER_FILES)
def test_custom_classes_of_a_model_folder_are_not_imported(world, tmp_path, marker, monkeypatch, defuse, name):
    monkeypatch.setattr("builtins.input", lambda *prompt: "yes")  # to "Do you wish to run the custom code?"
    model = shutil.copytree(world.model, tmp_path / "model")
    plant_module(model, marker)
    content = json.loads((model / name).read_text()) if (model / name).exists() else {}
    (model / name).write_text(json.dumps(content | FOLDER_FILES[name]))
    monkeypatch.chdir(model)
    words = f"model.base={model}", f"model.generator={model / 'generator'}"
    defuse(inference.main, *inference_words(world, tmp_path, *words))


def test_a_tokenizers_class_explodes_if_remote_code_is_trusted(world, tmp_path, marker, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = shutil.copytree(world.model, tmp_path / "model")
    plant_module(model, marker)
    (model / "tokenizer/tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    with contextlib.suppress(AttributeError, ImportError, OSError, ValueError):
        AutoTokenizer.from_pretrained(model / "tokenizer", trust_remote_code=True)
    assert marker.exists()


# ---- safetensors ----


def odd_header(header: Any, data: bytes = bytes(8)) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "an object type": odd_header({"a": ENTRY | {"dtype": "O"}}),
    "a pickle type": odd_header({"a": ENTRY | {"dtype": "pickle"}}),
    "an expression as type": odd_header({"a": ENTRY | {"dtype": "__import__('os').system('true')"}}),
    "an expression as shape": odd_header({"a": ENTRY | {"shape": ["2*1"]}}),
    "a negative offset": odd_header({"a": ENTRY | {"data_offsets": [-8, 8]}}),
    "offsets beyond the end": odd_header({"a": ENTRY | {"data_offsets": [0, 2**40], "shape": [2**38]}}),
    "overlapping tensors": odd_header({"a": ENTRY, "b": ENTRY}),
    "a huge header": (2**60).to_bytes(8, "little") + b"{}",
    "no JSON": odd_header("pickle"),
    "a list": odd_header([ENTRY]),
    "pickle metadata": odd_header({"__metadata__": {"format": "pickle", "auto_map": "bomb.Bomb"}, "a": ENTRY}),
    "a path as name": odd_header({"../../a": ENTRY}),
    "a dunder as name": odd_header({"__class__.__init__.__globals__": ENTRY}),
}


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize(
    "slot", ["--checkpoint_path g.safetensors", "model.lora=l.safetensors", "--video p.safetensors", "clips"]
)
def test_odd_headers_of_safetensors_are_one_line(world, tmp_path, refuse, slot, header):
    main, *words = SLOTS[slot](world, tmp_path, HEADERS[header])
    assert str(tmp_path) in refuse(main, tuple(words))  # the message names the file


# ---- caches and pictures ----


def test_a_bomb_in_the_cache_of_prompt_embeddings(world, tmp_path, marker, defuse):
    cache = tmp_path / "cache"
    words = inference_words(world, tmp_path, f"model.text_cache={cache}", "--overwrite")
    defuse(inference.main, *words)
    [file] = cache.glob("*.safetensors")
    for data in PICKLES.values():
        file.write_bytes(data(marker))
        defuse(inference.main, *words)
        assert "embedding" in load_file(file)  # encoded again


def test_a_bomb_in_the_cache_of_measurements(tmp_path, marker):
    file = tmp_path / "cache.npz"
    bomb = np.array([Bomb(marker)], dtype=object)
    np.savez(file, pixels=bomb, fps=bomb, whole=bomb)
    assert measurements._load(file) is None and not marker.exists()
    file.with_suffix(".pickle").write_bytes(pickle.dumps(Bomb(marker)))
    assert measurements._load(file.with_suffix(".pickle")) is None and not marker.exists()
    np.load(file, allow_pickle=True)["pixels"]
    assert marker.exists()


def test_a_postscript_picture_is_not_interpreted(world, tmp_path, marker, monkeypatch, refuse):
    """Pillow would start Ghostscript, here a script that explodes."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    lines = "%!PS-Adobe-3.0 EPSF-3.0", "%%BoundingBox: 0 0 8 8", "%%EndComments", "%%EOF"
    picture = tmp_path / "picture.png"
    picture.write_text("\n".join(lines) + "\n")
    refuse(
        inference.main,
        inference_words(world, tmp_path, "--image", picture, "video.num_output_frames=4"),
        "cannot read image",
    )
    assert not marker.exists()
    with contextlib.suppress(OSError), Image.open(picture) as opened:
        opened.load()
    assert marker.exists()
