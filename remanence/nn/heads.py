"""Heads that grow: new rows for new classes, old rows untouched."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.rng import generator
from remanence.nn.anatomy import head_name, replace_module


def grow_head(model: nn.Module, rows: int, seed: int) -> nn.Module:
    """Add `rows` outputs to the model's head; old rows keep their bits, new ones are drawn as torch draws a linear layer's.

    Raises:
        BadInput: the head is not a linear layer.
    """
    name = head_name(model)
    old = model.get_submodule(name)
    if not isinstance(old, nn.Linear):
        raise BadInput(
            f"the head {name!r} is a {type(old).__name__}; only a linear head can grow (or make it wide enough from the start)"
        )
    rng, bound = generator(seed, "head", old.out_features), old.in_features**-0.5
    new = empty_linear(old.in_features, old.out_features + rows, old.bias is not None, old.weight)
    with torch.no_grad():
        for target, source in zip(new.parameters(), old.parameters(), strict=True):
            fresh = torch.empty((rows, *source.shape[1:])).uniform_(-bound, bound, generator=rng)
            target.copy_(torch.cat([source, fresh.to(source)]))
            target.requires_grad_(source.requires_grad)
    return replace_module(model, name, new.train(old.training))


def empty_linear(inputs: int, outputs: int, bias: bool = True, like: torch.Tensor | None = None) -> nn.Linear:
    """A linear layer whose values are still to be set; it may have no outputs, and draws no random numbers."""
    device, dtype = (like.device, like.dtype) if like is not None else ("cpu", torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, device=device, dtype=dtype)
    return layer
