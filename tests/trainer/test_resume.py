"""Resuming and checkpoints: an interrupted run ends with the same bits as an uninterrupted one."""

import shutil
import signal
import threading

import pytest
import torch
from torch.distributed import checkpoint as dcp
from toy import Killed, assert_same_bits, change_loss, state_of

from trainer.checkpoints import read_tensors
from trainer.objectives.flow_matching import FlowMatching
from trainer.trainer import Trainer
from utils.errors import UserError


def names(run: Trainer) -> list[str]:
    """Return the names of the complete checkpoints."""
    return [path.name for path in run.checkpoints.saved()]


# ---- Killed and stopped runs ----


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, toy, make_config, optimizer, stop):
    config = make_config(optimizer=optimizer, output=str(tmp_path / "weights"))
    whole = Trainer(config, toy(), str(tmp_path / "whole"))
    whole.train()
    assert whole.objective.iterations == [0, 1, 2, 3, 4, 5]

    first = Trainer(config, toy(), str(tmp_path / "killed"))
    change_loss(first.objective, stop, error=Killed())
    with pytest.raises(Killed):
        first.train()
    second = Trainer(config, toy(), str(tmp_path / "killed"))
    second.train()
    assert second.objective.iterations[0] == stop // 2 * 2  # the last multiple of checkpoint_every
    assert_same_bits(state_of(second), state_of(whole))
    assert_same_bits(second.objective.exported[1], whole.objective.exported[1])
    assert (tmp_path / "killed/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    files = sorted(file.name for file in (tmp_path / "killed").iterdir())
    assert files == [".lock", "checkpoints", "config.yaml", "metrics.jsonl"]
    assert names(second) == ["00000004", "00000006"]


def test_flow_matching_resumes_bit_for_bit(tmp_path, make_config, clips, tiny_presets):
    config = make_config(clips, optimizer="muon", max_iterations=4, text_dropout=0.5)

    def trainer(name: str) -> Trainer:
        return Trainer(config, FlowMatching(config, torch.device("cpu")), str(tmp_path / name))

    whole, first = trainer("whole"), trainer("killed")
    whole.train()
    change_loss(first.objective, 3, error=Killed())
    with pytest.raises(Killed):
        first.train()
    second = trainer("killed")
    second.train()
    assert_same_bits(state_of(second), state_of(whole))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_saves_after_the_iteration(tmp_path, toy, make_config, stop):
    """In this test the signal arrives between the steps of two optimizers."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    config = make_config(checkpoint_every=100, optimizer="muon")
    whole = Trainer(config, toy(), str(tmp_path / "whole"))
    whole.train()
    first = Trainer(config, toy(), str(tmp_path / "stopped"))
    first.optimizers["net"][0].register_step_post_hook(
        lambda *_: signal.raise_signal(stop) if first.iteration == 1 else None
    )
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = Trainer(config, toy(), str(tmp_path / "stopped"))
    second.train()
    assert second.objective.iterations == [3, 4, 5]
    assert_same_bits(state_of(second), state_of(whole))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_ctrl_c_stops_at_once_and_saves_nothing(tmp_path, toy, make_config):
    run = Trainer(make_config(checkpoint_every=2, optimizer="muon"), toy(), str(tmp_path))

    def press_twice(*_) -> None:
        if run.iteration == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    run.optimizers["net"][0].register_step_post_hook(press_twice)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert names(run) == ["00000002"]


def test_a_finished_run_exports_again_without_training(tmp_path, toy, make_config):
    config = make_config(output=str(tmp_path / "weights"))
    runs = [Trainer(config, toy(), str(tmp_path / "log")) for _ in range(2)]
    for run in runs:
        run.train()
    assert runs[1].objective.iterations == []
    assert_same_bits(runs[1].objective.exported[1], runs[0].objective.exported[1])
    assert runs[0].objective.exported[0] == tmp_path / "weights"


# ---- Writing checkpoints ----


def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path, toy, make_config, monkeypatch):
    run = Trainer(make_config(), toy(), str(tmp_path))
    run.train()
    before = run.checkpoints.saved()[-1]
    content = read_tensors(before, "")

    def disk_is_full(self, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", disk_is_full)
    run.iteration += 1
    run.save()
    with pytest.raises(UserError, match=r"iteration 7 .*No space left on device.*the last checkpoint is .*00000006"):
        run.checkpoints.finish()
    assert sorted(path.name for path in run.checkpoints.folder.iterdir()) == ["00000004", "00000006"]
    assert run.checkpoints.saved()[-1] == before
    assert_same_bits(read_tensors(before, ""), content)
    monkeypatch.undo()
    again = Trainer(make_config(), toy(), str(tmp_path))
    again.train()
    assert sorted(path.name for path in again.checkpoints.folder.iterdir()) == ["00000004", "00000006"]


def test_a_checkpoint_holds_the_state_of_the_moment_of_saving(tmp_path, toy, make_config, monkeypatch):
    """Training changes the tensors while the checkpoint is written in the background; here the writer waits for it."""
    changed = threading.Event()
    write_data = dcp.FileSystemWriter.write_data

    def late_write_data(*arguments):
        assert changed.wait(60)
        return write_data(*arguments)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", late_write_data)
    run = Trainer(make_config(), toy(), str(tmp_path))
    run.step()
    expected = state_of(run)
    run.save()
    for tensor in run.state().values():
        tensor.detach().zero_()
    changed.set()
    run.checkpoints.finish()
    assert_same_bits(read_tensors(run.checkpoints.saved()[-1], ""), expected)


def test_a_checkpoint_gets_its_name_as_soon_as_it_is_written(tmp_path, toy, make_config):
    """So a kill long before the next save does not lose the checkpoint."""
    run = Trainer(make_config(max_iterations=9, checkpoint_every=4), toy(), str(tmp_path))
    loss, seen = run.objective.loss, []

    def slow_loss(number: int, micro_batch: int):
        if number == 5 and run.checkpoints._pending is not None:  # saved after 4: let the background thread finish
            run.checkpoints._pending[0].result()
        seen.append(names(run))
        return loss(number, micro_batch)

    run.objective.loss = slow_loss
    run.train()
    assert seen[6] == ["00000004"]


def test_a_complete_checkpoint_without_its_name_is_found(tmp_path, toy, make_config):
    """A kill between the last write and the renaming leaves such a checkpoint. Incomplete checkpoints are deleted."""
    Trainer(make_config(max_iterations=4), toy(), str(tmp_path)).train()
    folder = tmp_path / "checkpoints"
    (folder / "00000004").rename(folder / ".00000004.partial")
    shutil.copytree(folder / "00000002", folder / ".00000006.partial", ignore=shutil.ignore_patterns(".metadata"))
    again = Trainer(make_config(), toy(), str(tmp_path))
    again.train()
    assert again.objective.iterations == [4, 5]
    assert not list(folder.glob(".*.partial"))


def test_a_checkpoint_is_not_written_through_a_link(tmp_path, toy, make_config):
    """A link at the name of a partial checkpoint, planted by another user."""
    valuable, folder = tmp_path / "valuable", tmp_path / "log" / "checkpoints"
    valuable.mkdir()
    folder.mkdir(parents=True)
    (folder / ".00000002.partial").symlink_to(valuable)
    run = Trainer(make_config(max_iterations=2), toy(), str(tmp_path / "log"))
    run.train()
    assert names(run) == ["00000002"] and not (folder / "00000002").is_symlink()
    assert list(valuable.iterdir()) == []


# ---- --resume PATH ----


def test_a_run_started_from_another_one_resumes_by_the_same_command(tmp_path, toy, make_config):
    other = Trainer(make_config(keep_checkpoints=9), toy(), str(tmp_path / "other"))
    other.train()
    start = other.checkpoints.saved()[0]
    first = Trainer(make_config(), toy(), str(tmp_path / "log"))
    change_loss(first.objective, 5, error=Killed())
    with pytest.raises(Killed):
        first.train(resume=start)
    assert first.objective.iterations == [2, 3, 4]
    shutil.rmtree(start)  # the other run may have deleted it by then
    second = Trainer(make_config(), toy(), str(tmp_path / "log"))
    second.train(resume=start)
    assert second.objective.iterations == [4, 5]
    assert_same_bits(state_of(second), state_of(other))
    with pytest.raises(UserError, match="already has checkpoints; leave out --resume"):
        Trainer(make_config(), toy(), str(tmp_path / "log")).train(resume=other.checkpoints.saved()[0])
    with pytest.raises(UserError, match="is not a checkpoint"):
        Trainer(make_config(), toy(), str(tmp_path / "new")).train(resume=start)


def test_going_back_renames_the_later_checkpoints(tmp_path, toy, make_config):
    config = make_config(keep_checkpoints=3)
    Trainer(config, toy(), str(tmp_path)).train()
    back = tmp_path / "checkpoints/00000002"
    first = Trainer(make_config(keep_checkpoints=1), toy(), str(tmp_path))
    change_loss(first.objective, 4, error=Killed())
    with pytest.raises(Killed):
        first.train(resume=back)
    assert first.objective.iterations == [2, 3]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        *("00000004", "abandoned-00000004-0", "abandoned-00000006-0", "resumed_from")
    }
    second = Trainer(config, toy(), str(tmp_path))
    second.train(resume=back)
    assert second.objective.iterations == [4, 5]


@pytest.mark.parametrize("folder", ["", "checkpoints"])
def test_a_folder_of_checkpoints_is_not_a_checkpoint(tmp_path, toy, make_config, folder):
    Trainer(make_config(max_iterations=2), toy(), str(tmp_path)).train()
    with pytest.raises(UserError, match="is not a checkpoint; give auto or a folder such as"):
        Trainer(make_config(), toy(), str(tmp_path / "other")).train(resume=tmp_path / folder)


# ---- Changed and broken runs ----


def test_changed_keys_are_printed(tmp_path, toy, make_config, capsys):
    def notes(**changes) -> list[str]:
        Trainer(make_config(**changes), toy(), str(tmp_path)).train()
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]

    assert notes(max_iterations=2, decay="constant") == []
    assert notes(max_iterations=4, decay="constant", sample_every=0) == []  # a longer run of the same kind
    assert notes(max_iterations=3, decay="constant") == ["note: the checkpoint is beyond train.max_iterations=3"]
    assert notes(max_iterations=4, learning_rate=0.5, decay="constant") == [
        "note: train.learning_rate changes from 0.001 to 0.5"
    ]
    shutil.rmtree(tmp_path / "checkpoints")
    assert notes(max_iterations=2, total_batch_size=2) == []
    assert notes(max_iterations=4, total_batch_size=4) == [  # another end changes the whole cosine
        "note: train.max_iterations changes from 2 to 4",
        "note: train.total_batch_size changes from 2 to 4, which also moves the position in the data",
    ]


def test_a_checkpoint_of_another_objective_is_refused(tmp_path, toy, make_config):
    Trainer(make_config(max_iterations=2), toy(), str(tmp_path)).train()
    other = make_config(max_iterations=4, objective="flow_matching")
    with pytest.raises(UserError, match=r"train\.objective=.*not flow_matching; choose another --logdir"):
        Trainer(other, toy(), str(tmp_path)).train()


def test_a_checkpoint_of_another_network_or_optimizer_is_refused(tmp_path, toy, make_config):
    Trainer(make_config(max_iterations=2), toy(), str(tmp_path)).train()
    with pytest.raises(UserError, match=r"does not fit this configuration.*choose another --logdir"):
        Trainer(make_config(), toy(width=7), str(tmp_path)).train()
    with pytest.raises(UserError, match="does not fit"):
        Trainer(make_config(optimizer="muon"), toy(), str(tmp_path)).train()


def test_the_batch_size_is_kept_for_another_world_size(tmp_path, toy, make_config):
    config = make_config(max_iterations=2, total_batch_size=8)
    Trainer(config, toy(), str(tmp_path)).train()
    again = Trainer(make_config(max_iterations=3), toy(), str(tmp_path))  # alone it would mean two clips
    again.train()
    assert again.num_micro_batches == 4 and again.objective.iterations == [2] * 4


@pytest.mark.parametrize("broken", ["a shard cut off", "a shard overwritten", "the metadata"])
def test_an_error_for_a_broken_checkpoint_names_the_previous_one(tmp_path, toy, make_config, broken):
    Trainer(make_config(max_iterations=4, decay="constant"), toy(), str(tmp_path)).train()
    first, last = (tmp_path / "checkpoints/00000002", tmp_path / "checkpoints/00000004")
    [shard] = last.glob("*.distcp")
    if broken == "the metadata":
        (last / ".metadata").write_bytes(b"garbage")
    else:
        content = shard.read_bytes()
        shard.write_bytes(content[:100] if broken == "a shard cut off" else b"\xff" * len(content))
    with pytest.raises(UserError, match=f"00000004 is broken, or not a checkpoint of train.py .*{first}"):
        read_tensors(last, "nets/")
    again = make_config(decay="constant")
    with pytest.raises(UserError, match=f"or resume from the previous checkpoint with --resume {first}"):
        Trainer(again, toy(), str(tmp_path)).train()
    run = Trainer(again, toy(), str(tmp_path))
    run.train(resume=first)
    assert run.objective.iterations == [2, 3, 4, 5]


def test_a_checkpoint_with_nan_is_not_resumed(tmp_path, toy, make_config, monkeypatch):
    run = Trainer(make_config(max_iterations=2), toy(), str(tmp_path))
    monkeypatch.setattr(run, "_not_finite", lambda state: "")
    run.step()
    run.ema.weights["0.bias"][1] = float("nan")
    run.save()
    run.checkpoints.finish()
    with pytest.raises(UserError, match=r"checkpoints/\d+ is damaged: ema/0\.bias is not finite; delete it"):
        Trainer(make_config(max_iterations=2), toy(), str(tmp_path)).train()
