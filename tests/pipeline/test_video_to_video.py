"""Video-to-video and prefixes from clips: pipeline/source.py, pipeline/prefix.py and their flags.

Claims: video-to-video equals a plain reimplementation for every schedule, and text-to-video at strength 1, bit for bit.
Its memory does not grow with the clip. The video has the clip's length, its last block may be short. Clips of any size,
rate and codec can be changed and continued; a continued video starts with the last frames of its clip.
"""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from video_files import grey_levels, moving_square, rotate_file, write_video

from model.denoiser import Denoiser
from model.flow import add_noise
from pipeline import TextToVideo
from pipeline.build import build_rollout, context_frames
from pipeline.prefix import read_prefix
from pipeline.source import fit_to_source, source_frames
from utils.clips import read_video
from utils.config_loading import override_config
from utils.errors import UserError
from utils.rng import keyed_noise

PROMPT = "a red circle"
SIGMAS = [1.0, 0.9375, 0.8333333333333334, 0.625, 0.0]


@pytest.fixture(scope="module")
def pipe(world) -> TextToVideo:
    """The tiny model, without fused passes. Tests do not change it."""
    return TextToVideo.load(str(world.config), "rollout.fuse_context=false", device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A clip of 26 pixel frames: 7 latent frames, three blocks of which the last is short, and one frame too many."""
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", moving_square(26, 32, 32))


@pytest.fixture(scope="module")
def latents(clip, pipe) -> Tensor:
    """The latents [1, 7, C, h, w] of the clip, encoded at once."""
    frames, _ = read_video(clip)
    return pipe.vae.encode(torch.from_numpy(frames[:25]).permute(0, 3, 1, 2)[None].float() / 127.5 - 1)


# ---- The method ----


@torch.no_grad()
def plain_video_to_video(pipe: TextToVideo, clean: Tensor, method: str, strength: float) -> Tensor:
    """Change latents [1, F, C, h, w] with nested loops, without schedule and rollout."""
    net = pipe.net
    denoiser = Denoiser(net, net.encode_text(pipe.embeddings.of([PROMPT])))
    sigmas, starts = [strength * sigma for sigma in SIGMAS], range(0, clean.shape[1], 3)

    def noise(block: int, step: int, like: Tensor) -> Tensor:
        return keyed_noise(7, 0, block, step, like.shape[1:])[None]

    def step(block: int, j: int, x: Tensor, cache) -> Tensor:
        x0 = denoiser.denoise(x, sigmas[j], starts[block], cache)
        return x0 if j == 3 else add_noise(x0, noise(block, j + 1, x0), sigmas[j + 1])

    blocks = list(clean.split(3, dim=1))
    xs = [add_noise(x0, noise(block, 0, x0), sigmas[0]) for block, x0 in enumerate(blocks)]
    caches = [net.new_cache(1, 4, 4, 9, 3, 0, 0, torch.float32) for _ in range(4)]
    if method == "block_first":
        for block in range(len(xs)):
            for j in range(4):
                xs[block] = step(block, j, xs[block], caches[0])
            denoiser.write_context(xs[block], 0.0, starts[block], caches[0])
    else:
        for j in range(4):
            for block in range(len(xs)):
                xs[block] = step(block, j, xs[block], caches[j])
                denoiser.write_context(xs[block], sigmas[j + 1], starts[block], caches[j])
    return torch.cat(xs, dim=1)


@pytest.mark.parametrize("method", ["timestep_first", "block_first"])
def test_it_equals_nested_loops(pipe, clip, latents, method):
    expected = plain_video_to_video(pipe, latents, method, 0.5)
    own = TextToVideo(pipe.config, pipe.net, pipe.embeddings.cache, pipe.vae)
    for order in ("step_major", "diagonal"):
        own.config = override_config(pipe.config, [f"rollout.schedule={method}", f"rollout.order={order}"])
        made = own.generate(PROMPT, video=clip, strength=0.5).latents[None]
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["timestep_first", "block_first", "bidirectional"])
def test_at_strength_1_it_is_text_to_video(pipe, clip, method):
    own = TextToVideo(pipe.config, pipe.net, pipe.embeddings.cache, pipe.vae)
    own.config = override_config(pipe.config, [f"rollout.schedule={method}"])
    made = own.generate(PROMPT, video=clip, strength=1, num_frames=6)
    assert torch.equal(made.latents, own.generate(PROMPT, num_frames=6).latents)


def test_a_small_strength_keeps_the_clip(pipe, clip, latents):
    errors = [
        (pipe.generate(PROMPT, video=clip, strength=s).latents - latents[0]).abs().mean() for s in (0.001, 0.3, 1)
    ]
    assert errors[0] < 0.02 < errors[0] * 10 < errors[1] < errors[2]


def test_streamed_frames_are_those_of_generate(pipe, clip):
    made = pipe.generate(PROMPT, video=clip, strength=0.7, seed=3)
    assert made.latents.shape[0] == 7 and made.frames.shape[0] == 25
    streamed = list(pipe.stream(PROMPT, video=clip, strength=0.7, seed=3))
    assert [len(frames) for frames in streamed] == [9, 12, 4]
    assert np.array_equal(np.concatenate(streamed), made.frames)


def test_a_short_last_block_attends_to_as_many_frames_as_a_whole_one(pipe, clip, tmp_path):
    """The same frames at the start of a longer clip give the same blocks."""
    longer = write_video(tmp_path / "longer.mp4", moving_square(33, 32, 32))
    short, long = (pipe.generate(PROMPT, video=path, strength=0.5).latents for path in (clip, longer))
    torch.testing.assert_close(short[:6], long[:6], rtol=0, atol=1e-5)
    config = override_config(pipe.config, [f"video.source={clip}", "rollout.strength=0.5", "video.num_output_frames=7"])
    rollout = build_rollout(config, Denoiser(pipe.net, None), [0], source=iter(()))  # type: ignore[arg-type]
    assert rollout.layout.frames(2) == 1 and context_frames(config.rollout, 9)[0] == 6
    assert rollout.new_cache().context_frames == 6


# ---- Memory ----


@pytest.mark.parametrize("method", ["timestep_first", "block_first"])
def test_few_blocks_and_few_frames_of_a_long_clip_are_alive(pipe, tmp_path, method):
    """The clip is read at the pace of the rollout: it never runs more than one block per step ahead of the output."""
    save_file({"latents": torch.zeros(60, 16, 4, 4)}, tmp_path / "long.safetensors")
    words = [f"video.source={tmp_path / 'long.safetensors'}", "rollout.strength=0.5", "rollout.window=6"]
    words += [f"rollout.schedule={method}", "rollout.denoising_step_list=[1000,500]", "rollout.order=diagonal"]
    config = fit_to_source(override_config(pipe.config, [*words, "video.num_output_frames=1000"]))
    assert config.video.num_output_frames == 60
    own = TextToVideo(config, pipe.net, pipe.embeddings.cache, pipe.vae)
    taken, alive, finished = 0, [], 0

    def counted():
        nonlocal taken
        for frame in source_frames(config, pipe.vae):
            taken += 1
            yield frame

    rollout = build_rollout(config, own._denoiser([PROMPT]), [0], source=counted())
    for _, block in rollout.run(own.ops(own.schedule()), own.schedule().caches):
        finished += block.shape[1]
        alive.append((len(rollout.blocks), taken - finished))
    assert finished == taken == 60 and len(alive) == 20
    assert max(blocks for blocks, _ in alive) <= 3 and max(ahead for _, ahead in alive) <= 3


def test_a_clip_is_encoded_frame_by_frame(pipe, clip, latents):
    config = override_config(pipe.config, [f"video.source={clip}"])
    frames = list(source_frames(config, pipe.vae))
    assert [frame.shape[1] for frame in frames] == [1] * 7
    torch.testing.assert_close(torch.cat(frames, dim=1), latents, rtol=0, atol=1e-6)


# ---- The command ----


def test_the_command_makes_the_video_of_the_api_and_its_metadata_makes_it_again(pipe, world, command, clip, tmp_path):
    def run(folder: str, *words: object) -> Tensor:
        always = ("--output_folder", tmp_path / folder, "--save_latents")
        result = command(*always, *words)
        assert result.code == 0, result.err
        return load_file(tmp_path / folder / f"{PROMPT}-0.safetensors")["latents"]

    words = ("--config_path", world.config, "--prompt", PROMPT, "--video", clip, "--strength", "0.5")
    made = run("a", *words, "rollout.fuse_context=false")
    assert torch.equal(made, pipe.generate(PROMPT, video=clip, strength=0.5).latents)
    metadata = json.loads((tmp_path / f"a/{PROMPT}-0.json").read_text())
    assert metadata["prefix"] == "" and metadata["config"]["video"]["source"] == str(clip)
    assert metadata["config"]["rollout"]["strength"] == 0.5 and metadata["latent_frames"] == 7
    short = run("b", *words, "rollout.fuse_context=false", "--num_output_frames", 4)
    again = run("c", "--config_path", tmp_path / f"b/{PROMPT}-0.json")
    assert len(short) == 4 and torch.equal(short, again)
    stronger = run("d", "--config_path", tmp_path / f"a/{PROMPT}-0.json", "--strength", "0.9")
    assert stronger.shape == made.shape and not torch.equal(stronger, made)


def test_a_relative_source_is_found_again_from_another_folder(pipe, clip, monkeypatch):
    monkeypatch.chdir(clip.parent)
    config = fit_to_source(override_config(pipe.config, [f"video.source={clip.name}", "rollout.strength=0.5"]))
    assert config.video.source == str(clip)
    own = TextToVideo(config, pipe.net, pipe.embeddings.cache, pipe.vae)
    stronger = own.generate(PROMPT, strength=0.9, num_frames=4)  # of the configuration's own source
    assert torch.equal(stronger.latents, pipe.generate(PROMPT, video=clip, strength=0.9, num_frames=4).latents)
    assert stronger.metadata["config"]["video"]["source"] == str(clip)


def test_saved_latents_can_be_changed(pipe, tmp_path):
    save_file({"latents": torch.randn(4, 16, 4, 4)}, tmp_path / "x.safetensors")
    made = pipe.generate(PROMPT, video=tmp_path / "x.safetensors", strength=0.01)
    torch.testing.assert_close(made.latents, load_file(tmp_path / "x.safetensors")["latents"], rtol=0, atol=0.2)


def test_one_pixel_frame_becomes_one_latent_frame(pipe, tmp_path):
    path = write_video(tmp_path / "one.mp4", grey_levels([90], 32, 32))
    assert pipe.generate(PROMPT, video=path, strength=0.5).frames.shape == (1, 32, 32, 3)


BAD = {
    "no clip": (["--strength", "0.5"], "needs a clip to start from: --video CLIP"),
    "no clip at strength 1": (["--strength", "1"], "--strength needs a clip to start from: --video CLIP"),
    "an image": (["--strength", "0.5", "--image", "{}/a.png"], "needs a clip to start from: --video CLIP"),
    "zero": (["--strength", "0", "--video", "{}/a.mp4"], "--strength must be above 0 and at most 1, not 0"),
    "two": (["--strength", "2", "--video", "{}/a.mp4"], "at most 1, not 2"),
    "nan": (["--strength", "nan", "--video", "{}/a.mp4"], "at most 1, not nan"),
    "a word": (["--strength", "much", "--video", "{}/a.mp4"], "at most 1, not much"),
    "no file": (["--strength", "0.5", "--video", "{}/none.mp4"], "none.mp4: there is no such file"),
    "audio only": (["--strength", "0.5", "--video", "{}/sound.mp4"], "it has no video stream"),
    "no frames": (["--strength", "0.5", "--video", "{}/text.mp4"], "cannot read video"),
    "no latents": (["--strength", "0.5", "--video", "{}/text.safetensors"], "cannot read latents"),
    "flat latents": (["--strength", "0.5", "--video", "{}/flat.safetensors"], "must be [F, C, h, w]"),
    "a prefix, too": (["video.source={}/a.mp4", "--image", "{}/a.png"], "drop one"),
    "strength without a source": (["rollout.strength=0.5"], "needs a clip to start from"),
    "strength out of range": (["rollout.strength=0"], "rollout.strength must be above 0"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder of good and bad inputs."""
    folder = tmp_path_factory.mktemp("files")
    write_video(folder / "a.mp4", grey_levels([9] * 9, 32, 32))
    write_video(folder / "sound.mp4", grey_levels([9]), video=False)
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    (folder / "text.mp4").write_text("text")
    (folder / "text.safetensors").write_text("text")
    save_file({"latents": torch.zeros(4, 4)}, folder / "flat.safetensors")
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_weights_are_loaded(world, command, files, tmp_path, monkeypatch, case):
    words, message = BAD[case]
    monkeypatch.setattr(TextToVideo, "load", None)
    always = ("--config_path", world.config, "--prompt", PROMPT, "--output_folder", tmp_path)
    result = command(*always, *(word.format(files) for word in words))
    assert result.code == 2 and result.err.count("\n") == 1 and message in result.err, result.err


def test_strength_changes_a_source_that_the_configuration_names(world, command, clip):
    words = ("--config_path", world.config, "--dry-run", f"video.source={clip}")
    result = command(*words, "--strength", "0.5")
    assert result.code == 0 and "strength: 0.5" in result.out, result.err


def test_latents_of_another_size_are_refused(pipe, tmp_path):
    save_file({"latents": torch.zeros(3, 16, 8, 8)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"are \[16, 8, 8\], the video's are \[16, 4, 4\]"):
        pipe.generate(PROMPT, video=tmp_path / "x.safetensors", strength=0.5)


def test_the_api_refuses_strength_without_a_clip_and_out_of_range(pipe, clip):
    with pytest.raises(UserError, match="strength needs video=CLIP"):
        pipe.generate(PROMPT, strength=0.5)
    for strength in (0, 2, float("nan")):
        with pytest.raises(UserError, match=r"rollout\.strength must be above 0"):
            pipe.generate(PROMPT, video=clip, strength=strength)


# ---- Any clip ----

SHAPES = {  # options of write_video, clockwise rotation; each clip shows red on the left and blue on the right
    "wide": ((40, 120), {}, 0),
    "tall": ((120, 40), {}, 0),
    "odd sides": ((33, 47), {"codec": "ffv1", "pix_fmt": "bgr0"}, 0),
    "10 bit": ((64, 64), {"codec": "libx264", "pix_fmt": "yuv420p10le"}, 0),
    "greyscale": ((64, 64), {"codec": "ffv1", "pix_fmt": "gray"}, 0),
    "alpha": ((64, 64), {"codec": "ffv1", "pix_fmt": "bgra"}, 0),
    "8 fps": ((64, 64), {"fps": 8}, 0),
    "variable rate": ((64, 64), {"times": [0, 0.05, 0.3, 0.35, 0.8, 0.9]}, 0),
    "rotated": ((64, 64), {}, 180),
    "wide pixels": ((64, 32), {"pixel_aspect": Fraction(2)}, 0),
}


@pytest.mark.parametrize("case", SHAPES)
def test_clips_of_any_kind_are_changed_and_continued(pipe, tmp_path, case):
    (height, width), options, rotation = SHAPES[case]
    frames = np.zeros((6, height, width, 3), np.uint8)
    frames[:, :, : width // 2, 0], frames[:, :, width // 2 :, 2] = 240, 240
    path = write_video(tmp_path / ("x.mkv" if "codec" in options else "x.mp4"), frames, **options)
    if rotation:
        rotate_file(path, rotation)
    made = pipe.generate(PROMPT, video=path, strength=0.5).latents
    seconds = options["times"][-1] if "times" in options else 6 / options.get("fps", 16)
    assert abs(len(made) - (seconds * 16 // 4 + 1)) <= 1
    continued = pipe.generate(PROMPT, video=path, num_frames=9).latents
    prefix = read_prefix(str(path), pipe.config, pipe.vae)[0]
    assert torch.equal(continued[: len(prefix)], prefix) and len(continued) == 9
    pixels, _ = read_video(path, fps=16, size=(32, 32))
    left, right = pixels[0, :, 4].mean(0), pixels[0, :, -4].mean(0)
    if rotation:
        left, right = right, left
    if case != "greyscale":
        assert left[0] > 150 > 90 > left[2] and right[2] > 150 > 90 > right[0]


@pytest.mark.parametrize(("num_pixel_frames", "used"), [(9, range(9)), (12, range(3, 12)), (16, range(3, 16))])
def test_a_prefix_is_the_end_of_its_clip(pipe, tmp_path, num_pixel_frames, used):
    levels = np.linspace(20, 240, num_pixel_frames).astype(int)
    path = write_video(tmp_path / "x.mkv", grey_levels(levels, 32, 32), codec="ffv1", pix_fmt="bgr0")
    pixels = torch.from_numpy(grey_levels(levels[list(used)], 32, 32)).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
    assert torch.equal(read_prefix(str(path), pipe.config, pipe.vae), pipe.vae.encode(pixels))


def test_of_a_clip_that_fills_the_video_the_last_frames_leave_one_block(pipe, tmp_path):
    levels = np.linspace(20, 240, 40).astype(int)
    path = write_video(tmp_path / "x.mkv", grey_levels(levels, 32, 32), codec="ffv1", pix_fmt="bgr0")
    prefix = read_prefix(str(path), pipe.config, pipe.vae)
    pixels = torch.from_numpy(grey_levels(levels[-21:], 32, 32)).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
    assert torch.equal(prefix, pipe.vae.encode(pixels))  # 6 of 9 latent frames
    assert len(pipe.generate(PROMPT, video=path).latents) == 9
