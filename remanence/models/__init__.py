"""The small networks of examples and tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def mlp(
    inputs: int | tuple[int, ...],
    hidden: list[int] | tuple[int, ...] = (256, 256),
    outputs: int = 0,
    norm: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """A multi-layer perceptron: see `remanence.models.small.MLP`."""
    from remanence.models.small import MLP, seeded

    return seeded(seed, lambda: MLP(inputs, hidden, outputs, norm, dropout))


def cnn(
    inputs: tuple[int, ...] = (1, 28, 28),
    channels: list[int] | tuple[int, ...] = (16, 32),
    outputs: int = 0,
    seed: int = 0,
) -> nn.Module:
    """A small convolutional network: see `remanence.models.small.CNN`."""
    from remanence.models.small import CNN, seeded

    return seeded(seed, lambda: CNN(inputs, channels, outputs))


def identity(inputs: int | tuple[int, ...], outputs: int = 0, seed: int = 0) -> nn.Module:
    """Raw inputs as features under a linear head: the backbone of prototype methods on raw pixels."""
    return mlp(inputs, (), outputs, seed=seed)


#: Models that a plan can name; the keyword arguments but `inputs` and `seed` are the knobs.
MODELS: dict[str, Callable[..., Any]] = {"mlp": mlp, "cnn": cnn, "identity": identity}
