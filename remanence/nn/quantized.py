"""Activations kept in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 255


def quantised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row of x (N, ...) on 256 even levels between its own least and greatest value: codes (N, ...) uint8, low (N,), high (N,).

    A row's levels depend on no other row, so that a row that is deleted leaves nothing in the others. A constant row is exact.
    """
    flat = x.detach().flatten(1)
    low, high = (flat.amin(1), flat.amax(1)) if flat.numel() else (flat.new_zeros(len(x)), flat.new_zeros(len(x)))
    step = (high - low) / LEVELS
    codes = ((flat - low[:, None]) / torch.where(step > 0, step, 1.0)[:, None]).round().clamp(0, LEVELS)
    return codes.to(torch.uint8).view(x.shape), low, high


def dequantised(codes: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The values (N, ...) of `quantised` codes: at most half a level, (high - low) / 510, from what they were, beside rounding."""
    flat = codes.flatten(1).to(low.dtype)
    return torch.lerp(low[:, None], high[:, None], flat / LEVELS).view(codes.shape)
