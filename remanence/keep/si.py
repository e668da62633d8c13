"""Hold each weight as firmly as its own way lowered the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.nn.anchor import QuadraticAnchor
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class SI(Keeper):
    """Synaptic intelligence: the importance of a weight is its share of the fall of the loss along the way of training.

        L + strength * sum_j Omega_j (theta_j - theta*_j)^2        theta* = weights after the last event
        in a step:  omega_j <- omega_j - g_j (change of theta_j in the step)        g = gradient of L alone
        end of an event:  Omega_j <- max(0, Omega_j + omega_j / (D_j^2 + damping)),  omega <- 0        D: change in it

    The change is the one that the weights really made, so it is true under momentum, Adam, clipping, masks and
    projections. g is taken before clipping and holds the loss terms of all parts, and the closed penalties of keepers
    named before this one. No example is looked at again and no label is asked for: an event costs no pass more. Memory:
    theta* and Omega; inside an event also omega, the start, and the last gradient and weights. Plain SGD diverges where
    lr * strength * Omega exceeds 1 (Omega may reach omega / damping): then raise the damping, or take Adam.

    Pick it where EWC would do and a pass over the data for its Fisher is too much; in class-incremental lives it hardly
    helps by itself. Needs: borders. After a forget Omega is dropped: it was gathered by weights that held what is gone,
    and their way cannot be gone again. Nothing is anchored then until the next event has ended; a life retrained
    without the ids has its own Omega.
    Reference: Zenke, Poole & Ganguli 2017, "Continual Learning Through Synaptic Intelligence", arXiv 1703.04200;
    strength and damping are those of its permuted MNIST (1 and 0.001 on split MNIST). The maximum is the official
    code's; the paper has none.
    """

    strength: float = knob(0.1, "weight of the penalty", low=0)
    damping: float = knob(0.1, "xi: keeps the importance of weights that hardly moved finite", low=1e-12)

    def setup(self) -> None:
        self.anchor = QuadraticAnchor({}, {}, strength=self.strength)
        #: omega of the event that is going on, by parameter; empty between events.
        self.path: dict[str, Tensor] = {}

    def begin(self, u: Update) -> None:
        self._start: dict[str, Tensor] = {}
        self._step: tuple[list[Tensor], ...] = ()
        if u.kind == "learn":
            params = dict(u.model.named_parameters())
            self._start = {name: p.detach().clone() for name, p in params.items()}
            self.path = {name: torch.zeros_like(p) for name, p in params.items()}
            u.extra_bytes += 3 * sum(start.nbytes for start in self._start.values())

    @torch.no_grad()
    def gradient(self, u: Update) -> None:
        self._settle()  # the step before, where an owner makes several of a batch
        if u.kind == "learn":
            moving = {name: p for name, p in u.parameters.items() if p.grad is not None}
            self._step = (
                [self.path[name] for name in moving],
                [p.grad.clone() for p in moving.values() if p.grad is not None],
                [p.detach() for p in moving.values()],
                [p.detach().clone() for p in moving.values()],
            )
        self.anchor.add_gradient(u.parameters)

    def after(self, u: Update, batch: Batch) -> None:
        self._settle()

    def _settle(self) -> None:
        """Add the last step to omega."""
        if self._step:
            path, gradients, params, before = self._step
            torch._foreach_addcmul_(path, gradients, torch._foreach_sub(params, before), value=-1.0)
            self._step = ()

    @torch.no_grad()
    def end(self, u: Update) -> None:
        if u.kind != "learn":
            return
        params = dict(u.model.named_parameters())
        found = {n: self.path[n] / ((p - self._start[n]).square() + self.damping) for n, p in params.items()}
        self.anchor.merge(params, found)
        for importance in (self.anchor.stiffness or {}).values():
            importance.clamp_(min=0)
        self.path = {}

    def forgot(self, u: Update, ids: Ids) -> None:
        self.anchor = QuadraticAnchor({}, {}, strength=self.strength)
