"""Sets of example ids: `Ids`, an immutable, sorted array of unique int64 numbers with set algebra.

Both sides of every operation are sorted, so a union is the merge of two sorted runs: numpy's stable sort (timsort for
int64) finds the two runs and
merges them in linear time. Membership of few ids in many is a binary search; of many in many, a merge again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from remanence.core.errors import BadInput

__all__ = ["Ids"]

_INT64 = np.dtype(np.int64)
# numpy's int64 range, as Python numbers, to refuse what would wrap around.
_LOW, _HIGH = -(2**63), 2**63 - 1


class Ids:
    """An immutable set of int64 ids, kept as a sorted numpy array without duplicates.

    Args:
        values: ids in any order, repeats allowed: a numpy array, a torch tensor (any shape; on any device), another
            `Ids`, an iterable of ints, or None
            for the empty set.

    Raises:
        BadInput: a value is no integer (floats and booleans are refused: a mask is not a set of ids), or does not fit
            into 64 bits.

    Operators: ``|  &  -  ^  <=  <  >=  >  ==  in  len  iter  bool``; the other side must be `Ids` too.
    """

    __slots__ = ("_array", "_hash")
    _array: NDArray[np.int64]
    _hash: int | None

    def __init__(self, values: Any = None) -> None:
        array = values._array if isinstance(values, Ids) else _sorted_unique(_as_int64(values))
        array.setflags(write=False)
        object.__setattr__(self, "_array", array)
        object.__setattr__(self, "_hash", None)

    @classmethod
    def range(cls, start: int, stop: int) -> Ids:
        """The ids start, start + 1, ..., stop - 1."""
        return cls._from_sorted(np.arange(start, stop, dtype=np.int64))

    @classmethod
    def _from_sorted(cls, array: NDArray[np.int64]) -> Ids:
        """Wraps an int64 array that is already sorted and unique, without a check or a copy.

        The array must not be changed by its owner afterwards.
        """
        new = cls.__new__(cls)
        array.setflags(write=False)
        object.__setattr__(new, "_array", array)
        object.__setattr__(new, "_hash", None)
        return new

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("Ids cannot be changed; make a new set with | & - ^")

    def __reduce__(self) -> tuple[Any, ...]:
        return (Ids, (np.array(self._array),))

    @property
    def array(self) -> NDArray[np.int64]:
        """The ids, ascending, int64 (n,), read-only."""
        return self._array

    # -- set algebra ---------------------------------------------------------------------------------------------------

    def __or__(self, other: Ids) -> Ids:
        if not isinstance(other, Ids):
            return NotImplemented
        a, b = self._array, other._array
        if not len(b) or self is other:
            return self
        if not len(a):
            return other
        if a[-1] < b[0]:
            return Ids._from_sorted(np.concatenate([a, b]))
        if b[-1] < a[0]:
            return Ids._from_sorted(np.concatenate([b, a]))
        merged = _merge(a, b)
        fresh = np.empty(len(merged), dtype=bool)
        fresh[0] = True
        np.not_equal(merged[1:], merged[:-1], out=fresh[1:])
        return Ids._from_sorted(merged[fresh])

    def __and__(self, other: Ids) -> Ids:
        if not isinstance(other, Ids):
            return NotImplemented
        small, large = sorted((self._array, other._array), key=len)
        return Ids._from_sorted(small[_member(small, large)])

    def __sub__(self, other: Ids) -> Ids:
        if not isinstance(other, Ids):
            return NotImplemented
        if not len(self) or not len(other):
            return self
        return Ids._from_sorted(self._array[~_member(self._array, other._array)])

    def __xor__(self, other: Ids) -> Ids:
        if not isinstance(other, Ids):
            return NotImplemented
        merged = _merge(self._array, other._array)
        if not len(merged):
            return self
        twice = merged[1:] == merged[:-1]
        single = np.ones(len(merged), dtype=bool)
        single[1:] &= ~twice
        single[:-1] &= ~twice
        return Ids._from_sorted(merged[single])

    def __le__(self, other: Ids) -> bool:
        if not isinstance(other, Ids):
            return NotImplemented
        return len(self) <= len(other) and bool(_member(self._array, other._array).all())

    def __lt__(self, other: Ids) -> bool:
        if not isinstance(other, Ids):
            return NotImplemented
        return len(self) < len(other) and self <= other

    def __ge__(self, other: Ids) -> bool:
        if not isinstance(other, Ids):
            return NotImplemented
        return other <= self

    def __gt__(self, other: Ids) -> bool:
        if not isinstance(other, Ids):
            return NotImplemented
        return other < self

    def isdisjoint(self, other: Ids) -> bool:
        """True if the two sets share no id."""
        return not (self & other)

    # -- one value, all values -----------------------------------------------------------------------------------------

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            return False
        number = value.__index__()
        if not _LOW <= number <= _HIGH:
            return False
        at = int(np.searchsorted(self._array, number))
        return at < len(self._array) and int(self._array[at]) == number

    def isin(self, array: Any) -> NDArray[np.bool_]:
        """Which entries of an integer array (or tensor) of any shape and order are in this set: bool, same shape."""
        values = np.asarray(_to_numpy(array))
        if not values.size:
            return np.zeros(values.shape, dtype=bool)
        flat = _as_int64(values)
        return _member(flat, self._array).reshape(values.shape)

    def __len__(self) -> int:
        return len(self._array)

    def __bool__(self) -> bool:
        return len(self._array) > 0

    def __iter__(self) -> Iterator[int]:
        return iter(self._array.tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ids):
            return NotImplemented
        return self is other or np.array_equal(self._array, other._array)

    def __hash__(self) -> int:
        if self._hash is None:
            object.__setattr__(self, "_hash", hash(self._array.tobytes()))
        return cast(int, self._hash)

    def digest(self) -> str:
        """sha256 (hex) of the sorted ids as little-endian int64; equal sets have equal digests on every machine."""
        return hashlib.sha256(self._array.astype("<i8", copy=False).tobytes()).hexdigest()

    def sample(self, n: int, generator: Any) -> Ids:
        """n ids drawn without replacement.

        Args:
            n: how many; 0 <= n <= len(self).
            generator: a torch.Generator (see `remanence.core.rng.generator`) or a numpy.random.Generator; the draw
                depends on it alone.

        Raises:
            BadInput: n is out of range.
        """
        if not 0 <= n <= len(self):
            raise BadInput(f"cannot draw {n} ids out of {len(self)}")
        if hasattr(generator, "permutation"):
            rows = np.asarray(generator.permutation(len(self)))[:n]
        else:
            import torch  # only here: a set of ids needs no torch

            rows = torch.randperm(len(self), generator=generator, device=generator.device)[:n].cpu().numpy()
        return Ids._from_sorted(self._array[np.sort(rows)])

    def __repr__(self) -> str:
        if not len(self):
            return "Ids(0)"
        if len(self) == 1:
            return f"Ids(1: {self._array[0]})"
        return f"Ids({len(self)}: {self._array[0]}..{self._array[-1]})"


def _to_numpy(values: Any) -> Any:
    """A tensor as a numpy array, told by its methods, so that torch need not be imported; anything else as it is."""
    if hasattr(values, "numpy") and hasattr(values, "detach"):
        return values.detach().cpu().numpy()
    return values


def _as_int64(values: Any) -> NDArray[np.int64]:
    """Ids in any form as a flat int64 array; may share memory with the input."""
    values = _to_numpy(values)
    if values is None:
        return np.empty(0, dtype=np.int64)
    if not isinstance(values, np.ndarray):
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise BadInput(f"ids must be integers, not {values!r:.60}")
        items = list(values)
        if any(isinstance(item, bool | np.bool_) or not hasattr(item, "__index__") for item in items):
            bad = next(item for item in items if isinstance(item, bool | np.bool_) or not hasattr(item, "__index__"))
            raise BadInput(f"ids must be integers, not {bad!r:.60}")
        try:
            return np.fromiter((item.__index__() for item in items), dtype=np.int64, count=len(items))
        except OverflowError:
            raise BadInput("an id does not fit into 64 bits") from None
    if values.size == 0:
        return np.empty(0, dtype=np.int64)
    if values.dtype.kind not in "iu":
        hint = "; a mask is not a set of ids, use numpy.flatnonzero(mask)" if values.dtype.kind == "b" else ""
        raise BadInput(f"ids must be integers, not an array of {values.dtype}{hint}")
    if values.dtype.kind == "u" and values.dtype.itemsize == 8 and int(values.max()) > _HIGH:
        raise BadInput("an id does not fit into 64 bits")
    return values.reshape(-1).astype(_INT64, copy=False)


def _sorted_unique(flat: NDArray[np.int64]) -> NDArray[np.int64]:
    """A sorted copy without repeats; linear when the input is sorted already."""
    if len(flat) > 1 and not bool(np.all(flat[1:] > flat[:-1])):
        flat = np.sort(flat, kind="stable")
        fresh = np.empty(len(flat), dtype=bool)
        fresh[0] = True
        np.not_equal(flat[1:], flat[:-1], out=fresh[1:])
        return flat[fresh]
    return flat.copy()


def _merge(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    merged = np.concatenate([a, b])
    merged.sort(kind="stable")
    return merged


def _member(values: NDArray[np.int64], sorted_set: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of `values` (any order) are in `sorted_set` (ascending, unique)."""
    if not len(sorted_set) or not len(values):
        return np.zeros(len(values), dtype=bool)
    low, high = int(sorted_set[0]), int(sorted_set[-1])
    span = high - low + 1
    if span == len(sorted_set):  # one run: two comparisons
        return (values >= low) & (values <= high)
    if len(values) > 1024 and span <= 16 * len(
        sorted_set
    ):  # dense ids: a table of at most 16 bytes per id beats a search
        table = np.zeros(span, dtype=bool)
        table[sorted_set - low] = True
        within = (values >= low) & (values <= high)
        return within & table[np.where(within, values - low, 0)]
    at = np.searchsorted(sorted_set, values)
    np.minimum(at, len(sorted_set) - 1, out=at)
    return np.asarray(sorted_set[at] == values, dtype=bool)
