"""Lateral neurons learn online which inputs a layer sees, and later steps keep out of their span."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.nn.anatomy import norm_modules
from remanence.nn.subspace import Subspace, has_inputs, layer_inputs, projected_layers, step_outside
from remanence.train.roles import Keeper
from remanence.train.update import Update

_PASSES = 20  # over the retained data, when rows are learned again after a forget
_ROWS = 1024  # of a layer's inputs that are looked at in a batch, evenly spaced: a convolution has one for each place


@dataclass
class HLOP(Keeper):
    """Gradient projection whose bases are learned batch by batch, by a local Hebbian rule, instead of a decomposition at the end.

        y = H x,  z = x - M M'x - H'y,  V <- momentum V + (1 - momentum) mean y z',  H <- H + rate V       `steps` times a batch
        dW <- dW - (dW M) M'                      end of an event:  M <- orthonormal basis of M and the rows of H

    x are a layer's inputs in eval mode (a column of ones for the bias), H (k, d) begins orthonormal and random, with k = first * d
    rows in the first event and later * d in others. It is Oja's subspace rule on what M leaves over: H turns toward the first k
    principal directions of the inputs, not centred. dW is the change that the optimizer made, so momentum and weight decay do
    not leak. What has no basis is frozen after the first event: norm layers, their running statistics too.

    Pick it where no example may be stored and nothing may be collected either, as on a chip, or in spiking networks, whose
    layers see the spikes of every time step. Its rows are as many as `first` and `later` say, where GPM takes as many as a share
    of the energy needs: fewer rows leave more room for what comes and keep less of what was. Needs: borders; linear layers
    and convolutions. After a forget the rows are learned again, in 20 passes over the retained data under the new weights.

    Reference: Xiao et al. 2024, "Hebbian Learning based Orthogonal Projection for Continual Learning of Spiking Neural Networks",
    arXiv 2402.11984. rate, steps and momentum are the released code's, first and later the mean
    shares of its network for permuted MNIST (80, 200, 100 and 70 of 784 and 800). Deviations: one more forward for each batch,
    where the code listens to the step's own; the rate is at most 1 / mean |x|^2, above which the rule may not
    settle (the code holds mean y z' within 10); rows are made
    orthonormal when they join M (the code projects by H'H, which is a projection only when it has settled); lateral neurons
    that spike, and weights of the way back that differ, are left out.
    """

    first: float = knob(0.15, "rows for the first event, in input widths of the layer", low=0, high=1)
    later: float = knob(
        0.09, "rows for each later event, in input widths; none are left over when all are used", low=0, high=1
    )
    rate: float = knob(0.01, "rate of the Hebbian rule", low=0)
    steps: int = knob(5, "Hebbian steps for each batch", low=0)
    momentum: float = knob(0.9, "share of the change before", low=0, high=1)

    def setup(self) -> None:
        self.subspace = Subspace()
        self.events = 0
        self.rows: dict[str, Tensor] = {}  # H of each layer, in this event only
        self.velocity: dict[str, Tensor] = {}  # V

    @property
    def inert(self) -> bool:
        return self.first == 0 and self.later == 0

    def begin(self, u: Update) -> None:
        self._norms = list(norm_modules(u.model).values())
        self._layers = projected_layers(u.model, "hlop")
        if u.kind == "learn":
            self._draw(u)

    def _draw(self, u: Update) -> None:
        """New rows for every layer, orthonormal."""
        share = self.later if self.events else self.first
        for name, own in projected_layers(u.model, "hlop").items():
            if has_inputs(u.model.get_submodule(name)):
                width = u.model.get_parameter(own["weight"])[0].numel() + ("bias" in own)
                count = min(max(1, round(share * width)) if share else 0, width - self.subspace.rank(name))
                drawn = torch.randn(width, count, generator=u.rng("hlop"), dtype=torch.float64)
                self.rows[name] = torch.linalg.qr(drawn).Q.T.float().contiguous().to(u.device)
                self.velocity[name] = torch.zeros_like(self.rows[name])

    def prepare(self, u: Update, batch: Batch) -> Batch:
        if self.subspace.bases:
            for module in self._norms:
                module.eval()
        return batch

    def project(self, u: Update, params: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        if self.subspace.bases:
            step_outside(self.subspace, self._layers, params, before)

    def after(self, u: Update, batch: Batch) -> None:
        if u.kind == "learn":
            own = batch["origin"] == 0
            self._listen(u, {name: column[own] for name, column in batch.items()})

    def _listen(self, u: Update, batch: Batch) -> None:
        if not len(batch["id"]):
            return
        with u.aside():
            inputs = layer_inputs(
                u.model, lambda b: u.problem.forward(u.model, b), [batch], bias=True, max_rows=_ROWS, whole=True
            )
        for name, x in inputs.items():
            h, v = self.rows[name].to(u.device), self.velocity[name].to(u.device)
            self.rows[name], self.velocity[name] = self._hebb(h, v, x.to(h), self.subspace.bases.get(name))

    @torch.no_grad()
    def _hebb(self, h: Tensor, v: Tensor, x: Tensor, m: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The rule on inputs x (n, d): H and V after it."""
        rest = x if m is None else x - (x @ m.to(x)) @ m.to(x).T
        rate = (len(x) / x.square().sum().clamp_min(1e-12)).clamp(max=self.rate)
        for _ in range(self.steps):
            y = x @ h.T
            change = y.T @ (rest - y @ h) / len(x)
            v = self.momentum * v + (1 - self.momentum) * change
            h = h + rate * v
        return h, v

    def end(self, u: Update) -> None:
        if u.kind == "learn":
            self._merge(u.data("task").ids)

    def _merge(self, ids: Ids) -> None:
        self.subspace.extend(self.rows, 1.0, ids)
        self.rows, self.velocity = {}, {}
        self.events += 1

    def forgot(self, u: Update, ids: Ids) -> None:
        self.setup()
        for examples in u.history():
            if len(examples):
                self._draw(u)
                for _ in range(_PASSES):
                    for batch in u.batches(examples, 64):
                        self._listen(u, batch)
                self._merge(examples.ids)
