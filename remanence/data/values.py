"""What loaders share: how values become columns, limits, and progress of long loads."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remanence.core.errors import BadInput

#: The most memory, in bytes, that a loader takes unless told otherwise.
LIMIT = 4 * 2**30


def fits(size: int, limit: int, what: str) -> None:
    """Refuse what would take more memory than `limit` bytes.

    Raises:
        BadInput: says how much it would be.
    """
    if size > limit:
        raise BadInput(
            f"{what} would take {size / 2**20:.1f} MiB of memory where {limit / 2**20:.1f} MiB are allowed; "
            "load less, raise max_bytes where there is one, or keep the column in a file (rm.data.memmap)"
        )


def target(name: str, kind: np.dtype[Any], where: str) -> torch.dtype:
    """The type of a column in memory: whole numbers and flags int64, real numbers float32, pixels (``x`` of uint8) float32.

    Raises:
        BadInput: values that are no real numbers.
    """
    if kind.kind not in "biuf":
        raise BadInput(f"{where}: column {name!r} holds values of type {kind}; a column holds real or whole numbers")
    pixels = name == "x" and kind == np.uint8
    return torch.float32 if kind.kind == "f" or pixels else torch.int64


def column(name: str, array: np.ndarray[Any, Any], where: str) -> Tensor:
    """A whole array as a column, of the type that `target` gives. Pixels (``x`` of uint8) are divided by 255, and images (N, H, W) of
    them become (N, 1, H, W).

    Raises:
        BadInput: values that are no real numbers, whole numbers beyond 64 bits, real numbers as ids.
    """
    kind = target(name, array.dtype, where)
    if not array.ndim:
        raise BadInput(f"{where}: {name!r} is a single value; a column has one row per example")
    if array.dtype == np.uint64 and array.size and int(array.max()) >= 2**63:
        raise BadInput(f"{where}: column {name!r} has numbers that do not fit into 64 bits")
    made = torch.from_numpy(np.ascontiguousarray(array, np.float32 if kind == torch.float32 else np.int64))
    return pixels(made) if name == "x" and array.dtype == np.uint8 else made


def pixels(x: Tensor) -> Tensor:
    """Bytes held as float32, in place to [0, 1]; (N, H, W) becomes (N, 1, H, W)."""
    x = x.div_(255)
    return x[:, None] if x.dim() == 3 else x


def watched(count: int, label: str) -> Iterator[int]:
    """0 to count - 1, with a progress bar on a terminal once it has taken two seconds."""
    start, bar, task = time.monotonic(), None, None
    try:
        for number in range(count):
            yield number
            if bar is not None and task is not None:
                bar.update(task, completed=number + 1)
            elif sys.stderr.isatty() and time.monotonic() - start > 2:
                from rich.console import Console
                from rich.progress import Progress

                bar = Progress(console=Console(stderr=True))
                task = bar.add_task(label, total=count)
                bar.start()
    finally:
        if bar is not None:
            bar.stop()
