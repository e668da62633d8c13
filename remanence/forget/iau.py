"""One ordinary step that learns what is retained and unlearns the request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Request
from remanence.nn.saliency import mean_gradient
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update


@dataclass
class IAU(Forgetter):
    """Influence approximation unlearning: the inverse curvature of `influence` is replaced by one step of an optimizer.

        g = grad of mean over D_r of loss(f(x), y) - s * grad of mean over D_f of loss(f(x), y)
        theta <- one step of a fresh optimizer along -g, at rate `lr`; one more, from a new g, for each further epoch

    ``scale="mean"``: s = 1, as released. Then -g is N / n_f times the v of `influence` at any theta, so under ``optimizer="sgd"``
    the step is theirs with lr * N / n_f in the place of H^{-1}: the direction is right for any number of examples, but ONE example
    moves the weights as far as a thousand would; for steps that grow with the request take an lr proportional to n_f / N.
    ``"influence"``: s = n_f / N, the forget set's share of the mean. At an optimum of the loss over all data that is again the same
    direction. Elsewhere the retained term outweighs the other N / n_f to 1, so what the step does most is to train on: on digits
    it left the forgotten examples' loss almost where it was. Hence "mean" is the default. The optimizer is the release's, a fresh
    Adam, whose first step is lr * g / (|g| + 1e-8): every weight moves by about lr, whatever the size of g.

    Pick it when there is time for two passes and no more, on a network trained with keep: gradient-restriction. Needs: labels or
    targets, retained data. Reference: "Efficient Machine Unlearning via Influence Approximation", 2025, arXiv 2507.23257.
    Deviations: gradients are taken in eval mode, where the released code leaves dropout and batch norm in train mode; every step
    sees all data, whatever `batch_size` and `accumulate` say.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 1,
        "batch_size": 256,
        "optimizer": "adam",
        "lr": 1e-3,
        "schedule": "constant",
    }

    scale: str = knob(
        "mean", "weight s of the forget set's mean: 1, or its share n_f / N", choices=("mean", "influence")
    )

    def forget(self, u: Update, request: Request) -> Outcome:
        kept = len(u.data("retain"))
        if not kept:
            raise BadInput("iau needs the gradient of retained data, and none can be reached; use gradient-ascent")
        self._step = -1
        u.extra_bytes += sum(p.nbytes for p in u.parameters.values())
        u.run(drive="retain", accumulate=-(-kept // u.settings.batch_size))
        return Outcome()

    def objective(self, u: Update, forget: Batch | None, retain: Batch | None) -> Tensor | None:
        """A plane with the slope g: every batch of the epoch, which makes one step, gives its share of it."""
        if self._step != u.step:
            self._step, self._slope = u.step, self._gradient(u)
        terms = [(g * p).sum() for g, p in zip(self._slope, u.parameters.values(), strict=True)]
        return torch.stack(terms).sum()

    def _gradient(self, u: Update) -> list[Tensor]:
        gone, kept = u.data("forget"), u.data("retain")
        params, classes = u.parameters, u.classes.seen if u.columns else None
        g = mean_gradient(u.model, u.problem, u.batches(kept), params, classes)
        if len(gone):
            s = 1.0 if self.scale == "mean" else len(gone) / (len(gone) + len(kept))
            forget = mean_gradient(u.model, u.problem, u.batches(gone), params, classes)
            g = {name: g[name] - s * forget[name] for name in g}
        return list(g.values())
