"""Teach the forget set wrong labels while the retained data keeps its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.data import Request
from remanence.forget.base import RELABELLING, RandomLabels
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update


@dataclass
class RandomLabel(Forgetter):
    """Every forget example gets a fresh wrong label in every epoch.

        L = mean over D_f of loss(f(x), y') + alpha * mean over D_r of loss(f(x), y)        y' uniform over the other classes

    ``sequence`` goes over the forget set, then over the retained data; ``mixed`` shuffles both into the same batches; ``forget`` and
    ``retain`` pair a batch of each. ``auto``: sequence for up to ten classes, else mixed.

    Pick it for class or random requests when retained data is at hand; with a mask it is `salun`. Needs: labels, retained data.
    References: Graves et al. 2021, arXiv 2010.10981; Golatkar et al. 2020, arXiv 1911.04933; loop as in Fan et al. 2024, arXiv 2310.12508.
    Deviation from that code: its labels may equal the true one; here, as the paper has it, never.
    """

    defaults: ClassVar[dict[str, Any]] = RELABELLING

    alpha: float = knob(1.0, "weight of the retained data", low=0)
    drive: str = knob("auto", "what an epoch goes over", choices=("auto", "sequence", "mixed", "forget", "retain"))

    def forget(self, u: Update, request: Request) -> Outcome:
        self._labels = RandomLabels.of(u, self.drive, self.alpha)
        u.run(drive=self._labels.drive)
        return Outcome()

    def objective(self, u: Update, forget: Batch | None, retain: Batch | None) -> Tensor | None:
        return self._labels.objective(u, forget, retain)
