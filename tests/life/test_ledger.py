"""The ledger: chain, transactions, damage, erasing, the lock and durable files."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

from remanence.core.errors import BadInput, Corrupt, Locked, RemanenceError, StorageError
from remanence.core.ids import Ids
from remanence.life import files
from remanence.life.files import canonical, empty, inside, write_atomic
from remanence.life.ledger import Ledger, commit
from remanence.life.lock import Lock


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.db", life="one") as opened:
        yield opened


def fill(ledger: Ledger, rows: int = 12) -> None:
    for at in range(rows):
        with ledger.begin() as tx:
            tx.append(
                "learned",
                {"task": at, "set": ledger.lineage.put(Ids(range(at, 4_000, at + 2)))},
                {"seconds": 0.25 * at},
            )
            tx.set_current("snapshot", {"number": at})
            tx.put_private(f"salt {at}", "5a" * 16)


def everything(ledger: Ledger) -> Any:
    """All that a life reads of a ledger."""
    rows = ledger.rows()
    sets = [list(ledger.lineage.get(row.body["set"])) for row in rows if "set" in row.body]
    values = {key: ledger.get_private(key) for key in ledger.private_keys()}
    return rows, sets, values, ledger.get_current("snapshot"), ledger.content_digest(), ledger.last(), len(ledger)


# -- the chain ---------------------------------------------------------------------------------------------------------


def test_rows_are_chained_and_come_back(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db", life="a") as ledger:
        with ledger.begin() as tx:
            first = tx.append("asked", {"b": [1, 2.5, None], "a": "é"}, {"at": 3})
            second = tx.append("done", {})
            assert tx.last() == second
        plain = {
            "life": "a",
            "seq": 0,
            "kind": "asked",
            "prev_hash": "0" * 64,
            "body": '{"a":"\\u00e9","b":[1,2.5,null]}',
            "extra": '{"at":3}',
        }
        assert first.hash == hashlib.sha256(canonical(plain).encode()).hexdigest()
        assert second.prev_hash == first.hash and (first.seq, second.seq) == (0, 1)
        assert ledger.rows() == [first, second] and ledger.rows("done") == [second] and ledger.last("asked") == first
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert (
            ledger.life == "a" and ledger.rows() == [first, second] and ledger.verify_chain() == 2 and len(ledger) == 2
        )


def test_the_content_digest_leaves_out_what_may_differ(tmp_path: Path) -> None:
    digests = []
    for run in range(2):
        with Ledger(tmp_path / f"{run}.db") as ledger, ledger.begin() as tx:
            tx.append("learned", {"task": 0}, {"seconds": run})
            if run:
                for kind in ("attempt", "failed", "refused", "receipt-copy"):
                    tx.append(kind, {"reason": "nan"})
            tx.append("learned", {"task": 1})
            digests.append(ledger.content_digest())
    assert digests[0] == digests[1]
    with Ledger(tmp_path / "2.db") as ledger, ledger.begin() as tx:
        tx.append("learned", {"task": 1})
        tx.append("learned", {"task": 0})
        assert ledger.content_digest() != digests[0]


def test_a_transaction_is_all_or_nothing(ledger: Ledger) -> None:
    fill(ledger, 2)
    before = everything(ledger)
    with pytest.raises(ZeroDivisionError), ledger.begin() as tx:
        tx.append("learned", {})
        tx.set_current("snapshot", None)
        tx.delete_private("salt 0")
        raise ZeroDivisionError
    assert everything(ledger) == before
    with pytest.raises(BadInput, match=r"\$\.loss is nan"), ledger.begin() as tx:
        tx.append("learned", {"task": 7})
        tx.append("learned", {"loss": float("nan")})
    assert everything(ledger) == before
    with ledger.begin(), pytest.raises(BadInput, match="open already"), ledger.begin():
        pass


def test_values_beside_the_chain(ledger: Ledger) -> None:
    with ledger.begin() as tx:
        assert tx.get_current("owed", []) == []
        tx.set_current("owed", ["a"])
        tx.set_current("owed", None)
        tx.put_private("text", {"classes": [3]})
        assert tx.get_private("text") == {"classes": [3]}
    assert ledger.get_current("owed", 5) is None
    with ledger.begin() as tx:
        assert tx.delete_private("text") and not tx.delete_private("text")
    assert ledger.get_private("text", "gone") == "gone"


def test_two_lives_in_one_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    for life in ("a", "b"):
        with Ledger(path, life=life) as ledger, ledger.begin() as tx:
            tx.append("learned", {"life": life})
            tx.set_current("x", life)
    with Ledger(path, life="b") as ledger:
        assert [row.body for row in ledger.rows()] == [{"life": "b"}] and ledger.get_current("x") == "b"
    with pytest.raises(BadInput, match="several lives"):
        Ledger(path)
    with pytest.raises(Corrupt, match="no life 'c'"):
        Ledger(path, life="c", create=False)


def test_a_fork_is_an_error(tmp_path: Path, ledger: Ledger) -> None:
    fill(ledger, 2)
    with pytest.raises(Corrupt, match="another writer"), ledger.begin() as tx:
        tx.connection.execute(
            text("insert into rows select life, 9, kind, prev_hash, hash, body, extra from rows where seq = 1")
        )
    assert ledger.verify_chain() == 2


def test_sqlite_is_set_up_for_safety(ledger: Ledger) -> None:
    with ledger.reading() as connection:
        found = {
            name: connection.exec_driver_sql(f"pragma {name}").scalar()
            for name in ("journal_mode", "synchronous", "secure_delete", "foreign_keys")
        }
    assert found == {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1, "foreign_keys": 1}


def test_commitments_hide_without_the_salt() -> None:
    assert commit(Ids([1, 2]), b"s") == hashlib.sha256(b"s" + np.array([1, 2], dtype="<i8").tobytes()).hexdigest()
    assert commit(Ids([1, 2]), b"s") != commit(Ids([1, 2]), b"t")


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "update rows set body = '{}' where seq = 3",
        "update rows set extra = '{}' where seq = 3",
        "update rows set kind = 'forgot' where seq = 3",
        "delete from rows where seq = 3",
        "delete from rows where seq = 11",
        "delete from rows",
        "update current set value = '{}' where key = 'snapshot'",
        "update private set value = '\"00\"' where key = 'salt 4'",
        "delete from current where key = 'chain head'",
        "drop table rows",
        "update lives set life = 'x'",
    ],
)
def test_edits_are_found(tmp_path: Path, ledger: Ledger, change: str) -> None:
    fill(ledger)
    ledger.close()
    raw = sqlite3.connect(tmp_path / "ledger.db")
    raw.execute(change)
    raw.commit()
    raw.close()
    with pytest.raises(Corrupt, match="restore") as caught:
        Ledger(tmp_path / "ledger.db")
    assert str(tmp_path) in str(caught.value)


def test_a_flipped_byte_anywhere_is_found_or_harmless(tmp_path: Path, ledger: Ledger) -> None:
    fill(ledger)
    want, life = everything(ledger), ledger.life
    ledger.close()
    whole = (tmp_path / "ledger.db").read_bytes()
    draw = random.Random(0)
    places = [
        *range(0, 100, 5),
        *(draw.randrange(len(whole)) for _ in range(150)),
        *range(100, len(whole), len(whole) // 100),
    ]
    found = 0
    for place in places:
        broken = tmp_path / "broken.db"
        for left in tmp_path.glob("broken.db*"):
            left.unlink()
        broken.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        try:
            with Ledger(broken, create=False) as opened:
                assert everything(opened) == want and opened.life == life, f"byte {place}"
        except (Corrupt, StorageError) as error:
            found += 1
            assert "broken.db" in str(error) or "ledger" in str(error)
    assert found > len(places) // 4


@pytest.mark.parametrize("keep", [0, 10, 99, 100, 4096, 0.5, 0.9])
def test_a_truncated_file(tmp_path: Path, ledger: Ledger, keep: float) -> None:
    fill(ledger)
    ledger.close()
    path = tmp_path / "ledger.db"
    whole = path.read_bytes()
    part = whole[: int(keep if keep == 0 or keep >= 1 else keep * len(whole))]
    path.write_bytes(part)
    with pytest.raises(Corrupt, match="nothing was changed"):
        Ledger(path, create=False)
    assert path.read_bytes() == part


def test_no_database_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"this is a letter, no ledger" * 100)
    with pytest.raises(Corrupt, match="no ledger"):
        Ledger(path)
    path.unlink()
    with pytest.raises(StorageError, match="does not exist"):
        Ledger(path, create=False)
    with pytest.raises(StorageError, match="folder"):
        Ledger(tmp_path / "no" / "folder" / "ledger.db")
    assert not path.exists()
    raw = sqlite3.connect(path)
    raw.execute("create table other (x)")
    raw.close()
    with pytest.raises(Corrupt, match="lacks the tables"):
        Ledger(path)
    with pytest.raises(BadInput):
        Ledger("what://://")
    with pytest.raises(BadInput, match="file"):
        Ledger("sqlite://")


def test_a_kill_in_a_transaction(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from remanence.life.ledger import Ledger
from remanence.core.ids import Ids
ledger = Ledger(sys.argv[1])
with ledger.begin() as tx:
    tx.append("learned", {"task": 0})
with ledger.begin() as tx:
    for at in range(300):
        tx.append("learned", {"pad": "x" * 1000, "set": ledger.lineage.put(Ids([at]))})
    tx.set_current("snapshot", 1)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "ledger.db")],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == -signal.SIGKILL
    with Ledger(tmp_path / "ledger.db", create=False) as ledger:
        assert [row.body for row in ledger.rows()] == [{"task": 0}]
        assert ledger.get_current("snapshot") is None and ledger.lineage.interner.size == 0


def test_reading_only(tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(ledger, 3)
    want = everything(ledger)
    with Ledger(tmp_path / "ledger.db", create=False, read_only=True) as beside:
        assert everything(beside) == want
        with pytest.raises(StorageError, match="read-only"), beside.begin() as tx:
            tx.append("learned", {})
    ledger.close()
    before = (tmp_path / "ledger.db").read_bytes()
    with Ledger(tmp_path / "ledger.db", create=False, read_only=True) as alone:
        assert everything(alone) == want
    assert (tmp_path / "ledger.db").read_bytes() == before
    for helper in ("-wal", "-shm"):
        (tmp_path / f"ledger.db{helper}").unlink(missing_ok=True)
    monkeypatch.setattr(os, "access", lambda *_: False)  # as on a read-only disk, where SQLite can make no helper files
    with Ledger(tmp_path / "ledger.db", create=False, read_only=True) as alone:
        assert everything(alone) == want
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.db"]


# -- erasing -----------------------------------------------------------------------------------------------------------


def traces(folder: Path, pattern: bytes) -> list[str]:
    return [path.name for path in sorted(folder.iterdir()) if pattern in path.read_bytes()]


@pytest.mark.parametrize("size", [1, 40, 3_000])
def test_what_was_deleted_is_in_no_byte_while_the_ledger_is_open(tmp_path: Path, ledger: Ledger, size: int) -> None:
    fill(ledger, 5)
    marker = "a-recognisable-secret"
    for at in range(20):
        with ledger.begin() as tx:
            tx.put_private(f"request {at}", f"{at}" + marker * size)
            tx.append("asked", {"number": at})
    assert traces(tmp_path, marker.encode())
    with ledger.begin() as tx:
        tx.put_private("request 3", "short")  # overwritten, not deleted
        for at in range(20):
            if at != 3:
                tx.delete_private(f"request {at}")
    ledger.scrub()
    assert {path.name for path in tmp_path.iterdir()} >= {"ledger.db", "ledger.db-wal", "ledger.db-shm"}
    assert traces(tmp_path, marker.encode()) == []
    ledger.scrub()
    assert ledger.verify_chain() == 25 and ledger.get_private("request 3") == "short"
    with ledger.begin() as tx:
        tx.append("later", {})
    assert traces(tmp_path, marker.encode()) == []


def test_scrub_says_when_a_reader_is_in_its_way(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(ledger, 1)
    with ledger.reading() as connection:
        connection.exec_driver_sql("pragma busy_timeout=1")
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    other.execute("begin")
    other.execute("select * from rows").fetchall()
    with ledger.begin() as tx:
        tx.delete_private("salt 0")
    with pytest.raises(Locked, match=r"reading|rewritten"):
        ledger.scrub()
    other.execute("rollback")
    other.close()
    ledger.scrub()
    with pytest.raises(BadInput), ledger.begin():
        ledger.scrub()


# -- lock --------------------------------------------------------------------------------------------------------------


def test_one_writer(tmp_path: Path) -> None:
    with Lock(tmp_path) as lock:
        assert lock.held
        with pytest.raises(Locked, match="already open in this process"):
            Lock(tmp_path)
        code = "import sys\nfrom remanence.life.lock import Lock\nLock(sys.argv[1])"
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode and f"process {os.getpid()}" in done.stderr and "Locked" in done.stderr
    lock.release()
    assert not lock.held
    Lock(tmp_path).release()


def test_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    # the writer forks a worker, as a data loader does, which must not keep the lock alive
    code = """
import os, sys, time
from remanence.life.lock import Lock
lock = Lock(sys.argv[1])
child = os.fork()
if not child:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert writer.stdout is not None
    child = int(writer.stdout.readline())
    try:
        with pytest.raises(Locked, match=f"process {writer.pid}"):
            Lock(tmp_path)
        writer.kill()
        writer.wait()
        Lock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        writer.stdout.close()


# -- files -------------------------------------------------------------------------------------------------------------


def test_canonical() -> None:
    assert canonical({"b": (1, np.float32(0.5)), "a": {"é": np.int64(3)}}) == '{"a":{"\\u00e9":3},"b":[1,0.5]}'
    assert canonical(0.1 + 0.2) == "0.30000000000000004"
    for bad, place in (
        ({"a": [float("inf")]}, r"\$\.a\[0\]"),
        ({1: 2}, "1"),
        ({"a": {3}}, "set"),
        ({"a": b""}, "bytes"),
    ):
        with pytest.raises(BadInput, match=place):
            canonical(bad)


def test_inside(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/b") == (tmp_path / "a" / "b").resolve()
    (tmp_path / "link").symlink_to("/")
    for bad in ("../x", "/etc/passwd", "link/etc", "a/../../x"):
        with pytest.raises(BadInput, match="outside"):
            inside(tmp_path, bad)


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EIO, "rror")]
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str, step: str
) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, b"old", work=tmp_path / "work")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(files.os, step, fail)
        with pytest.raises(StorageError, match=words) as caught:
            write_atomic(path, b"new" * 1000, work=tmp_path / "work")
    assert isinstance(caught.value, RemanenceError) and "a.json" in str(caught.value)
    assert path.read_bytes() == b"old" and not list((tmp_path / "work").iterdir())
    write_atomic(path, b"new", work=tmp_path / "work")
    assert path.read_bytes() == b"new"


def test_empty_follows_no_links(tmp_path: Path) -> None:
    precious, work = tmp_path / "precious", tmp_path / "work"
    (work / "deep" / "er").mkdir(parents=True)
    precious.mkdir()
    (precious / "file").write_text("x")
    (work / "deep" / "part").write_text("y")
    (work / "link").symlink_to(precious)
    empty(work)
    assert work.exists() and not list(work.iterdir()) and (precious / "file").exists()
    shutil.rmtree(work)
    empty(work)
    assert work.is_dir()
