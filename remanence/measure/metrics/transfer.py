"""What learning one task did to the others, by every published convention under a name of its own, and what is still learned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.measure import matrix as figures
from remanence.measure.metrics.accuracy import score_name
from remanence.train.roles import Metric
from remanence.train.update import Context


@dataclass
class Transfer(Metric):
    """Backward transfer, forward transfer and plasticity from the life's matrix R (events x tasks), l_j the row that learned task j.

        transfer/backward/gem    mean over j of R[k, j] - R[l_j, j],  k the last row                  (Lopez-Paz & Ranzato 2017)
        transfer/backward/diaz   mean over all j and all rows i > l_j of R[i, j] - R[l_j, j]          (Diaz-Rodriguez et al. 2018)
        transfer/remembering     1 - |min(backward/diaz, 0)|
        transfer/forward/gem     mean over j of R[l_j - 1, j] - random_j                              (Lopez-Paz & Ranzato 2017)
        transfer/forward/diaz    mean over all j and all rows i < l_j of R[i, j]                      (Diaz-Rodriguez et al. 2018)
        transfer/forward/alone   mean over j, the first left out, of R[l_j, j] - alone_j              (Wang et al. 2024)
        plasticity               mean over j of R[l_j, j]                                             (Riemer et al. 2019)
        plasticity/last          R[l_j, j] of the task learned last;  plasticity/last/lost  is  alone_j - R[l_j, j]

    Higher is better, but for ``lost``. What bears one name in two papers cannot be compared: one looks at the end, the other at the
    mean of the way. A figure that is not defined yet, or whose baseline is not given, is left out. A life measures a task from the
    event that learns it, so the two forward figures that look at tasks before they are learned need a matrix that was made
    elsewhere (`remanence.measure.matrix.forward_transfer`); where classes are new they would say nothing, for no column answers
    them yet. Where no matrix is at hand, the metric gives the figures that it gave last.

    Pick it to tell what forgetting hides: whether later tasks are still learned as well as a fresh network learns them. Needs: a test
    set per task, labels; for `alone` the accuracies of networks that learned one task only, which `compare` or lives of one task
    give. References: Lopez-Paz & Ranzato 2017, arXiv 1706.08840; Diaz-Rodriguez et al. 2018, arXiv 1810.13166; Wang et al. 2024,
    arXiv 2302.00487; Riemer et al. 2019, arXiv 1810.11910 (their learning accuracy). Deviation: rows that learn nothing, such as
    those of forget requests, count as rows too; the papers' matrices are square.
    """

    alone: list[float] = knob([], "accuracy of a fresh network that learned only this task, in the order of learning")
    random: list[float] = knob([], "accuracy of an untrained network on each task, in the order of learning")

    def setup(self) -> None:
        self.last: dict[str, float] = {}

    def value(self, c: Context) -> dict[str, float]:
        """
        Raises:
            BadInput: the problem has no accuracy, or a baseline has fewer figures than there are tasks.
        """
        if score_name(c) != "accuracy":
            raise BadInput(
                "transfer needs a problem with an accuracy, such as classification; take it out of `measure`"
            )
        if not c.matrix or not c.matrix[0]:
            return dict(self.last)
        r = np.asarray(c.matrix, dtype=np.float64)
        when = figures.learned_rows(r) if c.learned is None else np.asarray(c.learned, dtype=np.int64)
        alone, random = self._baseline("alone", r.shape[1]), self._baseline("random", r.shape[1])
        learned = list(when)
        there = np.flatnonzero(when < len(r))
        moment = np.full(r.shape[1], np.nan)
        moment[there] = r[when[there], there]
        rows = np.arange(len(r))[:, None]
        backward = _mean(np.where(rows > when, r - moment, np.nan))
        found = {
            "transfer/backward/gem": figures.backward_transfer(r, learned=learned),
            "transfer/backward/diaz": backward,
            "transfer/remembering": 1 - abs(min(backward, 0.0)) if not np.isnan(backward) else backward,
            "transfer/forward/diaz": _mean(np.where(rows < when, r, np.nan)),
            "plasticity": _mean(moment),
        }
        if len(random):
            found["transfer/forward/gem"] = figures.forward_transfer(r, random, learned)
        if len(alone):
            found["transfer/forward/alone"] = figures.forward_transfer(r, alone, learned, "single-task")
        if len(there):
            last = there[when[there].argmax()]
            found["plasticity/last"] = moment[last]
            if len(alone):
                found["plasticity/last/lost"] = alone[last] - moment[last]
        self.last = {name: float(value) for name, value in found.items() if not np.isnan(value)}
        return dict(self.last)

    def _baseline(self, name: str, tasks: int) -> figures.Floats:
        given = getattr(self, name)
        if given and len(given) < tasks:
            raise BadInput(f"transfer: {name} has {len(given)} figures for {tasks} tasks; give one for each")
        return np.asarray(given[:tasks], dtype=np.float64)


def _mean(values: ArrayLike) -> float:
    array = np.asarray(values, dtype=np.float64)
    there = array[~np.isnan(array)]
    return float(there.mean()) if len(there) else float("nan")
