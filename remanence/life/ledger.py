"""The ledger of a life: an append-only chain of rows, and beside it what may change or must be removable.

    rows      the chain. hash = sha256 of (life, seq, kind, prev_hash, body, extra); `body` is what an equal run repeats
        in every bit, `extra` what may differ (times, peak bytes,
              salts, commitments, signatures, attempts). Rows are never changed or removed.
    private   request texts, salts, ids: removable without breaking the chain, which holds salted commitments only
    current   what is true now (the current snapshot, erasures still owed); written in the transaction of the row that
        made it true
    private_ids, blocks, sets    which examples each event consumed (`remanence.life.lineage`)

SQLite by default; another database is another URL. What is particular to SQLite stands in `_Sqlite` alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    ForeignKey,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import OperationalError as SqlOperationalError

from remanence.core.errors import BadInput, Corrupt, Locked, RemanenceError, StorageError
from remanence.core.ids import Ids
from remanence.life.files import canonical
from remanence.life.lineage import Lineage, metadata

__all__ = ["NOT_CONTENT", "Ledger", "Row", "Transaction", "commit"]

NOT_CONTENT: Final = frozenset({"attempt", "failed", "refused", "receipt-copy"})
"""Kinds of rows that two equal lives may have in different number; `Ledger.content_digest` leaves them out."""

_GENESIS = "0" * 64
_HEAD = "chain head"  # in `current`: how long the chain is, so that a lost tail is noticed
_RESTORE = "nothing was changed; restore ledger.db (with its -wal file) from a copy"

lives = Table(
    "lives", metadata, Column("life", String(64), primary_key=True), Column("format", String(16), nullable=False)
)
rows = Table(
    "rows",
    metadata,
    Column("life", String(64), ForeignKey("lives.life"), primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", String(64), nullable=False),
    Column("prev_hash", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("body", Text, nullable=False),
    Column("extra", Text, nullable=False),
    UniqueConstraint("life", "prev_hash"),  # a chain that forks is an error
)
private = Table(
    "private",
    metadata,
    Column("life", String(64), ForeignKey("lives.life"), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("value", Text, nullable=False),
    Column("checksum", String(64), nullable=False),
)
current = Table(
    "current",
    metadata,
    Column("life", String(64), ForeignKey("lives.life"), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("value", Text, nullable=False),
    Column("checksum", String(64), nullable=False),
)


@dataclass(frozen=True)
class Row:
    """One row of the chain; `body` and `extra` are JSON objects."""

    seq: int
    kind: str
    body: dict[str, Any]
    extra: dict[str, Any]
    hash: str
    prev_hash: str


def commit(ids: Ids, salt: bytes) -> str:
    """A commitment to ids: sha256 (hex) of the salt and the ids as little-endian int64.

    Without the salt it tells nothing; delete the salt and it never will.
    """
    return hashlib.sha256(salt + ids.array.astype("<i8", copy=False).tobytes()).hexdigest()


class Transaction:
    """One write transaction, made by `Ledger.begin`; everything in it happens together or not at all."""

    def __init__(self, ledger: Ledger, connection: Connection) -> None:
        self._ledger = ledger
        self.connection = connection

    def append(self, kind: str, body: dict[str, Any], extra: dict[str, Any] | None = None) -> Row:
        """Adds a row to the chain.

        Args:
            kind: what happened, in a word (``asked``, ``learned``, ``failed``, ...).
            body: what an equal run repeats in every bit; JSON.
            extra: what may differ between equal runs; JSON.

        Raises:
            BadInput: something that is not JSON (NaN included).
            Corrupt: another writer appended to the same place; the transaction is undone.
        """
        if not kind or len(kind) > 64:
            raise BadInput(f"a row's kind is a word of 1 to 64 letters, not {kind!r}")
        last = self._ledger._head(self.connection)
        seq, previous = (0, _GENESIS) if last is None else (last[0] + 1, last[1])
        texts = canonical(body), canonical(extra or {})
        digest = _row_hash(self._ledger.life, seq, kind, previous, *texts)
        self.connection.execute(
            insert(rows).values(
                life=self._ledger.life,
                seq=seq,
                kind=kind,
                prev_hash=previous,
                hash=digest,
                body=texts[0],
                extra=texts[1],
            )
        )
        self._put(current, _HEAD, {"seq": seq, "hash": digest})
        return Row(seq, kind, json.loads(texts[0]), json.loads(texts[1]), digest, previous)

    def last(self) -> Row | None:
        """The newest row, this transaction's included."""
        return self._ledger.last()

    def set_current(self, key: str, value: Any) -> None:
        """Sets what is true now; any JSON value, None included."""
        self._put(current, key, value)

    def get_current(self, key: str, default: Any = None) -> Any:
        """See `Ledger.get_current`."""
        return self._ledger.get_current(key, default)

    def put_private(self, key: str, value: Any) -> None:
        """Stores a JSON value that can be removed later without a trace in the chain."""
        self._put(private, key, value)

    def get_private(self, key: str, default: Any = None) -> Any:
        """See `Ledger.get_private`."""
        return self._ledger.get_private(key, default)

    def delete_private(self, key: str) -> bool:
        """Removes a private value; True if it was there. Its bytes are gone from all files after `Ledger.scrub`."""
        return bool(
            self.connection.execute(
                delete(private).where(private.c.life == self._ledger.life, private.c.key == key)
            ).rowcount
        )

    def _put(self, table: Table, key: str, value: Any) -> None:
        text = canonical(value)
        values = {"value": text, "checksum": _value_checksum(self._ledger.life, key, text)}
        mine = (table.c.life == self._ledger.life) & (table.c.key == key)
        if not self.connection.execute(update(table).where(mine).values(**values)).rowcount:
            self.connection.execute(insert(table).values(life=self._ledger.life, key=key, **values))


class Ledger:
    """Opens the ledger of one life.

    Args:
        url: a database URL (``sqlite:////absolute/ledger.db``, ``postgresql://...``), or the path of a SQLite file.
        life: the life's name in a ledger shared by many; default: the only one there, or a new random name in a new
            ledger.
        create: False refuses to make a new ledger, so that a lost file is not taken for a life without events.
        read_only: opens without writing anything, also from a read-only folder (SQLite).
        check: read the whole chain and let the database check its pages (recommended; linear in the ledger's size).

    Raises:
        Corrupt: the file is no database, is truncated or was altered; nothing is changed.
        StorageError: full, read-only or failing disk, or no such file.
        Locked: another process keeps the database busy.

    Attributes:
        life: the name, in every row's hash.
        lineage: the sets of ids (`Lineage`).
    """

    def __init__(
        self,
        url: str | Path,
        life: str | None = None,
        *,
        create: bool = True,
        read_only: bool = False,
        check: bool = True,
    ) -> None:
        text = str(url)
        self.url = text if "://" in text else f"sqlite:///{Path(text).resolve()}"
        self._transaction: Connection | None = None
        self.life = life or ""
        self.lineage = Lineage(self)
        try:
            parsed = make_url(self.url)
            sqlite = parsed.get_backend_name() == "sqlite"
            self._sqlite = _Sqlite(parsed.database or "", read_only) if sqlite else None
            self.name = self._sqlite.name if self._sqlite else parsed.render_as_string(hide_password=True)
            if self._sqlite:
                self._sqlite.before(create=create and not read_only)
            self._engine = self._sqlite.engine() if self._sqlite else create_engine(self.url)
        except RemanenceError:
            raise
        except (
            ArgumentError,
            ImportError,
            ValueError,
        ) as error:  # the URL itself may hold a password, so it is not shown
            raise BadInput(f"no usable database URL ({error}); for example sqlite:////folder/ledger.db") from None
        try:
            self._open(life, create and not read_only, check)
        except BaseException:
            self._engine.dispose()
            raise

    def _open(self, life: str | None, create: bool, check: bool) -> None:
        with self._errors():
            there = set(inspect(self._engine).get_table_names())
            wanted = set(metadata.tables)
            if there and not wanted <= there:
                raise Corrupt(
                    f"{self.name} lacks the tables {', '.join(sorted(wanted - there))}: not a ledger, or "
                    f"altered; {_RESTORE}"
                )
            if not there and not create:
                raise Corrupt(f"{self.name} is empty; {_RESTORE}")
            if self._sqlite and there and check:
                with self._engine.connect() as connection:
                    self._sqlite.check(connection)
            if not there:
                with self.writing() as connection:
                    metadata.create_all(connection)
            with self.reading() as connection:
                names = [
                    row.life
                    for row in connection.execute(
                        select(lives.c.life).order_by(lives.c.life).limit(2 if life is None else None)
                    ).all()
                ]
                if there and not names and connection.execute(select(rows.c.seq).limit(1)).first():
                    raise Corrupt(f"{self.name} has rows of no life; {_RESTORE}")
            if life is None and len(names) > 1:
                raise BadInput(f"{self.name} holds several lives; name one with life=")
            self.life = life or (names[0] if names else secrets.token_hex(8))
            if self.life not in names:
                if not create:
                    raise Corrupt(f"{self.name} has no life {self.life!r}; {_RESTORE}")
                with self.writing() as connection:
                    connection.execute(insert(lives).values(life=self.life, format="1"))
        if check and there:
            self.verify_chain()

    # -- transactions --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def begin(self) -> Iterator[Transaction]:
        """One write transaction: ``with ledger.begin() as tx: tx.append(...)``. An exception inside undoes all of it.
        Not re-entrant.

        Raises:
            BadInput: a transaction is open already.
            StorageError, Locked, Corrupt: as for `Ledger`; nothing was written.
        """
        if self._transaction is not None:
            raise BadInput("a transaction of this ledger is open already")
        with self.writing() as connection:
            yield Transaction(self, connection)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """The open transaction's connection, or a transaction of its own."""
        if self._transaction is not None:
            yield self._transaction
            return
        try:
            with self._errors(), self._engine.connect() as plain:
                connection = plain.execution_options(remanence_writes=True)
                with connection.begin():
                    self._transaction = connection
                    yield connection
        except BaseException:
            self.lineage.reset()
            raise
        finally:
            self._transaction = None

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for reading; the open transaction's, if there is one."""
        if self._transaction is not None:
            yield self._transaction
            return
        with self._errors(), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns what the database says into plain errors of ours."""
        try:
            yield
        except IntegrityError as error:
            raise Corrupt(
                f"another writer wrote to the same place of {self.name}; this transaction was undone; open "
                "the life again and retry"
            ) from error
        except DBAPIError as error:
            raise _plain_error(error, self.name) from error
        except SQLAlchemyError as error:
            raise StorageError(f"{self.name}: {error}") from error
        except UnicodeDecodeError as error:
            raise Corrupt(f"{self.name} holds text that is no text; {_RESTORE}") from error

    # -- reading -------------------------------------------------------------------------------------------------------

    def rows(self, kind: str | Iterable[str] | None = None) -> list[Row]:
        """The rows in order, all or those of one or several kinds.

        Raises:
            Corrupt: a row read does not match its hash.
        """
        query = select(rows).where(rows.c.life == self.life).order_by(rows.c.seq)
        if kind is not None:
            query = query.where(rows.c.kind.in_([kind] if isinstance(kind, str) else list(kind)))
        with self.reading() as connection:
            return [self._row(record) for record in connection.execute(query)]

    def last(self, kind: str | None = None) -> Row | None:
        """The newest row (of a kind), or None."""
        query = select(rows).where(rows.c.life == self.life).order_by(rows.c.seq.desc()).limit(1)
        if kind is not None:
            query = query.where(rows.c.kind == kind)
        with self.reading() as connection:
            record = connection.execute(query).first()
        return None if record is None else self._row(record)

    def __len__(self) -> int:
        head = self._read_head()
        return 0 if head is None else head[0] + 1

    def get_current(self, key: str, default: Any = None) -> Any:
        """What is true now under `key`, or `default`."""
        return self._get(current, key, default)

    def get_private(self, key: str, default: Any = None) -> Any:
        """The private value under `key`, or `default` if there is none (any more)."""
        return self._get(private, key, default)

    def private_keys(self, prefix: str = "") -> list[str]:
        """The keys of the private values that begin with `prefix`, sorted."""
        with self.reading() as connection:
            found = connection.execute(select(private.c.key).where(private.c.life == self.life).order_by(private.c.key))
            return [row.key for row in found if row.key.startswith(prefix)]

    def verify_chain(self) -> int:
        """Reads every row and checks number, link and hash; returns how many there are.

        Raises:
            Corrupt: names the first row that does not fit, and what to do.
        """
        seq, previous = 0, _GENESIS
        with self.reading() as connection:
            for record in connection.execute(select(rows).where(rows.c.life == self.life).order_by(rows.c.seq)):
                if record.seq != seq:
                    raise Corrupt(f"row {seq} is missing from {self.name}; {_RESTORE}")
                if record.prev_hash != previous:
                    raise Corrupt(
                        f"row {seq} of {self.name} does not follow from row {seq - 1}: one of them was "
                        f"altered; {_RESTORE}"
                    )
                self._row(record)
                seq, previous = seq + 1, record.hash
            head = self._head(connection)
            if head != ((seq - 1, previous) if seq else None):
                raise Corrupt(
                    f"{self.name} ends at row {seq - 1}, but its last known row is "
                    f"{None if head is None else head[0]}: its tail was cut or altered; {_RESTORE}"
                )
            for table in (current, private):
                for record in connection.execute(select(table).where(table.c.life == self.life)):
                    self._value(table, record)
        return seq

    def content_digest(self) -> str:
        """sha256 (hex) over kind and body of all rows, except those of `NOT_CONTENT`: equal for equal lives."""
        digest = hashlib.sha256()
        for row in self.rows():
            if row.kind not in NOT_CONTENT:
                digest.update(canonical([row.kind, row.body]).encode() + b"\n")
        return digest.hexdigest()

    # -- erasing -------------------------------------------------------------------------------------------------------

    def scrub(self) -> None:
        """After private values or ids were removed: nothing of them stays in free pages or in the write-ahead log.
        Idempotent; not inside a transaction.

        On another database than SQLite this is left to its own vacuum, and archives and replicas are not reached.

        Raises:
            Locked: another process is reading the ledger, so the log could not be emptied; try again.
        """
        if self._transaction is not None:
            raise BadInput("scrub() works after the transaction has ended, not in it")
        if self._sqlite:
            with self._errors():
                self._sqlite.scrub(self._engine)

    def close(self) -> None:
        """Closes the database; harmless when done twice."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- within --------------------------------------------------------------------------------------------------------

    def _row(self, record: Any) -> Row:
        fields = (record.life, record.seq, record.kind, record.prev_hash, record.body, record.extra)
        if (
            not all(isinstance(field, str) for field in (record.kind, record.body, record.extra, record.prev_hash))
            or _row_hash(*fields) != record.hash
        ):
            raise Corrupt(f"row {record.seq} of {self.name} was altered after it was written; {_RESTORE}")
        return Row(
            record.seq, record.kind, json.loads(record.body), json.loads(record.extra), record.hash, record.prev_hash
        )

    def _get(self, table: Table, key: str, default: Any) -> Any:
        with self.reading() as connection:
            record = connection.execute(select(table).where(table.c.life == self.life, table.c.key == key)).first()
        return default if record is None else self._value(table, record)

    def _value(self, table: Table, record: Any) -> Any:
        if not isinstance(record.value, str) or _value_checksum(self.life, record.key, record.value) != record.checksum:
            raise Corrupt(f"{str(record.key)!r} in the table {table.name} of {self.name} was altered; {_RESTORE}")
        return json.loads(record.value)

    def _head(self, connection: Connection) -> tuple[int, str] | None:
        record = connection.execute(select(current).where(current.c.life == self.life, current.c.key == _HEAD)).first()
        if record is None:
            return None
        value = self._value(current, record)
        return value["seq"], value["hash"]

    def _read_head(self) -> tuple[int, str] | None:
        with self.reading() as connection:
            return self._head(connection)


def _row_hash(life: str, seq: int, kind: str, prev_hash: str, body: str, extra: str) -> str:
    """The chain's hash; body and extra go in as the texts they are stored as, so that every byte counts."""
    return hashlib.sha256(
        canonical(
            {"life": life, "seq": seq, "kind": kind, "prev_hash": prev_hash, "body": body, "extra": extra}
        ).encode()
    ).hexdigest()


def _value_checksum(life: str, key: str, text: str) -> str:
    return hashlib.sha256(canonical([life, key, text]).encode()).hexdigest()


def _plain_error(error: DBAPIError, name: str) -> RemanenceError:
    said = str(error.orig)
    low = said.lower()
    if "locked" in low or "busy" in low:
        return Locked(f"another process keeps {name} busy; wait until it ends and try again")
    if "full" in low:
        return StorageError(
            f"the disk is full: {name} could not be written; nothing was changed; free some space and try again"
        )
    if "readonly" in low or "read-only" in low:
        return StorageError(f"{name} is read-only; nothing was changed; make it and its folder writable and try again")
    if "unable to open" in low or "disk i/o" in low or "connect" in low:
        return StorageError(f"{name} cannot be opened or read ({said}); check that its folder exists and is accessible")
    if (
        isinstance(error, SqlOperationalError)
        and "no such" not in low
        and "utf-8" not in low
        and "malformed" not in low
        and "syntax" not in low
    ):
        return StorageError(f"{name}: {said}")
    return Corrupt(f"{name} is damaged or no ledger ({said}); {_RESTORE}")


class _Sqlite:
    """All that is particular to SQLite."""

    def __init__(self, path: str, read_only: bool) -> None:
        if not path or path == ":memory:":
            raise BadInput("a ledger must be a file, so that it outlives its process")
        self.path = Path(path).resolve()
        self.name = str(self.path)
        self.read_only = read_only

    def before(self, *, create: bool) -> None:
        """Checks the file before SQLite touches it.

        SQLite takes an empty or missing file for a new database, and a leftover log for its own.
        """
        try:
            size = self.path.stat().st_size if self.path.exists() else None
        except OSError as error:
            raise StorageError(f"no access to {self.path}: {error.strerror}") from None
        if size is None and not create:
            raise StorageError(f"{self.path} does not exist")
        log = self.path.with_name(self.path.name + "-wal")
        if size is None and log.exists() and log.stat().st_size:
            raise Corrupt(f"{self.path} is missing while its log {log.name} is there; {_RESTORE}")
        if size == 0 and not create:
            raise Corrupt(f"{self.path} is empty; {_RESTORE}")
        if size:
            with open(self.path, "rb") as file:
                head = file.read(100)
            if not head.startswith(b"SQLite format 3\0") or len(head) < 100:
                raise Corrupt(f"{self.path} is no ledger: its first bytes are not a database's; {_RESTORE}")

    def engine(self) -> Engine:
        if self.read_only:
            query = "mode=ro"
            if not os.access(self.path.parent, os.W_OK) and not self.path.with_name(self.path.name + "-wal").exists():
                query = "immutable=1"  # a closed ledger in a folder where SQLite cannot make its helper files
            url = f"sqlite:///file:{_quote(str(self.path))}?{query}&uri=true"
        else:
            url = f"sqlite:///{self.path}"
        engine = create_engine(url)
        event.listen(engine, "connect", self._connect)
        event.listen(engine, "begin", self._begin)
        return engine

    def _connect(self, raw: Any, _record: Any) -> None:
        raw.isolation_level = None  # transactions are begun by `_begin`, not by the driver
        cursor = raw.cursor()
        pragmas = [
            "busy_timeout=10000",
            "foreign_keys=ON",
            "trusted_schema=OFF",
            "cell_size_check=ON",
            "temp_store=MEMORY",
        ]
        if not self.read_only:
            pragmas += ["journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"]
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def _begin(self, connection: Connection) -> None:
        connection.exec_driver_sql(
            "BEGIN IMMEDIATE" if connection.get_execution_options().get("remanence_writes") else "BEGIN"
        )

    def check(self, connection: Connection) -> None:
        """Pages, indexes and references; a page number beyond the file's end is found here too."""
        said = [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check(3)")]
        if said != ["ok"]:
            raise Corrupt(f"{self.path} is damaged ({'; '.join(str(line) for line in said)[:200]}); {_RESTORE}")
        if connection.exec_driver_sql("PRAGMA foreign_key_check").first() is not None:
            raise Corrupt(f"{self.path} has rows of no life; {_RESTORE}")

    def scrub(self, engine: Engine) -> None:
        raw = engine.raw_connection()
        try:
            cursor = raw.cursor()
            self._truncate(cursor)
            # secure_delete clears what was deleted; rewriting the file also clears copies that moving rows between
            # pages left behind
            cursor.execute("VACUUM")
            self._truncate(cursor)
            cursor.close()
        except Exception as error:
            if isinstance(error, RemanenceError):
                raise
            raise Locked(f"{self.path} could not be rewritten ({error}); close other readers and try again") from error
        finally:
            raw.close()

    def _truncate(self, cursor: Any) -> None:
        cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if cursor.fetchone()[0]:
            raise Locked(
                f"another process is reading {self.path}, so its log still holds removed values; close it and try again"
            )


def _quote(path: str) -> str:
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
