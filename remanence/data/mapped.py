"""Examples whose inputs stay in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from remanence.core.errors import BadInput, Corrupt
from remanence.data.examples import Examples
from remanence.data.rows import Mapped, Rows
from remanence.data.values import column


def mapped(
    array: str | Path | np.memmap[Any, Any],
    dtype: str | None = None,
    shape: Sequence[int] | None = None,
    scale: float | None = None,
) -> Rows:
    """A column over an ``.npy`` file, over a file of bare values (with `dtype` and `shape`), or over an open memory map.

    Raises:
        BadInput: no such file, or no array of numbers in C order.
        Corrupt: a file that is truncated, or no ``.npy`` file.
    """
    if isinstance(array, np.memmap):
        return Rows([Mapped(array, scale)])
    path = Path(array)
    if not path.is_file():
        raise BadInput(f"{path} does not exist; give the path of an .npy file, or of bare values with dtype and shape")
    if (dtype is None) != (shape is None):
        raise BadInput("a file of bare values needs both dtype and shape, an .npy file neither")
    try:
        if dtype is None or shape is None:
            opened = np.lib.format.open_memmap(path, mode="r")
        else:
            kind, expected = np.dtype(dtype), tuple(int(n) for n in shape)
            size = int(np.prod(expected, dtype=object)) * kind.itemsize
            if min(expected, default=0) < 0 or path.stat().st_size != size:
                raise Corrupt(
                    f"{path} has {path.stat().st_size} bytes where {list(expected)} of {kind} take {size}; check dtype and shape"
                )
            opened = np.memmap(path, kind, "r", 0, expected)
    except (TypeError, ValueError, EOFError, OSError) as error:
        if isinstance(error, BadInput | Corrupt):
            raise
        raise Corrupt(f"{path} cannot be mapped ({error}); it must be a whole .npy file of numbers") from None
    if not opened.ndim:
        raise BadInput(f"{path} holds a single value; a column has one row per example")
    return Rows([Mapped(opened, scale)])


def memmap(
    x: str | Path | np.memmap[Any, Any],
    y: Any = None,
    id: Any = None,
    columns: Mapping[str, Any] | None = None,
    source: str = "memmap",
    dtype: str | None = None,
    shape: Sequence[int] | None = None,
    scale: float | None = None,
) -> Examples:
    """Examples whose inputs stay in a file: only the rows of a batch are ever in memory.

    Args:
        x: an ``.npy`` file, a file of bare values in C order (then with `dtype` and `shape`), or an open ``np.memmap``: (N, ...).
        y: labels (N,): an array, a tensor, a list or an ``.npy`` file; held in memory.
        id: (N,) distinct whole numbers or an ``.npy`` file of them; None: row numbers.
        columns: further columns, as `y`; lists of words stay lists.
        scale: rows come as float32, times this: 1/255 for pixels stored as bytes. None: as they are stored.

    Raises:
        BadInput: no such file, values that are no numbers, columns of unequal length.
        Corrupt: a truncated file, or one that is no ``.npy`` file.
        DataChanged: (when rows are read) the file was changed after this call.
    """
    inputs: dict[str, Any] = {"x": mapped(x, dtype, shape, scale)}
    for name, value in {**({} if y is None else {"y": y}), **(columns or {})}.items():
        inputs[name] = _held(name, value)
    return Examples(inputs, source, None if id is None else _held("id", id))


def _held(name: str, value: Any) -> Any:
    if isinstance(value, str | Path):
        value = mapped(value).whole()
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        return value
    return column(name, value.numpy() if isinstance(value, Tensor) else np.asarray(value), "memmap")
