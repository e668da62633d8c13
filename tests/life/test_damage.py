"""What breaks around a life: a clear error or a recorded drift, and nothing lost."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import event

import remanence as rm
from remanence.core.errors import (
    BadInput,
    Corrupt,
    DataChanged,
    Drift,
    EventFailed,
    Locked,
    Refused,
    RemanenceError,
    StorageError,
)
from remanence.data import Request, Task
from remanence.forget.salun import SalUn
from remanence.learn.finetune import Finetune
from remanence.life import receipts
from remanence.life.life import Life
from remanence.models import mlp
from tests.life import crash
from tests.life.helpers import FAST, REPLAY, again, bits, kinds, lived, network, of_class, stream

RICH: list[Any] = [*REPLAY, {"ewc": {"strength": 5.0}}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a closed life of two tasks and one receipt; copied, never touched."""
    home = tmp_path_factory.mktemp("base") / "home"
    with lived(home, keep=RICH) as life:
        life.forget(Request(ids=of_class(stream()[0], 0).array[:3]), by="retrain")
        life.report()
    return home


@pytest.fixture
def home(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "home"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 0x20
    path.write_bytes(bytes(data))


def files_of(life: Life) -> list[Path]:
    """Files of the current snapshot, the largest first."""
    entry = life._ledger.get_current("snapshots")[-1]
    found = [life.home / name for name in life._snapshots.files(entry["manifest"])]
    return sorted(found, key=lambda path: -path.stat().st_size)


# -- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing", "empty"])
def test_a_damaged_snapshot(harm: str, home: Path) -> None:
    with again(home) as life:
        before, path = bits(life), files_of(life)[0]
    whole = path.read_bytes()
    if harm == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif harm == "flipped":
        flip(path, len(whole) - 40)
    elif harm == "missing":
        path.unlink()
    else:
        path.write_bytes(b"")
    with pytest.raises(Corrupt, match=r"restore it from a copy"):
        again(home)
    verdict = receipts.verify(home / "receipts" / "0001.json")
    word = "missing" if harm == "missing" else "altered"
    assert verdict.word == "altered" and verdict.files[path.relative_to(home).as_posix()] == word
    path.write_bytes(whole)
    with again(home) as life:
        assert bits(life) == before
    assert receipts.verify(home / "receipts" / "0001.json").ok


@pytest.mark.parametrize("table", ["current", "private", "rows", "private_ids", "blocks"])
def test_an_altered_table_of_the_ledger(table: str, home: Path) -> None:
    """The snapshots' manifests lie in `current`; requests in `private`; who was learned in `private_ids` and `blocks`."""
    changes = {
        "current": 'UPDATE current SET value = replace(value, \'"dtype":"float32"\', \'"dtype":"float64"\') WHERE key = \'snapshots\'',
        "private": "UPDATE private SET value = replace(value, '\"asked\"', '\"basked\"')",
        "rows": "UPDATE rows SET body = replace(body, '\"learn task 0\"', '\"learn task 1\"')",
        "private_ids": "UPDATE private_ids SET count = count + 1",
        "blocks": "UPDATE blocks SET data = data || x'00'",
    }
    with sqlite3.connect(home / "ledger.db") as connection:
        assert connection.execute(changes[table]).rowcount
    connection.close()
    with pytest.raises(Corrupt, match=r"restore ledger\.db"):
        again(home)
    with pytest.raises(Corrupt):  # and again: the lock was given back, nothing was made worse
        again(home)


@pytest.mark.parametrize("share", [0.0, 0.13, 0.31, 0.47, 0.66, 0.83, 0.97])
def test_a_flipped_byte_of_the_ledger(share: float, home: Path) -> None:
    _flipped(home, int(share * (home / "ledger.db").stat().st_size) + 17)


@pytest.mark.slow
def test_any_flipped_byte_of_the_ledger(base: Path, tmp_path: Path) -> None:
    size = (base / "ledger.db").stat().st_size
    for number, at in enumerate(range(5, size, size // 150)):
        _flipped(Path(shutil.copytree(base, tmp_path / str(number))), at)


def _flipped(home: Path, at: int) -> None:
    with again(home) as life:
        before = bits(life)
    whole = (home / "ledger.db").read_bytes()
    flip(home / "ledger.db", at)
    try:
        with again(home) as life:
            assert bits(life) == before  # a byte that nothing is stored in
    except (Corrupt, StorageError) as error:
        assert "restore" in str(error) or "ledger.db" in str(error)
    for name in ("ledger.db-wal", "ledger.db-shm"):
        (home / name).unlink(missing_ok=True)
    (home / "ledger.db").write_bytes(whole)
    with again(home) as life:
        assert bits(life) == before


def test_a_flipped_byte_of_a_receipt(home: Path) -> None:
    path = home / "receipts" / "0001.json"
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        flip(path, at)
        assert not receipts.verify(path).ok, at
        path.write_bytes(whole)
    assert receipts.verify(path).ok
    path.unlink()  # it is a copy
    again(home).close()
    assert path.read_bytes().strip() == whole.strip() and receipts.verify(path).ok


def test_a_cut_ledger_tail_is_seen_against_a_kept_receipt(home: Path, tmp_path: Path) -> None:
    old = (home / "ledger.db").read_bytes()
    with again(home) as life:
        kept = shutil.copy(life.forget(Request(classes=[3]), by="retrain").path, tmp_path / "kept.json")
    assert receipts.verify(kept, home).ok
    (home / "ledger.db").write_bytes(old)
    verdict = receipts.verify(kept, home)
    assert verdict.word == "altered" and any("its tail was cut" in reason for reason in verdict.reasons)


def test_a_row_cut_off_the_ledger(home: Path) -> None:
    with sqlite3.connect(home / "ledger.db") as connection:
        connection.execute("DELETE FROM rows WHERE seq = (SELECT max(seq) FROM rows)")
    connection.close()
    with pytest.raises(Corrupt, match="its tail was cut"):
        again(home)


def test_a_lost_or_foreign_ledger(home: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no life"):
        again(tmp_path / "nowhere")
    (home / "ledger.db").write_bytes(b"\0" * 4096)
    with pytest.raises(Corrupt, match="no ledger"):
        again(home)


# -- keys -------------------------------------------------------------------------------------------------------------


def test_a_missing_signing_key_is_noticed_before_anything_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMANENCE_CONFIG", str(tmp_path / "config"))
    with lived(tmp_path / "home") as life:
        life.forget(Request(ids=of_class(stream()[0], 0).array[:3]), by="retrain")
        before, rows = bits(life), kinds(life)
        (tmp_path / "config").rename(tmp_path / "elsewhere")
        with pytest.raises(StorageError, match=r"signing key .* is missing.*put it back"):
            life.forget(Request(classes=[3]), by="retrain")
        assert bits(life) == before and kinds(life) == rows
        life.learn(stream()[2], **FAST)  # learning signs nothing
        shutil.rmtree(tmp_path / "config", ignore_errors=True)
        (tmp_path / "elsewhere").rename(tmp_path / "config")
        assert life.forget(Request(classes=[3]), by="retrain").status == "done"


def test_a_key_that_goes_missing_in_the_middle_leaves_a_receipt_owed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from remanence.life import erasing

    monkeypatch.setenv("REMANENCE_CONFIG", str(tmp_path / "config"))
    gone = of_class(stream()[1], 3)
    with lived(tmp_path / "home") as life:
        life.forget(Request(ids=of_class(stream()[0], 0).array[:3]), by="retrain")

        def hide(step: str) -> None:
            if step == "commit":
                (tmp_path / "config").rename(tmp_path / "elsewhere")

        monkeypatch.setattr(erasing, "reached", hide)
        with pytest.raises(StorageError, match="signing key"):
            life.forget(Request(classes=[3]), by="retrain")
        monkeypatch.setattr(erasing, "reached", lambda step: None)
        assert all(row.state == "holds" and "erasing" in row.reason for row in life.trace(gone))
        with pytest.raises(StorageError, match="signing key"):
            life.learn(stream()[2], **FAST)  # nothing new before what is owed
        (tmp_path / "elsewhere").rename(tmp_path / "config")
        life.learn(stream()[2], **FAST)
        assert life.receipts[-1].status == "done" and receipts.verify(life.receipts[-1].path).ok
        assert {row.state for row in life.trace(gone)} == {"deleted"}


# -- disks ------------------------------------------------------------------------------------------------------------


@contextmanager
def failing(code: int, first: int, names: tuple[str, ...] = ("fsync", "replace")) -> Iterator[list[int]]:
    """From call number `first` on, every flush and rename fails with `code`; yields the count of calls."""
    count = [0]

    def fails(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] >= first:
                raise OSError(code, os.strerror(code))
            return real(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, fails(getattr(os, name)))
        yield count


@contextmanager
def full_database(life: Life, first: int) -> Iterator[list[int]]:
    """From write number `first` on, the database says that the disk is full."""
    count = [0]

    def execute(_cursor: Any, statement: str, _parameters: Any, _context: Any) -> None:
        if statement.split(None, 1)[0] in ("INSERT", "UPDATE", "DELETE"):
            count[0] += 1
            if count[0] >= first:
                raise sqlite3.OperationalError("database or disk is full")

    event.listen(life._ledger._engine, "do_execute", execute)
    try:
        yield count
    finally:
        event.remove(life._ledger._engine, "do_execute", execute)


def learns(life: Life) -> None:
    life.learn(stream()[2], **FAST, snapshot_every=3)


def forgets(life: Life) -> None:
    life.forget(Request(classes=[3]), by="retrain")


def _until_it_fits(home: Path, act: Callable[[Life], None], disk: Callable[[Life, int], Any], step: int = 1) -> int:
    """`act` on a disk that is full from the n-th write on, for every n; returns how many n failed."""
    plain = Path(shutil.copytree(home, home.parent / "plain"))
    with again(plain) as life:
        act(life)
        wanted = bits(life)
    failures = 0
    for first in itertools.count(1, step):
        with again(Path(shutil.copytree(home, home.parent / str(first)))) as life:
            before = bits(life)
            with disk(life, first) as count:
                try:
                    act(life)
                except (StorageError, Refused) as error:
                    assert isinstance(error, StorageError) and "the disk is full" in str(error), error
                    failures += 1
                else:
                    assert first > count[0] or bits(life)["state"] == wanted["state"]
                    if first > count[0]:
                        assert bits(life) == wanted
                        return failures
            now = bits(life)
            committed = now["events"] > before["events"]
            assert now["state"] == (wanted if committed else before)["state"], first
            assert committed or now == before | {"digest": now["digest"]}
            if not committed:
                act(life)  # a retry works, in the same process
            assert bits(life)["state"] == wanted["state"], first
            life.learn(stream()[0], **FAST)  # whatever was owed is done before anything new begins
            assert all(receipts.verify(path).ok for path in (life.home / "receipts").iterdir())
            assert len(life.receipts) == len(list((life.home / "receipts").iterdir()))
        shutil.rmtree(life.home)
    raise AssertionError


@pytest.mark.parametrize("act", [learns, forgets])
def test_a_full_disk_at_some_flushes(act: Callable[[Life], None], home: Path) -> None:
    assert _until_it_fits(home, act, lambda life, first: failing(errno.ENOSPC, first), step=4) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("act", [learns, forgets])
def test_a_full_disk_at_every_flush(act: Callable[[Life], None], home: Path) -> None:
    assert _until_it_fits(home, act, lambda life, first: failing(errno.ENOSPC, first)) >= 6


@pytest.mark.parametrize("act", [learns, forgets])
def test_a_full_database_at_some_writes(act: Callable[[Life], None], home: Path) -> None:
    assert _until_it_fits(home, act, full_database, step=7) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("act", [learns, forgets])
def test_a_full_database_at_every_write(act: Callable[[Life], None], home: Path) -> None:
    assert _until_it_fits(home, act, full_database) >= 10


def test_too_little_room_for_a_request_is_seen_beforehand(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with again(home) as life:
        before = bits(life)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
        with pytest.raises(Refused, match=r"1000 bytes free.*free some space"):
            life.forget(Request(classes=[3]), by="retrain")
        assert bits(life) == before and kinds(life)[-1] == "refused"


def test_a_read_only_disk(home: Path) -> None:
    """Root may write to any folder, so the system's refusal is imitated."""
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *rest, **options)

    with again(home) as life:
        before = bits(life)
        for act in (learns, forgets, lambda life: life.report()):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "open", refuse)
                with pytest.raises(StorageError, match=r"read-only folder or disk.*make it accessible"):
                    act(life)
            assert bits(life)["state"] == before["state"]
        learns(life)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(StorageError, match="no permission"):
            again(home)
    again(home).close()


# -- others, and other surroundings -----------------------------------------------------------------------------------


def tries(home: str, code: int) -> None:
    """In a process of its own: exits with `code` if the life is locked."""
    try:
        again(Path(home))
    except Locked as error:
        assert "is being written by process" in str(error) or "busy" in str(error), error
        os._exit(code)
    os._exit(0)


def test_a_second_process_and_a_second_object_are_kept_out(home: Path) -> None:
    with again(home) as life:
        process = crash._context.Process(target=tries, args=(str(home), 7))
        process.start()
        process.join()
        assert process.exitcode == 7
        with pytest.raises(Locked, match="already open in this process"):
            again(home)
        with pytest.raises(Locked):
            Life(network, home=home)
        life.learn(stream()[2], **FAST)
    with pytest.raises(Refused, match=r"Life\.resume"):
        Life(network, home=home)
    again(home).close()


def test_an_edited_example(home: Path) -> None:
    tasks = list(stream())
    x = tasks[1].train["x"].clone()
    x[5, 5] += 0.25
    for edited in (tasks[1].train.replace(x=x), tasks[1].train.select(torch.arange(len(x) - 1))):
        changed = [tasks[0], Task(edited, tasks[1].test, tasks[1].classes, tasks[1].names, 1), tasks[2]]
        with pytest.raises(DataChanged, match=r"task 1 of .* has changed since.*restore the source"):
            again(home, changed)
    again(home).close()


def test_an_edited_source_file(tmp_path: Path) -> None:
    data = rm.data.digits()
    x = (data["x"] * 16).to(torch.uint8).numpy().reshape(-1, 8, 8)[:600]
    images, labels = tmp_path / "images.idx", tmp_path / "labels.idx"
    images.write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, *x.shape) + x.tobytes())
    labels.write_bytes(struct.pack(">4B1I", 0, 0, 8, 1, len(x)) + data["y"][:600].numpy().astype(np.uint8).tobytes())

    def read() -> Any:
        return rm.data.split_idx(str(images), str(labels), flat=True)

    with Life(network, home=tmp_path / "home") as life:
        for task in list(read())[:2]:
            life.learn(task, **FAST)
        before = bits(life)
    with again(tmp_path / "home", read()) as life:
        assert bits(life) == before
    whole = images.read_bytes()
    flip(images, 16 + 64 * int((data["y"][:600] == 2).nonzero()[0]) + 20)
    with pytest.raises(DataChanged, match="has changed"):
        again(tmp_path / "home", read())
    images.write_bytes(whole)
    again(tmp_path / "home", read()).close()


def test_the_same_ids_for_other_examples_are_refused(home: Path) -> None:
    tasks = list(stream())
    other = tasks[2].train
    ids = tasks[0].train.id[: len(other)] if len(other) <= len(tasks[0].train) else None
    stolen = rm.data.Examples(dict(other.columns), "other", ids)
    with again(home) as life:
        before = bits(life)
        with pytest.raises(DataChanged, match="distinct over all sources"):
            life.learn(Task(stolen, tasks[2].test, tasks[2].classes, tasks[2].names, 2), **FAST)
        assert bits(life) == before


def test_another_number_of_threads(home: Path) -> None:
    threads = torch.get_num_threads()
    with again(home) as life:
        before = bits(life)
    try:
        torch.set_num_threads(threads + 1)
        with pytest.raises(Drift, match=f"threads was {threads}, is {threads + 1}.*allow_drift"):
            again(home)
        with again(home, allow_drift=True) as life:
            assert bits(life)["state"] == before["state"]
            row = life._ledger.last("drift")
            assert row is not None and row.extra["changed"] == f"threads was {threads}, is {threads + 1}"
            page = life.report().read_text()
            assert f"threads was {threads}, is {threads + 1}" in page
        again(home).close()  # the drift is on record; these are its surroundings now
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(Drift):
        again(home)


def test_another_model(home: Path) -> None:
    for other in (lambda seed: mlp(64, [13], seed=seed), lambda seed: mlp(64, [12, 12], seed=seed)):
        with pytest.raises(DataChanged, match="not the one this life began with"):
            again(home, model=other)
    with again(home) as life:
        before = bits(life)
    with again(
        home, model=mlp(64, [12], seed=99)
    ) as life:  # the same network with other values: those of its birth count
        assert bits(life) == before
        assert life.forget(Request(classes=[3]), by="retrain").status == "done"
        after = life.content_digest()
    with again(home) as life:
        assert life.content_digest() == after


# -- failures inside an event -----------------------------------------------------------------------------------------


def test_a_loss_that_becomes_nan(home: Path) -> None:
    with again(home) as life:
        before, rows = bits(life), kinds(life)
        with pytest.raises(EventFailed, match=r"life is as it was before.*smaller lr"):
            life.learn(stream()[2], **{**FAST, "lr": 1e30})
        assert bits(life) == before and kinds(life) == [*rows, "attempt", "failed"]
        life.learn(stream()[2], **FAST)
        one = bits(life)["state"]
    with again(home) as life:
        assert bits(life)["state"] == one


def test_nan_in_the_data_never_gets_in(home: Path) -> None:
    tasks = list(stream())
    x = tasks[2].train["x"].clone()
    x[3, 0] = float("nan")
    with again(home) as life:
        before, rows = bits(life), kinds(life)
        with pytest.raises(BadInput, match="NaN or infinite values in 1 rows"):
            life.learn(Task(tasks[2].train.replace(x=x), tasks[2].test, tasks[2].classes, tasks[2].names, 2), **FAST)
        assert bits(life) == before and kinds(life) == rows


class _Stop:
    """Raises at the n-th call of a method."""

    def __init__(self, cls: type[Any], name: str, at: int, patch: pytest.MonkeyPatch) -> None:
        real, self.calls = getattr(cls, name), 0

        def call(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == at:
                raise KeyboardInterrupt
            return real(*arguments)

        patch.setattr(cls, name, call)


@pytest.mark.parametrize("snapshot_every", [None, 2])
def test_ctrl_c_while_learning(snapshot_every: int | None, home: Path) -> None:
    with again(home) as life:
        before = bits(life)
        with pytest.MonkeyPatch.context() as patch:
            stop = _Stop(Finetune, "objective", 4, patch)
            with pytest.raises(KeyboardInterrupt):
                life.learn(stream()[2], **FAST, snapshot_every=snapshot_every)
        assert bits(life) == before and "failed" not in kinds(life)
        with pytest.MonkeyPatch.context() as patch:
            stop = _Stop(Finetune, "objective", -1, patch)
            life.learn(stream()[2], **FAST, snapshot_every=snapshot_every)
        # from the last snapshot inside the event, or from its beginning
        steps = life.events[-1].steps
        assert stop.calls == (steps if snapshot_every is None else steps - 2)
        one = bits(life)
    shutil.rmtree(home)
    with lived(home, keep=RICH) as life:
        life.forget(Request(ids=of_class(stream()[0], 0).array[:3]), by="retrain")
        life.learn(stream()[2], **FAST, snapshot_every=snapshot_every)
        assert bits(life)["state"] == one["state"] and bits(life)["digest"] == one["digest"]


def test_ctrl_c_while_forgetting_and_the_request_is_carried_out_later(home: Path) -> None:
    def interrupted(life: Life) -> None:
        before = bits(life)
        with pytest.MonkeyPatch.context() as patch:
            _Stop(SalUn, "objective", 3, patch)
            with pytest.raises(KeyboardInterrupt):
                life.forget(Request(classes=[3]), by="salun", verify={"retrain": {"seeds": 1}})
        assert bits(life) | {"digest": ""} == before | {"digest": ""}
        assert kinds(life)[-1] == "asked"

    other = Path(shutil.copytree(home, home.parent / "other"))
    third = Path(shutil.copytree(home, home.parent / "third"))
    with again(home) as life:
        interrupted(life)
        life.learn(stream()[2], **FAST)  # first what was accepted, then this
        assert [event.kind for event in life.events] == ["learn", "learn", "forget", "forget", "learn"]
        assert life.receipts[-1].number == 2
        one = bits(life)
    with again(other) as life:
        interrupted(life)
    with again(other) as life:  # or at the next open
        assert life.receipts[-1].by == "salun"
        life.learn(stream()[2], **FAST)
        assert bits(life) == one
    with again(third) as life:
        life.forget(Request(classes=[3]), by="salun", verify={"retrain": {"seeds": 1}})
        life.learn(stream()[2], **FAST)
        assert bits(life) == one


def test_a_life_that_cannot_be_opened_leaves_no_lock_behind(home: Path) -> None:
    for wrong in ({"data": [object()]}, {"model": None}):
        with pytest.raises((RemanenceError, AttributeError, TypeError)):
            again(home, **wrong)
    again(home).close()
