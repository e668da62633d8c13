"""Divergences against torch, scipy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance

from remanence.core.errors import BadInput
from remanence.measure import divergence


def pair(n: int = 50, classes: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(3 * torch.randn(n, classes, generator=rng, dtype=torch.float64) for _ in range(2))


def test_kl_is_torchs():
    p, q = pair()
    expected = F.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="none").sum(1)
    np.testing.assert_allclose(divergence.kl(p, q), expected, rtol=1e-10)
    assert not np.allclose(divergence.kl(p, q), divergence.kl(q, p))
    np.testing.assert_array_equal(divergence.kl(p, p), np.zeros(50))
    np.testing.assert_allclose(divergence.kl(p + 7, q - 3), expected, rtol=1e-9)  # logits are known up to a constant


def test_kl_by_hand():
    p, q = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    assert divergence.kl(p, q)[0] == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5))


def test_js_is_scipys_symmetric_and_bounded():
    p, q = pair(seed=1)
    found = divergence.js(p, q)
    expected = jensenshannon(p.softmax(1).numpy(), q.softmax(1).numpy(), axis=1) ** 2
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    np.testing.assert_allclose(found, divergence.js(q, p), rtol=1e-12)
    apart = divergence.js([[900.0, 0.0]], [[0.0, 900.0]])[0]
    assert apart == pytest.approx(math.log(2)) and apart <= math.log(2)


def test_columns_are_aligned_by_label_and_the_rest_is_left_out():
    p, q = pair(classes=4)
    order = [2, 0, 3, 1]
    straight = divergence.kl(p, q)
    labels = [5, 6, 7, 8]
    np.testing.assert_allclose(divergence.kl(p, q[:, order], labels, [labels[i] for i in order]), straight, rtol=1e-12)
    wide = torch.cat([torch.full((50, 1), 30.0), q[:, order]], 1)  # a class that the reference does not know
    np.testing.assert_allclose(divergence.kl(p, wide, labels, [9, *(labels[i] for i in order)]), straight, rtol=1e-9)
    np.testing.assert_allclose(divergence.kl(p, q[:, :2], labels, [5, 6]), divergence.kl(p[:, :2], q[:, :2]))
    same = divergence.agreement(p, q[:, order], labels, [labels[i] for i in order])
    np.testing.assert_array_equal(same, (p.argmax(1) == q.argmax(1)).double().numpy())


def test_barred_columns_and_certain_answers():
    p = np.array([[0.0, -np.inf, 1.0]])
    assert divergence.kl(p, p)[0] == 0 and divergence.js(p, p)[0] == 0
    assert divergence.kl(p, [[0.0, 5.0, 1.0]])[0] == pytest.approx(-math.log((1 + math.e) / (1 + math.e + math.exp(5))))
    assert math.isinf(divergence.kl([[0.0, 0.0]], [[0.0, -np.inf]])[0])


def test_regression_distances():
    a, b = np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([[0.0, 0.0], [3.0, 4.0]])
    assert divergence.squared_difference(a, b).tolist() == [5.0, 25.0]
    assert divergence.gaussian_kl(a, b, sigma=2.0).tolist() == [5 / 8, 25 / 8]
    normal = [torch.distributions.Normal(float(m), 1.5) for m in (0.3, -1.1)]
    expected = float(torch.distributions.kl_divergence(*normal))
    assert divergence.gaussian_kl([0.3], [-1.1], sigma=1.5)[0] == pytest.approx(expected)


def test_wasserstein_against_scipy():
    rng = np.random.default_rng(0)
    for n, m in ((50, 50), (7, 31), (1, 1), (1, 9)):
        a, b = rng.normal(size=n), rng.normal(1.0, 2.0, size=m).round(1)  # rounded: some values twice
        assert divergence.wasserstein(a, b) == pytest.approx(wasserstein_distance(a, b))
        assert divergence.wasserstein(b[:, None], torch.from_numpy(a)) == pytest.approx(wasserstein_distance(a, b))
    a = rng.normal(size=40)
    assert divergence.wasserstein(a, rng.permutation(a)) == 0
    assert divergence.wasserstein(a, a + 0.7) == pytest.approx(0.7)


@pytest.mark.parametrize(
    "call",
    [
        lambda p, q: divergence.wasserstein(p, q),
        lambda p, q: divergence.wasserstein(p[:, 0], q[:0, 0]),
        lambda p, q: divergence.wasserstein(1.0, 2.0),
        lambda p, q: divergence.kl(p, q[:, :3]),
        lambda p, q: divergence.kl(p, q[:10]),
        lambda p, q: divergence.kl(p, q, [0, 1, 2, 3, 4, 5]),
        lambda p, q: divergence.kl(p, q, [0] * 6, [0] * 6),
        lambda p, q: divergence.kl(p, q, [0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]),
        lambda p, q: divergence.kl(p * math.nan, q),
        lambda p, q: divergence.gaussian_kl(p, q, sigma=0),
        lambda p, q: divergence.squared_difference(p, q[0]),
    ],
)
def test_what_cannot_be_compared_is_refused(call):
    with pytest.raises(BadInput):
        call(*pair())
