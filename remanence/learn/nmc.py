"""Nearest class mean on frozen features: no training, no forgetting, and deletion by subtraction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch, Out
from remanence.nn.anatomy import evaluating, features
from remanence.nn.statistics import ClassStatistics
from remanence.train.roles import Learner, Step
from remanence.train.update import Context, Update


@dataclass
class NMC(Learner):
    """Predict the class whose mean feature is nearest.

        z = f(x) / |f(x)|        mu_c = sum_{y_i = c} z_i / n_c        argmin_c |z - mu_c| = argmax_c 2 z.mu_c - |mu_c|^2

    f is the input of the network's head, in eval mode, never trained. The means do not depend on the order or the cut
    of the stream. After a forget the retained examples are counted afresh, so the means are those of a life without
    the deleted ones (float64 sums; to 1e-10).

    Pick it first, with any pretrained backbone: what it cannot beat is not worth its cost. Needs: labels.
    Reference: Janson et al. 2022, "A Simple Baseline that Questions the Use of Pretrained-Models in Continual
    Learning", arXiv 2210.04428. As in the reference code, means are not normalised again unless ``metric="cosine"``.
    """

    moves_weights: ClassVar[bool] = False

    metric: str = knob("euclidean", "cosine also normalises the means", choices=("euclidean", "cosine"))
    normalise: bool = knob(True, "divide every feature by its norm")

    def setup(self) -> None:
        self.statistics = ClassStatistics()

    def structure(self, u: Update) -> dict[str, Any]:
        return {}

    def steps(self, u: Update, batch: Batch) -> Iterator[Step]:
        if u.epoch < u.sweep:
            with evaluating(u.model):
                self._add(u, batch)
        yield Step(None)

    def _features(self, c: Context, x: Tensor) -> Tensor:
        z = features(c.model, x)
        return F.normalize(z, dim=1) if self.normalise else z

    def _add(self, c: Context, batch: Batch) -> None:
        self.statistics.add(self._features(c, batch["x"]), batch["y"], batch["id"])

    def predict(self, c: Context, batch: Batch) -> Out:
        z = self._features(c, batch["x"])
        labels = self.statistics.labels
        logits = z.new_full((len(z), max([c.columns, *[label + 1 for label in labels]])), -torch.inf)
        if labels:
            means = self.statistics.means().to(z)
            means = F.normalize(means, dim=1) if self.metric == "cosine" else means
            logits[:, labels] = 2 * z @ means.T - means.square().sum(1)
        return Out(logits)

    def forgot(self, u: Update, ids: Ids) -> None:
        """Count afresh over what is retained: exact for any backbone, whose weights may have changed."""
        self.statistics = ClassStatistics()
        with evaluating(u.model):
            for examples in u.history():
                for batch in u.batches(examples):
                    self._add(u, batch)
