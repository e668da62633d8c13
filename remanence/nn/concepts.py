"""Concepts as directions of a feature space, and sparse linear heads on their scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.nn.anatomy import evaluating, features
from remanence.nn.statistics import ClassStatistics

#: Examples of each side that an activation vector is fitted on, and its ridge.
SAMPLES, RIDGE = 100, 1.0


def activation_vector(f: Tensor, inside: Tensor, rng: torch.Generator) -> Tensor:
    """The unit normal (D,) that separates features `inside` from the others, by ridge regression on up to `SAMPLES` of each side; zeros
    where a side is empty."""
    sides = [
        f[rows[torch.randperm(len(rows), generator=rng)[:SAMPLES]]]
        for rows in (inside.nonzero()[:, 0], (~inside).nonzero()[:, 0])
    ]
    if not all(len(side) for side in sides):
        return f.new_zeros(f.shape[1])
    x, y = (
        torch.cat(sides),
        torch.cat([f.new_full((len(side),), sign) for side, sign in zip(sides, (1, -1), strict=True)]),
    )
    x, y = x - x.mean(0), y - y.mean()
    normal: Tensor = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    unit: Tensor = normal / normal.norm().clamp(min=torch.finfo(x.dtype).tiny)
    return unit


def sparse_head(
    scores: Tensor, y: Tensor, start: Tensor, sparsity: float, ratio: float = 0.99, rounds: int = 1000
) -> Tensor:
    """W (C, K) of ``mean cross-entropy(W s + b, y) + sparsity (ratio |W|_1 + (1 - ratio) |W|^2 / 2)``, by accelerated proximal steps."""
    one = torch.cat([scores, scores.new_ones(len(scores), 1)], 1)
    w = torch.cat([start, start.new_zeros(len(start), 1)], 1)
    free = torch.ones(w.shape[1], dtype=w.dtype)
    free[-1] = 0  # the intercept is not penalised
    rate = 1 / (0.5 * torch.linalg.matrix_norm(one, 2) ** 2 / len(one) + sparsity * (1 - ratio))
    target = F.one_hot(y, len(start)).to(w.dtype)
    ahead, momentum = w, 1.0
    for _ in range(rounds):
        slope = ((one @ ahead.T).softmax(1) - target).T @ one / len(one) + sparsity * (1 - ratio) * free * ahead
        moved = ahead - rate * slope
        new = moved.sign() * (moved.abs() - rate * sparsity * ratio * free).clamp(min=0)
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead, w, momentum = new + (momentum - 1) / following * (new - w), new, following
    return w[:, :-1].contiguous()


def peaks(
    model: nn.Module, images: Tensor, concept: Tensor, blank: Tensor, windows: Sequence[Any], given: Sequence[int]
) -> list[int]:
    """For each of `images` (n, C, H, W) the window whose covering by the image `blank` (C, H, W) lowers ``<features, concept>`` most.

    windows: indices into (C, H, W). given: the shape of one image as the model takes it. concept: (D,) in float64.
    """
    device, found = next(model.parameters()).device, list[int]()
    with evaluating(model):
        for rows in images.split(256):
            scores = []
            for window in windows:
                covered = rows.clone()
                covered[(slice(None), *window)] = blank[window].to(rows.dtype)
                scores.append(features(model, covered.reshape(-1, *given).to(device)).double() @ concept.to(device))
            found += torch.stack(scores).argmin(0).tolist()
    return found


def prototypes(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], columns: int) -> Tensor:
    """The mean feature of each head column (columns, D) in eval mode, zeros where a class has no example."""
    statistics = ClassStatistics()
    with evaluating(model):
        for batch in batches:
            statistics.add(features(model, batch["x"]), batch["y"])
    means = statistics.means().to(next(model.parameters()))
    at = torch.tensor(statistics.labels, device=means.device)
    return means.new_zeros(columns, means.shape[1]).index_copy(0, at, means)
