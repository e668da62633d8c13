"""Changes of weights by depth: the block of every parameter, two sets of weights mixed block by block, changes of several models merged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.nn.adapters import Adapter
from remanence.nn.anatomy import head_name, weighted_modules

Weights = Mapping[str, Tensor]


def block_of(model: nn.Module) -> dict[str, int | None]:
    """The block of every parameter by name, numbered from 0 in order of definition; None: it is in none.

    Blocks are the modules that a numbered container repeats and that have modules inside, such as ``model.layers.3`` or
    ``layer1.0``, and others of their class; of blocks in blocks the outer ones. In a network without any, such as a perceptron,
    every layer with a matrix is a block, and what follows it (a norm) belongs to it. In no block are embeddings and whatever else
    lies outside, and the head: the last layer, as `head_name` finds it.
    """
    head = head_name(model)
    names = [name for name, _ in model.named_parameters()]
    kinds = _repeated(model)
    if kinds:
        modules = dict(model.named_modules())
        path_of = {name: _outermost(name, modules, kinds) for name in names}
        path_of = {name: None if name.startswith(f"{head}.") else path for name, path in path_of.items()}
        numbers: dict[str, int] = {}
        for path in path_of.values():
            if path is not None:
                numbers.setdefault(path, len(numbers))
        return {name: None if path is None else numbers[path] for name, path in path_of.items()}
    found = dict[str, int | None]()
    number: int | None = None
    at = None
    for path, module in weighted_modules(model).items():
        own = dict(module.named_parameters(recurse=False))
        outside = path == head or isinstance(module, nn.Embedding)
        inside = at is not None and path.startswith(f"{at}.")
        if not outside and not inside and any(p.dim() > 1 for p in own.values()):
            number, at = 0 if number is None else number + 1, path
        found |= {f"{path}.{name}" if path else name: None if outside else number for name in own}
    return {name: found[name] for name in names}


def block_count(blocks: Mapping[str, int | None]) -> int:
    """How many blocks there are."""
    return 1 + max((number for number in blocks.values() if number is not None), default=-1)


def linear_in_depth(model: nn.Module, alpha: float, beta: float) -> dict[str, float]:
    """For every parameter ``alpha + beta l / (L - 1)``, l its block of L; alpha outside of the blocks, and ``alpha + beta`` in the head,
    which comes after all of them. A single block is the first one.

    Wang et al. 2025, LiNeS, arXiv 2410.17146.
    """
    blocks, head = block_of(model), head_name(model)
    last = max(1, block_count(blocks) - 1)
    return {
        name: alpha + beta if name.startswith(f"{head}.") else alpha + beta * ((number or 0) / last)
        for name, number in blocks.items()
    }


@torch.no_grad()
def interpolate(into: Weights, start: Weights, end: Weights, shares: Mapping[str, float]) -> None:
    """``into <- start + share (end - start)`` for every name in `into`, in place and one tensor at a time; `into` may be `end`.

    A share of 0 gives `start` exactly, one of 1 `end`; a name without a share has 1.
    """
    for name, tensor in into.items():
        tensor.copy_(torch.lerp(start[name], end[name], shares.get(name, 1.0)))


def slopes(grads: Weights, start: Weights, end: Weights, blocks: Mapping[str, int | None], count: int) -> Tensor:
    """The derivative of a loss by the share of each block (count,), float64, where `grads` are its gradients at the weights that
    `interpolate` gave: ``sum over the block's tensors of <grad, end - start>``."""
    found: list[list[Tensor]] = [[] for _ in range(count)]
    for name, grad in grads.items():
        number = blocks.get(name)
        if number is not None:
            found[number].append((grad * (end[name] - start[name])).sum(dtype=torch.float64))
    zero = next(iter(grads.values())).new_zeros((), dtype=torch.float64)
    return torch.stack([torch.stack([zero, *each]).sum() for each in found])


def changes(start: Weights, end: Weights) -> dict[str, Tensor]:
    """``end - start``, a task vector, by name."""
    return {name: end[name].detach() - tensor.detach() for name, tensor in start.items()}


def l1_ratio(tasks: Sequence[Weights], merged: Weights) -> float:
    """``( |sum_t tau_t|_1 / |tau_m|_1 ) / T``: how LiNeS scales the first block of T models' merged change tau_m. Norms are over all
    parameters at once; a plain sum has 1 / T, its first block is then that of the mean.

    Raises:
        BadInput: no changes, or a merged one of zeros.
    """
    whole, norm = (sum(float(t.abs().sum(dtype=torch.float64)) for t in w.values()) for w in (_sum(tasks), merged))
    if not norm:
        raise BadInput("the merged change is zero everywhere; are these the models that were trained?")
    return whole / norm / len(tasks)


@torch.no_grad()
def merge(model: nn.Module, tasks: Sequence[Weights], beta: float, merged: Weights | None = None) -> float:
    """Add to `model`, the common start, the merged change of models that were trained from it, scaled by depth (LiNeS); in place.

        theta <- theta + (alpha + beta l / (L - 1)) tau_m        alpha = ( |sum_t tau_t|_1 / |tau_m|_1 ) / T

    Args:
        tasks: the `changes` of T models, each with every parameter of the model.
        beta: chosen on validation data, over the grid that the merge without LiNeS would use for its coefficient.
        merged: tau_m as any other merge made it; None: the plain sum (task arithmetic).

    Returns:
        alpha.

    Raises:
        BadInput: no changes, a name that lacks, or a merged change of zeros.
    """
    own = dict(model.named_parameters())
    for found in (*tasks, *([] if merged is None else [merged])):
        lacking = sorted(set(own) - set(found))
        if lacking:
            raise BadInput(f"a change has no {lacking[0]!r}, which the model has; are they of one architecture?")
    tau = _sum(tasks) if merged is None else merged
    alpha = l1_ratio(tasks, tau)
    factors = linear_in_depth(model, alpha, beta)
    for name, p in own.items():
        p.add_(tau[name], alpha=factors[name])
    return alpha


def _sum(tasks: Sequence[Weights]) -> dict[str, Tensor]:
    if not tasks:
        raise BadInput("there are no changes to merge")
    return {name: torch.stack([task[name] for task in tasks]).sum(0) for name in tasks[0]}


def _repeated(model: nn.Module) -> set[type[nn.Module]]:
    """The classes of modules that a numbered container holds at least two of, if they have modules inside; plain sequences, which are
    mostly stages of blocks, only where there is nothing else."""
    holders: dict[tuple[str, type[nn.Module]], int] = {}
    for path, module in model.named_modules():
        parent, _, last = path.rpartition(".")
        if last.isdigit() and not isinstance(module, Adapter) and _composite(module):
            holders[parent, type(module)] = holders.get((parent, type(module)), 0) + 1
    kinds = {kind for (_, kind), count in holders.items() if count > 1}
    return {kind for kind in kinds if not issubclass(kind, nn.Sequential | nn.ModuleList)} or kinds


def _composite(module: nn.Module) -> bool:
    return next(module.children(), None) is not None and next(module.parameters(), None) is not None


def _outermost(name: str, modules: Mapping[str, nn.Module], kinds: set[type[nn.Module]]) -> str | None:
    """The outermost numbered module of `kinds` that holds the parameter."""
    paths = [name[: found.end()] for found in re.finditer(r"(?:^|(?<=\.))\d+(?=\.)", name)]
    return next((path for path in paths if type(modules[path]) in kinds), None)
