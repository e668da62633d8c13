"""Ask the shards of a life that learns by `sisa` to train again without the examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from remanence.data import Request
from remanence.forget.base import by_learner
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update


@dataclass
class SISA(Forgetter):
    """Roll back the touched shards to before their first touched slice, and train on without the request.

        theta_k <- train(theta_k(j-1), D_kj - F, ..., D_kR - F)        for each shard k, j its first slice with an example of F

    The learner `sisa` does it with the settings and draws of its own learn events (see there); nothing that the request sets for
    training is used. The result is exact: touched shards equal, bit for bit, shards that never had F, the others keep their
    bits. Cost: for one example about (R + 1) / 2 of S R slices, for a class all of them.

    Pick it for requests of few examples in a life whose learner is `sisa`; it is refused in any other, and where keepers carried
    the examples on. Needs: that learner, the retained data of the touched shards.
    Reference: Bourtoule et al. 2021, "Machine Unlearning", arXiv 1912.03817; deviations stand in the learner.
    """

    trains: ClassVar[bool] = False
    learner: ClassVar[str] = "sisa"

    def forget(self, u: Update, request: Request) -> Outcome:
        return by_learner(u, u.data("forget").ids)
