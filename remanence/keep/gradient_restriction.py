"""Keep the gradients small, so that one step can take an example out again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.nn.anatomy import twice_differentiable
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class GradientRestriction(Keeper):
    """While learning, the norm of the loss's gradient is made small with the loss itself.

        L + strength * sum over parameter tensors p of |d L / d p|_2        L = mean of loss(f(x), y) over the batch

    The sum is one of norms, one for each tensor, not the norm of all. A small gradient is a small influence, so that what a
    later request has to take out again is less. Stores nothing; acts in learn events only. The norm is that of a batch's mean,
    in which examples cancel: on digits with batches of 8 and strength 0.3 the norm of single examples' gradients is 25 to 30 %
    lower at equal accuracy, with the default strength 2 to 6 %; with batches of 64 it is not lower before training has
    converged. Too strong (1, or 0.3 with batches of 2), and the network ends where every gradient is 0: it answers alike to all.

    Pick it in lives that will be asked to forget by iau or influence; a step costs about twice as much (double backward).
    Needs: labels or targets; layers that can be differentiated twice, so not ``compile``.
    Reference: "Efficient Machine Unlearning via Influence Approximation", 2025, arXiv 2507.23257. As in the released code the
    gradient is that of the batch's mean, with dropout and batch norm as they are in training. L is the problem's loss over
    all classes seen and over all rows of the batch, those replayed too, also where the learner's objective is another.
    """

    strength: float = knob(0.005, "weight of the norms; alpha in the paper", low=0)

    def begin(self, u: Update) -> None:
        if u.settings.compile:
            raise BadInput(
                "gradient-restriction differentiates twice, which a compiled forward cannot; use compile=False"
            )
        u.enter(twice_differentiable())

    def loss(self, u: Update, batch: Batch) -> Tensor | None:
        if u.kind != "learn":
            return None
        loss = u.problem.loss(u.out(batch), batch, u.classes.seen if u.columns else None)
        found = torch.autograd.grad(loss, list(u.parameters.values()), create_graph=True, allow_unused=True)
        return self.strength * torch.stack([g.norm() for g in found if g is not None]).sum()
