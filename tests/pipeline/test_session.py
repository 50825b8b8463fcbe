"""pipeline/session.py: frames equal those of a stream; pause, close, errors, saving and memory."""

import gc
import json
import os
import threading
import time

import cv2
import numpy as np
import pytest
import torch

import pipeline.session
from model.preview import LatentPreview
from model.vae import StreamingDecoder
from pipeline import TextToVideo
from pipeline.rollout import Rollout
from pipeline.schedule import WriteThenDenoise
from pipeline.session_worker import Channel, ClosedError, op_events
from utils.clips import VideoReader
from utils.errors import UserError
from utils.video import VideoWriter

PROMPT = "a red circle"
SCHEDULES = ("block_first", "timestep_first")


@pytest.fixture(scope="module")
def pipe(world) -> TextToVideo:
    """The tiny model with a window that moves after the third block. Tests do not change it."""
    return TextToVideo.load(str(world.config), "rollout.window=9", "rollout.sink=1", device="cpu", seed=3)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("image") / "start.png")
    cv2.imwrite(path, np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    return path


def session_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("session-")]


@pytest.fixture(autouse=True)
def threads_end():
    """Check that a test leaves no session's thread behind."""
    yield
    if session_threads():
        gc.collect()
    deadline = time.monotonic() + 20
    while session_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not session_threads()


def take(session, count: int) -> list:
    return [next(session) for _ in range(count)]


def read_frames(path) -> np.ndarray:
    with VideoReader(path) as reader:
        return np.stack(list(reader))


# ---- Frames ----


@pytest.mark.parametrize(
    ("schedule", "start"), [("block_first", ""), ("timestep_first", ""), ("timestep_first", "image")]
)
def test_an_endless_session_has_the_frames_of_a_stream(pipe, image, schedule, start):
    path = image if start else None
    with pipe.session(PROMPT, seed=5, sample=2, schedule=schedule, image=path) as session:
        parts = take(session, 5 + bool(path))
    own = TextToVideo.load(pipe.config, f"rollout.schedule={schedule}", device="cpu", seed=5)
    expected = own.stream(PROMPT, sample=2, num_frames=15 + bool(path), image=path)
    for part, frames in zip(parts, expected, strict=True):
        assert np.array_equal(part.frames, frames)
        assert part.prompt == PROMPT and part.decode_seconds > 0 and part.lag_seconds is None
    assert [part.block for part in parts] == list(range(len(parts)))


def test_an_endless_session_with_an_image_has_no_last_block(pipe, image):
    layout = pipe.session(PROMPT, image=image)._worker._new_rollout(lambda op: None).layout
    assert layout.num_frames is None and layout.prefix_frames == 1 and layout.frames(1000) == 3


def test_a_session_of_a_given_length_ends(pipe):
    session = pipe.session(PROMPT, num_frames=6)
    assert [len(part.frames) for part in session] == [9, 12]
    assert list(session) == []


def test_two_sessions_at_once_do_not_disturb_each_other(pipe):
    with pipe.session(PROMPT) as one, pipe.session(PROMPT, seed=4) as two:
        pairs = [(next(one), next(two)) for _ in range(3)]
    with pipe.session(PROMPT) as again:
        for (first, other), part in zip(pairs, again, strict=False):
            assert np.array_equal(first.frames, part.frames) and not np.array_equal(other.frames, part.frames)


# ---- Prompts ----


@pytest.mark.parametrize(("schedule", "rule"), [("block_first", "keep"), ("timestep_first", "recache")])
def test_prompts_that_change_give_the_frames_of_their_saved_track(pipe, tmp_path, command, schedule, rule):
    later = {1: "a blue square", 2: "a green star", 4: PROMPT}
    with pipe.session(PROMPT, schedule=schedule, prompt_switch=rule) as session:

        def change(event):
            if (event.kind, event.step) == ("denoise", 0):  # the next block has not started
                session.prompt = later.get(event.block, session.prompt)

        session.on_op(change)
        parts = take(session, 7)
        session.save(tmp_path / "x.mp4")
    metadata = json.loads((tmp_path / "x.json").read_text())
    track = metadata["prompt_track"]
    assert metadata["prompt"] == PROMPT and track == [[block + 1, prompt] for block, prompt in later.items()]
    assert [part.lag_seconds is not None for part in parts] == [part.block - 1 in later for part in parts]
    video = TextToVideo.load(str(tmp_path / "x.json"), device="cpu").generate(PROMPT, prompt_track=track)
    assert np.array_equal(video.frames[-12:], parts[-1].frames)
    result = command("--config_path", tmp_path / "x.json", "--output_folder", tmp_path / "again")
    assert result.code == 0, result.err
    [again] = (tmp_path / "again").glob("*.mp4")
    assert again.read_bytes() == (tmp_path / "x.mp4").read_bytes()


def test_a_new_prompt_holds_from_the_next_block_that_has_not_started(pipe):
    started = []
    with pipe.session(PROMPT) as session:

        def change_in_block_2(event):
            started.append(event.block)
            if event.block == 2:
                session.prompt = " a blue square "

        session.on_op(change_in_block_2)
        parts = take(session, 5)
        assert session.prompt == "a blue square"
    assert [part.prompt for part in parts] == [PROMPT] * 3 + ["a blue square"] * 2
    assert [part.lag_seconds is None for part in parts] == [True, True, True, False, True]
    assert parts[3].lag_seconds > parts[3].decode_seconds


def test_a_prompt_typed_during_a_pause_holds_from_the_next_block(pipe):
    with pipe.session(PROMPT, schedule="block_first") as session:
        paused = threading.Event()

        def pause_after_block_0(event):
            if (event.block, event.step) == (0, 3):
                session.pause()
                paused.set()

        def change_prompt():
            assert paused.wait(20)
            time.sleep(0.1)
            session.prompt = "a blue square"
            session.resume()

        session.on_op(pause_after_block_0)
        threading.Thread(target=change_prompt).start()
        assert [part.prompt for part in take(session, 2)] == [PROMPT, "a blue square"]


def test_many_prompts_per_second_use_only_those_of_started_blocks(pipe):
    stop = threading.Event()
    with pipe.session(PROMPT) as session:

        def type_quickly():
            for number in range(100_000):
                if stop.wait(0.001):
                    return
                session.prompt = f"prompt {number}"

        typing = threading.Thread(target=type_quickly)
        typing.start()
        parts = take(session, 4)
        stop.set()
        typing.join()
    assert len({part.prompt for part in parts}) > 1
    assert len(session._prompts.to_metadata()) < 20 and len(session._pipe.embeddings.cache._memory) < 20


def test_an_empty_prompt_is_refused_and_the_session_goes_on(pipe):
    with pipe.session(PROMPT) as session:
        with pytest.raises(UserError, match="empty"):
            session.prompt = " "
        assert next(session).prompt == session.prompt == PROMPT


# ---- Control ----


def test_a_paused_session_runs_no_op_until_it_resumes(pipe):
    ops = []
    with pipe.session(PROMPT) as session:
        session.on_op(ops.append)
        next(session)
        session.pause()
        session.pause()
        time.sleep(0.1)  # the op under way
        before = len(ops)
        time.sleep(0.1)
        assert len(ops) == before
        threading.Timer(0.05, session.resume).start()
        take(session, 4)
        assert len(ops) > before


@pytest.mark.parametrize("paused", [False, True])
def test_closing_in_another_thread_ends_the_iteration(pipe, paused):
    session = pipe.session(PROMPT)
    next(session)
    if paused:
        session.pause()
    threading.Timer(0.1, session.close).start()
    count = sum(1 for _ in session)
    session.close()
    assert count >= 0 and list(session) == []


@pytest.mark.parametrize("close", ["close", "error"])
def test_a_pause_after_the_end_holds_no_thread(pipe, monkeypatch, close):
    """A server may pause a session that was closed while an op is under way."""
    entered, go_on = threading.Event(), threading.Event()

    def slow(event):
        entered.set()
        go_on.wait(20)

    def failing(self, latents):
        raise RuntimeError("no memory for pixels")

    session = pipe.session(PROMPT)
    if close == "error":
        monkeypatch.setattr(StreamingDecoder, "push", failing)
        with pytest.raises(RuntimeError, match="no memory for pixels"):
            next(session)
    else:
        session.on_op(slow)
        reader = threading.Thread(target=list, args=(session,), daemon=True)
        reader.start()
        assert entered.wait(20)
        session.close()
        reader.join()
    session.pause()
    go_on.set()
    deadline = time.monotonic() + 5
    while session_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    ended = not session_threads()
    session.resume()
    assert ended


def test_a_prompt_typed_during_a_pass_does_not_shorten_the_lag(pipe, monkeypatch):
    execute, seen = Rollout.execute, set()

    def slow(self, op):
        if op.block not in seen and session.prompt == "a blue circle":
            time.sleep(0.6)
            session.prompt = "a green circle"
        seen.add(op.block)
        execute(self, op)

    with pipe.session(PROMPT, schedule="block_first") as session:
        monkeypatch.setattr(Rollout, "execute", slow)
        next(session)
        session.prompt = "a blue circle"
        part = next(part for part in session if part.prompt == "a blue circle")
    assert part.lag_seconds > 0.6


def test_a_callback_may_close_its_session(pipe):
    session = pipe.session(PROMPT)
    session.on_op(lambda event: session.close())
    assert list(session) == []


def test_a_deleted_session_ends_its_threads_and_deletes_its_files(pipe):
    session = pipe.session(PROMPT)
    next(session)
    folder = session._recording._folder.name
    assert session_threads()
    del session
    gc.collect()
    assert not session_threads()
    assert not os.path.exists(folder)


def test_a_slow_reader_slows_the_session(pipe):
    blocks = set()
    with pipe.session(PROMPT, schedule="block_first") as session:
        session.on_op(lambda event: blocks.add(event.block))
        next(session)
        time.sleep(0.5)
        assert max(blocks) <= 5  # read, decoded, at the decoder, waiting, finished; one more under way


# ---- Errors ----


def test_an_error_in_the_decoder_reaches_the_reader(pipe, monkeypatch):
    push, calls = StreamingDecoder.push, []

    def failing(self, latents):
        calls.append(latents)
        if len(calls) == 3:
            raise RuntimeError("no memory for pixels")
        return push(self, latents)

    monkeypatch.setattr(StreamingDecoder, "push", failing)
    session = pipe.session(PROMPT)
    take(session, 2)
    with pytest.raises(RuntimeError, match="no memory for pixels"):
        next(session)
    assert list(session) == []


def test_an_error_in_a_callback_reaches_the_reader(pipe):
    def failing(event):
        if event.block == 2:
            raise KeyError("block 2")

    session = pipe.session(PROMPT, schedule="block_first")
    session.on_op(failing)
    take(session, 2)
    with pytest.raises(KeyError, match="block 2"):
        next(session)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("rollout.window=0",), "window"),
        (("rollout.schedule=bidirectional",), "bidirectional"),
        (("rollout.num_rollouts=2",), "num_rollouts=1"),
    ],
)
def test_settings_without_a_live_video_are_refused(pipe, world, changes, message):
    own = TextToVideo.load(str(world.config), *changes, device="cpu")
    with pytest.raises(UserError, match=message):
        own.session(PROMPT)


def test_wrong_arguments_are_refused(pipe):
    with pytest.raises(UserError, match=r"rollout\.schedule"):
        pipe.session(PROMPT, schedule="backwards")
    with pytest.raises(UserError, match="empty"):
        pipe.session("  ")
    with pytest.raises(UserError, match="no such file"):
        pipe.session(PROMPT, image="missing.png")


# ---- Saving ----


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_inference_reproduces_a_saved_session(pipe, tmp_path, command, image, schedule):
    with pipe.session(PROMPT, seed=5, sample=1, schedule=schedule, image=image) as session:
        with pytest.raises(UserError, match="no frames"):
            session.save(tmp_path / "x.mp4")
        take(session, 5)
    session.save(tmp_path / "x.mp4")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.json", "x.mp4"]
    metadata = json.loads((tmp_path / "x.json").read_text())
    assert (metadata["latent_frames"], metadata["pixel_frames"], metadata["sample"]) == (13, 49, 1)
    result = command("--config_path", tmp_path / "x.json", "--output_folder", tmp_path / "again")
    assert result.code == 0, result.err
    assert (tmp_path / f"again/{PROMPT}-1.mp4").read_bytes() == (tmp_path / "x.mp4").read_bytes()


def test_a_session_can_be_saved_while_it_runs_and_again_later(pipe, tmp_path):
    with pipe.session(PROMPT) as session:
        parts = take(session, 2)
        session.save(tmp_path / "first.mp4")
        parts += take(session, 2)
        session.save(tmp_path / "second.mp4")
    frames = np.concatenate([part.frames for part in parts])
    for name, part in (("expected", frames[:21]), ("rest", frames[21:])):
        with VideoWriter(tmp_path / f"{name}.mp4", fps=16, crf=10) as writer:
            writer.write(part)
    assert (tmp_path / "first.mp4").read_bytes() == (tmp_path / "expected.mp4").read_bytes()
    second, expected, rest = (read_frames(tmp_path / f"{name}.mp4") for name in ("second", "expected", "rest"))
    assert np.array_equal(second, np.concatenate([expected, rest]))
    assert session.save(tmp_path / "third.mp4").read_bytes() == (tmp_path / "second.mp4").read_bytes()
    with pytest.raises(UserError, match=r"\.mp4"):
        session.save(tmp_path / "x.avi")


def test_a_saved_track_has_no_prompts_of_blocks_that_were_not_read(pipe, tmp_path):
    with pipe.session(PROMPT, schedule="block_first") as session:
        changed = threading.Event()

        def change(event):
            session.prompt = f"prompt {event.block}"
            if event.block == 2:
                changed.set()

        session.on_op(change)
        take(session, 1)
        assert changed.wait(20)
        session.save(tmp_path / "x.mp4")
    assert "prompt_track" not in json.loads((tmp_path / "x.json").read_text())


def test_embeddings_of_typed_prompts_are_few_and_not_on_disk(world, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.session, "KEPT_EMBEDDINGS", 2)
    words = "rollout.window=9", "rollout.schedule=block_first", f"model.text_cache={tmp_path / 'cache'}"
    own = TextToVideo.load(str(world.config), *words, device="cpu")
    own.encode_prompts([PROMPT])
    files = set(os.listdir(tmp_path / "cache"))
    with own.session(PROMPT) as session:
        for number in range(12):
            part = next(session)
            session.prompt = f"a blue circle {number}"
        assert part.prompt.startswith("a blue circle")
        assert len(session._pipe.embeddings.cache._memory) <= 2
    assert set(os.listdir(tmp_path / "cache")) == files and len(own.embeddings.cache._memory) == 1


# ---- Events ----


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_events_show_each_step_of_each_block_once(pipe, schedule):
    events = []
    with pipe.session(PROMPT, schedule=schedule) as session:
        session.on_op(events.append)
        take(session, 3)
    for block in range(3):
        own = [event for event in events if event.block == block and event.kind == "denoise"]
        assert [event.step for event in own] == [0, 1, 2, 3]
        assert [event.sigma for event in own] == list(session.sigmas[:4]) and session.sigmas[4] == 0
        assert all(event.thumbnail.shape == (32, 32, 3) and event.thumbnail.dtype == np.uint8 for event in own)
    writes = [(event.step, event.sigma) for event in events if event.kind == "write" and event.block == 0]
    indices = [4] if schedule == "block_first" else [1, 2, 3, 4]
    assert writes == [(index, session.sigmas[index]) for index in indices]
    assert all(event.seconds > 0 for event in events)


def test_a_fused_pass_gives_two_events_that_share_its_time(pipe):
    [op] = [op for op in pipe.ops(pipe.schedule()) if isinstance(op, WriteThenDenoise)][:1]
    write, denoise = op_events(op, [1.0, 0.9, 0.8, 0.6, 0.0], 0.5, None)
    assert (write.kind, write.block, denoise.kind, denoise.block) == ("write", 0, "denoise", 1)
    assert write.seconds == denoise.seconds == 0.25


def test_thumbnails_resemble_the_frames_after_some_blocks(pipe):
    """Flat pictures, so that a random VAE can show them."""
    torch.manual_seed(0)
    preview, latents = LatentPreview(pipe.vae, (4, 4)), torch.randn(3, 16, 4, 4)
    frames = np.full((12, 32, 32, 3), (200, 30, 90), np.uint8)
    before = abs(preview(latents[1]).astype(int) - frames[0]).mean()
    for _ in range(8):
        preview.learn(torch.randn(3, 16, 4, 4), frames)
    after = abs(preview(latents[1]).astype(int) - frames[0]).mean()
    assert after < 20 < before / 2


def test_large_latents_have_small_thumbnails(pipe):
    assert LatentPreview(pipe.vae, (60, 104))(torch.zeros(16, 60, 104)).shape == (60, 104, 3)
    assert LatentPreview(pipe.vae, (30, 40))(torch.zeros(16, 30, 40)).shape == (60, 80, 3)


# ---- Memory ----


def test_memory_of_an_endless_session_is_flat(pipe):
    def tensors() -> int:
        gc.collect()
        return sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor)

    with pipe.session(PROMPT, prompt_switch="recache") as session:
        session.on_op(lambda event: None)
        counts = []
        for part in session:
            session.prompt = f"prompt {part.block}"
            if part.block in (5, 6, 11, 12):
                session.pause()
                time.sleep(0.1)
                counts.append(tensors())
                session.resume()
            if part.block == 12:
                break
    assert max(counts[2:]) <= max(counts[:2]) * 1.05


def test_a_channel_ends_with_its_error_after_its_items():
    channel: Channel[int] = Channel(2)
    channel.put(1)
    channel.end(ValueError("late"))
    assert channel.get() == 1
    with pytest.raises(ValueError, match="late"):
        channel.get()
    assert channel.get() is None
    channel.close()
    with pytest.raises(ClosedError):
        channel.put(2)
