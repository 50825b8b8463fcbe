"""trainer/trainer.py: batches, EMA and gradient clipping; a diverging run stops with one clear line."""

import math

import pytest
import torch
from toy import assert_same_bits, change_loss

from trainer.checkpoints import read_tensors
from trainer.networks import mixed_precision
from trainer.sharding import local_micro_batches
from trainer.trainer import Trainer
from utils.config import TrainConfig
from utils.errors import UserError


def test_mixed_precision_has_the_configured_type_on_every_device(make_config):
    """torch's default is float16 on a GPU and bfloat16 on a CPU."""
    default = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)
    try:
        with mixed_precision(make_config(dtype="bfloat16"), torch.device("cpu")):
            assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        with mixed_precision(make_config(dtype="float32"), torch.device("cpu")):
            assert not torch.is_autocast_enabled("cpu")
    finally:
        torch.set_autocast_dtype("cpu", default)


# ---- Micro-batches ----


def test_micro_batches_add_up_to_the_mean_over_the_batch(tmp_path, toy, make_config):
    run = Trainer(make_config(batch_size=2, total_batch_size=6), toy(), str(tmp_path))
    metrics = run.accumulate("net")
    gradients = {name: p.grad.clone() for name, p in run.objective.net.named_parameters()}
    reference = toy()
    losses = [reference.loss(0, micro_batch)[0] for micro_batch in range(3)]
    torch.stack(losses).mean().backward()
    for name, parameter in reference.net.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    assert metrics["loss"] == pytest.approx(torch.stack(losses).mean().item())


def test_the_ranks_divide_the_micro_batches(monkeypatch):
    config = TrainConfig(batch_size=2, total_batch_size=12)
    assert list(local_micro_batches(config)) == [0, 1, 2, 3, 4, 5]
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares += local_micro_batches(config)
        assert list(local_micro_batches(TrainConfig(batch_size=2))) == [rank]  # the default: one micro-batch per rank
    assert shares == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("total", [2, 6])
def test_a_batch_that_does_not_divide_is_refused(monkeypatch, total):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="must be a multiple of"):
        local_micro_batches(TrainConfig(batch_size=2, total_batch_size=total))


# ---- Errors before training ----


def test_an_unwritable_output_folder_is_reported_before_training(tmp_path, toy, make_config):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        Trainer(make_config(output=str(tmp_path / "file")), toy(), str(tmp_path / "log"))


def test_missing_sample_prompts_are_reported_before_training(tmp_path, toy, make_config):
    with pytest.raises(UserError, match="nowhere"):
        Trainer(make_config(sample_every=500, sample_prompts=str(tmp_path / "nowhere.txt")), toy(), str(tmp_path))


# ---- Divergence ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, toy, make_config, value):
    run = Trainer(make_config(), toy(), str(tmp_path))
    change_loss(run.objective, 4, factor=value)
    message = rf"iteration 4: loss is {value}.*; the last good checkpoint is .*00000004; resume with a lower"
    with pytest.raises(UserError, match=message):
        run.train()
    saved = read_tensors(run.checkpoints.saved()[-1], "nets/net/")
    assert all(weight.isfinite().all() for weight in saved.values())
    parameters = dict(run.objective.net.named_parameters())
    assert_same_bits({name: saved[name] for name in parameters}, parameters)  # the bad gradient was not applied


def test_a_huge_gradient_stops_the_run(tmp_path, toy, make_config):
    run = Trainer(make_config(stop_grad_norm=1000.0), toy(), str(tmp_path))
    change_loss(run.objective, 2, factor=1e6)
    with pytest.raises(UserError, match=r"iteration 2: the gradient norm of the net is .*; the last good checkpoint"):
        run.train()


def test_the_error_for_a_huge_gradient_lists_the_share_of_each_loss(tmp_path, toy, make_config):
    run = Trainer(make_config(stop_grad_norm=1e-9), toy(), str(tmp_path))
    loss = run.objective.loss
    shares = {"one_output_gradient": 2.0, "other_output_gradient": 3.0}
    run.objective.loss = lambda *arguments: (loss(*arguments)[0], shares)
    message = r"norm of the net is .* \(one_output_gradient 2, other_output_gradient 3\); no checkpoint was saved yet"
    with pytest.raises(UserError, match=message):
        run.train()


@pytest.mark.parametrize(("factor", "stops"), [(900.0, False), (1e5, True)])
def test_a_loss_far_above_its_median_stops_the_run(tmp_path, toy, make_config, factor, stops):
    """The run stops even if the gradient is small."""
    run = Trainer(make_config(max_iterations=26, log_every=30, checkpoint_every=24), toy(), str(tmp_path))
    loss = run.objective.loss

    def growing(number: int, micro_batch: int):
        value = loss(number, micro_batch)[0]
        return value + value.detach() * (factor - 1 if number == 25 else 0), {}

    run.objective.loss = growing
    if not stops:
        run.train()
        return
    message = r"iteration 25: loss is .*, and its recent median is .*; the last good checkpoint is .*00000024"
    with pytest.raises(UserError, match=message):
        run.train()


def test_a_state_that_is_not_finite_is_not_saved(tmp_path, toy, make_config):
    run = Trainer(make_config(), toy(), str(tmp_path))
    loss = run.objective.loss

    def damaging_loss(number: int, micro_batch: int):
        if number == 3:
            run.ema.weights["0.bias"][1] = math.nan
        return loss(number, micro_batch)

    run.objective.loss = damaging_loss
    message = r"iteration 4: ema/0\.bias is not finite; the last good checkpoint is .*00000002"
    with pytest.raises(UserError, match=message):
        run.train()


# ---- One iteration ----


def test_the_learning_rate_reaches_every_optimizer(tmp_path, toy, make_config):
    run = Trainer(make_config(optimizer="muon", warmup=4), toy(), str(tmp_path))
    run.step()
    assert [o.param_groups[0]["lr"] for o in run.optimizers["net"]] == pytest.approx([1e-3 / 4, 5e-3 / 4])


@pytest.mark.parametrize("limit", [0.0, 1e-3])
def test_the_gradient_is_clipped_to_the_limit(tmp_path, toy, make_config, limit):
    """A limit of 0 means no limit. The logged norm is the one before clipping."""
    run = Trainer(make_config(grad_clip=limit), toy(), str(tmp_path))
    applied = []
    run.optimizers["net"][0].register_step_pre_hook(
        lambda *_: applied.append(torch.stack([p.grad.norm() for p in run.objective.net.parameters()]).norm().item())
    )
    logged = run.step()["grad_norm"]
    assert logged > 1e-3
    assert applied == [pytest.approx(limit or logged, rel=1e-3)]


def test_the_ema_by_hand(tmp_path, toy, make_config):
    run = Trainer(make_config(ema_decay=0.15), toy(), str(tmp_path))
    expected = run.objective.net[0].weight.detach().clone()
    for decay in (1 / 10, 0.15, 0.15):  # (1 + i) / (10 + i), at most 0.15
        run.step()
        run.iteration += 1
        expected = decay * expected + (1 - decay) * run.objective.net[0].weight.detach()
    torch.testing.assert_close(run.ema.weights["0.weight"], expected)
    assert run.ema.weights["3.calls"] == 3  # an integer buffer is copied


def test_until_its_start_the_ema_equals_the_weights(tmp_path, toy, make_config):
    run = Trainer(make_config(ema_decay=0.9, ema_start=2), toy(), str(tmp_path))
    expected = torch.empty(0)
    for iteration in range(5):
        run.step()
        run.iteration += 1
        weight = run.objective.net[0].weight.detach()
        expected = weight.clone() if iteration <= 2 else 0.9 * expected + 0.1 * weight
        torch.testing.assert_close(run.ema.weights["0.weight"], expected)
