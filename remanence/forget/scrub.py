"""Move away from the teacher on what is to be forgotten, and stay with it on the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Request
from remanence.nn.distances import kl_from_logits
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update


@dataclass
class SCRUB(Forgetter):
    """A student that selectively disobeys its teacher, the frozen network from before the request.

        d(x) = T^2 KL(softmax(teacher(x) / T) || softmax(f(x) / T))
        first `msteps` epochs, over D_f:   maximise  mean d(x)
        every epoch, then over D_r:        minimise  gamma * mean loss(f(x), y) + alpha * mean d(x)

    One optimizer does both. The student starts as the teacher, where d has its minimum and no gradient: without dropout and batch
    norm the first epoch over D_f does nothing, and forgetting begins with the second; ``msteps=1`` forgets nothing.
    d has no upper end, so many msteps or a large lr destroy the network.

    Pick it for a class when retained data is at hand. Mislabelled examples it undoes no better than catastrophic on a small network,
    where the retained data alone does it. Needs: labels, classes, retained data.
    Reference: Kurmanji et al. 2023, "Towards Unbounded Machine Unlearning", arXiv 2302.09880, and its code (from there T^2, and the
    knobs of its large experiments, but for 2 msteps of 3 epochs at lr 5e-4). Deviations: D_f has the same batch size as D_r (there
    32 to 512 beside 128), the rate does not decay, and the rewind to the epoch whose error on D_f is nearest to a held-out error
    (SCRUB+R) is left out. A variant in a later benchmark maximises the whole objective, cross-entropy included; this one does not.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 10,
        "batch_size": 64,
        "optimizer": {"sgd": {"momentum": 0.9, "weight_decay": 5e-4}},
        "lr": 0.01,
        "schedule": "constant",
    }

    msteps: int = knob(3, "epochs that go over the forget set, the first of them to no effect", low=0)
    alpha: float = knob(0.001, "weight of the distance to the teacher on retained data", low=0)
    gamma: float = knob(0.99, "weight of the retained data's loss", low=0)
    temperature: float = knob(4.0, "T > 0", low=1e-3)

    def forget(self, u: Update, request: Request) -> Outcome:
        if not u.columns:
            raise BadInput("scrub compares probabilities, and this problem has no classes; use gradient-ascent")
        self._teacher = u.reference()
        u.run(drive="sequence")
        return Outcome()

    def objective(self, u: Update, forget: Batch | None, retain: Batch | None) -> Tensor | None:
        if forget is not None:
            return -self._distance(u, forget) if u.epoch < self.msteps else None
        if retain is None:
            return None
        loss = self.gamma * u.problem.loss(u.out(retain), retain, u.classes.seen)
        return loss + self.alpha * self._distance(u, retain) if self.alpha else loss

    def _distance(self, u: Update, batch: Batch) -> Tensor:
        with torch.no_grad():
            teacher = u.problem.forward(self._teacher, batch).logits[:, u.classes.seen]
        student = u.out(batch).logits[:, u.classes.seen]
        return self.temperature**2 * kl_from_logits(student, teacher, self.temperature).mean()
