"""Hold each weight as firmly as the network's answers depend on it."""

from __future__ import annotations

from dataclasses import dataclass

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.data import Examples
from remanence.nn.anchor import QuadraticAnchor
from remanence.nn.fisher import absolute_gradient, absolute_sensitivity
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class MAS(Keeper):
    """Memory aware synapses: the importance of a weight is how much the answers move with it; no label is read.

        L + strength * sum_j Omega_j (theta_j - theta*_j)^2        theta* = weights after the last event
        Omega_t,j = mean_x | d ||f(x)||^2 / d theta_j |        f = logits of all classes seen, in eval mode
        end of event t:  sum: Omega <- Omega + Omega_t        mean: Omega <- (1 - 1/t) Omega + 1/t Omega_t

    The absolute value is taken for each example, as the definition has it; with `group` > 1 for the mean gradient of so
    many, which is as much faster and loses what cancels inside a group (the released code's way, with its batch size).
    Of a row of text f is the logits at all of its targets. Parameters that the network itself holds frozen are left out.
    Anchor and Omega cost two numbers for each weight, however many events. Plain SGD diverges where lr * strength *
    Omega exceeds 1.

    Pick it like EWC, above all where labels are missing, wrong or few: it asks for none. In class-incremental lives it
    hardly helps by itself. Needs: borders. After a forget it is made anew from the new weights and the retained data.
    Reference: Aljundi et al. 2018, "Memory Aware Synapses", arXiv 1711.09601. Deviations: the paper's f is the head of
    one task; no local (Hebbian) variant; ``mean`` is the rule of Task-Free Continual Learning (2019, arXiv 1812.03596),
    here at borders.
    """

    strength: float = knob(1.0, "weight of the penalty", low=0)
    merge: str = knob("sum", "importances of the events are summed up, or averaged", choices=("sum", "mean"))
    group: int = knob(1, "examples whose mean gradient is taken before the absolute value; 1: the definition", low=1)

    def setup(self) -> None:
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.anchor = QuadraticAnchor({}, {}, strength=self.strength)
        self.events = 0

    def gradient(self, u: Update) -> None:
        self.anchor.add_gradient(u.parameters)

    def end(self, u: Update) -> None:
        if u.kind == "learn":
            self._consolidate(u, u.data("task"))

    def _consolidate(self, u: Update, examples: Examples) -> None:
        params = u.parameters
        seen = u.classes.seen if u.columns else None
        if self.group == 1:
            found = absolute_sensitivity(u.model, u.problem, u.batches(examples), params, seen)
        else:
            found = absolute_gradient(u.model, u.problem, u.batches(examples, self.group), params, seen)
        self.events += 1
        share = 1 / self.events if self.merge == "mean" else 1.0
        decay = 1 - share if self.merge == "mean" else 1.0
        self.anchor.merge(params, {name: share * importance for name, importance in found.items()}, decay)

    def forgot(self, u: Update, ids: Ids) -> None:
        self._begin_anew()
        for examples in u.history():
            if len(examples):
                self._consolidate(u, examples)
