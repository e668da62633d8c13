"""Dampen the weights that matter far more to the forget set than to everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.data import Examples, Request
from remanence.nn.anatomy import tensor_bytes
from remanence.nn.fisher import absolute_gradient, batch_fisher, diagonal_fisher
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update

#: How a guard backs off: from at least so low a selection, by this factor.
SMALLEST, STEP = 1e-3, 4 / 3


@dataclass
class SSD(Forgetter):
    """Selective synaptic dampening: two importance passes, then one multiplication. Nothing is trained.

        I_S[j] = mean over batches of S of (d mean log p(y|x) / d theta_j)^2          S = forget set F, all data D (F included)
        select j where I_F[j] > selection * I_D[j]
        theta_j <- min(dampening * I_D[j] / I_F[j], 1) * theta_j

    ``importance="batch"``: gradients of the means of shuffled batches, as in the official code; coherent examples add up, so
    the ratio I_F / I_D of a class is large and `selection` works as published (10 to 100). ``"example"``: squared per example, the
    paper's formula; since D contains F the ratio cannot exceed |D| / |F|, so `selection` must lie below that (1 to 5 for a class).
    ``"label-free"``: |f(x)|^2 instead of log p, absolute instead of squared (LFSSD).

    Over-dampening is a cliff: a little more, and the network is gone. With a `guard` the accuracy on retained data is looked at, and
    while it falls by more than that, the weights are put back and `selection` grows by a third: start low, and the strongest
    dampening that the rest bears is found. Our addition; it needs retained data and classes.

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
    guard: float | None = knob(None, "largest fall of the accuracy on retained data; null: do not look", low=0, high=1)

    def forget(self, u: Update, request: Request) -> Outcome:
        if self.guard is not None and not (u.columns and len(u.data("retain"))):
            raise BadInput("ssd: a guard looks at the accuracy on retained data, and there is none; leave guard out")
        forget, everything = self._importance(u, u.data("forget")), self._importance(u, u.data("seen"))
        params: dict[str, Tensor] = dict(u.parameters)
        if self.guard is None:
            return Outcome(
                notes=[f"dampened {dampen(params, forget, everything, self.selection, self.dampening)} weights"]
            )
        floor = self._retained(u) - self.guard
        before = {name: p.detach().clone() for name, p in params.items()}
        u.extra_bytes += tensor_bytes(list(before.values()))
        selection = max(self.selection, SMALLEST)
        while True:  # ends: beyond the largest ratio nothing is selected, and nothing falls
            touched = dampen(params, forget, everything, selection, self.dampening)
            if self._retained(u) >= floor or not touched:
                return Outcome(notes=[f"dampened {touched} weights at selection {selection:.4g}"])
            with torch.no_grad():
                for name, p in params.items():
                    p.copy_(before[name])
            selection *= STEP

    def _retained(self, u: Update) -> float:
        """Accuracy on retained data, in eval mode."""
        examples = u.data("retain")
        best = u.outputs(examples)[:, u.classes.seen].argmax(1)
        return float((u.classes.seen[best] == examples["y"].to(u.device)).double().mean())

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
        params = dict(u.parameters)
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
