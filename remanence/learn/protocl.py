"""Classes as Gaussians in feature space, with a posterior over every mean: counting in place of weights' posteriors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch, Out
from remanence.data import Examples, cat
from remanence.learn.frozen import check_alone, check_labels, featured
from remanence.nn.anatomy import features, head
from remanence.nn.buffer import Buffer
from remanence.nn.statistics import ClassStatistics
from remanence.train.roles import Learner
from remanence.train.update import Consumed, Context, Update


@dataclass
class ProtoCL(Learner):
    """A generative classifier: conjugate Gaussian class means over the features, in closed form, and an encoder kept fit by replay.

        f(x) | y ~ N(mu_y, s2 I)    mu_y ~ N(0, I / precision)    L_y = precision + n_y / s2    m_y = sum_{y_i = y} f(x_i) / (s2 L_y)
        v_y = s2 + 1 / L_y    score_y = -1/2 [ |f(x) - m_y|^2 / v_y + D log v_y + D log 2 pi ] + log a_y    a_y: the class's prior

    The scores are log p(f(x), y), and their softmax is the posterior of the class. ``encoder="frozen"``: nothing is trained or kept
    but the counts and sums, so the order and the cut of the stream do not matter and a removed row leaves what a life without
    it would have (float64 sums); with many rows and even classes it is `nmc` that knows how sure it is. ``encoder="trained"``: each
    event trains the network by the cross-entropy of the scores on its rows and the memory's, m and v fixed within an epoch;
    then the sums are counted afresh over both. The head's rows are then set to the same classifier with the mean of all v in each
    class's place, which is linear, so that methods which look at the network see about what the life answers.

    Pick it, frozen, with a pretrained network where answers must say how sure they are. Trained, it wants a memory of hundreds of
    rows: on digits, `replay` beside `finetune` was about as good with 200 rows and better with 50 (0.84 to 0.90, here 0.65 to 0.82).
    Needs: labels; for a trained encoder some old examples. After a forget everything is counted afresh.
    Reference: Kessler et al. 2023, "On Sequential Bayesian Inference for Continual Learning", arXiv 2301.01828. Deviations: the paper
    adds every batch of every epoch to the posterior, so a row counts once per epoch under encoders that are gone, and so do test rows
    in its code; here the sums are those of one encoder. The memory is shared by all classes, where the paper keeps 1000 rows of each
    task; s2 and the prior are not trained.
    """

    moves_weights: ClassVar[bool] = False  # a life sees by itself that an event moved them
    stores: ClassVar[tuple[str, ...]] = ("memory",)

    encoder: str = knob(
        "trained", "train the network at each event, or leave it as it is", choices=("trained", "frozen")
    )
    variance: float = knob(0.05, "s2: of a feature around its class's mean", low=1e-12)
    precision: float = knob(1.0, "of the prior of every class mean, around 0", low=1e-12)
    prior: str = knob("uniform", "of the classes: all alike, or as often as they came", choices=("uniform", "counts"))
    memory: int = knob(1000, "examples kept in all, evenly by class, for a trained encoder", low=0)

    def setup(self) -> None:
        self.statistics = ClassStatistics()
        self.buffer = Buffer(self.memory, None, "class-balanced")

    def structure(self, u: Update) -> dict[str, Any]:
        return super().structure(u) if self.encoder == "trained" else {}

    def begin(self, u: Update) -> None:
        check_labels(u, self.slug)
        if self.encoder == "frozen":
            check_alone(u, self.slug)

    def learn(self, u: Update) -> None:
        task = u.data("task")
        if self.encoder == "frozen":
            self._count(u, [task])
            u.consumed = Consumed(task.ids)
            return
        u.ask_features()
        u.run(data=self._rows(u))
        taken = u.consumed.settle()
        u.consumed = Consumed(task.ids, taken.replayed | (taken.new - task.ids))
        self._recount(u, self._rows(u))
        for batch in u.batches(task):
            rows = {name: batch[name] for name in ("x", "y", "id")}
            self.buffer.add(rows, u.rng("protocl"))
        self._show(u)

    def order(self, u: Update, index: Any) -> Any:
        """Each epoch learns with the posterior of the encoder at its start."""
        if u.kind == "learn" and u.phase == "":
            self._recount(u, self._rows(u))
        return index

    def objective(self, u: Update, batch: Batch) -> Tensor:
        z = u.out(batch, features=True).features
        assert z is not None
        return F.cross_entropy(self._scores(z, u.columns), batch["y"])

    def predict(self, c: Context, batch: Batch) -> Out:
        return Out(self._scores(features(c.model, batch["x"]), c.columns))

    def derived(self) -> bool:
        """The sums hold what the network held that gave the features, beside the rows that they count."""
        return bool(self.statistics.labels)

    def forgot(self, u: Update, ids: Ids) -> None:
        self.statistics = ClassStatistics()
        self._count(u, u.history())

    def posterior(self, labels: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """(classes, D) means m and (classes,) precisions L of the class means."""
        precision = self.precision + self.statistics.counts(labels).to(torch.float64) / self.variance
        return self.statistics.sums(labels) / (self.variance * precision[:, None]), precision

    def _scores(self, z: Tensor, columns: int) -> Tensor:
        """(N, columns) log p(z, y) in float32; -inf for columns without rows."""
        labels, z = self.statistics.labels, z.to(torch.float64)
        found = z.new_full((len(z), max([columns, *[label + 1 for label in labels]])), -torch.inf)
        if labels:
            means, spread, prior = (t.to(z.device) for t in self._terms())
            squares = (z[:, None] - means).square().sum(2)
            width = z.shape[1] * (spread.log() + math.log(2 * math.pi))
            found = found.index_copy(1, torch.tensor(labels, device=z.device), prior - 0.5 * (squares / spread + width))
        return found.to(torch.float32)

    def _terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """m, v and log a of the classes that have rows."""
        means, precision = self.posterior()
        counts = self.statistics.counts().to(torch.float64)
        even = torch.ones_like(counts) if self.prior == "uniform" else counts + 1
        return means, self.variance + 1 / precision, (even / even.sum()).log()

    def _rows(self, u: Update) -> Examples:
        """The event's rows and the memory's."""
        task, held = u.data("task"), self.buffer.columns
        if not len(self.buffer):
            return task
        old = Examples({name: held[name].clone() for name in ("x", "y")}, "memory", held["id"].clone())
        return cat([task, old.without(task.ids)])

    def _count(self, u: Update, parts: list[Examples]) -> None:
        for examples in parts:
            if len(examples):
                rows = featured(u, examples)
                self.statistics.add(rows["x"], rows["y"], rows.id)

    def _recount(self, u: Update, rows: Examples) -> None:
        self.statistics = ClassStatistics()
        self._count(u, [rows])

    @torch.no_grad()
    def _show(self, u: Update) -> None:
        """Set the head to the scores with one v for all classes, less what all classes share."""
        means, spread, prior = self._terms()
        layer, labels, width = head(u.model), self.statistics.labels, spread.mean()
        assert isinstance(layer, nn.Linear)
        layer.weight[labels] = (means / width).to(layer.weight)
        if layer.bias is not None:
            layer.bias[labels] = (prior - 0.5 * means.square().sum(1) / width).to(layer.bias)
