"""Any dataset of PyTorch's or of the ``datasets`` library, gathered once into whole columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remanence.core.errors import BadInput, UnknownName, nearest
from remanence.data.examples import Examples
from remanence.data.values import LIMIT, fits, pixels, target, watched

_ROWS = 256  # rows asked of a `datasets.Dataset` at a time


def dataset(
    ds: Any, columns: Mapping[str, str | int] | None = None, max_bytes: int = LIMIT, source: str = "dataset"
) -> Examples:
    """Every item of a map-style ``torch.utils.data.Dataset``, fetched once, in order.

    Items are ``(x, y)`` or dicts; their values tensors, arrays, images of Pillow's, numbers or words, each of one shape throughout.
    Whole numbers become int64, real numbers float32, words lists; `x` of bytes becomes pixels in [0, 1]. Random
    augmentation must be off (it belongs into `Examples.views`), else no two processes see the same data.

    Args:
        columns: our names to theirs: positions in a tuple or keys of a dict, such as ``{"x": "image", "y": "label", "id": "key"}``;
            ``id`` gives the ids, else row numbers. None: ``(x, y)``, or every key.
        max_bytes: of the columns in memory; looked at before the second item is fetched.

    Raises:
        UnknownName: a key that the items lack.
        BadInput: no map-style dataset, an empty one, an item that fails or differs in shape or type, NaN, or the limit.
    """
    if not hasattr(type(ds), "__getitem__") or not hasattr(type(ds), "__len__"):
        raise BadInput(
            f"{type(ds).__name__} is no map-style dataset: it needs a length and items by number; read it into one first"
        )

    def items() -> Iterator[dict[str, Any]]:
        for number in watched(len(ds), f"reading {source}"):
            try:
                item = ds[number]
            except Exception as error:  # the user's code may raise anything
                raise BadInput(
                    f"{source}: item {number} cannot be fetched ({type(error).__name__}: {error})"
                ) from error
            yield _named(item, columns, f"{source}: item {number}")

    return _gathered(len(ds), items(), max_bytes, source)


def huggingface(
    ds: Any, columns: Mapping[str, str] | None = None, max_bytes: int = LIMIT, source: str = "huggingface"
) -> Examples:
    """Every row of a ``datasets.Dataset`` (one split), in any of its formats; values and arguments as in `dataset`.

    Raises:
        UnknownName: a column that the dataset lacks.
        BadInput: several splits or a streamed dataset, a missing value, ragged rows, NaN, or the limit.
    """
    if isinstance(ds, Mapping):
        raise BadInput(
            f"this dataset has the splits {', '.join(map(str, ds))}; give one of them, such as ds[{next(iter(ds), 'train')!r}]"
        )
    if not hasattr(ds, "column_names") or not hasattr(type(ds), "__len__") or not hasattr(type(ds), "__getitem__"):
        raise BadInput(
            f"{type(ds).__name__} is no datasets.Dataset with a length; a streamed one must be read into one first"
        )
    known = list(ds.column_names)
    for theirs in (columns or {}).values():
        if theirs not in known:
            raise UnknownName(
                f"{source} has no column {theirs!r}{nearest(str(theirs), known)} (it has {', '.join(known)})"
            )

    def items() -> Iterator[dict[str, Any]]:
        rows: dict[str, Any] = {}
        for number in watched(len(ds), f"reading {source}"):
            if number % _ROWS == 0:
                rows = ds[number : number + _ROWS]
            item = {name: rows[name][number % _ROWS] for name in rows}
            yield _named(item, columns, f"{source}: row {number}")

    return _gathered(len(ds), items(), max_bytes, source)


def _named(item: Any, columns: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """An item under our names."""
    if isinstance(item, Mapping):
        found: dict[Any, Any] = dict(item)
        wanted = columns or {name: name for name in found}
    elif isinstance(item, tuple | list):
        found = dict(enumerate(item))
        if columns is None and len(item) != 2:
            raise BadInput(
                f"{where} has {len(item)} values, not (x, y); say which is which, such as columns={{'x': 0, 'y': 2}}"
            )
        wanted = columns or {"x": 0, "y": 1}
    else:
        raise BadInput(f"{where} is a {type(item).__name__}; items must be (x, y) or dicts")
    for theirs in wanted.values():
        if theirs not in found:
            known = [str(key) for key in found]
            raise UnknownName(f"{where} has no {theirs!r}{nearest(str(theirs), known)} (it has {', '.join(known)})")
    return {ours: _value(found[theirs], f"{where}, {ours!r}") for ours, theirs in wanted.items()}


def _value(value: Any, where: str) -> Any:
    """A word, or an array."""
    if value is None:
        raise BadInput(f"{where} is missing; fill it or drop the row")
    if isinstance(value, str):
        return value
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()
    if hasattr(value, "getbands"):  # an image of Pillow's
        value = (
            value
            if value.mode in ("L", "RGB", "RGBA")
            else value.convert("L" if len(value.getbands()) == 1 and value.mode != "P" else "RGB")
        )
        array = np.asarray(value)
        return array.transpose(2, 0, 1) if array.ndim == 3 else array
    try:
        return np.asarray(value)
    except ValueError:
        raise BadInput(f"{where} is ragged: its parts differ in length; pad or cut them first") from None


def _gathered(count: int, items: Iterator[dict[str, Any]], max_bytes: int, source: str) -> Examples:
    if not count:
        raise BadInput(f"{source} is empty")
    made: dict[str, Any] = {}
    first: dict[str, Any] = {}
    for number, item in enumerate(items):
        if not number:
            first = item
            arrays = {name: value for name, value in item.items() if not isinstance(value, str)}
            kinds = {name: target(name, value.dtype, source) for name, value in arrays.items()}
            size = count * sum(value.size * kinds[name].itemsize for name, value in arrays.items())
            fits(size, max_bytes, f"{source}: {count} rows like the first")
            made = {
                name: torch.empty(count, *arrays[name].shape, dtype=kinds[name]) if name in arrays else []
                for name in item
            }
        if item.keys() != first.keys():
            raise BadInput(f"{source}: row {number} has {', '.join(item)} where the first has {', '.join(first)}")
        for name, value in item.items():
            _same(value, first[name], f"{source}: row {number}, {name!r}")
            if isinstance(value, str):
                made[name].append(value)
            else:
                made[name][number] = torch.from_numpy(np.array(value))
    if getattr(first.get("x"), "dtype", None) == np.uint8:
        made["x"] = pixels(made["x"])
    ids = made.pop("id", None)
    if not made:
        raise BadInput(f"{source} has no column but the id")
    examples = Examples(made, source, ids)
    examples.check()
    return examples


def _same(value: Any, first: Any, where: str) -> None:
    if isinstance(value, str) != isinstance(first, str):
        raise BadInput(
            f"{where} is {'a word' if isinstance(value, str) else 'a number'} where the first row has the other"
        )
    if isinstance(value, str):
        return
    if value.shape != first.shape:
        raise BadInput(
            f"{where} has shape {value.shape} where the first row has {first.shape}; pad, cut or resize first"
        )
    if value.dtype != first.dtype and (first.dtype == np.uint8 or not np.can_cast(value.dtype, first.dtype, "safe")):
        raise BadInput(f"{where} is {value.dtype} where the first row has {first.dtype}; give all rows one type")
