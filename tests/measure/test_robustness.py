"""Disturbances and residuals against closed forms."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.problem import Regression
from remanence.measure.robustness import gradient_norm, noisy, per_class, pruned, quantised
from remanence.models import cnn, mlp
from tests.forget.helpers import SEEDS, accuracy, digits_model, same, split

TRAIN, TEST = split()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_weights_lie_on_each_channels_grid(bits):
    model = cnn((1, 8, 8), (4,), 10)
    before = copy.deepcopy(model)
    made = quantised(model, bits)
    assert same(model, before)
    for name, p in made.named_parameters():
        old = dict(model.named_parameters())[name]
        if p.dim() < 2:
            assert torch.equal(p, old)
            continue
        for new, row in zip(p.flatten(1), old.flatten(1), strict=True):
            step = row.abs().max() / (2 ** (bits - 1) - 1)
            assert (new - row).abs().max() <= step / 2 * (1 + 1e-5)
            torch.testing.assert_close(new / step, (new / step).round(), atol=1e-3, rtol=0)
            assert new.abs().max() == row.abs().max()
    assert same(quantised(made, bits), made)
    with pytest.raises(BadInput):
        quantised(model, 1)


def test_sixteen_bits_score_as_all_of_them_and_a_zero_row_stays():
    model = digits_model()
    assert accuracy(quantised(model, 16), TEST) == accuracy(model, TEST)
    with torch.no_grad():
        model.head.weight[4] = 0
    assert torch.equal(quantised(model, 4).head.weight[4], torch.zeros(128))


def test_what_lies_within_half_a_step_is_undone_by_quantisation():
    """A change below half a step of every weight but each channel's largest vanishes: the weights are those of before."""
    base = quantised(digits_model(), 4)
    changed = copy.deepcopy(base)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in changed.parameters():
            if p.dim() > 1:
                top = p.abs().amax(1, keepdim=True)
                p += 0.45 * top / 7 * (2 * torch.rand(p.shape, generator=rng) - 1) * (p.abs() < top)
    assert not same(changed, base)
    for a, b in zip(quantised(changed, 4).parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_pruning_takes_the_smallest_weights_of_all_layers(share):
    model = digits_model()
    made = pruned(model, share)
    sizes, kept = (torch.cat([p.flatten() for p in m.parameters() if p.dim() > 1]) for m in (model, made))
    gone = kept == 0
    assert int(gone.sum()) == round(share * len(sizes))
    assert torch.equal(kept[~gone], sizes[~gone]) and torch.equal(made.head.bias, model.head.bias)
    if 0 < share < 1:
        assert sizes[gone].abs().max() <= sizes[~gone].abs().min()


def test_noise_has_the_size_it_is_given():
    model = mlp(64, [200], 10)
    made = noisy(model, 0.5, 0)
    assert same(noisy(model, 0.0, 0), model) and same(made, noisy(model, 0.5, 0))
    assert not same(made, noisy(model, 0.5, 1))
    for name, p in model.state_dict().items():
        q = made.state_dict()[name]
        assert p.dim() > 1 or torch.equal(p, q)
        if p.dim() > 1:
            assert float((q - p).std() / p.std()) == pytest.approx(0.5, rel=0.08), name


def test_gradient_norm_of_a_line_and_at_its_minimum():
    """Half squared error of y = a x + b: gradient ((a - 3) mean x^2, b) for symmetric x; 0 at a = 3, b = 0."""
    model, x = nn.Linear(1, 1), torch.linspace(-1, 1, 21)[:, None]
    batch = {"x": x, "y": 3 * x, "id": torch.arange(21)}
    with torch.no_grad():
        model.weight.fill_(1.0), model.bias.fill_(0.25)
    model.requires_grad_(False)
    expected = math.hypot(2 * float(x.square().mean()), 0.25)
    whole = gradient_norm(model, Regression(), [batch])
    cut = gradient_norm(
        model, Regression(), [{k: v[:5] for k, v in batch.items()}, {k: v[5:] for k, v in batch.items()}]
    )
    assert whole == pytest.approx(expected, rel=1e-5) and cut == pytest.approx(expected, rel=1e-5)
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model.weight.fill_(3.0), model.bias.fill_(0.0)
    assert gradient_norm(model, Regression(), [batch]) < 1e-6


def test_shares_of_right_answers_by_class():
    found = per_class(np.array([1, 1, 2, 2, 5]), np.array([1, 2, 2, 2, 5]), [1, 2, 5, 9])
    assert found == {1: 1.0, 2: pytest.approx(2 / 3), 5: 1.0}


@pytest.mark.parametrize("seed", SEEDS)
def test_purpose_a_sound_network_bears_what_the_report_does_to_it(seed):
    """int8, int4, 30 % pruned, noise of .3 sd: a digits network keeps nine tenths of its accuracy; at 2 bits it does not keep it all."""
    model = digits_model(seed)
    sound = accuracy(model, TEST)
    for made in (quantised(model, 8), quantised(model, 4), pruned(model, 0.3), noisy(model, 0.3, seed)):
        assert accuracy(made, TEST) > 0.9 * sound
    assert accuracy(quantised(model, 2), TEST) < sound
