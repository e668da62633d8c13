"""Replay one small set of general texts, and hold the network's states on them in the same coarse state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import TOKENS, Batch, target_counts, targets
from remanence.core.rng import generator
from remanence.data import Examples
from remanence.nn.anatomy import head
from remanence.nn.buffer import Buffer
from remanence.train.roles import Keeper
from remanence.train.update import Update

FORMS = ("margin", "l1", "l2", "labels")


@dataclass
class GeRe(Keeper):
    """A fixed set of general rows is replayed in every later event, and the states h that the head sees there may not leave the band in
    which the network that first met them had them: below, within or above one standard deviation around the mean.

        p = mean + std,  n = mean - std                 per dimension of the stored states h*
        d = relu(p - h) where h* >= p,  relu(h - n) where h* <= n,  relu(h - p) + relu(n - h) elsewhere
        L = (L_task + L_general) / 2 + strength * sum(d) / (number of d that are not 0)

    The general rows are drawn from the first event of the life, when it ends (from the first that can be reached, where the keeper
    comes later): let that be the general text, learned, or only shown (``epochs=0``). Each epoch goes once
    through them, spread evenly over its batches; `per_batch` puts so many into every batch instead. Of a text every token but the first
    is a target there. ``l1`` and ``l2`` hold the states themselves, ``labels`` replays only: the paper's own baselines.

    Pick it to keep the general ability of a language model without storing the tasks' data. Needs: general data first; works for every
    problem. Reference: Zhang et al. 2025, "GeRe: Towards Efficient Anti-Forgetting in Continual Learning of LLM via General Samples
    Replay", arXiv 2508.04676. Deviations: texts are as long as the life's context (the paper: 563 tokens); states are kept where a
    token is predicted, so the last of a text has none; the distillation on logits is not offered.
    """

    stores: ClassVar[tuple[str, ...]] = ("texts",)

    strength: float = knob(100.0, "weight of the margin term", low=0)
    dynamic: bool = knob(False, "whether the margin term is scaled to the size of the loss instead of by `strength`")
    texts: int = knob(1000, "general rows kept", low=0)
    per_batch: int = knob(0, "general rows in every batch; 0: each once in every epoch", low=0)
    form: str = knob("margin", "what holds the states", choices=FORMS)

    def setup(self) -> None:
        self.buffer = Buffer(self.texts)
        self.states = torch.empty(0)  # (T, D), row after row
        self.counts = torch.empty(0, dtype=torch.int64)  # states of each row
        self.place = [-1, 0]  # the epoch, and how many new rows of it have come

    @property
    def inert(self) -> bool:
        return self.texts == 0 or (self.strength == 0 and not self.dynamic and self.form != "labels")

    def begin(self, u: Update) -> None:
        self.place = [-1, 0]
        past = u.history()
        past = past[:-1] if u.kind == "learn" else past
        if not len(self.buffer) and past:
            self._collect(u, past[0])
        if len(self.buffer) and self.form != "labels":
            mean, std = self.states.mean(0), self.states.std(0)
            self._high, self._low = mean + std, mean - std
            self._starts = self.counts.cumsum(0) - self.counts
            u.ask_features()

    def prepare(self, u: Update, batch: Batch) -> Batch:
        count = len(self.buffer)
        self._rows = torch.empty(0, dtype=torch.int64)
        if not count:
            return batch
        if self.per_batch:
            self._rows = torch.randperm(count, generator=u.rng("gere"))[: self.per_batch]
        else:
            seen = self.place[1] if self.place[0] == u.epoch else 0
            self.place = [u.epoch, seen + int((batch["origin"] == 0).sum())]
            total = len(u.data("task" if u.kind == "learn" else "retain"))
            first, last = (min(count, round(count * n / total)) for n in (seen, self.place[1]))
            order = torch.randperm(count, generator=generator(u.seed_of("gere"), u.epoch))
            self._rows = order[first:last]
        if not len(self._rows):
            return batch
        rows = {name: column[self._rows.to(column.device)] for name, column in self.buffer.columns.items()}
        own, general = target_counts(batch), target_counts(rows)
        weight = batch.get("weight", torch.ones_like(own))
        # The mean over all targets becomes the mean of the two means; other keepers' rows, of weight 1, stay comparable.
        half = (own.sum() + general.sum()) / 2
        batch = {**batch, "weight": weight * half / (weight * own).sum()}
        return u.extend(batch, {**rows, "weight": torch.ones_like(general) * half / general.sum()}, self)

    def loss(self, u: Update, batch: Batch) -> Tensor | None:
        if self.form == "labels" or not len(self._rows):
            return None
        mine = batch["origin"] == 1 + u.parts.index(self)
        out = u.out(batch, features=True)
        assert out.features is not None
        h = out.features[mine[targets(batch)[0]] if TOKENS[0] in batch else mine]
        places = torch.cat(
            [torch.arange(int(n)) + s for s, n in zip(self._starts[self._rows], self.counts[self._rows], strict=True)]
        )
        stored = self.states[places.to(self.states.device)].to(h)
        if self.form == "margin":
            margin = margin_loss(h, stored, self._low, self._high)
        else:
            margin = (h - stored).abs().mean() if self.form == "l1" else (h - stored).square().mean()
        if self.dynamic:
            with torch.no_grad():
                scale = u.problem.loss(out, batch, u.classes.seen if u.columns else None) / (margin + 1e-8)
            return scale * margin
        return self.strength * margin

    def end(self, u: Update) -> None:
        if u.kind == "learn" and not len(self.buffer):
            self._collect(u, u.data("task"))

    def forgot(self, u: Update, ids: Ids) -> None:
        self._remember(u)

    def _collect(self, u: Update, source: Examples) -> None:
        chosen = source.select(torch.randperm(len(source), generator=u.rng("gere-texts"))[: self.texts].sort().values)
        for batch in u.batches(chosen):
            if TOKENS[0] in batch:
                batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
            self.buffer.add(batch, u.rng("gere-buffer"))
        self._remember(u)

    @torch.no_grad()
    def _remember(self, u: Update) -> None:
        """The states of the rows in the buffer, by the network as it is now."""
        rows = {name: column.cpu() for name, column in self.buffer.columns.items()}
        if not len(self.buffer) or self.form == "labels":
            self.states, self.counts = torch.empty(0), torch.empty(0, dtype=torch.int64)
            return
        table = Examples({name: column for name, column in rows.items() if name != "id"}, "general", rows["id"])
        with u.aside():
            found = [u.problem.forward(u.model, batch, head(u.model)).features for batch in u.batches(table)]
        self.states = torch.cat([h for h in found if h is not None])
        self.counts = target_counts(rows).to(torch.int64)


def margin_loss(h: Tensor, stored: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How far states `h` (T, D) are out of the band of the `stored` ones; the mean over those entries that are out of it."""
    low, high = low.to(h), high.to(h)
    over, under = (high - h).relu(), (h - low).relu()
    within = (h - high).relu() + (low - h).relu()
    distance = torch.where(stored >= high, over, torch.where(stored <= low, under, within))
    return distance.sum() / (distance.detach() != 0).sum().clamp(min=1)
