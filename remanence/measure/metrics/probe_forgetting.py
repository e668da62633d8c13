"""How much of what the features said of a task is gone, as against what the head no longer says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Classification
from remanence.core.rng import generator
from remanence.data import Examples
from remanence.nn.anatomy import features
from remanence.train.roles import Metric
from remanence.train.update import Context

Floats = NDArray[np.float64]


@dataclass
class ProbeForgetting(Metric):
    """Accuracy of a linear probe on the frozen features of each task, now against right after the task was learned.

        LP_kj = accuracy on the test rows of task j of a logistic regression, among the classes of j, that was fitted on the head's
                inputs for its training rows, with the network after event k
        probe_k = mean over j of LP_kj        probe-forgetting_k = mean over tasks j learned before of  LP_{l_j, j} - LP_kj

    Both lie in [0, 1] and [-1, 1]; higher and lower is better. A network may answer nothing of an old task while a probe reads all of
    it: then the head was overwritten and the features were not. The probe needs the old training rows, so it says what could be
    recovered with them, and is no figure of what a life answers. It is fitted on standardised features with scikit-learn's penalty
    C = 1. Rows forgotten on request are left out; a task that has lost a class since, or has one class only, is left out too, for
    its probes have no common scale. What is lost is counted from the first measurement that the metric made of a task.

    It keeps one number and the labels of each task. Pick it beside `forgetting`: the difference of the two is what a better head
    would win. Needs: classes, a head with inputs, training and test rows per task.
    Reference: Davari et al. 2022, "Probing Representation Forgetting in Supervised and Unsupervised Continual Learning", arXiv
    2203.13381. Deviations: there the probe is trained by SGD on all rows; here it is fitted to its optimum on at most `subset`.
    """

    subset: int = knob(500, "training rows per task that a probe is fitted on, the same ones each time", low=4)

    def setup(self) -> None:
        self.first: list[list[float]] = []  # task, accuracy of the probe, and the labels it told apart

    def value(self, c: Context) -> dict[str, float]:
        """
        Raises:
            BadInput: the problem has no classes.
        """
        if not isinstance(c.problem, Classification):
            raise BadInput("probe-forgetting needs classes; take it out of `measure`")
        known = {int(task): (accuracy, labels) for task, accuracy, *labels in self.first}
        now: dict[int, float] = {}
        lost: dict[int, float] = {}
        for task in c.tasks:
            labels = [float(y) for y in task.test["y"].unique()]
            inside = torch.isin(task.train["y"], task.test["y"].unique()).nonzero()[:, 0]
            train = fixed_rows(task.train.select(inside).without(c.forgotten), self.subset)
            if len(labels) < 2 or [float(y) for y in train["y"].unique()] != labels:
                continue
            accuracy = probe_accuracy(
                self._features(c, train), train["y"], self._features(c, task.test), task.test["y"]
            )
            if task.id not in known:
                known[task.id] = (accuracy, labels)
                self.first.append([float(task.id), accuracy, *labels])
            elif known[task.id][1] == labels:
                lost[task.id] = known[task.id][0] - accuracy
            else:
                continue
            now[task.id] = accuracy
        found = {f"probe/{task}": value for task, value in now.items()}
        found |= {f"probe-forgetting/{task}": value for task, value in lost.items()}
        if now:
            found["probe"] = sum(now.values()) / len(now)
        if lost:
            found["probe-forgetting"] = sum(lost.values()) / len(lost)
        return found

    @staticmethod
    def _features(c: Context, examples: Examples) -> Floats:
        with c.aside(), torch.no_grad():
            parts = [features(c.model, batch["x"]) for batch in c.batches(examples, 1024)]
        return torch.cat(parts).double().cpu().numpy()


def probe_accuracy(x: Floats, y: torch.Tensor, test_x: Floats, test_y: torch.Tensor) -> float:
    """Share of `test_x` (M, D) that a logistic regression fitted on `x` (N, D) answers rightly; columns standardised by `x`."""
    from sklearn.linear_model import LogisticRegression

    mean, sd = x.mean(axis=0), x.std(axis=0)
    sd = np.where(sd > 0, sd, 1.0)
    made = LogisticRegression(max_iter=1000).fit((x - mean) / sd, y.numpy())
    return float((made.predict((test_x - mean) / sd) == test_y.numpy()).mean())


def fixed_rows(examples: Examples, size: int) -> Examples:
    """At most `size` of `examples`, always the same ones, of every label equally many as far as they go."""
    y = examples["y"]
    order = torch.randperm(len(examples), generator=generator(0, "probe", len(examples)))
    rank = torch.empty(len(y), dtype=torch.int64)
    for label in y.unique():
        mine = order[y[order] == label]
        rank[mine] = torch.arange(len(mine))
    return examples.select(rank.argsort(stable=True)[:size].sort().values)
