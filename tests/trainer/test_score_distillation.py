"""trainer/objectives/score_distillation.py: self-rollout distillation on tiny nets.

Claims: block by block or through the whole graph, the gradient is the same, for both schedules, and when the rollout is
longer than the training window; what is drawn is shared by all parts; teacher and critic that agree give no gradient; a
turn changes its own net only; each way of the forward KL sees what it should; an interrupted run goes on bit for bit.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import Stop, assert_same, state_of

from model.flow import flow_to_x0
from trainer.datasets.ode_pairs import write_ode_pair, write_sigmas
from trainer.objectives.score_distillation import ScoreDistillation
from trainer.trainer import Trainer
from utils.errors import UserError
from utils.video import read_video

CPU = torch.device("cpu")


@pytest.fixture
def make(make_config, pairs, tiny_presets, model):
    """make(schedule, pairs, **changes to keys of any section): the objective on clips of six latent frames of 4x4."""

    def make(schedule: str = "timestep_first", path: Path = pairs, **distill) -> ScoreDistillation:
        config = make_config(path, objective="score_distillation", init=str(model / "transformer"))
        config.rollout.schedule = schedule
        config.video.height = config.video.width = 32
        config.data.num_frames = 6
        config.distill.max_rollout_frames = 6
        config.teacher.negative_prompt = ""
        for key, value in distill.items():
            sections = (config.distill, config.rollout, config.data, config.video, config.model, config.train)
            setattr(next(section for section in sections if hasattr(section, key)), key, value)
        return ScoreDistillation(config, CPU)

    return make


def gradients(net) -> dict[str, torch.Tensor]:
    result = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return result


@pytest.mark.parametrize("frames", [6, 12])
@pytest.mark.parametrize("schedule", ["timestep_first", "block_first"])
def test_block_by_block_is_the_whole_graph(make, schedule, frames):
    reference = None
    for block_backward in (False, True):
        changes = dict(block_backward=block_backward, max_rollout_frames=frames, window=9, guidance_scale=3.0)
        objective = make(schedule, **changes)
        for iteration in (0, 5):
            metrics = objective.backward("generator", iteration, 0, 1.0, True)
        assert all(value == value for value in metrics.values())
        found = gradients(objective.generator)
        assert max(g.abs().max() for g in found.values()) > 0
        if reference is not None:
            for name in reference:
                torch.testing.assert_close(found[name], reference[name], atol=1e-6, rtol=1e-3, msg=name)
        reference = found


def test_draws_are_shared_by_all_parts_and_cover_the_range(make):
    objective = make(min_exit_step=1, max_rollout_frames=12)
    seen = set()
    for iteration in range(24):
        draws = set()
        for part in range(2):
            embeddings = objective._embeddings("critic", iteration, part)
            generated = objective.roll_out("critic", iteration, part, embeddings, trained=False)
            draws.add((generated.exit_step, generated.frames.shape[1]))
        assert len(draws) == 1
        seen |= draws
    assert {step for step, _ in seen} == {1, 2, 3} and {frames for _, frames in seen} == {6, 9, 12}


def test_parts_and_turns_have_noise_and_prompts_of_their_own(make):
    objective = make()
    objective.config.train.total_batch_size = 4
    starts = []
    for turn in ("generator", "critic"):
        for part in range(2):
            for iteration in (0, 5):
                generated = objective.roll_out(turn, iteration, part, objective._embeddings(turn, iteration, part))
                starts += list(generated.rollout.noise(0, 0))
    assert not any(torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])
    chosen = [objective._positions("generator", iteration, part) for iteration in (0, 5) for part in (0, 1)]
    assert chosen == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]  # no prompt is left out


def test_a_critic_that_agrees_with_the_teacher_gives_no_gradient(make):
    """Both start from the base's weights; without guidance they are one net."""
    objective = make(guidance_scale=1.0)
    metrics = objective.backward("generator", 0, 0, 1.0, True)
    assert metrics["dmd_gradient"] == 0 and metrics["dmd_output_gradient"] == 0
    objective = make(guidance_scale=4.0)
    assert objective.backward("generator", 0, 0, 1.0, True)["dmd_gradient"] > 0


def test_the_gradient_is_guidance_over_the_distance(make):
    objective = make(guidance_scale=3.0)
    embeddings = objective._embeddings("generator", 0, 0)
    clip = torch.randn(2, 6, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    asked = []
    net = objective.teacher

    def spy(x, timestep, text):
        asked.append((x, timestep, text))
        return net.forward(x, timestep, text)

    objective.teacher = spy
    gradient = objective.score_difference(clip, embeddings, 0, 0)
    (x, timestep, _), (_, _, negative) = asked
    assert timestep.shape == (2,) and (timestep >= 20).all() and (timestep <= 980).all()
    assert torch.equal(negative[0], objective.negative[0])
    sigma = (timestep / 1000).view(-1, 1, 1, 1, 1)
    with torch.no_grad():
        conditional, unconditional = (net(x, timestep, text).transpose(1, 2) for text in (embeddings, negative))
    teacher = flow_to_x0(x.transpose(1, 2), unconditional + 3 * (conditional - unconditional), sigma)
    critic = flow_to_x0(x.transpose(1, 2), conditional, sigma)
    expected = (critic - teacher) / (clip - teacher).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_each_turn_changes_its_own_net(make):
    objective = make()
    assert [objective.networks_to_update(i) for i in range(6)] == [
        ["generator", "critic"],
        *[["critic"]] * 4,
        ["generator", "critic"],
    ]
    objective.backward("generator", 0, 0, 1.0, True)
    assert gradients(objective.generator) and not gradients(objective.critic)
    objective.backward("critic", 0, 0, 1.0, True)
    assert gradients(objective.critic) and not gradients(objective.generator)
    assert not any(p.requires_grad for p in objective.teacher.parameters())


def test_of_a_longer_rollout_the_end_is_trained_behind_a_new_first_frame(make):
    objective = make(max_rollout_frames=12)
    for iteration in range(20):
        embeddings = objective._embeddings("critic", iteration, 0)
        generated = objective.roll_out("critic", iteration, 0, embeddings)
        frames = generated.frames.shape[1]
        if frames == 12:
            break
    clip, mask = objective.training_window(generated)
    assert clip.shape[1] == 6 and mask.tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    assert torch.equal(clip[:, 1:], generated.frames[:, 7:])
    pixels = objective.vae.decode(generated.frames[:, :7])[:, -1:]
    assert torch.equal(clip[:, :1], objective.vae.encode(pixels))
    assert list(generated.trained) == [3]  # of the window's two blocks, the first is masked
    assert objective.training_window(objective.roll_out("critic", 0, 0, embeddings))[1] is None or frames == 12


# ---- Forward KL ----


def forward_kl_of(objective: ScoreDistillation) -> dict[str, torch.Tensor]:
    """The gradient of the forward KL alone."""
    metrics = objective._forward_kl(0, 0, 1.0, True)
    assert metrics["forward_kl"] > 0
    return gradients(objective.generator)


@pytest.mark.parametrize("schedule", ["timestep_first", "block_first"])
def test_a_rollout_needs_only_the_points_that_the_loss_reads(make, pairs, tmp_path, schedule):
    """Pairs of as few points as are made by default give what whole trajectories give."""
    for file in pairs.glob("*.pt"):
        [(prompt, points)] = torch.load(file).items()
        write_ode_pair(tmp_path / file.name, prompt, points[0, :2])
    write_sigmas(tmp_path, [1.0, 0.9375])
    found = []
    for folder in (pairs, tmp_path):
        objective = make(schedule, folder, forward_kl_mode="rollout")
        assert objective._forward_kl(0, 0, 1.0, True)["forward_kl"] > 0
        found.append(gradients(objective.generator))
    assert_same(*found)


def test_a_context_of_inputs_can_be_checkpointed(make):
    """One pass that denoises and writes cannot be run again for its graph, so the write is a pass of its own."""
    found = []
    for checkpointing in (False, True):
        objective = make(forward_kl_mode="rollout", context="input")
        objective.generator.gradient_checkpointing = checkpointing
        found.append(forward_kl_of(objective))
        objective.config.distill.block_backward = False
        objective.backward("generator", 0, 0, 1.0, True)
        found[-1] |= {f"{name} of DMD": g for name, g in gradients(objective.generator).items()}
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_its_ways_are_different_and_a_rollout_of_inputs_is_the_causal_one(make):
    """A rollout whose context is each block's own input sees, at the first step, just what one causal forward sees."""
    found = {
        mode: forward_kl_of(make(forward_kl_mode=mode, context="input"))
        for mode in ("bidirectional", "block_causal", "rollout")
    }
    name = "blocks.0.attn1.to_v.weight"
    assert not torch.allclose(found["bidirectional"][name], found["block_causal"][name], rtol=0.05)
    # In the rollout the context is a constant: its keys and values get no gradient of later blocks.
    last = "proj_out.weight"
    torch.testing.assert_close(found["rollout"][last], found["block_causal"][last], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("mode", ["bidirectional", "block_causal", "rollout"])
def test_the_student_is_told_the_teachers_levels_at_every_step(make, mode):
    objective = make(forward_kl_mode=mode, forward_kl_steps=3)
    objective.pairs.sigmas = teacher = [1.0, 0.96, 0.8889, 0.7273, 0.0]
    asked, net = [], objective.generator
    handle = net.register_forward_pre_hook(lambda module, words: asked.append(words[1]))
    steps = set()
    for iteration in range(12):
        asked.clear()
        objective._forward_kl(iteration, 0, 1.0, True)
        levels = {round(t / 1000, 4) for timestep in asked for t in timestep.flatten().tolist()}
        assert levels <= set(teacher)
        steps.add(max(levels) if mode != "rollout" else min(levels))
    handle.remove()
    assert len(steps) == 3


@pytest.mark.parametrize("mode", ["bidirectional", "block_causal", "rollout"])
def test_the_target_lies_on_the_teachers_chord(make, mode):
    """At every step; in a rollout it is not where the student has come to that the chord begins at."""
    objective = make(forward_kl_mode=mode, forward_kl_steps=3)
    chosen = objective.pair_order.at(objective._positions("generator", 0, 0)).tolist()
    points = objective.pairs.read(chosen)
    text = objective.text.encode([objective.pairs.prompts[i] for i in chosen])
    expected = []
    for step in range(3):
        start, end = objective.pairs.sigmas[step : step + 2]
        target = points[:, step] - start * (points[:, step + 1] - points[:, step]) / (end - start)
        with torch.no_grad():
            if mode == "rollout":
                point, flow = objective._roll_out_from(points[:, 0], step, text)
                assert step == 0 or not torch.allclose(point, points[:, step])
            else:
                point = points[:, step]
                flow = objective._flow_of_clip(point, start, text, mode == "bidirectional")
        expected.append((flow_to_x0(point, flow, start) - target).square().mean().item())
    seen = set()
    objective._positions = lambda turn, iteration, part: range(2)  # the same pairs at every iteration
    for iteration in range(12):
        loss = objective._forward_kl(iteration, 0, 1.0, True)["forward_kl"]
        [step] = [step for step in range(3) if loss == pytest.approx(expected[step], rel=1e-4)]
        seen.add(step)
    assert seen == {0, 1, 2}


def test_without_it_prompts_are_needed(make, tmp_path):
    with pytest.raises(UserError, match=r"set data\.prompts"):
        make(forward_kl_weight=0.0)


# ---- The whole run ----


@pytest.mark.parametrize("stop", [5, 7])
def test_an_interrupted_run_goes_on_bit_for_bit(make, tmp_path, stop):
    def trainer(name: str) -> Trainer:
        objective = make(guidance_scale=3.0)
        objective.config.train.max_iterations, objective.config.train.ema_start = 8, 3
        return Trainer(objective.config, objective, str(tmp_path / name))

    whole, first = trainer("whole"), trainer("parts")
    before = {name: p.clone() for name, p in whole.objective.generator.named_parameters()}
    whole.train()
    backward = first.objective.backward

    def failing(name, iteration, *rest):
        if (name, iteration) == ("critic", stop):
            raise Stop
        return backward(name, iteration, *rest)

    first.objective.backward = failing
    with pytest.raises(Stop):
        first.train()
    second = trainer("parts")
    second.train()
    assert_same(state_of(second), state_of(whole))
    assert not torch.equal(before["proj_out.weight"], whole.objective.generator.proj_out.weight)
    lines = (tmp_path / "whole/metrics.jsonl").read_text()
    assert lines == (tmp_path / "parts/metrics.jsonl").read_text()
    for key in ("dmd_output_gradient", "forward_kl_output_gradient", "motion", "motion_bidirectional", "critic"):
        assert f'"{key}"' in lines


@pytest.mark.parametrize("words", [{"forward_kl_weight": 0.0}, {"forward_kl_mode": "block_causal"}])
def test_motion_beside_bidirectional_attention_is_logged_whatever_the_losses(make, tmp_path, words):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    objective = make(prompts=str(prompts), **words)
    found = objective.backward("generator", 0, 0, 1.0, True)["motion_bidirectional"]
    text = objective._embeddings("generator", 0, 0)
    rollout = objective.roll_out("generator", 0, 0, text).rollout
    noise = torch.cat([rollout.noise(0, 0), rollout.noise(1, 0)], dim=1)
    with torch.no_grad():
        x0 = noise - objective.generator(noise.transpose(1, 2), torch.full((2,), 1000.0), text).transpose(1, 2)
    assert found == pytest.approx((x0[:, 1:] - x0[:, :-1]).abs().mean().item(), rel=1e-4)


def test_what_does_not_fit_is_said_before_weights_are_loaded(make):
    with pytest.raises(UserError, match="--height 36 is not a multiple of 16"):
        make(height=36)
    with pytest.raises(UserError, match="attention_backend=nonsense"):
        make(attention_backend="nonsense")


def test_a_teacher_that_fails_is_noticed(make, tmp_path):
    objective = make()
    with torch.no_grad():
        objective.teacher.proj_out.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"iteration 0: .*dmd_gradient is nan"):
        Trainer(objective.config, objective, str(tmp_path)).train()


def test_a_batch_in_parts_is_the_whole_batch(make):
    """Both turns, with DMD and forward KL: four clips as one part, two or four."""
    found = []
    for size in (4, 2, 1):
        objective = make(guidance_scale=3.0, max_rollout_frames=9)
        objective.config.train.batch_size, objective.config.train.total_batch_size = size, 4
        for part in range(4 // size):
            for turn in ("generator", "critic"):
                objective.backward(turn, 5, part, size / 4, True)
        found.append(
            {**gradients(objective.generator), **{f"critic {k}": g for k, g in gradients(objective.critic).items()}}
        )
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def test_a_loss_that_is_not_finite_is_named(make, tmp_path):
    objective = make()
    run = Trainer(objective.config, objective, str(tmp_path))
    forward = objective._forward_kl
    objective._forward_kl = lambda *words: forward(*words) | {"forward_kl": float("nan")}
    with pytest.raises(UserError, match="iteration 0: forward_kl is nan; no checkpoint was saved yet"):
        run.train()


def test_sample_videos_are_the_averages_and_change_nothing(make, tmp_path):
    """Also where a video cannot be written: it is noted, and the run goes on as if nothing had been."""

    def trainer(name: str, **changes) -> Trainer:
        objective = make()
        objective.config.train.max_iterations = 4
        for key, value in changes.items():
            setattr(objective.config.train, key, value)
        return Trainer(objective.config, objective, str(tmp_path / name))

    plain, sampled = trainer("plain"), trainer("sampled", sample_every=2)
    plain.train()
    seen = []
    sample = sampled.objective.sample

    def spied_sample(folder):
        seen.append(torch.equal(sampled.objective.generator.proj_out.weight, sampled.ema.weights["proj_out.weight"]))
        sample(folder)
        (tmp_path / "sampled/samples/00000004").mkdir(exist_ok=True)
        (tmp_path / "sampled/samples/00000004/a red circle-0.mp4").mkdir(exist_ok=True)  # in the way of the next

    sampled.objective.sample = spied_sample
    sampled.train()
    assert seen == [True, True]
    videos = {path.parent.name: path.stem for path in (tmp_path / "sampled/samples").glob("*/*.mp4") if path.is_file()}
    assert videos.keys() == {"00000002", "00000004"}
    assert_same(state_of(sampled), state_of(plain))


def test_sample_videos_of_a_sharded_net_are_those_of_a_whole_one(make, tmp_path):
    videos = []
    for sharding in ("replicate", "shard"):
        objective = make(sharding=sharding)
        objective.sample(tmp_path / sharding)
        videos.append({file.name: read_video(file)[0] for file in (tmp_path / sharding).iterdir()})
        objective.backward("generator", 0, 0, 1.0, True)  # it can still be trained
        assert len(gradients(objective.generator)) > 10
    one, other = videos
    assert one.keys() == other.keys() and len(one) > 1
    for name, frames in one.items():
        assert frames.std() > 1 and np.array_equal(frames, other[name])
