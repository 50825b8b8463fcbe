"""Score distillation on data latents (CausVid), and bidirectional generators, on tiny networks.

Claims: the gradients of both networks equal a plain reimplementation. Noise levels are those of the steps, one per
block or one per clip. Shards and LMDBs give the same run. An interrupted run continues bit for bit. Clips that do not
fit, and keys that cannot be honoured, are refused.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import run_main
from tiny_model import ROOT, write_config
from toy import Killed, assert_same_bits, gradients, state_of

import train
from model.attention import BlockCausalMask
from trainer.datasets.clips import write_shard
from trainer.datasets.ode_pairs import SIGMAS_FILE
from trainer.datasets.pack import pack_lmdb
from trainer.objectives.ode_regression import ODERegression
from trainer.objectives.score_distillation import ScoreDistillation
from trainer.trainer import Trainer
from utils.config import Config
from utils.config_checks import check_training
from utils.config_loading import load_config, override_config
from utils.errors import UserError

CPU = torch.device("cpu")
SCHEDULES = ("block_first", "bidirectional")
STEPS = [1000.0, 757.0, 522.0]
Make = Callable[..., ScoreDistillation]


@pytest.fixture
def make(make_config, clips, model) -> Make:
    """make(schedule, path, **keys of any section): DMD on clips of six latent frames of 4x4 in blocks of three."""

    def make(schedule: str = "block_first", path: Path = clips, **keys) -> ScoreDistillation:
        config = make_config(path, objective="score_distillation", network="", init=str(model / "generator"))
        config.teacher.negative_prompt = ""
        config.rollout.schedule, config.rollout.denoising_step_list = schedule, STEPS
        config.rollout.warp_denoising_step = False
        config.distill.backward_simulation, config.distill.forward_kl_weight = False, 0.0
        config.distill.max_rollout_frames = 6
        for key, value in keys.items():
            sections = (config.distill, config.rollout, config.data, config.video, config.train)
            setattr(next(section for section in sections if hasattr(section, key)), key, value)
        return ScoreDistillation(config, CPU)

    return make


def calls(net: torch.nn.Module) -> list[tuple]:
    """Return a list that receives (arguments, causal mask) of every call of a network."""
    found: list[tuple] = []
    net.register_forward_pre_hook(lambda _, args, keys: found.append((args, keys.get("causal"))), with_kwargs=True)
    return found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and max(g.abs().max() for g in found.values()) > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-7, rtol=1e-3, msg=name)


# ---- Gradients ----


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_generators_gradient_equals_a_plain_reimplementation(make: Make, clips, schedule):
    """One step from noised data to x0, then DMD: the only graph is that of this step."""
    objective = make(schedule, guidance_scale=3.0)
    of_generator, of_critic = calls(objective.generator), calls(objective.critic)
    metrics = objective.backward("generator", 0, 0, 1.0, True)
    found = gradients(objective.generator)
    assert not gradients(objective.critic)
    (x, timestep, text), mask = of_generator[0]  # the second call only measures motion
    assert mask == (None if schedule == "bidirectional" else BlockCausalMask((3, 3), 3))
    assert timestep.shape == ((2,) if schedule == "bidirectional" else (2, 6))
    sigma = (timestep / 1000).view(2, 1, -1, 1, 1)

    # The input is data at these levels; its noise is standard normal.
    batch = objective.batch("generator", 0, 0)
    x0 = objective.clip_source.clips.read(batch.items.tolist()).float().transpose(1, 2)
    noise = (x - (1 - sigma) * x0) / sigma
    assert noise.mean().abs() < 0.1 and noise.std() == pytest.approx(1, abs=0.1)
    assert torch.equal(text, batch.embeddings)

    prediction = x - sigma * objective.generator(x, timestep, text, causal=mask)
    (noisy, levels, _), none = of_critic[0]
    assert none is None and levels.shape == (2,)
    t = (levels / 1000).view(2, 1, 1, 1, 1)
    empty = objective.text.encode([""]).expand(2, -1, -1)
    with torch.no_grad():
        fake = noisy - t * objective.critic(noisy, levels, text)
        conditional, unconditional = (objective.teacher(noisy, levels, words) for words in (text, empty))
        real = noisy - t * (unconditional + 3 * (conditional - unconditional))
        direction = (fake - real) / (prediction - real).abs().mean((1, 2, 3, 4), keepdim=True)
        renoised = (noisy - (1 - t) * prediction) / t  # of the score difference: noise of its own
    assert renoised.std() == pytest.approx(1, abs=0.1)
    (0.5 * (prediction - (prediction - direction).detach()).square().mean()).backward()
    assert_close(found, gradients(objective.generator))
    assert metrics["dmd_gradient"] == pytest.approx(direction.abs().mean().item(), rel=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_critic_learns_the_generators_one_step_clips(make: Make, schedule):
    objective = make(schedule)
    of_generator, of_critic = calls(objective.generator), calls(objective.critic)
    loss = objective.backward("critic", 0, 0, 1.0, True)["critic"]
    found = gradients(objective.critic)
    assert not gradients(objective.generator)
    [((x, timestep, text), mask)] = of_generator
    [((noisy, levels, _), _)] = of_critic
    t = (levels / 1000).view(2, 1, 1, 1, 1)
    with torch.no_grad():
        clip = x - (timestep / 1000).view(2, 1, -1, 1, 1) * objective.generator(x, timestep, text, causal=mask)
    target = (noisy - clip) / t  # noise - clip
    expected = (objective.critic(noisy, levels, text) - target).square().mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert_close(found, gradients(objective.critic))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_micro_batches_sum_to_the_whole_batch(make: Make, schedule):
    objective = make(schedule)
    found = []
    for size in (4, 1):
        objective.config.train.batch_size, objective.config.train.total_batch_size = size, 4
        for micro_batch in range(4 // size):
            for role in ("generator", "critic"):
                objective.backward(role, 5, micro_batch, size / 4, True)
        found.append(
            gradients(objective.generator) | {f"critic {n}": g for n, g in gradients(objective.critic).items()}
        )
    assert_close(*found)


def test_a_bidirectional_generator_rolls_itself_out(make: Make, tmp_path):
    """With backward simulation (DMD2): the block-by-block backward pass equals that of the whole graph."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    keys = dict(backward_simulation=True, prompts=str(tmp_path / "prompts.txt"), guidance_scale=3.0)
    objective, found = make("bidirectional", **keys), []
    for block_backward in (False, True):
        objective.config.distill.block_backward = block_backward
        steps = {objective.backward("generator", iteration, 0, 1.0, True)["exit_step"] for iteration in (0, 5, 10)}
        assert len(steps) > 1
        found.append(gradients(objective.generator))
    assert_close(*found)


def test_a_bidirectional_generator_trains_on_ode_pairs(make_config, pairs, model):
    config = make_config(pairs, network="", init=str(model / "transformer"))
    config.rollout.schedule = "bidirectional"
    objective = ODERegression(config, CPU)
    seen = calls(objective.net)
    for iteration in range(4):
        assert objective.loss(iteration, 0)[0].isfinite()
    levels = {level for (_, timestep, _), _ in seen for level in timestep.tolist()}
    assert all(timestep.shape == (2,) and mask is None for (_, timestep, _), mask in seen)
    assert len(levels) > 2 and levels <= {float(1000 * sigma) for sigma in objective.sigmas}


# ---- Noise levels ----


@pytest.mark.parametrize(
    ("steps", "warp", "levels"),
    [
        (STEPS, False, [1, 0.757, 0.522]),
        ([*STEPS, 0], False, [1, 0.757, 0.522, 0]),
        ([1000, 750, 500, 250, 0], True, [1, 0.96, 8 / 9, 8 / 11, 0]),  # at shift 8
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_are_those_of_the_steps(make: Make, schedule, steps, warp, levels):
    """One level per block or per clip, uniform over the list; a listed 0 adds clean blocks."""
    objective = make(schedule, denoising_step_list=steps, warp_denoising_step=warp, batch_size=64)
    objective.config.rollout.timestep_shift = 8.0
    objective = ScoreDistillation(objective.config, CPU)
    seen = calls(objective.generator)
    with torch.no_grad():
        clip = objective.clip_source.run(objective.batch("critic", 0, 0), trained=False)
    sigma = seen[0][0][1] / 1000
    if schedule == "bidirectional":
        blocks = sigma[:, None]
    else:
        assert torch.equal(sigma[:, :3], sigma[:, :1].expand(-1, 3)) and torch.equal(
            sigma[:, 3:], sigma[:, 3:4].expand(-1, 3)
        )
        blocks = sigma[:, ::3]
        assert (blocks[:, 0] != blocks[:, 1]).any()
    for level in levels:
        assert (blocks - level).abs().lt(1e-6).float().mean() > 0.5 / len(levels)
    assert all(min(abs(value - level) for level in levels) < 1e-6 for value in blocks.flatten().tolist())
    data = objective.clip_source.clips.read(objective.batch("critic", 0, 0).items.tolist()).float()
    assert torch.equal(clip.x0[clip.sigma == 0], data[clip.sigma == 0])  # clean frames stay as they are


def test_the_smallest_exit_step_leaves_out_steps(make: Make):
    assert make(min_exit_step=1).clip_source.sigmas.tolist() == pytest.approx([0.757, 0.522])


def test_roles_positions_and_seeds_have_their_own_noise(make: Make):
    objective = make(total_batch_size=4)
    noises = []
    for role in ("generator", "critic"):
        for iteration in (0, 5):
            for micro_batch in (0, 1):
                noises += list(objective.clip_source.run(objective.batch(role, iteration, micro_batch)).noise)
    assert not any(torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])
    again = objective.clip_source.run(objective.batch("generator", 0, 0)).noise
    assert torch.equal(again, torch.stack(noises[:2]))
    objective.config.runtime.seed = 1
    assert not torch.equal(objective.clip_source.run(objective.batch("generator", 0, 0)).noise, again)


# ---- Whole runs ----


def test_an_interrupted_run_on_shards_ends_with_the_weights_of_a_plain_run_on_an_lmdb(make: Make, clips, tmp_path):
    pack_lmdb(clips, tmp_path / "lmdb", shards=2)
    keys = dict(max_iterations=4, ema_start=1, generator_every=2)

    def trainer(name: str, path: Path, **more) -> Trainer:
        objective = make(path=path, **keys, **more)
        return Trainer(objective.config, objective, str(tmp_path / name))

    plain = trainer("plain", tmp_path / "lmdb", save=False)
    before = plain.objective.generator.proj_out.weight.clone()
    plain.train()
    assert not torch.equal(before, plain.objective.generator.proj_out.weight)
    run = trainer("parts", clips)
    backward = run.objective.backward

    def failing(name, iteration, *rest):
        if (name, iteration) == ("critic", 2):
            raise Killed
        return backward(name, iteration, *rest)

    run.objective.backward = failing
    with pytest.raises(Killed):
        run.train()
    resumed = trainer("parts", clips)
    resumed.train()
    assert_same_bits(state_of(resumed), state_of(plain))


FILES = (*(ROOT / "configs/causvid").glob("*.yaml"), *(ROOT / "configs/shapes").glob("causvid_*.yaml"))
CAUSVID = sorted(file for file in FILES if load_config(str(file)).train.objective)  # the others are for inference


@pytest.mark.parametrize("file", CAUSVID, ids=lambda file: file.stem)
def test_every_configuration_trains_a_small_network(tmp_path, file, clips, pairs, model):
    """Two iterations with the configuration's own losses, optimizer, levels and dtype."""
    config = load_config(str(file))
    data = {"path": str(clips), "num_frames": 6}
    if config.train.objective == "ode_regression":
        points = len([step for step in config.rollout.denoising_step_list if step])
        data = {"path": str(write_pairs(tmp_path / "pairs", pairs, points + 1)), "num_frames": 6}
    sections = {name: dict(vars(getattr(config, name))) for name in ("rollout", "train", "distill")}
    sections["train"] |= dict(init="", output=str(tmp_path / "weights"), max_iterations=2, total_batch_size=2)
    sections["train"] |= dict(batch_size=1, wandb="off", log_every=1, save=False)
    sections["distill"] |= {"max_rollout_frames": 6}
    path = write_config(tmp_path / "config.yaml", model, data=data, **sections)
    result = run_main(train.main, "--config_path", path, "--logdir", tmp_path / "run")
    assert result.code == 0, result.err
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "weights/config.json").exists()


def write_pairs(folder: Path, pairs: Path, points: int) -> Path:
    """Write the first points and the end of the pairs in a folder as an LMDB; return it."""
    from trainer.datasets.ode_pairs import open_ode_pairs, write_ode_pair, write_sigmas

    source = open_ode_pairs(str(pairs), [], 5)
    files = folder.with_name("files")
    files.mkdir()
    for index, prompt in enumerate(source.prompts):
        write_ode_pair(files / f"{index:05d}.pt", prompt, source.read([index])[0][[*range(points - 1), -1]])
    write_sigmas(files, [*source.sigmas[: points - 1], 0.0])
    pack_lmdb(files, folder, shards=1)
    assert (folder / SIGMAS_FILE).exists()
    return folder


# ---- Mistakes ----

SIZES = {  # [F, C, h, w] of the clips -> fragment
    "frames": ((9, 16, 4, 4), "have 9 latent frames of 4x4, but the configuration has 6 of 4x4"),
    "height": ((6, 16, 8, 4), "have 6 latent frames of 8x4"),
    "width": ((6, 16, 4, 2), "have 6 latent frames of 4x2"),
    "channels": ((6, 8, 4, 4), "have 8 channels, but the network has 16"),
}


@pytest.mark.parametrize("lmdb", [False, True])
@pytest.mark.parametrize("case", SIZES)
def test_clips_of_another_size_are_refused(make: Make, tmp_path, case, lmdb):
    shape, message = SIZES[case]
    folder = tmp_path / "clips"
    folder.mkdir()
    write_shard(folder / "0.safetensors", torch.zeros(2, *shape), ["a red circle", "a blue square"])
    if lmdb:
        pack_lmdb(folder, tmp_path / "lmdb", shards=1)
        folder = tmp_path / "lmdb"
    with pytest.raises(UserError, match=message):
        make(path=folder)


def test_trajectories_and_missing_clips_are_refused(make: Make, tmp_path, pairs):
    pack_lmdb(pairs, tmp_path / "lmdb", shards=1)
    with pytest.raises(UserError, match=r"holds ODE pairs .* not clips"):
        make(path=tmp_path / "lmdb")
    with pytest.raises(UserError, match="no encoded clips"):
        make(path=tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no encoded clips: set data\.path"):
        make(path="")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill.max_rollout_frames=24"], "distill.max_rollout_frames must be data.num_frames=21, not 24"),
        (["distill.forward_kl_weight=0.1"], "set distill.forward_kl_weight=0"),
        (["data.prompts=prompts.txt"], "set data.prompts="),
        (["distill.max_rollout_frames=18"], "must be at least data.num_frames=21, not 18"),
        (["rollout.guidance_scale=2"], "rollout.guidance_scale must be 1"),
        (["video.source=clip.mp4"], "not for training"),
        (["rollout.write_window=3"], "rollout.write_window is for inference, not for training"),
        (["rollout.moving_sink=true", "rollout.sink=1"], "rollout.moving_sink is for inference, not for training"),
        (["rollout.prompt_switch=flush"], "rollout.prompt_switch is for inference, not for training"),
        (["distill.history_gradient=context"], "distill.history_gradient=context needs rollouts of a causal schedule"),
        (
            ["rollout.schedule=bidirectional", "distill.backward_simulation=true", "distill.max_rollout_frames=24"],
            "generates whole clips",
        ),
        (
            ["rollout.schedule=bidirectional", "distill.backward_simulation=true", "distill.forward_kl_weight=1",
             "distill.forward_kl_mode=rollout"],
            "forward_kl_mode=rollout needs a causal generator",
        ),
    ],
)  # fmt: skip
def test_keys_that_cannot_be_honoured_are_refused(words, message):
    valid = ["train.objective=score_distillation", "distill.backward_simulation=false", "distill.forward_kl_weight=0"]
    check_training(override_config(Config(), valid))
    config = override_config(Config(), [*valid, *words])  # inference may use such a file
    with pytest.raises(UserError) as error:
        check_training(config)
    assert message in str(error.value)
