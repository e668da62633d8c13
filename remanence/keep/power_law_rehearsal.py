"""See old events again, the rarer the longer ago they were."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import cat_batches
from remanence.data.recurring import apportioned
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class PowerLawRehearsal(Keeper):
    """While event k is learned, examples of every earlier event j come back, by a power law of its age.

        r_kj = R w(k - j) / sum_i w(k - i)        w(t) = t^-decay, or exp(-decay t);  R = amount * examples of event k

    r_kj examples of event j are drawn when event k begins, without replacement; every epoch sees each of them once, spread evenly
    over its batches. Fractions go to the largest remainders, so the r_kj add up to R; what an event lacks, the others give.
    ``decay=0`` is uniform; with a large one only the event before comes back. Nothing is stored: the examples are read from the
    life's own data, so this is a model of an environment that shows old things again, and the least that a method with access to
    old data has to beat.

    Pick it to ask what forgetting is left in a stream as nature gives it, with any learner and other keepers beside it. Needs:
    borders, and that the data of earlier events can be reached. In a forget run it stands aside.
    Reference: "Natural Mitigation of Catastrophic Interference: Continual Learning in Power-Law Learning Environments", 2024,
    arXiv 2401.10393. A reconstruction from its abstract: the paper's exponent and amounts were not seen, and its law counts from when
    an event was seen last; here age is counted from the event in which it was learned. At an equal amount the power law beats the
    exponential one on the digits; uniform rehearsal does as well or better.
    """

    amount: float = knob(0.3, "rows that come back, as a share of the event's own", low=0)
    decay: float = knob(1.0, "how fast the past fades; 0: all events alike", low=0)
    law: str = knob("power", "form of the fading", choices=("power", "exponential"))

    def setup(self) -> None:
        self.taken = 0  # rows of its own that the event has shown in this epoch

    @property
    def inert(self) -> bool:
        return self.amount == 0

    def begin(self, u: Update) -> None:
        self.taken = 0
        self._pool: Batch = {}
        earlier = u.history()[:-1] if u.kind == "learn" else []
        if not earlier:
            return
        self._rows = len(u.data("task"))
        ages = torch.arange(len(earlier), 0, -1, dtype=torch.float64)
        limits = [len(examples) for examples in earlier]
        counts = apportioned(round(self.amount * self._rows), self.weights(ages).tolist(), limits)
        rng = u.rng("power-law-rehearsal")
        drawn = [
            examples.batch(torch.randperm(len(examples), generator=rng)[:count])
            for examples, count in zip(earlier, counts, strict=True)
            if count
        ]
        if drawn:
            self._pool = {name: column.to(u.device) for name, column in reduce(cat_batches, drawn).items()}
            u.extra_bytes += sum(column.nbytes for column in self._pool.values())

    def weights(self, ages: Tensor) -> Tensor:
        """w of each age t >= 1 (n,)."""
        return ages**-self.decay if self.law == "power" else (-self.decay * (ages - 1)).exp()

    def order(self, u: Update, index: Tensor) -> Tensor:
        self.taken = 0
        return index

    def prepare(self, u: Update, batch: Batch) -> Batch:
        if u.kind != "learn" or not self._pool:
            return batch
        size = len(self._pool["id"])
        start = size * self.taken // self._rows
        self.taken += int((batch["origin"] == 0).sum())
        rng = torch.Generator().manual_seed(u.seed_of(f"power-law-rehearsal/{u.epoch}"))
        rows = torch.randperm(size, generator=rng)[start : size * self.taken // self._rows].to(batch["id"].device)
        return u.extend(batch, {name: column[rows] for name, column in self._pool.items()}, self)
