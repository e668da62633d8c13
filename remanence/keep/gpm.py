"""Learn only in directions that the inputs of old tasks do not use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Examples
from remanence.nn.anatomy import norm_modules
from remanence.nn.subspace import Subspace, layer_inputs, projected_layers, step_outside
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class GPM(Keeper):
    """Gradient projection memory: every step is taken out of the span of the old tasks' inputs, layer by layer.

        dW <- dW - (dW M) M'          M (d_in, k): orthonormal basis of what the layer saw in earlier events
        end of an event:  E = R - R M M' = U S V',  M <- [M, first k columns of V],  k the smallest with
                          |R M|^2 + S_1^2 + .. + S_k^2 >= eps_t |R|^2,  eps_t = threshold + increase * t

    R (samples, d_in) are the layer's inputs for examples of the event. dW is the change that the optimizer made, so
    momentum, weight decay and Adam cannot move old answers either. A bias is projected with its weight (inputs get a
    column of ones). What has no basis is frozen after the first event: norm layers, their running statistics too.

    The head is a layer like the others and shared by all events: every row, old or new, keeps its answers to old
    inputs. A new row answers old inputs as it was drawn and learns in what is left, as in the paper's single-head
    experiment, where all columns are there from the start.

    Pick it where no example may be stored and tasks use different inputs. Needs: borders; linear layers and
    convolutions. After a forget the bases are built again from the retained data and the new weights.
    Reference: Saha et al. 2021, "Gradient Projection Memory for Continual Learning", arXiv 2103.09762; threshold,
    increase and samples are those of its 10-split CIFAR-100. Deviations: the official code projects the gradient
    under plain SGD, and its nets have no biases to project; it keeps one direction fewer for the first task, and looks at 24 to
    125 examples, layer by layer.
    """

    threshold: float = knob(0.97, "share of the inputs' energy that is protected; 0: nothing", low=0, high=1)
    increase: float = knob(0.003, "added to the threshold for every earlier event, up to 1", low=0, high=1)
    samples: int = knob(125, "examples of an event whose inputs are looked at", low=1)

    def setup(self) -> None:
        self.subspace = Subspace()
        self.events = 0

    @property
    def inert(self) -> bool:
        return self.threshold == 0

    def begin(self, u: Update) -> None:
        self._norms = list(norm_modules(u.model).values())
        self._layers = projected_layers(u.model, "gpm")

    def prepare(self, u: Update, batch: Batch) -> Batch:
        if self.subspace.bases:
            for module in self._norms:
                module.eval()
        return batch

    def project(self, u: Update, params: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        if self.subspace.bases:
            step_outside(self.subspace, self._layers, params, before)

    def end(self, u: Update) -> None:
        if u.kind == "learn":
            self._extend(u, u.data("task"))

    def _extend(self, u: Update, examples: Examples) -> None:
        rows = torch.randperm(len(examples), generator=u.rng("gpm"))[: self.samples]
        seen = examples.select(rows)
        with u.aside():
            inputs = layer_inputs(u.model, lambda batch: u.problem.forward(u.model, batch), u.batches(seen), bias=True)
        threshold = min(1.0, self.threshold + self.increase * self.events)
        self.subspace.extend(inputs, threshold, seen.ids)
        self.events += 1

    def forgot(self, u: Update, ids: Ids) -> None:
        self.subspace, self.events = Subspace(), 0
        for examples in u.history():
            if len(examples):
                self._extend(u, examples)
