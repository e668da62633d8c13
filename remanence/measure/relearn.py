"""How fast a model learns again what it was to forget, next to models that never knew it.

    counted(t) = 1 + t, t the first step at which the level is reached; budget + 2 where it never is
    advantage = counted(retrained) / counted(model)          1: as if it had never been known; far above 1: it was hidden
    AIN = 1 / advantage (the anamnesis index of Chundawat et al. 2023, arXiv 2205.08096; Tarun et al. 2023, arXiv 2210.08196)

The level is 90 % of the original's accuracy, or 1.05 times its loss. The 1 makes the ratio finite for a model that is at the level before the
first step. All models get the same optimizer, rate, rows, order and budget, or the ratio means nothing; nothing here moves the
model that is given.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.problem import Batch, Classification, Problem
from remanence.core.rng import generator, seed_of
from remanence.data import Examples
from remanence.nn.anatomy import evaluating, norm_modules
from remanence.nn.heads import grow_head
from remanence.train.roles import head_rows
from remanence.train.settings import Settings

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Mean loss and (for a classification) accuracy on what is watched, before the first step and after each, (steps + 1,)."""

    loss: Floats
    accuracy: Floats | None

    @property
    def area(self) -> float:
        """Mean of the curve: accuracy in [0, 1], or loss."""
        return float((self.loss if self.accuracy is None else self.accuracy).mean())

    def counted(self, accuracy: float | None = None, loss: float | None = None) -> int:
        """1 + the first step with at least this accuracy (at most this loss); 1 + the budget + 1 where there is none."""
        if loss is not None and accuracy is None:
            found = np.flatnonzero(self.loss <= loss)
        elif accuracy is not None and loss is None and self.accuracy is not None:
            found = np.flatnonzero(self.accuracy >= accuracy)
        else:
            raise BadInput("give the accuracy or the loss to be reached, an accuracy for a classification only")
        return 1 + (int(found[0]) if len(found) else len(self.loss))


def advantage(references: Sequence[int], own: int) -> float:
    """``mean counted(references) / counted(model)``."""
    return float(np.mean(references)) / own


def relearn(
    model: nn.Module,
    problem: Problem,
    data: Examples,
    watch: Examples,
    *,
    columns: int = 0,
    steps: int = 50,
    lr: float = 1e-3,
    optimizer: Any = "adam",
    batch_size: int = 32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Curve:
    """Train a copy of `model` for `steps` on `data` and look at `watch` after every step; both with head columns as labels.

    Every weight may move; normalisation layers keep their running statistics, so that a single example can be learned. Equal seeds
    give equal curves.

    Args:
        columns: how many head columns compete; 0 without classes.

    Raises:
        BadInput: nothing to train on or to watch.
    """
    if not len(data) or not len(watch):
        raise BadInput("relearning needs examples to train on and examples to watch")
    made = copy.deepcopy(model).requires_grad_(True)
    classes = torch.arange(columns, device=device) if columns else None
    rows = _order(len(data), steps, batch_size, seed)
    seen = _on(watch, torch.arange(len(watch)), device)
    losses, right = [], []
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed_of(seed, "relearn", "dropout"))
        opt = Settings(optimizer=optimizer, lr=lr).build(list(made.parameters()))
        for step in range(steps + 1):
            with evaluating(made):
                score = problem.score(problem.forward(made, seen), seen, classes)
            losses.append(score["loss"].double().mean())
            if "accuracy" in score:
                right.append(score["accuracy"].double().mean())
            if step < steps:
                made.train()
                for module in norm_modules(made).values():
                    module.eval()
                batch = _on(data, rows[step], device)
                opt.zero_grad()
                problem.loss(problem.forward(made, batch), batch, classes).backward()
                opt.step()
    return Curve(
        torch.stack(losses).cpu().numpy(),
        torch.stack(right).cpu().numpy() if isinstance(problem, Classification) else None,
    )


def with_columns(
    model: nn.Module, labels: Sequence[int], wanted: Sequence[int], seed: int
) -> tuple[nn.Module, list[int]]:
    """A copy of `model` whose head has a column for every label wanted, and the labels of its columns: what is lacking takes the next
    column, one that is newly drawn where the head is full."""
    found = [*labels, *[label for label in wanted if label not in set(labels)]]
    made, lacking = copy.deepcopy(model), len(found) - head_rows(model)
    return (grow_head(made, lacking, seed) if lacking > 0 else made), found


def _order(n: int, steps: int, batch_size: int, seed: int) -> list[torch.Tensor]:
    """Row numbers of each step's batch: whole permutations, one after the other."""
    rng, found = generator(seed, "relearn"), list[torch.Tensor]()
    while len(found) < steps:
        found += torch.randperm(n, generator=rng).split(batch_size)
    return found


def _on(examples: Examples, rows: torch.Tensor, device: torch.device | str) -> Batch:
    return {name: column.to(device) for name, column in examples.batch(rows).items()}
