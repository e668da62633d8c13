"""Figures of a whole life from its accuracy matrix.

The matrix R has one row per event and one column per task: ``R[k, j]`` is the accuracy on task j after event k, in
[0, 1]. NaN says that there is no
figure: the task was not seen yet, or has been forgotten on request, and then it counts in no mean of that row. Events
that learn no task (a forget request) have rows like any other.

`learned` gives for each task the row after which it had been learned. None: the first row with a figure, or, in a
square matrix without NaN (figures on unseen tasks above the diagonal, as GEM lays it out), row j for task j. Pass it
wherever unseen tasks were measured in any other layout. `at` is the row that is looked at, by default the last. A
figure that is not defined (forgetting after one event) is NaN, never 0.

Terms after Wang et al., "A Comprehensive Survey of Continual Learning", TPAMI 2024, arXiv 2302.00487; where the
literature has several conventions, each has its name here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from remanence.core.errors import BadInput

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


def average_accuracy(matrix: ArrayLike, at: int = -1, learned: Sequence[int] | None = None) -> float:
    """``AA_k = mean over tasks j learned by row k of R[k, j]``.

    Range [0, 1]; higher is better. Every task weighs the same, whatever the size of its test set. Source: Wang et al.
    2024; Lopez-Paz & Ranzato 2017 (arXiv 1706.08840) call it ACC.
    """
    r, when = _read(matrix, learned)
    k = _row(r, at)
    return _mean(r[k, when <= k])


def average_incremental_accuracy(matrix: ArrayLike, at: int = -1, learned: Sequence[int] | None = None) -> float:
    """``AIA_k = mean over rows i <= k of AA_i``.

    Range [0, 1]; higher is better. Rows without any figure are left out. It is a mean over time: never report it as
    final accuracy.
    Source: Rebuffi et al. 2017 (iCaRL, arXiv 1611.07725); Wang et al. 2024.
    """
    r, when = _read(matrix, learned)
    return _mean(np.array([_mean(r[i, when <= i]) for i in range(_row(r, at) + 1)]))


def forgetting_per_task(matrix: ArrayLike, at: int = -1, learned: Sequence[int] | None = None) -> Floats:
    """``f_j = max over rows i, learned_j <= i < k, of R[i, j]  -  R[k, j]``, shape (tasks,); NaN for tasks that
    `forgetting` leaves out."""
    r, when = _read(matrix, learned)
    k = _row(r, at)
    return np.asarray(_best(r, when, k) - r[k])


def forgetting(matrix: ArrayLike, at: int = -1, learned: Sequence[int] | None = None) -> float:
    """``FM_k = mean over tasks j learned before row k of  max_{i < k} R[i, j] - R[k, j]``.

    Range [-1, 1]; lower is better, negative says that the task has never been better than now. The maximum runs over
    the rows from the one in which
    the task was learned: what a model scores on a task that it never saw is not knowledge it can forget (the source
    starts at the first row).
    Source: Chaudhry et al. 2018 (Riemannian Walk, arXiv 1801.10112).
    """
    return _mean(forgetting_per_task(matrix, at, learned))


def backward_transfer(
    matrix: ArrayLike, at: int = -1, learned: Sequence[int] | None = None, convention: Literal["gem", "best"] = "gem"
) -> float:
    """What later events did to earlier tasks; range [-1, 1]; higher is better.

    ``gem``: mean over tasks j learned before row k of ``R[k, j] - R[learned_j, j]``, against the moment of learning
    (Lopez-Paz & Ranzato 2017, arXiv 1706.08840). ``best``: of ``R[k, j] - max_{i < k} R[i, j]``, against the best
    ever; this is ``-forgetting`` and never above the first.
    """
    r, when = _read(matrix, learned)
    k = _row(r, at)
    if convention == "best":
        return _mean(r[k] - _best(r, when, k))
    if convention != "gem":
        raise BadInput(f"convention={convention!r} is not 'gem' or 'best'")
    before = when < k
    return _mean(r[k, before] - r[when[before], np.flatnonzero(before)])


def forward_transfer(
    matrix: ArrayLike,
    baseline: ArrayLike | None = None,
    learned: Sequence[int] | None = None,
    convention: Literal["gem", "zero-shot", "single-task"] = "gem",
) -> float:
    """What earlier events did for later tasks; higher is better. Three figures that bear this one name and cannot be
    compared with each other:

    ``gem``: mean over tasks j, the first left out, of ``R[learned_j - 1, j] - b_j``, b_j the accuracy of the freshly
    initialised network on task j (Lopez-Paz & Ranzato 2017); range [-1, 1].
    ``zero-shot``: the same without a baseline, mean of ``R[learned_j - 1, j]``, the accuracy on the next task before
    it is learned; range [0, 1].
    ``single-task``: mean of ``R[learned_j, j] - b_j``, b_j the accuracy of a network trained on task j alone (Wang et
    al. 2024); range [-1, 1].

    The first two need figures on tasks not seen yet, so `learned` must be given unless the matrix is square and full.

    Raises:
        BadInput: the convention needs `baseline` (tasks,) and has none, or `learned` leaves no earlier row with a
        figure to look at.
    """
    r, when = _read(matrix, learned)
    if convention not in ("gem", "zero-shot", "single-task"):
        raise BadInput(f"convention={convention!r} is not 'gem', 'zero-shot' or 'single-task'")
    b = np.zeros(r.shape[1])
    if convention != "zero-shot":
        if baseline is None:
            raise BadInput(f"convention={convention!r} needs a baseline accuracy for each task")
        b = np.asarray(baseline, dtype=np.float64)
        if b.shape != (r.shape[1],):
            raise BadInput(f"baseline has shape {b.shape} for {r.shape[1]} tasks")
    later = np.flatnonzero((when > 0) & (when < len(r)))
    row = when[later] if convention == "single-task" else when[later] - 1
    return _mean(r[row, later] - b[later])


def intransigence(matrix: ArrayLike, joint: float, task: int, learned: Sequence[int] | None = None) -> float:
    """``IM_k = a*_k - R[learned_k, k]``, a*_k the accuracy on task k of a network trained on the tasks up to k
    together.

    Range [-1, 1]; lower is better. Source: Chaudhry et al. 2018 (arXiv 1801.10112).
    """
    r, when = _read(matrix, learned)
    return float(joint - r[when[task], task]) if when[task] < len(r) else float("nan")


def omega(matrix: ArrayLike, ideal: ArrayLike, learned: Sequence[int] | None = None) -> dict[str, float]:
    """What is left of an offline learner's accuracy, as means over the rows t that learned a task, the first left out:

    ``omega_base``: of ``R[t, base] / ideal``, base the task that was learned first; ``omega_new``: of the accuracy on the
    task that row t learned; ``omega_all``: of ``AA_t / ideal``.

    `ideal` is the accuracy of a network that learned everything at once: one figure, or one for each row (events,), of
    the tasks up to there, and then an offline learner has 1 throughout. Higher is better; 1 can be exceeded. Every
    task weighs the same; the source counts all test rows of the classes seen, which is the same for tests of one size.
    Source: Kemker et al. 2018, arXiv 1708.02072; with an ideal for each row: Hayes et al. 2019, arXiv 1809.05922.

    Raises:
        BadInput: `ideal` is neither one figure nor one for each row.
    """
    r, when = _read(matrix, learned)
    try:
        best = np.broadcast_to(np.asarray(ideal, dtype=np.float64), (len(r),))
    except ValueError:
        raise BadInput(
            f"ideal has shape {np.shape(ideal)}; give one accuracy, or one for each of {len(r)} rows"
        ) from None
    rows = np.unique(when[when < len(r)])[1:]
    base, new = int(when.argmin()), when[:, None] == rows
    news = np.array([_mean(r[t, new[:, i]]) for i, t in enumerate(rows)])
    every = np.array([average_accuracy(r, int(t), when.tolist()) for t in rows])
    return {
        "omega_base": _mean(r[rows, base] / best[rows]),
        "omega_new": _mean(news),
        "omega_all": _mean(every / best[rows]),
    }


def global_forgetting(matrix: ArrayLike, sizes: ArrayLike, learned: Sequence[int] | None = None) -> float:
    """``F_G = 1/(N-1) sum_{i=2..N} sum_{n<i} |T_n| / |T_1..i| (R[n, n] - R[i, n])``, N tasks in the order in which
    they were learned.

    `sizes` (tasks,) are |T_n|, the examples of each task; row n is the one after task n was learned. In a
    class-incremental matrix R[i, n] is an answer among the classes of tasks 1..i, so a part of F_G is the growing
    choice and no loss of knowledge. Range [-1, 1]; lower is better. Tasks without a figure in row i (forgotten on
    request) leave the sum and the weights of that row.
    Source: Smith et al. 2023, arXiv 2203.17269.
    """
    r, when = _read(matrix, learned)
    size = np.asarray(sizes, dtype=np.float64)
    if size.shape != (r.shape[1],) or not bool((size > 0).all()):
        raise BadInput(f"sizes must be {r.shape[1]} positive numbers, one per task")
    order = np.array([j for j in np.argsort(when, kind="stable") if when[j] < len(r)], dtype=np.int64)
    terms = []
    for i in range(1, len(order)):
        row, old = when[order[i]], order[:i]
        there = old[~np.isnan(r[row, old])]
        drops = r[when[there], there] - r[row, there]
        terms.append(float((size[there] * drops).sum() / (size[there].sum() + size[order[i]])))
    return _mean(np.array(terms))


def summary(matrix: ArrayLike, at: int = -1, learned: Sequence[int] | None = None) -> dict[str, float]:
    """The figures that need nothing but the matrix, by name; those not defined are left out."""
    found: dict[str, Any] = {
        "average_accuracy": average_accuracy(matrix, at, learned),
        "average_incremental_accuracy": average_incremental_accuracy(matrix, at, learned),
        "forgetting": forgetting(matrix, at, learned),
        "backward_transfer_gem": backward_transfer(matrix, at, learned, "gem"),
        "backward_transfer_best": backward_transfer(matrix, at, learned, "best"),
    }
    return {name: value for name, value in found.items() if not np.isnan(value)}


def learned_rows(matrix: ArrayLike) -> Rows:
    """For each task the row after which it had been learned, as far as the matrix itself tells (tasks,); len(R) for a
    task without figures."""
    r = np.asarray(matrix, dtype=np.float64)
    there = ~np.isnan(r)
    if r.shape[0] == r.shape[1] and bool(there.all()):
        return np.arange(len(r))
    return np.where(there.any(axis=0), there.argmax(axis=0), len(r)).astype(np.int64)


def _read(matrix: ArrayLike, learned: Sequence[int] | None) -> tuple[Floats, Rows]:
    r = np.asarray(matrix, dtype=np.float64)
    if r.ndim != 2 or not r.size:
        raise BadInput(f"the accuracy matrix must be (events, tasks), got shape {r.shape}")
    if learned is None:
        return r, learned_rows(r)
    when = np.asarray(learned, dtype=np.int64)
    if when.shape != (r.shape[1],) or bool((when < 0).any()):
        raise BadInput(f"learned must be {r.shape[1]} row numbers, one per task, from 0")
    return r, when


def _row(r: Floats, at: int) -> int:
    if not -len(r) <= at < len(r):
        raise BadInput(f"there are rows 0 to {len(r) - 1}, not {at}")
    return at % len(r)


def _best(r: Floats, when: Rows, k: int) -> Floats:
    """The best figure of each task from the row it was learned in to the one before k; NaN where there is none."""
    rows = np.arange(len(r))[:, None]
    window = np.where((rows >= when) & (rows < k) & ~np.isnan(r), r, -np.inf)
    best = window.max(axis=0)
    return np.where(np.isfinite(best), best, np.nan)


def _mean(values: Floats) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else float("nan")
