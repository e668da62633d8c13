"""Average the weights as they are trained, each tensor at a pace of its own that its gradients tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.nn.slow import SlowCopy
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class LCIA(Keeper):
    """An average follows the trained weights, tensor by tensor, and takes their place at the end of the event (dynamic EMA).

        after the first step of an event:  theta* <- theta
        after every other:                 theta* <- (1 - alpha) theta* + alpha theta
        alpha = factor * (1 + |g|) / (|theta - theta*| |g - g'|),    `fallback` where that is not between 0 and 1

    g is the tensor's gradient at this step, g' the one before it, |.| the sum of absolute values. It comes from an expansion to second
    order of the loss around theta, with g - g' for the curvature: how far may the average stay behind and still be good at the new data?
    Training goes on from theta within the event; the next event starts from theta*. As sums grow with a tensor, alpha falls with the
    square of its size: ``norm="mean"`` takes means instead, with a `factor` that must then be chosen much smaller.

    Pick it where no old example may be kept, a network that knows something is trained by AdamW, and an event has about 1 / `fallback`
    steps: in fewer the average hardly leaves, and where alpha is often near 1 (small tensors, plain SGD) it is the raw weights. Watch it:
    a small language model that learned new facts kept no more old ones than without it, and with a smaller factor learned no new ones.
    Needs: borders. Adapters or all weights. Nothing outlives an event, and a forget run is left alone. Running statistics of batch norm
    are those of the trained weights.
    Reference: Qiao et al. 2025, "Large Continual Instruction Assistant", arXiv 2410.10868, by its official code, which has the factor
    of 2 and finds its first step by an error. Not here: which adapters a task trains and a text is answered by, chosen by the likeness
    of instructions; a keeper sees no raw text and a network has one set of adapters. `remanence.nn.allocation` makes that choice for
    whoever keeps several lives. Deviation: a tensor without a gradient has a gradient of zero, where the code falls back.
    """

    moves_at_end: ClassVar[bool] = True

    factor: float = knob(2.0, "multiplies alpha", low=0)
    fallback: float = knob(0.01, "alpha where the formula gives none between 0 and 1", low=0, high=1)
    norm: str = knob("sum", "of absolute values: their sum, or their mean", choices=("sum", "mean"))

    def setup(self) -> None:
        self.average = SlowCopy()
        self.gradients: dict[str, Tensor] = {}
        self.steps = 0

    @property
    def inert(self) -> bool:
        return self.factor == 0 and self.fallback == 1

    def begin(self, u: Update) -> None:
        self.forgot(u, Ids())

    @torch.no_grad()
    def after(self, u: Update, batch: Batch) -> None:
        if u.kind != "learn" or u.steps_done == self.steps:  # a batch whose gradient is still gathered makes no step
            return
        self.steps = u.steps_done
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in u.parameters.items()}
        known = {name: p for name, p in u.parameters.items() if name in self.average.values}
        self.average.track(u.parameters)
        if known:
            self.average.follow(known, self._alphas(known, gradients))
        self.gradients.update(gradients)

    def _alphas(self, params: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The share of each tensor, without a look at it from here."""
        names, g = list(params), [gradients[name] for name in params]
        away = torch._foreach_sub(list(params.values()), [self.average.values[name] for name in names])
        bent = torch._foreach_sub(g, [self.gradients[name].to(new.device) for name, new in zip(names, g, strict=True)])
        a, b, c = (torch.stack(torch._foreach_norm(parts, 1, dtype=torch.float64)) for parts in (away, g, bent))
        if self.norm == "mean":
            a, b, c = (sums / sums.new_tensor([p.numel() for p in g]) for sums in (a, b, c))
        alpha = self.factor * (1 + b) / (a * c)
        alpha = torch.where((alpha > 0) & (alpha < 1), alpha, self.fallback)  # so it is for inf and nan, too
        return dict(zip(names, alpha.unbind(), strict=True))

    def end(self, u: Update) -> None:
        if u.kind == "learn":
            self.average.put(dict(u.model.named_parameters()))
        u.extra_bytes += self.bytes()
        self.forgot(u, Ids())

    def forgot(self, u: Update, ids: Ids) -> None:
        self.average.clear()
        self.gradients, self.steps = {}, 0
