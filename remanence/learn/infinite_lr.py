"""A learning rate that never has to know the end: up once, down once to a constant, and down for good only in a copy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.train.schedules import Schedule


@dataclass
class InfiniteLR(Schedule):
    """Warm up and cool down once in a life, then go on at a constant rate over any number of events; `anneal` ends a branch.

        n = step of the life;  eta = factor * lr,  lr being eta_max
        n < W:           eta = eta_max n / W
        W <= n < W + C:  cosine        eta = eta_const + (eta_max - eta_const) / 2 * (1 + cos(pi u)),  u = (n - W) / C
                         inverse-sqrt  eta = eta_max + (eta_const - eta_max) h(u) / h(1),  h(u) = 1 / sqrt(1 + sharpness u) - 1
        after that:      eta = eta_const
        last `anneal` steps of a run, begun at step d:  eta = eta_d (eta_min / eta_d)^((n - d) / anneal)

    n counts the steps of the whole life, so that warm-up and cooldown come once, and every later event begins at the constant
    rate: no re-warming, which is what repeated cosine forgets by. Only the annealing needs to know where a run ends.

    Without annealing the weights look worse than they are; what is shipped is an annealed branch, and the life itself goes on from the
    weights before it. Copy the life's home, resume the copy, and let it learn its last data once more (or the next) with ``anneal``;
    ``carry=True`` keeps the optimizer's state from event to event. To go on from annealed weights is to re-warm them.

    Pick it for a stream whose end nobody knows, with replay beside it. Needs: nothing. With warmup=0 and cooldown=0 it goes on with a
    network that was trained elsewhere.
    Reference: Singh et al. 2025, "Beyond Cosine Decay: On the effectiveness of Infinite Learning Rate Schedule for Continual
    Pre-training", arXiv 2503.02844; Ibrahim et al. 2024, arXiv 2403.08763, where the shares 0.55 and 0.1 come from (a cooldown of 60 %
    and a warm-up of 1 % of the steps there: the defaults suit a first event of 1000). The exponent as printed divides by
    anneal + d, d counted from the life's begin, so that eta_min comes only d steps after the end, and the later the branch the flatter
    it is; that is offered as ``literal``. A branch that begins before the cooldown is over starts from the rate it has. Where an event
    trains in several phases, each counts from the event's first step.
    """

    warmup: int = knob(10, "steps of the life in which the rate rises from 0", low=0)
    cooldown: int = knob(600, "steps of the life after them in which it falls to the constant", low=0)
    constant: float = knob(0.55, "the constant rate, as a factor of the highest", low=1e-9, high=1)
    final: float = knob(0.1, "the rate at the end of the annealing, as a factor of the highest", low=1e-9, high=1)
    anneal: int = knob(0, "last steps of this run that are annealed; 0: none", low=0)
    shape: str = knob("cosine", "of the cooldown", choices=("cosine", "inverse-sqrt"))
    sharpness: float = knob(10.0, "a of inverse-sqrt: how much of the fall comes early", low=1e-9)
    literal: bool = knob(False, "anneal by the exponent as it is printed")

    def factor(self, step: int, total: int | None, life_step: int) -> float:
        if not self.anneal:
            return self.going(life_step + step)
        if total is None:
            raise BadInput(
                "infinite-lr: annealing needs to know where the run ends; take `anneal` out for an endless stream"
            )
        begun = max(0, total - self.anneal)
        if step < begun:
            return self.going(life_step + step)
        start, length = self.going(life_step + begun), total - begun
        length += (life_step + begun) * self.literal
        if start <= self.final:
            return start
        return max(self.final, start * math.pow(self.final / start, (step - begun) / length))

    def going(self, n: int) -> float:
        """The factor at step `n` of a life that goes on."""
        if n < self.warmup:
            return n / self.warmup
        if n >= self.warmup + self.cooldown:
            return self.constant
        share = (n - self.warmup) / self.cooldown
        if self.shape == "cosine":
            return self.constant + (1 - self.constant) / 2 * (1 + math.cos(math.pi * share))
        return 1 + (self.constant - 1) * self._fall(share) / self._fall(1)

    def _fall(self, share: float) -> float:
        return 1 / math.sqrt(1 + self.sharpness * share) - 1
