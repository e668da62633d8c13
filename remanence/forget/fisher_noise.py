"""Add noise where what is retained minds it least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.data import Request
from remanence.nn.anatomy import head_name
from remanence.nn.fisher import diagonal_fisher
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update

#: Variance of a head row that is drawn anew, as released (1e-4, times 10 for the head).
_FRESH = 1e-3


@dataclass
class FisherNoise(Forgetter):
    """Fisher forgetting: every weight gets noise, the more the less the retained data's answers depend on it.

        theta_j <- theta_j + (alpha * min(1 / F_j, cap))^power * N(0, 1)        F = diagonal Fisher of D_r, over the model's labels
        head rows of classes of which nothing is retained:  theta_j <- sqrt(0.001) * N(0, 1)        (with `reset`)

    ``power=0.5`` is N(0, alpha F^{-1}), as both official codes have it; ``0.25`` is the paper's optimum, (alpha / F)^{1/4} with
    alpha = lambda sigma^2. The noise looks at D_r only. It spares what is retained, but on digits (a small dense
    network) forgotten and retained losses rise alike, so there it forgets nothing by itself. A class goes by the reset of its head
    rows, as in the codes, which hides it and leaves the features that tell it: 2 to 33 % stay right, where a logit near 0 still
    beats nine negative ones. ``reset=False`` shows what the noise alone does.

    Pick it as the baseline of noise methods. Needs: retained data; labels only to find the classes that are left.
    References: Golatkar et al. 2020, "Eternal Sunshine of the Spotless Net", arXiv 1911.04933; as FF in Jia et al. 2023,
    arXiv 2304.04934. Deviations: every weight has its own noise and one cap holds for all (the codes average the variance of
    each row, cap the head at 100, and multiply by 10 for the head and for vectors); the Fisher is summed over examples, where the
    latter squares gradients of batch means; rows are reset whenever their class is gone, not for one size of request.
    """

    trains: ClassVar[bool] = False

    alpha: float = knob(1e-6, "scale of the noise's variance", low=0)
    cap: float = knob(1e3, "largest 1 / F_j that counts", low=0)
    power: float = knob(0.5, "0.5: as released; 0.25: as in the paper", low=0.05, high=1)
    reset: bool = knob(True, "whether head rows of classes of which nothing is retained are drawn anew, near 0")

    def forget(self, u: Update, request: Request) -> Outcome:
        kept = u.data("retain")
        if not len(kept):
            raise BadInput("fisher-noise needs retained data, and none can be reached; use gradient-ascent")
        params, rng = u.parameters, u.rng("fisher-noise")
        classes = u.classes.seen if u.columns else None
        fisher = diagonal_fisher(u.model, u.problem, u.batches(kept), params, "exact", classes)
        u.extra_bytes += sum(f.nbytes for f in fisher.values())
        lost = self._lost(u) if self.reset else torch.empty(0, dtype=torch.int64)
        head = head_name(u.model) if len(lost) else None
        with torch.no_grad():
            for name, p in params.items():
                noise = torch.randn(p.shape, generator=rng).to(p)
                size = (self.alpha * fisher[name].reciprocal().clamp(max=self.cap)) ** self.power
                p.add_(size.to(p) * noise)
                if name.rpartition(".")[0] == head:
                    p[lost] = _FRESH**0.5 * noise[lost]
        return Outcome(notes=[f"head rows drawn anew: {len(lost)}"] if len(lost) else [])

    def _lost(self, u: Update) -> Tensor:
        """Head columns of the request's classes of which no example is retained."""
        gone = u.data("forget")
        if not u.columns or gone["y"].is_floating_point():
            return torch.empty(0, dtype=torch.int64)
        asked, left = gone["y"].unique(), u.data("retain")["y"].unique()
        lost: Tensor = asked[~torch.isin(asked, left)].to(u.device)
        return lost
