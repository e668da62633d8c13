"""Shift the decision boundary over what is to be forgotten, without any retained data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Request
from remanence.nn.anatomy import evaluating, features
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update


@dataclass
class Boundary(Forgetter):
    """Boundary unlearning: the forget set's region is given to its neighbours, or to a class that is then removed.

        shrink:  x' = x + bound * sign(d/dx loss(f0(x), y))        y' = argmax over classes other than y of f0(x')
                 L = mean over D_f of loss(f(x), y')                f0 = the frozen network from before the request
        expand:  a shadow class: one more output v.h(x) + b on the head's input h
                 L = mean over D_f of -log softmax(f(x), v.h(x) + b)[shadow];  then v and b are dropped

    Only classes with retained examples can be y'; where that leaves an example none, because no retained data can be reached,
    every other class can.

    Pick it for a whole class when no retained data is at hand: some passes over the forget set. Expand leaves less sure answers, shrink
    spares the other classes a little better; nothing holds them but a small lr. Single examples it cannot forget: accuracy falls
    everywhere alike. Needs: labels, classes; for shrink inputs that are numbers.
    Reference: Chen et al. 2023, "Boundary Unlearning: Rapid Forgetting of Deep Networks via Shifting the Decision Boundary", arXiv
    2303.11570. Deviations: y' is never y (in the code it is where the step did not cross the boundary, which teaches the class
    again); x' is not cut to [0, 1] nor rounded to 1/255, for inputs may have any range; v and b are drawn as torch draws a linear
    layer (in the code by Xavier's rule, b = 0); the code's lr is 1e-5.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 10,
        "batch_size": 64,
        "optimizer": {"sgd": {"momentum": 0.9}},
        "lr": 0.003,
        "schedule": "constant",
    }

    mode: str = knob("shrink", "give the region to the neighbours, or to a shadow class", choices=("shrink", "expand"))
    bound: float = knob(0.1, "shrink: step in the unit of the inputs; 0.1 suits values in [0, 1]", low=0)

    def forget(self, u: Update, request: Request) -> Outcome:
        forget = u.data("forget")
        if not u.columns or forget["y"].is_floating_point():
            raise BadInput("boundary needs a class label for every example; use gradient-ascent where there are none")
        self._shadow: nn.Linear | None = None
        if self.mode == "shrink":
            if not forget["x"].is_floating_point():
                raise BadInput(
                    "shrink takes a step in the inputs, and these are no numbers but indices; use mode='expand'"
                )
            self._teacher, self._columns = u.reference(), _others(u)
        else:
            self._shadow = self._draw(u)
            u.ask_features()
        u.run(drive="forget")
        return Outcome()

    def parameters(self, u: Update) -> list[dict[str, Any]]:
        return [] if self._shadow is None else [{"params": self._shadow.parameters()}]

    def objective(self, u: Update, forget: Batch | None, retain: Batch | None) -> Tensor | None:
        assert forget is not None
        if self._shadow is None:
            return u.problem.loss(u.out(forget), {**forget, "y": self._nearest(u, forget)}, u.classes.seen)
        out = u.out(forget, features=True)
        wide = torch.cat([out.logits[:, u.classes.seen], self._shadow(out.features)], dim=1)
        return -wide.log_softmax(dim=1)[:, -1].mean()

    def _nearest(self, u: Update, batch: Batch) -> Tensor:
        """The class across the nearest boundary, for each row."""
        with torch.enable_grad():
            x = batch["x"].detach().requires_grad_(True)
            loss = u.problem.losses(u.problem.forward(self._teacher, {**batch, "x": x}), batch, u.classes.seen).sum()
            step = torch.autograd.grad(loss, x)[0].sign()
        with torch.no_grad():
            logits = u.problem.forward(self._teacher, {**batch, "x": x + self.bound * step}).logits[:, self._columns]
        return self._columns[logits.masked_fill(self._columns == batch["y"][:, None], -torch.inf).argmax(dim=1)]

    def _draw(self, u: Update) -> nn.Linear:
        first = next(u.batches(u.data("forget"), 1))
        with evaluating(u.model):
            h = features(u.model, first["x"])
        made: nn.Linear = nn.utils.skip_init(nn.Linear, h.shape[1], 1, device=h.device, dtype=h.dtype)
        for p in made.parameters():
            drawn = torch.empty(p.shape).uniform_(-(h.shape[1] ** -0.5), h.shape[1] ** -0.5, generator=u.rng("shadow"))
            p.data.copy_(drawn)
        return made


def _others(u: Update) -> Tensor:
    """Head columns that may be an answer, ascending."""
    own: Tensor = u.data("forget")["y"].unique()
    columns: Tensor = u.data("retain")["y"].unique()
    if not (own[:, None] != columns).any(dim=1).all():
        columns = u.classes.seen.cpu()
    if len(columns) < 2 and bool((own == columns).any()):
        raise BadInput("boundary needs a second class, and there is only one; use gradient-ascent or retrain")
    return columns.to(u.device)
