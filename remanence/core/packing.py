"""Several short rows in one: a layout of the forward, not of the data, so that every row keeps its id and its own loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remanence.core.problem import Batch


def bins(lengths: list[int], capacity: int) -> list[list[int]]:
    """Rows of these `lengths` in as few bins of `capacity` tokens as first-fit-decreasing finds (at most 11/9 of the fewest, plus one)."""
    free: list[int] = []
    found: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        at = next((i for i, room in enumerate(free) if room >= lengths[row]), None)
        if at is None:
            at = len(free)
            free.append(capacity)
            found.append([])
        free[at] -= lengths[row]
        found[at].append(row)
    return found


def packed(batch: Batch, target: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Any]]:
    """The tokens of `batch` in bins as wide as its longest row.

    Args:
        target: (B, L - 1), True where the next token is to be predicted.

    Returns:
        input ids (R, C); the bin and place of every target, in the order of ``target.nonzero()``; and the keyword arguments
        ``position_ids`` (R, C) and ``attention_mask`` (R, 1, C, C), by which each row sees itself alone, from place 0 on.
    """
    ids, lengths = batch["input_ids"], batch["attention_mask"].sum(1).tolist()
    capacity = max(lengths)
    made = bins(lengths, capacity)
    bin_of, begins = [0] * len(lengths), [0] * len(lengths)
    for number, members in enumerate(made):
        begin = 0
        for row in members:
            bin_of[row], begins[row] = number, begin
            begin += lengths[row]
    device = ids.device
    where, start = (torch.tensor(values, device=device) for values in (bin_of, begins))
    rows, places = batch["attention_mask"].nonzero(as_tuple=True)
    at = (where[rows], start[rows] + places)
    shape = (len(made), capacity)
    flat = torch.zeros(shape, dtype=ids.dtype, device=device).index_put(at, ids[rows, places])
    position = torch.zeros(shape, dtype=torch.int64, device=device).index_put(at, places)
    segment = torch.full(shape, -1, dtype=torch.int64, device=device).index_put(at, rows)
    order = torch.arange(capacity, device=device)
    sees = (segment[:, :, None] == segment[:, None, :]) & (order[:, None] >= order[None, :])
    rows, places = target.nonzero(as_tuple=True)
    return flat, (where[rows], start[rows] + places), {"position_ids": position, "attention_mask": sees[:, None]}
