"""Floating point operations, counted on one forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: A training step in forwards: the backward pass makes two products for each of the forward's.
TRAINING = 3


def flops(call: Callable[[], Any]) -> int:
    """The floating point operations of ``call()``, which is made once, without gradients: those of matrix products, convolutions and
    attention, a multiplication and an addition being two. What works element by element (activations, norms, pooling) is not counted."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())
