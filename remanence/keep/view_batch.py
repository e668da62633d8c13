"""See each example rarely, but then in several views at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.nn.distances import kl_from_logits
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class ViewBatch(Keeper):
    """Every batch has `views` views of each of its examples, and each example is visited `views` times less often.

        a permutation lasts for V epochs; epoch e takes the (e mod V)-th part of it, each example V times in a row
        L + consistency * mean over groups and j >= 2 of KL(p_1 || p_j),    p_1 without gradient, from epoch `start` on

    The first view of a group is the data's ``weak`` one, the others are ``strong``; without such views they are the example itself
    and the second term is 0. An epoch has as many rows as without, so the cost is the same, and the time between two visits is
    V times as long. On the digits it neither gains nor harms. Rows that other keepers add are in no group.

    Pick it with several epochs per task and stochastic views, beside replay or distillation; not for a single pass. Needs: labels,
    borders, views. Reference: Kim et al. 2025, "Do Your Best and Get Enough Rest for Continual Learning", arXiv 2503.18371.
    Deviations: groups are known by their place, where the official code takes equal labels side by side for one; the KL is
    summed over classes, as in the formula (the code divides by their number); no rounding of an epoch to 256 rows.
    """

    views: int = knob(4, "views of an example in its batch; 1: plain batches", low=1)
    consistency: float = knob(1.0, "weight of the divergence inside groups", low=0)
    start: int = knob(5, "epoch of the event from which the divergence counts", low=0)

    @property
    def inert(self) -> bool:
        return self.views == 1

    def begin(self, u: Update) -> None:
        u.sweep = self.views

    def order(self, u: Update, index: Tensor) -> list[Tensor]:
        rng = torch.Generator().manual_seed(u.seed_of(f"view-batch/{u.epoch // self.views}"))
        whole, part = torch.randperm(len(index), generator=rng), u.epoch % self.views
        bounds = [len(index) * edge // self.views for edge in (part, part + 1)]
        groups = whole[bounds[0] : bounds[1]].repeat_interleave(self.views)
        size = max(1, u.settings.batch_size // self.views) * self.views
        return list(groups.split(size))

    def prepare(self, u: Update, batch: Batch) -> Batch:
        own = int((batch["origin"] == 0).sum()) if u.kind == "learn" else 0
        if not own:
            return batch
        mine = {
            name: column[:own] for name, column in batch.items()
        }  # rows that were added stand behind the task's own
        weak, strong = u.view(mine, "weak")["x"], u.view(mine, "strong")["x"]
        first = (torch.arange(own, device=weak.device) % self.views == 0).view(-1, *[1] * (weak.dim() - 1))
        return {**batch, "x": torch.cat([torch.where(first, weak, strong), batch["x"][own:]])}

    def loss(self, u: Update, batch: Batch) -> Tensor | None:
        if not self.consistency or u.kind != "learn" or u.epoch < self.start:
            return None
        logits = u.out(batch).logits[: int((batch["origin"] == 0).sum())]
        grouped = logits.unflatten(0, (-1, self.views))
        grouped = grouped[..., u.classes.seen] if u.columns else grouped
        teacher = grouped[:, :1].detach().expand_as(grouped[:, 1:])
        return self.consistency * kl_from_logits(grouped[:, 1:].flatten(0, 1), teacher.flatten(0, 1)).mean()
