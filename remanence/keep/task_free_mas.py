"""Memory aware synapses without borders: what was learned is noted down whenever the loss has come to rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch, Out
from remanence.nn.anchor import QuadraticAnchor
from remanence.nn.buffer import Buffer
from remanence.nn.fisher import absolute_sensitivity
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class TaskFreeMAS(Keeper):
    """MAS that finds its own moments: importances are taken on hard examples once the loss is low and flat.

        L + strength / 2 * sum_j Omega_j (theta_j - theta*_j)^2
        plateau:  mean of the last `window` losses < level, their variance < spread, and a peak since the last plateau
        then      theta* = theta,  Omega_j <- (1 - 1/n) Omega_j + 1/n mean_hard | d ||f(x)||^2 / d theta_j |,  n-th time
        peak:     mean of the window > mean + standard deviation of the window at the last plateau

    The hard examples are the `hard` rows of highest loss among those kept and the new batch; every batch is joined by
    all of them. The losses looked at are those of the new rows, without the penalty, which could keep them from ever
    coming to rest. An event's begin and end mean nothing here. Level and spread are in the problem's own unit: look at
    the training loss first. On permuted digits (level 0.4) it holds the first task, and has less room for the third.

    Pick it for streams without borders, where the loss comes to rest and jumps when the data changes. Needs: stores
    examples. After a forget, anchor and Omega are made anew from the new weights and what is left of the hard examples.
    Reference: Aljundi et al. 2019, "Task-Free Continual Learning", arXiv 1812.03596. Deviations: windows lie side by
    side and do not slide; the released code sums over the hard examples and takes the norm, not its square, so its
    strength is in another unit; it makes five steps of a batch (here the learner says how many) and counts the hard
    examples' losses in, too.
    """

    stores: ClassVar[tuple[str, ...]] = ("hard",)

    strength: float = knob(0.5, "weight of the penalty; 0: no hard examples either", low=0)
    window: int = knob(5, "batches whose losses are looked at together", low=2)
    level: float = knob(0.2, "mean loss of a window below which it may be a plateau", low=0)
    spread: float = knob(0.1, "variance of a window's losses below which it may be a plateau", low=0)
    hard: int = knob(30, "hard examples that are kept and replayed", low=1)

    def setup(self) -> None:
        self.buffer = Buffer(self.hard)
        self.losses: list[Tensor] = []
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.anchor = QuadraticAnchor({}, {}, strength=self.strength, half=True)
        self.plateaus, self.peak, self.bound = 0, True, 0.0

    def prepare(self, u: Update, batch: Batch) -> Batch:
        return u.extend(batch, self.buffer.columns, self) if u.kind == "learn" and len(self.buffer) else batch

    def loss(self, u: Update, batch: Batch) -> None:
        """Adds nothing: keeps this step's losses, before the weights move."""
        if u.kind == "learn":
            out = Out(u.out(batch).logits.detach())
            self._found = u.problem.losses(out, batch, u.classes.seen if u.columns else None)

    def gradient(self, u: Update) -> None:
        self.anchor.add_gradient(u.parameters)

    def after(self, u: Update, batch: Batch) -> None:
        if u.kind != "learn":
            return
        own = batch["origin"] == 0
        self.losses.append(self._found[own].mean())
        self._choose(u, batch, own)
        if len(self.losses) == self.window:
            losses = torch.stack(self.losses)
            mean, variance = float(losses.mean()), float(losses.var(correction=0))
            self.losses = []
            self.peak = self.peak or mean > self.bound
            if self.peak and mean < self.level and variance < self.spread:
                self.peak, self.bound = False, mean + variance**0.5
                self._consolidate(u)

    def _choose(self, u: Update, batch: Batch, own: Tensor) -> None:
        """Keep the rows of highest loss, of those kept and the new ones."""
        held = self.buffer.columns["id"] if len(self.buffer) else batch["id"][:0]
        known = torch.isin(batch["id"], held.to(batch["id"]))
        mine = batch["origin"] == 1 + u.parts.index(self)
        rows = ((own & ~known) | mine).nonzero()[:, 0]
        best = rows[self._found[rows].topk(min(self.hard, len(rows))).indices]
        self.buffer.evict(Ids(held.cpu().numpy()) - Ids(batch["id"][best].cpu().numpy()))
        new = best[own[best]]
        columns = {name: column[new] for name, column in batch.items() if name not in ("origin", "weight")}
        self.buffer.add(columns, u.rng("task-free-mas"))

    def _consolidate(self, u: Update) -> None:
        """Anchor at the weights of now; Omega is the running mean over plateaus."""
        params = dict(u.model.named_parameters())
        columns = {name: column.to(u.device) for name, column in self.buffer.columns.items()}
        found = absolute_sensitivity(u.model, u.problem, [columns], params, u.classes.seen if u.columns else None)
        self.plateaus += 1
        share = 1 / self.plateaus
        self.anchor.merge(params, {name: share * importance for name, importance in found.items()}, 1 - share)

    def forgot(self, u: Update, ids: Ids) -> None:
        some = bool(self.anchor.anchor)
        self.losses = []
        self._begin_anew()
        if some and len(self.buffer):
            self._consolidate(u)
