"""Store the examples whose gradients point in different directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.nn.buffer import Buffer
from remanence.nn.influence import example_gradients
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class GSS(Keeper):
    """Replay from a buffer that prefers examples whose gradient is unlike those of what it holds (GSS-Greedy).

        C = 1 + max_k cos(g, g_k)        g: gradient of a new row's loss;  g_k: of `compared` rows drawn from the buffer
        room: the row comes in.  full: only if C < 1; row i is drawn by C_i / sum C and gives way with chance C_i / (C_i + C)

    Every batch is joined by rows drawn from the buffer, as in plain replay; who is stored is decided after the batch's step, once for
    each row. Gradients are of all parameters, in eval mode, one backward for each new row: an event costs several times as much.

    Pick it for streams in which a few tasks have most of the rows, and nobody says which: there it keeps more of the small ones than
    a reservoir does. On balanced digits the reservoir is better. Needs: labels or targets, stores examples.
    Scores were made by the weights, so after a forget they are made anew. In a forget run it replays and stores nothing.
    Reference: Aljundi et al. 2019, "Gradient based sample selection for online continual learning", arXiv 1903.08671. Details the
    paper leaves open are as in the released code: a row that finds the buffer empty gets C = 1.1, rows to compare with are drawn once
    for a batch. Deviations: that code goes on only if the whole batch's gradient has C < 1, compares with gradients of minibatches,
    and draws who gives way by scores scaled to [0, 1]; this is the paper's rule. The variant by integer programming is not offered.
    """

    stores: ClassVar[tuple[str, ...]] = ("capacity",)

    capacity: int = knob(200, "examples kept in all", low=0)
    batch_size: int = knob(64, "rows drawn per batch", low=0)
    compared: int = knob(10, "rows of the buffer whose gradients a new row is compared with", low=1)

    def setup(self) -> None:
        self.buffer = Buffer(self.capacity)

    @property
    def inert(self) -> bool:
        return self.capacity == 0 or self.batch_size == 0

    def derived(self) -> bool:
        return len(self.buffer) > 0  # beside the rows, scores that the weights gave

    def prepare(self, u: Update, batch: Batch) -> Batch:
        return u.extend(batch, self.buffer.draw(self.batch_size, u.rng("gss")), self) if len(self.buffer) else batch

    def after(self, u: Update, batch: Batch) -> None:
        if u.kind == "learn" and u.epoch < u.sweep:
            own = batch["origin"] == 0
            self._offer(u, {name: column[own] for name, column in batch.items() if name not in ("origin", "weight")})

    def _offer(self, u: Update, rows: Batch) -> None:
        """The greedy rule, row by row. The rows to compare with are drawn once for all of `rows`."""
        rng = u.rng("gss-buffer")
        held = set(self.buffer.columns["id"].tolist()) if len(self.buffer) else set()
        scores = self._scores(u, rows, rng)
        for row, (number, score) in enumerate(zip(rows["id"].tolist(), scores.tolist(), strict=True)):
            if number in held:
                continue
            if len(self.buffer) == self.capacity:
                if score >= 1:
                    continue
                kept = self.buffer.columns["score"].cpu()
                place = int(torch.multinomial(kept + 1e-12, 1, generator=rng))
                old = float(kept[place])
                if float(torch.rand((), generator=rng, dtype=torch.float64)) * (old + score) >= old:
                    continue
                leaves = int(self.buffer.columns["id"][place])
                self.buffer.evict(Ids([leaves]))
                held.discard(leaves)
            one = {name: column[row : row + 1] for name, column in rows.items()}
            self.buffer.add({**one, "score": scores[row : row + 1].to(one["id"].device)}, rng)
            held.add(number)

    def _scores(self, u: Update, rows: Batch, rng: torch.Generator) -> Tensor:
        """C of each of `rows` (B,), compared with other rows of the buffer; 1.1 where there are none."""
        drawn = self.buffer.draw(self.compared, rng)
        against = torch.stack(list(self._directions(u, drawn))) if drawn else torch.empty(0)
        found = torch.full((len(rows["id"]),), 1.1, dtype=torch.float64)
        for row, direction in enumerate(self._directions(u, rows) if drawn else ()):
            others = against[drawn["id"] != rows["id"][row]]
            if len(others):
                found[row] = 1 + (others @ direction).max()
        return found

    def _directions(self, u: Update, rows: Batch) -> Iterator[Tensor]:
        """The gradient of each row's loss, at length 1."""
        classes = u.classes.seen if u.columns else None
        for gradient in example_gradients(u.model, u.problem, [rows], dict(u.model.named_parameters()), classes):
            yield F.normalize(gradient, dim=0)

    def forgot(self, u: Update, ids: Ids) -> None:
        if len(self.buffer):
            self.buffer.replace("score", self._scores(u, self.buffer.columns, u.rng("gss-buffer")))
