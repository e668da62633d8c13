"""The small networks of examples and tests, and backbones of other libraries.

Every model has the knob `weights`: a ``.safetensors`` file (see `save_weights`) to begin with instead of drawn values. Names and
shapes must be the model's own, but for those of the head, which is drawn where the file has another number of rows. What a
network in a file has seen is not in the books of a life.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn


def mlp(
    inputs: int | tuple[int, ...],
    hidden: list[int] | tuple[int, ...] = (256, 256),
    outputs: int = 0,
    norm: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    weights: str | None = None,
) -> nn.Module:
    """A multi-layer perceptron: see `remanence.models.small.MLP`."""
    from remanence.models.small import MLP, seeded

    return seeded(seed, lambda: MLP(inputs, hidden, outputs, norm, dropout), weights)


def cnn(
    inputs: tuple[int, ...] = (1, 28, 28),
    channels: list[int] | tuple[int, ...] = (16, 32),
    outputs: int = 0,
    seed: int = 0,
    weights: str | None = None,
) -> nn.Module:
    """A small convolutional network: see `remanence.models.small.CNN`."""
    from remanence.models.small import CNN, seeded

    return seeded(seed, lambda: CNN(inputs, channels, outputs), weights)


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
    weights: str | None = None,
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
        weights: a file of weights to begin with.
    """
    from remanence.models.small import seeded
    from remanence.models.vit import ViT

    return seeded(seed, lambda: ViT(inputs, patch, width, depth, heads, ratio, outputs, pool, dropout), weights)


def resnet18(
    inputs: int | tuple[int, ...] = (3, 32, 32),
    width: int = 64,
    outputs: int = 0,
    stem: str = "small",
    seed: int = 0,
    weights: str | None = None,
) -> nn.Module:
    """ResNet-18: see `remanence.models.resnet.ResNet18`.

    Args:
        inputs: (channels, height, width), or the length of rows that are square images of one channel.
        width: channels of the first stage; 20 is the reduced ResNet-18 of continual learning.
        outputs: rows of the head; 0: it grows with the classes.
        stem: ``small`` for images such as CIFAR's (3x3, no pooling), ``large`` for 224 pixels (7x7 and pooling).
        seed: of the weights.
        weights: a file of weights to begin with.
    """
    from remanence.models.resnet import ResNet18
    from remanence.models.small import seeded

    return seeded(seed, lambda: ResNet18(inputs, width, outputs, stem), weights)


def snn(
    inputs: int | tuple[int, ...],
    hidden: list[int] | tuple[int, ...] = (256,),
    outputs: int = 0,
    steps: int = 6,
    seed: int = 0,
    weights: str | None = None,
) -> nn.Module:
    """A spiking perceptron: see `remanence.models.snn.SNN`.

    Args:
        inputs: the shape of one input, or its length.
        hidden: widths of the layers of spiking neurons.
        outputs: rows of the head; 0: it grows with the classes.
        steps: time steps for each input.
        seed: of the weights.
        weights: a file of weights to begin with.
    """
    from remanence.models.small import seeded
    from remanence.models.snn import SNN

    return seeded(seed, lambda: SNN(inputs, hidden, outputs, steps), weights)


def identity(inputs: int | tuple[int, ...], outputs: int = 0, seed: int = 0, weights: str | None = None) -> nn.Module:
    """Raw inputs as features under a linear head: the backbone of prototype methods on raw pixels."""
    return mlp(inputs, (), outputs, seed=seed, weights=weights)


def transformers(
    inputs: int | tuple[int, ...],
    name: str,
    pretrained: bool = True,
    outputs: int = 0,
    size: int = 0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    revision: str = "main",
    seed: int = 0,
    weights: str | None = None,
) -> nn.Module:
    """An image network of the library transformers as a backbone: see `remanence.models.foreign.Foreign`. Needs
    ``pip install remanence[llm]``.

    What is under the head is what the network's own image classifier has under its own. Code of the hub is never run, and weights
    are read from ``.safetensors`` files only. A life builds its network again whenever it is resumed: the folder, or the library's
    own cache of the hub, must still be there.

    Args:
        inputs: (channels, height, width), or the length of rows that are square images of one channel.
        name: a folder with ``config.json`` (and ``model.safetensors``), or a name on the Hugging Face hub.
        pretrained: with its weights; else only its architecture, drawn by `seed`.
        outputs: rows of the head; 0: it grows with the classes.
        size: images are resized to that many pixels a side; 0: to what the configuration says, if it does.
        mean, std: of each channel; None: what ``preprocessor_config.json`` says, if there is one, else 0 and 1.
        revision: of the hub: a branch, a tag or a commit.
        seed: of the head, and of the other weights where it is not `pretrained`.
        weights: a file of weights to begin with.
    """
    from remanence.models.foreign import from_transformers
    from remanence.models.small import seeded

    return seeded(
        seed, lambda: from_transformers(inputs, name, pretrained, outputs, size, mean, std, revision), weights
    )


def timm(
    inputs: int | tuple[int, ...],
    name: str,
    pretrained: str | None = None,
    outputs: int = 0,
    size: int = 0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    seed: int = 0,
    weights: str | None = None,
) -> nn.Module:
    """A network of the library timm as a backbone: see `remanence.models.foreign.Foreign`. Needs ``pip install remanence[timm]``.
    Nothing is fetched.

    Args:
        inputs: (channels, height, width), or the length of rows that are square images of one channel.
        name: an architecture, such as ``vit_small_patch16_224``.
        pretrained: a ``.safetensors`` file of its weights by timm's names, or a folder with ``model.safetensors``, as timm's pages on
            the Hugging Face hub offer it; its classifier is left out. None: drawn by `seed`.
        outputs: rows of the head; 0: it grows with the classes.
        size: images are resized to that many pixels a side; 0: to what the architecture is fixed to, if it is.
        mean, std: of each channel; None: what timm says of `pretrained` weights, else 0 and 1.
        seed: of the head, and of the other weights where there are none.
        weights: a file of weights to begin with.
    """
    from remanence.models.foreign import from_timm
    from remanence.models.small import seeded

    return seeded(seed, lambda: from_timm(inputs, name, pretrained, outputs, size, mean, std), weights)


def llama(
    vocab: int,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    ffn: int = 0,
    context: int = 512,
    tie: bool = True,
    seed: int = 0,
    weights: str | None = None,
) -> nn.Module:
    """A small causal language model of the Llama architecture: see `remanence.models.language.llama`. Needs
    ``pip install remanence[llm]``."""
    from remanence.models import language

    return language.llama(vocab, hidden, layers, heads, ffn, context, tie, seed, weights)


def causal_lm(
    name: str, pretrained: bool = True, revision: str = "main", seed: int = 0, weights: str | None = None
) -> nn.Module:
    """A causal language model of the library transformers: see `remanence.models.language.causal_lm`. Needs
    ``pip install remanence[llm]``."""
    from remanence.models import language

    return language.causal_lm(name, pretrained, revision, seed, weights)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write a network's weights to a file for the knob `weights`: see `remanence.models.weights.save_weights`."""
    from remanence.models import weights

    weights.save_weights(model, path)


#: Models that a plan can name; the keyword arguments but `inputs`, `vocab` and `seed` are the knobs.
MODELS: dict[str, Callable[..., Any]] = {
    "mlp": mlp,
    "cnn": cnn,
    "vit": vit,
    "resnet18": resnet18,
    "snn": snn,
    "identity": identity,
    "transformers": transformers,
    "timm": timm,
    "llama": llama,
    "causal-lm": causal_lm,
}
#: Those that speak; they take no `inputs`, and `vocab` where they are not pretrained.
LANGUAGE = ("llama", "causal-lm")
