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


def vit(
    inputs: int | tuple[int, ...] = (1, 28, 28),
    patch: int = 4,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    ratio: int = 4,
    outputs: int = 0,
    pool: str = "mean",
    dropout: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """A small vision transformer: see `remanence.models.vit.ViT`.

    Args:
        inputs: (channels, height, width), or the length of rows that are square images of one channel.
        patch: side of a patch in pixels.
        width: size of a token.
        depth: blocks.
        heads: of the attention; they divide `width`.
        ratio: hidden width of a block's feed-forward network, in widths.
        outputs: rows of the head; 0: it grows with the classes.
        pool: what the head sees, the ``mean`` of the tokens or a class ``token``.
        dropout: after attention and feed-forward network.
        seed: of the weights.
    """
    from remanence.models.small import seeded
    from remanence.models.vit import ViT

    return seeded(seed, lambda: ViT(inputs, patch, width, depth, heads, ratio, outputs, pool, dropout))


def resnet18(
    inputs: int | tuple[int, ...] = (3, 32, 32), width: int = 64, outputs: int = 0, stem: str = "small", seed: int = 0
) -> nn.Module:
    """ResNet-18: see `remanence.models.resnet.ResNet18`.

    Args:
        inputs: (channels, height, width), or the length of rows that are square images of one channel.
        width: channels of the first stage; 20 is the reduced ResNet-18 of continual learning.
        outputs: rows of the head; 0: it grows with the classes.
        stem: ``small`` for images such as CIFAR's (3x3, no pooling), ``large`` for 224 pixels (7x7 and pooling).
        seed: of the weights.
    """
    from remanence.models.resnet import ResNet18
    from remanence.models.small import seeded

    return seeded(seed, lambda: ResNet18(inputs, width, outputs, stem))


def snn(
    inputs: int | tuple[int, ...],
    hidden: list[int] | tuple[int, ...] = (256,),
    outputs: int = 0,
    steps: int = 6,
    seed: int = 0,
) -> nn.Module:
    """A spiking perceptron: see `remanence.models.snn.SNN`.

    Args:
        inputs: the shape of one input, or its length.
        hidden: widths of the layers of spiking neurons.
        outputs: rows of the head; 0: it grows with the classes.
        steps: time steps for each input.
        seed: of the weights.
    """
    from remanence.models.small import seeded
    from remanence.models.snn import SNN

    return seeded(seed, lambda: SNN(inputs, hidden, outputs, steps))


def identity(inputs: int | tuple[int, ...], outputs: int = 0, seed: int = 0) -> nn.Module:
    """Raw inputs as features under a linear head: the backbone of prototype methods on raw pixels."""
    return mlp(inputs, (), outputs, seed=seed)


#: Models that a plan can name; the keyword arguments but `inputs` and `seed` are the knobs.
MODELS: dict[str, Callable[..., Any]] = {
    "mlp": mlp,
    "cnn": cnn,
    "vit": vit,
    "resnet18": resnet18,
    "snn": snn,
    "identity": identity,
}
