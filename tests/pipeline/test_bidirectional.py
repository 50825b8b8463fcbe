"""Bidirectional rollouts (one block that holds the whole video, without a cache), many steps, and guidance."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from model.conditioning import TextContext
from model.denoiser import Denoiser, GuidedDenoiser
from model.flow import add_noise, solver_sigmas
from pipeline.build import build_rollout, build_schedule, rollout_sigmas
from pipeline.schedule import Denoise
from pipeline.teacher import guided_flow, sample_euler
from utils.config import Config
from utils.errors import UserError
from utils.rng import keyed_noise

FRAMES, SHAPE = 5, (5, 4, 4, 6)


@pytest.fixture
def config() -> Config:
    config = Config()
    config.rollout.schedule = "bidirectional"
    config.video.num_output_frames, config.video.height, config.video.width = FRAMES, 32, 48
    config.model.dtype = "float32"
    return config


def run(config: Config, denoiser, samples=(0,)) -> torch.Tensor:
    """Return the latents of a rollout with one block."""
    schedule = build_schedule(config.rollout, config.video.num_output_frames)
    rollout = build_rollout(config, denoiser, samples)
    [(block, latents)] = rollout.run(list(schedule.ops(config.rollout.order)), schedule.caches)
    assert block == 0
    return latents


def test_a_bidirectional_video_is_one_block_of_any_length(config):
    for frames in (1, 5, 23):  # also longer than the window, and lengths that blocks of three do not divide
        schedule = build_schedule(config.rollout, frames)
        assert list(schedule.ops()) == [Denoise(0, step, 0) for step in range(4)]
        assert list(schedule.ops("diagonal", fuse_context=True)) == list(schedule.ops())


@pytest.mark.parametrize("deterministic", [False, True])
def test_it_equals_a_loop_over_the_network_of_diffusers(config, net, text, deterministic):
    config.rollout.use_ode_trajectory = deterministic
    theirs = WanTransformer3DModel.from_config(net.config).eval()
    theirs.load_state_dict(net.state_dict())
    embeddings = torch.randn(1, 5, net.config.text_dim, generator=torch.Generator().manual_seed(1))
    sigmas = rollout_sigmas(config.rollout)
    x = keyed_noise(0, 3, 0, 0, SHAPE)[None]
    with torch.no_grad():
        for step, sigma in enumerate(sigmas[:-1]):
            flow = theirs(x.transpose(1, 2), torch.tensor([1000 * sigma]), embeddings)[0].transpose(1, 2)
            if deterministic:
                x = x + (sigmas[step + 1] - sigma) * flow
            else:
                x = add_noise(x - sigma * flow, keyed_noise(0, 3, 0, step + 1, SHAPE)[None], sigmas[step + 1])
    torch.testing.assert_close(run(config, Denoiser(net, text), [3]), x, atol=2e-4, rtol=1e-4)


def test_it_needs_no_cache_and_no_window(config, net, text):
    reference = run(config, Denoiser(net, text))
    config.rollout.window, config.rollout.sink, config.rollout.block_frames = 3, 1, 2
    assert build_rollout(config, Denoiser(net, text), [0]).new_cache() is None
    assert torch.equal(run(config, Denoiser(net, text)), reference)


def test_it_cannot_continue_a_prefix(config):
    with pytest.raises(UserError, match="bidirectional cannot continue an image or a clip"):
        build_schedule(config.rollout, 5, prefix_frames=1)


# ---- Many steps and guidance ----


@pytest.fixture
def negative(net) -> TextContext:
    return net.encode_text(torch.randn(1, 5, net.config.text_dim, generator=torch.Generator().manual_seed(2)))


def test_many_steps_with_guidance_equal_the_teachers_euler_solver(config, net, text, negative):
    config.rollout.num_steps, config.rollout.timestep_shift, config.rollout.use_ode_trajectory = 12, 8.0, True
    noise = keyed_noise(0, 3, 0, 0, SHAPE)[None]

    def flow(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return guided_flow(net, x, sigma, text, negative, 3.0)

    expected = sample_euler(flow, noise, solver_sigmas(12, 8.0))[-1]
    denoiser = GuidedDenoiser(Denoiser(net, text), Denoiser(net, negative), 3.0)
    latents = run(config, denoiser, [3])
    assert latents.std() > 0.1
    torch.testing.assert_close(latents, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["block_first", "timestep_first"])
@pytest.mark.parametrize("context", ["output", "input"])
@pytest.mark.parametrize("fuse", [False, True])
def test_guidance_of_a_causal_rollout_equals_two_passes_by_hand(config, net, text, negative, method, context, fuse):
    """Each branch attends to its own context: the earlier blocks under its own text."""
    config.rollout.schedule, config.rollout.context, config.rollout.block_frames = method, context, 2
    config.rollout.num_steps, config.rollout.use_ode_trajectory, config.video.num_output_frames = 3, True, 4
    guided = GuidedDenoiser(Denoiser(net, text), Denoiser(net, negative), 3.0)
    schedule = build_schedule(config.rollout, 4)
    blocks = build_rollout(config, guided, [0]).run(list(schedule.ops(fuse_context=fuse)), schedule.caches)
    latents = torch.cat([block for _, block in blocks], dim=1)

    sigmas, shape = solver_sigmas(3, 5.0), (2, 4, 4, 6)
    states = [[keyed_noise(0, 0, block, 0, shape)[None]] for block in range(2)]  # x at each noise index

    def predict(block: int, step: int, words: TextContext) -> torch.Tensor:
        cache = net.new_cache(1, 4, 6, 2, 2)
        if block:
            index = 3 if method == "block_first" else step + (context == "output")
            Denoiser(net, words).write_context(states[0][index], sigmas[index], 0, cache)
        return Denoiser(net, words).denoise(states[block][step], sigmas[step], 2 * block, cache)

    with torch.no_grad():
        for block in range(2):
            for step in range(3):
                cond, uncond = predict(block, step, text), predict(block, step, negative)
                x, x0 = states[block][step], uncond + 3.0 * (cond - uncond)
                states[block].append(x + (sigmas[step + 1] - sigmas[step]) * (x - x0) / sigmas[step])
    torch.testing.assert_close(latents, torch.cat([state[-1] for state in states], dim=1), atol=1e-3, rtol=1e-3)
