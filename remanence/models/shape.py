"""The shape of the images that a network takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from remanence.core.errors import BadInput


def image_shape(inputs: int | Sequence[int], what: str) -> tuple[int, int, int]:
    """(channels, height, width) of `inputs`; a row of n numbers is a square image of one channel where n is a square.

    Raises:
        BadInput: neither; `what` names the network.
    """
    sizes = (inputs,) if isinstance(inputs, int) else tuple(inputs)
    if len(sizes) == 3:
        return sizes
    side = math.isqrt(sizes[0]) if len(sizes) == 1 else 0
    if side < 1 or side * side != sizes[0]:
        raise BadInput(
            f"a {what} needs inputs (channels, height, width), or rows that are square images of one channel, not {sizes}"
        )
    return 1, side, side
