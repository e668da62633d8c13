"""Small disturbances after which forgotten knowledge must not be back, and what forgetting did beside. All give a copy."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.problem import Batch, Problem
from remanence.core.rng import generator
from remanence.nn.prune import cut, magnitude, prunable
from remanence.nn.saliency import mean_gradient


@torch.no_grad()
def quantised(model: nn.Module, bits: int) -> nn.Module:
    """Weights (what `prunable` names, no biases or scales) rounded to `bits`, symmetric, one scale per output channel, and turned
    back into floats.

        s = max |w| / (2^(bits - 1) - 1)        w <- s * round(w / s)

    Raises:
        BadInput: fewer than 2 bits.
    """
    if bits < 2:
        raise BadInput(f"bits={bits}: symmetric quantisation needs 2 or more")
    made, top = copy.deepcopy(model), 2 ** (bits - 1) - 1
    for p in prunable(made).values():
        w = p.double().flatten(1)
        scale = w.abs().amax(1, keepdim=True) / top if w.numel() else torch.ones(len(w), 1, dtype=w.dtype)
        scale = torch.where(scale > 0, scale, 1.0)
        p.copy_(((w / scale).round() * scale).reshape(p.shape))
    return made


def pruned(model: nn.Module, share: float) -> nn.Module:
    """The smallest `share` of all weights set to 0, ranked by size over all layers together."""
    made = copy.deepcopy(model)
    cut(prunable(made), magnitude(prunable(made), share))
    return made


@torch.no_grad()
def noisy(model: nn.Module, size: float, seed: int) -> nn.Module:
    """``w + size * sd(w) * N(0, 1)``, sd over each weight matrix; drawn in order of the names."""
    made, rng = copy.deepcopy(model), generator(seed, "weight-noise")
    for p in prunable(made).values():
        if p.numel() > 1:
            p.add_(size * p.std() * torch.randn(p.shape, generator=rng).to(p))
    return made


def gradient_norm(model: nn.Module, problem: Problem, batches: Iterable[Batch], classes: Tensor | None = None) -> float:
    """``|| d/d theta mean loss ||_2`` over all examples and parameters: near 0 where the model has come to rest on them, as it
    has on what it learned."""
    params = {name: p for name, p in model.named_parameters() if p.numel()}
    flags = {name: p.requires_grad for name, p in params.items()}
    try:
        for p in params.values():
            p.requires_grad_(True)
        found = mean_gradient(model, problem, batches, params, classes)
    finally:
        for name, p in params.items():
            p.requires_grad_(flags[name])
    return math.sqrt(sum(float(g.double().square().sum()) for g in found.values()))


def per_class(answers: NDArray[np.int64], labels: NDArray[np.int64], classes: Sequence[int]) -> dict[int, float]:
    """The share of right answers among the examples of each class that has any."""
    right = answers == labels
    return {label: float(right[labels == label].mean()) for label in classes if (labels == label).any()}
