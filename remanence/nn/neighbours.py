"""Answers by the nearest of stored vectors, each class compared on coordinates of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence.nn.contrast import unit


def masked_distances(h: Tensor, stored: Tensor, group: Tensor, masks: Mapping[int, Tensor]) -> Tensor:
    """(B, R) ``|unit(h_i m) - unit(v_j m)|`` of h (B, D) to stored v (R, D), m = masks[group_j] (D,)."""
    found = h.new_empty(len(h), len(stored))
    for number in group.unique().tolist():
        at, mask = group == number, masks[number].to(h)
        near = unit(stored[at].to(h) * mask)
        found[:, at] = torch.cdist(unit(h * mask), near, compute_mode="donot_use_mm_for_euclid_dist")
    return found


def votes(distances: Tensor, y: Tensor, k: int, columns: int) -> Tensor:
    """(B, columns) how many of the k nearest belong to each class, less half the distance to its nearest: equal votes are told by that,
    for `distances` (B, R) in [0, 2). y (R,) are the classes. A class with no stored vector is never answered."""
    near = distances.topk(min(k, distances.shape[1]), 1, largest=False).indices
    nearest = distances.new_full((len(distances), columns), torch.inf)
    nearest = nearest.scatter_reduce(1, y.expand(len(distances), -1), distances, "amin")
    return F.one_hot(y, columns).to(distances)[near].sum(1) - nearest / 2
