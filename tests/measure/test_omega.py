"""Figures against references: Omega and intransigence; and the numbers of the survey whose terms are used."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy import nan

from remanence.core.errors import BadInput
from remanence.measure import matrix

#: Accuracy on task j after task k.
TABLE = np.array([[0.9, nan, nan], [0.7, 0.8, nan], [0.5, 0.6, 0.9]])


def test_the_survey_s_figures_by_hand():
    assert matrix.average_accuracy(TABLE) == pytest.approx(2 / 3)
    assert matrix.average_incremental_accuracy(TABLE) == pytest.approx((0.9 + 0.75 + 2 / 3) / 3)
    assert matrix.forgetting(TABLE) == pytest.approx(0.3)
    assert matrix.backward_transfer(TABLE) == pytest.approx(-0.3)
    assert matrix.intransigence(TABLE, 0.95, 2) == pytest.approx(0.05)
    assert matrix.forward_transfer(TABLE, [0.9, 0.85, 0.8], convention="single-task") == pytest.approx(0.025)


def test_with_one_task_what_needs_two_is_not_defined():
    one = np.array([[0.9]])
    for value in (matrix.forgetting(one), matrix.backward_transfer(one), *matrix.omega(one, 1.0).values()):
        assert math.isnan(value)


def test_forgetting_is_never_less_than_what_backward_transfer_says():
    rng = np.random.default_rng(0)
    for _ in range(30):
        r = np.where(np.tril(np.ones((4, 4))) > 0, rng.random((4, 4)), nan)
        assert matrix.forgetting(r) >= -matrix.backward_transfer(r) - 1e-12


def test_perfect_memory():
    r = np.where(np.tril(np.ones((3, 3))) > 0, [0.9, 0.8, 0.7], nan)
    assert matrix.forgetting(r) == matrix.backward_transfer(r) == 0


def test_omega_by_hand():
    found = matrix.omega(TABLE, 0.8)
    assert found["omega_base"] == pytest.approx((0.7 / 0.8 + 0.5 / 0.8) / 2)
    assert found["omega_new"] == pytest.approx((0.8 + 0.9) / 2)
    assert found["omega_all"] == pytest.approx((0.75 / 0.8 + (2 / 3) / 0.8) / 2)
    each = matrix.omega(TABLE, [1.0, 0.9, 0.8])
    assert each["omega_all"] == pytest.approx((0.75 / 0.9 + (2 / 3) / 0.8) / 2)


def test_an_offline_learner_has_one():
    rng = np.random.default_rng(1)
    r = np.where(np.tril(np.ones((5, 5))) > 0, rng.random((5, 5)), nan)
    found = matrix.omega(r, [matrix.average_accuracy(r, k) for k in range(5)])
    assert found["omega_all"] == pytest.approx(1)
    flat = np.where(np.tril(np.ones((5, 5))) > 0, 0.8, nan)
    assert matrix.omega(flat, 0.8)["omega_base"] == pytest.approx(1)


def test_who_knows_only_the_last_task_has_chance_over_ideal():
    r = np.where(np.eye(4) > 0, 0.9, np.where(np.tril(np.ones((4, 4))) > 0, 0.1, nan))
    found = matrix.omega(r, 0.8)
    assert found["omega_base"] == pytest.approx(0.1 / 0.8) and found["omega_new"] == pytest.approx(0.9)


def test_rows_that_learn_nothing_and_the_order_of_learning():
    """Task 1 comes first, then a request takes a task out of the last row; figures on tasks not seen yet do not count."""
    r = np.array([[0.3, 0.9, 0.2], [0.3, 0.6, 0.1], [0.8, 0.5, 0.1], [0.7, nan, 0.9]])
    found = matrix.omega(r, 1.0, learned=[2, 0, 3])
    assert found["omega_base"] == pytest.approx(0.5)
    assert found["omega_new"] == pytest.approx((0.8 + 0.9) / 2)
    assert found["omega_all"] == pytest.approx(((0.8 + 0.5) / 2 + (0.7 + 0.9) / 2) / 2)


def test_an_ideal_that_fits_no_row_is_refused():
    with pytest.raises(BadInput, match="one for each of 3 rows"):
        matrix.omega(TABLE, [0.9, 0.9])
