"""trainer/objectives: what the losses measure, and every objective from train.py to weights that diffusers opens."""

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from tiny_model import all_clips, write_config, write_model_index

import train
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
from trainer.objectives.flow_matching import FlowMatching
from trainer.objectives.ode_regression import ODERegression
from trainer.trainer import Trainer
from utils.errors import UserError

CPU = torch.device("cpu")


class Spy(torch.nn.Module):
    """A net that notes its arguments and answers with `flow(x, timestep)`, [B, C, F, h, w] as the real one."""

    def __init__(self, flow=lambda x, timestep: torch.zeros_like(x)):
        super().__init__()
        self.flow = flow

    def forward(self, x, timestep, text, causal=None):
        self.x, self.timestep, self.text, self.causal = x, timestep, text, causal
        return self.flow(x, timestep)


# ---- Flow matching ----


def the_same_clip_always(objective: FlowMatching) -> torch.Tensor:
    """Have an objective read clip 0, [1, F, C, h, w], whichever is chosen."""
    clip = objective.clips.read([0])
    objective.clips.read = lambda indices: clip.expand(len(indices), -1, -1, -1, -1)
    return clip.float()


def test_flow_matching_asks_for_noise_minus_x0(make_config, clips, tiny_presets):
    """From x alone no net can tell the two apart; one that knows x0 can, and its loss is zero."""
    objective = FlowMatching(make_config(clips), CPU)
    x0 = the_same_clip_always(objective).transpose(1, 2)
    objective.net = Spy(lambda x, timestep: (x - x0) / (timestep / 1000).view(-1, 1, 1, 1, 1))
    for iteration in range(3):
        assert objective.loss(iteration, 0)[0].item() < 1e-8
    objective.net = Spy(lambda x, timestep: x0.expand_as(x))
    assert objective.loss(0, 0)[0].item() > 1


@pytest.mark.parametrize("forcing", ["diffusion", "teacher"])
def test_forcing_draws_a_level_for_every_block_and_is_causal(make_config, clips, tiny_presets, forcing):
    config = make_config(clips, forcing=forcing, batch_size=4, timestep_shift=1.0)
    config.rollout.block_frames = 2
    config.train.clip_frames = [13]
    objective = FlowMatching(config, CPU)
    x0 = the_same_clip_always(objective)[:, :4].transpose(1, 2)

    def exact(x, timestep):
        levels = (timestep / 1000).view(len(timestep), 1, -1, 1, 1)
        return (x - x0.repeat(1, 1, x.shape[2] // 4, 1, 1)) / levels.clamp(min=1e-6)

    objective.net = spy = Spy(exact)
    assert objective.loss(0, 0)[0].item() < 1e-8
    assert spy.causal == BlockCausalMask((2, 2), teacher_forcing=forcing == "teacher")
    if forcing == "teacher":
        assert torch.equal(spy.x[:, :, :4], x0.expand(4, -1, -1, -1, -1)) and not spy.timestep[:, :4].any()
    levels = spy.timestep[:, -4:]
    assert torch.equal(levels[:, ::2], levels[:, 1::2])
    assert sorted((levels[:, ::2].flatten() / 125).long().tolist()) == list(range(8))  # the range is covered


def test_a_bidirectional_nets_videos_are_a_teachers(tmp_path, make_config, clips, tiny_presets):
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
    assert len(list(tmp_path.glob("*.mp4"))) == 3  # captions
    objective.backward("net", 0, 0, 1.0, True)  # it is trained on as before
    assert all(parameter.grad is not None for parameter in objective.net.parameters())


def test_forcing_needs_whole_blocks(make_config, clips, tiny_presets):
    config = make_config(clips, forcing="teacher", clip_frames=[13])
    with pytest.raises(UserError, match="blocks of 3 latent frames do not divide clips of 4"):
        FlowMatching(config, CPU)


def test_clips_of_several_lengths_keep_the_batch_as_large(make_config, clips, tiny_presets):
    objective = FlowMatching(make_config(clips, batch_size=6, total_batch_size=12, clip_frames=[5, 17]), CPU)
    objective.net = spy = Spy()
    seen = set()
    for iteration in range(12):
        sizes = []
        for part in range(2):
            objective.loss(iteration, part)
            sizes.append((len(spy.timestep), spy.x.shape[2]))
        assert sizes[0] == sizes[1]  # no process waits for another
        seen.add(sizes[0])
    assert seen == {(6, 2), (1, 5)}


def test_clips_that_are_too_short_are_refused(make_config, clips, tiny_presets):
    with pytest.raises(UserError, match=r"clip_frames=\[5, 81\] asks for more than the 21 pixel frames"):
        FlowMatching(make_config(clips, clip_frames=[5, 81]), CPU)


def test_levels_cover_the_range_over_all_parts_of_a_batch(make_config, clips, tiny_presets):
    objective = FlowMatching(make_config(clips, batch_size=4, total_batch_size=8, timestep_shift=1.0), CPU)
    levels = []
    for part in range(2):
        objective.net = Spy()
        objective.loss(0, part)
        levels += (objective.net.timestep / 125).long().tolist()
    assert sorted(levels) == list(range(8))


@pytest.mark.parametrize("forcing", ["none", "diffusion"])
def test_flow_matching_by_parts_is_the_whole_batch(make_config, clips, tiny_presets, forcing):
    """The same gradient whether four clips are one part, two or four, or on as many processes."""
    found = []
    for size in (4, 2, 1):
        config = make_config(clips, batch_size=size, total_batch_size=4, forcing=forcing, text_dropout=0.5)
        objective = FlowMatching(config, CPU)
        torch.manual_seed(0)
        torch.nn.init.normal_(objective.net.proj_out.weight)  # a net that has just been made answers zero to everything
        for part in range(4 // size):
            objective.backward("net", 3, part, size / 4, True)
        found.append({name: p.grad for name, p in objective.net.named_parameters()})
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_ode_regression_by_parts_is_the_whole_batch(make_config, pairs, tiny_presets, model):
    found = []
    for size in (4, 2, 1):
        config = make_config(pairs, init=str(model / "transformer"), batch_size=size, total_batch_size=4)
        objective = ODERegression(config, CPU)
        for part in range(4 // size):
            objective.backward("net", 3, part, size / 4, True)
        found.append({name: p.grad for name, p in objective.net.named_parameters()})
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-5, rtol=1e-3)


def test_levels_cover_the_range_in_every_batch(make_config, clips, tiny_presets):
    objective = FlowMatching(make_config(clips, batch_size=8, timestep_shift=1.0), CPU)
    objective.net = Spy()
    objective.loss(0, 0)
    assert objective.net.timestep.shape == (8,)
    assert sorted((objective.net.timestep / 125).long().tolist()) == list(range(8))  # one level in every eighth
    objective.config.train.timestep_shift = 5.0
    even = objective.net.timestep / 1000
    objective.loss(0, 0)
    torch.testing.assert_close(objective.net.timestep, 1000 * 5 * even / (1 + 4 * even))


def test_dropped_text_is_the_empty_prompt(make_config, model, clips, tiny_presets):
    encoder = TextEncoder(*ModelDirectory.open(model).load_text_encoder(torch.float32), length=24)
    empty, captions = encoder.encode([""]), encoder.encode(all_clips(str(clips))[1])
    for dropout in (0.0, 1.0):
        objective = FlowMatching(make_config(clips, text_dropout=dropout), CPU)
        objective.net = Spy()
        for iteration in range(3):
            objective.loss(iteration, 0)
            for embedding in objective.net.text:
                assert torch.equal(embedding, empty[0]) == bool(dropout)
                assert any(torch.equal(embedding, caption) for caption in captions) == (not dropout)


def test_clips_keep_their_captions(make_config, clips, tiny_presets):
    """Clip by clip, the text that goes with it is its own."""
    objective = FlowMatching(make_config(clips), CPU)
    captions = all_clips(str(clips))[1]
    rows = objective.text.of(torch.arange(6))
    for clip, caption in enumerate(captions):
        same = [torch.equal(rows[clip], rows[other]) for other in range(6)]
        assert same == [caption == captions[other] for other in range(6)]


# ---- ODE regression ----

SIGMAS = [1.0, 0.96, 0.8889, 0.7273, 0.0]  # the teacher's, which no student has


def one_end(folder: Path) -> torch.Tensor:
    """ODE pairs from different noise that all end in one clip, which is returned: [F, C, h, w]."""
    x0 = torch.randn(6, 16, 4, 4, generator=torch.Generator().manual_seed(9))
    for index in range(3):
        points = torch.randn(5, 6, 16, 4, 4, generator=torch.Generator().manual_seed(index))
        points[-1] = x0
        write_ode_pair(pair_file(folder, index), "a red circle", points)
    write_sigmas(folder, SIGMAS)
    return x0


def test_ode_regression_of_a_perfect_prediction_is_zero(tmp_path, make_config, tiny_presets):
    x0 = one_end(tmp_path).transpose(0, 1)[None]
    objective = ODERegression(make_config(tmp_path), CPU)

    def perfect(x, timestep):
        sigma = (timestep / 1000)[:, None, :, None, None]
        return torch.where(sigma > 0, (x - x0) / sigma.clamp(min=1e-6), 1e6)  # nonsense where nothing is asked

    objective.net = Spy(perfect)
    for iteration in range(5):
        assert objective.loss(iteration, 0)[0].item() < 1e-8
    objective.net = Spy()
    assert max(objective.loss(iteration, 0)[0].item() for iteration in range(5)) > 0.1


def test_every_block_has_one_level_and_its_own_point(tmp_path, make_config, tiny_presets):
    one_end(tmp_path)
    points = open_ode_pairs(str(tmp_path), [], 5).read(range(3))
    objective = ODERegression(make_config(tmp_path, batch_size=4), CPU)
    objective.net = Spy()
    seen = set()
    for iteration in range(20):
        objective.loss(iteration, 0)
        levels = (objective.net.timestep[..., None] - 1000 * objective.sigmas).abs().argmin(-1)  # [B, F]
        assert torch.equal(objective.net.timestep, 1000 * objective.sigmas[levels])
        blocks = levels.unflatten(1, (2, 3))
        assert torch.equal(blocks, blocks[..., :1].expand(-1, -1, 3))
        for x, level in zip(objective.net.x.transpose(1, 2), levels, strict=True):
            fitting = [all(torch.equal(x[f], pair[level[f], f]) for f in range(6)) for pair in points]
            assert any(fitting)
        seen |= {tuple(pair) for pair in blocks[..., 0].tolist()}
    assert objective.net.causal == BlockCausalMask((3, 3))
    assert {level for pair in seen for level in pair} == set(range(5)) and len(seen) > 12  # independent of each other


def test_the_student_is_told_the_teachers_levels(tmp_path, make_config, tiny_presets):
    one_end(tmp_path)
    assert ODERegression(make_config(tmp_path), CPU).sigmas.tolist() == pytest.approx(SIGMAS)


def test_pairs_without_levels_are_refused(tmp_path, make_config, tiny_presets):
    one_end(tmp_path)
    (tmp_path / "sigmas.json").unlink()
    with pytest.raises(UserError, match=r"data\.sigmas"):
        ODERegression(make_config(tmp_path), CPU)


def test_pairs_of_other_levels_are_refused(make_config, pairs, tiny_presets):
    config = make_config(pairs)
    config.rollout.denoising_step_list = [1000.0, 500.0]
    with pytest.raises(UserError, match="points at 5 noise levels, but the rollout has 3"):
        ODERegression(config, CPU)


@pytest.mark.parametrize(
    ("sigmas", "says"),
    [
        ([1.0, 0.9, 0.8, 0.6, 0.2], r"end at the noise level 0\.2, .* make them with the last of --save_indices -1"),
        ([1.0, 0.9, 0.95, 0.6, 0.0], "must fall from at most 1 to at least 0"),
        ([5.0, 0.9, 0.8, 0.6, 0.0], "must fall from at most 1 to at least 0"),
    ],
)
def test_levels_that_cannot_be_learned_from_are_refused(tmp_path, make_config, pairs, tiny_presets, sigmas, says):
    for file in pairs.glob("*.pt"):
        (tmp_path / file.name).symlink_to(file)
    write_sigmas(tmp_path, sigmas)
    with pytest.raises(UserError, match=says):
        ODERegression(make_config(tmp_path), CPU)


@pytest.mark.parametrize("objective", [FlowMatching, ODERegression])
@pytest.mark.parametrize("content", [b"broken", b"", b"\x80\x02K\x01.", b"PK\x03\x04" + bytes(100)])
def test_missing_or_broken_data_is_one_line(tmp_path, make_config, tiny_presets, objective, content):
    with pytest.raises(UserError, match=r"no (encoded clips|ODE pairs) in .*; make them with scripts/"):
        objective(make_config(tmp_path), CPU)
    (tmp_path / "0.pt").write_bytes(content)
    (tmp_path / "0.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="delete it and"):
        objective(make_config(tmp_path), CPU)


# ---- VAE ----


def test_training_the_decoder_only_leaves_the_latents_as_they_are(tmp_path, make_config, model):
    changes = dict(init=str(model), decoder_only=True, clip_frames=[5], optimizer="muon", max_iterations=2)
    config = make_config(output=str(tmp_path / "out"), **changes)
    write_model_index(tmp_path / "out")
    Trainer(config, VAEReconstruction(config, CPU), str(tmp_path / "log")).train()
    before, after = (ModelDirectory.open(path).load_vae(torch.float32) for path in (model, tmp_path / "out"))
    assert after.config.latents_mean == before.config.latents_mean
    same = {n: torch.equal(w.bfloat16(), after.state_dict()[n].bfloat16()) for n, w in before.state_dict().items()}
    assert all(same[name] for name in same if name.startswith(("encoder.", "quant_conv.")))
    assert not all(same[name] for name in same if name.startswith("decoder."))


# ---- All of them ----


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"score_distillation"}))
def test_a_loss_is_a_function_of_seed_and_iteration(name, make_config, clips, pairs, tiny_presets):
    data = {"flow_matching": clips, "ode_regression": pairs}.get(name, "")

    def losses(seed: int) -> list[float]:
        config = make_config(data, clip_frames=[5])
        config.runtime.seed = seed
        objective = OBJECTIVES[name](config, CPU)
        return [objective.loss(iteration, 0)[0].item() for iteration in (3, 1, 3)]

    first = losses(0)
    assert first[0] == first[2] != first[1] and first == losses(0)
    assert first != losses(1)


def test_starting_weights_come_from_where_the_configuration_says(make_config, model, tiny_presets):
    random = build_transformer(make_config(), CPU)
    assert random.proj_out.weight.abs().max() == 0 and random.training  # Wan's own start: no flow at all
    loaded = build_transformer(make_config(init=str(model / "generator")), CPU)
    wanted = ModelDirectory.open(model).load_transformer(
        CausalWanModel, torch.float32, weights=str(model / "generator")
    )
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), wanted.parameters(), strict=True))
    assert next(loaded.parameters()).dtype == torch.float32


def run_train(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    try:
        train.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Where the test below leaves a model that train.py has made from nothing."""
    return tmp_path_factory.mktemp("trained")


def test_train_makes_a_model_from_nothing_that_diffusers_opens(
    trained, clips, pairs, tiny_presets, monkeypatch, capsys
):
    def small_clip(self, index, num_frames):  # exporting the VAE takes the statistics of many
        generator = torch.Generator().manual_seed(index)
        return 2 * torch.rand(3, 5, 32, 32, generator=generator) - 1

    monkeypatch.setattr(VAEReconstruction, "clip", small_clip)
    write_model_index(trained / "model")
    stages = [
        ("text_attributes", "model", {"batch_size": 8}),
        ("vae_reconstruction", "model", {"clip_frames": [5], "optimizer": "muon"}),
        ("flow_matching", "model/transformer", {}),
        ("ode_regression", "model/generator", {"init": str(trained / "model/transformer")}),
    ]
    for name, output, changes in stages:
        section = dict(network="tiny", max_iterations=2, batch_size=2, warmup=1, log_every=1, ema_decay=0.5)
        section |= {"objective": name, "output": str(trained / output)} | changes
        path = {"flow_matching": str(clips), "ode_regression": str(pairs)}.get(name, "")
        config = write_config(trained / "config.yaml", trained / "model", train=section, data={"path": path})
        assert run_train(monkeypatch, "--config_path", config, "--logdir", trained / name) == 0, capsys.readouterr().err
        assert f"wrote {trained / output}" in capsys.readouterr().out
        assert len((trained / name / "metrics.jsonl").read_text().splitlines()) == 2

    directory = ModelDirectory.open(trained / "model")
    stats = directory.load_vae().config
    assert len(stats.latents_std) == 16 and min(stats.latents_std) > 0 and any(stats.latents_mean)

    # The generator moved away from the teacher it started from; both open in diffusers, and are the same nets there.
    x = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    timestep, text = torch.tensor([900.0, 300.0]), torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    flows = []
    for part in ("transformer", "generator"):
        ours = directory.load_transformer(CausalWanModel, torch.float32, weights=trained / "model" / part)
        theirs = WanTransformer3DModel.from_pretrained(trained / "model" / part, dtype=torch.float32)
        with torch.no_grad():
            flows.append(ours(x, timestep, text))
            torch.testing.assert_close(theirs(x, timestep, text).sample, flows[-1], atol=1e-5, rtol=1e-5)
    assert flows[0].abs().max() > 0 and not torch.equal(*flows)

    pipeline = WanPipeline.from_pretrained(trained / "model", dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    words = dict(height=32, width=32, num_frames=9, num_inference_steps=2, max_sequence_length=24)
    video = pipeline("a red circle", output_type="pt", generator=torch.Generator().manual_seed(0), **words).frames
    assert video.shape == (1, 9, 3, 32, 32) and video.isfinite().all()


def test_train_says_what_it_needs(tmp_path, monkeypatch, capsys, model):
    config = write_config(tmp_path / "c.yaml", model)
    for words, says in [
        ([], "--logdir"),
        (["--logdir", tmp_path / "log"], "has no train.objective"),
        (["--logdir", tmp_path / "log", "train.objective=magic"], "train.objective"),
        (["--logdir", tmp_path / "log", "train.max_iterations=0"], "train.max_iterations must be positive"),
        (["--logdir", config, "train.objective=text_attributes", "train.network=shapes"], "cannot write to folder"),
        (["--logdir", tmp_path / "log", "train.objective=flow_matching", "train.network=shapes"], "no encoded clips"),
        (["--logdir", tmp_path / "log", "train.objective=text_attributes", "train.network=no"], "choose from"),
    ]:
        assert run_train(monkeypatch, "--config_path", config, *words) == 2
        err = capsys.readouterr().err
        assert says in err and err.startswith("error:") and err.count("\n") == 1, err


def test_wandb_without_credentials_is_said_at_once(tmp_path, monkeypatch, capsys, model, clips):
    config = write_config(
        tmp_path / "c.yaml", model, train={"objective": "flow_matching", "wandb": "online"}, data={"path": str(clips)}
    )
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr("trainer.objectives.build_objective", lambda *_: pytest.fail("something was loaded"))
    assert run_train(monkeypatch, "--config_path", config, "--logdir", tmp_path / "log") == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: train.wandb=online needs credentials") and "Traceback" not in err


def test_train_dry_run_prints_the_configuration(monkeypatch, capsys):
    root = Path(train.__file__).parent
    for file in sorted((root / "configs/shapes").glob("*.yaml")):
        assert run_train(monkeypatch, "--config_path", file, "--dry-run", "train.max_iterations=3") == 0
        assert "max_iterations: 3" in capsys.readouterr().out
