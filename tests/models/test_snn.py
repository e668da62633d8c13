"""Spiking networks: neurons by hand, the surrogate's gradient, and that the whole learns."""

from __future__ import annotations

import math

import pytest
import torch

from remanence.core.errors import BadInput
from remanence.models.small import seeded
from remanence.models.snn import LIF, SNN
from tests.keep.lives import Lived, stream


def test_a_neuron_by_hand():
    """tau 2, threshold 1, a current of 0.6: v = 0.6, 0.9, 1.05 (spike, 0.05 is left), 0.625, 0.9125, 1.05625 (spike)."""
    spikes = LIF()(torch.full((6, 1, 1), 0.6))
    assert spikes.flatten().tolist() == [0, 0, 1, 0, 0, 1]
    assert not LIF()(torch.full((50, 1, 1), 0.49)).any()  # v never passes 2 * 0.49
    assert LIF()(torch.full((5, 1, 1), 1.0)).all()


def test_the_gradient_is_the_surrogates():
    """One step: sharpness * p (1 - p); of two steps the first reaches the second by the leak alone."""
    current = torch.tensor([0.8, 0.3]).view(2, 1, 1).requires_grad_()
    LIF()(current)[1].sum().backward()
    v = 0.5 * 0.8 + 0.3
    p = 1 / (1 + math.exp(-4 * (v - 1)))
    expected = torch.tensor([0.5 * 4 * p * (1 - p), 4 * p * (1 - p)])
    torch.testing.assert_close(current.grad.flatten(), expected)


def test_the_head_on_rates_is_the_mean_of_the_heads_answers():
    net, x = seeded(0, lambda: SNN(64, [20, 12], 3, steps=5)), torch.rand(4, 64)
    spikes = net.neurons(net.layers[1](net.neurons(net.layers[0](x).expand(5, 4, 20))))
    torch.testing.assert_close(net(x), net.head(spikes).mean(0))
    assert set(spikes.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("seed", range(3))
def test_it_learns_the_digits(seed):
    """Zeros and ones. Measured: 0.99 to 1.00."""
    lived = Lived([], seeded(seed, lambda: SNN(64, [64])), seed=seed).all([stream()[0]])
    assert lived.accuracy() > 0.9


def test_refusals():
    for make in (lambda: LIF(tau=0.5), lambda: LIF(threshold=0.0), lambda: SNN(4, []), lambda: SNN(4, [3], steps=0)):
        with pytest.raises(BadInput):
            make()
