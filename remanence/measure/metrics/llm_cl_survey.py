"""The evaluation protocol of a survey on the continual learning of language models: from a life's matrix, and from scores on suites."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.measure import matrix as figures
from remanence.measure.matrix import Floats
from remanence.measure.metrics.accuracy import score_name
from remanence.train.roles import Metric
from remanence.train.update import Context


@dataclass
class LLMSurvey(Metric):
    """Overall performance, backward transfer, forgetting and forward transfer, from the life's matrix R (events x tasks), l_j the row
    that learned task j and k the last row.

        llm/op    mean over tasks j seen of R[k, j]
        llm/bwt   mean over tasks j learned before k of R[k, j] - R[l_j, j]                   against the moment of learning
        llm/f     mean over tasks j learned before k of max_{l_j <= i < k} R[i, j] - R[k, j]  against the best ever
        llm/fwt   mean over j, the first left out, of R[l_j - 1, j] - initial_j               initial: the starting model

    Of a language model R holds the share of target tokens that are predicted. Of an error, such as that of a regression, the sign is
    turned before the differences, so in every problem a negative ``bwt`` and a positive ``f`` say that something was lost; ``op``
    has its own unit. ``f`` is never below ``-bwt``. A figure that is not defined is left out: a life measures a task from the event
    that learns it, so ``fwt`` needs a matrix that was made elsewhere. Where no matrix is at hand, the metric gives what it gave last.

    Figures that need other suites than the tasks are functions here: `ability_delta` (what TRACE calls GAD, IFD and SD, by the suite)
    and `fuar` (what was forgotten for what was gained).

    Pick it to write a life of a language model down in the words of that literature; `forgetting` and `transfer` give more
    conventions. Needs: a test set per task, labels.
    Reference: Shi et al. 2025, "Continual Learning of Large Language Models: A Comprehensive Survey", ACM Computing Surveys, arXiv
    2404.16789. Reconstructed: the survey's structure is from its abstract, the formulas are the usual ones of Chaudhry et al. 2018
    (arXiv 1801.10112) and Lopez-Paz & Ranzato 2017 (arXiv 1706.08840), Wang et al. 2023 (TRACE, arXiv 2310.06762) and Jang et al.
    2022 (FUAR, arXiv 2110.03215). Deviation: rows that learn nothing, such as those of forget requests, count as rows, too.
    """

    initial: list[float] = knob([], "score of the starting model on each task, in the order of learning")

    def setup(self) -> None:
        self.last: dict[str, float] = {}

    def value(self, c: Context) -> dict[str, float]:
        """
        Raises:
            BadInput: `initial` has fewer figures than there are tasks.
        """
        if c.matrix and c.matrix[0]:
            found = protocol(c.matrix, self.initial or None, c.learned, lower=score_name(c) == "mse")
            self.last = {f"llm/{name}": value for name, value in found.items() if not np.isnan(value)}
        return dict(self.last)


def protocol(
    matrix: ArrayLike,
    initial: ArrayLike | None = None,
    learned: list[int] | None = None,
    at: int = -1,
    lower: bool = False,
) -> dict[str, float]:
    """``{"op", "bwt", "f", "fwt"}`` of a matrix (events, tasks) of scores; NaN where one is not defined, see `LLMSurvey`.

    Args:
        initial: (tasks,) the scores of the starting model, not chance; None: no ``fwt``.
        learned: for each task the row that learned it; as in `remanence.measure.matrix`.
        lower: lower scores are better, as of perplexities.

    Raises:
        BadInput: fewer initial scores than tasks, or what `remanence.measure.matrix` refuses.
    """
    r = np.asarray(matrix, dtype=np.float64)
    sign = -1.0 if lower else 1.0
    turned = sign * r
    found = {
        "op": figures.average_accuracy(r, at, learned),
        "bwt": figures.backward_transfer(turned, at, learned),
        "f": figures.forgetting(turned, at, learned),
        "fwt": float("nan"),
    }
    if initial is not None:
        start = np.asarray(initial, dtype=np.float64)
        if len(start) < r.shape[1]:
            raise BadInput(f"llm-cl-survey: initial has {len(start)} figures for {r.shape[1]} tasks; give one for each")
        rows = figures.learned_rows(r).tolist() if learned is None else learned
        found["fwt"] = figures.forward_transfer(turned[: at % len(r) + 1], sign * start[: r.shape[1]], rows)
    return found


def ability_delta(scores: ArrayLike, at: int = -1, lower: bool = False) -> float:
    """``mean over suites m of G[t, m] - G[0, m]``, t the row `at` and row 0 the starting model, of scores (stages + 1, suites).

    Over suites of general ability it is TRACE's GAD, over instruction following its IFD, over safety its SD. Negative: the ability
    shrank. `lower`: lower scores are better, as of perplexities; the sign is turned. A suite without a figure (NaN) in either row is
    left out; without any it is NaN. Source: Wang et al. 2023, TRACE, arXiv 2310.06762.

    Raises:
        BadInput: not a table, or no such row.
    """
    g = np.asarray(scores, dtype=np.float64)
    if g.ndim != 2 or not g.size:
        raise BadInput(f"scores must be (stages + 1, suites), got shape {g.shape}")
    if not -len(g) <= at < len(g):
        raise BadInput(f"there are rows 0 to {len(g) - 1}, not {at}")
    change = (g[at] - g[0]) * (-1 if lower else 1)
    there = change[~np.isnan(change)]
    return float(there.mean()) if len(there) else float("nan")


def fuar(invariant: ArrayLike, updated: ArrayLike = (), new: ArrayLike = (), lower: bool = False) -> float:
    """What was forgotten for each fact that was updated or acquired.

        FUAR = sum max(0, F_before - F_after) / ( sum max(0, U_after - U_before) + sum max(0, A_after - A_before) )

    Each argument is the score before and after, or one such pair for each stage: on facts that should stand (F), on those that
    changed (U), on those that are new (A); one of the last two may be empty. 0 is best, at 1 one is forgotten for each that is gained.
    NaN says that there was no gain to set against, whatever was forgotten. `lower`: lower scores are better. Source: Jang et al.
    2022, "Towards Continual Knowledge Learning of Language Models", arXiv 2110.03215.

    Raises:
        BadInput: scores that are no pairs.
    """
    sign = -1.0 if lower else 1.0
    lost = np.maximum(0, -sign * _gains("invariant", invariant)).sum()
    gained = sum(
        np.maximum(0, sign * _gains(name, pairs)).sum() for name, pairs in (("updated", updated), ("new", new))
    )
    return float(lost / gained) if gained > 0 else float("nan")


def _gains(name: str, pairs: ArrayLike) -> Floats:
    table = np.asarray(pairs, dtype=np.float64)
    if table.size == 0:
        return np.zeros(0)
    if table.ndim == 1:
        table = table[None]
    if table.ndim != 2 or table.shape[1] != 2:
        raise BadInput(
            f"fuar: {name} must be (before, after), or one such pair for each stage, got shape {table.shape}"
        )
    return np.asarray(table[:, 1] - table[:, 0])
