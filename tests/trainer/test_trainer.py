"""trainer/trainer.py: an interrupted run ends with the bits of an uninterrupted one; what is wrong takes one line."""

import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from trainer import trainer as module
from trainer.checkpoints import read_tensors
from trainer.objectives.flow_matching import FlowMatching
from trainer.optim import Muon, build_optimizers, is_inner_matrix, learning_rate_scale
from trainer.sharding import local_micro_batches
from trainer.trainer import Trainer
from utils.config import TrainConfig
from utils.errors import UserError
from utils.video import VideoWriter

ROOT = Path(module.__file__).parents[1]


class Stop(Exception):
    """What kills a run in these tests: nothing is saved on the way out."""


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All tensors that a run has: weights, EMA, optimizer state."""
    return {name: tensor.clone() for name, tensor in trainer.state().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def stop_at(objective, iteration: int, error: BaseException) -> None:
    """Have the objective raise `error` in iteration number `iteration`."""
    loss = objective.loss

    def failing(number: int, part: int):
        if number == iteration:
            raise error
        return loss(number, part)

    objective.loss = failing


# ---- Resuming ----


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, toy, make_config, optimizer, stop):
    config = make_config(optimizer=optimizer, output=str(tmp_path / "weights"))
    whole = Trainer(config, toy(), str(tmp_path / "whole"))
    whole.train()
    assert whole.objective.iterations == [0, 1, 2, 3, 4, 5]

    first = Trainer(config, toy(), str(tmp_path / "parts"))
    stop_at(first.objective, stop, Stop())
    with pytest.raises(Stop):
        first.train()
    second = Trainer(config, toy(), str(tmp_path / "parts"))
    second.train()
    assert second.objective.iterations[0] == stop // 2 * 2  # the last multiple of checkpoint_every
    assert_same(state_of(second), state_of(whole))
    assert_same(second.objective.exported[1], whole.objective.exported[1])
    assert (tmp_path / "parts/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
    ]
    assert [path.name for path in second.checkpoints.saved()] == ["00000004", "00000006"]


def test_a_finished_run_exports_again_and_trains_no_more(tmp_path, toy, make_config):
    config = make_config(output=str(tmp_path / "weights"))
    runs = [Trainer(config, toy(), str(tmp_path / "log")) for _ in range(2)]
    for run in runs:
        run.train()
    assert runs[1].objective.iterations == []
    assert_same(runs[1].objective.exported[1], runs[0].objective.exported[1])
    assert runs[0].objective.exported[0] == tmp_path / "weights"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_finishes_the_next_iteration_and_saves(tmp_path, toy, make_config, sent):
    """Also when it is told after one optimizer's step and before the other's."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    config = make_config(checkpoint_every=100, optimizer="muon")
    whole = Trainer(config, toy(), str(tmp_path / "whole"))
    whole.train()
    first = Trainer(config, toy(), str(tmp_path / "parts"))
    press = lambda *_: signal.raise_signal(sent) if first.iteration == 1 else None  # noqa: E731
    first.optimizers["net"][0].register_step_post_hook(press)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = Trainer(config, toy(), str(tmp_path / "parts"))
    second.train()
    assert second.objective.iterations == [3, 4, 5]
    assert_same(state_of(second), state_of(whole))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_ctrl_c_stops_at_once_and_saves_nothing_half_done(tmp_path, toy, make_config):
    run = Trainer(make_config(checkpoint_every=2, optimizer="muon"), toy(), str(tmp_path))

    def press_twice(*_) -> None:
        if run.iteration == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    run.optimizers["net"][0].register_step_post_hook(press_twice)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert [path.name for path in run.checkpoints.saved()] == ["00000002"]


def test_flow_matching_goes_on_bit_for_bit(tmp_path, make_config, clips, tiny_presets):
    config = make_config(clips, optimizer="muon", max_iterations=4, text_dropout=0.5)

    def trainer(name: str) -> Trainer:
        return Trainer(config, FlowMatching(config, torch.device("cpu")), str(tmp_path / name))

    whole, first = trainer("whole"), trainer("parts")
    whole.train()
    stop_at(first.objective, 3, Stop())
    with pytest.raises(Stop):
        first.train()
    second = trainer("parts")
    second.train()
    assert_same(state_of(second), state_of(whole))


def test_the_checkpoint_is_whole_or_the_one_before(tmp_path, toy, make_config, monkeypatch):
    run = Trainer(make_config(), toy(), str(tmp_path))
    run.train()
    before = run.checkpoints.saved()[-1]
    content = read_tensors(before, "")

    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    run.iteration += 1
    run.save()
    with pytest.raises(CheckpointException, match="No space"):
        run.checkpoints.finish()
    assert run.checkpoints.saved()[-1] == before
    assert_same(read_tensors(before, ""), content)
    monkeypatch.undo()
    again = Trainer(make_config(), toy(), str(tmp_path))
    again.train()  # what was left of the failed one is removed
    assert [path.name for path in again.checkpoints.folder.iterdir()] == ["00000004", "00000006"]


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path, toy, make_config):
    """It is written in the background, while training changes what it holds."""
    run = Trainer(make_config(), toy(), str(tmp_path))
    run.step()
    expected = state_of(run)
    run.save()
    for tensor in run.state().values():
        tensor.detach().zero_()
    run.checkpoints.finish()
    assert_same(read_tensors(run.checkpoints.saved()[-1], ""), expected)


def test_a_checkpoint_has_its_name_as_soon_as_it_is_written(tmp_path, toy, make_config):
    """A kill long before the next save loses nothing of this one."""
    run = Trainer(make_config(max_iterations=9, checkpoint_every=4), toy(), str(tmp_path))
    loss, seen = run.objective.loss, []

    def slow_loss(number: int, part: int):
        if number == 5 and run.checkpoints._pending is not None:  # saved after 4; now the background thread gets done
            run.checkpoints._pending[0].result()
        seen.append([path.name for path in run.checkpoints.saved()])
        return loss(number, part)

    run.objective.loss = slow_loss
    run.train()
    assert seen[6] == ["00000004"]


def test_a_complete_checkpoint_without_its_name_is_found(tmp_path, toy, make_config):
    """As a kill leaves it between the last byte and the renaming; an incomplete one is none."""
    Trainer(make_config(max_iterations=4), toy(), str(tmp_path)).train()
    folder = tmp_path / "checkpoints"
    (folder / "00000004").rename(folder / ".00000004.partial")
    shutil.copytree(folder / "00000002", folder / ".00000006.partial", ignore=shutil.ignore_patterns(".metadata"))
    again = Trainer(make_config(), toy(), str(tmp_path))
    again.train()
    assert again.objective.iterations == [4, 5]
    assert not list(folder.glob(".*.partial"))


def test_a_run_begun_elsewhere_goes_on_by_the_same_command(tmp_path, toy, make_config):
    other = Trainer(make_config(keep_checkpoints=9), toy(), str(tmp_path / "other"))
    other.train()
    start = other.checkpoints.saved()[0]
    first = Trainer(make_config(), toy(), str(tmp_path / "log"))
    stop_at(first.objective, 5, Stop())
    with pytest.raises(Stop):
        first.train(resume=start)
    shutil.rmtree(start)  # its first run may have dropped it by then
    second = Trainer(make_config(), toy(), str(tmp_path / "log"))
    second.train(resume=start)
    assert second.objective.iterations == [4, 5]
    with pytest.raises(UserError, match="already has checkpoints; leave out --resume"):
        Trainer(make_config(), toy(), str(tmp_path / "log")).train(resume=other.checkpoints.saved()[0])
    with pytest.raises(UserError, match="is not a checkpoint"):
        Trainer(make_config(), toy(), str(tmp_path / "new")).train(resume=start)


def test_a_run_that_goes_back_keeps_what_it_makes(tmp_path, toy, make_config):
    config = make_config(keep_checkpoints=3)
    Trainer(config, toy(), str(tmp_path)).train()
    back = tmp_path / "checkpoints/00000002"
    first = Trainer(make_config(keep_checkpoints=1), toy(), str(tmp_path))
    stop_at(first.objective, 4, Stop())
    with pytest.raises(Stop):
        first.train(resume=back)
    assert first.objective.iterations == [2, 3]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        *("00000004", "abandoned-00000004-0", "abandoned-00000006-0", "resumed_from")
    }
    second = Trainer(config, toy(), str(tmp_path))
    second.train(resume=back)
    assert second.objective.iterations == [4, 5]


def test_what_a_resumed_run_does_differently_is_said(tmp_path, toy, make_config, capsys):
    def notes(**changes) -> list[str]:
        Trainer(make_config(**changes), toy(), str(tmp_path)).train()
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]

    assert notes(max_iterations=2, decay="constant") == []
    assert notes(max_iterations=4, decay="constant", sample_every=0) == []  # just so much more of the same
    assert notes(max_iterations=3, decay="constant") == ["note: this is beyond train.max_iterations=3"]
    assert notes(max_iterations=4, learning_rate=0.5, decay="constant") == [
        "note: train.learning_rate changes from 0.001 to 0.5"
    ]
    shutil.rmtree(tmp_path / "checkpoints")
    assert notes(max_iterations=2, total_batch_size=2) == []
    assert notes(max_iterations=4, total_batch_size=4) == [  # a cosine is another one if it ends elsewhere
        "note: train.max_iterations changes from 2 to 4",
        "note: train.total_batch_size changes from 2 to 4, which also moves the position in the data",
    ]


def test_another_objective_does_not_go_on(tmp_path, toy, make_config):
    Trainer(make_config(max_iterations=2), toy(), str(tmp_path)).train()
    other = make_config(max_iterations=4, objective="flow_matching")
    with pytest.raises(UserError, match=r"train\.objective=.*not flow_matching; choose another --logdir"):
        Trainer(other, toy(), str(tmp_path)).train()


def test_a_folder_that_cannot_be_exported_to_is_noticed_at_once(tmp_path, toy, make_config):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        Trainer(make_config(output=str(tmp_path / "file")), toy(), str(tmp_path / "log"))


def test_batches_stay_as_large_on_another_number_of_processes(tmp_path, toy, make_config, monkeypatch):
    config = make_config(max_iterations=2, total_batch_size=8)
    Trainer(config, toy(), str(tmp_path)).train()
    again = Trainer(make_config(max_iterations=3), toy(), str(tmp_path))  # no size: two clips for the one process
    again.train()
    assert again.num_micro_batches == 4 and again.objective.iterations == [2] * 4


@pytest.mark.parametrize("broken", ["a part cut off", "a part overwritten", "the index"])
def test_a_broken_checkpoint_names_the_one_before_it(tmp_path, toy, make_config, broken):
    Trainer(make_config(max_iterations=4, decay="constant"), toy(), str(tmp_path)).train()
    first, last = (tmp_path / "checkpoints/00000002", tmp_path / "checkpoints/00000004")
    [part] = last.glob("*.distcp")
    if broken == "the index":
        (last / ".metadata").write_bytes(b"garbage")
    else:
        content = part.read_bytes()
        part.write_bytes(content[:100] if broken == "a part cut off" else b"\xff" * len(content))
    with pytest.raises(UserError, match=f"00000004 is broken, or not a checkpoint of train.py .*{first}"):
        read_tensors(last, "nets/")
    again = make_config(decay="constant")
    with pytest.raises(UserError, match=f"or resume from the previous checkpoint with --resume {first}"):
        Trainer(again, toy(), str(tmp_path)).train()
    run = Trainer(again, toy(), str(tmp_path))
    run.train(resume=first)
    assert run.objective.iterations == [2, 3, 4, 5]


@pytest.mark.parametrize("folder", ["", "checkpoints"])
def test_a_folder_of_checkpoints_is_none(tmp_path, toy, make_config, folder):
    Trainer(make_config(max_iterations=2), toy(), str(tmp_path)).train()
    with pytest.raises(UserError, match="is not a checkpoint; give auto or a folder such as"):
        Trainer(make_config(), toy(), str(tmp_path / "other")).train(resume=tmp_path / folder)


def test_a_given_checkpoint_can_be_resumed_from(tmp_path, toy, make_config):
    whole = Trainer(make_config(keep_checkpoints=9), toy(), str(tmp_path / "one"))
    whole.train()
    [first, *_] = whole.checkpoints.saved()
    other = Trainer(make_config(), toy(), str(tmp_path / "other"))
    other.train(resume=first)
    assert other.objective.iterations == [2, 3, 4, 5]
    assert_same(state_of(other), state_of(whole))


# ---- W&B ----


def test_wandb_offline_holds_every_metric_and_sample(tmp_path, toy, make_config, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")  # whatever happens, nothing leaves this machine
    logged = []
    start = wandb.init

    def init(**words):
        run = start(**words)
        log = run.log
        monkeypatch.setattr(run, "log", lambda metrics, step: (logged.append((step, metrics)), log(metrics, step=step)))
        return run

    monkeypatch.setattr(wandb, "init", init)
    config = make_config(wandb="offline", wandb_dir=str(tmp_path / "elsewhere"), sample_every=4)
    objective = toy()

    def sample(folder: Path) -> None:
        folder.mkdir(parents=True)
        with VideoWriter(folder / "a red circle-0.mp4") as video:
            video.write(np.zeros((5, 32, 32, 3), np.uint8))

    objective.sample = sample
    Trainer(config, objective, str(tmp_path / "run")).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    metrics = [{"iteration": step, **values} for step, values in logged if "loss" in values]
    assert metrics == lines and len(lines) == 6
    assert [(step, list(values)) for step, values in logged if "loss" not in values] == [
        (4, ["samples/a red circle-0"])
    ]
    [run] = (tmp_path / "elsewhere").glob("wandb/offline-run-*")
    [video] = run.glob("files/media/videos/samples/*.mp4")
    assert video.read_bytes() == (tmp_path / "run/samples/00000004/a red circle-0.mp4").read_bytes()
    assert next(run.glob("run-*.wandb")).stat().st_size > 0


def test_a_run_that_goes_on_is_one_run_to_wandb(tmp_path, toy, make_config, monkeypatch):
    wandb = pytest.importorskip("wandb")
    asked = []

    def init(**words):
        asked.append((words["id"], words["resume"]))
        raise wandb.Error("no network")

    monkeypatch.setattr(wandb, "init", init)
    for name in ("one", "one", "other"):
        with pytest.raises(UserError):
            Trainer(make_config(wandb="online"), toy(), str(tmp_path / name)).train()
    assert asked[0] == asked[1] != asked[2] and asked[0][1] == "allow"


def test_wandb_that_cannot_start_is_one_line(tmp_path, toy, make_config, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**_):
        raise wandb.Error("no network")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=r"W&B cannot start \(no network\); train.wandb=offline"):
        Trainer(make_config(wandb="online"), toy(), str(tmp_path)).train()


# ---- Batches in parts ----


def test_parts_add_up_to_the_mean_over_the_whole_batch(tmp_path, toy, make_config):
    run = Trainer(make_config(batch_size=2, total_batch_size=6), toy(), str(tmp_path))
    metrics = run.accumulate("net")
    gradients = {name: p.grad.clone() for name, p in run.objective.net.named_parameters()}
    reference = toy()
    losses = [reference.loss(0, part)[0] for part in range(3)]
    torch.stack(losses).mean().backward()
    for name, parameter in reference.net.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    assert metrics["loss"] == pytest.approx(torch.stack(losses).mean().item())


def test_every_process_takes_its_own_parts_of_the_same_batch(monkeypatch):
    config = TrainConfig(batch_size=2, total_batch_size=12)
    assert list(local_micro_batches(config)) == [0, 1, 2, 3, 4, 5]
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        parts += local_micro_batches(config)
        assert list(local_micro_batches(TrainConfig(batch_size=2))) == [rank]  # without a total: batch_size each
    assert parts == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("total", [2, 6])
def test_a_batch_that_does_not_divide_is_refused(monkeypatch, total):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="must be a multiple of"):
        local_micro_batches(TrainConfig(batch_size=2, total_batch_size=total))


# ---- What can go wrong ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path, toy, make_config, value):
    run = Trainer(make_config(), toy(), str(tmp_path))
    loss = run.objective.loss
    run.objective.loss = lambda number, part: (loss(number, part)[0] * (value if number == 4 else 1), {})
    with pytest.raises(
        UserError, match=rf"iteration 4: loss is {value}.*; the last good checkpoint is .*00000004; resume"
    ):
        run.train()
    saved = read_tensors(run.checkpoints.saved()[-1], "nets/net/")
    assert all(weight.isfinite().all() for weight in saved.values())
    parameters = dict(run.objective.net.named_parameters())
    assert_same({name: saved[name] for name in parameters}, parameters)  # no step was taken on the bad gradient


def test_a_gradient_out_of_all_proportion_ends_the_run(tmp_path, toy, make_config):
    run = Trainer(make_config(stop_grad_norm=1000.0), toy(), str(tmp_path))
    loss = run.objective.loss
    run.objective.loss = lambda number, part: (loss(number, part)[0] * (1e6 if number == 2 else 1), {})
    with pytest.raises(
        UserError, match=r"iteration 2: the gradient norm of the net is .*; the last good checkpoint is"
    ):
        run.train()


def test_a_loss_out_of_all_proportion_ends_the_run(tmp_path, toy, make_config):
    """However small its gradient."""

    def run(factor: float) -> Trainer:
        result = Trainer(make_config(max_iterations=30, log_every=30), toy(), str(tmp_path / str(factor)))
        loss = result.objective.loss

        def growing(number: int, part: int):
            value = loss(number, part)[0]
            return value + value.detach() * (factor - 1 if number == 25 else 0), {}

        result.objective.loss = growing
        return result

    run(900.0).train()
    bad = run(1e5)
    with pytest.raises(
        UserError,
        match=r"iteration 25: loss is .*, and its recent median is .*; the last good checkpoint is .*00000024",
    ):
        bad.train()


def test_a_ruined_state_takes_no_good_ones_place(tmp_path, toy, make_config):
    run = Trainer(make_config(), toy(), str(tmp_path))
    loss = run.objective.loss

    def ruining(number: int, part: int):
        if number == 3:
            run.ema.weights["0.bias"][1] = math.nan
        return loss(number, part)

    run.objective.loss = ruining
    with pytest.raises(
        UserError, match=r"iteration 4: ema/0\.bias is not finite; the last good checkpoint is .*00000002"
    ):
        run.train()


def test_a_bad_gradient_norm_comes_with_its_shares(tmp_path, toy, make_config):
    run = Trainer(make_config(stop_grad_norm=1e-9), toy(), str(tmp_path))
    loss = run.objective.loss
    run.objective.loss = lambda *words: (loss(*words)[0], {"one_output_gradient": 2.0, "other_output_gradient": 3.0})
    with pytest.raises(UserError, match=r"norm of the net is .* \(one_output_gradient 2, other_output_gradient 3\);"):
        run.train()


def test_missing_sample_prompts_are_noticed_at_once(tmp_path, toy, make_config):
    with pytest.raises(UserError, match="nowhere"):
        Trainer(make_config(sample_every=500, sample_prompts=str(tmp_path / "nowhere.txt")), toy(), str(tmp_path))


def test_a_checkpoint_of_another_network_or_optimizer_is_refused(tmp_path, toy, make_config):
    Trainer(make_config(), toy(), str(tmp_path)).train()
    with pytest.raises(UserError, match=r"does not fit this configuration.*choose another --logdir"):
        Trainer(make_config(), toy(width=7), str(tmp_path)).train()
    with pytest.raises(UserError, match="does not fit"):
        Trainer(make_config(optimizer="muon"), toy(), str(tmp_path)).train()


# ---- Rates, optimizers, EMA, metrics ----


def test_learning_rate_rises_then_falls_to_a_twentieth():
    config = TrainConfig(max_iterations=110, warmup=10)
    scales = [learning_rate_scale(i, config) for i in range(110)]
    assert scales[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert scales[10] == 1 and scales[60] == pytest.approx(0.525)
    assert sorted(scales[10:], reverse=True) == scales[10:]
    assert learning_rate_scale(110, config) == pytest.approx(0.05) == learning_rate_scale(500, config)
    assert learning_rate_scale(0, TrainConfig(max_iterations=1, warmup=0)) == 1


def test_the_rate_reaches_every_optimizer(tmp_path, toy, make_config):
    run = Trainer(make_config(optimizer="muon", warmup=4), toy(), str(tmp_path))
    run.step()
    assert [o.param_groups[0]["lr"] for o in run.optimizers["net"]] == pytest.approx([1e-3 / 4, 5e-3 / 4])


def test_muon_takes_the_inner_matrices_and_adamw_the_rest(make_net):
    net = make_net()
    adamw, muon = build_optimizers(net, TrainConfig(optimizer="muon"), 1e-3)
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, Muon)
    names = {id(p): name for name, p in net.named_parameters()}
    inner = {names[id(p)] for p in muon.param_groups[0]["params"]}
    others = {names[id(p)] for p in adamw.param_groups[0]["params"]}
    assert inner | others == set(names.values()) and not inner & others
    assert "blocks.0.attn1.to_q.weight" in inner and "blocks.2.ffn.net.2.weight" in inner
    assert all(name.startswith("blocks.") and name.endswith(".weight") for name in inner)
    for name in ("patch_embedding.weight", "proj_out.weight", "blocks.0.scale_shift_table", "blocks.1.norm2.weight"):
        assert name in others
    [only] = build_optimizers(net, TrainConfig(), 1e-3)
    assert len(only.param_groups[0]["params"]) == len(names)


def test_frozen_parameters_are_left_out():
    net = nn.Linear(3, 3).requires_grad_(False)
    net.bias.requires_grad_(True)
    [only] = build_optimizers(net, TrainConfig(optimizer="muon"), 1e-3)
    assert [p.shape for p in only.param_groups[0]["params"]] == [(3,)]


@pytest.mark.parametrize(
    ("name", "shape", "inner"),
    [
        ("encoder.down_blocks.0.conv1.weight", (8, 8, 3, 3, 3), True),
        ("encoder.conv_in.weight", (8, 12, 3, 3, 3), False),
        ("decoder.conv_out.weight", (12, 8, 3, 3, 3), False),
        ("encoder.mid_block.attentions.0.norm.gamma", (8, 1, 1), False),
        ("heads.color.weight", (6, 16), False),
        ("shared.weight", (384, 16), False),
        ("blocks.0.attn1.to_q.bias", (8,), False),
    ],
)
def test_what_counts_as_an_inner_matrix(name, shape, inner):
    assert is_inner_matrix(name, nn.Parameter(torch.zeros(shape))) == inner


def test_ema_follows_by_hand(tmp_path, toy, make_config):
    run = Trainer(make_config(ema_decay=0.15), toy(), str(tmp_path))
    expected = run.objective.net[0].weight.detach().clone()
    for decay in (1 / 10, 0.15, 0.15):  # the run's own memory is shorter at first: (1 + i) / (10 + i)
        run.step()
        run.iteration += 1
        expected = decay * expected + (1 - decay) * run.objective.net[0].weight.detach()
    torch.testing.assert_close(run.ema.weights["0.weight"], expected)
    assert run.ema.weights["3.calls"] == 3  # what is no average is copied


def test_ema_that_starts_later_is_the_weights_and_then_has_its_decay(tmp_path, toy, make_config):
    run = Trainer(make_config(ema_decay=0.9, ema_start=2), toy(), str(tmp_path))
    expected = torch.empty(0)
    for iteration in range(5):
        run.step()
        run.iteration += 1
        weight = run.objective.net[0].weight.detach()
        expected = weight.clone() if iteration <= 2 else 0.9 * expected + 0.1 * weight
        torch.testing.assert_close(run.ema.weights["0.weight"], expected)


def test_metrics_are_means_since_the_last_line(tmp_path, toy, make_config):
    Trainer(make_config(log_every=4), toy(), str(tmp_path)).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [4, 6]
    assert [line["twice"] for line in lines] == [2 * (0 + 1 + 2 + 3) / 4, 2 * (4 + 5) / 2]
    assert {"loss", "grad_norm", "rate_scale"} <= lines[0].keys()


def test_without_a_limit_it_is_not(tmp_path, toy, make_config):
    run = Trainer(make_config(grad_clip=0.0), toy(), str(tmp_path))
    seen = []
    run.optimizers["net"][0].register_step_pre_hook(
        lambda *_: seen.append(torch.stack([p.grad.norm() for p in run.objective.net.parameters()]).norm().item())
    )
    assert run.step()["grad_norm"] == pytest.approx(seen[0]) and seen[0] > 0


def test_the_gradient_is_clipped(tmp_path, toy, make_config):
    run = Trainer(make_config(grad_clip=1e-3), toy(), str(tmp_path))
    seen = []
    run.optimizers["net"][0].register_step_pre_hook(
        lambda *_: seen.append(torch.stack([p.grad.norm() for p in run.objective.net.parameters()]).norm().item())
    )
    assert run.step()["grad_norm"] > 1e-3
    assert seen == [pytest.approx(1e-3, rel=1e-3)]
