"""How much of the best a task once reached is gone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from remanence.core.errors import BadInput
from remanence.measure import matrix as figures
from remanence.measure.metrics.accuracy import score_name, task_scores
from remanence.train.roles import Metric
from remanence.train.update import Context


@dataclass
class Forgetting(Metric):
    """Forgetting, backward transfer (both conventions) and average incremental accuracy; see
    `remanence.measure.matrix` for all formulas and sources.

        F_k = mean over tasks j < k of  max_{i < k} a_{i,j} - a_{k,j}

    It keeps one row of task accuracies per measurement; where the life offers its own matrix (``c.matrix``, events x
    tasks; ``c.learned`` the row in which each task was learned), that is used. A figure that is not defined yet is
    left out.

    Pick it beside `accuracy`: one of them hides what the other shows. Needs: a test set per task, labels.
    References: Chaudhry et al. 2018, arXiv 1801.10112; Lopez-Paz & Ranzato 2017, arXiv 1706.08840.
    """

    def setup(self) -> None:
        self.rows: list[list[list[float]]] = []  # per measurement, [task, accuracy] pairs

    def value(self, c: Context) -> dict[str, float]:
        """
        Raises:
            BadInput: the problem has no accuracy.
        """
        if c.matrix is not None and score_name(c) == "accuracy":
            return self._figures(figures.summary(c.matrix, learned=c.learned))
        if score_name(c) != "accuracy":
            raise BadInput(
                "forgetting needs a problem with an accuracy, such as classification; take it out of `measure`"
            )
        row = [[float(task), value] for task, value in task_scores(c).items()]
        if row and (not self.rows or self.rows[-1] != row):  # measured twice without an event between: one row
            self.rows.append(row)
        if not self.rows:
            return {}
        tasks = sorted({int(task) for each in self.rows for task, _ in each})
        table = np.full((len(self.rows), len(tasks)), np.nan)
        for at, each in enumerate(self.rows):
            for task, value in each:
                table[at, tasks.index(int(task))] = value
        # only tasks seen are measured, so a first figure is the moment of learning
        first = (~np.isnan(table)).argmax(axis=0)
        return self._figures(figures.summary(table, learned=first.tolist()))

    def _figures(self, found: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in found.items() if name != "average_accuracy"}  # `accuracy` says it
