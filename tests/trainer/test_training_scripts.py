"""Scripts for training: export of generators, prompt embeddings, LMDBs, ODE pairs, plots and memory plans."""

import functools
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import ROOT, all_clips, write_config, write_model

from evaluation.plots import save_line_plot
from model.causal_wan import CausalWanModel
from model.embeddings import EmbeddingCache
from model.vae import WanVAE
from model.weights import ModelDirectory
from pipeline.build import load_embeddings, load_network, load_vae
from pipeline.text_to_video import TextToVideo
from scripts import create_lmdb, encode_prompts, export_generator, generate_ode_pairs, plot_metrics, sample_teacher
from trainer.datasets.clips import write_shard
from trainer.datasets.ode_pairs import open_ode_pairs, pair_file, write_ode_pair, write_sigmas
from trainer.objectives import build_objective
from trainer.objectives.flow_matching import FlowMatching
from trainer.planner import memory_plan
from trainer.trainer import Trainer
from utils.config import Config
from utils.config_loading import load_config
from utils.process_group import process_group

CPU = torch.device("cpu")
LEVELS = [1.0, 0.9375, 0.8333, 0.625, 0.0]
ROUNDING = dict(atol=1e-4, rtol=1e-4)  # loaded networks run their layers in a faster form


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
        train={"objective": "score_distillation", "init": str(model / "transformer"), "max_iterations": 2,
               "batch_size": 1, "warmup": 0, "learning_rate": 1e-2, "checkpoint_every": 1, "keep_checkpoints": 2},
        distill={"max_rollout_frames": 6},
        data={"path": str(root / "pairs"), "num_frames": 6},
    )  # fmt: skip
    return root


@dataclass
class Run:
    """A finished training run."""

    logdir: Path
    samples: dict[bool, torch.Tensor]  # latents of the trained network, with its own weights and with the EMA (True)


def train(world: Path, name: str, *overrides: str) -> Run:
    """Train in this process."""
    config = load_config(str(world / "config.yaml"), ["video.num_output_frames=6", *overrides])
    with process_group(CPU):
        trainer = Trainer(config, build_objective(config, CPU), str(world / name))
        trainer.train()
        samples = {False: latents_of(config, trainer.net)}
        with trainer.ema.applied_to(trainer.net):
            samples[True] = latents_of(config, trainer.net)
    return Run(world / name, samples)


@pytest.fixture(scope="module")
def run(world) -> Run:
    """A run of score distillation."""
    return train(world, "run")


# ---- export_generator.py ----


@functools.cache
def inference_parts(base: str) -> tuple[EmbeddingCache, WanVAE]:
    """Load what inference needs besides the generator, once for all tests."""
    config = Config()
    config.model.base, config.model.text_length, config.model.dtype = base, 24, "float32"
    return load_embeddings(config, CPU), load_vae(config, CPU)


def latents_of(config: Config, net: CausalWanModel) -> torch.Tensor:
    """Return the latents of inference with this network."""
    embeddings, vae = inference_parts(config.model.base)
    pipeline = TextToVideo(config, net, embeddings, vae)
    return torch.cat(list(pipeline.generate_blocks(["a red circle"], [0])), dim=1)


def latents_from(world: Path, weights: Path, *overrides: str) -> torch.Tensor:
    """Return the latents of inference with exported weights."""
    words = [f"model.generator={weights}", "video.num_output_frames=6", *overrides]
    config = load_config(str(world / "config.yaml"), words)
    return latents_of(config, load_network(config, CPU))


def test_an_exported_generator_makes_the_same_samples_as_the_run_in_every_format(world, run, tmp_path, call):
    assert not torch.allclose(run.samples[False], run.samples[True], atol=1e-2)
    for name in ("g.safetensors", "folder"):
        for ema in (False, True):
            target = tmp_path / f"{ema}-{name}"
            flags = ["--use_ema"] if ema else []
            assert call(export_generator, "--logdir", run.logdir, "--output", target, *flags)[0] == 0
            torch.testing.assert_close(latents_from(world, target), run.samples[ema], **ROUNDING)
    target = tmp_path / "g.pt"
    assert call(export_generator, "--logdir", run.logdir, "--output", target)[0] == 0
    for ema in (False, True):
        latents = latents_from(world, target, f"model.use_ema={ema}")
        torch.testing.assert_close(latents, run.samples[ema], **ROUNDING)
    keys = torch.load(target, weights_only=True)
    assert keys.keys() == {"generator", "generator_ema"}
    assert "model.blocks.0.self_attn.q.weight" in keys["generator"]


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors", "out"])
def test_weights_with_nan_are_not_exported(run, tmp_path, call, monkeypatch, name):
    read = export_generator.read_tensors

    def damaged(checkpoint, prefix):
        tensors = read(checkpoint, prefix)
        tensors["blocks.0.attn1.to_q.bias"][0] = float("nan")
        return tensors

    monkeypatch.setattr(export_generator, "read_tensors", damaged)
    code, _, err = call(export_generator, "--logdir", run.logdir, "--output", tmp_path / name)
    assert code == 2 and "tensor blocks.0.attn1.to_q.bias holds NaN or infinity" in err
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_causal_initialisation_can_be_exported(world, tmp_path, call):
    output = world / "finished"
    run = train(world, "ode", "train.objective=ode_regression", f"train.output={output}", "train.max_iterations=1")
    for name in ("g.pt", "g.safetensors", "folder"):
        assert call(export_generator, "--logdir", run.logdir, "--output", tmp_path / name, "--use_ema")[0] == 0
        of_ema = ["model.use_ema=true"] if name == "g.pt" else []
        torch.testing.assert_close(latents_from(world, tmp_path / name, *of_ema), run.samples[True], **ROUNDING)
    # The finished weights are in bfloat16.
    torch.testing.assert_close(latents_from(world, output), run.samples[True], atol=0.05, rtol=0.05)
    for file in run.logdir.glob("checkpoints/*/config.yaml"):  # the checkpoint's configuration decides
        file.write_text(file.read_text().replace("ode_regression", "text_attributes"))
    code, _, err = call(export_generator, "--logdir", run.logdir, "--output", tmp_path / "none.pt")
    assert code == 2 and "a run of text_attributes, which trains no generator" in err


def test_an_earlier_iteration_can_be_exported(run, tmp_path, call):
    words = ("--logdir", run.logdir, "--output", tmp_path / "g.pt")
    assert call(export_generator, *words, "--iteration", 1)[0] == 0
    code, _, err = call(export_generator, *words, "--iteration", 3)
    assert code == 2 and "has no checkpoint of iteration 3; choose from 1, 2" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--logdir", "/nowhere"], "no checkpoints in /nowhere"), (["--output", "g.txt"], "must end in")],
)
def test_impossible_exports_are_refused(run, tmp_path, call, words, message):
    always = ["--logdir", run.logdir, "--output", tmp_path / "g.pt"]
    code, _, err = call(export_generator, *always, *words)
    assert code == 2 and message in err and err.count("\n") == 1


# ---- encode_prompts.py ----


def test_with_encoded_prompts_the_text_encoder_is_not_loaded(world, tmp_path, call, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    cache = f"model.text_cache={tmp_path / 'cache'}"
    config = world / "config.yaml"
    words = ("--config_path", config, "--data_path", tmp_path / "prompts.txt", cache)
    code, _, err = call(encode_prompts, *words)
    assert code == 0 and "note" not in err  # the note recommends this script
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert len(files) == 3  # with the empty prompt
    assert call(encode_prompts, *words)[0] == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == files

    monkeypatch.setattr(ModelDirectory, "load_text_encoder", lambda *_: pytest.fail("the text encoder was loaded"))
    directory = ModelDirectory.open(world / "model")
    cache = EmbeddingCache.load(directory, torch.float32, 24, str(tmp_path / "cache"))
    assert cache.get(["a red circle", ""]).shape == (2, 24, 16)


def test_prompts_can_be_encoded_in_another_dtype(world, tmp_path, call, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    folder = str(tmp_path / "cache")
    files = ("--config_path", world / "config.yaml", "--data_path", tmp_path / "prompts.txt")
    assert call(encode_prompts, *files, f"model.text_cache={folder}", "--dtype", "bfloat16")[0] == 0
    monkeypatch.setattr(ModelDirectory, "load_text_encoder", lambda *_: pytest.fail("the text encoder was loaded"))
    directory = ModelDirectory.open(world / "model")
    assert EmbeddingCache.load(directory, torch.bfloat16, 24, folder).get(["a red circle"]).dtype == torch.bfloat16


def test_encoding_prompts_needs_a_folder_for_embeddings(world, call):
    code, _, err = call(encode_prompts, "--config_path", world / "config.yaml", "--data_path", world / "config.yaml")
    assert code == 2 and "model.text_cache" in err


# ---- create_lmdb.py ----


@pytest.mark.parametrize("shards", [1, 2])
def test_an_lmdb_holds_the_folders_pairs_in_order(world, tmp_path, call, shards):
    target = tmp_path / "lmdb"
    assert call(create_lmdb, "--data_path", world / "pairs", "--lmdb_path", target, "--shards", shards)[0] == 0
    one, other = (open_ode_pairs(str(folder), [], 5) for folder in (world / "pairs", target))
    assert other.prompts == one.prompts and other.sigmas == one.sigmas
    assert torch.equal(other.read(range(5)), one.read(range(5)).half())
    code, _, err = call(create_lmdb, "--data_path", world / "pairs", "--lmdb_path", target)
    assert code == 2 and "exists already" in err


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Seven encoded clips in three shards."""
    folder = tmp_path_factory.mktemp("clips")
    latents = torch.randn(7, 6, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    for start, end in ((0, 3), (3, 6), (6, 7)):
        write_shard(folder / f"{start:06d}.safetensors", latents[start:end], [f"clip {i}" for i in range(start, end)])
    return folder


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_an_lmdb_holds_the_folders_clips_in_order(clips, tmp_path, call, shards):
    target = tmp_path / "lmdb"
    code, out, _ = call(create_lmdb, "--data_path", clips, "--lmdb_path", target, "--shards", shards)
    assert code == 0 and "7 clips" in out
    assert len(list(target.glob("**/data.mdb"))) == shards and [path.name for path in tmp_path.iterdir()] == ["lmdb"]
    (latents, captions), (others, other_captions) = all_clips(str(clips)), all_clips(str(target))
    assert torch.equal(latents, others) and latents.dtype == others.dtype and captions == other_captions


def test_flow_matching_has_the_same_loss_from_shards_and_from_lmdbs(world, clips, tmp_path, call):
    assert call(create_lmdb, "--data_path", clips, "--lmdb_path", tmp_path / "lmdb", "--shards", 2)[0] == 0
    losses = []
    for path in (clips, tmp_path / "lmdb"):
        words = ["train.objective=flow_matching", f"data.path={path}", "train.batch_size=2"]
        objective = FlowMatching(load_config(str(world / "config.yaml"), words), torch.device("cpu"))
        losses.append(objective.loss(0, 0)[0].item())
    assert losses[0] == losses[1] > 0


def test_folders_that_cannot_be_packed_are_refused(world, clips, tmp_path, call):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "empty").mkdir()
    shard = (clips / "000000.safetensors").read_bytes()
    (tmp_path / "mixed/0.safetensors").write_bytes(shard)
    (tmp_path / "mixed/0.pt").write_bytes((world / "pairs/00000.pt").read_bytes())
    (tmp_path / "cut/0.safetensors").write_bytes(shard[:-10])
    for folder, shards, message in [
        (tmp_path / "mixed", 1, "holds both clips"),
        (tmp_path / "cut", 1, "0.safetensors is not a valid shard"),
        (tmp_path / "empty", 1, "no ODE pairs in"),
        (clips, 8, "--shards must be at most 7, the number of clips, not 8"),
        (world / "pairs", 6, "--shards must be at most 5, the number of pairs, not 6"),
    ]:
        words = ("--data_path", folder, "--lmdb_path", tmp_path / "lmdb", "--shards", shards)
        code, _, err = call(create_lmdb, *words)
        assert code == 2 and message in err and err.count("\n") == 1, err
    assert {path.name for path in tmp_path.iterdir()} == {"mixed", "cut", "empty"}


def test_a_failed_lmdb_leaves_no_files(world, tmp_path, call):
    (tmp_path / "pairs").mkdir()
    for file in (world / "pairs").glob("*.pt"):
        (tmp_path / "pairs" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pairs/00003.pt").write_bytes(b"broken")
    code, _, err = call(create_lmdb, "--data_path", tmp_path / "pairs", "--lmdb_path", tmp_path / "lmdb")
    assert code == 2 and "00003.pt" in err
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]


# ---- generate_ode_pairs.py ----


def test_pairs_store_only_the_points_that_the_loss_reads(world, tmp_path, call):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    files = ("--config_path", world / "config.yaml", "--caption_path", tmp_path / "prompts.txt")
    always = (*files, "--num_inference_steps", 8, "--timestep_shift", 5, "--output_folder")
    assert call(generate_ode_pairs, *always, tmp_path / "kl", "--dtype", "float16")[0] == 0
    pairs = open_ode_pairs(str(tmp_path / "kl"), [], 2)
    assert pairs.shape[0] == 2 and pairs.read([0]).dtype == torch.float16
    assert call(generate_ode_pairs, *always, tmp_path / "ode", "train.objective=ode_regression")[0] == 0
    whole = open_ode_pairs(str(tmp_path / "ode"), [], 5)
    assert whole.sigmas[:2] == pairs.sigmas and whole.sigmas[-1] == 0
    torch.testing.assert_close(whole.read([0], [0, 1]).half(), pairs.read([0]))
    code, _, err = call(generate_ode_pairs, *always, tmp_path / "x", "--latent_shape", 8, 4, 4)
    assert code == 2 and "8 channels, but the teacher's latents have 16" in err


# ---- sample_teacher.py ----


def test_teacher_videos_have_metadata_and_existing_ones_are_kept(world, tmp_path, call):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    files = ("--config_path", world / "config.yaml", "--data_path", tmp_path / "prompts.txt")
    words = (*files, "--output_folder", tmp_path / "out", "data.num_frames=2", "teacher.num_inference_steps=2")
    assert call(sample_teacher, *words, "--solver", "euler", "--batch_size", 2)[0] == 0
    names = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    stems = ("a blue square-0", "a red circle-0")
    assert sorted(names) == [f"{stem}{suffix}" for stem in stems for suffix in (".json", ".mp4")]
    assert json.loads((tmp_path / "out/a red circle-0.json").read_text())["solver"] == "euler"
    (tmp_path / "out/a blue square-0.mp4").unlink()
    assert call(sample_teacher, *words)[0] == 0
    kept = {file.name for file in (tmp_path / "out").iterdir() if file.stat().st_mtime_ns == names.get(file.name)}
    assert kept == {"a red circle-0.json", "a red circle-0.mp4"}


# ---- plot_metrics.py ----


def test_curves_are_plotted(run, tmp_path, call):
    code, _, _ = call(plot_metrics, f"tiny={run.logdir}", run.logdir, "--output", tmp_path / "x/curves.png")
    assert code == 0 and Image.open(tmp_path / "x/curves.png").size[0] > 600
    assert call(plot_metrics, run.logdir, "--output", tmp_path / "one.png", "--only", "critic", "--smooth", 2)[0] == 0


def test_metrics_that_cannot_be_plotted_are_refused(run, tmp_path, call):
    for name, text in ("new", ""), ("other", "3\n"):  # a run without any line yet; a file of another kind
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    for words, output, message in [
        ((run.logdir, "--only", "nonsense"), "no.png", "no run has logged nonsense"),
        ((tmp_path,), "no.png", "cannot read"),
        ((tmp_path / "new",), "no.png", "these runs have no logged metrics yet"),
        ((tmp_path / "other",), "no.png", "has no valid line"),
        ((run.logdir,), "no.jpg", "ends in .png"),
        ((run.logdir,), "", "ends in .png"),
        ((run.logdir,), "new/metrics.jsonl/no.png", "cannot write"),
    ]:
        code, _, err = call(plot_metrics, *words, "--output", tmp_path / output)
        assert code == 2 and message in err, err
    assert not (tmp_path / "no.png").exists()


def test_the_legend_names_runs_without_the_first_panels_metric(tmp_path):
    curve = (np.arange(2), np.arange(2))
    pixels = []
    for labels in (["one"], ["one", "other"]):
        lines = [(label, {"b": curve} if label == "other" else {"a": curve, "b": curve}, "-") for label in labels]
        save_line_plot(tmp_path / "x.png", ["a", "b"], lines, "iteration")
        first = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))[:, :600].astype(int)
        pixels.append((abs(first - [255, 127, 14]).sum(axis=2) < 30).sum())  # of the second line's colour
    assert pixels[0] == 0 and pixels[1] > 10


def test_score_distillation_logs_all_its_metrics(run):
    [line] = (run.logdir / "metrics.jsonl").read_text().splitlines()  # the last iteration's, log_every is 20
    names = {"dmd_output_gradient", "forward_kl_output_gradient", "motion", "critic", "forward_kl"}
    assert names <= json.loads(line).keys()


# ---- the planner ----


def test_a_full_size_run_is_planned_without_weights():
    """A cache of 21 frames takes 6.04 GB at 1.3B (docs/method.md); the teacher has 14.3 billion parameters."""
    config = load_config(str(ROOT / "configs/hiar.yaml"))
    text = memory_plan(config, 64)
    assert "generator 1.42B, critic 1.42B, teacher 14.29B" in text
    assert "6.04 GB  KV cache" in text and "fits in 80 GB" in text
    alone = memory_plan(load_config(str(ROOT / "configs/hiar.yaml"), ["train.sharding=replicate"]), 64)
    assert "does NOT fit in 80 GB" in alone and "teacher: weights" in alone


def test_the_plan_counts_the_networks_parameters(world):
    config = load_config(str(world / "config.yaml"))
    net = ModelDirectory.open(world / "model").load_transformer(CausalWanModel, torch.float32)
    count = sum(p.numel() for p in net.parameters())
    assert f"{4 * 3 * count / 1e9:8.2f} GB  generator: float32 weights, gradients, EMA" in memory_plan(config, 1)


def test_the_shell_script_passes_its_environment_as_flags(tmp_path):
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
