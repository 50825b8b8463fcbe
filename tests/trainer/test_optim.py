"""trainer/optim.py: updates are nearly orthogonal, convolutions count as matrices, and the state survives."""

import copy

import pytest
import torch
from torch import nn

from trainer.optim import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (1, 8), (8, 1)])
def test_orthogonalise_against_the_svd(shape):
    """The same singular vectors, with singular values near one instead of their own."""
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    if min(shape) == 24:  # a square random matrix has singular values near zero, which stay small: spread them evenly
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


def test_first_step_by_hand():
    """Momentum starts at the gradient g, so Nesterov's direction is 1.95 g; tall matrices take longer steps."""
    weight = nn.Parameter(torch.randn(8, 2, 1, 2, generator=torch.Generator().manual_seed(2)))
    before, gradient = weight.detach().clone(), torch.randn(8, 2, 1, 2, generator=torch.Generator().manual_seed(3))
    weight.grad = gradient.clone()
    Muon([weight], lr=0.1, momentum=0.95, weight_decay=0.5).step()
    update = orthogonalise((1.95 * gradient).flatten(1)).view(8, 2, 1, 2)
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 0.5) - 0.1 * (8 / 4) ** 0.5 * update)
    assert torch.equal(weight.grad, gradient)


def test_parameters_without_a_gradient_stay():
    weight = nn.Parameter(torch.ones(3, 3))
    Muon([weight], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(weight.detach(), torch.ones(3, 3))


def test_state_dict_round_trip(tmp_path):
    """Saved and loaded in the middle, the optimizer goes on with the same bits."""

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


def test_it_descends():
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
