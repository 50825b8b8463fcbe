"""Objectives with one network: the value of each loss, and the data that it refuses."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from tiny_model import all_clips, write_model_index

from model.attention import BlockCausalMask
from model.causal_wan import CausalWanModel
from model.text_encoder import TextEncoder
from model.weights import ModelDirectory
from pipeline.teacher import Teacher, sample_unipc
from pipeline.text_to_video import TextToVideo
from shapes.objectives import VAEReconstruction
from trainer.datasets.ode_pairs import open_ode_pairs, pair_file, write_ode_pair, write_sigmas
from trainer.networks import build_transformer
from trainer.objectives import OBJECTIVES
from trainer.objectives.base import SingleNetObjective
from trainer.objectives.flow_matching import FlowMatching
from trainer.objectives.ode_regression import ODERegression
from trainer.trainer import Trainer
from utils.errors import UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("tiny_presets")


class SpyNet(torch.nn.Module):
    """A network that stores its arguments and returns `flow(x, timestep)`, [B, C, F, h, w]."""

    def __init__(self, flow: Callable = lambda x, timestep: torch.zeros_like(x)):
        super().__init__()
        self.flow = flow

    def forward(self, x, timestep, text, causal=None):
        self.x, self.timestep, self.text, self.causal = x, timestep, text, causal
        return self.flow(x, timestep)


def gradients_by_micro_batch_size(objective: SingleNetObjective) -> list[dict[str, torch.Tensor]]:
    """Gradients of a batch of four clips, as one micro-batch, two and four."""
    found = []
    for size in (4, 2, 1):
        objective.config.train.batch_size, objective.config.train.total_batch_size = size, 4
        for micro_batch in range(4 // size):
            objective.backward("net", 3, micro_batch, size / 4, True)
        found.append({name: p.grad for name, p in objective.net.named_parameters()})
        objective.net.zero_grad()
    return found


def assert_equal_gradients(found: list[dict[str, torch.Tensor]]) -> None:
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


# ---- Flow matching ----


def always_read_clip_0(objective: FlowMatching) -> torch.Tensor:
    """Make an objective read clip 0 for every index; return it, [1, F, C, h, w]."""
    clip = objective.clips.read([0])
    objective.clips.read = lambda indices: clip.expand(len(indices), -1, -1, -1, -1)
    return clip.float()


def test_the_exact_flow_has_no_flow_matching_loss(make_config, clips):
    objective = FlowMatching(make_config(clips), CPU)
    x0 = always_read_clip_0(objective).transpose(1, 2)
    objective.net = SpyNet(lambda x, timestep: (x - x0) / (timestep / 1000).view(-1, 1, 1, 1, 1))
    for iteration in range(3):
        assert objective.loss(iteration, 0)[0].item() < 1e-8
    objective.net = SpyNet(lambda x, timestep: x0.expand_as(x))
    assert objective.loss(0, 0)[0].item() > 1


@pytest.mark.parametrize("forcing", ["diffusion", "teacher"])
def test_forcing_draws_one_level_per_block_and_is_causal(make_config, clips, forcing):
    config = make_config(clips, forcing=forcing, batch_size=4, timestep_shift=1.0)
    config.rollout.block_frames = 2
    config.train.clip_frames = [13]
    objective = FlowMatching(config, CPU)
    x0 = always_read_clip_0(objective)[:, :4].transpose(1, 2)

    def exact(x, timestep):
        levels = (timestep / 1000).view(len(timestep), 1, -1, 1, 1)
        return (x - x0.repeat(1, 1, x.shape[2] // 4, 1, 1)) / levels.clamp(min=1e-6)

    objective.net = spy = SpyNet(exact)
    assert objective.loss(0, 0)[0].item() < 1e-8
    assert spy.causal == BlockCausalMask((2, 2), teacher_forcing=forcing == "teacher")
    if forcing == "teacher":
        assert torch.equal(spy.x[:, :, :4], x0.expand(4, -1, -1, -1, -1)) and not spy.timestep[:, :4].any()
    levels = spy.timestep[:, -4:]
    assert torch.equal(levels[:, ::2], levels[:, 1::2])
    assert sorted((levels[:, ::2].flatten() / 125).long().tolist()) == list(range(8))  # one level in every eighth


def test_levels_cover_the_range_over_all_micro_batches_and_are_shifted(make_config, clips):
    objective = FlowMatching(make_config(clips, batch_size=4, total_batch_size=8, timestep_shift=1.0), CPU)
    levels = []
    objective.net = SpyNet()
    for micro_batch in range(2):
        objective.loss(0, micro_batch)
        levels += (objective.net.timestep / 125).long().tolist()
    assert objective.net.timestep.shape == (4,)
    assert sorted(levels) == list(range(8))  # one level in every eighth
    u = objective.net.timestep / 1000
    objective.config.train.timestep_shift = 5.0
    objective.loss(0, 1)
    torch.testing.assert_close(objective.net.timestep, 1000 * 5 * u / (1 + 4 * u))


def test_clip_lengths_are_shared_by_micro_batches_and_keep_the_number_of_pixels(make_config, clips):
    objective = FlowMatching(make_config(clips, batch_size=6, total_batch_size=12, clip_frames=[5, 17]), CPU)
    objective.net = spy = SpyNet()
    seen = set()
    for iteration in range(12):
        sizes = set()
        for micro_batch in range(2):
            objective.loss(iteration, micro_batch)
            sizes.add((len(spy.timestep), spy.x.shape[2]))
        assert len(sizes) == 1  # so that ranks take equally long
        seen |= sizes
    assert seen == {(6, 2), (1, 5)}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"clip_frames": [5, 81]}, r"clip_frames=\[5, 81\] exceeds the 21 pixel frames"),
        ({"forcing": "teacher", "clip_frames": [13]}, "blocks of 3 do not divide clips of 4 latent frames"),
    ],
)
def test_impossible_clip_lengths_are_refused(make_config, clips, keys, message):
    with pytest.raises(UserError, match=message):
        FlowMatching(make_config(clips, **keys), CPU)


@pytest.mark.parametrize("forcing", ["none", "diffusion"])
def test_flow_matching_does_not_depend_on_the_micro_batch_size(make_config, clips, forcing):
    objective = FlowMatching(make_config(clips, forcing=forcing, text_dropout=0.5), CPU)
    torch.manual_seed(0)
    torch.nn.init.normal_(objective.net.proj_out.weight)  # a new network predicts zero everywhere
    assert_equal_gradients(gradients_by_micro_batch_size(objective))


def test_dropped_captions_become_the_empty_prompt(make_config, model, clips):
    encoder = TextEncoder(*ModelDirectory.open(model).load_text_encoder(torch.float32), length=24)
    captions = all_clips(str(clips))[1]
    empty, texts = encoder.encode([""]), encoder.encode(captions)
    objective = FlowMatching(make_config(clips), CPU)
    objective.net = SpyNet()
    for dropout in (0.0, 1.0):
        objective.config.train.text_dropout = dropout
        for iteration in range(3):
            objective.loss(iteration, 0)
            for embedding in objective.net.text:
                assert torch.equal(embedding, empty[0]) == bool(dropout)
                assert any(torch.equal(embedding, text) for text in texts) == (not dropout)
    rows = objective.text.of(torch.arange(6))
    for clip, caption in enumerate(captions):  # every clip has its own caption
        same = [torch.equal(rows[clip], rows[other]) for other in range(6)]
        assert same == [caption == captions[other] for other in range(6)]


def test_sample_videos_of_a_bidirectional_network_equal_a_teachers(tmp_path, make_config, clips):
    config = make_config(clips)
    config.video.height = config.video.width = 32
    config.data.num_frames, config.teacher.num_inference_steps = 2, 3
    config.teacher.negative_prompt = "a blue square"
    objective = FlowMatching(config, CPU)
    sampler = objective.sampler
    pipeline = TextToVideo(sampler.config, objective.net, sampler.embeddings.cache, sampler.vae)
    latents = sampler.latents(pipeline, "a red circle")
    teacher = Teacher(config, deepcopy(objective.net), sampler.embeddings.cache)
    expected = sample_unipc(teacher.flow(["a red circle"]), teacher.noise(0, [0]), 3, config.teacher.timestep_shift)
    assert latents.std() > 0.1
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    objective.sample(tmp_path)
    assert len(list(tmp_path.glob("*.mp4"))) == 3  # one per caption
    objective.backward("net", 0, 0, 1.0, True)  # it can still be trained
    assert all(parameter.grad is not None for parameter in objective.net.parameters())


# ---- ODE regression ----

TEACHER_SIGMAS = [1.0, 0.96, 0.8889, 0.7273, 0.0]


@pytest.fixture
def one_end(tmp_path) -> torch.Tensor:
    """Write ODE pairs from different noise to one clip into `tmp_path`; return the clip, [F, C, h, w]."""
    x0 = torch.randn(6, 16, 4, 4, generator=torch.Generator().manual_seed(9))
    for index in range(3):
        points = torch.randn(5, 6, 16, 4, 4, generator=torch.Generator().manual_seed(index))
        points[-1] = x0
        write_ode_pair(pair_file(tmp_path, index), "a red circle", points)
    write_sigmas(tmp_path, TEACHER_SIGMAS)
    return x0


def test_the_exact_flow_has_no_ode_regression_loss(tmp_path, make_config, one_end):
    x0 = one_end.transpose(0, 1)[None]
    objective = ODERegression(make_config(tmp_path), CPU)

    def exact(x, timestep):
        sigma = (timestep / 1000)[:, None, :, None, None]
        return torch.where(sigma > 0, (x - x0) / sigma.clamp(min=1e-6), 1e6)  # clean blocks do not count

    objective.net = SpyNet(exact)
    for iteration in range(5):
        assert objective.loss(iteration, 0)[0].item() < 1e-8
    objective.net = SpyNet()
    assert max(objective.loss(iteration, 0)[0].item() for iteration in range(5)) > 0.1


def test_every_block_is_at_one_point_with_the_teachers_level(tmp_path, make_config, one_end):
    points = open_ode_pairs(str(tmp_path), [], 5).read(range(3))
    objective = ODERegression(make_config(tmp_path, batch_size=4), CPU)
    assert objective.sigmas.tolist() == pytest.approx(TEACHER_SIGMAS)
    objective.net = SpyNet()
    seen = set()
    for iteration in range(20):
        objective.loss(iteration, 0)
        index = (objective.net.timestep[..., None] - 1000 * objective.sigmas).abs().argmin(-1)  # [B, F]
        assert torch.equal(objective.net.timestep, 1000 * objective.sigmas[index])
        blocks = index.unflatten(1, (2, 3))
        assert torch.equal(blocks, blocks[..., :1].expand(-1, -1, 3))
        for x, of_frame in zip(objective.net.x.transpose(1, 2), index, strict=True):
            fitting = [all(torch.equal(x[f], pair[of_frame[f], f]) for f in range(6)) for pair in points]
            assert any(fitting)
        seen |= {tuple(pair) for pair in blocks[..., 0].tolist()}
    assert objective.net.causal == BlockCausalMask((3, 3))
    assert {point for pair in seen for point in pair} == set(range(5)) and len(seen) > 12  # blocks are independent


@pytest.mark.parametrize("forcing", ["diffusion", "teacher", ""])
def test_an_independent_first_frame_has_its_own_level(tmp_path, make_config, clips, one_end, forcing):
    """In flow matching with both kinds of forcing, and in ODE regression (no forcing)."""
    config = make_config(clips, forcing=forcing, batch_size=4) if forcing else make_config(tmp_path, batch_size=4)
    config.rollout.independent_first_frame, config.rollout.block_frames = True, 5
    objective = FlowMatching(config, CPU) if forcing else ODERegression(config, CPU)
    objective.net = spy = SpyNet()
    different = 0
    for iteration in range(5):
        objective.loss(iteration, 0)
        levels = spy.timestep[:, -6:]
        assert torch.equal(levels[:, 1:], levels[:, 1:2].expand(-1, 5))
        different += (levels[:, 0] != levels[:, 1]).sum().item()
    assert different > 5
    assert spy.causal == BlockCausalMask((1, 5), teacher_forcing=forcing == "teacher")


def test_ode_regression_does_not_depend_on_the_micro_batch_size(make_config, pairs, model):
    objective = ODERegression(make_config(pairs, init=str(model / "transformer")), CPU)
    assert_equal_gradients(gradients_by_micro_batch_size(objective))


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0, 0.9, 0.8, 0.6, 0.2], r"end at the noise level 0\.2, .* regenerate them with --save_indices \.\.\. -1"),
        ([1.0, 0.9, 0.95, 0.6, 0.0], "must fall from at most 1 to at least 0"),
        ([5.0, 0.9, 0.8, 0.6, 0.0], "must fall from at most 1 to at least 0"),
        (None, r"data\.sigmas"),
    ],
)
def test_unusable_noise_levels_are_refused(tmp_path, make_config, pairs, sigmas, message):
    for file in pairs.glob("*.pt"):
        (tmp_path / file.name).symlink_to(file)
    if sigmas is not None:
        write_sigmas(tmp_path, sigmas)
    with pytest.raises(UserError, match=message):
        ODERegression(make_config(tmp_path), CPU)


def test_pairs_with_other_noise_levels_than_the_rollouts_are_refused(make_config, pairs):
    config = make_config(pairs)
    config.rollout.denoising_step_list = [1000.0, 500.0]
    with pytest.raises(UserError, match="points at 5 noise levels, but the rollout has 3"):
        ODERegression(config, CPU)
    config = make_config(pairs)
    config.rollout.block_frames = 4
    with pytest.raises(UserError, match="have 6 frames, which blocks of 4 do not divide"):
        ODERegression(config, CPU)


@pytest.mark.parametrize("objective", [FlowMatching, ODERegression])
def test_missing_or_corrupt_data_is_a_one_line_error(tmp_path, make_config, objective):
    with pytest.raises(UserError, match=r"no (encoded clips|ODE pairs) in .*; \w+ them with scripts/"):
        objective(make_config(tmp_path), CPU)
    for content in (b"broken", b"", b"\x80\x02K\x01.", b"PK\x03\x04" + bytes(100)):
        (tmp_path / "0.pt").write_bytes(content)
        (tmp_path / "0.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="delete it and"):
            objective(make_config(tmp_path), CPU)


# ---- VAE ----


def test_training_only_the_decoder_keeps_the_latents(tmp_path, make_config, model):
    changes = dict(init=str(model), decoder_only=True, clip_frames=[5], optimizer="muon", max_iterations=1)
    config = make_config(output=str(tmp_path / "out"), save=False, **changes)
    write_model_index(tmp_path / "out")
    Trainer(config, VAEReconstruction(config, CPU), str(tmp_path / "log")).train()
    before, after = (ModelDirectory.open(path).load_vae(torch.float32) for path in (model, tmp_path / "out"))
    assert after.config.latents_mean == before.config.latents_mean
    same = {n: torch.equal(w.bfloat16(), after.state_dict()[n].bfloat16()) for n, w in before.state_dict().items()}
    assert all(same[name] for name in same if name.startswith(("encoder.", "quant_conv.")))
    assert not all(same[name] for name in same if name.startswith("decoder."))


# ---- All objectives ----


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"score_distillation"}))
def test_a_loss_is_a_function_of_seed_and_iteration(name, make_config, clips, pairs):
    data = {"flow_matching": clips, "ode_regression": pairs}.get(name, "")

    def losses(seed: int, iterations: tuple[int, ...]) -> list[float]:
        config = make_config(data, clip_frames=[5])
        config.runtime.seed = seed
        objective = OBJECTIVES[name](config, CPU)
        return [objective.loss(iteration, 0)[0].item() for iteration in iterations]

    first = losses(0, (3, 1, 3))
    assert first[0] == first[2] != first[1]
    assert losses(0, (1, 3)) == first[1:]
    assert losses(1, (3,)) != first[:1]


def test_initial_weights_are_random_or_those_of_train_init(make_config, model):
    random = build_transformer(make_config(), CPU)
    assert random.proj_out.weight.abs().max() == 0 and random.training  # Wan's initialisation: the flow is 0
    loaded = build_transformer(make_config(init=str(model / "generator")), CPU)
    stored = ModelDirectory.open(model).load_transformer(
        CausalWanModel, torch.float32, weights=str(model / "generator")
    )
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), stored.parameters(), strict=True))
    assert next(loaded.parameters()).dtype == torch.float32
