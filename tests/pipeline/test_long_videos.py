"""Long videos by repeated rollouts (rollout.num_rollouts): each continues the last frames of the previous one."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.denoiser import Denoiser
from model.flow import add_noise
from pipeline import TextToVideo
from pipeline.build import overlap_pixel_frames, rollout_sigmas
from pipeline.overlap import Overlap
from utils.clips import read_video
from utils.config_loading import override_config
from utils.errors import UserError
from utils.rng import keyed_noise

PROMPT, OTHER = "a red circle", "a blue square"
FRAMES, OVERLAP, ROLLOUTS, LENGTH = 4, 3, 3, 6  # latent frames: 4, then a new one twice
STEPS = ("rollout.schedule=block_first", "rollout.block_frames=2", "rollout.denoising_step_list=[1000,500]")
KEYS = (*STEPS, f"rollout.num_rollouts={ROLLOUTS}", f"rollout.overlap_frames={OVERLAP}")
FLAGS = ("--num_rollout", ROLLOUTS, "--num_overlap_frames", OVERLAP, "--num_output_frames", FRAMES)


@pytest.fixture(scope="module")
def pipe(world) -> TextToVideo:
    return TextToVideo.load(str(world.config), *KEYS, f"video.num_output_frames={FRAMES}", device="cpu", seed=3)


@pytest.fixture(scope="module")
def video(pipe):
    return pipe.generate(PROMPT)


def changed(pipe: TextToVideo, *overrides: str) -> TextToVideo:
    """Return the same networks with another configuration."""
    return TextToVideo(override_config(pipe.config, overrides), pipe.net, pipe.embeddings.cache, pipe.vae)


def denoise_block(pipe: TextToVideo, denoiser: Denoiser, cache, start: int, noise_block: int, frames: int):
    """Return the x0 [1, frames, C, h, w] of a block after all steps, and write it to the cache."""
    sigmas, shape = rollout_sigmas(pipe.config.rollout), (frames, 16, 4, 4)
    x = keyed_noise(3, 0, noise_block, 0, shape)[None]
    for step, sigma in enumerate(sigmas[:-1]):
        x0 = denoiser.denoise(x, sigma, start, cache)
        x = add_noise(x0, keyed_noise(3, 0, noise_block, step + 1, shape)[None], sigmas[step + 1])
    denoiser.write_context(x0, 0.0, start, cache)
    return x0


@torch.no_grad()
def test_rollouts_equal_a_plain_reimplementation(pipe, video):
    """The overlap is [the encoded last pixel frame of its first latent frame, its other latents] as clean context."""
    denoiser = Denoiser(pipe.net, pipe.net.encode_text(pipe.embeddings.of([PROMPT])))
    cache = pipe.net.new_cache(1, 4, 4, FRAMES - 2, 2)  # the window without a block
    latents = torch.cat([denoise_block(pipe, denoiser, cache, 2 * block, block, 2) for block in range(2)], dim=1)
    for noise_block in (4, 7):  # the overlap fills the blocks before: one frame, then two
        pixel = 4 * (latents.shape[1] - OVERLAP)  # the last one of the overlap's first latent frame
        image = pipe.vae.encode(pipe.vae.decode(latents)[:, pixel : pixel + 1])
        cache = pipe.net.new_cache(1, 4, 4, FRAMES - 2, 2)
        denoiser.write_context(image, 0.0, 0, cache)
        denoiser.write_context(latents[:, 1 - OVERLAP :], 0.0, 1, cache)
        block = denoise_block(pipe, denoiser, cache, OVERLAP, noise_block, 1)
        latents = torch.cat([latents, block], dim=1)
    assert latents.shape[1] == LENGTH
    torch.testing.assert_close(video.latents, latents[0], atol=1e-4, rtol=1e-4)


def test_the_first_rollout_is_the_video_without_repetition(pipe, video):
    alone = changed(pipe, "rollout.num_rollouts=1")
    assert torch.equal(alone.generate(PROMPT).latents, video.latents[:FRAMES])


def test_every_rollout_has_its_own_noise(pipe, monkeypatch):
    drawn = []

    def record(seed, sample, block, step, shape):
        drawn.append((block, step))
        return keyed_noise(seed, sample, block, step, shape)

    monkeypatch.setattr("pipeline.build.keyed_noise", record)
    pipe.generate(PROMPT)
    assert len(set(drawn)) == len(drawn) == (2 + 1 + 1) * 2


@pytest.mark.parametrize("schedule", ["block_first", "timestep_first"])
def test_streamed_frames_are_those_of_generate(pipe, schedule):
    own = changed(pipe, f"rollout.schedule={schedule}")
    parts = list(own.stream(PROMPT))
    assert [len(part) for part in parts] == [5, 8, 4, 4]
    assert np.array_equal(np.concatenate(parts), own.generate(PROMPT).frames)


def test_videos_of_a_batch_do_not_influence_each_other(pipe, video):
    blocks = torch.cat(list(pipe.generate_blocks([OTHER, PROMPT], [0, 0])), dim=1)
    torch.testing.assert_close(blocks[1], video.latents, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(blocks[0], blocks[1], atol=1e-2)


def test_a_decoder_of_the_caller_gives_the_same_bits(pipe, video):
    decoder = pipe.vae.stream(overlap_pixel_frames(pipe.config.rollout))
    blocks = []
    for block in pipe.generate_blocks([PROMPT], [0], decoder=decoder):
        decoder.push(block)
        blocks.append(block)
    assert torch.equal(torch.cat(blocks, dim=1)[0], video.latents)


def test_only_the_overlap_stays_in_memory(pipe):
    overlap = Overlap(pipe.vae, OVERLAP)
    for _ in range(3):
        overlap.add(torch.randn(1, 2, 16, 4, 4))
    frame = 16 * 4 * 4 * 4  # bytes
    assert overlap._latents.untyped_storage().nbytes() == OVERLAP * frame
    latest = overlap._own_decoder.latest
    assert latest.shape == (1, 9, 3, 32, 32) and latest.untyped_storage().nbytes() == 4 * latest.numel()


def test_an_overlap_of_one_frame_is_an_image(pipe):
    latents = changed(pipe, "rollout.overlap_frames=1").generate(PROMPT).latents
    assert len(latents) == FRAMES + 2 * (FRAMES - 1) and latents.isfinite().all()


# ---- Files ----


def test_files_and_metadata_of_a_long_video(tmp_path, world, command, video):
    words = ("--config_path", world.config, "--prompt", PROMPT, "--seed", 3, "--save_latents", *FLAGS, *STEPS)
    assert command(*words, "--output_folder", tmp_path).code == 0
    stem = tmp_path / f"{PROMPT}-0"
    assert torch.equal(load_file(f"{stem}.safetensors")["latents"], video.latents)
    frames, _ = read_video(f"{stem}.mp4")
    assert len(frames) == 4 * (LENGTH - 1) + 1
    metadata = json.loads((tmp_path / f"{PROMPT}-0.json").read_text())
    assert (metadata["latent_frames"], metadata["pixel_frames"]) == (LENGTH, len(frames))
    assert command("--config_path", f"{stem}.json", "--output_folder", tmp_path / "again").code == 0
    assert (tmp_path / f"again/{PROMPT}-0.mp4").read_bytes() == stem.with_suffix(".mp4").read_bytes()
    kept = command(*words, "--output_folder", tmp_path, "--num_rollout", 2)
    assert kept.code == 0 and "made with other settings (rollout.num_rollouts)" in kept.out


def test_a_clip_can_start_a_long_video(tmp_path, pipe, video):
    start = video.save(tmp_path / "start.mp4", save_latents=True).with_suffix(".safetensors")
    longer = pipe.generate(PROMPT, num_frames=LENGTH + 1, video=start)
    assert torch.equal(longer.latents[:LENGTH], video.latents)
    assert len(longer.latents) == LENGTH + 1 + (ROLLOUTS - 1) * (LENGTH + 1 - OVERLAP)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("rollout.schedule=bidirectional",), "num_rollouts above 1 needs a causal generator"),
        (("rollout.overlap_frames=4",), "overlap_frames must be below the 4 latent frames of a rollout"),
        (("rollout.num_rollouts=999999",), "would make 1000002 latent frames; at most 1000000"),
        (("rollout.overlap_frames=0",), "overlap_frames must be positive"),
    ],
)
def test_impossible_rollouts_are_refused(world, keys, message):
    with pytest.raises(UserError, match=message):
        TextToVideo.load(str(world.config), *KEYS, f"video.num_output_frames={FRAMES}", *keys)
