"""Plain training on the new data: the baseline every keeper must beat, and the learner most lives use."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.train.roles import Learner
from remanence.train.update import Update


@dataclass
class Finetune(Learner):
    """Minimise the problem's loss on the batch.

        L = mean_i loss(f(x_i), y_i) over the competing columns

    With ``compete="new"`` only the classes of this task compete, so rows of old classes get no gradient from it: with the
    sigmoid link this is L_c of Smith et al. 2023 (arXiv 2203.17269), the cure of head bias in rehearsal-free learning.

    Pick it with a keeper beside it; alone it forgets. Needs: labels or targets.
    """

    compete: str = knob(
        "seen", "columns that compete in the loss: of all classes seen, or new ones only", choices=("seen", "new")
    )

    def objective(self, u: Update, batch: Batch) -> Tensor:
        columns = u.classes.seen if self.compete == "seen" or not len(u.classes.new) else u.classes.new
        return u.problem.loss(u.out(batch), batch, columns)
