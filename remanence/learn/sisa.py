"""Shards that are trained slice by slice, so that few examples have to be trained on again when one goes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.func import functional_call

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.learn.base import Sharded, numbers
from remanence.nn.anatomy import module_bytes
from remanence.train.update import Context, Update


@dataclass
class SISA(Sharded):
    """Sharded, isolated, sliced, aggregated: an ensemble of networks that never share an example, saved after every slice.

        D = D_1 u ... u D_S by a hash of the id        D_k = D_k1 u ... u D_kR
        theta_k0 = the life's network        theta_kj = train(theta_k(j-1), D_k1 u ... u D_kj)        p(y | x) = mean over k of p(y | x; theta_kR)
        each slice has e' = 2 epochs / (R + 1) epochs, so that a shard costs as much as `epochs` over its share at once

    To forget, each shard goes back to before its first slice with one of the examples and trains the later slices again without
    them. The draws are addressed by event, shard and slice: the shard comes out equal, bit for bit, to one that never had the
    examples, and untouched shards do not move. Each further learn event appends R slices to every shard, and head rows for new classes.

    Pick it when single examples will be asked for and must be gone for certain, and the network can be trained from scratch on a
    part of the data. The price is accuracy (each network sees 1 / S of the data) and S R saved networks for every event. Asked for a
    class, all shards train again. Needs: labels, the retained data to forget with. No keeper and no where can act.
    Reference: Bourtoule et al. 2021, "Machine Unlearning", arXiv 1912.03817, and its official code. Deviations: shards and slices are
    drawn by hash, so their sizes differ a little; at least one epoch for each slice; a fresh optimizer for each slice (one for a
    shard there); `vote` breaks ties by the mean probability (there by the lowest class), and the mean is the default (there the
    vote); all shards start from the same weights, but for head rows added later; several events are ours. Which classes there are
    is not forgotten: the head keeps the column of a class that is gone, and a life that never had the class has it too only
    where the problem's `classes` are fixed.
    """

    cumulative: bool = knob(
        True, "train on all of the shard's slices so far, also of earlier events, or on the new slice alone"
    )

    def setup(self) -> None:
        super().setup()
        #: For each shard its weights after each slice.
        self.saved: list[list[dict[str, Tensor]]] = [[] for _ in range(self.shards)]

    def take_in(self, u: Update) -> None:
        u.extra_bytes += module_bytes(u.model)
        for shard in range(self.shards):
            self._train(u, shard, len(self.saved[shard]))

    def take_out(self, u: Update, ids: Ids) -> str:
        touched: dict[int, int] = {}
        for cell in self.book.touched(ids):
            event, rest = divmod(cell, self.shards * self.slices)
            shard, part = divmod(rest, self.slices)
            touched.setdefault(shard, event * self.slices + part)
        self.book.purge(ids)
        u.extra_bytes += module_bytes(u.model)
        again = sum(len(self.events) * self.slices - first for first in touched.values())
        for shard, first in touched.items():
            self._train(u, shard, first)
        return (
            f"{numbers(sorted(touched))} of {self.shards} went back and trained {again} of "
            f"{self.shards * self.slices * len(self.events)} slices again: equal in bits to shards that never had them"
        )

    def _train(self, u: Update, shard: int, first: int) -> None:
        """Train the slices from number `first` on, counted over all events."""
        saved = self.saved[shard][:first]
        model = copy.deepcopy(u.model)
        for event in range(-(-first // self.slices)):
            model = self.grown(u, model, event, shard)
        if saved:
            model.load_state_dict(saved[-1])
        for step in range(first, len(self.events) * self.slices):
            event, part = divmod(step, self.slices)
            model = self.grown(u, model, event, shard)
            examples = self.rows(u, self._ids(shard, step))
            if examples is not None:
                self.fit(u, model, examples, event, f"sisa/{shard}/{part}", self._epochs(event, part))
            saved.append({name: value.detach().clone() for name, value in model.state_dict().items()})
        self.saved[shard] = saved

    def _ids(self, shard: int, step: int) -> Ids:
        steps = range(step + 1) if self.cumulative else [step]
        return self.book.union(self.cell(s // self.slices, shard, s % self.slices) for s in steps)

    def _epochs(self, event: int, part: int) -> int:
        epochs = int(self.events[event]["settings"]["epochs"])
        if not self.cumulative:
            return epochs
        done, due = (2 * epochs * n // (self.slices + 1) for n in (part, part + 1))
        return max(min(epochs, 1), due - done)

    def answers(self, c: Context, batch: Batch) -> list[list[Tensor]]:
        said: list[Tensor] = []
        for shard, saved in enumerate(self.saved):
            if saved and self._told(shard):
                weights: dict[str, Any] = {name: value.to(c.device) for name, value in saved[-1].items()}
                said.append(functional_call(c.model, weights, (batch["x"],)))
        return [said]

    def _told(self, shard: int) -> bool:
        """Whether the shard was trained on anything: one that was not stays silent."""
        cells = range(len(self.events) * self.slices)
        return any(self.book.cells[self.cell(step // self.slices, shard, step % self.slices)] for step in cells)
