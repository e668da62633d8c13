"""Linear probes: what can be read off a network's layers that its answers no longer say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.problem import Batch, Problem
from remanence.measure.attacks import auc
from remanence.nn.anatomy import evaluating, weighted_modules
from remanence.nn.taps import taps

Floats = NDArray[np.float64]


def layers(model: nn.Module, problem: Problem, batches: Iterable[Batch]) -> dict[str, Floats]:
    """The output of every module that owns weights, by name, (N, D); of maps (N, C, ...) the mean over places. Attention, which gives
    no single tensor, is seen through the modules around it; a module that a forward does not call gives nothing.
    """
    names = [name for name, m in weighted_modules(model).items() if not isinstance(m, nn.MultiheadAttention)]
    kept: dict[str, list[Tensor]] = {}
    with evaluating(model), taps(model, names) as taken:
        for batch in batches:
            problem.forward(model, batch)
            for name, out in taken.items():
                if out.dim() > 1:
                    kept.setdefault(name, []).append(out.flatten(2).mean(2) if out.dim() > 2 else out)
            taken.clear()
    return {name: torch.cat(parts).double().cpu().numpy() for name, parts in kept.items()}


@dataclass(frozen=True)
class Probe:
    """AUC in [0, 1] of a probe on examples that it was not fitted on, 0.5 is chance; `p` is the share of probes on permuted labels,
    itself included, that do as well (None: none was made)."""

    value: float
    p: float | None


def probe(x: ArrayLike, target: ArrayLike, folds: int = 3, permutations: int = 0, seed: int = 0) -> Probe:
    """Cross-fitted logistic regression of `target` (N,), True or False, on standardised `x` (N, D).

    Linear only, for a stronger probe would learn the task itself; the permuted labels are the control for what it can learn by
    heart. ``p = (1 + #{permuted >= value}) / (1 + permutations)``, so 20 permutations are the fewest that can give p < .05.

    Raises:
        BadInput: fewer than `folds` examples on a side.
    """
    values, y = np.asarray(x, dtype=np.float64), np.asarray(target, dtype=bool)
    if values.ndim != 2 or y.shape != (len(values),) or min(int(y.sum()), int((~y).sum())) < folds or folds < 2:
        raise BadInput(f"a probe needs x (N, D) and at least {folds} examples on each side")
    rng = np.random.default_rng(seed)
    found = _fit(values, y, folds, rng)
    if not permutations:
        return Probe(found, None)
    as_good = sum(_fit(values, rng.permutation(y), folds, rng) >= found for _ in range(permutations))
    return Probe(found, (1 + as_good) / (1 + permutations))


def _fit(x: Floats, y: NDArray[np.bool_], folds: int, rng: np.random.Generator) -> float:
    from sklearn.linear_model import LogisticRegression

    fold = np.empty(len(y), dtype=np.int64)
    for side in (y, ~y):
        fold[side] = rng.permutation(int(side.sum())) % folds
    aucs = []  # scores of different fits have no common scale
    for each in range(folds):
        fit = fold != each
        mean, sd = x[fit].mean(axis=0), x[fit].std(axis=0)
        z = (x - mean) / np.where(sd > 0, sd, 1.0)
        made = LogisticRegression(class_weight="balanced", max_iter=300).fit(z[fit], y[fit])
        scores = made.decision_function(z[~fit])
        aucs.append(auc(scores[y[~fit]], scores[~y[~fit]]).value)
    return float(np.mean(aucs))
