"""Heads that grow: new rows for new classes, old rows untouched; and heads whose rows are fixed."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.rng import generator
from remanence.nn.anatomy import head_name, replace_module


def grow_head(model: nn.Module, rows: int, seed: int) -> nn.Module:
    """Add `rows` outputs to the model's head; old rows keep their bits, new ones are drawn as torch draws a linear layer's;
    where rows are fixed, as directions of length 1.

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
    if isinstance(old, FixedRows):
        drawn = F.normalize(torch.randn(rows, old.in_features, generator=rng), dim=1).to(old.weight)
        return replace_module(model, name, FixedRows(torch.cat([old.weight, drawn])).train(old.training))
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


class FixedRows(nn.Linear):
    """A linear layer without bias whose rows are a buffer: saved with the network, never trained, never drawn anew."""

    def __init__(self, rows: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = rows.shape
        self.register_buffer("weight", rows)
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Nothing: what the rows mean was not learned."""


class TargetHead(nn.Module):
    """Classes are fixed directions: ``rows (scale z)`` with ``z = P h / |P h|``, or ``z = P h`` without `normalise`.

    Its last layer is what `head_name` finds, so the head's input is ``scale z``, and its rows are the classes'. P, called `project`,
    is trainable, and there only where `inputs` and `width` differ.
    """

    def __init__(self, inputs: int, width: int, scale: float, normalise: bool, seed: int, like: torch.Tensor) -> None:
        super().__init__()
        self.scale, self.normalise = scale, normalise
        self.project: nn.Linear | None = None
        if inputs != width:
            self.project = empty_linear(inputs, width, bias=False, like=like)
            with torch.no_grad():
                drawn = torch.empty(width, inputs).uniform_(-1, 1, generator=generator(seed, "project"))
                self.project.weight.copy_(inputs**-0.5 * drawn)
        self.rows = FixedRows(like.new_empty(0, width))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        z = h if self.project is None else self.project(h)
        if self.normalise:
            z = F.normalize(z, dim=-1, eps=1e-6)
        return self.rows(self.scale * z)  # type: ignore[no-any-return]


def target_head(model: nn.Module) -> TargetHead | None:
    """The model's head, where its classes are fixed directions."""
    found = model.get_submodule(head_name(model).rpartition(".")[0])
    return found if isinstance(found, TargetHead) else None


def head_inputs(model: nn.Module) -> int:
    """How wide the input of the model's head is.

    Raises:
        BadInput: the head is not a linear layer.
    """
    name = head_name(model)
    found = model.get_submodule(name)
    if not isinstance(found, nn.Linear):
        raise BadInput(f"the head {name!r} is a {type(found).__name__}; give the model a linear head")
    return found.in_features


def with_target_head(model: nn.Module, width: int, scale: float, normalise: bool, seed: int) -> nn.Module:
    """Put a target head without rows in the place of the model's linear head; what that one had learned is lost."""
    inputs, name = head_inputs(model), head_name(model)
    old = model.get_submodule(name)
    made = TargetHead(inputs, width, scale, normalise, seed, next(old.parameters()).detach())
    return replace_module(model, name, made.train(old.training))
