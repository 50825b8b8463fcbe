"""trainer/datasets/clips.py and trainer/datasets/ode_pairs.py: what training reads from disk.

Claims: what is written comes back, in order; a file that is broken, foreign or of another size is one clear line that
names it; files that are still being written are not read.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import all_clips
from torch import Tensor

from trainer.datasets.clips import open_clips, write_shard
from trainer.datasets.ode_pairs import (
    check_origin,
    open_ode_pairs,
    pair_file,
    write_lmdb,
    write_ode_pair,
    write_origin,
    write_sigmas,
)
from utils.errors import UserError

POINTS = 3  # saved points of a trajectory


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# ---- clips ----


def test_shards_come_back_in_the_order_of_their_names(tmp_path):
    clips = randn(5, 2, 4, 3, 3)
    captions = ["ein Würfel", "b, with\nlines", "c", "d", "e"]
    write_shard(tmp_path / "00001.safetensors", clips[3:], captions[3:])
    write_shard(tmp_path / "00000.safetensors", clips[:3], captions[:3])
    (tmp_path / "notes.txt").write_text("not a shard")
    (tmp_path / ".00002.99.partial.safetensors").write_bytes(b"half")
    latents, read = all_clips(str(tmp_path))
    assert latents.dtype == torch.float16 and torch.equal(latents, clips.half())
    assert read == captions


def test_clips_are_read_one_by_one(tmp_path):
    clips = randn(5, 2, 4, 3, 3).half()
    for start in range(0, 5, 2):
        write_shard(tmp_path / f"{start}.safetensors", clips[start : start + 2], list("abcde")[start : start + 2])
    opened = open_clips(str(tmp_path))
    (tmp_path / "0.safetensors").unlink()  # what is not asked for is not read
    assert opened.shape == (2, 4, 3, 3) and torch.equal(opened.read([4, 2, 3, 3]), clips[[4, 2, 3, 3]])


def test_the_same_clips_are_the_same_bytes(tmp_path):
    for copy in range(16):
        write_shard(tmp_path / f"{copy}.safetensors", randn(1, 2, 4, 3, 3), ["a"], "a VAE")
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("folder", ["", "/nowhere"])
def test_without_clips_it_says_how_to_make_them(folder):
    with pytest.raises(UserError, match="encode_clips"):
        all_clips(folder)


def broken_shards() -> dict[str, bytes | tuple]:
    clips = dict(latents=torch.zeros(2, 2, 4, 3, 3))

    def named(captions: object) -> dict[str, str]:
        return {"clips": json.dumps({"captions": captions, "vae": ""})}

    return {
        "empty": b"",
        "no safetensors": b"hello",
        "no captions": (clips, None),
        "captions without a name": (clips, {"clips": '["a", "b"]'}),
        "captions are no list": (clips, named(3)),
        "captions are a text": (clips, named("ab")),
        "captions are no texts": (clips, named([1, 2])),
        "captions are no JSON": (clips, {"clips": "{a"}),
        "too few captions": (clips, named(["a"])),
        "no latents": (dict(other=torch.zeros(2)), named(["a", "b"])),
        "other size": (dict(latents=torch.zeros(2, 2, 4, 3, 9)), named(["a", "b"])),
        "a single clip": (dict(latents=torch.zeros(2, 4, 3, 3)), named(["a", "b"])),
    }


def test_shards_of_two_vaes_are_not_mixed(tmp_path):
    for number, vae in enumerate(("one", "one", "two")):
        write_shard(tmp_path / f"{number}.safetensors", torch.zeros(1, 2, 4, 3, 3), ["fine"], vae)
    with pytest.raises(UserError, match=r"2\.safetensors was encoded by another VAE than .*0\.safetensors"):
        all_clips(str(tmp_path))


@pytest.mark.parametrize("kind", broken_shards())
def test_a_broken_shard_is_named(tmp_path, kind):
    write_shard(tmp_path / "00000.safetensors", torch.zeros(1, 2, 4, 3, 3), ["fine"])
    content = broken_shards()[kind]
    if isinstance(content, bytes):
        (tmp_path / "00001.safetensors").write_bytes(content)
    else:
        save_file(content[0], tmp_path / "00001.safetensors", content[1])
    with pytest.raises(UserError, match=r"00001\.safetensors"):
        all_clips(str(tmp_path))


def test_a_shard_that_is_cut_off_is_named(tmp_path):
    file = tmp_path / "00000.safetensors"
    write_shard(file, torch.zeros(4, 2, 4, 3, 3), list("abcd"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"00000\.safetensors"):
        all_clips(str(tmp_path))


# ---- clips in LMDBs ----


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("axis", [False, True], ids=["clips", "one point"])
def test_clips_come_back_from_lmdbs(tmp_path, sharded, axis):
    """Also where they are written as trajectories of one point."""
    clips = randn(5, 2, 4, 3, 3)
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


def test_pairs_are_no_clips_and_clips_no_pairs(tmp_path):
    write_lmdb(tmp_path / "pairs", ["a"], TRAJECTORY, TRAJECTORY.shape[1:])
    with pytest.raises(UserError, match=r"pairs holds ODE pairs \(trajectories of 3 points\), not clips"):
        all_clips(str(tmp_path / "pairs"))
    write_lmdb(tmp_path / "clips", ["a"], TRAJECTORY[0, :1], TRAJECTORY.shape[2:])
    for sigmas in (LEVELS, [0.0], []):
        with pytest.raises(UserError, match="clips holds clips, not ODE pairs"):
            open_ode_pairs(str(tmp_path / "clips"), sigmas, 1)


def broken_entries() -> dict[str, dict[str, bytes | None]]:
    return {
        "latents_1_data is cut off": {"latents_1_data": bytes(10)},
        "latents_1_data has half a number": {"latents_1_data": bytes(2 * 72 - 1)},
        "no latents_1_data": {"latents_1_data": None},
        "no prompts_1_data": {"prompts_1_data": None},
        "prompts_1_data is not UTF-8": {"prompts_1_data": b"\xff\xfe"},
        "latents_shape is no list of numbers": {"latents_shape": b"two 2 4 3 3"},
        "latents_shape says nothing": {"latents_shape": b""},
        "latents_shape has too few numbers": {"latents_shape": b"2 4 3 3"},
        "no latents_shape, as while it is written": {"latents_shape": None},
        "nothing in it": {"latents_shape": b"0 2 4 3 3"},
    }


@pytest.mark.parametrize("kind", broken_entries())
def test_a_broken_lmdb_of_clips_is_named(tmp_path, kind):
    import lmdb

    write_lmdb(tmp_path / "clips", ["a", "b"], torch.zeros(2, 2, 4, 3, 3), (2, 4, 3, 3))
    with lmdb.open(str(tmp_path / "clips")) as environment, environment.begin(write=True) as transaction:
        for name, value in broken_entries()[kind].items():
            transaction.delete(name.encode()) if value is None else transaction.put(name.encode(), value)
    with pytest.raises(UserError, match=f"{tmp_path}/clips") as error:
        all_clips(str(tmp_path / "clips"))
    assert "\n" not in str(error.value)


def test_an_lmdb_that_is_cut_off_is_named(tmp_path):
    """Reading on would end the process by SIGBUS."""
    write_lmdb(tmp_path / "a", list("abcd"), torch.zeros(4, 20, 16, 16, 16), (20, 16, 16, 16))
    file = tmp_path / "a/data.mdb"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for path in (tmp_path / "a", tmp_path):
        with pytest.raises(UserError, match="a is cut off"):
            all_clips(str(path))


def test_an_lmdb_with_damaged_pages_is_named(tmp_path):
    write_lmdb(tmp_path, list("abcd"), torch.zeros(4, 20, 16, 16, 16), (20, 16, 16, 16))
    with (tmp_path / "data.mdb").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(3 * 4096)
        file.write(bytes(size - 3 * 4096))
    with pytest.raises(UserError, match="is broken"):
        all_clips(str(tmp_path))


def test_lmdbs_of_clips_of_other_sizes_are_refused(tmp_path):
    for width in (3, 4):
        write_lmdb(tmp_path / f"{width}", ["a"], torch.zeros(1, 2, 4, 3, width), (2, 4, 3, width))
    with pytest.raises(UserError, match="latents of different sizes"):
        all_clips(str(tmp_path))


# ---- ODE pairs ----


def test_pairs_come_back_in_order_and_in_their_type(tmp_path):
    trajectories = randn(3, POINTS, 2, 4, 3, 3)
    for index in (2, 0, 1):
        write_ode_pair(pair_file(tmp_path, index), f"prompt {index}", trajectories[index])
    (tmp_path / ".00003.99.partial.pt").write_bytes(b"half")
    pairs = open_ode_pairs(str(tmp_path), LEVELS, POINTS)
    points = pairs.read(range(3))
    assert torch.equal(points, trajectories) and points.dtype == torch.float32
    assert pairs.prompts == ["prompt 0", "prompt 1", "prompt 2"] and pairs.shape == (POINTS, 2, 4, 3, 3)
    assert torch.equal(pairs.read([2, 0], points=[0, 2]), trajectories[[2, 0]][:, [0, 2]])


def test_a_pair_is_what_causvid_reads(tmp_path):
    points = randn(POINTS, 2, 4, 3, 3)
    file = pair_file(tmp_path, 7)
    write_ode_pair(file, "a prompt", points)
    assert file.name == "00007.pt"
    [(prompt, trajectory)] = torch.load(file, weights_only=True).items()
    assert prompt == "a prompt" and trajectory.shape == (1, POINTS, 2, 4, 3, 3)


def test_a_slice_of_a_batch_is_stored_alone(tmp_path):
    """torch.save writes the whole storage behind a view."""
    file = pair_file(tmp_path, 0)
    write_ode_pair(file, "a", randn(1000, POINTS, 2, 4, 3, 3)[0])
    assert file.stat().st_size < 10_000


@pytest.mark.parametrize("folder", ["", "/nowhere"])
def test_without_pairs_it_says_how_to_make_them(folder):
    with pytest.raises(UserError, match="generate_ode_pairs"):
        open_ode_pairs(folder, LEVELS, POINTS)


LEVELS = [1.0, 0.5, 0.0]
TRAJECTORY = torch.zeros(1, POINTS, 2, 4, 3, 3)


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
def test_a_broken_pair_is_named(tmp_path, content):
    write_ode_pair(pair_file(tmp_path, 0), "fine", TRAJECTORY[0])
    file = pair_file(tmp_path, 1)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(UserError, match=r"00001\.pt") as error:
        open_ode_pairs(str(tmp_path), LEVELS, POINTS).read([1, 0])
    assert "\n" not in str(error.value)


def test_a_pair_that_is_cut_off_is_named(tmp_path):
    file = pair_file(tmp_path, 0)
    write_ode_pair(file, "a", TRAJECTORY[0])
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"00000\.pt"):
        open_ode_pairs(str(tmp_path), LEVELS, POINTS).read([1, 0])


def test_another_number_of_points_says_which(tmp_path):
    write_ode_pair(pair_file(tmp_path, 0), "a", TRAJECTORY[0])
    with pytest.raises(UserError, match=r"hold 3 points, but 5 are needed"):
        open_ode_pairs(str(tmp_path), LEVELS, 5)
    with pytest.raises(UserError, match=r"3 points: set data\.sigmas"):
        open_ode_pairs(str(tmp_path), [1.0, 0.5], 2)
    with pytest.raises(UserError, match=r"3 points: set data\.sigmas"):
        open_ode_pairs(str(tmp_path), [], 2)
    write_sigmas(tmp_path, LEVELS)
    assert open_ode_pairs(str(tmp_path), [], 2).sigmas == LEVELS


# ---- What made them ----

ORIGIN = {"runtime.seed": 0, "teacher.guidance_scale": 6.0, "teacher.path": "", "sigmas": LEVELS}


def test_a_folder_remembers_what_made_its_pairs(tmp_path):
    check_origin(tmp_path, ORIGIN)
    assert list(tmp_path.iterdir()) == []
    write_origin(tmp_path, ORIGIN)
    assert json.loads((tmp_path / "pairs.json").read_text()) == ORIGIN
    assert json.loads((tmp_path / "sigmas.json").read_text()) == LEVELS
    before = [file.stat().st_mtime_ns for file in sorted(tmp_path.iterdir())]
    write_origin(tmp_path, dict(ORIGIN))
    assert [file.stat().st_mtime_ns for file in sorted(tmp_path.iterdir())] == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"runtime.seed": 1}, "pairs of runtime.seed 0, not 1:"),
        ({"runtime.seed": 1, "teacher.path": "x.pt"}, "pairs of runtime.seed 0, not 1:"),  # the first
        ({"teacher.guidance_scale": 3.0}, "pairs of teacher.guidance_scale 6.0, not 3.0:"),
        ({"sigmas": [1.0, 0.0]}, r"pairs of sigmas \[1.0, 0.5, 0.0\], not \[1.0, 0.0\]:"),
        ({"dtype": "float16"}, "pairs of dtype None, not float16:"),
    ],
)
def test_another_origin_is_refused(tmp_path, changes, says):
    write_origin(tmp_path, ORIGIN)
    for function in (check_origin, write_origin):
        with pytest.raises(UserError, match=f"{says} choose another --output_folder, or delete this one"):
            function(tmp_path, ORIGIN | changes)
    assert json.loads((tmp_path / "pairs.json").read_text()) == ORIGIN


def test_folders_that_do_not_say_what_made_them_go_on(tmp_path: Path):
    write_sigmas(tmp_path, LEVELS)
    with pytest.raises(UserError, match="pairs of sigmas"):
        write_origin(tmp_path, ORIGIN | {"sigmas": [1.0, 0.0]})
    assert not (tmp_path / "pairs.json").exists()
    write_origin(tmp_path, ORIGIN)
    assert json.loads((tmp_path / "pairs.json").read_text()) == ORIGIN


@pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
def test_a_broken_note_is_named(tmp_path, content):
    (tmp_path / "pairs.json").write_text(content)
    with pytest.raises(UserError, match=r"pairs\.json is broken"):
        check_origin(tmp_path, ORIGIN)


# ---- LMDBs ----


@pytest.mark.parametrize("sharded", [False, True])
def test_lmdbs_come_back_as_they_were_written(tmp_path, sharded):
    trajectories = randn(5, POINTS, 2, 4, 3, 3).half()
    prompts = [f"prompt {i} \N{CAT FACE}" for i in range(5)]
    groups = [range(3), range(3, 5)] if sharded else [range(5)]
    for number, group in enumerate(groups):
        folder = tmp_path / f"{number}" if sharded else tmp_path
        write_lmdb(folder, [prompts[i] for i in group], [trajectories[i] for i in group], trajectories.shape[1:])
    pairs = open_ode_pairs(str(tmp_path), LEVELS, POINTS)
    assert pairs.prompts == prompts and len(pairs) == 5
    assert torch.equal(pairs.read([4, 0, 3]), trajectories[[4, 0, 3]])
    assert torch.equal(pairs.read([2], [-1]), trajectories[2:3, -1:])


def test_an_lmdb_has_the_entries_that_others_read(tmp_path):
    import lmdb

    write_lmdb(tmp_path, ["a cat"], randn(1, POINTS, 2, 4, 3, 3), (POINTS, 2, 4, 3, 3))
    with lmdb.open(str(tmp_path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        entries = dict(transaction.cursor())
    assert entries[b"latents_shape"] == b"1 3 2 4 3 3" and entries[b"prompts_shape"] == b"1"
    assert entries[b"prompts_0_data"] == b"a cat" and len(entries[b"latents_0_data"]) == 2 * POINTS * 2 * 4 * 3 * 3


def test_what_is_wrong_with_an_lmdb_is_said(tmp_path):
    import lmdb

    (tmp_path / "junk").mkdir()
    (tmp_path / "junk/data.mdb").write_bytes(b"junk" * 5000)
    with pytest.raises(UserError, match="cannot open the LMDB"):
        open_ode_pairs(str(tmp_path / "junk"), LEVELS, POINTS)
    with lmdb.open(str(tmp_path / "other")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"something", b"else")
    with pytest.raises(UserError, match="has no entry latents_shape"):
        open_ode_pairs(str(tmp_path / "other"), LEVELS, POINTS)
