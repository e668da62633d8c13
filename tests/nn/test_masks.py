"""Exactly the asked share of entries, and not one bit of the others moves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput, NotFinite
from remanence.nn.masks import Restore, above_quantile, mask_gradients, top_entries, top_fraction, undo_masked


def scores(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(7, 5, generator=g),
        "b": torch.randn(11, generator=g),
        "c": torch.randn(2, 3, 4, generator=g),
    }


@pytest.mark.parametrize("rho", [0.0, 0.01, 0.1, 0.5, 0.999, 1.0])
def test_the_global_ranking(rho):
    given = scores()
    masks = top_fraction(given, rho)
    flat = torch.cat([v.flatten() for v in given.values()])
    chosen = torch.cat([m.flatten() for m in masks.values()])
    assert int(chosen.sum()) == int(rho * 70)
    assert all(masks[k].shape == v.shape and masks[k].dtype == torch.bool for k, v in given.items())
    if 0 < int(rho * 70) < 70:
        assert flat[chosen].min() > flat[~chosen].max()


def test_ties_go_to_the_first():
    masks = top_fraction({"a": torch.ones(4), "b": torch.tensor([[2.0, 1.0], [1.0, 0.0]])}, 0.5)
    assert masks["a"].tolist() == [True, True, True, False]
    assert masks["b"].tolist() == [[True, False], [False, False]]
    many = {"a": torch.zeros(1000, dtype=torch.bfloat16)}
    assert torch.equal(top_fraction(many, 0.3)["a"], torch.arange(1000) < 300)


def test_wrong_scores():
    assert top_fraction({}, 0.5) == {}
    with pytest.raises(BadInput):
        top_fraction(scores(), 1.5)
    with pytest.raises(NotFinite):
        top_fraction({"a": torch.tensor([1.0, float("nan")])}, 0.5)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_masked_entries_keep_every_bit(optimizer, rho):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    model[2].weight = nn.Parameter(torch.randn(9, 4).T)  # a transposed, not contiguous, weight
    step = OPTIMIZERS[optimizer](model.parameters())
    x, y = torch.randn(32, 6), torch.randint(4, (32,))

    def train(steps, keep=None):
        for _ in range(steps):
            step.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            step.step()
            if keep is not None:
                keep.restore()

    train(3)  # momentum is there before the mask comes
    params = dict(model.named_parameters())
    g = torch.Generator().manual_seed(1)
    masks = top_fraction({n: torch.randn(p.shape, generator=g) for n, p in params.items()}, rho)
    before = {n: p.detach().clone() for n, p in params.items()}
    keep = Restore(params, masks)
    train(20, keep)
    for name, param in params.items():
        fixed = ~masks[name]
        assert torch.equal(param[fixed].view(torch.int32), before[name][fixed].view(torch.int32))
        assert not masks[name].any() or (param[masks[name]] != before[name][masks[name]]).all()


def test_a_full_mask_is_no_mask_and_saves_nothing():
    params = {"w": nn.Parameter(torch.randn(5, 5))}
    assert Restore(params, {"w": torch.ones(5, 5, dtype=torch.bool)}).bytes() == 0
    half = torch.zeros(5, 5, dtype=torch.bool)
    half[:2] = True
    assert Restore(params, {"w": half}).bytes() == 15 * (4 + 8)
    assert Restore(params, {"w": ~torch.ones(5, 5, dtype=torch.bool)}).bytes() == 25 * 4


def test_save_takes_new_values():
    param = nn.Parameter(torch.zeros(4))
    keep = Restore({"w": param}, {"w": torch.tensor([True, False, True, False])})
    with torch.no_grad():
        param.fill_(2.0)
        keep.save()
        param.fill_(5.0)
    keep.restore()
    assert param.tolist() == [5.0, 2.0, 5.0, 2.0]


def test_wrong_masks():
    params = {"w": nn.Parameter(torch.zeros(4))}
    for masks in ({"v": torch.ones(4, dtype=torch.bool)}, {"w": torch.ones(3, dtype=torch.bool)}, {"w": torch.ones(4)}):
        with pytest.raises(BadInput):
            Restore(params, masks)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
@pytest.mark.parametrize("tau", [0.0, 0.3, 0.5, 0.7, 0.95, 1.0])
def test_rows_above_the_quantile(size, tau):
    """As torch's interpolated quantile has it; scale and L1 norm play no part; all of equals."""
    m = torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    kept = above_quantile(m, tau)
    assert torch.equal(kept, m >= torch.quantile(m, tau) - 1e-12)
    assert int(kept.sum()) == size - math.ceil(tau * (size - 1) - 1e-9) and kept[m.argmax()]
    assert torch.equal(kept, above_quantile(m / m.sum(), tau)) and torch.equal(kept, above_quantile(1e6 * m, tau))
    assert bool(above_quantile(torch.zeros(size), tau).all())


def test_the_two_halves_of_a_mask():
    """Gradients become zero, and what moved goes back, sign of zero and all; unmasked parameters are left alone."""
    p, q = nn.Parameter(torch.tensor([[1.0, -0.0], [3.0, 4.0]])), nn.Parameter(torch.ones(2))
    params, rows = {"p": p, "q": q}, {"p": torch.tensor([[False], [True]]), "gone": torch.tensor([True])}
    mask_gradients(params, rows)
    assert p.grad is None
    p.grad, q.grad = torch.ones(2, 2), torch.ones(2)
    mask_gradients(params, rows)
    assert p.grad.tolist() == [[0, 0], [1, 1]] and q.grad.tolist() == [1, 1]
    before = {name: value.detach().clone() for name, value in params.items()}
    with torch.no_grad():
        p.add_(1)
        q.add_(1)
    undo_masked(params, before, rows)
    assert p.tolist() == [[1, 0], [4, 5]] and bool(p.detach()[0, 1].signbit()) and q.tolist() == [2, 2]


def test_a_number_of_entries():
    scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([[2.0, 3.0]])}
    assert {k: m.tolist() for k, m in top_entries(scores, 3).items()} == {"a": [True, False], "b": [[True, True]]}
    assert top_entries({}, 0) == {}
    with pytest.raises(BadInput):
        top_entries(scores, 5)
    with pytest.raises(NotFinite):
        top_entries({"a": torch.tensor([float("nan")])}, 1)
