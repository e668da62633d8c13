"""Contrast the new examples among themselves, and let old prototypes drift with the features they were made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.core.rng import generator
from remanence.data import cat_batches
from remanence.nn.anatomy import head
from remanence.nn.contrast import CosineLinear, Projection, cosine_head, supervised_contrast, unit
from remanence.nn.distances import kl_from_logits
from remanence.nn.heads import head_inputs
from remanence.train.roles import Learner, head_rows
from remanence.train.update import Update

_BASE = 0.07  # the temperature at which the contrast has weight 1


@dataclass
class PRD(Learner):
    """Prototype-sample relation distillation: features by supervised contrast on the new data alone, one prototype for
    each class that is drawn to its features, and old prototypes that are moved so that they still rank the new examples
    as they did.

        L = T / 0.07 * contrast(g(h_i)) + pull * mean_i (1 - cos(P_{y_i}, sg[h_i])) + distill * L_d    sg: no gradient
        samples:  L_d = sum_k KL(softmax_i(s*_ik / tau) || softmax_i(s_ik / tau))    s_ik = h_i.P_k / |P_k|
        classes:  L_d = mean_i KL(softmax_k(s*_ik / tau) || softmax_k(s_ik / tau))    i: batch, k: old classes
        answer: cos(h, P_k) / T        * is the network of the event's start

    h is the head's input, P the head's rows; the head becomes a cosine head without bias. g, two layers of `hidden` and
    `width` outputs, hangs on the head, is trained with the network and has no part in answers. P is moved by plain SGD
    of its own rate. L_d moves both the network and the old rows. Each row is there in two views, ``weak`` and
    ``strong``; without views, once. Nothing is stored but the network, and the copy of the event's start is dropped
    with the event.

    Pick it where no example may be kept and the answer is asked among the classes of one task; among all it gains less.
    Needs: labels, borders, views. Reference: Asadi et al. 2023, "Prototype-Sample Relation Distillation: Towards
    Replay-Free Continual Learning", arXiv 2303.14771. Deviations: the released code distils by ``classes``, task by
    task, the paper by ``samples``; here all old classes are one group. The teacher is in eval mode, as everywhere here.
    """

    temperature: float = knob(0.1, "T, of the contrast and of the answers", low=1e-3)
    pull: float = knob(2.0, "weight of the pull on prototypes", low=0)
    distill: float = knob(4.0, "weight of the distillation of relations", low=0)
    tau: float = knob(1.0, "temperature of the distillation, on features that are not normalised", low=1e-3)
    axis: str = knob("samples", "relations over the batch, or over the classes", choices=("samples", "classes"))
    prototype_lr: float = knob(0.01, "learning rate of the prototypes", low=0)
    hidden: int = knob(512, "hidden units of g", low=1)
    width: int = knob(128, "outputs of g", low=1)

    def structure(self, u: Update) -> dict[str, Any]:
        rows = u.columns - head_rows(u.model) if u.columns else 0
        if not u.columns or (rows <= 0 and _projection(u.model) is not None):
            return {}
        return {"rows": max(0, rows), "seed": u.seed_of("head")}

    def attach(self, model: nn.Module, structure: dict[str, Any]) -> nn.Module:
        kept, seed = _projection(model), int(structure["seed"])
        if kept is None:
            first, last = Projection(head_inputs(model), self.hidden), Projection(self.hidden, self.width)
            for number, layer in enumerate((first, last)):
                layer.reset_parameters(generator(seed, "projection", number))
            kept = nn.Sequential(first, nn.ReLU(), last).to(next(model.parameters()))
        else:
            del head(model).projection  # a head that grows becomes a new module, and takes none along
        model = super().attach(model, structure) if structure["rows"] else model
        model = cosine_head(model, self.temperature)
        head(model).projection = kept
        return model

    def parameters(self, u: Update) -> list[dict[str, Any]]:
        rows = [p for p in (_rows(u.model),) if p.requires_grad]
        return [{"params": rows, "lr": self.prototype_lr, "optimizer": "sgd", "name": "prototypes"}] if rows else []

    def begin(self, u: Update) -> None:
        if not u.columns:
            raise BadInput("prd contrasts classes, and this problem has none; use finetune with feature-distill or l2")
        u.ask_features()
        self._teacher = u.reference() if self.distill and len(u.classes.old) else None

    def objective(self, u: Update, batch: Batch) -> Tensor:
        weak, strong = u.view(batch, "weak"), u.view(batch, "strong")
        rows = batch if weak is batch and strong is batch else cat_batches(weak, strong)
        features, y = u.out(rows, features=True).features, rows["y"]
        projection = _projection(u.model)
        assert features is not None and projection is not None
        z, prototypes = unit(projection(features)), _rows(u.model)
        loss = supervised_contrast(z, y, self.temperature).mean() * (self.temperature / _BASE)
        if self.pull:
            loss = loss + self.pull * (1 - (unit(features.detach()) * unit(prototypes)[y]).sum(1)).mean()
        if self._teacher is not None:
            with torch.no_grad():
                then = u.problem.forward(self._teacher, rows, head(self._teacher)).features
                assert then is not None
                wanted = then @ unit(_rows(self._teacher)[u.classes.old]).T
            found = features @ unit(prototypes[u.classes.old]).T
            loss = loss + self.distill * relations(found, wanted, self.tau, self.axis)
        return loss


def relations(found: Tensor, wanted: Tensor, tau: float, axis: str) -> Tensor:
    """L_d from scores (B, K) of now and of then."""
    if axis == "samples":
        return kl_from_logits(found.T, wanted.T, tau).sum()
    return kl_from_logits(found, wanted, tau).mean()


def _projection(model: nn.Module) -> nn.Module | None:
    found = getattr(head(model), "projection", None)
    return found if isinstance(found, nn.Module) else None


def _rows(model: nn.Module) -> nn.Parameter:
    layer = head(model)
    assert isinstance(layer, CosineLinear)
    rows = layer.weight
    assert isinstance(rows, nn.Parameter)
    return rows
