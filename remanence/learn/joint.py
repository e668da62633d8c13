"""Training on everything seen at every event: the upper bound that needs all the old data."""

from __future__ import annotations

from dataclasses import dataclass

from remanence.train.roles import Learner
from remanence.train.update import Consumed, Update


@dataclass
class Joint(Learner):
    """Each event trains on the new data and all data seen before, shuffled together.

        L = mean over D_1 u ... u D_t of loss(f(x), y)

    Pick it where the old data may be kept and the time is there; as a reference for every other learner. Needs: old data.
    The network goes on from where it was; it is not started afresh. Reference: the upper bound of Smith et al. 2023, arXiv 2203.17269.
    """

    def learn(self, u: Update) -> None:
        u.run(data=u.data("seen"))
        task, taken = u.data("task").ids, u.consumed.settle()
        u.consumed = Consumed(taken.new & task, taken.replayed | (taken.new - task))
