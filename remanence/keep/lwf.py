"""Let the model of the event's start say what the old classes' answers were."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.nn.distances import sigmoid_bce, soft_cross_entropy
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class LwF(Keeper):
    """Distil the old classes' predictions on the current data from the model as it was when the event began.

        softmax:  L + strength * mean_i CE(softmax(o_old(x_i) / T), softmax(o0_old(x_i) / T))
        sigmoid:  L + strength * mean_i mean_c BCE(sigmoid(o_c(x_i)), sigmoid(o0_c(x_i)))        over the old columns c

    The form follows the problem's link: softmax is LwF, sigmoid is the PredKD of Smith et al. (LwF.MC), which with
    ``Finetune(compete="new")`` and ``Classification(link="sigmoid")`` cures the bias of the head towards new classes. o0 is
    frozen and in eval mode; it is made anew at each event and dropped after it, so nothing here outlives an event. Rows that
    other keepers add are distilled, too. In a forget run the teacher is the model before it, on retained rows only.

    Pick it where no old example may be kept. Needs: borders, classes.
    References: Li & Hoiem 2016, "Learning without Forgetting", arXiv 1606.09282; Smith et al. 2023, "A Closer Look at
    Rehearsal-Free Continual Learning", arXiv 2203.17269.
    Deviations from LwF: one distribution over all old columns where the paper has one for each old task's head, and no
    warm-up phase that trains the new rows alone. As in the paper the term is not multiplied by T^2.
    """

    strength: float = knob(1.0, "weight of the distillation term", low=0)
    temperature: float = knob(2.0, "T > 0, above 1 for softer targets; sigmoid uses none", low=1e-3)

    def begin(self, u: Update) -> None:
        if not u.columns:
            raise BadInput(
                "lwf distils the answers for old classes, and this problem has no classes; use feature-distill or l2"
            )
        self._teacher = u.reference() if len(u.classes.old) else None

    def loss(self, u: Update, batch: Batch) -> Tensor | None:
        if self._teacher is None:
            return None
        old = u.classes.old
        with torch.no_grad():
            target = u.problem.forward(self._teacher, batch).logits[:, old]
        logits = u.out(batch).logits[:, old]
        if getattr(u.problem, "link", "softmax") == "sigmoid":
            losses = sigmoid_bce(logits, target.sigmoid())
        else:
            losses = soft_cross_entropy(logits, (target / self.temperature).softmax(dim=1), self.temperature)
        return self.strength * losses.mean()
