"""What learners that train on a table of new and old rows share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from remanence.core.ids import Ids
from remanence.core.problem import Batch
from remanence.data import Examples, cat
from remanence.train.roles import Learner
from remanence.train.update import Consumed, Update


@dataclass
class Mixture(Learner):
    """An event is trained on rows of its own and rows of earlier events in one table, shuffled together. The old ones are marked as such
    in every batch, so that keepers and the lineage know them."""

    def earlier(self, u: Update) -> list[Examples]:
        """The data of the events before, without rows that this event brings itself."""
        task = u.data("task").ids
        return [examples.without(task) for examples in u.history()[:-1]]

    def mix(self, u: Update, new: Examples, old: list[Examples]) -> None:
        """Train on both."""
        old = [examples for examples in old if len(examples)]
        ids = torch.cat([examples.id for examples in old]) if old else new.id[:0]
        self._old = ids.to(u.device)
        table = cat([new, *old])
        if old:
            u.extra_bytes += sum(c.nbytes for c in table.columns.values() if isinstance(c, Tensor))
        u.run(data=table)
        del self._old
        taken, again = u.consumed.settle(), Ids(ids.numpy())
        u.consumed = Consumed(taken.new - again, taken.replayed | (taken.new & again))

    def prepare(self, u: Update, batch: Batch) -> Batch:
        old: Tensor | None = getattr(self, "_old", None)  # only while the mixture is trained on
        if old is None or not len(old):
            return batch
        mark = torch.isin(batch["id"], old).long() * (1 + len(u.parts))  # a number that no keeper has
        return {**batch, "origin": torch.maximum(batch["origin"], mark)}
