"""Data sets on disk: shards of clips, ODE pairs and LMDBs.

Claims: latents and texts are read back unchanged and in order. A corrupt file, or a file of another kind or size, gives
a one-line error that names it. Files that are still being written are ignored.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import all_clips
from torch import Tensor

from trainer.datasets import lmdb as lmdb_module
from trainer.datasets.clips import open_clips, write_shard
from trainer.datasets.generate_pairs import pair_settings
from trainer.datasets.lmdb import write_lmdb
from trainer.datasets.ode_pairs import (
    check_pair_settings,
    open_ode_pairs,
    pair_file,
    write_ode_pair,
    write_pair_settings,
    write_sigmas,
)
from utils.config import Config
from utils.errors import UserError

POINTS = 3  # saved points of a trajectory
LEVELS = [1.0, 0.5, 0.0]  # their noise levels
CLIP = (2, 4, 3, 3)  # [F, C, h, w]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def assert_error(read: Callable[[], object], message: str) -> None:
    """Assert that `read` raises a UserError of one line that matches `message`."""
    with pytest.raises(UserError, match=message) as error:
        read()
    text = str(error.value)
    del error  # its traceback keeps an LMDB open, which a second test case could not open again
    assert "\n" not in text


# ---- Shards of clips ----


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    clips = randn(5, *CLIP)
    captions = ["ein Würfel", "b, with\nlines", "c", "d", "e"]
    write_shard(tmp_path / "00001.safetensors", clips[3:], captions[3:])
    write_shard(tmp_path / "00000.safetensors", clips[:3], captions[:3])
    (tmp_path / "notes.txt").write_text("not a shard")
    (tmp_path / ".00002.99.partial.safetensors").write_bytes(b"half")
    latents, read = all_clips(str(tmp_path))
    assert latents.dtype == torch.float16 and torch.equal(latents, clips.half())
    assert read == captions


def test_only_requested_clips_are_read(tmp_path):
    clips = randn(5, *CLIP).half()
    for start in range(0, 5, 2):
        write_shard(tmp_path / f"{start}.safetensors", clips[start : start + 2], list("abcde")[start : start + 2])
    opened = open_clips(str(tmp_path))
    (tmp_path / "0.safetensors").unlink()
    assert opened.shape == CLIP and torch.equal(opened.read([4, 2, 3, 3]), clips[[4, 2, 3, 3]])


def test_a_shards_bytes_depend_only_on_its_content(tmp_path):
    for copy in range(16):
        write_shard(tmp_path / f"{copy}.safetensors", randn(1, *CLIP), ["a"], "a VAE")
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("folder", ["", "/nowhere"])
def test_missing_data_names_the_script_that_makes_it(folder):
    assert_error(lambda: all_clips(folder), "encode_clips")
    assert_error(lambda: open_ode_pairs(folder, LEVELS, POINTS), "generate_ode_pairs")


def corrupt_shards() -> dict[str, bytes | tuple]:
    """Contents of shards that must be refused: bytes, or tensors and metadata."""
    clips = dict(latents=torch.zeros(2, *CLIP))

    def metadata(captions: object) -> dict[str, str]:
        return {"clips": json.dumps({"captions": captions, "vae": ""})}

    return {
        "empty": b"",
        "not safetensors": b"hello",
        "no metadata": (clips, None),
        "a bare list of captions": (clips, {"clips": '["a", "b"]'}),
        "captions are a number": (clips, metadata(3)),
        "captions are a string": (clips, metadata("ab")),
        "captions are numbers": (clips, metadata([1, 2])),
        "captions are not JSON": (clips, {"clips": "{a"}),
        "too few captions": (clips, metadata(["a"])),
        "no latents": (dict(other=torch.zeros(2)), metadata(["a", "b"])),
        "other size": (dict(latents=torch.zeros(2, 2, 4, 3, 9)), metadata(["a", "b"])),
        "no axis of frames": (dict(latents=torch.zeros(2, 4, 3, 3)), metadata(["a", "b"])),
    }


@pytest.mark.parametrize("kind", corrupt_shards())
def test_a_corrupt_shard_is_named(tmp_path, kind):
    write_shard(tmp_path / "00000.safetensors", torch.zeros(1, *CLIP), ["fine"])
    content = corrupt_shards()[kind]
    if isinstance(content, bytes):
        (tmp_path / "00001.safetensors").write_bytes(content)
    else:
        save_file(content[0], tmp_path / "00001.safetensors", content[1])
    assert_error(lambda: all_clips(str(tmp_path)), r"00001\.safetensors")


def test_a_truncated_shard_is_named(tmp_path):
    file = tmp_path / "00000.safetensors"
    write_shard(file, torch.zeros(4, *CLIP), list("abcd"))
    file.write_bytes(file.read_bytes()[:-10])
    assert_error(lambda: all_clips(str(tmp_path)), r"00000\.safetensors")


def test_shards_of_two_vaes_are_refused(tmp_path):
    for number, vae in enumerate(("one", "one", "two")):
        write_shard(tmp_path / f"{number}.safetensors", torch.zeros(1, *CLIP), ["fine"], vae)
    message = r"2\.safetensors was encoded by another VAE than .*0\.safetensors"
    assert_error(lambda: all_clips(str(tmp_path)), message)


# ---- .pt files of ODE pairs ----


def test_pairs_keep_their_order_and_type(tmp_path):
    trajectories = randn(3, POINTS, *CLIP)
    for index in (2, 0, 1):
        write_ode_pair(pair_file(tmp_path, index), f"prompt {index}", trajectories[index])
    (tmp_path / ".00003.99.partial.pt").write_bytes(b"half")
    pairs = open_ode_pairs(str(tmp_path), LEVELS, POINTS)
    points = pairs.read(range(3))
    assert torch.equal(points, trajectories) and points.dtype == torch.float32
    assert pairs.prompts == ["prompt 0", "prompt 1", "prompt 2"] and pairs.shape == (POINTS, *CLIP)
    assert torch.equal(pairs.read([2, 0], points=[0, 2]), trajectories[[2, 0]][:, [0, 2]])


def test_a_pair_has_causvids_format(tmp_path):
    file = pair_file(tmp_path, 7)
    write_ode_pair(file, "a prompt", randn(POINTS, *CLIP))
    assert file.name == "00007.pt"
    [(prompt, trajectory)] = torch.load(file, weights_only=True).items()
    assert prompt == "a prompt" and trajectory.shape == (1, POINTS, *CLIP)


def test_a_pairs_bytes_depend_only_on_its_content(tmp_path):
    files = pair_file(tmp_path, 0), pair_file(tmp_path, 1)
    for file in files:
        write_ode_pair(file, "a", randn(POINTS, *CLIP))
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_pair_cut_from_a_batch_is_stored_alone(tmp_path):
    """torch.save writes the whole storage of a view."""
    file = pair_file(tmp_path, 0)
    write_ode_pair(file, "a", randn(1000, POINTS, *CLIP)[0])
    assert file.stat().st_size < 10_000


TRAJECTORY = torch.zeros(1, POINTS, *CLIP)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        {},
        {"a": TRAJECTORY, "b": TRAJECTORY},
        TRAJECTORY,
        {"a": "text"},
        {"a": torch.zeros(())},
        {"a": torch.zeros(1, POINTS, 2, 4, 3, 9)},
        {"a": torch.zeros(1, POINTS + 1, 2, 4, 3, 3)},
        {"a": print},  # a pickle that names code
    ],
    ids=["empty", "text", "no pair", "two pairs", "tensor", "no tensor", "scalar", "other size", "points", "code"],
)
def test_a_corrupt_pair_is_named(tmp_path, content):
    write_ode_pair(pair_file(tmp_path, 0), "fine", TRAJECTORY[0])
    file = pair_file(tmp_path, 1)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    assert_error(lambda: open_ode_pairs(str(tmp_path), LEVELS, POINTS).read([1, 0]), r"00001\.pt")


def test_a_pair_runs_no_code(tmp_path):
    class Bomb(torch.Tensor):
        def __reduce_ex__(self, protocol):
            return Path.touch, (tmp_path / "executed",)

    file = pair_file(tmp_path, 0)
    torch.save({"a": Bomb(TRAJECTORY)}, file)
    assert_error(lambda: open_ode_pairs(str(tmp_path), LEVELS, POINTS), r"00000\.pt is corrupt or not an ODE pair")
    assert not (tmp_path / "executed").exists()
    torch.load(file, weights_only=False)  # the bomb works
    assert (tmp_path / "executed").exists()


def test_a_truncated_pair_is_named(tmp_path):
    file = pair_file(tmp_path, 0)
    write_ode_pair(file, "a", TRAJECTORY[0])
    file.write_bytes(file.read_bytes()[:-100])
    assert_error(lambda: open_ode_pairs(str(tmp_path), LEVELS, POINTS).read([1, 0]), r"00000\.pt")


def test_points_without_matching_noise_levels_are_refused(tmp_path):
    write_ode_pair(pair_file(tmp_path, 0), "a", TRAJECTORY[0])
    for sigmas, points, message in [
        (LEVELS, 5, "have 3 points, but 5 are needed"),
        ([1.0, 0.5], 2, r"3 points; set data\.sigmas"),
        ([], 2, r"3 points; set data\.sigmas"),
    ]:
        assert_error(lambda s=sigmas, p=points: open_ode_pairs(str(tmp_path), s, p), message)
    write_sigmas(tmp_path, LEVELS)
    assert open_ode_pairs(str(tmp_path), [], 2).sigmas == LEVELS


# ---- Settings of ODE pairs ----

SETTINGS = {"runtime.seed": 0, "teacher.guidance_scale": 6.0, "teacher.path": "", "sigmas": LEVELS}


def test_settings_are_written_once(tmp_path):
    check_pair_settings(tmp_path, SETTINGS)
    assert list(tmp_path.iterdir()) == []
    write_pair_settings(tmp_path, SETTINGS)
    assert json.loads((tmp_path / "pairs.json").read_text()) == SETTINGS
    assert json.loads((tmp_path / "sigmas.json").read_text()) == LEVELS
    before = [file.stat().st_mtime_ns for file in sorted(tmp_path.iterdir())]
    write_pair_settings(tmp_path, dict(SETTINGS))
    assert [file.stat().st_mtime_ns for file in sorted(tmp_path.iterdir())] == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runtime.seed": 1}, "pairs of runtime.seed 0, not 1:"),
        ({"runtime.seed": 1, "teacher.path": "x.pt"}, "pairs of runtime.seed 0, not 1:"),  # the first that differs
        ({"teacher.guidance_scale": 3.0}, "pairs of teacher.guidance_scale 6.0, not 3.0:"),
        ({"sigmas": [1.0, 0.0]}, r"pairs of sigmas \[1.0, 0.5, 0.0\], not \[1.0, 0.0\]:"),
        ({"dtype": "float16"}, "pairs of dtype None, not float16:"),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, message):
    write_pair_settings(tmp_path, SETTINGS)
    for function in (check_pair_settings, write_pair_settings):
        with pytest.raises(UserError, match=f"{message} choose another --output_folder, or delete this one"):
            function(tmp_path, SETTINGS | changes)
    assert json.loads((tmp_path / "pairs.json").read_text()) == SETTINGS


def test_the_settings_name_the_teachers_weights(tmp_path):
    """Other weights in the same file are another teacher; other files beside it are not."""

    def weights(path: Path) -> str:
        config = Config()
        config.model.base, config.teacher.path = str(tmp_path / "base"), str(path)
        return pair_settings(config, [1.0, 0.0], "float16")["weights"]

    file, folder = tmp_path / "teacher[1].pt", tmp_path / "folder"
    file.write_bytes(b"one")
    folder.mkdir()
    (folder / "weights.pt").write_bytes(b"one")
    before = weights(file), weights(folder)
    assert before[0] != weights(tmp_path / "none.pt")
    (tmp_path / "teacher1.pt").write_bytes(b"another")
    assert (weights(file), weights(folder)) == before
    file.write_bytes(b"two")
    (folder / "weights.pt").write_bytes(b"two")
    assert weights(file) != before[0] and weights(folder) != before[1]


def test_a_folder_without_settings_is_checked_by_its_noise_levels(tmp_path: Path):
    write_sigmas(tmp_path, LEVELS)
    with pytest.raises(UserError, match="pairs of sigmas"):
        write_pair_settings(tmp_path, SETTINGS | {"sigmas": [1.0, 0.0]})
    assert not (tmp_path / "pairs.json").exists()
    write_pair_settings(tmp_path, SETTINGS)
    assert json.loads((tmp_path / "pairs.json").read_text()) == SETTINGS


@pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
def test_corrupt_settings_are_named(tmp_path, content):
    (tmp_path / "pairs.json").write_text(content)
    assert_error(lambda: check_pair_settings(tmp_path, SETTINGS), r"pairs\.json is not")


# ---- LMDBs ----


@pytest.mark.parametrize("sharded", [False, True])
def test_lmdbs_of_pairs_are_read_back(tmp_path, sharded):
    trajectories = randn(5, POINTS, *CLIP).half()
    prompts = [f"prompt {i} \N{CAT FACE}" for i in range(5)]
    groups = [range(3), range(3, 5)] if sharded else [range(5)]
    for number, group in enumerate(groups):
        folder = tmp_path / f"{number}" if sharded else tmp_path
        write_lmdb(folder, [prompts[i] for i in group], [trajectories[i] for i in group], trajectories.shape[1:])
    pairs = open_ode_pairs(str(tmp_path), LEVELS, POINTS)
    assert pairs.prompts == prompts and len(pairs) == 5
    assert torch.equal(pairs.read([4, 0, 3]), trajectories[[4, 0, 3]])
    assert torch.equal(pairs.read([2], [-1]), trajectories[2:3, -1:])


def test_reading_an_lmdb_writes_nothing(tmp_path):
    """The folder may be read-only, and many machines may read it at once."""
    write_lmdb(tmp_path, ["a"], torch.zeros(1, *CLIP), CLIP)
    (tmp_path / "lock.mdb").unlink(missing_ok=True)
    all_clips(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["data.mdb"]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("axis", [False, True], ids=["clips", "trajectories of one point"])
def test_lmdbs_of_clips_are_read_back(tmp_path, sharded, axis):
    clips = randn(5, *CLIP)
    captions = [f"caption {i} \N{CAT FACE}" for i in range(5)]
    entries = clips[:, None] if axis else clips
    for number, group in enumerate([slice(0, 3), slice(3, 5)] if sharded else [slice(0, 5)]):
        folder = tmp_path / f"{number}" if sharded else tmp_path
        write_lmdb(folder, captions[group], entries[group], entries.shape[1:])
    if sharded:
        write_lmdb(tmp_path / ".2.99.partial", ["half"], clips[:1], clips.shape[1:])
    latents, read = all_clips(str(tmp_path))
    assert latents.dtype == torch.float16 and torch.equal(latents, clips.half())
    assert read == captions


def test_an_lmdb_has_self_forcings_keys(tmp_path):
    import lmdb

    write_lmdb(tmp_path, ["a cat"], randn(1, POINTS, *CLIP), (POINTS, *CLIP))
    with lmdb.open(str(tmp_path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        entries = dict(transaction.cursor())
    assert entries[b"latents_shape"] == b"1 3 2 4 3 3" and entries[b"prompts_shape"] == b"1"
    assert entries[b"prompts_0_data"] == b"a cat" and len(entries[b"latents_0_data"]) == 2 * POINTS * 2 * 4 * 3 * 3


def test_pairs_are_not_clips_and_clips_are_not_pairs(tmp_path):
    write_lmdb(tmp_path / "pairs", ["a"], TRAJECTORY, TRAJECTORY.shape[1:])
    message = r"pairs holds ODE pairs \(trajectories of 3 points\), not clips"
    assert_error(lambda: all_clips(str(tmp_path / "pairs")), message)
    write_lmdb(tmp_path / "clips", ["a"], TRAJECTORY[0, :1], CLIP)
    for sigmas in (LEVELS, [0.0], []):
        message = "clips holds clips, not ODE pairs"
        assert_error(lambda s=sigmas: open_ode_pairs(str(tmp_path / "clips"), s, 1), message)


CORRUPT_ENTRIES = {
    "truncated latents": {"latents_1_data": bytes(10)},
    "an odd number of bytes": {"latents_1_data": bytes(2 * 72 - 1)},
    "missing latents": {"latents_1_data": None},
    "missing prompt": {"prompts_1_data": None},
    "prompt is not UTF-8": {"prompts_1_data": b"\xff\xfe"},
    "shape is not a list of integers": {"latents_shape": b"two 2 4 3 3"},
    "empty shape": {"latents_shape": b""},
    "too few integers in the shape": {"latents_shape": b"2 4 3 3"},
    "missing shape, as in an unfinished LMDB": {"latents_shape": None},
    "no entries": {"latents_shape": b"0 2 4 3 3"},
}


@pytest.mark.parametrize("kind", CORRUPT_ENTRIES)
def test_a_corrupt_lmdb_is_named(tmp_path, kind):
    import lmdb

    write_lmdb(tmp_path / "clips", ["a", "b"], torch.zeros(2, *CLIP), CLIP)
    with lmdb.open(str(tmp_path / "clips")) as environment, environment.begin(write=True) as transaction:
        for name, value in CORRUPT_ENTRIES[kind].items():
            transaction.delete(name.encode()) if value is None else transaction.put(name.encode(), value)
    assert_error(lambda: all_clips(str(tmp_path / "clips")), f"{tmp_path}/clips")


def test_a_file_that_is_not_a_latent_lmdb_is_named(tmp_path):
    import lmdb

    (tmp_path / "junk").mkdir()
    (tmp_path / "junk/data.mdb").write_bytes(b"junk" * 5000)
    assert_error(lambda: open_ode_pairs(str(tmp_path / "junk"), LEVELS, POINTS), "cannot open the LMDB")
    with lmdb.open(str(tmp_path / "other")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"something", b"else")
    assert_error(lambda: open_ode_pairs(str(tmp_path / "other"), LEVELS, POINTS), "has no key latents_shape")


def test_a_full_disk_ends_an_lmdb_with_one_line(tmp_path, monkeypatch):
    arguments = (["a", "b"], torch.zeros(2, *CLIP), CLIP)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
        assert_error(
            lambda: write_lmdb(tmp_path / "a", *arguments), r"needs at least 0\.1 MB, but the disk has 0\.0 MB"
        )
    assert not (tmp_path / "a").exists()
    open_environment = lmdb_module._open_environment
    monkeypatch.setattr(lmdb_module, "_open_environment", lambda path, size: open_environment(path, 4096))
    assert_error(lambda: write_lmdb(tmp_path / "a", *arguments), r"cannot write an LMDB to .*check that the disk")


def test_a_truncated_lmdb_is_named(tmp_path):
    """Reading beyond the end of the file would kill the process with SIGBUS."""
    write_lmdb(tmp_path / "a", list("abcd"), torch.zeros(4, 20, 16, 16, 16), (20, 16, 16, 16))
    file = tmp_path / "a/data.mdb"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for path in (tmp_path / "a", tmp_path):
        assert_error(lambda p=path: all_clips(str(p)), "a is truncated")


def test_an_lmdb_with_damaged_pages_is_named(tmp_path):
    write_lmdb(tmp_path, list("abcd"), torch.zeros(4, 20, 16, 16, 16), (20, 16, 16, 16))
    with (tmp_path / "data.mdb").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(3 * 4096)
        file.write(bytes(size - 3 * 4096))
    assert_error(lambda: all_clips(str(tmp_path)), "is corrupt")


def test_lmdbs_of_different_sizes_are_refused(tmp_path):
    for width in (3, 4):
        write_lmdb(tmp_path / f"{width}", ["a"], torch.zeros(1, 2, 4, 3, width), (2, 4, 3, width))
    assert_error(lambda: all_clips(str(tmp_path)), "latents of different sizes")
