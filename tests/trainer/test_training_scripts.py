"""Scripts around training: exported generators make the same samples; prompts encoded ahead; LMDBs; plots; plans."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import all_clips, write_config, write_model

import train
from evaluation.plots import save_line_plot
from model.causal_wan import CausalWanModel
from model.embeddings import EmbeddingCache
from model.weights import ModelDirectory
from pipeline.text_to_video import TextToVideo
from scripts import create_lmdb, encode_prompts, export_generator, generate_ode_pairs, plot_metrics
from trainer.datasets.clips import write_shard
from trainer.datasets.ode_pairs import open_ode_pairs, pair_file, write_ode_pair, write_sigmas
from trainer.objectives import build_objective
from trainer.objectives.flow_matching import FlowMatching
from trainer.planner import plan
from trainer.trainer import Trainer
from utils.config import load_config
from utils.process_group import process_group

ROOT = Path(train.__file__).parent
CPU = torch.device("cpu")
LEVELS = [1.0, 0.9375, 0.8333, 0.625, 0.0]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """model/, pairs/ and config.yaml of a tiny distillation."""
    root = tmp_path_factory.mktemp("world")
    model = write_model(root / "model")
    (root / "pairs").mkdir()
    for index in range(5):
        points = torch.randn(5, 6, 16, 4, 4, generator=torch.Generator().manual_seed(index))
        write_ode_pair(pair_file(root / "pairs", index), ["a red circle", "a blue square"][index % 2], points)
    write_sigmas(root / "pairs", LEVELS)
    write_config(
        root / "config.yaml",
        model,
        train={"objective": "score_distillation", "init": str(model / "transformer"), "max_iterations": 3,
               "batch_size": 1, "warmup": 0, "learning_rate": 1e-2, "checkpoint_every": 1, "keep_checkpoints": 2},
        distill={"max_rollout_frames": 6},
        data={"path": str(root / "pairs"), "num_frames": 6},
    )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def run(world) -> Path:
    """A training run that has ended."""
    return train(world, "run")


def train(world: Path, name: str, *overrides: str) -> Path:
    words = ["train.py", "--config_path", str(world / "config.yaml"), "--logdir", str(world / name), *overrides]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr.decode()
    return world / name


# ---- export_generator.py ----


def samples(world: Path, weights: Path, *overrides: str) -> torch.Tensor:
    words = [f"model.generator={weights}", "video.num_output_frames=6", *overrides]
    config = load_config(str(world / "config.yaml"), words)
    return sampled(TextToVideo.load(config, CPU))


def sampled(pipeline: TextToVideo) -> torch.Tensor:
    return torch.cat(list(pipeline.generate_blocks(["a red circle"], [0])), dim=1)


def test_an_exported_generator_makes_the_samples_of_the_run_itself(world, tmp_path, call):
    config = load_config(str(world / "config.yaml"), ["video.num_output_frames=6"])
    with process_group(CPU):
        trainer = Trainer(config, build_objective(config, CPU), str(tmp_path / "run"))
        trainer.train()
        inference = TextToVideo.load(config, CPU)  # all of it but the net
        own = TextToVideo(config, trainer.net, inference.embeddings.cache, inference.vae)
        expected = {False: sampled(own)}
        with trainer.ema.applied_to(trainer.net):
            expected[True] = sampled(own)
    assert not torch.equal(expected[False], expected[True])
    assert call(export_generator, "--logdir", tmp_path / "run", "--output", tmp_path / "g.pt")[0] == 0
    for average, latents in expected.items():
        assert torch.equal(samples(world, tmp_path / "g.pt", f"model.use_ema={average}"), latents)


def test_an_exported_generator_makes_the_same_samples_in_every_format(world, run, tmp_path, call):
    results = {}
    for ema in (False, True):
        for name in ("g.pt", "g.safetensors", "folder"):
            target = tmp_path / f"{ema}-{name}"
            words = ["--logdir", run, "--output", target, *(["--use_ema"] if ema else [])]
            assert call(export_generator, *words)[0] == 0
            half = ["model.use_ema=true"] if ema and name == "g.pt" else []
            results[ema, name] = samples(world, target, *half)
    for ema in (False, True):
        assert torch.equal(results[ema, "g.pt"], results[ema, "g.safetensors"])
        assert torch.equal(results[ema, "g.pt"], results[ema, "folder"])
    assert not torch.equal(results[False, "g.pt"], results[True, "g.pt"])
    keys = torch.load(tmp_path / "True-g.pt", weights_only=True)
    assert keys.keys() == {"generator", "generator_ema"}
    assert "model.blocks.0.self_attn.q.weight" in keys["generator"]


def test_a_causal_initialisation_can_be_exported(world, tmp_path, call):
    output = world / "finished"
    run = train(world, "ode", "train.objective=ode_regression", f"train.output={output}", "train.max_iterations=2")
    results = {"finished": samples(world, output)}
    for name in ("g.pt", "g.safetensors", "folder"):
        assert call(export_generator, "--logdir", run, "--output", tmp_path / name, "--use_ema")[0] == 0
        half = ["model.use_ema=true"] if name == "g.pt" else []
        results[name] = samples(world, tmp_path / name, *half)
    assert all(torch.equal(results[name], results["g.pt"]) for name in ("g.safetensors", "folder"))
    torch.testing.assert_close(results["finished"], results["g.pt"], atol=0.05, rtol=0.05)  # it is in bfloat16
    for file in run.glob("checkpoints/*/config.yaml"):  # what it was trained with, whatever it goes on with
        file.write_text(file.read_text().replace("ode_regression", "text_attributes"))
    code, _, err = call(export_generator, "--logdir", run, "--output", tmp_path / "none.pt")
    assert code == 2 and "a run of text_attributes, which trains no generator" in err


def test_an_earlier_iteration_can_be_exported(run, tmp_path, call):
    assert call(export_generator, "--logdir", run, "--output", tmp_path / "g.pt", "--iteration", 2)[0] == 0
    code, _, err = call(export_generator, "--logdir", run, "--output", tmp_path / "g.pt", "--iteration", 1)
    assert code == 2 and "has no checkpoint of iteration 1, but of 2, 3" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--logdir", "/nowhere"], "no checkpoints in /nowhere"), (["--output", "g.txt"], "must end in")],
)
def test_what_cannot_be_exported_is_said(run, tmp_path, call, words, says):
    always = ["--logdir", run, "--output", tmp_path / "g.pt"]
    code, _, err = call(export_generator, *always, *words)
    assert code == 2 and says in err and err.count("\n") == 1


# ---- encode_prompts.py ----


def test_prompts_encoded_ahead_are_all_that_training_needs(world, tmp_path, call, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    cache = f"model.text_cache={tmp_path / 'cache'}"
    config = world / "config.yaml"
    words = ("--config_path", config, "--data_path", tmp_path / "prompts.txt", cache)
    code, _, err = call(encode_prompts, *words)
    assert code == 0 and "note" not in err  # it is what fills the cache
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert len(files) == 3  # and the empty prompt
    assert call(encode_prompts, *words)[0] == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == files

    def refuse(*words):
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr(ModelDirectory, "load_text_encoder", refuse)
    directory = ModelDirectory.open(world / "model")
    cache = EmbeddingCache.load(directory, torch.float32, 24, str(tmp_path / "cache"))
    assert cache.get(["a red circle", ""]).shape == (2, 24, 16)


def test_prompts_can_be_encoded_for_another_kind_of_device(world, tmp_path, call, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    folder = str(tmp_path / "cache")
    words = (
        "--config_path",
        world / "config.yaml",
        "--data_path",
        tmp_path / "prompts.txt",
        f"model.text_cache={folder}",
    )
    assert call(encode_prompts, *words, "--dtype", "bfloat16")[0] == 0
    monkeypatch.setattr(ModelDirectory, "load_text_encoder", lambda *_: pytest.fail("the text encoder was loaded"))
    directory = ModelDirectory.open(world / "model")
    assert EmbeddingCache.load(directory, torch.bfloat16, 24, folder).get(["a red circle"]).dtype == torch.bfloat16


def test_without_a_place_for_embeddings_it_says_so(world, call):
    code, _, err = call(encode_prompts, "--config_path", world / "config.yaml", "--data_path", world / "config.yaml")
    assert code == 2 and "model.text_cache" in err


# ---- create_lmdb.py ----


@pytest.mark.parametrize("shards", [1, 2])
def test_an_lmdb_holds_the_pairs_of_the_folder_in_their_order(world, tmp_path, call, shards):
    target = tmp_path / "lmdb"
    assert call(create_lmdb, "--data_path", world / "pairs", "--lmdb_path", target, "--shards", shards)[0] == 0
    one, other = (open_ode_pairs(str(folder), [], 5) for folder in (world / "pairs", target))
    assert other.prompts == one.prompts and other.sigmas == one.sigmas
    assert torch.equal(other.read(range(5)), one.read(range(5)).half())
    code, _, err = call(create_lmdb, "--data_path", world / "pairs", "--lmdb_path", target)
    assert code == 2 and "is there already" in err


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Seven encoded clips in three shards."""
    folder = tmp_path_factory.mktemp("clips")
    latents = torch.randn(7, 6, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    for start, end in ((0, 3), (3, 6), (6, 7)):
        write_shard(folder / f"{start:06d}.safetensors", latents[start:end], [f"clip {i}" for i in range(start, end)])
    return folder


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_an_lmdb_holds_the_clips_of_the_folder_in_their_order(clips, tmp_path, call, shards):
    target = tmp_path / "lmdb"
    code, out, _ = call(create_lmdb, "--data_path", clips, "--lmdb_path", target, "--shards", shards)
    assert code == 0 and "7 clips" in out
    assert len(list(target.glob("**/data.mdb"))) == shards and [path.name for path in tmp_path.iterdir()] == ["lmdb"]
    (latents, captions), (others, other_captions) = all_clips(str(clips)), all_clips(str(target))
    assert torch.equal(latents, others) and latents.dtype == others.dtype and captions == other_captions


def test_flow_matching_learns_the_same_from_an_lmdb(world, clips, tmp_path, call):
    assert call(create_lmdb, "--data_path", clips, "--lmdb_path", tmp_path / "lmdb", "--shards", 2)[0] == 0
    losses = []
    for path in (clips, tmp_path / "lmdb"):
        words = ["train.objective=flow_matching", f"data.path={path}", "train.batch_size=2"]
        objective = FlowMatching(load_config(str(world / "config.yaml"), words), torch.device("cpu"))
        losses.append(objective.loss(0, 0)[0].item())
    assert losses[0] == losses[1] > 0


def test_what_cannot_be_packed_is_said(world, clips, tmp_path, call):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "empty").mkdir()
    shard = (clips / "000000.safetensors").read_bytes()
    (tmp_path / "mixed/0.safetensors").write_bytes(shard)
    (tmp_path / "mixed/0.pt").write_bytes((world / "pairs/00000.pt").read_bytes())
    (tmp_path / "cut/0.safetensors").write_bytes(shard[:-10])
    for folder, shards, says in [
        (tmp_path / "mixed", 1, "holds both clips"),
        (tmp_path / "cut", 1, "0.safetensors is no shard of clips"),
        (tmp_path / "empty", 1, "no ODE pairs in"),
        (clips, 8, "--shards must be at most 7, the number of clips, not 8"),
        (world / "pairs", 6, "--shards must be at most 5, the number of pairs, not 6"),
    ]:
        words = ("--data_path", folder, "--lmdb_path", tmp_path / "lmdb", "--shards", shards)
        code, _, err = call(create_lmdb, *words)
        assert code == 2 and says in err and err.count("\n") == 1, err
    assert {path.name for path in tmp_path.iterdir()} == {"mixed", "cut", "empty"}


def test_an_lmdb_that_fails_leaves_nothing(world, tmp_path, call):
    (tmp_path / "pairs").mkdir()
    for file in (world / "pairs").glob("*.pt"):
        (tmp_path / "pairs" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pairs/00003.pt").write_bytes(b"broken")
    code, _, err = call(create_lmdb, "--data_path", tmp_path / "pairs", "--lmdb_path", tmp_path / "lmdb")
    assert code == 2 and "00003.pt" in err
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]


# ---- generate_ode_pairs.py ----


def test_only_the_points_that_the_loss_reads_are_kept(world, tmp_path, call):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    words = (
        "--config_path",
        world / "config.yaml",
        "--caption_path",
        tmp_path / "prompts.txt",
        "--num_inference_steps",
    )
    always = (*words, 8, "--timestep_shift", 5, "--output_folder")
    assert call(generate_ode_pairs, *always, tmp_path / "kl", "--dtype", "float16")[0] == 0
    pairs = open_ode_pairs(str(tmp_path / "kl"), [], 2)
    assert pairs.shape[0] == 2 and pairs.read([0]).dtype == torch.float16
    assert call(generate_ode_pairs, *always, tmp_path / "ode", "train.objective=ode_regression")[0] == 0
    whole = open_ode_pairs(str(tmp_path / "ode"), [], 5)
    assert whole.sigmas[:2] == pairs.sigmas and whole.sigmas[-1] == 0
    torch.testing.assert_close(whole.read([0], [0, 1]).half(), pairs.read([0]))
    code, _, err = call(generate_ode_pairs, *always, tmp_path / "x", "--latent_shape", 8, 4, 4)
    assert code == 2 and "16 channels" in err


# ---- plot_metrics.py ----


def test_curves_are_plotted(run, tmp_path, call):
    code, _, _ = call(plot_metrics, f"tiny={run}", run, "--output", tmp_path / "x/curves.png")
    assert code == 0 and Image.open(tmp_path / "x/curves.png").size[0] > 600
    assert call(plot_metrics, run, "--output", tmp_path / "one.png", "--only", "critic", "--smooth", 2)[0] == 0


def test_what_cannot_be_plotted_is_said(run, tmp_path, call):
    for name, text in ("new", ""), ("other", "3\n"):  # killed before its first line; not a run's
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    for words, output, says in [
        ((run, "--only", "nonsense"), "no.png", "no run has logged nonsense"),
        ((tmp_path,), "no.png", "cannot read"),
        ((tmp_path / "new",), "no.png", "nothing is logged yet"),
        ((tmp_path / "other",), "no.png", "a line has no iteration"),
        ((run,), "no.jpg", "ends in .png"),
        ((run,), "", "ends in .png"),
        ((run,), "new/metrics.jsonl/no.png", "cannot write"),
    ]:
        code, _, err = call(plot_metrics, *words, "--output", tmp_path / output)
        assert code == 2 and says in err, err
    assert not (tmp_path / "no.png").exists()


def test_the_legend_names_runs_that_the_first_panel_lacks(tmp_path):
    curve = (np.arange(2), np.arange(2))
    pixels = []
    for labels in (["one"], ["one", "other"]):
        lines = [(label, {"b": curve} if label == "other" else {"a": curve, "b": curve}, "-") for label in labels]
        save_line_plot(tmp_path / "x.png", ["a", "b"], lines, "iteration")
        first = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))[:, :600].astype(int)
        pixels.append((abs(first - [255, 127, 14]).sum(axis=2) < 30).sum())  # of the second line's colour
    assert pixels[0] == 0 and pixels[1] > 10


def test_metrics_of_the_run_are_complete(run):
    [line] = (run / "metrics.jsonl").read_text().splitlines()  # the last iteration's, log_every is 20
    assert {"dmd_output_gradient", "forward_kl_output_gradient", "motion", "critic", "forward_kl"} <= json.loads(
        line
    ).keys()


# ---- the planner ----


def test_the_full_size_run_is_planned_without_its_weights():
    """METHOD's figures: a 1.3B cache of 21 frames takes 6.04 GB; the teacher has 14.3 billion parameters."""
    config = load_config(str(ROOT / "configs/hiar.yaml"))
    text = plan(config, 64)
    assert "generator 1.42B, critic 1.42B, teacher 14.29B" in text
    assert "6.04 GB  KV cache" in text and "fits in 80 GB" in text
    alone = plan(load_config(str(ROOT / "configs/hiar.yaml"), ["train.sharding=replicate"]), 64)
    assert "does NOT fit in 80 GB" in alone and "teacher: weights" in alone


def test_the_plan_counts_what_is_there(world):
    config = load_config(str(world / "config.yaml"))
    net = ModelDirectory.open(world / "model").load_transformer(CausalWanModel, torch.float32)
    count = sum(p.numel() for p in net.parameters())
    assert f"{4 * 3 * count / 1e9:8.2f} GB  generator: float32 weights, gradients, average" in plan(config, 1)


def test_the_pairs_script_hands_its_environment_on(tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    script = ROOT / "scripts/run_generate_ode_pairs.sh"
    given = {"CAPTION_PATH": "a b.txt", "OUTPUT_FOLDER": "out", "SAVE_INDICES": "0 12 -1", "SEED": "3", "NUM_GPUS": "2"}
    environment = os.environ | {"PYTHON": str(fake)} | given
    done = subprocess.run(["bash", script, "video.height=64"], env=environment, capture_output=True, text=True)
    words = done.stdout.splitlines()
    assert done.returncode == 0 and "--nproc_per_node=2" in words
    own = words[words.index("scripts/generate_ode_pairs.py") + 1 :]
    assert own[:4] == ["--config_path", "configs/hiar.yaml", "--caption_path", "a b.txt"]
    assert own[4:6] == ["--output_folder", "out"] and own[-1] == "video.height=64"
    assert own[own.index("--save_indices") + 1 : own.index("--seed")] == ["0", "12", "-1"]
    del environment["CAPTION_PATH"]
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "set CAPTION_PATH to a file of prompts" in done.stderr
