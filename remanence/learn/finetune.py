"""Plain training on the new data: the baseline every keeper must beat, and the learner most lives use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remanence.core.knobs import knob
from remanence.core.problem import Batch, Out
from remanence.train.roles import Learner
from remanence.train.update import Update


@dataclass
class Finetune(Learner):
    """Minimise the problem's loss on the batch.

        L = mean_i loss(f(x_i), y_i) over the competing columns

    With ``compete="new"`` only the classes of this task compete, so rows of old classes get no gradient from it: with the
    sigmoid link this is L_c of Smith et al. (arXiv 2203.17269), the cure of head bias in rehearsal-free learning. Rows that a
    keeper replays, and rows of old classes, compete among all classes seen, for their own would be barred (the asymmetric
    cross-entropy of Caccia et al. 2022, arXiv 2104.05025, who add up two means where this is one over all rows).

    Pick it with a keeper beside it; alone it forgets. Needs: labels or targets.
    """

    #: For texts, which have no competing columns, the objective is a mean over targets.
    by_rows: ClassVar[bool] = True

    compete: str = knob(
        "seen", "columns that compete in the loss: of all classes seen, or new ones only", choices=("seen", "new")
    )

    def objective(self, u: Update, batch: Batch) -> Tensor:
        if self.compete == "seen" or not len(u.classes.new):
            return u.problem.loss(u.out(batch), batch, u.classes.seen)
        among_all = batch.get("origin", torch.zeros_like(batch["y"])) > 0
        if not batch["y"].is_floating_point():  # a task may bring old classes, too
            among_all = among_all | ~torch.isin(batch["y"], u.classes.new)
        if not bool(among_all.any()):
            return u.problem.loss(u.out(batch), batch, u.classes.new)
        losses, weights = [], []
        for rows, columns in ((~among_all, u.classes.new), (among_all, u.classes.seen)):
            mine = {name: column[rows] for name, column in batch.items()}
            losses.append(u.problem.losses(Out(u.out(batch).logits[rows]), mine, columns))
            weights.append(mine.get("weight", torch.ones_like(losses[-1])))
        return torch.dot(torch.cat(losses), torch.cat(weights)) / torch.cat(weights).sum()
