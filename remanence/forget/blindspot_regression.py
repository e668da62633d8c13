"""Answer, where forgetting is asked for, like a network that never saw it: for numbers instead of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch, Out
from remanence.data import Request, cat_batches
from remanence.nn.taps import attention_distance, hidden_layers, taps
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update


@dataclass
class BlindspotRegression(Forgetter):
    """A fresh network, trained for a little while on the retained data only, says what to answer on the forget set.

        B = newly drawn weights, `blindspot_epochs` epochs on D_r
        L_r = mean over retained rows of d(f(x), y)        d = half the squared difference, or the absolute one, summed over outputs
        L_f = mean over forget rows of d(f(x), B(x)) + attention * sum over layers of |n(f_l(x)) - n(B_l(x))|^2 / places
        L = c L_f + (1 - c) L_r        c = share of forget rows in the batch, n = attention map (nn.taps)

    Batches mix both sets. Since L_r and L_f are means over their own rows and c weighs them by count, each row weighs the same, as in
    a plain mean over the batch. No target of the forget set is read. `blindspot_epochs` is a real knob: B must come as near to a
    retrained network as the few epochs allow, for its errors are taught; trained long, it is the retrained network.

    Pick it for a regression whose forgotten region cannot be inferred from the rest: where it can, a retrained network knows it,
    too, and there is little to forget. For classes it is bad-teacher with a teacher that saw the retained data. Needs: numbers as
    targets, retained data. Reference: Tarun et al. 2023, "Deep Regression Unlearning", arXiv 2210.08196. Deviations: half the squared
    difference by default, for that is this library's loss of a regression (the paper's is ``difference="absolute"``); a constant rate
    instead of one lowered on plateaus; in a (B, D) layer every unit is a place of the attention map, for the paper's maps are of images.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 1,
        "batch_size": 256,
        "optimizer": "adam",
        "lr": 1e-3,
        "schedule": "constant",
    }

    blindspot_epochs: int = knob(2, "epochs of the fresh network on the retained data", low=0)
    attention: float = knob(50.0, "lambda: weight of the attention maps; 0: answers only", low=0)
    difference: str = knob("squared", "d; the one the network was trained with", choices=("squared", "absolute"))
    layers: list[str] | None = knob(None, "names of the layers whose maps are compared; null: all activation modules")

    def forget(self, u: Update, request: Request) -> Outcome:
        if u.columns:
            raise BadInput("blindspot-regression compares numbers, and this problem has classes; use bad-teacher")
        retain = u.data("retain")
        if not len(retain):
            raise BadInput("blindspot-regression learns what to answer from retained data, and none can be reached")
        self._taps = (hidden_layers(u.model) if self.layers is None else self.layers) if self.attention else []

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            return self._distances(u.problem.forward(module, batch), batch["y"]).mean()

        blindspot = u.fresh("blindspot")
        u.fit(blindspot, retain, loss, epochs=self.blindspot_epochs)
        self._blindspot = blindspot.eval().requires_grad_(False)
        u.run(drive="mixed")
        return Outcome()

    def objective(self, u: Update, forget: Batch | None, retain: Batch | None) -> Tensor | None:
        gone = 0 if forget is None else len(forget["id"])
        kept = 0 if retain is None else len(retain["id"])
        rows = forget if retain is None else retain if forget is None else cat_batches(forget, retain)
        assert rows is not None
        with taps(u.model, self._taps if gone else []) as seen:
            out = u.out(rows)
        loss = out.logits.new_zeros(())
        if kept:
            loss = loss + (1 - gone / (gone + kept)) * self._distances(Out(out.logits[gone:]), rows["y"][gone:]).mean()
        if forget is not None:
            with torch.no_grad(), taps(self._blindspot, self._taps) as taught:
                answers = u.problem.forward(self._blindspot, forget).logits
            unlike = self._distances(Out(out.logits[:gone]), answers).mean()
            for name in self._taps:
                unlike = unlike + self.attention * attention_distance(seen[name][:gone], taught[name]).mean()
            loss = loss + gone / (gone + kept) * unlike
        return loss

    def _distances(self, out: Out, target: Tensor) -> Tensor:
        """d per row, (B,)."""
        values = out.logits.reshape(len(target), -1)
        apart = values - target.to(values.dtype).reshape(len(target), -1)
        return apart.abs().sum(1) if self.difference == "absolute" else 0.5 * apart.square().sum(1)
