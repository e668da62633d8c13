"""A perceptron and a small convolutional network; both end in a linear `head` that may start with no rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.models.weights import fill
from remanence.nn.heads import empty_linear


class MLP(nn.Module):
    """Flatten, then linear + ReLU for each width of `hidden`, then a linear head with `outputs` rows."""

    def __init__(
        self, inputs: int | Sequence[int], hidden: Sequence[int], outputs: int, norm: bool, dropout: float
    ) -> None:
        super().__init__()
        width = inputs if isinstance(inputs, int) else math.prod(inputs)
        layers: list[nn.Module] = [nn.Flatten()]
        for size in hidden:
            layers += [nn.Linear(width, size), *([nn.BatchNorm1d(size)] if norm else []), nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
            width = size
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, outputs) if outputs else empty_linear(width, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


class CNN(nn.Module):
    """3x3 convolution + batch norm + ReLU + 2x2 max pooling for each of `channels`, then a linear head."""

    def __init__(self, inputs: Sequence[int], channels: Sequence[int], outputs: int) -> None:
        super().__init__()
        if len(inputs) != 3:
            raise BadInput(f"a cnn needs inputs (channels, height, width), not {tuple(inputs)}")
        depth, height, width = inputs
        layers: list[nn.Module] = []
        for size in channels:
            layers += [nn.Conv2d(depth, size, 3, padding=1), nn.BatchNorm2d(size), nn.ReLU(), nn.MaxPool2d(2)]
            depth, height, width = size, height // 2, width // 2
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(depth * height * width, outputs) if outputs else empty_linear(depth * height * width, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def seeded(seed: int, make: Callable[[], nn.Module], weights: str | None = None) -> nn.Module:
    """Build a module under `seed` without touching the global generator; then fill it with the `weights` of a file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = make()
    return made if weights is None else fill(made, weights)
