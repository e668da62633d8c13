"""Directions, windows, prototypes and sparse heads against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from remanence.nn.concepts import activation_vector, peaks, prototypes, sparse_head


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_vector_points_from_the_others_to_the_class():
    f = torch.randn(300, 6, generator=rng(), dtype=torch.float64)
    inside = torch.arange(300) < 90
    f[inside, 2] += 5
    v = activation_vector(f, inside, rng())
    assert abs(float(v.norm()) - 1) < 1e-12 and v[2] > 0.95
    torch.testing.assert_close(
        activation_vector(f, ~inside, rng()) @ v, torch.tensor(-1.0, dtype=torch.float64), atol=0.02, rtol=0
    )
    assert not activation_vector(f, inside & False, rng()).any()


def test_the_peak_is_the_window_that_the_concept_sees():
    model = nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(16, 2))
    images, blank = torch.rand(5, 1, 4, 4, generator=rng()) + 1, torch.zeros(1, 4, 4)
    windows = [(slice(None), slice(a, a + 2), slice(b, b + 2)) for a in (0, 2) for b in (0, 2)]
    concept = torch.zeros(1, 4, 4, dtype=torch.float64)
    concept[0, 2:, :2] = 1
    assert peaks(model, images, concept.flatten(), blank, windows, (1, 4, 4)) == [2] * 5
    assert peaks(model, images, -concept.flatten(), blank, windows, (1, 4, 4)) != [2] * 5


def test_prototypes():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 5)).train()
    x, y = torch.randn(20, 3, generator=rng()), torch.randint(3, (20,), generator=rng()) * 2
    found = prototypes(model, [{"x": x[:7], "y": y[:7]}, {"x": x[7:], "y": y[7:]}], 5)
    for c in (0, 2, 4):
        torch.testing.assert_close(found[c], model[0](x[y == c]).mean(0).detach())
    assert not found[[1, 3]].any() and all(module.training for module in model.modules())


@pytest.mark.parametrize("sparsity", [0.003, 0.03])
def test_a_sparse_head_is_the_minimum(sparsity):
    """Where an entry is not 0 the slope of the whole is 0; where it is 0, the loss pulls less than the lasso holds."""
    scores = torch.randn(200, 5, generator=rng(), dtype=torch.float64)
    y = (scores[:, :3] + 0.3 * torch.randn(200, 3, generator=rng(1), dtype=torch.float64)).argmax(1)
    w = sparse_head(scores, y, torch.zeros(3, 5, dtype=torch.float64), sparsity)
    assert 0 < int((w == 0).sum()) < 15
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    best = torch.optim.LBFGS([bias], max_iter=100, tolerance_grad=1e-12)

    def loss():
        best.zero_grad()
        value = nn.functional.cross_entropy(scores @ w.T + bias, y)
        value.backward()
        return value

    best.step(loss)
    slope = (
        torch.func.grad(lambda w: nn.functional.cross_entropy(scores @ w.T + bias.detach(), y))(w) + 0.01 * sparsity * w
    )
    kept = w != 0
    torch.testing.assert_close(slope[kept], -0.99 * sparsity * w[kept].sign(), atol=1e-6, rtol=0)
    assert (slope[~kept].abs() <= 0.99 * sparsity + 1e-6).all()


def test_a_heavy_net_leaves_nothing():
    scores, y = torch.randn(50, 4, generator=rng(), dtype=torch.float64), torch.arange(50) % 3
    assert not sparse_head(scores, y, torch.randn(3, 4, generator=rng(), dtype=torch.float64), 10.0).any()
