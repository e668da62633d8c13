"""Hold each weight as firmly as the old tasks needed it."""

from __future__ import annotations

from dataclasses import dataclass

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.data import Examples
from remanence.nn.anchor import QuadraticAnchor
from remanence.nn.fisher import diagonal_fisher
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class EWC(Keeper):
    """Online elastic weight consolidation: one anchor and one stiffness for all tasks so far.

        L + strength / 2 * sum_j F_j (theta_j - theta*_j)^2        F <- decay * F + F_t,    theta* = weights after task t

    F_t is the diagonal Fisher information of task t: the mean over examples of the squared gradient of log p(y | x), per
    example and so independent of the batch size (the EWC of common libraries squares batch gradients instead). The
    penalty's gradient is added in closed form, at a cost that does not depend on the number of tasks. An example of text is
    a row, whose log p is the mean over its targets: a long answer weighs as much as a short one. Parameters that the network
    itself holds frozen, as the weights under adapters of peft, are neither measured nor stored.

    Pick it where no old example may be kept and the network starts from scratch with task-wise heads; in class-incremental
    lives it hardly helps by itself (Smith et al. 2023). Needs: labels, borders.
    After a forget it is rebuilt: Fisher and anchor come from the new weights and the retained data.
    References: Kirkpatrick et al. 2017, arXiv 1612.00796; online form: Schwarz et al. 2018, arXiv 1805.06370.
    """

    strength: float = knob(100.0, "weight of the penalty", low=0)
    decay: float = knob(1.0, "share of the old Fisher that stays when a task is added", low=0, high=1)
    fisher: str = knob(
        "empirical",
        "whose labels: the data's, or all of the model's own, weighted (no text)",
        choices=("empirical", "exact"),
    )

    def setup(self) -> None:
        self.anchor = QuadraticAnchor({}, {}, strength=self.strength, half=True)

    def gradient(self, u: Update) -> None:
        self.anchor.add_gradient(u.parameters)

    def end(self, u: Update) -> None:
        if u.kind == "learn":
            self._consolidate(u, u.data("task"))

    def _consolidate(self, u: Update, examples: Examples) -> None:
        params = u.parameters
        fisher = diagonal_fisher(
            u.model, u.problem, u.batches(examples), params, self.fisher, u.classes.seen if u.columns else None
        )
        self.anchor.merge(params, fisher, self.decay)

    def forgot(self, u: Update, ids: Ids) -> None:
        self.anchor = QuadraticAnchor({}, {}, strength=self.strength, half=True)
        for examples in u.history():
            if len(examples):
                self._consolidate(u, examples)
