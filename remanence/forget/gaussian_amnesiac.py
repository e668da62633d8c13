"""Teach the forget set targets drawn at random, for numbers instead of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.problem import Batch
from remanence.data import Request, cat_batches
from remanence.train.roles import Forgetter, Outcome
from remanence.train.update import Update


@dataclass
class GaussianAmnesiac(Forgetter):
    """Random labels for a regression: every forget example gets a target drawn from a Gaussian, all others keep theirs.

        L = mean over a batch of D_r and D_f of loss(f(x), y')        y' = y on D_r,  y' ~ N(mean of y, std of y ^2) on D_f

    Mean and deviation are those of all targets seen, output by output. Inputs stay as they are.

    Pick it as the baseline of blindspot-regression: the drawn targets say nothing of what a network that never saw the examples would
    answer, so the answers go toward the mean of all targets. Needs: numbers as targets, retained data. Reference: Tarun et al. 2023, "Deep
    Regression Unlearning", arXiv 2210.08196. Deviations: drawn anew for every batch, where the paper draws once (the same in its single
    epoch); the loss is the problem's, half the squared error, where the paper's is the absolute one.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 1,
        "batch_size": 256,
        "optimizer": "adam",
        "lr": 1e-3,
        "schedule": "constant",
    }

    def forget(self, u: Update, request: Request) -> Outcome:
        if u.columns:
            raise BadInput("gaussian-amnesiac draws numbers, and this problem has classes; use random-label")
        y = u.data("seen")["y"].double()
        self._mean, self._spread = y.mean(0), y.std(0, correction=0)
        u.run(drive="mixed")
        return Outcome()

    def objective(self, u: Update, forget: Batch | None, retain: Batch | None) -> Tensor | None:
        if forget is not None:
            forget = {**forget, "y": self._draw(u, forget["y"])}
        rows = forget if retain is None else retain if forget is None else cat_batches(forget, retain)
        assert rows is not None
        return u.problem.loss(u.out(rows), rows)

    def _draw(self, u: Update, y: Tensor) -> Tensor:
        noise = torch.randn(y.shape, generator=u.rng("gaussian-amnesiac"), dtype=torch.float64)
        drawn = self._mean + self._spread * noise
        return drawn.to(y.device, y.dtype if y.is_floating_point() else torch.float32)
