"""Figures of accuracy and memory, by hand and by what must hold of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from remanence.core.errors import BadInput
from remanence.measure import memory


def test_a_model_or_603_exemplars():
    """Zhou et al. 2023: the parameters of a ResNet32 are 603 pictures of CIFAR."""
    assert memory.extra_exemplars(463504, 32 * 32 * 3) == math.floor(463504 * 4 / 3072) == 603
    assert memory.extra_exemplars(768, 3072) == 1 and memory.extra_exemplars(767, 3072) == 0
    assert memory.extra_exemplars(463504, 3072, parameter_bytes=2) == 301


@pytest.mark.parametrize("budget", [0, 999, 1000, 1001, 1099, 1100, 123456])
def test_as_many_fit_as_there_is_room_for_and_no_more(budget):
    n = memory.fitting(budget, 1000, 100)
    assert n == 0 or 1000 + 100 * n <= budget
    assert 1000 + 100 * (n + 1) > budget


def test_the_area_of_a_constant_is_the_constant_times_the_width():
    assert memory.area_under_curve([1e6, 2e6, 5e6], [0.7, 0.7, 0.7]) == pytest.approx(0.7 * 4)


def test_the_area_of_a_line_does_not_depend_on_where_it_is_cut():
    line = lambda x: 0.2 + 0.1 * np.asarray(x) / 1e6  # noqa: E731
    whole = memory.area_under_curve([1e6, 5e6], line([1e6, 5e6]))
    cut = [1e6, 1.5e6, 4e6, 5e6]
    assert whole == pytest.approx((0.3 + 0.7) / 2 * 4)
    assert memory.area_under_curve(cut, line(cut)) == pytest.approx(whole)
    assert memory.area_under_curve(cut[::-1], line(cut)[::-1]) == pytest.approx(whole)  # in any order


def test_what_is_not_defined_is_nan():
    assert math.isnan(memory.area_under_curve([1e6], [0.5]))
    assert math.isnan(memory.area_under_curve([1e6, 2e6], [0.5, math.nan]))


def test_accuracy_per_megabyte():
    small, large = memory.accuracy_per_mb([5e6, 0.5e6, 1e6], [0.9, 0.4, 0.5])
    assert small == pytest.approx(0.8) and large == pytest.approx(0.18)


@pytest.mark.parametrize(
    "call",
    [
        lambda: memory.extra_exemplars(10, 0),
        lambda: memory.fitting(10, 1, 0),
        lambda: memory.fitting(10, 1, math.nan),
        lambda: memory.area_under_curve([1, 2], [0.5]),
        lambda: memory.area_under_curve([1, 1], [0.5, 0.5]),
        lambda: memory.accuracy_per_mb([], []),
        lambda: memory.accuracy_per_mb([0, 1], [0.5, 0.5]),
    ],
)
def test_what_cannot_be(call):
    with pytest.raises(BadInput):
        call()
