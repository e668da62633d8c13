"""Take rows out of a life that learns with the learner `acu`: a subtraction, and exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from remanence.data import Request
from remanence.forget.base import by_learner
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update


@dataclass
class ACU(Forgetter):
    """Analytic unlearning: the request's rows are subtracted from the sums of the life's ridge head.

        Phi'Phi <- Phi'Phi - Phi_u'Phi_u        Phi'Y <- Phi'Y - Phi_u'Y_u        W = (Phi'Phi + gamma I)^{-1} Phi'Y

    W is then what a life without the request would have, to rounding, and the receipt says *deleted*. No retained data is read, nothing
    is trained, the network stays as it is. A class of which all examples go loses its column. Requests and learning may alternate
    in any order.

    Pick it in every life that learns with `acu`. Needs: that learner, and no keepers; labels; the forgotten examples. Reference: ACU,
    2025, arXiv 2505.12239, see the learner of this name for what is not as there. The network's features are never unlearned: they
    come from pretraining, which must not have seen the examples.
    """

    trains: ClassVar[bool] = False
    learner: ClassVar[str] = "acu"

    def forget(self, u: Update, request: Request) -> Outcome:
        return by_learner(u, u.data("forget").ids)
