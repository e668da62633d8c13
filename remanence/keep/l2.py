"""Hold the weights near where they were before this event."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from remanence.core.knobs import knob
from remanence.nn.anatomy import head_name
from remanence.nn.anchor import QuadraticAnchor
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class L2(Keeper):
    """A quadratic pull toward the weights of the event's start.

        L + strength * sum_j (theta_j - theta0_j)^2        (its gradient is added in closed form)

    It needs no data, so it acts from the first event on, anchored at the given (pretrained) weights. Head rows of classes
    that are new in this event have no old value and are left out.

    Pick it with pretrained networks, where it beats EWC and feature distillation; from scratch pair it with `lwf`.
    Needs: nothing. Reference: Smith et al. 2023, "A Closer Look at Rehearsal-Free Continual Learning", arXiv 2203.17269.
    """

    strength: float = knob(0.01, "weight of the penalty", low=0)

    def begin(self, u: Update) -> None:
        values = {name: p.detach() for name, p in u.parameters.items()}
        rows = [n for n in values if n.rpartition(".")[0] == head_name(u.model)] if u.columns else []
        top = {name: values.pop(name) for name in rows}
        held = {name: torch.zeros_like(value).index_fill_(0, u.classes.old, 1) for name, value in top.items()}
        self._anchors = [QuadraticAnchor(values, None, self.strength), QuadraticAnchor(top, held, self.strength)]
        u.extra_bytes += sum(anchor.bytes() for anchor in self._anchors)

    def gradient(self, u: Update) -> None:
        for anchor in self._anchors:
            anchor.add_gradient(u.parameters)
