"""docs/extend.md: every example on the page runs and behaves as described."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from pages import ROOT, code_blocks, text_of
from tiny_model import TRANSFORMER, VAE, write_model

import trainer.objectives
from evaluation.metrics import NO_VALUES, video_sums
from evaluation.video_metrics import measure_frames, pixel_curves
from model import presets
from model.denoiser import Denoiser
from model.vae import WanVAE
from pipeline.build import choose_attention_backend
from pipeline.rollout import BlockLayout, Rollout
from pipeline.schedule import Schedule
from trainer.objectives import OBJECTIVES
from trainer.trainer import Trainer
from utils.config import Config
from utils.process_group import process_group
from utils.rng import keyed_noise

EXTEND = ROOT / "docs/extend.md"
SIGMAS = [1.0, 0.9, 0.7, 0.4, 0.0]


def example(heading: str) -> dict[str, Any]:
    """Execute the Python block under a heading and return its names."""
    section = text_of(EXTEND).split(f"\n## {heading}\n")[1].split("\n## ")[0]
    [code] = [block for block in code_blocks(EXTEND, "python") if block in section]
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, f"docs/extend.md, {heading}", "exec", dont_inherit=True), names)
    return names


def latents(net, text, schedule: Schedule, order: str = "step_major") -> torch.Tensor:
    """Roll out four blocks of one frame with the tiny network."""
    rollout = Rollout(
        Denoiser(net, text),
        SIGMAS,
        lambda block, step: keyed_noise(0, 0, block, step, (1, 1, 4, 4, 4)),
        lambda: net.new_cache(1, 4, 4, 3, 1),
        BlockLayout(1),
    )
    blocks = dict(rollout.run(list(schedule.ops(order)), schedule.caches))
    return torch.cat([blocks[block] for block in sorted(blocks)], dim=1)


@pytest.mark.parametrize(("heading", "name"), [("A schedule", "TrailingSteps"), ("A context rule", "CleanLate")])
def test_a_schedule_and_a_context_rule(net, text, heading, name):
    schedule = example(heading)[name](num_steps=4, num_blocks=4)
    result = latents(net, text, schedule)
    assert result.isfinite().all() and not torch.equal(result, latents(net, text, Schedule(4, 4)))
    assert torch.equal(result, latents(net, text, schedule, "diagonal"))  # law 1


def test_the_schedule_has_the_number_of_passes_on_the_page():
    schedule = example("A schedule")["TrailingSteps"]
    assert len(list(schedule(4, 9).ops())) - len(list(schedule(4, 8).ops())) == 7


# ---- training ----


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four clips in the format of the page's dataset."""
    for number in range(4):
        clip = np.random.default_rng(number).standard_normal((3, 16, 4, 4), dtype=np.float32)
        np.save(tmp_path / f"{number}.npy", clip)
        (tmp_path / f"{number}.txt").write_text(f"clip {number}\n")
    return tmp_path


def test_a_dataset(folder):
    clips = example("A dataset")["NumpyClips"](folder)
    assert clips.captions == [f"clip {number}" for number in range(4)]
    read = clips.read([2, 0])
    assert read.shape == (2, *clips.shape) and read.dtype == torch.float16
    assert torch.equal(read[1], torch.from_numpy(np.load(folder / "0.npy")).half())


def test_an_objective(folder, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("trainer.objectives.OBJECTIVES", dict(OBJECTIVES))
    monkeypatch.setitem(presets.TRANSFORMERS, "tiny", TRANSFORMER)
    clips = example("A dataset")["NumpyClips"](folder)
    monkeypatch.setattr("trainer.datasets.clips.open_clips", lambda path: clips)
    example("An objective")
    run = tmp_path_factory.mktemp("run")
    config = Config()
    config.model.base, config.model.text_length = str(write_model(run / "model")), 24
    config.train.network, config.train.batch_size, config.train.max_iterations = "tiny", 2, 2
    config.train.log_every, config.train.save = 1, False
    objective = trainer.objectives.OBJECTIVES["huber_flow_matching"](config, torch.device("cpu"))
    with contextlib.nullcontext() if dist.is_initialized() else process_group(torch.device("cpu")):
        Trainer(config, objective, str(run / "log")).train()
    records = [json.loads(line) for line in (run / "log/metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all(record["loss"] > 0 and 0 < record["mean_sigma"] < 1 for record in records)


# ---- networks ----


def test_a_decoder():
    vae = WanVAE(AutoencoderKLWan(**VAE), decoder=example("A decoder")["Preview"]())
    latents = torch.randn(1, 5, 16, 4, 6)
    decoder, whole = vae.stream(), vae.stream().push(latents)
    assert torch.equal(torch.cat([decoder.push(latents[:, :2]), decoder.push(latents[:, 2:])], dim=1), whole)
    assert whole.shape == (1, vae.num_pixel_frames(5), 3, 32, 48)


def test_an_attention_backend(make_net, text, monkeypatch):
    for table in ("_backends", "_constraints", "_supported_arg_names"):
        monkeypatch.setattr(_AttentionBackendRegistry, table, dict(getattr(_AttentionBackendRegistry, table)))
    native, own = make_net(), make_net()
    function = example("An attention backend")["written_out"]
    assert function in _AttentionBackendRegistry._backends.values()
    choose_attention_backend(own, "_native_math")
    x = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = native(x, torch.tensor([500.0]), text)
    torch.testing.assert_close(own(x, torch.tensor([500.0]), text), expected, atol=1e-5, rtol=1e-4)


# ---- metrics ----


def test_a_metric():
    metric = example("A metric")["PEAK_MOTION"]
    frames = np.zeros((9, 32, 32, 3), np.uint8)
    frames[5:] = 40
    curves = pixel_curves(measure_frames(frames))
    assert video_sums([metric], curves)["peak_motion"].total == pytest.approx(40)
    still = pixel_curves(measure_frames(frames[:1]))
    assert video_sums([metric], still)["peak_motion"] == NO_VALUES
