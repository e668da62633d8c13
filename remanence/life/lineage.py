"""Sets of ids in little room: which examples each event of a life consumed.

An external id (a row number, a patient number) is first *interned*: it gets a dense number 0, 1, 2, ... in order of
first sight. The table `private_ids` is the only place that maps one
to the other; once an id is redacted there, its dense number means nothing any more. A set is stored as dense numbers in
blocks of 2^16; a block is a list of runs, an array or a bitmap, whichever is smallest, and lies once in
the table `blocks` under its sha256, however many sets share it. A set's digest depends on dense numbers alone, so it
may stand in the chain.

Sizes: a run of any length costs some bytes; scattered ids cost at most 8 KiB per block of 65,536, two bytes each where
they are few. The mapping costs 16 bytes per run, at most 8 per id.

Redaction has a limit that follows from its purpose: the ids that stay are stored in order, and so bound those removed
between them. Where nothing else is left to protect, redact all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    delete,
    insert,
    select,
    update,
)

from remanence.core.errors import BadInput, Corrupt
from remanence.core.ids import Ids
from remanence.life.files import canonical

__all__ = ["HOLE", "Database", "Interner", "Lineage", "decode", "encode", "metadata"]

Array = NDArray[np.int64]
Runs = tuple[Array, Array]  # (starts, counts)

HOLE = int(np.iinfo(np.int64).min)
"""Stands where a redacted id stood; no id may have this value."""

_BITS = 16
_BLOCK = 1 << _BITS
_RUNS_PER_ROW = 1 << 16
_PIECE = 1 << 22  # ids handled at a time, so that temporaries stay small beside the ids themselves

metadata = MetaData()
private_ids = Table(
    "private_ids",
    metadata,
    Column("life", String(64), primary_key=True),
    Column("first", BigInteger, primary_key=True, autoincrement=False),  # the dense number of the row's first id
    Column("count", BigInteger, nullable=False),
    Column(
        "form", String(8), nullable=False
    ),  # runs: (start, count) pairs; array: ids. Little-endian int64, in dense order
    Column("data", LargeBinary, nullable=False),
    Column("checksum", String(64), nullable=False),
)
blocks = Table(
    "blocks",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("data", LargeBinary, nullable=False),
)
sets = Table(
    "sets",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("n", BigInteger, nullable=False),
    Column("blocks", Text, nullable=False),  # JSON: [[first block number, how many in a row, digest], ...]
)


class Database(Protocol):
    """What lineage needs of a ledger."""

    life: str

    def reading(self) -> AbstractContextManager[Connection]:
        """A connection; the open transaction's, if there is one."""

    def writing(self) -> AbstractContextManager[Connection]:
        """The open transaction's connection, or a transaction of its own."""


# -- blocks of dense numbers -------------------------------------------------------------------------------------------
# -----------------------------


def encode(dense: Array) -> list[tuple[int, bytes]]:
    """Dense numbers (n,), ascending and unique, as [(block number, bytes)], blocks of 2^16, in order; the bytes do not
    name the block, so equal patterns are equal bytes.

    Form by the first byte: ``r`` runs as pairs (start, length - 1), ``a`` a sorted array, ``b`` a bitmap; little-endian
    uint16; the shortest wins, in this order.
    """
    out = []
    at = 0
    while at < len(dense):
        block = int(dense[at]) >> _BITS
        end = at + int(np.searchsorted(dense[at : at + _BLOCK], (block + 1) << _BITS))
        out.append((block, _encode_block(dense[at:end] & (_BLOCK - 1))))
        at = end
    return out


def _encode_block(low: Array) -> bytes:
    starts, counts = _runs_of(low)
    if len(starts) * 4 <= min(len(low) * 2, _BLOCK // 8):
        return b"r" + np.stack([starts, counts - 1], axis=1).astype("<u2").tobytes()
    if len(low) * 2 <= _BLOCK // 8:
        return b"a" + low.astype("<u2").tobytes()
    mask = np.zeros(_BLOCK, dtype=bool)
    mask[low] = True
    return b"b" + np.packbits(mask, bitorder="little").tobytes()


def decode(data: bytes) -> Array:
    """The low 16 bits, ascending, of a block written by `encode`."""
    form, body = data[:1], data[1:]
    if form == b"r":
        pairs = np.frombuffer(body, dtype="<u2").reshape(-1, 2).astype(np.int64)
        return _expand(pairs[:, 0], pairs[:, 1] + 1)
    if form == b"a":
        return np.frombuffer(body, dtype="<u2").astype(np.int64)
    if form == b"b":
        return np.flatnonzero(np.unpackbits(np.frombuffer(body, dtype=np.uint8), bitorder="little")).astype(np.int64)
    raise Corrupt("a block of ids in the ledger is in no known form; restore ledger.db from a copy")


def _runs_of(values: Array) -> Runs:
    """Splits values into runs in which each is one more than the last.

    (starts, counts). A HOLE never continues a run of ids.
    """
    if not len(values):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    cuts = np.flatnonzero(values[1:] != values[:-1] + 1) + 1
    first = np.concatenate([[0], cuts])
    return values[first], np.diff(np.concatenate([first, [len(values)]]))


def _runs_in_pieces(values: Array) -> Runs:
    """As `_runs_of` for any number of values, with temporaries of a piece's size."""
    if len(values) <= _PIECE:
        return _runs_of(values)
    parts = [_runs_of(values[at : at + _PIECE]) for at in range(0, len(values), _PIECE)]
    starts, counts = (np.concatenate(side) for side in zip(*parts, strict=True))
    new = np.ones(len(starts), dtype=bool)
    new[1:] = starts[1:] != starts[:-1] + counts[:-1]  # a run that a piece's edge cut in two is one again
    first = np.flatnonzero(new)
    return starts[first], np.add.reduceat(counts, first)


def _expand(starts: Array, counts: Array) -> Array:
    """The values of the runs, in their order."""
    if len(starts) == 1:
        return np.arange(int(starts[0]), int(starts[0]) + int(counts[0]), dtype=np.int64)
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()), dtype=np.int64)


# -- external id <-> dense number
# -------------------------------------------------------------------------------------------------------------------


class Interner:
    """External ids as dense numbers, in the table `private_ids`; loaded once, kept as arrays of runs.

    Args:
        db: the ledger.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._loaded = False
        self._take(np.empty(0, np.int64), np.empty(0, np.int64))

    def reset(self) -> None:
        """Forgets what was loaded (a transaction was rolled back)."""
        self._loaded = False

    @property
    def size(self) -> int:
        """How many dense numbers were given out, the redacted ones included."""
        self._load()
        return self._size

    def known(self, ids: Ids) -> Ids:
        """Those of the ids that have a dense number."""
        return Ids._from_sorted(ids.array[self.dense(ids) >= 0])

    def dense(self, ids: Ids, *, add: bool = False) -> Array:
        """Dense numbers (n,) in the order of `ids`; -1 for an unknown id, or with `add` a new number, given in
        ascending order of the ids.

        Raises:
            BadInput: one of the ids -2^63, -2^63 + 1 and 2^63 - 1, which are reserved.
        """
        values = ids.array
        if len(values) and (
            int(values[0]) <= HOLE + 1 or int(values[-1]) == -(HOLE + 1)
        ):  # a run beside a HOLE could not be told from it
            raise BadInput(f"the ids {HOLE}, {HOLE + 1} and {-(HOLE + 1)} are reserved; use any other int64 number")
        self._load()
        out = np.empty(len(values), dtype=np.int64)
        for at in range(0, len(values), _PIECE):
            self._lookup(values[at : at + _PIECE], out[at : at + _PIECE])
        if add:
            fresh = out < 0
            missing = int(np.count_nonzero(fresh))
            if missing:
                out[fresh] = np.arange(self._size, self._size + missing, dtype=np.int64)
                self._add(values if missing == len(values) else values[fresh])
        return out

    def external(self, dense: Array) -> Array:
        """The ids (n,) behind dense numbers.

        HOLE where the id was redacted. Raises Corrupt for a number that was never given out.
        """
        self._load()
        out = np.empty(len(dense), dtype=np.int64)
        if len(dense) and (int(dense.max()) >= self._size or int(dense.min()) < 0):
            raise Corrupt(
                "the ledger names an example number that its table of ids does not have; restore ledger.db from a copy"
            )
        for at in range(0, len(dense), _PIECE):
            piece = dense[at : at + _PIECE]
            run = np.searchsorted(self._dense, piece, side="right") - 1
            start = self._starts[run]
            out[at : at + _PIECE] = np.where(start == HOLE, HOLE, start + (piece - self._dense[run]))
        return out

    def redact(self, ids: Ids) -> None:
        """Removes the ids from the table for good (after the ledger's `scrub` from its free pages too).

        Their dense numbers stay, empty. Unknown ids are skipped.
        """
        holes = np.sort(self.dense(self.known(ids)))
        if not len(holes):
            return
        with self._db.writing() as connection:
            firsts = np.array(
                [
                    row.first
                    for row in connection.execute(
                        select(private_ids.c.first).where(self._mine).order_by(private_ids.c.first)
                    )
                ],
                dtype=np.int64,
            )
            for at in np.unique(np.searchsorted(firsts, holes, side="right") - 1).tolist():
                first = int(firsts[at])
                row = connection.execute(select(private_ids).where(self._mine, private_ids.c.first == first)).one()
                starts, counts = _punch(*_read_row(row), holes - first)
                connection.execute(
                    update(private_ids)
                    .where(self._mine, private_ids.c.first == first)
                    .values(**_row(first, starts, counts))
                )
        self.reset()

    def rows(self) -> int:
        """How many rows the table has for this life."""
        with self._db.reading() as connection:
            return len(connection.execute(select(private_ids.c.first).where(self._mine)).all())

    @property
    def _mine(self) -> Any:
        return private_ids.c.life == self._db.life

    def _load(self) -> None:
        if self._loaded:
            return
        parts: list[Runs] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        size = 0
        with self._db.reading() as connection:
            for row in connection.execute(select(private_ids).where(self._mine).order_by(private_ids.c.first)):
                starts, counts = _read_row(row)
                if row.first != size:
                    raise Corrupt("rows are missing from the ledger's table of ids; restore ledger.db from a copy")
                size += int(counts.sum())
                parts.append((starts, counts))
        self._take(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))
        self._loaded = True

    def _take(self, starts: Array, counts: Array) -> None:
        """Sets the runs, in dense order."""
        self._starts, self._counts = starts, counts
        self._dense = np.cumsum(counts) - counts
        self._size = int(counts.sum())
        self._order = np.argsort(starts, kind="stable")
        self._order = self._order[starts[self._order] != HOLE]
        self._by_external = starts[self._order]

    def _lookup(self, values: Array, out: Array) -> None:
        if not len(self._order):
            out[:] = -1
            return
        at = np.searchsorted(self._by_external, values, side="right") - 1
        run = self._order[np.maximum(at, 0)]
        offset = values - self._by_external[np.maximum(at, 0)]
        found = (at >= 0) & (offset >= 0) & (offset < self._counts[run])
        out[:] = np.where(found, self._dense[run] + offset, -1)

    def _add(self, values: Array) -> None:
        starts, counts = _runs_in_pieces(values)
        first = self._size
        with self._db.writing() as connection:
            for at in range(0, len(starts), _RUNS_PER_ROW):
                piece = starts[at : at + _RUNS_PER_ROW], counts[at : at + _RUNS_PER_ROW]
                connection.execute(insert(private_ids).values(life=self._db.life, first=first, **_row(first, *piece)))
                first += int(piece[1].sum())
        self._take(np.concatenate([self._starts, starts]), np.concatenate([self._counts, counts]))


def _row(first: int, starts: Array, counts: Array) -> dict[str, Any]:
    total = int(counts.sum())
    if total < 2 * len(starts) and not bool(np.any((starts == HOLE) & (counts > 1))):
        form, data = "array", _expand(starts, counts).astype("<i8").tobytes()
    else:
        form, data = "runs", np.stack([starts, counts], axis=1).astype("<i8").tobytes()
    return {"count": total, "form": form, "data": data, "checksum": _checksum(first, total, form, data)}


def _checksum(first: int, count: int, form: str, data: bytes) -> str:
    return hashlib.sha256(f"{first} {count} {form} ".encode() + data).hexdigest()


def _read_row(row: Any) -> Runs:
    count = row._mapping["count"]  # row.count is a method of tuples
    if not isinstance(row.data, bytes) or _checksum(row.first, count, row.form, row.data) != row.checksum:
        raise Corrupt(f"row {row.first} of the ledger's table of ids was altered; restore ledger.db from a copy")
    numbers = np.frombuffer(row.data, dtype="<i8").astype(np.int64)
    if row.form == "array":
        return _runs_of(numbers)
    return numbers.reshape(-1, 2)[:, 0].copy(), numbers.reshape(-1, 2)[:, 1].copy()


def _punch(starts: Array, counts: Array, holes: Array) -> Runs:
    """Runs with the places `holes` (counted from the first run's start.

    Others are ignored) turned into HOLE, neighbouring holes joined.
    """
    total = int(counts.sum())
    holes = holes[(holes >= 0) & (holes < total)]
    before = np.cumsum(counts) - counts
    edges = np.unique(np.concatenate([before, holes, holes + 1, [total]]))
    pieces = edges[:-1]
    run = np.searchsorted(before, pieces, side="right") - 1
    new = np.where(starts[run] == HOLE, HOLE, starts[run] + (pieces - before[run]))
    new[np.isin(pieces, holes)] = HOLE
    keep = np.ones(len(pieces), dtype=bool)
    keep[1:] = (new[1:] != HOLE) | (new[:-1] != HOLE)
    first = np.flatnonzero(keep)
    return new[first], np.add.reduceat(np.diff(edges), first)


# -- sets --------------------------------------------------------------------------------------------------------------
# -----------------------------


class Lineage:
    """Stores and reads sets of ids of one life. Writes join the ledger's open transaction, or make one of their own.

    Args:
        db: the ledger.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self.interner = Interner(db)

    def reset(self) -> None:
        """Forgets what was loaded (a transaction was rolled back)."""
        self.interner.reset()

    def put(self, ids: Ids) -> str:
        """Stores a set and returns its digest (sha256, hex), which depends on dense numbers alone.

        A set that is stored already costs nothing.
        """
        dense = self.interner.dense(ids, add=True)
        dense.sort(kind="stable")  # linear where it is sorted already, as it is for new ids
        listing: list[list[Any]] = []
        data: dict[str, bytes] = {}
        for block, content in encode(dense):
            digest = hashlib.sha256(content).hexdigest()
            data.setdefault(digest, content)
            if listing and listing[-1][2] == digest and listing[-1][0] + listing[-1][1] == block:
                listing[-1][1] += 1
            else:
                listing.append([block, 1, digest])
        text = canonical(listing)
        digest = _set_digest(len(ids), text)
        with self._db.writing() as connection:
            if connection.execute(select(sets.c.digest).where(sets.c.digest == digest)).first() is None:
                wanted = list(data)
                for at in range(0, len(wanted), 500):
                    chunk = wanted[at : at + 500]
                    there = {
                        row.digest
                        for row in connection.execute(select(blocks.c.digest).where(blocks.c.digest.in_(chunk)))
                    }
                    new = [{"digest": d, "data": data[d]} for d in chunk if d not in there]
                    if new:
                        connection.execute(insert(blocks), new)
                connection.execute(insert(sets).values(digest=digest, n=len(ids), blocks=text))
        return digest

    def count(self, digest: str) -> int:
        """How many ids the set has, the redacted ones included."""
        with self._db.reading() as connection:
            return self._listing(connection, digest)[0]

    def get(self, digest: str) -> Ids:
        """The set's ids; those redacted since are left out.

        Raises:
            BadInput: no such set.
            Corrupt: the set or one of its blocks was altered.
        """
        with self._db.reading() as connection:
            n, listing = self._listing(connection, digest)
            dense = np.empty(n, dtype=np.int64)
            at = 0
            for block, low in self._decoded(connection, listing):
                dense[at : at + len(low)] = low + (block << _BITS)
                at += len(low)
        if at != n:
            raise Corrupt(f"the set {digest[:12]} in the ledger has {at} of {n} ids; restore ledger.db from a copy")
        return self._external(dense)

    def intersect(self, digest: str, ids: Ids) -> Ids:
        """The ids that are in the stored set; reads only the blocks they could lie in."""
        dense = self.interner.dense(ids)
        dense = np.sort(dense[dense >= 0])
        wanted = set(np.unique(dense >> _BITS).tolist())
        found = [np.empty(0, np.int64)]
        with self._db.reading() as connection:
            _, listing = self._listing(connection, digest)
            near = []
            for first, repeat, content in listing:
                near += [
                    [block, 1, content]
                    for block in (range(first, first + repeat) if repeat <= len(wanted) else sorted(wanted))
                    if block in wanted and first <= block < first + repeat
                ]
            for block, low in self._decoded(connection, near):
                mine = dense[np.searchsorted(dense, block << _BITS) : np.searchsorted(dense, (block + 1) << _BITS)]
                found.append(mine[np.isin(mine & (_BLOCK - 1), low)])
        return self._external(np.concatenate(found))

    def redact(self, ids: Ids) -> None:
        """Forgets the ids themselves; the sets keep their digests and counts. Follow with the ledger's `scrub`."""
        self.interner.redact(ids)

    def drop(self, life_sets: set[str]) -> None:
        """Deletes every stored set that is not named, and the blocks that no set uses any more."""
        with self._db.writing() as connection:
            used: set[str] = set()
            for row in connection.execute(select(sets)).all():
                if row.digest in life_sets:
                    used |= {content for _, _, content in json.loads(row.blocks)}
                else:
                    connection.execute(delete(sets).where(sets.c.digest == row.digest))
            for (digest,) in connection.execute(select(blocks.c.digest)).all():
                if digest not in used:
                    connection.execute(delete(blocks).where(blocks.c.digest == digest))

    def _external(self, dense: Array) -> Ids:
        external = self.interner.external(dense)
        return Ids(external if not bool(np.any(external == HOLE)) else external[external != HOLE])

    def _listing(self, connection: Connection, digest: str) -> tuple[int, list[list[Any]]]:
        row = connection.execute(select(sets).where(sets.c.digest == digest)).first()
        if row is None:
            raise BadInput(f"the ledger has no set of ids {digest[:12]}")
        if _set_digest(row.n, row.blocks) != digest:
            raise Corrupt(f"the set of ids {digest[:12]} in the ledger was altered; restore ledger.db from a copy")
        return int(row.n), json.loads(row.blocks)

    def _decoded(self, connection: Connection, listing: list[list[Any]]) -> Iterator[tuple[int, Array]]:
        for at in range(0, len(listing), 200):
            part = listing[at : at + 200]
            names = {content for _, _, content in part}
            data = {
                row.digest: row.data for row in connection.execute(select(blocks).where(blocks.c.digest.in_(names)))
            }
            for first, repeat, content in part:
                found = data.get(content)
                if not isinstance(found, bytes) or hashlib.sha256(found).hexdigest() != content:
                    raise Corrupt(
                        f"the block of ids {content[:12]} in the ledger is missing or altered; restore "
                        "ledger.db from a copy"
                    )
                low = decode(found)
                for block in range(first, first + repeat):
                    yield block, low


def _set_digest(n: int, text: str) -> str:
    return hashlib.sha256(f"remanence set 1 {n} {text}".encode()).hexdigest()
