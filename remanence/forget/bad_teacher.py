"""Learn from a network that knows nothing what to answer where forgetting is asked for."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Request, cat_batches
from remanence.nn.distances import kl_from_logits
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update


@dataclass
class BadTeacher(Forgetter):
    """Two teachers: one that never learned for the forget set, the network from before the request for the rest.

        L = mean over a batch of D_f and of a share of D_r of  KL(softmax(t(x) / T) || softmax(f(x) / T))
        t = a network with newly drawn weights for x in D_f,  the network from before the request for x in D_r

    One distribution over the classes seen. Both teachers are frozen and in eval mode. What the incompetent one answers is a draw:
    nearly flat, and another for another seed.

    Pick it where answers on the forget set shall be as unsure as those of a network that never saw it; such answers are
    noticeable, for a retrained network mostly is sure. Needs: classes, retained data; no labels. Reference: Chundawat et al. 2023,
    "Can Bad Teaching Induce Forgetting? Unlearning in Deep Networks using an Incompetent Teacher", arXiv 2205.08096. Deviations:
    the code divides by the number of classes, too, and takes one epoch of batches of 256 at lr 1e-4; rows outside the share are left out of shuffled
    batches, so a batch has fewer rows than `batch_size`.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 10,
        "batch_size": 64,
        "optimizer": "adam",
        "lr": 1e-3,
        "schedule": "constant",
    }

    share: float = knob(0.3, "of the retained examples, drawn once", low=0, high=1)
    temperature: float = knob(1.0, "T > 0", low=1e-3)

    def forget(self, u: Update, request: Request) -> Outcome:
        if not u.columns:
            raise BadInput(
                "bad-teacher compares probabilities, and this problem has no classes; use blindspot-regression"
            )
        self._good = u.reference()
        self._bad = u.fresh("bad-teacher").eval().requires_grad_(False)
        ids = u.data("retain").id
        drawn = torch.randperm(len(ids), generator=u.rng("bad-teacher"))[: round(self.share * len(ids))]
        self._drawn = ids[drawn].to(u.device)
        u.run(drive="mixed")
        return Outcome(notes=[f"{len(drawn)} of {len(ids)} retained examples took part"])

    def objective(self, u: Update, forget: Batch | None, retain: Batch | None) -> Tensor | None:
        drawn = None if retain is None else {n: c[torch.isin(retain["id"], self._drawn)] for n, c in retain.items()}
        parts = [(self._bad, forget), (self._good, drawn)]
        taught = [(teacher, batch) for teacher, batch in parts if batch is not None and len(batch["id"])]
        if not taught:
            return None
        seen = u.classes.seen
        with torch.no_grad():
            target = torch.cat([u.problem.forward(teacher, batch).logits[:, seen] for teacher, batch in taught])
        rows = functools.reduce(cat_batches, [batch for _, batch in taught])
        return kl_from_logits(u.out(rows).logits[:, seen], target, self.temperature).mean()
