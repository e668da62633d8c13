"""Relearning against a naive loop, on itself, and where a class is hidden rather than gone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from remanence.core.errors import BadInput
from remanence.core.problem import Classification, Regression
from remanence.data import Examples
from remanence.measure.relearn import Curve, advantage, relearn, with_columns
from remanence.models import cnn, mlp
from tests.forget.helpers import SEEDS, class_ids, digits_model, same, split

TRAIN, TEST = split()
THREE = class_ids(TRAIN, 3)


def test_one_batch_is_plain_gradient_descent():
    """The whole data in each batch: the order cannot matter, and the curve is that of a loop by hand."""
    data, watch = TRAIN.select(torch.arange(40)), TEST.select(torch.arange(50))
    model = mlp(64, [8], 10)
    found = relearn(
        model, Classification(), data, watch, columns=10, steps=5, lr=0.1, optimizer="sgd", batch_size=40, seed=3
    )
    by_hand = copy.deepcopy(model)
    for step in range(6):
        loss = cross_entropy(by_hand(watch["x"]), watch["y"]).item()
        right = (by_hand(watch["x"]).argmax(1) == watch["y"]).double().mean().item()
        assert found.loss[step] == pytest.approx(loss, rel=1e-5) and found.accuracy[step] == right
        by_hand.zero_grad()
        cross_entropy(by_hand(data["x"]), data["y"]).backward()
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= 0.1 * p.grad


def test_equal_seeds_equal_curves_and_nothing_is_moved():
    model = mlp(64, [16], 10, norm=True, dropout=0.3)
    before, data, state = copy.deepcopy(model), TRAIN.select(torch.arange(100)), torch.get_rng_state()
    curves = [relearn(model, Classification(), data, TEST, columns=10, steps=8, seed=s) for s in (0, 0, 1)]
    assert np.array_equal(curves[0].loss, curves[1].loss) and not np.array_equal(curves[0].loss, curves[2].loss)
    assert same(model, before) and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters()) and model.training == before.training
    assert advantage([curves[0].counted(loss=1.0)], curves[1].counted(loss=1.0)) == 1.0


def test_one_example_under_batch_norm_and_frozen_weights_can_be_learned():
    model = cnn((1, 8, 8), (4,), 10).requires_grad_(False)
    one = TRAIN.select(torch.arange(1))
    one = one.replace(x=one["x"].reshape(1, 1, 8, 8))
    curve = relearn(model, Classification(), one, one, columns=10, steps=30, lr=0.01)
    assert curve.loss[-1] < 0.5 * curve.loss[0]


def test_levels_are_counted_from_one_and_beyond_the_budget():
    curve = Curve(np.array([3.0, 2.0, 1.0, 0.5]), np.array([0.0, 0.4, 0.9, 0.8]))
    assert curve.counted(accuracy=0.0) == 1 and curve.counted(accuracy=0.85) == 3 and curve.counted(loss=0.5) == 4
    assert curve.counted(accuracy=0.95) == 5 and curve.area == pytest.approx(0.525)
    assert advantage([10, 20], 5) == 3.0
    with pytest.raises(BadInput):
        curve.counted()
    with pytest.raises(BadInput):
        Curve(curve.loss, None).counted(accuracy=0.5)
    with pytest.raises(BadInput, match="examples"):
        relearn(mlp(64, [8], 10), Classification(), TRAIN.select(torch.arange(0)), TEST, columns=10)


def test_a_regression_has_losses_only():
    x = torch.linspace(-1, 1, 64)[:, None]
    data = Examples({"x": x, "y": 3 * x}, "line")
    torch.manual_seed(0)
    curve = relearn(nn.Linear(1, 1), Regression(), data, data, steps=60, lr=0.1, optimizer="sgd")
    assert curve.accuracy is None and curve.loss[-1] < 0.2 * curve.loss[0] and curve.area == curve.loss.mean()


def test_a_lacking_column_is_newly_drawn_and_old_ones_keep_their_bits():
    model = mlp(64, [8], 3)
    made, labels = with_columns(model, [7, 2], [2, 5, 9], seed=0)
    assert labels == [7, 2, 5, 9] and made.head.out_features == 4 and model.head.out_features == 3
    assert torch.equal(made.head.weight[:3], model.head.weight)
    again, _ = with_columns(model, [7, 2], [2, 5, 9], seed=0)
    other, _ = with_columns(model, [7, 2], [2, 5, 9], seed=1)
    assert same(made, again) and not same(made, other)
    wide, labels = with_columns(model, [7, 2], [5], seed=0)
    assert labels == [7, 2, 5] and same(wide, model)


@pytest.mark.parametrize("seed", SEEDS)
def test_purpose_a_class_that_was_only_hidden_comes_back_at_once(seed):
    """Class 3 hidden by its bias, 20 of its examples, until 90 % accuracy, against a model that never saw it."""
    original, never = digits_model(seed), digits_model(seed + 1, without=THREE)
    hidden = copy.deepcopy(original)
    with torch.no_grad():
        hidden.head.bias[3] -= 10
    data, watch = TRAIN.only(THREE).select(torch.arange(20)), TEST.only(class_ids(TEST, 3))
    counts = []
    for model in (original, hidden, never):
        curve = relearn(model, Classification(), data, watch, columns=10, steps=80, lr=1e-3, seed=seed)
        counts.append(curve.counted(accuracy=0.9))
    print(counts)
    assert counts[0] == 1 and advantage([counts[2]], counts[1]) > 1.3
