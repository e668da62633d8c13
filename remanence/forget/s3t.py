"""Switch off what was trained on the examples in a life that learns by `s3t`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from remanence.data import Request
from remanence.forget.base import by_learner
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update


@dataclass
class S3T(Forgetter):
    """Cut every sequence of the touched shards to before the slices with an example of the request. Nothing is trained.

        paths <- {path : no slice of path has an example of F}        for each shard; it answers with the longest path left

    The learner `s3t` does it (see there). The result is exact: what is left equals, bit for bit, the same prefixes of a life that
    never had F. It takes milliseconds and costs accuracy: the other examples of a cut slice are lost to the shard until
    ``by="retrain"``. When no shard would have anything left it is refused before anything moves; give `limit` to be stopped earlier.

    Pick it for frequent requests of few examples in a life whose learner is `s3t`; not for whole classes, which touch every slice.
    It is refused in any other life, and where keepers carried the examples on. Needs: that learner; of the data only the request.
    Reference: "Towards Scalable Exact Machine Unlearning Using Parameter-Efficient Fine-Tuning", ICLR 2025, arXiv 2406.16257;
    deviations stand in the learner.
    """

    trains: ClassVar[bool] = False
    learner: ClassVar[str] = "s3t"

    def forget(self, u: Update, request: Request) -> Outcome:
        return by_learner(u, u.data("forget").ids)
