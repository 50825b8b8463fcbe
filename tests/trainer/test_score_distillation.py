"""Score distillation on tiny networks: gradients, random draws, forward KL, and whole runs.

Claims: gradients of blocks that are denoised again equal those of the whole graph. Random draws are shared by all
micro-batches. A critic that equals the teacher gives no gradient. Each step changes only its own network. Each mode of
the forward KL uses the teacher's points and noise levels. An interrupted run continues bit for bit.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import Killed, assert_same_bits, gradients, state_of

from model.causal_wan import CausalWanModel
from model.flow import flow_to_x0
from pipeline.history_replay import replay_exit_step
from trainer.datasets.ode_pairs import write_ode_pair, write_sigmas
from trainer.objectives.score_distillation import ScoreDistillation
from trainer.objectives.self_rollout import GeneratedClip, history_plan
from trainer.trainer import Trainer
from utils.clips import read_video
from utils.errors import UserError
from utils.rng import keyed_noise

CPU = torch.device("cpu")
Make = Callable[..., ScoreDistillation]


@pytest.fixture
def make(make_config, pairs, model) -> Make:
    """make(schedule, pairs, **keys of any section): the objective on clips of six latent frames of 4x4."""

    def make(schedule: str = "timestep_first", path: Path = pairs, **keys) -> ScoreDistillation:
        config = make_config(path, objective="score_distillation", init=str(model / "transformer"))
        config.rollout.schedule = schedule
        config.video.height = config.video.width = 32
        config.data.num_frames = 6
        config.distill.max_rollout_frames = 6
        config.teacher.negative_prompt = ""
        for key, value in keys.items():
            sections = (
                *(config.distill, config.rollout, config.data, config.video, config.model, config.train),
                config.teacher,
            )
            setattr(next(section for section in sections if hasattr(section, key)), key, value)
        return ScoreDistillation(config, CPU)

    return make


def roll_out(objective: ScoreDistillation, role: str, iteration: int, micro_batch: int = 0, **keys) -> GeneratedClip:
    return objective.clip_source.run(objective.batch(role, iteration, micro_batch), **keys)


# ---- Rollouts and gradients ----


FIRST_FRAME = dict(independent_first_frame=True, block_frames=5)  # divides the clips into blocks of one and five


@pytest.mark.parametrize(
    ("schedule", "frames", "keys"),
    [
        *((schedule, frames, {}) for schedule in ("timestep_first", "block_first") for frames in (6, 12)),
        ("timestep_first", 11, FIRST_FRAME | dict(context="clean", context_noise=0.2)),
    ],
)
def test_block_by_block_gradients_equal_those_of_the_whole_graph(make: Make, schedule, frames, keys):
    """This also holds if the rollout is longer than the training window (law 6, docs/method.md)."""
    objective = make(schedule, max_rollout_frames=frames, window=9, guidance_scale=3.0, **keys)
    found = []
    for block_backward in (False, True):
        objective.config.distill.block_backward = block_backward
        for iteration in (0, 5):
            metrics = objective.backward("generator", iteration, 0, 1.0, True)
        assert all(value == value for value in metrics.values())
        found.append(gradients(objective.generator))
    whole_graph, by_block = found
    assert max(g.abs().max() for g in whole_graph.values()) > 0
    for name in whole_graph:
        torch.testing.assert_close(by_block[name], whole_graph[name], atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("schedule", ["timestep_first", "block_first"])
def test_the_gradient_of_a_history_reaches_earlier_blocks(make, schedule):
    """Also in rollouts that are longer than the clip, with a shorter window and a sink; the x0 are the rollout's."""
    keys = dict(block_frames=1, window=3, sink=1, max_rollout_frames=9)
    found = {}
    for mode in ("none", "context", "released"):
        objective = make(schedule, history_gradient=mode, **keys)
        objective.clip_source._draw_exit = lambda role, iteration: (2, 9)
        batch = objective.batch("generator", 0, 0)
        clip = objective.clip_source.run(batch)
        assert list(clip.trained_blocks) == [4, 5, 6, 7, 8] and not clip.blocks[8].requires_grad
        gradient = torch.zeros(2, 6, *clip.blocks[0].shape[2:])
        gradient[:, -1] = 1.0  # of the last block
        objective.clip_source.backward(clip, gradient, batch.embeddings, last=True)
        found[mode] = gradients(objective.generator)["blocks.0.attn1.to_v.weight"]
        if mode != "none":
            plan = history_plan(objective.config, 9, 2)
            denoiser = objective.clip_source._denoiser(batch.embeddings, graph=False)
            for block, x0 in replay_exit_step(clip.rollout, plan, denoiser).items():
                torch.testing.assert_close(x0.detach(), clip.blocks[block], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found["context"], found["none"], rtol=1e-3)
    assert not torch.allclose(found["released"], found["none"], rtol=1e-3)
    assert not torch.allclose(found["released"], found["context"], rtol=1e-3)


def test_micro_batches_share_exit_step_and_length_which_cover_their_ranges(make: Make):
    objective = make(min_exit_step=1, max_rollout_frames=12)
    drawn = [objective.clip_source._draw_exit("critic", iteration) for iteration in range(24)]
    assert {step for step, _ in drawn} == {1, 2, 3} and {frames for _, frames in drawn} == {6, 9, 12}
    for iteration in (0, 1):
        for micro_batch in range(2):
            generated = roll_out(objective, "critic", iteration, micro_batch, trained=False)
            assert (generated.exit_step, generated.frames.shape[1]) == drawn[iteration]


def test_every_micro_batch_and_role_has_its_own_noise_and_prompts(make: Make):
    objective = make(total_batch_size=4)
    starts = []
    for role in ("generator", "critic"):
        for micro_batch in range(2):
            for iteration in (0, 5):
                starts += list(roll_out(objective, role, iteration, micro_batch).rollout.noise(0, 0))
    assert not any(torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])
    chosen = [objective.batch("generator", iteration, part).positions for iteration in (0, 5) for part in (0, 1)]
    assert chosen == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]  # no prompt is skipped


def test_self_rollouts_and_the_forward_kl_draw_different_context_noise(make: Make, monkeypatch):
    drawn = []

    def record(seed, sample, block, step, shape):
        drawn.append((sample, block, step))
        return keyed_noise(seed, sample, block, step, shape)

    monkeypatch.setattr("pipeline.build.keyed_noise", record)
    objective = make("block_first", forward_kl_mode="rollout", context_noise=0.2)
    objective.backward("generator", 0, 0, 1.0, True)
    contexts = [key for key in drawn if key[2] == 4]
    assert len(set(contexts)) == len(contexts) == 4  # two clips of each, one context each


def test_a_critic_that_equals_the_teacher_gives_no_gradient(make: Make):
    """Both start from the base's weights; without guidance their predictions are equal."""
    objective = make(guidance_scale=1.0)
    metrics = objective.backward("generator", 0, 0, 1.0, True)
    assert metrics["dmd_gradient"] == 0 and metrics["dmd_output_gradient"] == 0
    objective.config.distill.guidance_scale = 4.0
    assert objective.backward("generator", 0, 0, 1.0, True)["dmd_gradient"] > 0


def test_the_dmd_gradient_is_the_critic_minus_the_guided_teacher(make: Make):
    objective = make(guidance_scale=3.0)
    embeddings = objective.batch("generator", 0, 0).embeddings
    clip = torch.randn(2, 6, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    calls = []
    net = objective.teacher
    handle = net.register_forward_pre_hook(lambda module, args: calls.append(args))
    gradient = objective.score_difference(clip, embeddings, 0, 0)
    handle.remove()
    (x, timestep, _), (_, _, negative) = calls
    assert timestep.shape == (2,) and (timestep >= 20).all() and (timestep <= 980).all()
    assert torch.equal(negative[0], objective.negative[0])
    sigma = (timestep / 1000).view(-1, 1, 1, 1, 1)
    with torch.no_grad():
        conditional, unconditional = (net(x, timestep, text).transpose(1, 2) for text in (embeddings, negative))
    teacher = flow_to_x0(x.transpose(1, 2), unconditional + 3 * (conditional - unconditional), sigma)
    critic = flow_to_x0(x.transpose(1, 2), conditional, sigma)
    expected = (critic - teacher) / (clip - teacher).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_noise_levels_are_clamped_and_spread_over_the_clips(make: Make):
    """Both for the critic and for the score difference. Without the clamp, some draw would leave the range."""
    objective = make(min_timestep=400, max_timestep=600, guidance_scale=1.0, batch_size=8, timestep_shift=3.0)
    clip = torch.randn(8, 6, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    embeddings = objective.batch("critic", 0, 0).embeddings
    seen: list[torch.Tensor] = []
    objective.critic.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    objective.score_difference(clip, embeddings, 0, 0)
    objective.backward("critic", 0, 0, 1.0, True)
    assert len(seen) == 2
    for timestep in seen:
        assert timestep.min() == 400 and timestep.max() == 600
        assert len(set(timestep.tolist())) > 2  # clips have levels of their own


def test_dmd_uses_the_configured_negative_prompt(make: Make):
    objective = make(guidance_scale=3.0, negative_prompt="a blue square")
    empty, configured = objective.text.encode([""]), objective.text.encode(["a blue square"])
    assert not torch.equal(empty, configured)
    embeddings = objective.batch("generator", 0, 0).embeddings
    texts: dict[str, list[torch.Tensor]] = {"critic": [], "teacher": []}
    for name, found in texts.items():
        getattr(objective, name).register_forward_pre_hook(lambda module, args, found=found: found.append(args[2]))
    objective.score_difference(torch.zeros(2, 6, 16, 4, 4), embeddings, 0, 0)
    assert [len(found) for found in texts.values()] == [1, 2]
    assert torch.equal(texts["critic"][0], embeddings) and torch.equal(texts["teacher"][0], embeddings)
    assert torch.equal(texts["teacher"][1], configured.expand(2, -1, -1))


def test_the_exact_flow_of_the_generators_clip_has_no_critic_loss(make: Make):
    """The critic is trained on the flow noise - x0 of its own noisy input."""
    objective = make(min_timestep=100)
    clips = []
    training_window = objective.clip_source.training_window

    def spied_window(generated):
        clips.append(training_window(generated))
        return clips[-1]

    class ExactCritic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, timestep, text, causal=None):
            x0 = clips[-1][0].transpose(1, 2)
            return self.factor * (x - x0) / (timestep / 1000).view(-1, 1, 1, 1, 1)

    objective.clip_source.training_window = spied_window
    objective.critic = ExactCritic()
    for iteration in range(3):
        assert objective.backward("critic", iteration, 0, 1.0, True)["critic"] < 1e-8
    torch.nn.init.zeros_(objective.critic.factor)
    assert objective.backward("critic", 0, 0, 1.0, True)["critic"] > 0.5


def test_each_step_changes_only_its_own_network(make: Make):
    objective = make()
    assert [objective.networks_to_update(i) for i in range(6)] == [
        ["generator", "critic"],
        *[["critic"]] * 4,
        ["generator", "critic"],
    ]
    objective.config.distill.critic_warmup = 1
    assert [i for i in range(11) if "generator" in objective.networks_to_update(i)] == [5, 10]
    objective.backward("generator", 0, 0, 1.0, True)
    assert gradients(objective.generator) and not gradients(objective.critic)
    objective.backward("critic", 0, 0, 1.0, True)
    assert gradients(objective.critic) and not gradients(objective.generator)
    assert not any(p.requires_grad for p in objective.teacher.parameters())


def test_a_longer_rollout_trains_its_end_after_a_re_encoded_first_frame(make: Make):
    objective = make(max_rollout_frames=12)
    rollouts = objective.clip_source
    iteration = next(i for i in range(20) if rollouts._draw_exit("critic", i)[1] == 12)
    generated = roll_out(objective, "critic", iteration)
    clip, mask = rollouts.training_window(generated)
    assert clip.shape[1] == 6 and mask.tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    assert torch.equal(clip[:, 1:], generated.frames[:, 7:])
    pixels = rollouts.vae.decode(generated.frames[:, :7])[:, -1:]
    assert torch.equal(clip[:, :1], rollouts.vae.encode(pixels))
    assert list(generated.trained_blocks) == [3]  # the first of the window's two blocks is masked
    iteration = next(i for i in range(20) if rollouts._draw_exit("critic", i)[1] == 6)
    assert rollouts.training_window(roll_out(objective, "critic", iteration))[1] is None


def test_only_the_re_encoded_frame_is_masked_if_the_first_frame_is_independent(make: Make):
    objective = make(max_rollout_frames=11, **FIRST_FRAME)
    rollouts = objective.clip_source
    iteration = next(i for i in range(20) if rollouts._draw_exit("critic", i)[1] == 11)
    generated = roll_out(objective, "critic", iteration)
    assert [generated.blocks[block].shape[1] for block in range(3)] == [1, 5, 5]
    clip, mask = rollouts.training_window(generated)
    assert mask.tolist() == [[0, 1, 1, 1, 1, 1]] * 2 and torch.equal(clip[:, 1:], generated.frames[:, 6:])
    assert list(generated.trained_blocks) == [2] and rollouts.noise(generated).shape == clip.shape
    iteration = next(i for i in range(20) if rollouts._draw_exit("critic", i)[1] == 6)
    assert list(roll_out(objective, "critic", iteration).trained_blocks) == [0, 1]


def test_micro_batches_sum_to_the_whole_batch(make: Make):
    """Both steps, with DMD and forward KL: four clips as one micro-batch, two or four."""
    objective = make(guidance_scale=3.0, max_rollout_frames=9)
    found = []
    for size in (4, 2, 1):
        objective.config.train.batch_size, objective.config.train.total_batch_size = size, 4
        for micro_batch in range(4 // size):
            for role in ("generator", "critic"):
                objective.backward(role, 5, micro_batch, size / 4, True)
        of_critic = {f"critic {name}": gradient for name, gradient in gradients(objective.critic).items()}
        found.append(gradients(objective.generator) | of_critic)
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


# ---- Forward KL ----

MODES = ("bidirectional", "block_causal", "rollout")


def forward_kl(objective: ScoreDistillation, iteration: int = 0) -> dict[str, float]:
    """Run the backward pass of the forward KL alone; return its metrics."""
    positions = objective.batch("generator", iteration, 0).positions
    return objective.forward_kl.backward(iteration, positions, 1.0, True)


def forward_kl_gradients(objective: ScoreDistillation) -> dict[str, torch.Tensor]:
    assert forward_kl(objective)["forward_kl"] > 0
    return gradients(objective.generator)


def test_the_weight_scales_the_gradient_of_the_forward_kl(make: Make):
    objective = make()
    found, losses = [], []
    for weight in (1.0, 4.0):
        objective.config.distill.forward_kl_weight = weight
        metrics = forward_kl(objective)
        losses.append((metrics["forward_kl"], metrics["forward_kl_output_gradient"]))
        found.append(gradients(objective.generator))
    assert losses[1] == (losses[0][0], pytest.approx(4 * losses[0][1]))  # the logged loss has no weight
    assert max(gradient.abs().max() for gradient in found[0].values()) > 0
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], 4 * gradient, msg=name)


@pytest.mark.parametrize("schedule", ["timestep_first", "block_first"])
def test_a_forward_kl_rollout_needs_only_the_points_it_reads(make: Make, pairs, tmp_path, schedule):
    """Pairs with the default points give the gradients of pairs with all points."""
    for file in pairs.glob("*.pt"):
        [(prompt, points)] = torch.load(file).items()
        write_ode_pair(tmp_path / file.name, prompt, points[0, :2])
    write_sigmas(tmp_path, [1.0, 0.9375])
    whole, cut = (forward_kl_gradients(make(schedule, path, forward_kl_mode="rollout")) for path in (pairs, tmp_path))
    assert_same_bits(whole, cut)


def test_context_noise_of_a_forward_kl_rollout_is_fresh(make: Make):
    """It is not the noise of the trajectory, and it differs between clips."""
    objective = make("block_first", forward_kl_mode="rollout", context_noise=0.5)
    term, written = objective.forward_kl, []
    write = objective.generator.write_block
    objective.generator.write_block = lambda x, *rest: written.append(x.transpose(1, 2)) or write(x, *rest)
    points = term.pairs.read([0, 0])  # the same trajectory twice
    text = term.text.encode([term.pairs.prompts[0]] * 2)
    x, flow = term.predict(points[:, 0], points[:, 0], 0, text, range(2))
    x0 = flow_to_x0(x, flow, 1.0)[:, :3].detach()
    [context] = written
    noise = (context - 0.5 * x0) / 0.5
    assert not torch.allclose(noise[0], noise[1], atol=0.1)
    expected = torch.stack([keyed_noise(objective.config.runtime.seed, n, 0, 4, (3, 16, 4, 4)) for n in (-1, -2)])
    torch.testing.assert_close(noise, expected, atol=1e-5, rtol=1e-5)


def test_activation_checkpointing_works_with_context_input(make: Make):
    """A fused pass that also writes cannot be recomputed for its graph, so the write becomes a pass of its own."""
    objective = make(forward_kl_mode="rollout", context="input", block_backward=False)
    found = []
    for checkpointing in (False, True):
        objective.generator.gradient_checkpointing = checkpointing
        found.append(forward_kl_gradients(objective))
        objective.backward("generator", 0, 0, 1.0, True)
        found[-1] |= {f"{name} of DMD": g for name, g in gradients(objective.generator).items()}
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("keys", [{}, FIRST_FRAME], ids=["equal blocks", "independent first frame"])
def test_modes_differ_and_a_rollout_with_context_input_equals_the_block_causal_pass(make: Make, keys):
    """At the first step, a rollout with context rule `input` attends to the same keys and values as one causal pass."""
    objective = make(context="input", **keys)
    found = {}
    for mode in MODES:
        objective.config.distill.forward_kl_mode = mode
        found[mode] = forward_kl_gradients(objective)
    name = "blocks.0.attn1.to_v.weight"
    assert not torch.allclose(found["bidirectional"][name], found["block_causal"][name], rtol=0.05)
    # Only the last layer's gradients are equal: in the rollout no gradient reaches the context's keys and values.
    last = "proj_out.weight"
    torch.testing.assert_close(found["rollout"][last], found["block_causal"][last], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_the_generator_is_conditioned_on_the_teachers_noise_levels(make: Make, mode):
    objective = make(forward_kl_mode=mode, forward_kl_steps=3)
    objective.forward_kl.pairs.sigmas = teacher = [1.0, 0.96, 0.8889, 0.7273, 0.0]
    timesteps = []
    embed = objective.generator.embed_timestep
    objective.generator.embed_timestep = lambda timestep: timesteps.append(timestep) or embed(timestep)
    steps = set()
    for iteration in range(12):
        timesteps.clear()
        forward_kl(objective, iteration)
        levels = {round(t / 1000, 4) for timestep in timesteps for t in timestep.flatten().tolist()}
        assert levels <= set(teacher)
        steps.add(max(levels) if mode != "rollout" else min(levels))
        if len(steps) == 3:
            return
    pytest.fail(f"only the steps at levels {steps} were trained")


@pytest.mark.parametrize("mode", MODES)
def test_the_target_lies_on_the_teachers_chord(make: Make, mode):
    """This holds at every step, and in mode rollout although the generator's own point differs."""
    objective = make(forward_kl_mode=mode, forward_kl_steps=3)
    term = objective.forward_kl
    chosen = term.order.at(range(2)).tolist()
    points = term.pairs.read(chosen)
    text = term.text.encode([term.pairs.prompts[i] for i in chosen])
    expected = []
    for step in range(3):
        start, end = term.pairs.sigmas[step : step + 2]
        target = points[:, step] - start * (points[:, step + 1] - points[:, step]) / (end - start)
        with torch.no_grad():
            x, flow = term.predict(points[:, 0], points[:, step], step, text, range(2))
        if mode != "rollout" or step == 0:
            assert torch.equal(x, points[:, step])
        else:
            assert not torch.allclose(x, points[:, step])
        expected.append((flow_to_x0(x, flow, start) - target).square().mean().item())
    seen = set()
    for iteration in range(12):
        loss = term.backward(iteration, range(2), 1.0, True)["forward_kl"]
        [step] = [step for step in range(3) if loss == pytest.approx(expected[step], rel=1e-4)]
        seen.add(step)
        if seen == {0, 1, 2}:
            return
    pytest.fail(f"only steps {seen} were trained")


@pytest.mark.parametrize("keys", [{"forward_kl_weight": 0.0}, {"forward_kl_mode": "block_causal"}])
def test_bidirectional_motion_is_always_logged(make: Make, tmp_path, keys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    objective = make(prompts=str(prompts), **keys)
    found = objective.backward("generator", 0, 0, 1.0, True)["motion_bidirectional"]
    rollout = roll_out(objective, "generator", 0).rollout
    noise = torch.cat([rollout.noise(0, 0), rollout.noise(1, 0)], dim=1)
    text = objective.batch("generator", 0, 0).embeddings
    with torch.no_grad():
        x0 = noise - objective.generator(noise.transpose(1, 2), torch.full((2,), 1000.0), text).transpose(1, 2)
    assert found == pytest.approx((x0[:, 1:] - x0[:, :-1]).abs().mean().item(), rel=1e-4)


def test_bad_configurations_are_refused_before_weights_are_loaded(make: Make, monkeypatch):
    monkeypatch.setattr("model.weights.ModelDirectory.load_transformer", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="--height 36 is not a multiple of 16"):
        make(height=36)
    with pytest.raises(UserError, match=r"set data\.prompts"):
        make(forward_kl_weight=0.0)
    monkeypatch.undo()
    with pytest.raises(UserError, match="attention_backend=nonsense"):
        make(attention_backend="nonsense")


# ---- Whole runs ----


@pytest.fixture
def make_trainer(make: Make, tmp_path) -> Callable[..., Trainer]:
    """make_trainer(name, **keys): a run of four iterations; the generator is trained in the first and the third."""

    def make_trainer(name: str, **keys) -> Trainer:
        keys = dict(max_iterations=4, ema_start=1, generator_every=2, guidance_scale=3.0) | keys
        objective = make(**keys)
        return Trainer(objective.config, objective, str(tmp_path / name))

    return make_trainer


def test_interrupted_and_sampled_runs_end_with_the_weights_of_a_plain_run(make_trainer, tmp_path):
    """Stopped twice and resumed; with sample videos of the EMA, one of which cannot be written."""
    plain = make_trainer("plain", save=False)
    before = plain.objective.generator.proj_out.weight.clone()
    plain.train()
    assert not torch.equal(before, plain.objective.generator.proj_out.weight)

    for stop in (2, 3):  # after the generator's update in the third iteration; in one that trains the critic only
        run = make_trainer("parts")
        backward = run.objective.backward

        def failing(name, iteration, *rest, backward=backward, stop=stop):
            if (name, iteration) == ("critic", stop):
                raise Killed
            return backward(name, iteration, *rest)

        run.objective.backward = failing
        with pytest.raises(Killed):
            run.train()
    resumed = make_trainer("parts")
    resumed.train()
    assert_same_bits(state_of(resumed), state_of(plain))
    lines = (tmp_path / "plain/metrics.jsonl").read_text()
    assert lines == (tmp_path / "parts/metrics.jsonl").read_text()
    for key in ("dmd_output_gradient", "forward_kl_output_gradient", "motion", "motion_bidirectional", "critic"):
        assert f'"{key}"' in lines

    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    prompts = str(tmp_path / "prompts.txt")
    sampled = make_trainer("sampled", save=False, snapshot_every=2, sample_every=2, sample_prompts=prompts)
    seen = []
    sample = sampled.objective.sample
    next_folder = tmp_path / "sampled/samples/00000004"

    def spied_sample(folder):
        seen.append(torch.equal(sampled.objective.generator.proj_out.weight, sampled.ema.weights["proj_out.weight"]))
        sample(folder)
        (next_folder / "a red circle-0.mp4").mkdir(parents=True, exist_ok=True)  # blocks the next video

    sampled.objective.sample = spied_sample
    sampled.train()
    assert seen == [True, True]
    videos = [path.relative_to(tmp_path / "sampled/samples") for path in tmp_path.glob("sampled/samples/*/*.mp4")]
    written = sorted(str(path) for path in videos if (tmp_path / "sampled/samples" / path).is_file())
    assert written == ["00000002/a blue square-0.mp4", "00000002/a red circle-0.mp4", "00000004/a blue square-0.mp4"]
    assert_same_bits(state_of(sampled), state_of(plain))

    snapshots = sorted((tmp_path / "sampled/snapshots").iterdir())
    assert [folder.name for folder in snapshots] == ["00000002", "00000004"]
    early, late = (CausalWanModel.from_pretrained(folder).state_dict() for folder in snapshots)
    ema = {name: value.bfloat16().float() for name, value in sampled.ema.weights.items()}
    assert_same_bits({name: value.float() for name, value in late.items()}, ema)
    assert not torch.equal(early["proj_out.weight"], late["proj_out.weight"])


def test_values_that_are_not_finite_stop_the_run_and_are_named(make_trainer):
    run = make_trainer("run")
    objective = run.objective
    backward = objective.forward_kl.backward
    objective.forward_kl.backward = lambda *args: backward(*args) | {"forward_kl": float("nan")}
    with pytest.raises(UserError, match="iteration 0: forward_kl is nan; no checkpoint was saved yet"):
        run.train()
    objective.forward_kl.backward = backward
    with torch.no_grad():
        objective.teacher.proj_out.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"iteration 0: .*dmd_gradient is nan"):
        run.train()


def test_a_sharded_generator_makes_the_same_sample_videos(make: Make, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    videos = []
    for sharding in ("replicate", "shard"):
        objective = make(sharding=sharding, sample_prompts=str(tmp_path / "prompts.txt"))
        objective.sample(tmp_path / sharding)
        videos.append({file.name: read_video(file)[0] for file in (tmp_path / sharding).iterdir()})
        objective.backward("generator", 0, 0, 1.0, True)  # it can still be trained
        assert len(gradients(objective.generator)) > 10
    one, other = videos
    assert one.keys() == other.keys() and len(one) == 2
    for name, frames in one.items():
        assert frames.std() > 1 and np.array_equal(frames, other[name])
