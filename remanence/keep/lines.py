"""Scale the change of an event by depth: shallow blocks go back, deep ones stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Examples
from remanence.data.examples import cat
from remanence.nn.anatomy import tensor_bytes
from remanence.nn.deltas import interpolate, linear_in_depth
from remanence.train.roles import Keeper
from remanence.train.update import Update

GRID = tuple(number / 10 for number in range(10, -1, -1))


@dataclass
class LiNeS(Keeper):
    """After an event every block keeps a share of its change that grows with its depth: none or little of the first, all of the last.

        theta <- theta_0 + (alpha + (1 - alpha) l / (L - 1)) (theta - theta_0)        l = 0 .. L-1 the block, theta_0 the event's start
        alpha = argmax over 1.0, 0.9, .. 0.0 of  weight * own(alpha) / own(1) + old(alpha) / old(theta_0)

    Embeddings and whatever else is in no block go by alpha; the head, new rows of it too, stays as trained. `own` is the score of
    rows of this event that were kept from training for it, `old` that of earlier events' data; of equals the larger alpha is taken.
    Where no old data can be reached (or ``choose=False``) alpha is the knob, and no row is kept back. Buffers, such as the running
    statistics of batch norm, stay as trained. Of the event only alpha is remembered.

    Pick it where a pretrained network is fine-tuned: it costs no training, and what general layers lose comes back at little loss of
    the new. In a network that grows a head class by class the head alone makes old answers wrong, and that it does not mend.
    Needs: borders, a network of several blocks; to choose alpha, old data.
    Reference: Wang et al. 2025, "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", ICLR, arXiv
    2410.17146. Deviations: there once after one fine-tuning from a pretrained network, here after every event but the first
    (``first=True``: after that, too); blocks are found by the structure of the network, where the code looks for numbers in names.
    A batch that has held-out rows only is learned all the same. Facts that are learned by heart cannot be asked of rows kept from
    training: take ``holdout=0`` there; at a fixed alpha of 0.5, what comes back of the old is about what is lost of the new. Of
    low-rank adapters the two factors go back, not their product. Its merge of several models is `remanence.nn.deltas.merge`.
    """

    moves_at_end: ClassVar[bool] = True

    alpha: float = knob(0.5, "share of its change that the first block keeps, where it is not chosen", low=0, high=1)
    choose: bool = knob(True, "choose alpha by held-out rows and old data, where there is old data")
    weight: float = knob(2.0, "what the event's own score weighs against the old", low=0)
    holdout: float = knob(
        0.1, "share of the event's rows kept from training to choose by; 0: none, trained rows serve", low=0, high=0.9
    )
    control: int = knob(500, "most rows of old data, and of trained rows, to choose by", low=1)
    first: bool = knob(False, "whether the weights before the first event are worth going back to: pretrained ones")

    def setup(self) -> None:
        self.chosen = 1.0  # alpha of the last event

    @property
    def inert(self) -> bool:
        return self.alpha == 1 and not self.choose

    def begin(self, u: Update) -> None:
        if u.kind != "learn" or (u.event == "learn/0" and not self.first):
            return
        self._start = u.reference()
        old = [examples for examples in u.history()[:-1] if len(examples)]
        task = u.data("task")
        if self.choose and old:
            count = max(1, round(self.holdout * len(task))) if self.holdout else self.control
            self._old, self._own = _some(u, cat(old), self.control), _some(u, task, count)
            if self.holdout:
                self._ids = self._own.id.to(u.device)

    def prepare(self, u: Update, batch: Batch) -> Batch:
        """Keeps the held-out rows from training."""
        if not hasattr(self, "_ids"):
            return batch
        stay = ~torch.isin(batch["id"], self._ids)
        return {name: column[stay] for name, column in batch.items()} if bool(stay.any()) else batch

    @torch.no_grad()
    def end(self, u: Update) -> None:
        if not hasattr(self, "_start"):
            return
        now, start = u.parameters, dict(self._start.named_parameters())
        end: dict[str, Tensor] = dict(now)
        self.chosen = self.alpha
        if hasattr(self, "_own"):
            end = {name: p.detach().clone() for name, p in now.items()}
            u.extra_bytes += tensor_bytes(list(end.values()))
            self.chosen = self._best(u, start, end)
        interpolate(now, start, end, linear_in_depth(u.model, self.chosen, 1 - self.chosen))

    def _best(self, u: Update, start: dict[str, nn.Parameter], end: dict[str, Tensor]) -> float:
        u.consumed.epoch(self._own.id, False)
        u.consumed.epoch(self._old.id, True)  # in no batch, but they bear on the weights
        before, trained = _score(u, self._start, self._old), _score(u, u.model, self._own)
        found = []
        for alpha in GRID:
            interpolate(u.parameters, start, end, linear_in_depth(u.model, alpha, 1 - alpha))
            own, old = _score(u, u.model, self._own), _score(u, u.model, self._old)
            found.append(self.weight * _relative(u, own, trained) + _relative(u, old, before))
        return GRID[found.index(max(found))]


def _some(u: Update, examples: Examples, count: int) -> Examples:
    order = torch.randperm(len(examples), generator=u.rng("lines"))[:count]
    return examples.select(order.sort().values)


def _score(u: Update, model: nn.Module, examples: Examples) -> float:
    """The mean of the problem's main score."""
    total = 0.0
    with u.aside():
        for batch in u.batches(examples):
            scores = u.problem.score(u.problem.forward(model, batch), batch, u.classes.seen if u.columns else None)
            total += float(scores[u.problem.main].sum(dtype=torch.float64))
    return total / len(examples)


def _relative(u: Update, value: float, base: float) -> float:
    """How good a score is against another, as their ratio; an error's the other way round."""
    if u.problem.main == "mse":
        value, base = base, value
    return value / max(base, 1e-3)
