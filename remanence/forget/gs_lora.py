"""Forget through low-rank adapters, in few blocks of a transformer, request after request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Examples, Request, cat
from remanence.nn.adapters import LowRank, add_low_rank
from remanence.nn.anatomy import norm_modules, replace_module, tensor_bytes
from remanence.nn.blocks import feed_forward, group_lasso
from remanence.nn.concepts import prototypes
from remanence.nn.distances import kl_from_logits
from remanence.train.roles import Forgetter, Outcome, Step
from remanence.train.update import Update


@dataclass
class GSLoRA(Forgetter):
    """Each request trains fresh low-rank adapters on the feed-forward layers; a group lasso leaves most blocks alone. Then they are merged.

        W' = W + B A        on both feed-forward layers of every block; nothing else moves, the head neither
        L = L_r + beta max(0, bound - L_f) + alpha sum over blocks g of sqrt(sum of |A|^2 + |B|^2 in g)
            + pull max(0, bound_p - D_f) + hold D_r
        L_r, L_f = mean loss of a retained, of a forget batch        D = mean of KL(softmax(p_y) || softmax(e(x)))

    p_y is the mean embedding of class y when the request begins, e(x) the head's input; ``pull`` and ``hold`` above 0 make it
    GS-LoRA++. An epoch goes over a share of the retained data, drawn once; batches of the forget set cycle beside it. From epoch
    `average_from` on, the adapters at the end of each epoch are averaged. At the end a block whose change is at most `threshold` of its
    weights' norm stays as it was, bit for bit; the others take B A in, and the network has its old structure again.

    The lasso only makes a block small; what makes it zero is the threshold. A = B = 0 is a stationary point, so a strong lasso from the
    first epoch on can win before anything is forgotten; give it `alpha_from`. In a network without attention every hidden linear layer
    is a block. Normalisation layers are in eval mode, so no running statistic moves. Classes of earlier requests are not in the data
    any more: that they stay forgotten is measured, not enforced.

    Pick it for class after class taken from a pretrained transformer, when little retained data is at hand. Needs: labels, a class
    head, retained data, hidden linear layers. Takes no `where`, whose names and masks do not know the adapters.
    References: Zhao et al. 2024, "Continual Forgetting for Pre-trained Vision Models", arXiv 2403.11530; Zhao et al. 2025, "Practical
    Continual Forgetting for Pre-trained Vision Models", arXiv 2501.09705. `bound` is for plain cross-entropy; their heads are CosFace
    of scale 64, with 105 to 110. Deviations: the whole forget set takes part, there a share; the code divides B A by the rank, draws A
    more narrowly, averages A and B as here, and keeps the epoch that is best on test data, here the last.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 100,
        "batch_size": 48,
        "optimizer": {"adamw": {"weight_decay": 0.05}},
        "lr": 0.01,
        "schedule": {"cosine": {"final": 1e-3}},
    }

    rank: int = knob(8, "rank of every change", low=1)
    alpha: float = knob(1e-4, "weight of the group lasso", low=0)
    alpha_from: int = knob(0, "first epoch with the lasso", low=0)
    beta: float = knob(0.15, "weight of the bounded ascent", low=0)
    bound: float = knob(10.0, "BND: nats beyond which a forget batch is forgotten enough", low=0)
    pull: float = knob(0.0, "w_f: weight of the way from the prototypes of what is forgotten; 0.01 to 0.06", low=0)
    bound_p: float = knob(18.0, "BND_p: the distance beyond which that is far enough", low=0)
    hold: float = knob(0.0, "w_r: weight of the way to the prototypes of what is retained", low=0)
    data_ratio: float = knob(0.1, "share of the retained examples, drawn once", low=0, high=1)
    average_from: int = knob(30, "first epoch of the average of the adapters", low=0)
    decay: float = knob(0.9, "share of the average that stays at each epoch", low=0, high=1)
    threshold: float = knob(1e-3, "a block whose relative change is not above it stays as it was", low=0)

    def forget(self, u: Update, request: Request) -> Outcome:
        forget, retain, blocks = u.data("forget"), u.data("retain"), feed_forward(u.model)
        if not u.columns or forget["y"].is_floating_point():
            raise BadInput("gs-lora needs a class label for every example; use gradient-ascent where there are none")
        if not len(retain):
            raise BadInput("gs-lora holds the network by retained data, and none can be reached; use gradient-ascent")
        if not blocks:
            raise BadInput("gs-lora adapts hidden linear layers, and this network has none but its head")
        self._rng = torch.Generator().manual_seed(u.seed_of("gs-lora"))
        rows = torch.randperm(len(retain), generator=self._rng)[: max(1, round(self.data_ratio * len(retain)))]
        drawn = retain.select(rows.sort().values)
        self._prototypes = None
        if self.pull or self.hold:
            self._prototypes = prototypes(u.model, u.batches(cat([forget, drawn])), u.columns)
            u.extra_bytes += self._prototypes.nbytes
        names = [name for group in blocks.values() for name in group]
        add_low_rank(u.model, names, self.rank, float(self.rank), u.seed_of("adapters"))
        layers = {at: module for at, module in u.model.named_modules() if isinstance(module, LowRank) and at in names}
        self._groups: list[list[Tensor]] = [
            [p for at in group for p in (layers[at].down, layers[at].up)] for group in blocks.values()
        ]
        adapters = [p for group in self._groups for p in group]
        u.extra_bytes += 2 * tensor_bytes(adapters)
        self._norms, self._forget = list(norm_modules(u.model).values()), self._cycle(u, forget)
        self._average: list[Tensor] = []
        try:
            trainable = [f"{name}.{part}" for name in names for part in ("down", "up")]
            u.run(data=drawn, trainable=trainable, replay=True)
            self._averaged(u.settings.epochs)
            if self._average:
                with torch.no_grad():
                    torch._foreach_copy_(adapters, self._average)
        finally:  # whatever happened, the structure is the old one again
            for name, layer in layers.items():
                replace_module(u.model, name, layer.base)
        return Outcome(notes=[self._merge(blocks, layers)])

    def order(self, u: Update, index: Any) -> Any:
        self._averaged(u.epoch)
        return index

    def steps(self, u: Update, batch: Batch) -> Iterator[Step]:
        for norm in self._norms:
            norm.eval()
        yield Step(self.objective(u, next(self._forget), batch))

    def objective(self, u: Update, forget: Batch | None, retain: Batch | None) -> Tensor | None:
        assert forget is not None and retain is not None
        asked = self._prototypes is not None
        gone, kept = u.out(forget, features=asked), u.out(retain, features=asked)
        loss = u.problem.loss(kept, retain, u.classes.seen)
        loss = loss + self.beta * (self.bound - u.problem.loss(gone, forget, u.classes.seen)).relu()
        if self.alpha and u.epoch >= self.alpha_from:
            loss = loss + self.alpha * group_lasso(self._groups)
        if self._prototypes is not None:
            assert gone.features is not None and kept.features is not None
            away = kl_from_logits(gone.features, self._prototypes[forget["y"]]).mean()
            back = kl_from_logits(kept.features, self._prototypes[retain["y"]]).mean()
            loss = loss + self.pull * (self.bound_p - away).relu() + self.hold * back
        return loss

    def _cycle(self, u: Update, examples: Examples) -> Iterator[Batch]:
        """Endless batches of the forget set, a new permutation for every pass."""
        while True:
            order = torch.randperm(len(examples), generator=self._rng)
            yield from u.batches(examples.select(order), u.settings.batch_size)

    @torch.no_grad()
    def _averaged(self, epochs: int) -> None:
        """Take the adapters after so many epochs into the average."""
        if epochs <= self.average_from:
            return
        adapters = [p for group in self._groups for p in group]
        if not self._average:
            self._average = [p.detach().clone() for p in adapters]
        else:
            torch._foreach_lerp_(self._average, adapters, 1 - self.decay)

    @torch.no_grad()
    def _merge(self, blocks: dict[str, list[str]], layers: dict[str, LowRank]) -> str:
        """Add each block's change to its weights, or leave it out; returns what was done, in words."""
        said = []
        for block, names in blocks.items():
            change = [layers[name].scale * layers[name].up @ layers[name].down for name in names]
            size = sum(d.double().square().sum() for d in change)
            share = float((size / sum(layers[name].base.weight.double().square().sum() for name in names)) ** 0.5)
            if share > self.threshold:
                for name in names:
                    layers[name].merged()
                said.append(f"{block} by {share:.2g}")
        return f"{len(said)} of {len(blocks)} blocks changed" + (f": {', '.join(said)}" if said else "")
