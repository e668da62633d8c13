"""Verdicts: from figures of references, the model and doing nothing to words."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from remanence.core.errors import BadInput
from remanence.measure.evidence import (
    compare,
    compare_distances,
    earned_unlearned,
    interval,
    leave_one_out,
    prediction_half,
)


def test_intervals_are_scipys():
    for n in (2, 3, 7):
        x = np.random.default_rng(n).normal(size=n)
        mean, half = interval(x)
        low, high = stats.t.interval(0.95, n - 1, loc=x.mean(), scale=stats.sem(x))
        assert (mean - half, mean + half) == pytest.approx((low, high))
        expected = stats.t.ppf(0.975, n - 1) * x.std(ddof=1) * math.sqrt(1 + 1 / n)
        assert prediction_half(x) == pytest.approx(expected)
    assert interval([0.3]) == (0.3, None)
    with pytest.raises(BadInput, match="at least two"):
        prediction_half([0.3])
    for bad in ([], [math.nan], [math.inf, 1.0]):
        with pytest.raises(BadInput):
            interval(bad)


def test_prediction_interval_holds_the_next_reference():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(600):
        *seen, new = rng.normal(0.8, 0.03, 4)
        hits += abs(new - np.mean(seen)) <= prediction_half(seen)
    assert 0.92 <= hits / 600 <= 0.98


@pytest.mark.parametrize(
    ("after", "nothing", "verdict"),
    [
        (0.11, 0.95, "indistinguishable from retraining"),
        (0.40, 0.95, "closer than doing nothing"),
        (0.95, 0.95, "no closer"),
        (0.99, 0.95, "farther"),
        (0.10, 0.12, "this request cannot tell"),
        (0.90, 0.12, "farther"),  # a wrecked model is not a hard question
    ],
)
def test_verdicts(after, nothing, verdict):
    cell = compare("forget accuracy", [0.09, 0.10, 0.12], after, nothing)
    assert cell.verdict == verdict and cell.n == 3
    assert cell.reference_mean == pytest.approx(0.31 / 3)
    assert cell.ci95 == pytest.approx(interval([0.09, 0.10, 0.12])[1])


def test_below_the_references_is_as_far_as_above():
    refs = [0.50, 0.51, 0.52]
    up, down = compare("auc", refs, 0.51 + 0.2, 0.95), compare("auc", refs, 0.51 - 0.2, 0.95)
    assert up.verdict == down.verdict == "closer than doing nothing"
    assert compare("auc", refs, 0.0, 0.95).verdict == "farther"


def test_one_reference_claims_nothing_and_a_margin_holds_back():
    cell = compare("forget accuracy", [0.1], 0.1, 0.9)
    assert cell.verdict == "spread unknown" and cell.ci95 is None and cell.reference_sd is None
    refs = [0.10, 0.11, 0.12]
    assert compare("x", refs, 0.88, 0.9).verdict == "closer than doing nothing"
    assert compare("x", refs, 0.88, 0.9, margin=0.05).verdict == "no closer"
    with pytest.raises(BadInput):
        compare("x", [], 0.1, 0.2)
    with pytest.raises(BadInput):
        compare("x", refs, math.nan, 0.2)


def test_gain_is_paired():
    """Differences to each reference, not of means: a wide spread of references hides nothing the pairs agree on."""
    refs = [0.1, 0.3, 0.5]
    cell = compare("loss", refs, 3.0, 3.1)
    assert cell.verdict == "closer than doing nothing"


def test_distances():
    between = leave_one_out([[0, 1, 2], [1, 0, 3], [2, 3, 0]])
    assert between == [1.5, 2.0, 2.5]
    assert compare_distances("KL", [2.0, 2.1, 2.2], [9.0, 9.1, 9.2], between).verdict == "indistinguishable from retraining"  # fmt: skip
    assert compare_distances("KL", [6.0, 6.1, 6.2], [9.0, 9.1, 9.2], between).verdict == "closer than doing nothing"
    assert compare_distances("KL", [9.0, 9.1, 9.2], [6.0, 6.1, 6.2], between).verdict == "farther"
    assert compare_distances("KL", [1.0, 1.1, 1.2], [2.0, 2.1, 2.2], between).verdict == "this request cannot tell"
    without = compare_distances("KL", [2.0, 2.1, 2.2], [9.0, 9.1, 9.2])
    assert without.verdict == "closer than doing nothing" and without.reference_mean is None
    assert compare_distances("KL", [2.0], [9.0], [1.0]).verdict == "spread unknown"
    for bad in (([1.0], [1.0, 2.0], None), ([1.0, 2.0], [1.0, 2.0], [1.0])):
        with pytest.raises(BadInput):
            compare_distances("KL", *bad)
    with pytest.raises(BadInput):
        leave_one_out([[0.0]])


def test_when_the_word_unlearned_is_earned():
    refs = [0.09, 0.10, 0.12]
    good, none, bad = compare("a", refs, 0.1, 0.9), compare("b", refs, 0.1, 0.11), compare("c", refs, 0.99, 0.9)
    same, alone = compare("d", refs, 0.9, 0.9), compare("e", [0.1], 0.1, 0.9)
    assert earned_unlearned([good, none]) == (True, "closer to retraining than doing nothing: a")
    assert earned_unlearned([good, bad])[0] is False and "c" in earned_unlearned([good, bad])[1]
    assert earned_unlearned([none]) == (False, "this request cannot tell: doing nothing already looks like retraining")
    assert earned_unlearned([same, none])[0] is False
    assert earned_unlearned([good, alone]) == (False, "one reference: spread unknown")
    assert earned_unlearned([]) == (False, "nothing was measured")
