"""Average the weights before and after an event, in ratios that each part of the depth learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remanence.core.knobs import knob
from remanence.nn.anatomy import head_name, tensor_bytes
from remanence.nn.deltas import block_count, block_of, interpolate, slopes
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class AMA(Keeper):
    """Adaptive model averaging: after an event the weights go back by a share, which each third of the depth learns for itself; the
    mean share is fixed.

        theta_l <- a_k theta_0,l + (1 - a_k) theta_l         l a block in group k of K,  theta_0 the weights at the event's start
        a_k = alpha (sigmoid(u_k) + eps) / mean_j (sigmoid(u_j) + eps)        u by Adam on the event's own data, from logit(alpha), for
        L(theta(u)) + reg * sum_l |a_{k(l)} - alpha|

    So mean_k a_k = alpha for every u; a ratio above 1 is 1, and the others make up for it. With K = 1 nothing is learned: plain
    averaging, the baseline that the paper calls already strong. All parameters of a block, norms too, share its ratio; embeddings,
    what else is in no block, and the old rows of the head have alpha, new rows stay as trained. L is the problem's loss in eval
    mode; its slope by a_k comes from the gradient at the averaged weights, which needs a copy of both ends. Buffers, such as the
    running statistics of batch norm, stay as trained. Nothing is remembered.

    Pick it after fine-tuning or alignment of a pretrained network, to buy back what it could do before for a stated share of the
    way, without any old data. Where a head grows class by class it mends nothing: the head
    alone makes the old answers wrong.
    Needs: borders, a network of several blocks.
    Reference: Lin et al. 2024, "Mitigating the Alignment Tax of RLHF", EMNLP, arXiv 2309.06256. Deviations: the best samples of the
    aligned policy are the event's own rows, the data it was aligned to; the penalty counts every block once, where the code counts
    every linear layer and may weigh them by 25 / (|l - 13| + 1), which fits a network of 26; the rate is not the code's 2e-5, by
    which a few hundred steps move nothing in a small network; the code takes norms and embeddings from before the alignment when the
    ratios are learned, and averages them like here when they are given; groups are as equal as they can be; there once after
    alignment, here after every event but the first (``first=True``: after that, too). Of low-rank adapters the two factors are
    averaged, not their product.
    """

    moves_at_end: ClassVar[bool] = True

    alpha: float = knob(0.2, "mean share of the way back", low=0, high=1)
    groups: int = knob(3, "K, groups of neighbouring blocks; 1: nothing is learned", low=1)
    eps: float = knob(0.2, "added to every sigmoid: the larger, the nearer the ratios", low=0)
    reg: float = knob(1e-4, "weight of the distance of the ratios to alpha", low=0)
    lr: float = knob(0.01, "rate of Adam on u", low=0)
    samples: int = knob(2000, "most of the event's rows to learn u from", low=1)
    epochs: int = knob(1, "times over them", low=1)
    batch_size: int = knob(32, "rows per step", low=1)
    first: bool = knob(False, "whether the weights before the first event are worth going back to: pretrained ones")

    @property
    def inert(self) -> bool:
        return self.alpha == 0

    def begin(self, u: Update) -> None:
        if u.kind == "learn" and (self.first or u.event != "learn/0"):
            self._start = u.reference()

    def end(self, u: Update) -> None:
        if not hasattr(self, "_start"):
            return
        start = {name: p for name, p in self._start.named_parameters() if name in u.parameters}
        end = {name: p.detach().clone() for name, p in u.parameters.items()}
        u.extra_bytes += tensor_bytes(list(end.values()))
        blocks = block_of(u.model)
        count = block_count(blocks)
        size = min(self.groups, max(1, count))
        groups = {name: None if number is None else number * size // count for name, number in blocks.items()}
        layers = torch.bincount(torch.arange(count) * size // max(1, count), minlength=size)
        found = self._learned(u, start, end, groups, layers) if size > 1 else torch.tensor([self.alpha])
        self._average(u, start, end, groups, found)

    def _learned(
        self,
        u: Update,
        start: Mapping[str, Tensor],
        end: Mapping[str, Tensor],
        groups: dict[str, int | None],
        layers: Tensor,
    ) -> Tensor:
        """The ratios after Adam on the event's own data; `layers` (K,) are the blocks of each group."""
        at = torch.full((len(layers),), self.alpha, dtype=torch.float64).logit(1e-6).requires_grad_()
        adam = torch.optim.Adam([at], lr=self.lr)
        task, classes = u.data("task"), u.classes.seen if u.columns else None
        for _ in range(self.epochs):
            order = torch.randperm(len(task), generator=u.rng("ama"))[: self.samples]
            for batch in u.batches(task.select(order), self.batch_size):
                share = ratios(at, self.alpha, self.eps)
                self._average(u, start, end, groups, share.detach())
                with u.aside(), torch.enable_grad():
                    loss = u.problem.loss(u.problem.forward(u.model, batch), batch, classes)
                    grads = dict(zip(u.parameters, u.grad(loss), strict=True))
                slope = slopes(grads, end, start, groups, len(layers)).cpu()
                adam.zero_grad()
                (share @ slope + self.reg * (layers * (share - self.alpha).abs()).sum()).backward()
                adam.step()
        return ratios(at.detach(), self.alpha, self.eps)

    @torch.no_grad()
    def _average(
        self,
        u: Update,
        start: Mapping[str, Tensor],
        end: Mapping[str, Tensor],
        groups: dict[str, int | None],
        found: Tensor,
    ) -> None:
        back = {name: self.alpha if group is None else float(found[group]) for name, group in groups.items()}
        interpolate(u.parameters, end, start, back)
        if u.columns:
            head = head_name(u.model)
            for name, p in u.parameters.items():
                if name.startswith(f"{head}."):
                    p[u.classes.new] = end[name][u.classes.new]


def ratios(u: Tensor, alpha: float, eps: float) -> Tensor:
    """``alpha (sigmoid(u) + eps) / mean (sigmoid(u) + eps)`` (K,), of which none is above 1 and whose mean is alpha."""
    raw = u.sigmoid() + eps
    full = torch.zeros(len(u), dtype=torch.bool)
    while True:
        rest = alpha * len(u) - int(full.sum())
        found = torch.where(full, torch.ones_like(raw), raw * (rest / raw[~full].sum()))
        over = (found > 1 + 1e-12) & ~full
        if not bool(over.any()):
            return found
        full = full | over
