"""pipeline/prompt_track.py, --prompt_track and the argument prompt_track.

Claims: files and mappings are read as documented, mistakes are one-line errors, times become blocks, and a video with a
track is the same from the command line, from Python, from a stream, live and from its metadata.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline import TextToVideo, prompt_track
from pipeline.build_track import build_track
from pipeline.prompt_track import LivePrompts, PromptTrack, first_prompt, track_entries
from utils.config import Config
from utils.errors import UserError

LINES = "# a comment\n0: a red circle\n\n 2 : a blue circle: big\n12.5s: 'a star'\n"
ENTRIES = ((0, "a red circle"), (2, "a blue circle: big"), ("12.5s", "a star"))
YAML = '0: a red circle\n2: "a blue circle: big"\n12.5s: a star\n'


# ---- Reading ----


@pytest.mark.parametrize(("name", "text"), [("t.txt", LINES), ("t.yaml", YAML), ("t", LINES), ("t.yml", YAML)])
def test_lines_and_yaml_give_the_same_entries(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert track_entries(tmp_path / name) == ENTRIES
    assert track_entries(dict(ENTRIES)) == track_entries([list(entry) for entry in ENTRIES]) == ENTRIES
    assert first_prompt(ENTRIES) == "a red circle" and first_prompt((("0.0s", "x"),)) == "x"
    assert first_prompt(ENTRIES[1:]) == ""


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.txt", "", "must hold 1 to 10000 prompts, not 0"),
        ("t.txt", "a prompt", "line 1 of prompt track"),
        ("t.txt", "0: a\n-1: b", "'-1' is no block"),
        ("t.txt", "x: b", "'x' is no block"),
        ("t.txt", "nans: b", "no time"),
        ("t.txt", "1e3s: b", "no time"),
        ("t.txt", "3:", "the prompt at 3 is empty"),
        ("t.txt", "3: a\n3: b", "two prompts at 3"),
        ("t.yaml", "3: a\n3: b", "two prompts at 3"),
        ("t.yaml", "[a", "not valid YAML"),
        ("t.yaml", "- a", "must map blocks or times"),
        ("t.yaml", "3: [a]", "must map blocks or times"),
        ("t.yaml", "3: a\n4: *b", "not valid YAML"),
        ("t.txt", b"3: \xff", "not UTF-8"),
        ("none.txt", None, "No such file"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        track_entries(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [{True: "a"}, {1.5: "a"}, {3: 4}, {-1: "a"}, [1], [(1, "a", "b")], {}])
def test_a_bad_python_track_is_a_user_error(source):
    with pytest.raises(UserError, match="prompt_track"):
        track_entries(source)


# ---- Blocks ----


def test_each_block_has_the_prompt_of_the_last_entry():
    track = PromptTrack([(0, "a"), (3, "b"), (5, "b")])
    assert [track.prompt_at(block) for block in range(7)] == list("aaabbbb")
    assert [block for block in range(9) if track.is_switch(block)] == [3, 5]
    assert track.prompts == ["a", "b"] and track_entries(track.to_metadata()) == ((0, "a"), (3, "b"), (5, "b"))
    assert track.prompts_at(2, ["x", "y"]) == ["x", "y"] and track.prompts_at(3, ["x", "y"]) == ["b", "b"]


@pytest.mark.parametrize(
    ("time", "prefix", "block"),
    [("0s", 0, 0), ("0.1s", 0, 1), ("0.5625s", 0, 1), ("0.57s", 0, 2), ("1.3125s", 0, 2), ("0.57s", 1, 2)],
)
def test_a_time_is_the_first_block_that_starts_then_or_later(time, prefix, block):
    """Blocks of three latent frames at 16 fps start at pixel frames 0, 9, 21; after an image at 0, 1, 13."""
    config = Config()
    entries = ((time, "b"),)
    track = build_track(config, entries, "a", prefix)
    assert track.to_metadata() == ([[0, "b"]] if block == 0 else [[0, "a"], [block, "b"]])


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        (((7, "b"),), {}, "7 is after the start of the video's last block, 6"),
        ((("99s", "b"),), {}, "99s is after the start"),
        (((1, "b"), ("0.5s", "c")), {}, "1 and 0.5s are the same block 1"),
        (((1, "b"),), {"schedule": "bidirectional"}, "prompt_track needs blocks"),
        (((1, "b"),), {"num_rollouts": 2}, "single rollout"),
    ],
)
def test_entries_that_a_video_cannot_have_are_user_errors(entries, changes, message):
    config = Config()
    for key, value in changes.items():
        setattr(config.rollout, key, value)
    with pytest.raises(UserError, match=message):
        build_track(config, entries, "a")


# ---- Live prompts ----


def test_a_prompt_is_fixed_when_its_block_is_first_read():
    live = LivePrompts("a")
    live.prompt = "b"
    assert live.prompt_at(0) == "b"
    live.prompt = " c "
    live.prompt = "d"
    assert [live.prompt_at(0), live.prompt_at(1), live.is_switch(1)] == ["b", "d", True]
    live.prompt = "e"
    live.prompt = "d"
    assert not live.is_switch(2) and live.prompt_at(1) == "d"
    assert live.to_metadata() == [[0, "b"], [1, "d"]]
    with pytest.raises(UserError, match="prompt is empty"):
        live.prompt = " "


# ---- Videos ----

RED, BLUE = "a red circle", "a blue circle"


def test_live_prompts_are_as_many_as_a_track_may_hold(monkeypatch):
    monkeypatch.setattr(prompt_track, "MAX_ENTRIES", 3)
    live = LivePrompts("0")
    for block in range(3):
        live.prompt = f"unused {block}"
        live.prompt = str(block)
        assert live.prompt_at(block) == str(block)
    with pytest.raises(UserError, match="3 prompts, which is the limit"):
        live.prompt = "3"
    live.prompt = "2"
    assert live.prompt_at(3) == "2" and len(track_entries(live.to_metadata())) == 3


@pytest.fixture(scope="module")
def pipe(world) -> TextToVideo:
    return TextToVideo.load(str(world.config), "rollout.prompt_switch=recache", device="cpu", seed=3)


@pytest.fixture(scope="module")
def video(pipe):
    return pipe.generate(RED, prompt_track={1: BLUE, "0.7s": RED})


def test_a_video_with_a_track_is_the_same_everywhere(tmp_path, world, pipe, command, video):
    """Python, a stream, the command line, the metadata, and the same prompts while the video runs."""
    assert not torch.equal(video.latents, pipe.generate(RED).latents)
    assert torch.equal(video.latents[:3], pipe.generate(RED).latents[:3])
    (tmp_path / "track.txt").write_text(f"1: {BLUE}\n0.7s: {RED}\n")
    words = ("--output_folder", tmp_path / "a", "--save_latents")
    given = ("--config_path", world.config, "--seed", 3, "--prompt", RED, "--prompt_track", tmp_path / "track.txt")
    assert command(*given, *words, "rollout.prompt_switch=recache", "rollout.order=diagonal").code == 0
    assert torch.equal(load_file(tmp_path / f"a/{RED}-0.safetensors")["latents"], video.latents)
    metadata = json.loads((tmp_path / f"a/{RED}-0.json").read_text())
    assert metadata["prompt_track"] == video.metadata["prompt_track"] == [[1, BLUE], ["0.7s", RED]]
    words = ("--output_folder", tmp_path / "b", "--save_latents")
    assert command("--config_path", tmp_path / f"a/{RED}-0.json", *words).code == 0
    for suffix in (".mp4", ".safetensors"):
        file = f"{RED}-0{suffix}"
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()
    again = command(*given[:-2], "--output_folder", tmp_path / "a", "rollout.prompt_switch=recache")
    assert again.code == 0 and "prompt_track" in again.out


def test_prompts_that_change_while_a_stream_runs_give_the_same_frames(pipe, video):
    """The tiny model has three blocks, which all start before the first is finished; so prompts change on ops."""
    live, started = LivePrompts(RED), [0]
    own = TextToVideo(pipe.config, pipe.net, pipe.embeddings.cache, pipe.vae)
    rollout = own.rollout

    def on_op(op) -> None:
        started.append(max(op.block, started[-1]))
        live.prompt = BLUE if started[-1] == 0 else RED

    own.rollout = lambda *args, **kwargs: rollout(*args[:3], on_op, *args[4:], **kwargs)  # type: ignore[method-assign]
    own.config.rollout.order = "diagonal"
    blocks = list(own.generate_blocks([RED], [0], track=live))
    assert live.to_metadata() == [[0, RED], [1, BLUE], [2, RED]]
    assert torch.equal(torch.cat(blocks, dim=1)[0], video.latents)


def test_a_stream_with_a_track_has_the_frames_of_generate(pipe, video):
    frames = np.concatenate(list(pipe.stream(RED, prompt_track=[(1, BLUE), (2, RED)])))
    assert np.array_equal(frames, video.frames)


def test_two_prompts_for_block_0_are_refused(pipe, tmp_path, world, command):
    with pytest.raises(UserError, match="different prompts for block 0"):
        pipe.generate(RED, prompt_track={0: BLUE})
    (tmp_path / "track.txt").write_text(f"0: {BLUE}\n1: {RED}\n")
    given = ("--config_path", world.config, "--prompt_track", tmp_path / "track.txt", "--output_folder", tmp_path)
    result = command(*given, "--prompt", RED)
    assert result.code == 2 and "--prompt_track has a prompt for block 0" in result.err
    (tmp_path / "track.txt").write_text(f"0: {RED}\n9: {BLUE}\n")
    result = command(*given)
    assert result.code == 2 and "9 is after the start of the video's last block, 2" in result.err
