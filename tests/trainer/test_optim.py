"""trainer/optim.py: Muon, the choice of optimizers, and the learning-rate schedule."""

import copy

import pytest
import torch
from torch import nn

from trainer.optim import Muon, build_optimizers, is_inner_matrix, learning_rate_scale, orthogonalise
from utils.config import TrainConfig

# ---- Muon ----


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (1, 8), (8, 1)])
def test_orthogonalise_against_the_svd(shape):
    """The singular vectors stay, and the singular values become nearly one."""
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    if min(shape) == 24:  # a random square matrix has singular values near zero, which would stay small
        matrix = u @ torch.diag(torch.linspace(1, 10, 24)) @ vt
    found = orthogonalise(matrix)
    assert found.shape == matrix.shape and found.dtype == torch.float32
    inner = u.T @ found @ vt.T
    assert torch.all((inner.diagonal() > 0.65) & (inner.diagonal() < 1.25)), inner.diagonal()
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-4


def test_orthogonalise_ignores_scale_and_survives_zero():
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalise(1000 * matrix), orthogonalise(matrix), atol=1e-4, rtol=1e-4)
    assert torch.equal(orthogonalise(torch.zeros(4, 5)), torch.zeros(4, 5))


def test_the_first_step_by_hand():
    """Momentum starts at the gradient g, so Nesterov's direction is 1.95 g. Tall matrices take longer steps."""
    weight = nn.Parameter(torch.randn(8, 2, 1, 2, generator=torch.Generator().manual_seed(2)))
    before, gradient = weight.detach().clone(), torch.randn(8, 2, 1, 2, generator=torch.Generator().manual_seed(3))
    weight.grad = gradient.clone()
    Muon([weight], lr=0.1, momentum=0.95, weight_decay=0.5).step()
    update = orthogonalise((1.95 * gradient).flatten(1)).view(8, 2, 1, 2)
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 0.5) - 0.1 * (8 / 4) ** 0.5 * update)
    assert torch.equal(weight.grad, gradient)


def test_parameters_without_a_gradient_do_not_change():
    weight = nn.Parameter(torch.ones(3, 3))
    Muon([weight], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(weight.detach(), torch.ones(3, 3))


def test_a_loaded_state_continues_with_the_same_bits(tmp_path):
    def step(net: nn.Linear, optimizer: Muon, number: int) -> None:
        optimizer.zero_grad()
        net(torch.randn(4, 5, generator=torch.Generator().manual_seed(number))).square().sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    net = nn.Linear(5, 7, bias=False)
    optimizer = Muon(net.parameters(), lr=0.05, weight_decay=0.01)
    for number in range(3):
        step(net, optimizer, number)
    torch.save(optimizer.state_dict(), tmp_path / "muon.pt")
    other = copy.deepcopy(net)
    loaded = Muon(other.parameters(), lr=1.0)
    loaded.load_state_dict(torch.load(tmp_path / "muon.pt", weights_only=True))
    for number in range(3, 6):
        step(net, optimizer, number)
        step(other, loaded, number)
    assert torch.equal(net.weight, other.weight)


def test_muon_minimises_a_quadratic():
    torch.manual_seed(0)
    net, target = nn.Linear(12, 12, bias=False), torch.randn(12, 12)
    optimizer = Muon(net.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        loss = (net.weight - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]


# ---- Choice of optimizers, learning rate ----


def test_the_learning_rate_rises_then_falls_to_a_twentieth():
    config = TrainConfig(max_iterations=110, warmup=10)
    scales = [learning_rate_scale(i, config) for i in range(110)]
    assert scales[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert scales[10] == 1 and scales[60] == pytest.approx(0.525)
    assert sorted(scales[10:], reverse=True) == scales[10:]
    assert learning_rate_scale(110, config) == pytest.approx(0.05) == learning_rate_scale(500, config)
    assert learning_rate_scale(0, TrainConfig(max_iterations=1, warmup=0)) == 1


def test_a_constant_learning_rate_stays_after_the_warm_up():
    config = TrainConfig(max_iterations=110, warmup=4, decay="constant")
    assert [learning_rate_scale(i, config) for i in (0, 3, 4, 60, 109, 500)] == [0.25, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_muon_updates_the_inner_matrices_and_adamw_the_rest(make_net):
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


def test_optimizers_have_the_configured_rates_betas_and_weight_decay(make_net):
    config = TrainConfig(optimizer="muon", betas=[0.8, 0.95], weight_decay=0.3, muon_learning_rate=0.02)
    adamw, muon = (optimizer.param_groups[0] for optimizer in build_optimizers(make_net(), config, 1e-3))
    assert (adamw["lr"], adamw["peak"], adamw["betas"], adamw["weight_decay"]) == (1e-3, 1e-3, (0.8, 0.95), 0.3)
    assert (muon["lr"], muon["peak"], muon["weight_decay"], muon["momentum"]) == (0.02, 0.02, 0.3, 0.95)


def test_frozen_parameters_have_no_optimizer():
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
def test_inner_matrices(name, shape, inner):
    assert is_inner_matrix(name, nn.Parameter(torch.zeros(shape))) == inner
