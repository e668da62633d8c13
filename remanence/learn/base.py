"""What learners that train many models on parts of the data share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch, Out
from remanence.core.rng import seed_of
from remanence.data import Examples, cat
from remanence.nn.heads import grow_head
from remanence.nn.shards import Slices, fingerprint, place
from remanence.train.roles import Learner, head_rows
from remanence.train.update import Consumed, Context, Update

#: Log-probability of a class that no model answers for.
SILENT = -20.0


@dataclass
class Sharded(Learner):
    """An ensemble over shards of the data, which knows of each of its parts what it was trained on.

    The life's own network is only what the shards start from and never moves. Where an example goes is told by a hash of its id
    under the life's seed, and every draw is addressed by the learn event, the shard and the slice, so that nothing in a shard
    depends on an example that is not in it. What all shards know is which classes there are.
    """

    moves_weights: ClassVar[bool] = False

    shards: int = knob(5, "models, each trained on its own part of the data", low=1)
    slices: int = knob(4, "parts of a shard's share of one event, taken in one after the other", low=1)
    aggregate: str = knob(
        "mean", "of the shards' probabilities, or of their votes (ties by the mean)", choices=("mean", "vote")
    )

    def setup(self) -> None:
        self.book = Slices()
        #: How each learn event was done: its address, settings and head columns.
        self.events: list[dict[str, Any]] = []
        self.network = ""

    def structure(self, u: Update) -> dict[str, Any]:
        return {}

    def learn(self, u: Update) -> None:
        acting = [part.slug for part in u.parts if not part.inert]
        if acting:
            raise BadInput(
                f"{self.slug} trains its shards and not the life's network, so {', '.join(acting)} cannot act; leave it out"
            )
        self.network = self.network or fingerprint(u.model)
        self._check_network(u)
        task = u.data("task").ids
        settings = {name: getattr(u.settings, name) for name in u.settings.__dataclass_fields__}
        self.events.append({"event": u.event, "columns": u.columns, "settings": settings})
        self.book.cells += place(task, self.shards * self.slices, seed_of(u.seed, "shards"))
        self.take_in(u)
        u.consumed = Consumed(task, u.consumed.settle().new - task)

    def take_in(self, u: Update) -> None:
        """Train what the last of `events` adds."""
        raise NotImplementedError

    def take_out(self, u: Update, ids: Ids) -> str:
        """Undo what was trained on `ids`, some of which are in the book, and take them out of it; returns how."""
        raise NotImplementedError

    def unlearn(self, u: Update, ids: Ids) -> str:
        self._check_network(u)
        return self.take_out(u, ids) if self.book.holds(ids) else "no shard is trained on any of them"

    def purge(self, ids: Ids) -> None:
        """Nothing yet: what to undo is read from the book, so its records go in `unlearn`, or in `forgot` at the latest."""

    def forgot(self, u: Update, ids: Ids) -> None:
        if self.events:
            self.unlearn(u, ids)

    def _check_network(self, u: Update) -> None:
        if self.network != fingerprint(u.model):
            raise BadInput(
                f"{self.slug}: the network that the shards started from has been moved; learn the whole life with {self.slug}, "
                "and ask by='retrain' for what another learner took in"
            )

    # ------------------------------------------------------------------ for those that train

    def cell(self, event: int, shard: int, part: int) -> int:
        """The number of a slice in the book."""
        return (event * self.shards + shard) * self.slices + part

    def seed(self, u: Update, event: int, shard: int, name: str) -> int:
        """A seed addressed by the learn event and the shard, whenever it is asked for."""
        return seed_of(u.seed, self.events[event]["event"], self.slug, shard, name)

    def rows(self, u: Update, ids: Ids) -> Examples | None:
        """The examples `ids` by ascending id, each once; None if there are none.

        Raises:
            BadInput: some cannot be reached.
        """
        parts = [part for part in (examples.only(ids) for examples in u.history()) if len(part)]
        found = cat(parts) if parts else None
        there = found.ids if found is not None else Ids()
        if len(there) < len(ids):
            raise BadInput(
                f"{self.slug}: {len(ids) - len(there)} examples that a shard must be trained on again cannot be reached; resume with data=..."
            )
        if found is None:
            return None
        order = torch.argsort(found.id, stable=True)
        sorted_ids = found.id[order]
        first = torch.ones(len(order), dtype=torch.bool)
        first[1:] = sorted_ids[1:] != sorted_ids[:-1]
        return found.select(order[first])

    def grown(self, u: Update, model: nn.Module, event: int, shard: int) -> nn.Module:
        """`model` with the head rows that it lacks for this event."""
        lacking = int(self.events[event]["columns"]) - head_rows(model)
        return grow_head(model, lacking, self.seed(u, event, shard, "head")) if lacking > 0 else model

    def fit(self, u: Update, module: nn.Module, examples: Examples, event: int, address: str, epochs: int) -> None:
        """Train `module` as the learn event would, whenever that is: its settings, its classes, draws by its address."""
        about, at = self.events[event], copy.copy(u)
        at.event, at.phase, at.life_step, at._shared = about["event"], address, 0, {**u._shared, "phases": 0}
        classes = torch.arange(int(about["columns"]), device=u.device)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return u.problem.loss(u.problem.forward(model, batch), batch, classes)

        at.fit(module, examples, loss, **{**about["settings"], "epochs": epochs, "patience": None})

    # ------------------------------------------------------------------ answers

    def answers(self, c: Context, batch: Batch) -> list[list[Tensor]]:
        """Logits (B, C) of every model that has something to say, by groups that weigh the same."""
        raise NotImplementedError

    def predict(self, c: Context, batch: Batch) -> Out:
        """Log-probabilities: of the mean within each group, then of the mean over groups."""
        groups = [
            torch.stack([widened(logits, c.columns).log_softmax(1) for logits in group])
            for group in self.answers(c, batch)
            if group
        ]
        if not groups:
            return Out(torch.zeros(len(batch["id"]), c.columns, device=c.device))
        p = torch.stack([pooled(group.exp(), self.aggregate) for group in groups]).mean(0)
        return Out(p.log().clamp(min=SILENT))


def widened(logits: Tensor, columns: int) -> Tensor:
    """(B, columns): barred where a model has no such column yet, cut where it has columns that nobody has met."""
    lacking = columns - logits.shape[1]
    if lacking <= 0:
        return logits[:, :columns]
    return torch.cat([logits, logits.new_full((len(logits), lacking), -torch.inf)], 1)


def pooled(p: Tensor, how: str) -> Tensor:
    """(B, C) from the probabilities p (M, B, C) of M models: their mean; or the share of votes, the mean counting as one vote more."""
    if how == "mean":
        return p.mean(0)
    votes = torch.nn.functional.one_hot(p.argmax(2), p.shape[2]).to(p.dtype).sum(0)
    return (votes + p.mean(0)) / (len(p) + 1)


def numbers(found: Sequence[int]) -> str:
    """Numbers in words: "shard 2", "shards 0, 3"."""
    return f"shard{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"
