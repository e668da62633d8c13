"""Continued pretraining: warm the rate up again, let it fall again, and mix a little of the old data into every batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.core.rng import generator
from remanence.data import cat_batches
from remanence.train.roles import Learner
from remanence.train.schedules import Schedule
from remanence.train.update import Update

_GOLDEN = (5**0.5 - 1) / 2


@dataclass
class Rewarm(Schedule):
    """From 0 to 1 in a share `warmup` of the run's steps, then to `final` along half a cosine over all that are left.

    eta_n = n / T_w for n < T_w,  else final + (1 - final) / 2 * (1 + cos(pi (n - T_w) / (T - T_w))),  T_w = round(warmup T)
    """

    warmup: float = knob(0.01, "share of the run's steps in which the rate rises", low=0, high=1)
    final: float = knob(0.1, "factor at the end", low=0, high=1)

    def factor(self, step: int, total: int | None, life_step: int) -> float:
        if total is None:
            raise BadInput("re-warming needs to know the number of steps; for an endless stream there is infinite-lr")
        rise = round(self.warmup * total)
        if step < rise:
            return step / rise
        share = min(1.0, (step - rise) / max(1, total - rise))
        return self.final + (1 - self.final) / 2 * (1 + math.cos(math.pi * share))


@dataclass
class RewarmReplay(Learner):
    """Learn new data at a rate that is warmed up again and decays over the new data, with a share of old rows in every batch.

        batch of b rows:  round(share b) rows of what the life learned before, the others new
        rate:             0 -> lr in `warmup` of the steps, then -> final * lr along half a cosine

    The old rows take the places of new ones, so that an event costs the same whatever the share: each epoch leaves that many of the new
    rows out, others each time. They are read as they were learned: every event's rows in the order of its first epoch, going on where
    the event before stopped, and from the begin again when all were read. With several earlier events they are read side by side, in
    proportion to their sizes, so that any stretch is the old mixture. Nothing is stored but where each stopped; after a forget the rows
    that are left have a new order. The optimizer begins anew, as events do (``carry=True`` carries its state). A life's first event
    has no old rows: it is the pretraining, at the same rate.

    Pick it to go on with a pretrained network on much new data: with a small share (0.05 where old and new are alike, 0.25 where they
    are far apart) it comes near training on everything anew. Needs: the data of earlier events within reach. Any problem. With
    rewarm=False the event's own schedule holds, such as infinite-lr, and only the replay is left.
    Reference: Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train Large Language Models", TMLR, arXiv
    2403.08763. There two or three data sets follow one another; the reading side by side is ours. In small batches round(share b) may be
    0: the share is that of rows in whole batches.
    """

    share: float = knob(0.05, "rows of every batch that are old ones", low=0, high=1)
    warmup: float = knob(0.01, "share of the event's steps in which the rate rises", low=0, high=1)
    final: float = knob(0.1, "rate at the event's end, as a factor of lr", low=0, high=1)
    rewarm: bool = knob(True, "whether the rate is warmed up and decays; False: by the event's own schedule")

    def setup(self) -> None:
        #: The place at which the reading of old rows stopped, as a share of a pass over all of them.
        self.place = 0.0
        #: Rows replayed in this event; rows of this epoch, and its batches so far.
        self.taken = self.size = self.batch = 0

    def begin(self, u: Update) -> None:
        self.taken = 0
        self._parts = u.history()[:-1] if self.share else []
        self._read(u)

    def _read(self, u: Update) -> None:
        """One pass over what was learned before, from where the last event stopped: the part of each row and its number in it."""
        parts, rows, places = [], [], []
        for part, examples in enumerate(self._parts):
            # the address at which the loop drew the order of that event's first epoch
            order = torch.randperm(len(examples), generator=generator(u.seed, f"learn/{part}", "", "order", 0))
            within = (0.5 + part * _GOLDEN) % 1  # so that no two parts have rows at one place
            rows.append(order)
            parts.append(torch.full_like(order, part))
            places.append((torch.arange(len(order), dtype=torch.float64) + within) / len(order))
        self._places, beside = torch.cat([torch.empty(0, dtype=torch.float64), *places]).sort(stable=True)
        start = int(torch.searchsorted(self._places, self.place, right=True))
        self._places = self._places.roll(-start)
        if len(beside):
            self._part, self._row = (torch.cat(each)[beside].roll(-start) for each in (parts, rows))
            u.extra_bytes += self._part.nbytes + self._row.nbytes + self._places.nbytes

    def learn(self, u: Update) -> None:
        own: Mapping[str, Any] = {"schedule": Rewarm(self.warmup, self.final)} if self.rewarm else {}
        self._running = bool(len(self._places))
        u.run(**own)
        self._running = False  # what keepers run after it is theirs
        if self.taken:
            self.place = float(self._places[(self.taken - 1) % len(self._places)])

    def replayed(self, size: int) -> int:
        """How many rows of a batch of `size` are old ones."""
        return round(self.share * size)

    def order(self, u: Update, index: Tensor) -> Tensor | list[Tensor]:
        if not getattr(self, "_running", False):
            return index
        self.size, self.batch = len(index), 0
        new = [len(rows) - self.replayed(len(rows)) for rows in index.split(u.settings.batch_size)]
        return list(index[: sum(new)].split(new))

    def prepare(self, u: Update, batch: Batch) -> Batch:
        if not getattr(self, "_running", False):
            return batch
        full = u.settings.batch_size
        count = self.replayed(min(full, max(0, self.size - self.batch * full)))
        places = torch.arange(self.taken, self.taken + count) % len(self._places)
        self.batch, self.taken = self.batch + 1, self.taken + count
        for part, examples in enumerate(self._parts):
            mine = self._row[places[self._part[places] == part]]
            if len(mine):
                rows = {name: c.to(u.device) for name, c in u.problem.compact(examples.batch(mine)).items()}
                rows["origin"] = torch.full_like(rows["id"], 1 + len(u.parts))  # a number that no keeper has
                batch = cat_batches(batch, rows)
        return batch
