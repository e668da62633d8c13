"""Live the life again without the data: exact, and the measure of every other method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from remanence.data import Request
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update


@dataclass
class Retrain(Forgetter):
    """Repeat every learn event from the life's initial state, without the request and without anything forgotten before.

        theta_u = A(D_1 - F, ..., D_t - F; seed)        A: this life's learn events, F: all that was asked to be forgotten

    Weights, head, buffers and every keeper's state come out bit for bit as in a life that never had the data: the only
    method whose result may be called *deleted* everywhere. Costs a whole training.

    Pick it when the request must be met exactly, and when the life is short. Needs: all retained data.
    Reference: Bourtoule et al. 2021, "Machine Unlearning", arXiv 1912.03817, which takes it for the definition.
    """

    trains: ClassVar[bool] = False

    def forget(self, u: Update, request: Request) -> Outcome:
        return Outcome(exact=True, model=u.retrain(u.data("forget").ids, u.seed))
