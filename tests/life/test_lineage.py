"""Sets of ids: round trips, sharing, sizes, redaction."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from remanence.core.errors import BadInput, Corrupt
from remanence.core.ids import Ids
from remanence.life.ledger import Ledger
from remanence.life.lineage import HOLE, _expand, _punch, _runs_of, decode, encode


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.db") as opened:
        yield opened


runs = st.lists(st.tuples(st.integers(0, 400_000), st.integers(1, 70_000)), max_size=4)
points = st.lists(st.integers(0, 400_000), max_size=40)


@settings(max_examples=60, deadline=None)
@given(runs, points)
def test_encode_decode(some_runs: list[tuple[int, int]], some_points: list[int]) -> None:
    dense = Ids(some_points)
    for start, count in some_runs:
        dense |= Ids.range(start, start + count)
    blocks = encode(dense.array)
    back = [decode(data) + block * 2**16 for block, data in blocks]
    assert np.array_equal(np.concatenate([np.empty(0, np.int64), *back]), dense.array)
    assert [block for block, _ in blocks] == sorted({value >> 16 for value in dense.array.tolist()})
    assert all(len(data) <= 1 + min(8192, 2 * len(low)) for (_, data), low in zip(blocks, back, strict=True))


def test_each_form_is_chosen_where_it_is_smallest() -> None:
    draw = np.random.default_rng(0)
    forms = {
        b"r": np.arange(100, 60_000),
        b"a": np.sort(draw.choice(2**16, 500, replace=False)),
        b"b": np.sort(draw.choice(2**16, 30_000, replace=False)),
    }
    for form, low in forms.items():
        [(block, data)] = encode(low + 7 * 2**16)
        assert data[:1] == form and block == 7
        assert np.array_equal(decode(data), low)
    assert decode(encode(np.arange(2**16))[0][1]).sum() == 2**15 * (2**16 - 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-50, 50), max_size=60), st.lists(st.integers(0, 70), max_size=30))
def test_punching_holes(values: list[int], holes: list[int]) -> None:
    array = np.array(values, dtype=np.int64)
    if not len(array):
        return
    got = _punch(*_runs_of(array), np.unique(np.array(holes, dtype=np.int64)))
    flat = [
        HOLE if start == HOLE else start + at
        for start, count in zip(*map(np.ndarray.tolist, got), strict=True)
        for at in range(count)
    ]
    assert flat == [HOLE if at in holes else value for at, value in enumerate(values)]


def test_expand_is_the_inverse_of_runs() -> None:
    array = np.array([5, 6, 7, 1, 2, 9, -3])
    assert np.array_equal(_expand(*_runs_of(array)), array)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sets(st.one_of(st.integers(0, 300), st.integers(-(2**62), 2**62)), max_size=80), max_size=5))
def test_sets_come_back(tmp_path_factory: pytest.TempPathFactory, wanted: list[set[int]]) -> None:
    folder = tmp_path_factory.mktemp("lineage")
    with Ledger(folder / "ledger.db") as ledger:
        digests = [ledger.lineage.put(Ids(one)) for one in wanted]
    with Ledger(folder / "ledger.db", create=False) as ledger:
        for digest, one in zip(digests, wanted, strict=True):
            assert set(ledger.lineage.get(digest)) == one and ledger.lineage.count(digest) == len(one)
            for other in wanted:
                assert set(ledger.lineage.intersect(digest, Ids(other))) == one & other
        assert ledger.lineage.interner.size == len(set().union(*wanted))


def test_equal_sets_and_equal_blocks_are_stored_once(ledger: Ledger) -> None:
    big = Ids.range(1_000, 1_000 + 40 * 2**16)
    first = ledger.lineage.put(big)
    assert ledger.lineage.put(big) == first
    ledger.lineage.put(big - Ids([1_000]))
    with ledger.reading() as connection:
        assert connection.execute(text("select count(*) from sets")).scalar() == 2
        assert connection.execute(text("select count(*) from blocks")).scalar() == 2  # a full one and a nearly full one
        assert connection.execute(text("select sum(length(blocks)) from sets")).scalar() < 500
    assert ledger.lineage.interner.rows() == 1


def test_the_digest_knows_dense_numbers_only(tmp_path: Path) -> None:
    digests = set()
    for shift in (0, 10**9):
        with Ledger(tmp_path / f"{shift}.db") as ledger:
            everything = ledger.lineage.put(Ids.range(shift, shift + 100))
            digests.add((everything, ledger.lineage.put(Ids(range(shift + 3, shift + 50, 4)))))
    assert len(digests) == 1


def test_redacted_ids_are_gone_and_the_sets_stay(ledger: Ledger, tmp_path: Path) -> None:
    some, others = Ids.range(0, 100), Ids([5, 7, 2**40, 2**41])
    a, b = ledger.lineage.put(some), ledger.lineage.put(others)
    ledger.lineage.redact(Ids([7, 8, 2**40, 10**15]))
    for _ in range(2):
        assert ledger.lineage.get(a) == some - Ids([7, 8]) and ledger.lineage.count(a) == 100
        assert ledger.lineage.get(b) == Ids([5, 2**41])
        assert not ledger.lineage.intersect(a, Ids([7]))
        ledger.lineage.reset()
    again = ledger.lineage.put(Ids([7]))
    assert ledger.lineage.interner.dense(Ids([7])).tolist() == [102]
    assert ledger.lineage.get(again) == Ids([7]) and 7 not in ledger.lineage.get(a)
    ledger.lineage.redact(Ids.range(0, 100) | others)
    assert not ledger.lineage.get(a) and not ledger.lineage.get(b)


def test_a_redacted_id_is_in_no_byte(ledger: Ledger, tmp_path: Path) -> None:
    secret = 0x0123456789ABCDEF
    ledger.lineage.put(Ids([3, secret, 2**62]))
    pattern = secret.to_bytes(8, "little")
    assert any(pattern in path.read_bytes() for path in tmp_path.iterdir())
    ledger.lineage.redact(Ids([secret]))
    ledger.scrub()
    assert not any(pattern in path.read_bytes() for path in tmp_path.iterdir())


def test_a_rollback_takes_the_numbers_back(ledger: Ledger) -> None:
    ledger.lineage.put(Ids([1, 2]))
    with pytest.raises(RuntimeError), ledger.begin():
        ledger.lineage.put(Ids([3, 4, 5]))
        raise RuntimeError
    assert ledger.lineage.interner.size == 2
    ledger.lineage.put(Ids([9]))
    assert ledger.lineage.interner.dense(Ids([1, 2, 3, 9])).tolist() == [0, 1, -1, 2]


def test_drop_keeps_what_is_named(ledger: Ledger) -> None:
    a, b = ledger.lineage.put(Ids.range(0, 10)), ledger.lineage.put(Ids([3, 7]))
    ledger.lineage.drop({b})
    assert ledger.lineage.get(b) == Ids([3, 7])
    with pytest.raises(BadInput, match="no set"):
        ledger.lineage.get(a)


@pytest.mark.parametrize(
    "change",
    [
        "update blocks set data = x'72ffffffff'",
        "delete from blocks",
        "update sets set n = 4",
        "update private_ids set data = x'00000000000000000000000000000000'",
        "delete from private_ids",
    ],
)
def test_what_was_altered_is_named(ledger: Ledger, change: str) -> None:
    digest = ledger.lineage.put(Ids([1, 5, 9]))
    with ledger.writing() as connection:
        connection.execute(text(change))
    ledger.lineage.reset()
    with pytest.raises(Corrupt, match="ledger"):
        ledger.lineage.get(digest)


def test_reserved_ids_are_refused(ledger: Ledger) -> None:
    for bad in (HOLE, HOLE + 1, 2**63 - 1):
        with pytest.raises(BadInput, match="reserved"):
            ledger.lineage.put(Ids([bad]))


def test_ten_million_ids_stay_small(ledger: Ledger, tmp_path: Path) -> None:
    everything = Ids.range(0, 10**7)
    digest = ledger.lineage.put(everything)
    for event in range(20):
        with ledger.begin() as tx:
            new = ledger.lineage.put(Ids.range(event * 500_000, (event + 1) * 500_000))
            tx.append("learned", {"new": new, "replayed": digest})
    ledger.scrub()
    assert (tmp_path / "ledger.db").stat().st_size < 300_000
    assert ledger.lineage.get(digest) == everything
