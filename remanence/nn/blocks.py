"""The repeated blocks of a network, the linear layers of their feed-forward networks, and a lasso over blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from remanence.nn.anatomy import head_name

#: Inside the root of a group's norm: its slope stays finite where the group is zero.
EPS = 1e-12


def feed_forward(model: nn.Module) -> dict[str, list[str]]:
    """The linear layers of every transformer block that are not its attention's: {block: their dotted names}, in order.

    Attention is a module whose class or attribute is called so (``attention``, ``attn``); a block is the smallest module that holds
    attention and linear layers beside it. In a network without attention every linear layer but the head is a group of its own.
    """
    head = head_name(model)
    attention = [
        path for path, module in model.named_modules() if path and _is_attention(path.rpartition(".")[2], module)
    ]
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != head]
    if not attention:
        return {path: [path] for path in linear}
    outside = [path for path in linear if not any(_inside(path, at) for at in attention)]
    holders = [
        path
        for path, _ in model.named_modules()
        if any(_within(at, path) for at in attention) and any(_within(at, path) for at in outside)
    ]
    smallest = [path for path in holders if not any(other != path and _within(other, path) for other in holders)]
    return {path: [at for at in outside if _within(at, path)] for path in smallest}


def _is_attention(name: str, module: nn.Module) -> bool:
    words = (name.lower(), type(module).__name__.lower())
    return any(word in said for said in words for word in ("attention", "attn"))


def _inside(path: str, holder: str) -> bool:
    """Whether `path` is `holder` or below it."""
    return path == holder or path.startswith(holder + ".")


def _within(path: str, holder: str) -> bool:
    """Whether `path` lies below `holder`; everything lies below the model itself."""
    return not holder or path.startswith(holder + ".")


def group_lasso(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """``sum over groups of sqrt(sum of squares of all tensors of the group)``: it pulls whole groups to zero, not single entries."""
    return torch.stack([(torch.stack([p.square().sum() for p in group]).sum() + EPS).sqrt() for group in groups]).sum()
