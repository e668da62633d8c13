"""Random-label forgetting held to the weights that matter for the request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Request
from remanence.forget.base import RELABELLING, RandomLabels
from remanence.nn.masks import top_fraction
from remanence.nn.saliency import mean_gradient
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update


@dataclass
class SalUn(Forgetter):
    """Saliency unlearning: mask the weights once, then teach wrong labels on those only.

        g = d/d theta of mean over D_f of loss(f(x), y) at theta_o        m_j = 1 for the top `rho` of all |g_j|, over all tensors together
        theta = m * (theta_o + change) + (1 - m) * theta_o
        L = mean over D_f of loss(f(x), y') + alpha * mean over D_r of loss(f(x), y)        y' uniform over the other classes

    ``soft=True``: no mask; after each step theta goes toward theta_o by soft thresholding, theta_o + sign(d) max(|d| - tau, 0) with
    d = theta - theta_o and tau the quantile of |d| below which a share (1 - rho) (1 - step / total) of the entries lies.

    Pick it as the first approximate method to try on a classifier. Needs: labels, retained data. Buffers such as batch-norm
    statistics are not masked. Reference: Fan et al. 2024, "SalUn: Empowering Machine Unlearning via Gradient-based Weight
    Saliency in Both Image Classification and Generation", arXiv 2310.12508. Deviations: the gradient counts examples equally (the
    official code adds up batch means); labels never equal the true one (the code's may); masked entries are put back after each
    step, which weight decay and momentum would move (as in later versions of the code); `clip` sees the whole gradient; ``soft`` follows
    `drive`, where the code always mixes. With several classes asked for, y' may be another of them.
    """

    defaults: ClassVar[dict[str, Any]] = RELABELLING

    rho: float = knob(0.5, "share of weights that may move; 1 is plain random-label", low=0, high=1)
    alpha: float = knob(1.0, "weight of the retained data", low=0)
    soft: bool = knob(False, "soft thresholding instead of a mask")
    drive: str = knob(
        "auto", "what an epoch goes over, see random-label", choices=("auto", "sequence", "mixed", "forget", "retain")
    )

    def forget(self, u: Update, request: Request) -> Outcome:
        self._labels = RandomLabels.of(u, self.drive, self.alpha)
        if self.soft:
            self._origin = {name: p.detach().clone() for name, p in u.parameters.items()}
            self._step = 0
            u.extra_bytes += sum(p.numel() * p.element_size() for p in self._origin.values())
            u.run(drive=self._labels.drive)
            return Outcome()
        gradient = mean_gradient(u.model, u.problem, u.batches(u.data("forget")), u.parameters, u.classes.seen)
        mask = top_fraction({name: g.abs() for name, g in gradient.items()}, self.rho)
        u.run(drive=self._labels.drive, mask=mask)
        return Outcome(
            notes=[
                f"{sum(int(m.sum()) for m in mask.values())} of {sum(m.numel() for m in mask.values())} weights could move"
            ]
        )

    def objective(self, u: Update, forget: Batch | None, retain: Batch | None) -> Tensor | None:
        return self._labels.objective(u, forget, retain)

    def after(self, u: Update, batch: Batch) -> None:
        if self.soft and u.step > self._step and u.total:
            self._step = u.step
            soft_threshold(u.parameters, self._origin, (1 - self.rho) * (1 - u.step / u.total))


@torch.no_grad()
def soft_threshold(params: dict[str, Any], origin: dict[str, Tensor], share: float) -> None:
    """Put the `share` of entries that moved least back to `origin`, and the others nearer by as much as the last of these moved."""
    change = {name: p - origin[name] for name, p in params.items()}
    size = torch.cat([d.abs().reshape(-1) for d in change.values()])
    kept = int(share * len(size))
    if kept < 1:
        return
    tau = torch.kthvalue(size, kept).values
    for name, p in params.items():
        d = change[name]
        p.copy_(torch.where(d.abs() <= tau, origin[name], p - tau * d.sign()))
