"""The scaling experiment and the conflict index: accounting, and figures that are known in advance."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from remanence.core.errors import BadInput
from remanence.data import Examples
from remanence.measure.composition import FRACTIONS, conflict_index, crossing, fraction, mixture, ratio, scaling


def rows(count, first=0):
    return Examples({"x": torch.arange(float(count))[:, None]}, f"rows-{first}", torch.arange(first, first + count))


@pytest.mark.parametrize("seed", range(3))
def test_fractions_lie_in_one_another(seed):
    data = rows(1000)
    parts = [fraction(data, share, seed) for share in FRACTIONS]
    assert [len(part) for part in parts] == [1000, 250, 62, 16, 4]
    for larger, smaller in pairwise(parts):
        assert smaller.ids <= larger.ids and smaller.id.tolist() == sorted(smaller.id.tolist())
    assert fraction(data, 0.25, seed + 1).ids != parts[1].ids and len(fraction(rows(3), 1 / 256)) == 1
    for share in (0, 1.5):
        with pytest.raises(BadInput, match="share"):
            fraction(data, share)
    with pytest.raises(BadInput, match="at least one row"):
        fraction(data.select(torch.arange(0)), 0.5)


def test_a_mixture_keeps_the_proportions():
    sets = {"math": rows(400), "code": rows(100, 1000), "chat": rows(1600, 5000)}
    joined = mixture(sets, 1 / 4)
    assert [len(joined.ids & data.ids) for data in sets.values()] == [100, 25, 400]


def test_the_experiment_on_figures_that_are_known():
    """An ability that scores 2 per row of its own and loses 1 for every ten of others: alone 2 n, mixed 2 n - m / 10."""
    sets = {"a": rows(64), "b": rows(640, 1000)}

    def score(data, name):
        own = len(data.ids & sets[name].ids)
        return 2 * own - (len(data) - own) / 10

    found = scaling(sets, score, fractions=(1.0, 0.25))
    assert found["single"] == {"a": [128, 32], "b": [1280, 320]}
    assert found["mixture"] == {"a": [64, 16], "b": pytest.approx([1273.6, 318.4])}
    assert found["conflict"] == {"a": [-64, -16], "b": pytest.approx([-6.4, -1.6])}
    assert scaling({"a": sets["a"]}, score)["conflict"] == {"a": [0] * 5}  # the mixture of one set is that set


def test_index_crossing_and_ratio():
    assert conflict_index([0.5, 0.5], [0.25, 0.75]) == [0.25, -0.25]
    with pytest.raises(BadInput, match="2 figures"):
        conflict_index([1, 2], [1])
    assert crossing((1, 1 / 4, 1 / 16), (-0.2, 0.2, 0.3)) == pytest.approx(
        0.5
    )  # half-way between 1/4 and 1, in octaves
    assert crossing((1, 1 / 4), (0.2, 0.1)) is None and crossing((1, 1 / 4), (0.0, 0.1)) == 1
    assert crossing((1 / 64, 1 / 16, 1 / 4, 1), (0.1, -0.1, 0.1, -0.1)) == pytest.approx(1 / 32)  # the first of three
    assert ratio(10, 100, 100, 1000) == 1 and ratio(25, 100, 1000, 1000) == 0.25
    with pytest.raises(BadInput):
        ratio(1, 10, 0, 10)
