"""Special abilities first, then the general one with a pinch of them: two stages of one life."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.data import Examples
from remanence.learn.mixture import Mixture
from remanence.train.update import Update


@dataclass
class DMT(Mixture):
    """Learn all of an event's data, mixed with a fraction k of every earlier source.

        S_1 = D_1 u ... u D_m               stage 1, one event: the special abilities
        S_2 = D_general u P_1 u ... u P_m   stage 2: P_i are round(k |D_i|) rows of D_i, at least one, without replacement

    Stage 1 is an event like any other: learn the joined table ``rm.data.cat([code, math])``, whose rows have ids of their own. With
    a column that says which source a row is of, named by ``source``, the fraction is drawn from each of them; otherwise from each
    earlier event. Learning every set in an event of its own instead is sequential training with a pinch of all that came before. Each
    epoch has every row of the event exactly once, and the same drawn rows; the rate begins anew with each stage.

    Pick it for a model that shall get a general ability last without losing special ones: k trades one for the other. Needs: the
    data of earlier events within reach. Any problem. k=0 is stage 2 without the pinch (mixed sequential training).
    Reference: Dong et al. 2024, "How Abilities in Large Language Models are Affected by Supervised Fine-tuning Data Composition", ACL,
    arXiv 2310.05492: 3 epochs a stage, lr 2e-5, batches of 16; give them to the event, with the cosine that is usual for it. `remanence.
    measure.composition` has the paper's scaling experiment and its conflict index. Where the life goes on after stage 2, its rows are an
    earlier source, too; the paper stops there.
    """

    k: float = knob(1 / 256, "fraction of each earlier source that is mixed in", low=0, high=1)
    source: str | None = knob(None, "the column that says which source a row is of; None: each event is one")

    def begin(self, u: Update) -> None:
        if self.source is not None and not any(self.source in examples.columns for examples in u.history()):
            raise BadInput(
                f"dmt: no data that was learned has a column {self.source!r}; name another, or leave `source` out"
            )

    def learn(self, u: Update) -> None:
        rng, drawn = u.rng("dmt"), []
        for examples in self.earlier(u) if self.k else []:
            for rows in self.sources(examples):
                count = min(len(rows), max(1, round(self.k * len(rows))))
                drawn.append(examples.select(rows[torch.randperm(len(rows), generator=rng)[:count]]))
        self.mix(u, u.data("task"), drawn)

    def sources(self, examples: Examples) -> list[Tensor]:
        """The rows of each source in `examples`."""
        if self.source is None or self.source not in examples.columns:
            return [torch.arange(len(examples))] * bool(len(examples))
        column: Any = examples.columns[self.source]
        values = column.tolist() if isinstance(column, Tensor) else column
        found: dict[Any, list[int]] = {}
        for row, value in enumerate(values):
            found.setdefault(value, []).append(row)
        return [torch.tensor(rows) for rows in found.values()]
