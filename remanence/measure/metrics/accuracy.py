"""Accuracy (or mean squared error) on every task seen so far."""

from __future__ import annotations

from dataclasses import dataclass

from remanence.train.roles import Metric
from remanence.train.update import Context


@dataclass
class Accuracy(Metric):
    """Accuracy on each task's test set, ``accuracy/<task>``, and their mean over tasks, ``accuracy``.

        AA_k = 1/k sum_{j<=k} a_{k,j}

    In [0, 1], higher is better. A regression has no accuracy: its figures are ``mse/<task>`` and ``mse``, lower is
    better. A task without test examples (all forgotten) is left out.

    Pick it always: it is the figure that every other is read beside. Needs: a test set per task, labels or targets.
    Reference: Wang et al. 2024, "A Comprehensive Survey of Continual Learning", arXiv 2302.00487.
    """

    def value(self, c: Context) -> dict[str, float]:
        found = task_scores(c)
        name = score_name(c)
        figures = {f"{name}/{task}": value for task, value in found.items()}
        return {name: sum(found.values()) / len(found), **figures} if found else {}


def task_scores(c: Context) -> dict[int, float]:
    """Task id to accuracy, or to mean squared error where the problem has no accuracy."""
    scores = {task.id: c.evaluate(task.test) for task in c.tasks if len(task.test)}
    return {task: found.get("accuracy", found.get("mse", float("nan"))) for task, found in scores.items()}


def score_name(c: Context) -> str:
    """``mse`` for a regression, else ``accuracy``."""
    from remanence.core.problem import Regression

    return "mse" if isinstance(getattr(c, "problem", None), Regression) else "accuracy"
