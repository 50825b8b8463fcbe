"""Decoding beside the denoising: order, bits, bounded memory, errors, and the end of the thread."""

import threading
import time

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny_model import VAE
from torch import Tensor

from model.vae import WanVAE
from pipeline.channel import ClosedError
from pipeline.decoding import DecodingThread, decode_frames
from pipeline.output import VideoFiles, VideoOutput
from pipeline.text_to_video import TextToVideo
from utils.errors import UserError

CPU = torch.device("cpu")


class FakeDecoder:
    """Repeats the mean of the latents as a grey pixel frame of 2x2."""

    latest: Tensor | None = None

    def __init__(self):
        self.threads: list[int] = []

    def push(self, latents: Tensor) -> Tensor:
        self.threads.append(torch.get_num_threads())
        self.latest = latents.mean(dim=(2, 3, 4))[:, :, None, None, None].expand(-1, -1, 3, 2, 2)
        return self.latest


def blocks(count: int) -> list[Tensor]:
    return [torch.full((1, 2, 16, 4, 4), number / 100) for number in range(count)]


def decode_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "decode"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    deadline = time.monotonic() + 5
    while decode_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not decode_threads()


def test_frames_arrive_in_order_with_the_bits_of_direct_decoding():
    vae = WanVAE(AutoencoderKLWan(**VAE))
    latents = [torch.randn(2, frames, 16, 4, 4) for frames in (1, 3, 3, 2, 3, 3)]
    direct = vae.stream()
    expected = [decode_frames(direct, x, "a block") for x in latents]
    found: list[tuple[int, list[np.ndarray]]] = []
    thread = DecodingThread(vae.stream(), CPU, lambda tag, frames: found.append((tag, frames)))
    thread.start()
    for number, x in enumerate(latents):
        thread.put(x, "a block", number)
    thread.end()
    thread.join()
    assert [tag for tag, _ in found] == list(range(len(latents)))
    for (_, frames), same in zip(found, expected, strict=True):
        assert [f.tobytes() for f in frames] == [f.tobytes() for f in same]
        assert frames[0].dtype == np.uint8 and frames[0].shape[-1] == 3


def test_the_thread_has_the_number_of_cpu_threads_of_its_creator():
    """Without this, another thread of Python uses torch's default, and results may differ by rounding."""
    before, decoder = torch.get_num_threads(), FakeDecoder()
    try:
        torch.set_num_threads(before + 1)
        thread = DecodingThread(decoder, CPU, lambda tag, frames: None)
        torch.set_num_threads(before)
        thread.start()
        thread.put(blocks(1)[0], "a block", 0)
        thread.end()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert decoder.threads == [before + 1]


def test_no_more_blocks_wait_than_the_bound():
    release, put = threading.Event(), []
    thread = DecodingThread(FakeDecoder(), CPU, lambda tag, frames: release.wait(20), queued=3)
    thread.start()

    def fill() -> None:
        for number, latents in enumerate(blocks(10)):
            thread.put(latents, "a block", number)
            put.append(number)

    filler = threading.Thread(target=fill)
    filler.start()
    time.sleep(0.2)
    waiting = len(put)
    release.set()
    filler.join()
    thread.end()
    thread.join()
    assert waiting == 4 and len(put) == 10  # three wait, one is being delivered


@pytest.mark.parametrize("source", ["decoder", "receiver", "nan"])
def test_an_error_reaches_the_thread_that_denoises(source):
    delivered: list[int] = []

    def deliver(tag, frames):
        if source == "receiver" and tag == 1:
            raise OSError(28, "No space left on device", "x.mp4")
        delivered.append(tag)

    decoder, latents = FakeDecoder(), blocks(50)
    if source == "nan":
        latents[1][0, 0, 0, 0, 0] = float("nan")
    push = decoder.push
    if source == "decoder":
        decoder.push = lambda x: push(x) if float(x.mean()) != float(latents[1].mean()) else push(None)
    thread = DecodingThread(decoder, CPU, deliver, videos=["cat.mp4"])
    thread.start()
    expected = {"decoder": AttributeError, "receiver": OSError, "nan": UserError}[source]
    with pytest.raises(expected, match="block 1 of cat.mp4" if source == "nan" else None):
        for number, x in enumerate(latents):
            thread.put(x, f"block {number}", number)
    assert delivered == [0]
    with pytest.raises(ClosedError):
        thread.put(latents[0], "a block", 0)
    thread.join()  # the error is raised once


def test_closing_drops_the_blocks_that_wait():
    started, release, delivered = threading.Event(), threading.Event(), []

    def deliver(tag, frames):
        started.set()
        release.wait(20)
        delivered.append(tag)

    thread = DecodingThread(FakeDecoder(), CPU, deliver)
    thread.start()
    for number, latents in enumerate(blocks(3)):
        thread.put(latents, "a block", number)
    assert started.wait(20)
    thread.close()
    release.set()
    thread.join()
    assert delivered == [0]


def test_the_latest_frames_are_those_of_all_blocks():
    thread = DecodingThread(FakeDecoder(), CPU, lambda tag, frames: time.sleep(0.02))
    thread.start()
    for number, latents in enumerate(blocks(4)):
        thread.put(latents, "a block", number)
    assert float(thread.latest[0, 0, 0, 0, 0]) == pytest.approx(0.03)
    thread.end()
    thread.join()


# ---- Files ----


def test_an_error_after_the_last_block_deletes_all_files(tmp_path, world):
    """Nobody emits another block, so the end of the statement raises it."""
    vae = TextToVideo.load(str(world.config)).vae
    latents = torch.zeros(1, 2, 16, 4, 4)
    latents[0, 1, 0, 0, 0] = float("inf")
    with (
        pytest.raises(UserError, match=r"latent frames 0 to 1 of cat\.mp4"),
        VideoOutput(vae, [VideoFiles(tmp_path, "cat")], 16, 2, save_latents=True) as output,
    ):
        output.emit(latents)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def two_videos(world, tmp_path):
    """The command line of two videos."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    return "--config_path", world.config, "--data_path", tmp_path / "prompts.txt", "--output_folder", tmp_path / "out"


@pytest.fixture
def second_video(monkeypatch):
    """Hold the end of the first video until the second one starts. The list holds errors to raise at that moment."""
    started, complete, run = threading.Event(), VideoOutput._write_metadata, TextToVideo.generate_blocks
    errors: list[BaseException] = []

    def late(self):
        assert started.wait(20), "the second video did not start before the first one was complete"
        complete(self)

    def generate_blocks(self, prompts, samples, prefix, on_op, *options):
        def seen(op):
            on_op(op)
            if prompts == ["a blue square"]:
                started.set()
                for error in errors:
                    raise error

        return run(self, prompts, samples, prefix, seen, *options)

    monkeypatch.setattr(VideoOutput, "_write_metadata", late)
    monkeypatch.setattr(TextToVideo, "generate_blocks", generate_blocks)
    return errors


def test_a_video_is_completed_while_the_next_one_is_denoised(tmp_path, command, two_videos, second_video):
    result = command(*two_videos)
    assert result.code == 0, result.err
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 2


def test_ctrl_c_keeps_the_video_that_is_being_completed(tmp_path, command, two_videos, second_video):
    second_video.append(KeyboardInterrupt())
    result = command(*two_videos)
    assert result.code == 130 and "error: interrupted" in result.err
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [f"a red circle-0.{suffix}" for suffix in ("json", "mp4", "png")]
