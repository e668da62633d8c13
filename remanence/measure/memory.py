"""Accuracy and memory in one figure: methods held against each other at equal bytes, network and stored examples together.

Bytes are those of everything that remembers; a megabyte is 1,000,000 of them. Accuracies are shares in [0, 1].

Source: Zhou et al. 2023, "A Model or 603 Exemplars: Towards Memory-Efficient Class-Incremental Learning", arXiv 2205.13218.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from remanence.core.errors import BadInput

Floats = NDArray[np.float64]

MB = 1e6


def extra_exemplars(parameters: int, example_bytes: int, parameter_bytes: int = 4) -> int:
    """``floor(parameters * parameter_bytes / example_bytes)``: the examples that weigh as much as so many parameters do.

    463,504 parameters of 4 bytes are 603 pictures of 32 x 32 x 3 bytes. Fewer than no parameters are less than no examples.

    Raises:
        BadInput: an example or a parameter without bytes.
    """
    if example_bytes < 1 or parameter_bytes < 1:
        raise BadInput(f"an example of {example_bytes} bytes, a parameter of {parameter_bytes}: both weigh at least 1")
    return parameters * parameter_bytes // example_bytes


def fitting(budget: float, base: float, each: float) -> int:
    """``max(0, floor((budget - base) / each))``: the examples of `each` bytes for which a budget has room beside `base` bytes of
    everything else.

    Raises:
        BadInput: an example without bytes.
    """
    if not each > 0:
        raise BadInput(f"an example weighs more than 0 bytes, not {each}")
    return max(0, math.floor((budget - base) / each))


def area_under_curve(budgets: ArrayLike, accuracies: ArrayLike) -> float:
    """``AUC = sum over neighbouring budgets m < m' of (m' - m) (A(m) + A(m')) / 2``, by the trapezoid rule, in accuracy x MB; higher is
    better.

    AUC-A takes the average incremental accuracy at each budget (bytes), AUC-L the accuracy after the last event. Two areas can be
    compared only over the same budgets. NaN with one budget, or where a figure is NaN.

    Raises:
        BadInput: not one accuracy for each budget, or a budget that is given twice.
    """
    x, y = _curve(budgets, accuracies)
    return float((np.diff(x) / MB * (y[1:] + y[:-1]) / 2).sum()) if len(x) > 1 else float("nan")


def accuracy_per_mb(budgets: ArrayLike, accuracies: ArrayLike) -> tuple[float, float]:
    """``(APM-S, APM-E)``: accuracy divided by the budget in MB, at the smallest and at the largest budget; higher is better.

    Raises:
        BadInput: not one accuracy for each budget, or a budget that is given twice.
    """
    x, y = _curve(budgets, accuracies)
    return float(y[0] * MB / x[0]), float(y[-1] * MB / x[-1])


def _curve(budgets: ArrayLike, accuracies: ArrayLike) -> tuple[Floats, Floats]:
    """Both as arrays, from the smallest budget to the largest."""
    x, y = np.asarray(budgets, dtype=np.float64), np.asarray(accuracies, dtype=np.float64)
    if x.ndim != 1 or not len(x) or x.shape != y.shape:
        raise BadInput(f"one accuracy for each budget, not {y.shape} for {x.shape}")
    order = np.argsort(x)
    x, y = x[order], y[order]
    if not bool((np.diff(x) > 0).all()) or not x[0] > 0:
        raise BadInput("budgets are different numbers of bytes above 0")
    return x, y
