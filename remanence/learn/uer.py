"""Learn the new by angles and the old by dot products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch, Out
from remanence.nn.anatomy import head
from remanence.train.roles import Learner
from remanence.train.update import Update


@dataclass
class UER(Learner):
    """New rows are answered by the cosine with each class's head row, rows that a keeper replays by the dot product.

        L = mean_new CE(scale * cos(h, w_c), y) + mean_replayed CE(w_c . h, y)        h: the head's input,  w_c: the head's rows

    The gradient of a cosine is orthogonal to w_c and to h, so to first order new rows cannot make their classes' rows longer than
    those of old ones: lengths, by which a growing head leans to what came last, are set by replay alone. Answers are dot products.
    The head has no bias: it is set to 0 when an event begins, and gets no gradient from this loss.

    Pick it with a replay keeper that draws as many rows as a batch has, in a single pass and with small batches. Needs: a linear
    head, labels, a keeper that replays: without one it only learns by angles. Leave momentum and weight decay off: both change
    lengths.
    Reference: Lin et al. 2023, "UER: A Heuristic Bias Addressing Approach for Online Continual Learning", arXiv 2309.04081. A
    reconstruction from its abstract: scale and how it answers were not seen. Rows of old classes in the new data count as new.
    """

    scale: float = knob(10.0, "factor of the cosine, as an inverse temperature", low=1e-3)

    def begin(self, u: Update) -> None:
        if not u.columns:
            raise BadInput("uer compares angles between classes, and this problem has none; learn by finetune")
        with torch.no_grad():
            bias = _head(u).bias
            if bias is not None:
                bias.zero_()
        u.ask_features()

    def objective(self, u: Update, batch: Batch) -> Tensor:
        h, w = u.out(batch, features=True).features, _head(u).weight
        assert h is not None
        new = batch.get("origin", torch.zeros_like(batch["id"])) == 0
        loss = h.new_zeros(())
        for rows, logits in ((new, self.scale * F.normalize(h, dim=1) @ F.normalize(w, dim=1).T), (~new, h @ w.T)):
            mine = {name: column[rows] for name, column in batch.items()}
            losses = u.problem.losses(Out(logits[rows]), mine, u.classes.seen) * mine.get("weight", 1.0)
            loss = loss + losses.sum() / max(1, len(losses))
        return loss


def _head(u: Update) -> nn.Linear:
    found = head(u.model)
    if not isinstance(found, nn.Linear):
        raise BadInput(f"uer needs a linear head, and this one is a {type(found).__name__}")
    return found
