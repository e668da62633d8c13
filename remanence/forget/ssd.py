"""Dampen the weights that matter far more to the forget set than to everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remanence.core.knobs import knob
from remanence.data import Examples, Request
from remanence.nn.fisher import absolute_gradient, batch_fisher, diagonal_fisher
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update


@dataclass
class SSD(Forgetter):
    """Selective synaptic dampening: two importance passes, then one multiplication. Nothing is trained.

        I_S[j] = mean over batches of S of (d mean log p(y|x) / d theta_j)^2          S = forget set F, all data D (F included)
        select j where I_F[j] > selection * I_D[j]
        theta_j <- min(dampening * I_D[j] / I_F[j], 1) * theta_j

    ``importance="batch"``: gradients of the means of shuffled batches, as in the official code; coherent examples add up, so
    the ratio I_F / I_D of a class is large and `selection` works as published (10 to 100). ``"example"``: squared per example, the
    paper's formula; since D contains F the ratio cannot exceed |D| / |F|, so `selection` must lie below that (1 to 5 for a class).
    ``"label-free"``: |f(x)|^2 instead of log p, absolute instead of squared (LFSSD). Over-dampening is a cliff: look at the retained
    accuracy in the receipt, and raise `selection` when it falls.

    Pick it for class requests on networks too big to train again: seconds, no training. Needs: labels, and the data seen
    (or as much as can be reached) for I_D. Reference: Foster et al. 2024, "Fast Machine Unlearning Without Retraining Through
    Selective Synaptic Dampening", arXiv 2308.07707.
    """

    trains: ClassVar[bool] = False

    selection: float = knob(
        10.0, "alpha: how much more a weight must matter to the forget set; smaller selects more", low=0
    )
    dampening: float = knob(1.0, "lambda: strength of what is left of a selected weight", low=0)
    importance: str = knob(
        "batch", "per batch, per example, or without labels", choices=("batch", "example", "label-free")
    )

    def forget(self, u: Update, request: Request) -> Outcome:
        forget, everything = self._importance(u, u.data("forget")), self._importance(u, u.data("seen"))
        touched = dampen(dict(u.model.named_parameters()), forget, everything, self.selection, self.dampening)
        return Outcome(notes=[f"dampened {touched} weights"])

    def _importance(self, u: Update, examples: Examples) -> dict[str, Tensor]:
        measures: dict[str, Callable[..., dict[str, Tensor]]] = {
            "example": diagonal_fisher,
            "batch": batch_fisher,
            "label-free": absolute_gradient,
        }
        rng = torch.Generator().manual_seed(
            u.seed_of("ssd")
        )  # a batch mean depends on its batch: never whole tasks in a row
        batches = u.batches(examples.select(torch.randperm(len(examples), generator=rng)), u.settings.batch_size)
        params = dict(u.model.named_parameters())
        return measures[self.importance](
            u.model, u.problem, batches, params, classes=u.classes.seen if u.columns else None
        )


@torch.no_grad()
def dampen(
    params: dict[str, Tensor],
    forget: dict[str, Tensor],
    everything: dict[str, Tensor],
    selection: float,
    dampening: float,
) -> int:
    """Dampen `params` in place by the rule above; returns how many weights were selected."""
    touched = 0
    for name, theta in params.items():
        chosen = forget[name] > selection * everything[name]
        factor = (dampening * everything[name][chosen] / forget[name][chosen]).clamp(max=1)
        theta[chosen] *= factor.to(theta)
        touched += int(chosen.sum())
    return touched
