"""Replay what the network answered once, beside the labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch, Out
from remanence.data import Examples
from remanence.nn.buffer import Buffer
from remanence.nn.distances import mse
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class DER(Keeper):
    """A reservoir keeps rows and the outputs that the training step gave for them; old outputs and labels are trained on again.

        L + alpha * mean_{i, c} (f_c(x_i) - o_ic)^2 + beta * mean_j loss(f(x_j), y_j)      i, j: two draws from the buffer

    This is DER++; ``beta=0`` is DER. o_i are the outputs of the step in which row i came in, before its optimizer step, so they are
    taken all along the training and tell more than a label does. Every epoch offers its rows again (a row that is there is not
    taken twice), so an event counts in the reservoir by its rows times its epochs. When the head grows, the new entries of o_i are
    what the newly drawn columns answer to x_i, in eval mode: so old rows hold new columns back, too. A head that has all columns
    from the start (``Classification(classes=...)``) is the paper's case, and on the digits the better one.

    Pick it where old examples may be kept in a reservoir, without borders between tasks. Needs: labels or targets, stores examples.
    In a forget run it stands aside; after it the outputs are made anew by the new weights, in eval mode.
    Reference: Buzzega et al. 2020, "Dark Experience for General Continual Learning", arXiv 2004.07211; the defaults are those of
    its CIFAR-10 with 200 examples. Deviations: one forward for new and drawn rows, where the official code makes three, so batch
    norm sees them together; its buffer may hold an example twice; it knows no head that grows.
    """

    stores: ClassVar[tuple[str, ...]] = ("capacity",)

    alpha: float = knob(0.1, "weight of the distance to stored outputs", low=0)
    beta: float = knob(0.5, "weight of the loss on stored labels; 0: DER", low=0)
    capacity: int = knob(200, "examples in the reservoir", low=0)
    batch_size: int = knob(32, "rows of each of the two draws", low=0)

    def setup(self) -> None:
        self.buffer = Buffer(self.capacity)

    @property
    def inert(self) -> bool:
        return self.capacity == 0 or self.batch_size == 0 or self.alpha == self.beta == 0

    def derived(self) -> bool:
        return len(self.buffer) > 0  # beside the rows, outputs of the weights

    def begin(self, u: Update) -> None:
        columns = self.buffer.columns
        if u.kind == "learn" and len(self.buffer):
            fresh = self._answers(u)
            width = columns["logits"].shape[1]
            if fresh.shape[1] > width:
                self.buffer.replace("logits", torch.cat([columns["logits"], fresh[:, width:]], 1))

    def prepare(self, u: Update, batch: Batch) -> Batch:
        self._drawn: list[tuple[float, slice, Batch]] = []
        for weight in (self.alpha, self.beta) if u.kind == "learn" and len(self.buffer) else ():
            rows = self.buffer.draw(self.batch_size if weight else 0, u.rng("der"))
            place = slice(len(batch["id"]), len(batch["id"]) + len(rows["id"]))
            self._drawn.append((weight, place, rows))
            # Weight 0: the owner's mean is over its own rows.
            batch = u.extend(batch, {**rows, "weight": torch.zeros(len(rows["id"]), device=rows["id"].device)}, self)
        return batch

    def loss(self, u: Update, batch: Batch) -> Tensor | None:
        if u.kind != "learn":
            return None
        logits = u.out(batch).logits
        self._logits = logits.detach()
        if not self._drawn:
            return None
        (alpha, old, rows), (beta, again, _) = self._drawn
        total = logits.new_zeros(())
        if alpha:
            total = total + alpha * mse(logits[old], rows["logits"]).mean()
        if beta:
            labelled = {name: column[again] for name, column in batch.items()}
            classes = u.classes.seen if u.columns else None
            total = total + beta * u.problem.losses(Out(logits[again]), labelled, classes).mean()
        return total

    def after(self, u: Update, batch: Batch) -> None:
        if u.kind != "learn":
            return
        columns = {name: column for name, column in batch.items() if name not in ("origin", "weight")}
        columns["logits"] = self._logits
        self.buffer.add({name: column[batch["origin"] == 0] for name, column in columns.items()}, u.rng("der-buffer"))

    def forgot(self, u: Update, ids: Ids) -> None:
        if len(self.buffer):
            self.buffer.replace("logits", self._answers(u))

    def _answers(self, u: Update) -> Tensor:
        """What the network answers now, in eval mode, to the rows in the buffer."""
        columns = self.buffer.columns
        rows = Examples({name: c for name, c in columns.items() if name != "id"}, "buffer", columns["id"].cpu())
        with u.aside():
            return torch.cat([u.problem.forward(u.model, batch).logits for batch in u.batches(rows)])
