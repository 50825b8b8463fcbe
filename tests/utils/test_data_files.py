"""utils/clips.py and utils/ode_pairs.py: what training reads from disk.

Claims: what is written comes back, in order; a file that is broken, foreign or of another size is one clear line that
names it; files that are still being written are not read.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from utils.clips import read_clips, write_shard
from utils.errors import UserError
from utils.ode_pairs import pair_file, read_ode_pairs, write_ode_pair

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
    latents, read = read_clips(str(tmp_path))
    assert latents.dtype == torch.float16 and torch.equal(latents, clips.half())
    assert read == captions


@pytest.mark.parametrize("folder", ["", "/nowhere"])
def test_without_clips_it_says_how_to_make_them(folder):
    with pytest.raises(UserError, match="encode_clips"):
        read_clips(folder)


def broken_shards() -> dict[str, bytes | tuple]:
    clips = dict(latents=torch.zeros(2, 2, 4, 3, 3))
    two = json.dumps(["a", "b"])
    return {
        "empty": b"",
        "no safetensors": b"hello",
        "no captions": (clips, None),
        "captions are no list": (clips, {"captions": "3"}),
        "captions are no JSON": (clips, {"captions": "[a"}),
        "too few captions": (clips, {"captions": json.dumps(["a"])}),
        "no latents": (dict(other=torch.zeros(2)), {"captions": two}),
        "other size": (dict(latents=torch.zeros(2, 2, 4, 3, 9)), {"captions": two}),
    }


@pytest.mark.parametrize("kind", broken_shards())
def test_a_broken_shard_is_named(tmp_path, kind):
    write_shard(tmp_path / "00000.safetensors", torch.zeros(1, 2, 4, 3, 3), ["fine"])
    content = broken_shards()[kind]
    if isinstance(content, bytes):
        (tmp_path / "00001.safetensors").write_bytes(content)
    else:
        save_file(content[0], tmp_path / "00001.safetensors", content[1])
    with pytest.raises(UserError, match=r"00001\.safetensors"):
        read_clips(str(tmp_path))


def test_a_shard_that_is_cut_off_is_named(tmp_path):
    file = tmp_path / "00000.safetensors"
    write_shard(file, torch.zeros(4, 2, 4, 3, 3), list("abcd"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"00000\.safetensors"):
        read_clips(str(tmp_path))


# ---- ODE pairs ----


def test_pairs_come_back_in_order_and_in_their_type(tmp_path):
    trajectories = randn(3, POINTS, 2, 4, 3, 3)
    for index in (2, 0, 1):
        write_ode_pair(pair_file(tmp_path, index), f"prompt {index}", trajectories[index])
    (tmp_path / ".00003.99.partial.pt").write_bytes(b"half")
    points, prompts = read_ode_pairs(str(tmp_path), POINTS)
    assert torch.equal(points, trajectories) and points.dtype == torch.float32
    assert prompts == ["prompt 0", "prompt 1", "prompt 2"]


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
        read_ode_pairs(folder, POINTS)


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
        read_ode_pairs(str(tmp_path), POINTS)
    assert "\n" not in str(error.value)


def test_a_pair_that_is_cut_off_is_named(tmp_path):
    file = pair_file(tmp_path, 0)
    write_ode_pair(file, "a", TRAJECTORY[0])
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"00000\.pt"):
        read_ode_pairs(str(tmp_path), POINTS)


def test_another_number_of_points_says_which(tmp_path):
    write_ode_pair(pair_file(tmp_path, 0), "a", TRAJECTORY[0])
    with pytest.raises(UserError, match=r"holds 3 points.*5 levels"):
        read_ode_pairs(str(tmp_path), 5)
