"""Ids against Python's own sets."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.core.errors import BadInput
from remanence.core.ids import Ids

numbers = st.one_of(st.integers(-20, 60), st.integers(-(2**63), 2**63 - 1))
some = st.lists(numbers, max_size=60)


@settings(max_examples=200, deadline=None)
@given(some, some)
def test_algebra_is_that_of_sets(left: list[int], right: list[int]) -> None:
    a, b, x, y = Ids(left), Ids(right), set(left), set(right)
    for mine, theirs in ((a | b, x | y), (a & b, x & y), (a - b, x - y), (a ^ b, x ^ y)):
        assert list(mine) == sorted(theirs)
        assert mine.array.dtype == np.int64
        assert not mine.array.flags.writeable
    assert (a <= b, a < b, a >= b, a > b, a == b) == (x <= y, x < y, x >= y, x > y, x == y)
    assert a.isdisjoint(b) == x.isdisjoint(y)
    assert len(a) == len(x) and bool(a) == bool(x)
    assert all((value in a) == (value in x) for value in right + left)
    assert a.isin(np.array(right, dtype=np.int64)).tolist() == [value in x for value in right]
    if x == y:
        assert hash(a) == hash(b) and a.digest() == b.digest()


@pytest.mark.parametrize("high", [3_000, 100_000, 2**60])
def test_large_sets_take_every_path(high: int) -> None:
    draw = np.random.default_rng(0)
    left, right = draw.integers(0, high, 5_000), draw.integers(0, high, 4_000)
    a, b = Ids(left), Ids(right)
    assert np.array_equal((a | b).array, np.union1d(left, right))
    assert np.array_equal((a & b).array, np.intersect1d(left, right))
    assert np.array_equal((a - b).array, np.setdiff1d(left, right))
    assert np.array_equal((a ^ b).array, np.setxor1d(left, right))
    assert np.array_equal(b.isin(left), np.isin(left, right))
    run = Ids.range(10, 2_000)
    assert np.array_equal((run & a).array, np.intersect1d(run.array, left))


def test_forms_of_input() -> None:
    want = Ids([3, 1, 2])
    forms = (
        [1, 2, 3, 3],
        {1, 2, 3},
        np.array([[3, 2], [1, 1]], dtype=np.uint8),
        torch.tensor([3, 1, 2]),
        want,
        (n for n in (1, 2, 3)),
        range(1, 4),
        [np.int32(1), 2, torch.tensor(3)],
        np.array([1, 2, 3], dtype=np.uint64),
    )
    for form in forms:
        assert Ids(form) == want
    assert Ids.range(1, 4) == want
    assert Ids() == Ids(None) == Ids([]) == Ids(torch.empty(0)) and not Ids()
    assert Ids([True and 1]) == Ids([1])


@pytest.mark.parametrize(
    "bad",
    [
        [1.0],
        np.array([1.5]),
        np.array([True, False]),
        [True],
        "12",
        7,
        [2**63],
        np.array([2**64 - 1], dtype=np.uint64),
        ["1"],
    ],
)
def test_what_is_no_set_of_ids_is_refused(bad: object) -> None:
    with pytest.raises(BadInput):
        Ids(bad)


def test_it_is_immutable_and_owns_its_memory() -> None:
    source = np.array([1, 2, 3])
    ids = Ids(source)
    source[0] = 99
    assert list(ids) == [1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        ids.array[0] = 5
    with pytest.raises(AttributeError):
        ids.array = source  # type: ignore[misc]
    with pytest.raises(TypeError):
        ids | {4}  # type: ignore[operator]


def test_digest_is_over_little_endian_bytes() -> None:
    assert Ids([7, -1]).digest() == hashlib.sha256(struct.pack("<qq", -1, 7)).hexdigest()
    assert Ids().digest() == hashlib.sha256().hexdigest()


def test_isin_keeps_the_shape() -> None:
    assert Ids([2, 5]).isin(torch.tensor([[1, 2], [5, 2]])).tolist() == [[False, True], [True, True]]
    assert Ids().isin(np.empty((0, 3))).shape == (0, 3)


def test_sample() -> None:
    ids = Ids.range(0, 100)
    first = ids.sample(10, torch.Generator().manual_seed(1))
    assert first == ids.sample(10, torch.Generator().manual_seed(1)) and len(first) == 10 and first <= ids
    assert first != ids.sample(10, torch.Generator().manual_seed(2))
    assert len(ids.sample(0, np.random.default_rng(0))) == 0
    with pytest.raises(BadInput, match="cannot draw"):
        ids.sample(101, torch.Generator())


def test_repr_is_short() -> None:
    assert repr(Ids.range(3, 1791)) == "Ids(1788: 3..1790)"
    assert repr(Ids([4])) == "Ids(1: 4)" and repr(Ids()) == "Ids(0)"
