"""model/downloads.py, utils/download_manifest.py: a download can be repeated exactly; changed files are errors."""

import json
import os
import re

import pytest
import torch
from hub_server import Hub
from safetensors.torch import save

from model import downloads
from model.downloads import Download, fetch_weights
from model.weight_files import read_lora, read_state
from model.weights import ModelDirectory
from scripts import download_weights
from utils import download_manifest
from utils.download_manifest import check_download, check_loaded, manifest_path
from utils.errors import UserError
from utils.prompts import read_prompts

WEIGHTS = save({"x": torch.arange(4.0)})
OTHER_WEIGHTS = save({"x": torch.arange(1, 5.0)})  # of the same size
CONFIG = b'{"dim": 1, "ffn_dim": 1, "num_heads": 1}'
FOLDER = Download("lab/model", "models/m", "MIT")
FILE = Download("lab/model", "ckpts/w.safetensors", "MIT", "part/w.safetensors")
PROMPTS = Download("lab/model", "prompts/p.txt", "MIT", "*prompts.txt")


@pytest.fixture
def hub(monkeypatch):
    """A hub with one commit of the repository lab/model."""
    hub = Hub("lab/model")
    hub.commit(config_json=CONFIG, part__w_safetensors=WEIGHTS, other_bin=b"not wanted", some__prompts_txt=b"a cat\n")
    hub.redirect_huggingface(monkeypatch)
    for name, item in {"folder": FOLDER, "file": FILE, "prompts": PROMPTS}.items():
        monkeypatch.setitem(downloads.DOWNLOADS, name, item)
    yield hub
    hub.close()


def manifest(target) -> dict:
    return json.loads(manifest_path(target).read_text())


# ---- Downloading ----


def test_a_folder_gets_a_manifest(hub, tmp_path):
    folder = fetch_weights(FOLDER, tmp_path)
    assert (folder / "part/w.safetensors").read_bytes() == WEIGHTS and not (folder / "other.bin").exists()
    stored = manifest(folder)
    assert manifest_path(folder) == tmp_path / "models/m.manifest.json"
    assert stored["repo"] == "lab/model" and stored["revision"] == hub.branches["main"]
    assert set(stored["files"]) == {"config.json", "part/w.safetensors", "some/prompts.txt"}
    assert stored["files"]["config.json"] == {
        "size": len(CONFIG),
        "sha256": __import__("hashlib").sha256(CONFIG).hexdigest(),
    }


@pytest.mark.parametrize(("item", "content"), [(FILE, WEIGHTS), (PROMPTS, b"a cat\n")])
def test_a_file_gets_a_manifest(hub, tmp_path, item, content):
    path = fetch_weights(item, tmp_path)
    assert path.read_bytes() == content and manifest(path)["revision"] == hub.branches["main"]
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.manifest.json"]


@pytest.mark.parametrize("item", [FOLDER, FILE])
def test_a_complete_download_is_compared_without_the_hub(hub, tmp_path, item):
    path = fetch_weights(item, tmp_path)
    hub.requests.clear()
    assert fetch_weights(item, tmp_path) == path and not hub.requests
    weights = path / "part/w.safetensors" if path.is_dir() else path
    weights.write_bytes(OTHER_WEIGHTS)
    with pytest.raises(UserError, match=r"w\.safetensors is not the downloaded file: its sha256 is"):
        fetch_weights(item, tmp_path)


@pytest.mark.parametrize("item", [FOLDER, FILE])
def test_a_manifest_pins_the_revision(hub, tmp_path, item):
    """With the manifest alone, another machine downloads the old revision, though the branch has moved."""
    path, old = fetch_weights(item, tmp_path / "here"), hub.branches["main"]
    there = manifest_path(tmp_path / "there" / item.destination)
    there.parent.mkdir(parents=True)
    there.write_bytes(manifest_path(path).read_bytes())
    hub.commit(config_json=CONFIG, part__w_safetensors=OTHER_WEIGHTS)
    copy = fetch_weights(item, tmp_path / "there")
    weights = copy / "part/w.safetensors" if copy.is_dir() else copy
    assert weights.read_bytes() == WEIGHTS and manifest(copy)["revision"] == old
    newest = fetch_weights(item, tmp_path / "new")
    assert manifest(newest)["revision"] == hub.branches["main"] != old


@pytest.mark.parametrize("item", [FOLDER, FILE])
def test_another_content_of_the_locked_revision_is_an_error(hub, tmp_path, item):
    path = tmp_path / item.destination
    path.parent.mkdir(parents=True)
    fetch_weights(item, tmp_path / "first")
    stored = manifest(tmp_path / "first" / item.destination)
    stored["files"]["part/w.safetensors"]["sha256"] = "0" * 64
    manifest_path(path).write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"w\.safetensors has sha256 .*, not 0000"):
        fetch_weights(item, tmp_path)
    assert manifest(path) == stored and not path.is_file()


def test_content_that_differs_from_the_hubs_own_hash_is_an_error(hub, tmp_path):
    hub.wrong_content["part/w.safetensors"] = OTHER_WEIGHTS
    with pytest.raises(UserError, match=r"w\.safetensors has sha256"):
        fetch_weights(FILE, tmp_path)
    assert not (tmp_path / FILE.destination).exists() and not manifest_path(tmp_path / FILE.destination).exists()


@pytest.mark.parametrize("item", [FOLDER, FILE])
def test_revision_chooses_a_commit_branch_or_tag(hub, tmp_path, item):
    old = hub.branches["tag"] = hub.branches["main"]
    new = hub.commit(config_json=CONFIG, part__w_safetensors=OTHER_WEIGHTS)
    for number, revision in enumerate((old, "tag")):
        assert manifest(fetch_weights(item, tmp_path / str(number), revision))["revision"] == old
        assert fetch_weights(item, tmp_path / str(number), revision)  # again
    assert manifest(fetch_weights(item, tmp_path / "new", "main"))["revision"] == new
    with pytest.raises(UserError, match=f"pins revision {new}, but tag is {old}"):
        fetch_weights(item, tmp_path / "new", "tag")
    with pytest.raises(UserError, match="has no revision absent"):
        fetch_weights(item, tmp_path / "absent", "absent")


def test_a_file_without_a_manifest_is_kept(hub, tmp_path):
    path = tmp_path / FILE.destination
    path.parent.mkdir()
    path.write_bytes(b"downloaded by hand")
    assert fetch_weights(FILE, tmp_path) == path and path.read_bytes() == b"downloaded by hand"
    assert not manifest_path(path).exists() and not hub.requests
    with pytest.raises(UserError, match="without a manifest"):
        fetch_weights(FILE, tmp_path, "main")


def test_a_pipe_at_the_destination_is_refused(hub, tmp_path):
    target = tmp_path / FILE.destination
    target.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(target)
    with pytest.raises(UserError, match="it is no ordinary file"):
        fetch_weights(FILE, tmp_path)
    assert target.is_fifo()


def test_a_planted_link_at_the_staging_folder_is_refused(hub, tmp_path):
    (tmp_path / "ckpts").mkdir()
    (tmp_path / "valuable").mkdir()
    (tmp_path / "ckpts/.w.safetensors.download").symlink_to(tmp_path / "valuable")
    with pytest.raises(UserError, match="is a symbolic link"):
        fetch_weights(FILE, tmp_path)
    assert not list((tmp_path / "valuable").iterdir())


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Download("lab/absent", "a", "MIT"), "does not exist, or you have no access"),
        (Download("lab/model", "a", "MIT", "absent.pt"), "has no file absent.pt"),
        (Download("lab/model/part", "a", "MIT"), "cannot download .*lab/model/part: Repo id must be in the form"),
    ],
)
def test_absent_repositories_and_files_are_errors(hub, tmp_path, item, message):
    with pytest.raises(UserError, match=message):
        fetch_weights(item, tmp_path)


def test_no_network_is_an_error(hub, tmp_path):
    hub.close()
    with pytest.raises(UserError, match="check the network"):
        fetch_weights(FOLDER, tmp_path)


# ---- The script ----


def test_the_table_of_downloads_is_aligned(monkeypatch):
    long = Download("laboratory/model", "models/long", "Apache-2.0")
    monkeypatch.setattr(downloads, "DOWNLOADS", {"a": FOLDER, "longer": long})
    assert downloads.downloads_table().splitlines() == [
        "name    repository        destination  licence",
        "a       lab/model         models/m     MIT",
        "longer  laboratory/model  models/long  Apache-2.0",
    ]


def test_the_script_downloads_checks_and_pins(hub, tmp_path, call):
    code, out, _ = call(download_weights, "file", "folder", "--root", tmp_path)
    assert code == 0 and "file: " in out and "licence: MIT" in out
    code, out, _ = call(download_weights, "--check", "file", "folder", "--root", tmp_path)
    assert code == 0 and out.count("all files are those of the manifest") == 2
    (tmp_path / "models/m/config.json").write_bytes(CONFIG + b" ")
    code, _, err = call(download_weights, "--check", "folder", "--root", tmp_path)
    assert code == 2 and "config.json is not the downloaded file: it has" in err
    (tmp_path / "models/m/config.json").unlink()
    code, _, err = call(download_weights, "--check", "folder", "--root", tmp_path)
    assert code == 2 and "config.json is missing" in err
    code, _, err = call(download_weights, "--check", "prompts", "--root", tmp_path)
    assert code == 2 and "has no manifest" in err
    for words in ("file", "folder"), ("file", "--check"):
        code, _, err = call(download_weights, *words, "--revision", "main", "--root", tmp_path)
        assert code == 2 and "--revision needs exactly one NAME" in err
    code, _, err = call(download_weights, "file", "--revision", "absent", "--root", tmp_path)
    assert code == 2 and "has no revision absent" in err


# ---- Loading ----


def test_loading_compares_files_with_the_manifest(hub, tmp_path):
    folder, file, prompts = (fetch_weights(item, tmp_path) for item in (FOLDER, FILE, PROMPTS))
    ModelDirectory.open(folder), read_state(file), read_state(folder / "part"), read_prompts(prompts)
    (folder / "config.json").write_bytes(CONFIG.replace(b"1", b"2"))
    with pytest.raises(UserError, match=r"config\.json is not the downloaded file: its sha256"):
        ModelDirectory.open(folder)
    read_state(folder / "part")  # only files that are loaded are compared
    (folder / "part/w.safetensors").write_bytes(OTHER_WEIGHTS)
    for path in folder / "part", folder / "part/w.safetensors":
        with pytest.raises(UserError, match=r"w\.safetensors is not the downloaded file: its sha256"):
            read_state(path)
    file.write_bytes(WEIGHTS + b"x")
    with pytest.raises(UserError, match=r"it has \d+ bytes, not \d+"):
        read_state(file)
    prompts.write_text("a dog\n")
    with pytest.raises(UserError, match="is not the downloaded file"):
        read_prompts(prompts)
    manifest_path(prompts).unlink()
    assert read_prompts(prompts)[0].text == "a dog"


def test_loading_compares_a_lora_file_with_the_manifest(hub, tmp_path):
    file = fetch_weights(FILE, tmp_path)
    assert read_lora(file).keys() == {"x"}
    file.write_bytes(OTHER_WEIGHTS)
    with pytest.raises(UserError, match="is not the downloaded file"):
        read_lora(file)


def test_large_files_are_hashed_if_they_changed_after_the_manifest(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download_manifest, "SMALL_BYTES", 10)
    file = fetch_weights(FILE, tmp_path)
    locked_at = manifest_path(file).stat().st_mtime_ns
    file.write_bytes(OTHER_WEIGHTS)
    os.utime(file, ns=(locked_at + 1, locked_at + 1))
    with pytest.raises(UserError, match="its sha256 is"):
        check_loaded(file)
    os.utime(file, ns=(locked_at - 1, locked_at - 1))
    check_loaded(file)  # only the size is compared
    with pytest.raises(UserError, match="its sha256 is"):
        check_download(file)


def test_check_lets_copied_files_load_without_hashing(hub, tmp_path, monkeypatch):
    file = fetch_weights(FILE, tmp_path)
    os.utime(manifest_path(file), (0, 0))
    check_download(file)
    assert manifest_path(file).stat().st_mtime_ns >= file.stat().st_mtime_ns


HEAD = '{"repo": "a", "revision": "b", "files": '


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", "null", '{"repo": "a", "revision": "b"}', HEAD + "[]}", HEAD + "{}}", HEAD + '{"w": 3}}'),
        *(HEAD + '{"w": {"size": "x", "sha256": "y"}}}', HEAD + '{"w": {"size": 1}}}'),
    ],
)
def test_a_broken_manifest_is_one_error(tmp_path, content):
    (tmp_path / "w.pt").write_bytes(b"")
    (tmp_path / "w.pt.manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest of a download"):
        check_loaded(tmp_path / "w.pt")


def test_a_manifest_under_its_older_name_is_read(hub, tmp_path):
    path = fetch_weights(FILE, tmp_path)
    older = manifest_path(path).rename(path.with_name(f"{path.name}.lock.json"))
    assert manifest_path(path) == older and fetch_weights(FILE, tmp_path) == path
    path.write_bytes(b"changed")
    with pytest.raises(UserError, match=re.escape(f"delete {older}")):
        check_loaded(path)
