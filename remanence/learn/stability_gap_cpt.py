"""Continued pretraining without the first dip: a small good part of the new data, some epochs of it, in the mixture of the old."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.data import Examples, cat
from remanence.data.recurring import apportioned
from remanence.learn.mixture import Mixture
from remanence.nn.ngrams import NGrams
from remanence.train.update import Update

_CHUNK = 4096  # texts scored at a time


@dataclass
class StabilityGapCPT(Mixture):
    """Every epoch is as long as a subset of the event's rows: the most usual of them, and a fixed share of old rows.

        S = subset n        pool = the S rows with the least -log p(text) / tokens under n-grams of trusted text
        epoch = (1 - old) S rows of the pool  +  old S |D_i| / sum_j |D_j| rows of each earlier event i

    Whole numbers go to the largest remainders, so that every source has its share; what an event lacks, the others give. With
    ``dynamic`` each epoch draws its rows of the pool anew, with ``fixed`` all have the same; the old rows are drawn once. Rows that are
    not drawn are not consumed, though who is drawn depends on them, too. Give the event ``epochs=4``, the paper's best.

    Trusted text is what the column ``trusted`` marks in the event's own data (those rows are in the pool first, where there is room);
    without it, what the life learned before, which is right where the new data is to be like the old. Text is judged per token, but
    short standard phrases are still liked best: take repeated texts out before. The first event of a life has nothing before it: without
    a column ``trusted`` it is learned whole.

    Pick it for much new text of mixed quality at a high rate, and look at the dip by `stability-gap` (its depth, length and area). Needs:
    the data of earlier events within reach; text, unless ``select="random"``, with which any problem will do.
    Reference: Guo et al. 2025, "Efficient Domain Continual Pretraining by Mitigating the Stability Gap", ACL, arXiv 2406.14833: strategies
    I to III. There KenLM scores documents, here a model of n-grams over tokens scores rows; there the old mixture is rebuilt from public
    sources with the part of the web (82 %) given to the new domain, here from the life's own events. The recipe for instructions is not here.
    """

    subset: float = knob(0.1, "length of an epoch, as a share of the event's rows", low=1e-9, high=1)
    old: float = knob(0.18, "share of an epoch's rows that earlier events give", low=0, high=1)
    select: str = knob("usual", "which rows are the pool", choices=("usual", "random"))
    redraw: str = knob("dynamic", "whether every epoch draws from the pool anew", choices=("dynamic", "fixed"))
    trusted: str | None = knob(None, "column that marks trusted rows of the event; None: trust what was learned before")
    ngram: int = knob(3, "tokens of the longest n-gram", low=1)

    def begin(self, u: Update) -> None:
        task = u.data("task")
        if u.settings.patience is not None:
            raise BadInput("stability-gap-cpt draws the rows of an epoch itself; take `patience` out")
        if self.trusted is not None and self.trusted not in task.columns:
            raise BadInput(f"stability-gap-cpt: no column {self.trusted!r}; there is {', '.join(task.columns)}")
        if self.select == "usual" and "input_ids" not in task.columns:
            raise BadInput("stability-gap-cpt judges texts, and these are none: select='random'")

    def learn(self, u: Update) -> None:
        task, earlier = u.data("task"), [examples for examples in self.earlier(u) if len(examples)]
        if not earlier and self.trusted is None:
            self.mix(u, task, [])
            return
        size = max(1, round(self.subset * len(task)))
        pool = task.select(self.pool(u, task, earlier)[:size])
        learned = max(1, sum(map(len, earlier)))
        weights = [1 - self.old * bool(earlier), *(self.old * len(examples) / learned for examples in earlier)]
        counts = apportioned(size, weights, [size, *map(len, earlier)])
        rng = u.rng("stability-gap-cpt")
        again = [
            examples.select(torch.randperm(len(examples), generator=rng)[:count])
            for examples, count in zip(earlier, counts[1:], strict=True)
        ]
        self._pool, self._count = size, counts[0]
        self._fixed = torch.randperm(size, generator=rng)[: counts[0]]
        self.mix(u, pool, again)
        del self._count  # what keepers run after it is theirs

    def pool(self, u: Update, task: Examples, earlier: list[Examples]) -> Tensor:
        """The numbers of the task's rows, the best first."""
        rng = u.rng("stability-gap-cpt/pool")
        if self.select == "random":
            return torch.randperm(len(task), generator=rng)
        if self.trusted is not None:
            column = task.columns[self.trusted]
            marks = column if isinstance(column, Tensor) else torch.tensor([bool(value) for value in column])
            reference = task.select(marks.bool().nonzero()[:, 0])
            if not len(reference):
                raise BadInput(f"stability-gap-cpt: no row is marked in the column {self.trusted!r}")
        else:
            reference = cat(earlier)
        vocab = 1 + max(int(part["input_ids"].max()) for part in (task, reference) if len(part))
        model = NGrams(vocab, self.ngram).fit(reference["input_ids"], reference["attention_mask"])
        losses = [
            model.losses(task["input_ids"][rows], task["attention_mask"][rows])
            for rows in torch.arange(len(task)).split(_CHUNK)
        ]
        return torch.cat(losses).argsort(stable=True)

    def order(self, u: Update, index: Tensor) -> Tensor | list[Tensor]:
        count: int | None = getattr(self, "_count", None)
        if count is None:
            return index
        drawn = index[index < self._pool][:count] if self.redraw == "dynamic" else self._fixed
        keep = index >= self._pool  # the old rows stand after the pool
        keep[torch.isin(index, drawn)] = True
        return list(index[keep].split(u.settings.batch_size))
