"""KLoM: identities, closed forms, a naive histogram, and how high the floor is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import digamma

from remanence.core.errors import BadInput
from remanence.measure.klom import BINS, EPSILON, default_estimator, klom, margins, said

CEILING = -math.log(EPSILON)


def normals(n: int, m: int, examples: int, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, examples)), shift + scale * rng.normal(size=(m, examples))


def published(p: Any, q: Any) -> float:
    """One example by `np.digitize`, whose last edge is open: the largest sample falls out."""
    low, high = min(p.min(), q.min()), max(p.max(), q.max())
    edges = np.linspace(low, high, BINS + 1)
    a, b = (np.array([(np.digitize(side, edges) == i).sum() for i in range(1, BINS + 1)]) for side in (p, q))
    a, b = a / a.sum(), b / b.sum()
    return float(sum(x * math.log(x / max(y, EPSILON)) for x, y in zip(a, b, strict=True) if x > 0))


def test_margins_are_log_odds() -> None:
    rng = np.random.default_rng(1)
    z, y = 4 * rng.normal(size=(3, 7, 5)), rng.integers(0, 5, 7)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    own = p[:, np.arange(7), y]
    np.testing.assert_allclose(margins(z, y), np.log(own / (1 - own)), atol=1e-12)
    np.testing.assert_allclose(
        margins(z + 1000.0, y), margins(z, y), atol=1e-9
    )  # no overflow, no dependence on a constant
    assert margins(torch.tensor([[60.0, 0.0]], requires_grad=True), [0])[0] == 60.0  # where 1 - p is 0 in floats


@pytest.mark.parametrize("estimator", ["histogram", "gaussian"])
def test_identities(estimator: str) -> None:
    p, q = normals(9, 12, 50)
    np.testing.assert_allclose(klom(p, p, estimator), 0.0, atol=1e-12)
    found = klom(p, q, estimator)
    assert found.shape == (50,) and (found >= 0).all() and (found <= CEILING).all()
    rng = np.random.default_rng(2)
    np.testing.assert_allclose(
        klom(rng.permuted(p, axis=0), q[::-1], estimator), found, atol=1e-12
    )  # networks have no order
    np.testing.assert_array_equal(klom(p[:, ::-1], q[:, ::-1], estimator)[::-1], found)
    np.testing.assert_allclose(klom(2 * p + 1, 2 * q + 1, estimator), found, atol=1e-9)  # nor margins a unit


def test_disjoint_samples_give_the_ceiling_less_the_entropy() -> None:
    """ln(1 / 1e-5) - H(p): here p fills five bins evenly, far from all of q."""
    p = np.repeat([0.5, 1.5, 2.5, 3.5, 4.5], 4)[:, None]
    q = np.linspace(15.1, 20.0, 20)[:, None]
    p[0] = 0.0  # the range begins at 0 and ends at 20: bins of width 1
    assert klom(p, q, "histogram")[0] == pytest.approx(CEILING - math.log(5), abs=1e-12)
    assert klom(p, q, "gaussian")[0] == pytest.approx(CEILING)
    assert klom(np.full((3, 1), 2.0), np.full((4, 1), 2.0), "histogram")[0] == 0  # no range at all
    assert klom(np.full((3, 1), 2.0), np.full((4, 1), 2.0), "gaussian")[0] == 0


def test_gaussian_closed_form() -> None:
    """Samples of two with means m and standard deviations s: KL of the two normals."""
    root = math.sqrt(0.5)
    p, q = np.array([[1 - root * 0.5], [1 + root * 0.5]]), np.array([[2 - root * 2], [2 + root * 2]])
    expected = math.log(2 / 0.5) + (0.25 + 1) / 8 - 0.5
    assert klom(p, q, "gaussian")[0] == pytest.approx(expected, abs=1e-12)
    p, q = normals(4000, 4000, 3, shift=0.7, scale=1.5)
    np.testing.assert_allclose(klom(p, q, "gaussian"), math.log(1.5) + (1 + 0.49) / 4.5 - 0.5, atol=0.03)


def test_the_gaussian_floor_is_what_theory_says() -> None:
    """Equal normals, N = 5 and M = 30: E ln s^2 by the digamma function, E 1/s_q^2 = (M - 1) / (M - 3), E (m_p - m_q)^2 = 1/N + 1/M."""
    n, m = 5, 30
    logs = [digamma((k - 1) / 2) - math.log((k - 1) / 2) for k in (m, n)]
    expected = 0.5 * (logs[0] - logs[1] + (1 + 1 / n + 1 / m) * (m - 1) / (m - 3) - 1)
    assert klom(*normals(n, m, 40000), "gaussian").mean() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_histogram_conventions(seed: int) -> None:
    p, q = normals(30, 40, 40, seed, shift=0.5)
    naive = [published(p[:, i], q[:, i]) for i in range(40)]
    np.testing.assert_allclose(klom(p, q, "histogram", "open"), naive, atol=1e-12)
    closed = []
    for i in range(40):
        low, high = min(p[:, i].min(), q[:, i].min()), max(p[:, i].max(), q[:, i].max())
        a, b = (np.histogram(side[:, i], BINS, (low, high))[0] / len(side) for side in (p, q))
        closed.append(sum(x * math.log(x / max(y, EPSILON)) for x, y in zip(a, b, strict=True) if x > 0))
    np.testing.assert_allclose(klom(p, q, "histogram"), closed, atol=1e-12)
    assert np.abs(np.array(closed) - naive).max() > 0.01


def test_the_open_edge_can_hide_a_difference() -> None:
    """All unlearned margins at the upper end: the published convention drops every one of them and finds no difference."""
    p, q = np.full((10, 1), 5.0), np.linspace(-5, 4, 10)[:, None]
    assert klom(p, q, "histogram", "open")[0] == 0
    assert klom(p, q, "histogram")[0] == pytest.approx(CEILING)


def test_few_networks_make_a_high_floor() -> None:
    """Equal normals: 3 lives against 6 oracles; 100 against 100 as in the paper."""
    few, many = normals(3, 6, 4000), normals(100, 100, 1000)
    assert 7 < klom(*few, "histogram").mean() < 9 and 0.8 < klom(*few, "gaussian").mean() < 1.0
    assert 0.3 < klom(*many, "histogram").mean() < 0.4 and klom(*many, "gaussian").mean() < 0.03
    assert (
        default_estimator(5, 15) == default_estimator(100, 99) == "gaussian"
        and default_estimator(100, 100) == "histogram"
    )
    np.testing.assert_array_equal(klom(*few), klom(*few, "gaussian"))
    np.testing.assert_array_equal(klom(*many), klom(*many, "histogram"))


@pytest.mark.parametrize("seed", range(3))
def test_it_grows_with_the_difference(seed: int) -> None:
    for size in ((5, 10), (100, 100)):
        found = [klom(*normals(*size, 300, seed, shift)).mean() for shift in (0.0, 1.0, 3.0)]
        assert found[0] + 0.2 < found[1] < found[2] - 1.0


def test_only_figures_of_the_whole_are_said() -> None:
    assert said(np.arange(101.0)) == {"mean": 50.0, "p95": 95.0}


def test_what_cannot_be_is_said() -> None:
    p, q = normals(3, 4, 5)
    for bad in ((p[:1], q), (p[:, :4], q), (p[0], q)):
        with pytest.raises(BadInput, match="two networks"):
            klom(*bad)
    for words in ({"estimator": "kernel"}, {"estimator": "histogram", "edge": "left"}):
        with pytest.raises(BadInput, match="there is histogram"):
            klom(p, q, **words)
    with pytest.raises(BadInput, match="NaN"):
        klom(np.where(p > 1e9, p, np.nan), q)
    with pytest.raises(BadInput, match="two classes"):
        margins(p, [0, 1])
    with pytest.raises(BadInput, match="no column"):
        margins(p, [0, 1, 5])
    with pytest.raises(BadInput, match="no examples"):
        said([])
