"""Linear probes: what they see, their control, and a class that is there to be read."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from remanence.core.errors import BadInput
from remanence.core.problem import Classification
from remanence.measure.probes import layers, probe
from remanence.models import cnn, mlp
from tests.forget.helpers import LABELS, SEEDS, Context, Finetune, digits_model, same, split

TRAIN, TEST = split()


def batches(model, examples):
    return Context(model, Classification(), Finetune(), LABELS).batches(examples)


def test_layers_are_the_outputs_of_the_weighted_modules():
    model, data = mlp(64, [12, 7], 10, norm=True, dropout=0.5), TEST.select(torch.arange(300))
    before = copy.deepcopy(model)
    found = layers(model, Classification(), batches(model, data))
    x = data["x"]
    model.eval()
    with torch.no_grad():
        for name, module in model.body.named_children():
            x = module(x)
            if f"body.{name}" in found:
                np.testing.assert_allclose(found[f"body.{name}"], x.numpy(), atol=1e-6)
        np.testing.assert_allclose(found["head"], model.head(x).numpy(), atol=1e-6)
    assert list(found) == ["body.1", "body.2", "body.5", "body.6", "head"]
    assert same(model, before) and not any(m._forward_hooks for m in model.modules())


def test_maps_are_averaged_over_places():
    model, data = cnn((1, 8, 8), (4,), 10), TEST.select(torch.arange(5))
    data = data.replace(x=data["x"].reshape(5, 1, 8, 8))
    found = layers(model, Classification(), batches(model, data))
    with torch.no_grad():
        by_hand = model.body[0](data["x"]).mean((2, 3))
    np.testing.assert_allclose(found["body.0"], by_hand.numpy(), atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_chance_on_noise_and_sure_on_a_line(seed):
    """p > .05 where there is nothing; on noise with more dimensions than examples to fit on, too, which a probe learns by heart."""
    rng = np.random.default_rng(seed)
    y = np.arange(90) % 3 == 0
    for wide in (5, 100):
        x = rng.standard_normal((90, wide))
        nothing = probe(x, y, permutations=20, seed=seed)
        assert nothing.p > 0.05 and abs(nothing.value - 0.5) < 0.2
        x[:, 0] += 6 * y
        there = probe(x, y, permutations=20, seed=seed)
        assert there.value > (0.9 if wide == 5 else 0.75) and there.p == 1 / 21


def test_same_seed_same_figure_and_constant_columns_do_no_harm():
    x = np.random.default_rng(0).standard_normal((40, 3))
    y = x[:, 0] > 0
    assert probe(x, y, seed=1) == probe(np.c_[x, np.ones(40)], y, seed=1)
    assert probe(1000 * x - 7, y, seed=1).value == pytest.approx(probe(x, y, seed=1).value)
    assert probe(x, y).p is None
    for bad in (np.zeros(40, bool), y[:30]):
        with pytest.raises(BadInput):
            probe(x, bad)


@pytest.mark.parametrize("seed", SEEDS)
def test_purpose_a_trained_network_says_more_of_its_classes_than_a_fresh_one(seed):
    """The hidden layer of 128 tells a 3 from other digits with AUC > .95, far above its permuted labels; two random units much less."""
    data = TEST.select(torch.arange(200))
    target = (data["y"] == 3).numpy()
    model = digits_model(seed)
    trained = probe(layers(model, Classification(), batches(model, data))["body.1"], target, permutations=20, seed=seed)
    fresh = mlp(64, [2], 10, seed=seed)
    poor = probe(layers(fresh, Classification(), batches(fresh, data))["body.1"], target, seed=seed)
    assert trained.value > 0.95 and trained.p == 1 / 21 and poor.value < trained.value - 0.05
