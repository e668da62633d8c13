"""Data cut into shards and slices by a hash of the id, orders in which slices are trained, and who was trained on what."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.nn.anatomy import head_name

Path = tuple[int, ...]


class Slices:
    """Holder of provenance: for each cell (a slice of a shard of an event) the ids that something was trained on."""

    def __init__(self) -> None:
        self.cells: list[Ids] = []

    def holds(self, ids: Ids) -> Ids:
        """Those of `ids` that are in any cell."""
        found = Ids()
        for cell in self.cells:
            found = found | (cell & ids)
        return found

    def touched(self, ids: Ids) -> list[int]:
        """Numbers of the cells with any of `ids`, ascending."""
        return [at for at, cell in enumerate(self.cells) if cell & ids]

    def union(self, cells: Iterable[int]) -> Ids:
        """The ids of several cells together."""
        found = Ids()
        for at in cells:
            found = found | self.cells[at]
        return found

    def purge(self, ids: Ids) -> None:
        """Take `ids` out of every cell."""
        self.cells = [cell - ids for cell in self.cells]

    def bytes(self) -> int:
        """Bytes of the ids."""
        return sum(cell.array.nbytes for cell in self.cells)

    def state_dict(self) -> dict[str, Any]:
        """The cells as tensors."""
        return {"cells": [torch.from_numpy(cell.array.copy()) for cell in self.cells]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state that :meth:`state_dict` gave."""
        self.cells = [Ids(cell) for cell in state["cells"]]


# -- who goes where ----------------------------------------------------------------------------------------------------


def place(ids: Ids, parts: int, key: int) -> list[Ids]:
    """`ids` in `parts` parts of about equal size, each id by its own keyed hash (splitmix64): where it goes depends on no other id."""
    with np.errstate(over="ignore"):
        mixed = ids.array.astype(np.uint64) ^ np.uint64(key)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(factor)
            mixed ^= mixed >> np.uint64(shift)
    part = mixed % np.uint64(parts)
    return [Ids(ids.array[part == at]) for at in range(parts)]


def fingerprint(module: nn.Module) -> str:
    """SHA-256 (hex) over names, types, shapes and bytes of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def layer_groups(model: nn.Module, count: int) -> list[list[str]]:
    """The hidden linear layers, by name, in `count` groups of whole blocks, counted from the top: group 0 is next to the head.

    A block is a child with linear layers in it of that ``ModuleList`` or ``Sequential`` where the number of blocks times the number of
    linear layers in them is largest: the layers of a transformer, or each linear layer of a perceptron. Linear layers outside it,
    and subclasses of ``Linear``, are left out.

    Raises:
        BadInput: there are fewer blocks than groups.
    """
    head = head_name(model)
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and name != head]
    found: list[list[str]] = []
    for at, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            roots = [f"{at}.{child}" if at else child for child, _ in module.named_children()]
            mine = [[name for name in names if name == root or name.startswith(f"{root}.")] for root in roots]
            mine = [block for block in mine if block]
            found = mine if _weight(mine) > _weight(found) else found
    found = found or [[name] for name in names]
    if len(found) < count:
        raise BadInput(
            f"{type(model).__name__} has {len(found)} blocks of hidden linear layers, too few for {count} groups; use at most {len(found)} slices"
        )
    bounds = [round(k * len(found) / count) for k in range(count + 1)]
    return [[name for block in found[::-1][start:stop] for name in block] for start, stop in pairwise(bounds)]


def _weight(blocks: list[list[str]]) -> int:
    return len(blocks) * sum(map(len, blocks))


# -- orders ------------------------------------------------------------------------------------------------------------


def rotations(items: Sequence[int], count: int) -> list[Path]:
    """`count` orders of `items`: its cyclic rotations, so that every item comes once at every place; beyond ``len(items)`` the rests
    behind each first item are rotated in turn.

    Raises:
        BadInput: there are not so many orders.
    """
    items = tuple(items)
    turned = [items[at:] + items[:at] for at in range(len(items))]
    if count <= len(items):
        return turned[:count]
    if len(items) < 2:
        raise BadInput(
            "more orders are asked for than there are permutations; ask for fewer sequences, or cut more slices"
        )
    shares = [count // len(items) + (at < count % len(items)) for at in range(len(items))]
    return [
        (first, *rest)
        for (first, *others), share in zip(turned, shares, strict=True)
        for rest in rotations(others, share)
    ]


def score(order: Sequence[int], odds: Sequence[float], power: float = 100.0) -> float:
    """How long the prefixes of `order` live: ``sum_n n (1 - sum_{i <= n} odds[order_i])^power``."""
    alive = 1 - np.cumsum(np.asarray(odds)[list(order)])
    return float((np.arange(1, len(alive) + 1) * alive.clip(0) ** power).sum())


def matched(odds: Sequence[float], power: float = 100.0) -> list[Path]:
    """One order for each first slice, where slice s is asked for with probability ``odds[s]``: grown place by place, all orders at once
    by the assignment of next slices that gives the largest total `score`. Every slice comes once at every place."""
    from scipy.optimize import linear_sum_assignment  # takes a fifth of a second to import

    found: list[Path] = [(first,) for first in range(len(odds))]
    for _ in range(len(odds) - 1):
        gain = [
            [-np.inf if item in order else score((*order, item), odds, power) for item in range(len(odds))]
            for order in found
        ]
        for row, item in zip(*linear_sum_assignment(np.array(gain), maximize=True), strict=True):
            found[row] = (*found[row], int(item))
    return found


def prefixes(orders: Iterable[Path]) -> list[Path]:
    """Every beginning of the orders, each once, a shorter one before those that go on from it."""
    return list(dict.fromkeys(order[:n] for order in orders for n in range(1, len(order) + 1)))


def surviving(paths: Iterable[Path], gone: Iterable[int]) -> list[Path]:
    """The prefixes that none of the slices in `gone` has entered."""
    lost = set(gone)
    return [path for path in paths if lost.isdisjoint(path)]


def expected_deletions(shards: int, slices: int, sequences: int = 1) -> float:
    """Mean number of deletions, each of a slice drawn uniformly, after which no shard has a prefix left: ``m L (1 + 1/2 + ... + 1/K)``
    with ``K = m min(B, L)`` distinct first slices. One sequence: SISA without retraining."""
    firsts = shards * min(sequences, slices)
    return shards * slices * sum(1 / n for n in range(1, firsts + 1))
