"""Climb the loss of the forget set, held by the loss of the retained data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Request
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update


@dataclass
class GradientAscent(Forgetter):
    """Gradient ascent on the forget set, paired with descent on the retained data where it can be reached.

        L = -ascent * mean over D_f of min(loss(f(x), y), cap) + retain * mean over D_r of loss(f(x), y)

    One epoch goes over the forget set once; every batch of it is paired with one of the retained data. The loss of an example has
    no upper end, so ascent without a bound destroys the network: beyond `cap` nats an example pushes no further.

    Pick it for few examples and few steps, or as the baseline of every better objective. Needs: labels or targets; retained data
    unless ``retain=0``. References: Graves et al. 2021, "Amnesiac Machine Learning", arXiv 2010.10981; paired form (gradient
    difference): Liu et al. 2022, arXiv 2203.12817. Deviation: neither bounds the loss; ``cap: null`` gives theirs.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 5,
        "batch_size": 64,
        "optimizer": "sgd",
        "lr": 0.1,
        "schedule": "constant",
    }

    ascent: float = knob(1.0, "weight of the forget set's loss", low=0)
    retain: float = knob(1.0, "weight of the retained data's loss", low=0)
    cap: float | None = knob(5.0, "nats beyond which an example is forgotten enough; null: never", low=0)

    def forget(self, u: Update, request: Request) -> Outcome:
        u.run(drive="forget")
        return Outcome()

    def objective(self, u: Update, forget: Batch | None, retain: Batch | None) -> Tensor | None:
        assert forget is not None
        losses = u.problem.losses(u.out(forget), forget, u.classes.seen if u.columns else None)
        loss = -self.ascent * (losses if self.cap is None else losses.clamp(max=self.cap)).mean()
        if retain is not None and self.retain:
            loss = loss + self.retain * u.problem.loss(u.out(retain), retain, u.classes.seen if u.columns else None)
        return loss
