"""Figures of an accuracy matrix, by hand and against definitions written as loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy import nan

from remanence.core.errors import BadInput
from remanence.measure import matrix

# rows: after task 0, 1, 2; unseen tasks have no figure
LIFE = np.array([[0.9, nan, nan], [0.7, 0.8, nan], [0.75, 0.5, 0.95]])


def test_by_hand():
    assert matrix.average_accuracy(LIFE) == pytest.approx((0.75 + 0.5 + 0.95) / 3)
    assert matrix.average_accuracy(LIFE, at=1) == pytest.approx(0.75)
    assert matrix.average_incremental_accuracy(LIFE) == pytest.approx((0.9 + 0.75 + 2.2 / 3) / 3)
    np.testing.assert_allclose(matrix.forgetting_per_task(LIFE), [0.15, 0.3, nan])
    assert matrix.forgetting(LIFE) == pytest.approx(0.225)
    assert matrix.forgetting(LIFE, at=1) == pytest.approx(0.2)
    assert math.isnan(matrix.forgetting(LIFE, at=0))  # not defined yet: never 0
    assert matrix.backward_transfer(LIFE) == pytest.approx((-0.15 - 0.3) / 2)
    assert matrix.backward_transfer(LIFE, convention="best") == pytest.approx(-0.225)


def test_conventions_differ_where_a_task_once_got_better():
    """Task 0: .5 when learned, .8 later, .6 now. GEM counts a gain of .1, 'best' a loss of .2."""
    r = np.array([[0.5, nan, nan], [0.8, 0.9, nan], [0.6, 0.9, 0.9]])
    assert matrix.backward_transfer(r) == pytest.approx((0.1 + 0) / 2)
    assert matrix.backward_transfer(r, convention="best") == pytest.approx((-0.2 + 0) / 2)
    assert matrix.forgetting(r) == pytest.approx(0.1)
    with pytest.raises(BadInput, match="'gem' or 'best'"):
        matrix.backward_transfer(r, convention="last")  # type: ignore[arg-type]


def loops(r: np.ndarray, learned: list[int], k: int) -> dict[str, float]:
    """The definitions, one figure at a time."""
    tasks = range(r.shape[1])
    there = [j for j in tasks if learned[j] <= k and not math.isnan(r[k, j])]
    old = [j for j in there if learned[j] < k]
    best = {j: max(v for i in range(learned[j], k) if not math.isnan(v := r[i, j])) for j in old}
    return {
        "average_accuracy": sum(r[k, j] for j in there) / len(there),
        "forgetting": sum(best[j] - r[k, j] for j in old) / len(old),
        "backward_transfer_gem": sum(r[k, j] - r[learned[j], j] for j in old) / len(old),
        "backward_transfer_best": sum(r[k, j] - best[j] for j in old) / len(old),
    }


@pytest.mark.fidelity(
    "measure/forgetting",
    check="definitions of Chaudhry et al. 2018 and Lopez-Paz & Ranzato 2017 as loops on 30 random lives with forget rows; by hand",
    measured="largest difference 1e-16",
    paper="f_j = max_{l<k} a_lj - a_kj; BWT = mean R_Tj - R_jj",
    differs="the maximum starts at the row in which the task was learned",
)
@pytest.mark.parametrize("seed", range(30))
def test_against_loops_on_random_lives(seed):
    """Rows without a new task (forget requests), tasks forgotten on request, tasks measured before they were learned."""
    rng = np.random.default_rng(seed)
    tasks = int(rng.integers(2, 6))
    rows = tasks + int(rng.integers(0, 3))
    learned = [*sorted(rng.choice(rows - 1, tasks - 1, replace=False).tolist()), rows - 1]
    r = rng.random((rows, tasks))
    if seed % 2:
        for j in range(tasks):
            r[: learned[j], j] = nan
    if seed % 3 == 0 and tasks > 2:
        r[-1, 1] = nan
    found = matrix.summary(r, learned=learned)
    for name, value in loops(r, learned, rows - 1).items():
        assert found[name] == pytest.approx(value), name
    if seed % 2:  # without figures on unseen tasks the matrix tells itself when a task was learned
        assert matrix.summary(r) == found
    assert found["backward_transfer_best"] == pytest.approx(-found["forgetting"])
    assert found["backward_transfer_best"] <= found["backward_transfer_gem"] + 1e-12


def test_accuracy_before_learning_is_not_forgotten():
    """Task 1 scored .99 before it was learned and .5 since: nothing of it was lost."""
    r = np.array([[0.9, 0.99, 0.0], [0.9, 0.5, 0.0], [0.9, 0.5, 0.9]])
    assert matrix.forgetting(r) == 0


def test_forward_transfer_has_three_conventions():
    r = np.array([[0.9, 0.2, 0.3], [0.8, 0.9, 0.4], [0.7, 0.8, 0.95]])  # full and square: row j learned task j
    assert matrix.forward_transfer(r, [0.1, 0.1, 0.2]) == pytest.approx((0.1 + 0.2) / 2)
    assert matrix.forward_transfer(r, convention="zero-shot") == pytest.approx((0.2 + 0.4) / 2)
    assert matrix.forward_transfer(r, [0.9, 0.85, 0.9], convention="single-task") == pytest.approx((0.05 + 0.05) / 2)
    with pytest.raises(BadInput, match="baseline"):
        matrix.forward_transfer(r)
    with pytest.raises(BadInput, match="shape"):
        matrix.forward_transfer(r, [0.1])
    assert math.isnan(matrix.forward_transfer(LIFE, convention="zero-shot"))  # no figures on unseen tasks


def test_intransigence_and_global_forgetting_by_hand():
    assert matrix.intransigence(LIFE, joint=0.97, task=1) == pytest.approx(0.17)
    # sizes 100, 100, 200: after task 1, 100/200 * .2; after task 2, 100/400 * .15 + 100/400 * .3
    assert matrix.global_forgetting(LIFE, [100, 100, 200]) == pytest.approx((0.1 + 0.1125) / 2)
    gone = LIFE.copy()
    gone[2, 0] = nan  # forgotten on request: leaves the sum and the weights of its row
    assert matrix.global_forgetting(gone, [100, 100, 200]) == pytest.approx((0.1 + 100 / 300 * 0.3) / 2)
    with pytest.raises(BadInput):
        matrix.global_forgetting(LIFE, [1, 2])


def test_rows_of_forget_requests_and_lists():
    r = [[0.9, nan], [0.6, nan], [0.5, 0.8]]  # row 1: a forget request, no new task
    assert matrix.learned_rows(r).tolist() == [0, 2]
    assert matrix.forgetting(r) == pytest.approx(0.4)
    assert matrix.summary([[0.4]]) == {"average_accuracy": 0.4, "average_incremental_accuracy": 0.4}


@pytest.mark.parametrize("bad", [lambda: matrix.average_accuracy([]), lambda: matrix.average_accuracy([0.5]),
                                 lambda: matrix.average_accuracy(LIFE, at=3), lambda: matrix.average_accuracy(LIFE, learned=[0, 1]),
                                 lambda: matrix.average_accuracy(LIFE, learned=[-1, 1, 2])])  # fmt: skip
def test_bad_matrices_are_refused(bad):
    with pytest.raises(BadInput):
        bad()
