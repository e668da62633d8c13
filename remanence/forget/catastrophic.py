"""Train on the retained data alone and let the rest fade: the weakest baseline, and the last step of many methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from remanence.core.problem import Batch
from remanence.data import Request
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update


@dataclass
class Catastrophic(Forgetter):
    """Fine-tune on what is retained; the forget set is never looked at.

        L = mean over D_r of loss(f(x), y)

    Forgets only what the retained data overwrites: a class whose neighbours press in on it, hardly ever single examples.

    Pick it as the baseline between *do nothing* and *retrain*. Needs: retained data.
    References: called catastrophic forgetting in Golatkar et al. 2020, arXiv 1911.04933, and FT in Fan et al. 2024, arXiv 2310.12508.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 10,
        "batch_size": 64,
        "optimizer": {"sgd": {"momentum": 0.9, "weight_decay": 5e-4}},
        "lr": 0.01,
        "schedule": "constant",
    }

    def forget(self, u: Update, request: Request) -> Outcome:
        u.run(drive="retain")
        return Outcome()

    def objective(self, u: Update, forget: Batch | None, retain: Batch | None) -> Tensor | None:
        return None if retain is None else u.problem.loss(u.out(retain), retain, u.classes.seen if u.columns else None)
