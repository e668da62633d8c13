"""Look at what chosen layers give, and compare where two networks look."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput, UnknownName, nearest
from remanence.nn.anatomy import head_name, norm_modules, weighted_modules

Taken = dict[str, Tensor]


def hidden_layers(model: nn.Module) -> list[str]:
    """Names of the activation modules; of all weighted modules but the head and the normalisations where there are none."""
    kinds = [(name, m) for name, m in model.named_modules() if type(m).__module__ == "torch.nn.modules.activation"]
    plain = [name for name, m in kinds if not isinstance(m, nn.MultiheadAttention)]
    others = {head_name(model), *norm_modules(model)}
    return plain or [name for name in weighted_modules(model) if name not in others]


@contextmanager
def taps(model: nn.Module, layers: Sequence[str]) -> Iterator[Taken]:
    """A dict that after every forward holds the output of each of `layers`, by name, still in the graph.

    Raises:
        UnknownName: the model has no such layer.
        BadInput: a layer gives no tensor; said in the forward.
    """
    modules = dict(model.named_modules())
    for name in layers:
        if name not in modules:
            raise UnknownName(f"the model has no layer {name!r}{nearest(name, modules)}")
    taken: Taken = {}
    hooks = [modules[name].register_forward_hook(_tap(taken, name)) for name in layers]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def _tap(taken: Taken, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def take(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not isinstance(output, Tensor):
            raise BadInput(f"the layer {name!r} gives a {type(output).__name__}; tap one that gives a tensor")
        taken[name] = output

    return take


def attention_map(activation: Tensor) -> Tensor:
    """Where a layer looks: ``a^2``, averaged over channels, flattened and of length 1, for each row.

    (B, C, H, W) gives (B, H*W) and (B, T, D) gives (B, T); in (B, D) every unit is a place of its own: (B, D). A row of zeros stays
    zero. Scaling the activation changes nothing. Source: Zagoruyko & Komodakis 2017, arXiv 1612.03928.
    """
    if activation.dim() not in (2, 3, 4):
        raise BadInput(
            f"attention maps are known for (B, C, H, W), (B, T, D) and (B, D), not {tuple(activation.shape)}"
        )
    squared = activation.square()
    if squared.dim() > 2:
        squared = squared.mean(1 if squared.dim() == 4 else 2)
    return F.normalize(squared.flatten(1), dim=1)


def attention_distance(a: Tensor, b: Tensor) -> Tensor:
    """``mean over places of (map(a) - map(b))^2``, one value per row: (B,)."""
    return (attention_map(a) - attention_map(b)).square().mean(1)
