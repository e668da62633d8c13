"""What forgetters share: other labels to teach, and the way through the life's learner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.problem import Batch
from remanence.data import cat_batches
from remanence.train.roles import Outcome
from remanence.train.update import Update

#: Up to this many classes the forget set is gone over before the retained data; beyond, both are shuffled into one (Fan et al. 2024).
SMALL = 10
#: How forgetters that teach other labels train (Fan et al. 2024).
RELABELLING: dict[str, Any] = {
    "epochs": 10,
    "batch_size": 256,
    "optimizer": {"sgd": {"momentum": 0.9, "weight_decay": 5e-4}},
    "lr": 0.013,
    "schedule": "constant",
}


def other_labels(y: Tensor, columns: Tensor, rng: torch.Generator) -> Tensor:
    """For each of y (B,) one of the other `columns` (K,), ascending, each with probability 1 / (K - 1)."""
    step = 1 + torch.randint(len(columns) - 1, y.shape, generator=rng).to(y.device)
    return columns[(torch.searchsorted(columns, y) + step) % len(columns)]


@dataclass(frozen=True)
class RandomLabels:
    """The objective of random-label forgetting: ``E_f[loss(f(x), y')] + alpha E_r[loss(f(x), y)]``, y' != y drawn per batch.

    An epoch goes over the forget set once (but with drive ``retain``), so every example has a fresh label in every epoch.
    In a ``mixed`` batch both means become one over all its rows, retained rows weighted `alpha`, as in the official code.
    """

    columns: Tensor
    drive: str
    alpha: float

    @classmethod
    def of(cls, u: Update, drive: str, alpha: float) -> RandomLabels:
        """For this run; only classes that still have data compete to be y', so none forgotten earlier is taught again.

        Raises:
            BadInput: there are no labels, or only one class is left.
        """
        if not u.columns or u.data("forget")["y"].is_floating_point():
            raise BadInput(
                "random labels need a class label for every example; use gradient-ascent where there are none"
            )
        columns = u.data("seen")["y"].unique().to(u.device)
        if len(columns) < 2:
            raise BadInput(
                "random labels need a second class, and only one has data that can be reached; use gradient-ascent or retrain"
            )
        return cls(columns, drive if drive != "auto" else "sequence" if len(columns) <= SMALL else "mixed", alpha)

    def objective(self, u: Update, forget: Batch | None, retain: Batch | None) -> Tensor | None:
        terms = []
        if forget is not None:
            other = other_labels(forget["y"], self.columns, u.rng("random-labels"))
            taught = {**forget, "y": other}
            if retain is not None and self.drive == "mixed":
                return self._mixed(u, taught, retain)
            terms.append(u.problem.loss(u.out(forget), taught, u.classes.seen))
        if retain is not None and self.alpha:
            terms.append(self.alpha * u.problem.loss(u.out(retain), retain, u.classes.seen))
        return sum(terms[1:], terms[0]) if terms else None

    def _mixed(self, u: Update, taught: Batch, retain: Batch) -> Tensor:
        weight = retain.get("weight", torch.ones(len(retain["id"]), device=u.device))
        both = cat_batches(taught, retain if self.alpha == 1 else {**retain, "weight": self.alpha * weight})
        return u.problem.loss(u.out(both), both, u.classes.seen)


def by_learner(u: Update, ids: Ids) -> Outcome:
    """Let the life's learner take `ids` out of what it made; the outcome carries its word of how exactly.

    Raises:
        BadInput: the run has no learner, or its learner cannot.
    """
    if u.learner is None:
        raise BadInput("this run belongs to no life, so there is no learner that could take anything out")
    return Outcome(exact=True, how=u.learner.unlearn(u, ids))
