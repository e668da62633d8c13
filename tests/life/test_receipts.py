"""Receipts: keys, signing, verification against ledger and files, rotation."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from remanence.core.errors import BadInput, Corrupt, StorageError
from remanence.life.files import write_atomic
from remanence.life.ledger import Ledger
from remanence.life.receipts import config_folder, describe, public_key, receipt_of, rotate, seal, sign, verify


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REMANENCE_CONFIG", str(tmp_path / "config"))
    return tmp_path / "config"


def issue(home: Path, name: str, notes: dict[str, Any] | None = None, **content: Any) -> Path:
    """A receipt of a life, as file."""
    with Ledger(home / "ledger.db") as ledger:
        with ledger.begin() as tx:
            tx.append("forgot", {"request": name})
        with ledger.begin() as tx:
            receipt = seal(tx, {"id": name, **content}, notes)
    path = home / "receipts" / f"{name}.json"
    write_atomic(path, json.dumps(receipt, indent=1).encode())
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home" / "snapshots").mkdir(parents=True)
    return tmp_path / "home"


def test_a_receipt_is_consistent(home: Path) -> None:
    file = home / "snapshots" / "a"
    file.write_bytes(b"weights")
    path = issue(home, "R1", {"seconds": 2.5}, files=describe(home, [file]))
    verdict = verify(path)
    assert verdict.ok and verdict.word == "consistent" and verdict.signer == public_key()
    assert verdict.files == {"snapshots/a": "present"} and verdict.checked == ("signature", "ledger", "files", "signer")
    assert verify(path, home=home, key=public_key()).ok
    with Ledger(home / "ledger.db") as ledger:
        row = ledger.last("receipt")
        assert row is not None and receipt_of(row) == json.loads(path.read_text())
        assert row.body["id"] == "R1" and "seconds" not in row.body  # equal lives have equal bodies
        assert json.loads(path.read_text())["receipt"]["ledger"]["hash"] == row.prev_hash


def test_a_receipt_alone_is_checked_as_far_as_it_goes(home: Path, tmp_path: Path) -> None:
    path = issue(home, "R1")
    alone = tmp_path / "elsewhere" / "deep" / "R1.json"
    alone.parent.mkdir(parents=True)
    shutil.copy(path, alone)
    assert verify(alone).ok and verify(alone).checked == ("signature", "signer")
    assert verify(alone, home=home).checked[1] == "ledger"


def test_every_flipped_byte_is_found_or_harmless(home: Path, tmp_path: Path) -> None:
    path = issue(home, "R1", {"seconds": 1.5, "note": "plain words"})
    whole = path.read_bytes()
    want = json.loads(whole)
    copy = tmp_path / "copy" / "a" / "R1.json"
    copy.parent.mkdir(parents=True)
    altered = 0
    for place in range(len(whole)):
        copy.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        verdict = verify(copy)
        if verdict.ok:
            assert json.loads(copy.read_bytes()) == want, place
        altered += verdict.word == "altered"
    assert altered > len(whole) * 0.8


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff\xfe", b'{"receipt": {}, "signature": "", "key": ""}', b"[" * 5000]
)
def test_what_is_no_receipt(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert verify(path).word == "altered"


def test_a_double_key_is_refused(home: Path) -> None:
    path = issue(home, "R1")
    path.write_text(path.read_text().replace('"id": "R1"', '"id": "R9", "id": "R1"'))
    assert verify(path).word == "altered" and "twice" in verify(path).reasons[0]


def test_a_cut_tail_is_found(home: Path) -> None:
    issue(home, "R1")
    shutil.copy(home / "ledger.db", home / "old.db")
    path = issue(home, "R2")
    assert verify(path).ok
    (home / "ledger.db").unlink()
    (home / "old.db").rename(home / "ledger.db")
    verdict = verify(path)
    assert verdict.word == "altered" and "tail was cut" in verdict.reasons[0]
    assert verify(home / "receipts" / "R1.json").ok


def test_another_history_is_found(home: Path, tmp_path: Path) -> None:
    path = issue(home, "R1")
    life = json.loads(path.read_text())["receipt"]["ledger"]["life"]
    (home / "ledger.db").unlink()
    with Ledger(home / "ledger.db", life=life) as ledger, ledger.begin() as tx:
        for _ in range(5):
            tx.append("learned", {})
    assert "not the one this receipt followed" in verify(path).reasons[0]
    (home / "ledger.db").write_bytes(b"no ledger" * 200)
    assert "cannot be relied on" in verify(path).reasons[0]
    (home / "ledger.db").unlink()
    assert verify(path, home=home).word == "altered"
    with Ledger(home / "ledger.db", life="other") as ledger, ledger.begin() as tx:
        tx.append("learned", {})
    assert "belongs to the life" in verify(path).reasons[0]


def test_files_present_erased_and_lost(home: Path) -> None:
    for name in "abcd":
        (home / "snapshots" / name).write_bytes(name.encode() * 100)
    path = issue(home, "R1", files=describe(home, [home / "snapshots" / name for name in "abcd"]))
    (home / "snapshots" / "a").unlink()
    issue(home, "R2", erased=["snapshots/a"])
    with Ledger(home / "ledger.db") as ledger, ledger.begin() as tx:
        swept = tx.append("swept", {"erased": ["snapshots/b"]})
    (home / "snapshots" / "b").unlink()
    verdict = verify(path)
    assert verdict.ok
    assert verdict.files == {
        "snapshots/a": "erased by receipt R2",
        "snapshots/b": f"erased by row {swept.seq}",
        "snapshots/c": "present",
        "snapshots/d": "present",
    }
    (home / "snapshots" / "c").unlink()
    (home / "snapshots" / "d").write_bytes(b"other")
    verdict = verify(path)
    assert verdict.word == "altered" and (verdict.files["snapshots/c"], verdict.files["snapshots/d"]) == (
        "missing",
        "altered",
    )


def test_a_listed_path_cannot_lead_out(home: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"x")
    with pytest.raises(BadInput, match="outside"):
        describe(home, [tmp_path / "outside"])
    path = issue(home, "R1", files=[{"path": "../outside", "sha256": "0"}, {"path": 3}, 7])
    assert set(verify(path).files.values()) == {"altered"}


def test_signers(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = issue(home, "R1")
    owner = public_key()
    receipt = json.loads(path.read_text())
    monkeypatch.setenv("REMANENCE_CONFIG", str(tmp_path / "somebody else"))
    assert verify(path).word == "unknown signer" and "pin it" in verify(path).reasons[0]
    assert verify(path, key=owner).ok and verify(path, key=f" {owner.upper()}\n").ok
    assert not config_folder().exists()  # verifying makes no key
    forged = sign({**receipt["receipt"], "id": "R1, but better"})
    alone = tmp_path / "forged.json"
    alone.write_text(json.dumps(forged))
    assert verify(alone, key=owner).word == "unknown signer"
    monkeypatch.setenv("REMANENCE_CONFIG", str(tmp_path / "config"))
    assert verify(alone).word == "unknown signer"
    with pytest.raises(BadInput, match="64 hex"):
        verify(path, key="abc")


def test_keys_are_private_and_outside_the_home(home: Path, config: Path) -> None:
    name = public_key()
    path = config / "keys" / f"{name}.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert public_key() == name and stat.S_IMODE(path.stat().st_mode) == 0o600
    issue(home, "R1")
    pem = path.read_bytes().splitlines()[1]
    assert not any(pem in file.read_bytes() for file in home.rglob("*") if file.is_file())


def test_a_missing_key_is_an_error_not_a_new_key(home: Path, config: Path) -> None:
    issue(home, "R1")
    name = public_key()
    shutil.move(config, config.with_name("gone"))
    with pytest.raises(StorageError, match=r"missing.*put it back"):
        issue(home, "R2")
    with Ledger(home / "ledger.db") as ledger:
        assert len(ledger.rows("receipt")) == 1
        with pytest.raises(StorageError, match="missing"):
            rotate(ledger)
        row = rotate(ledger, lost=True)
        assert row.extra["signature"] is None and row.extra["old"] == name
    path = issue(home, "R2")
    assert verify(path).ok and verify(path, key=name).word == "unknown signer"
    (config / "keys" / f"{public_key()}.pem").write_bytes(b"damaged")
    with pytest.raises(Corrupt, match="damaged"):
        issue(home, "R3")


def test_rotation_is_signed_by_the_old_key(home: Path, tmp_path: Path) -> None:
    old_path, old = issue(home, "R1"), public_key()
    with Ledger(home / "ledger.db") as ledger:
        rotate(ledger)
        rotate(ledger)
    new_path, new = issue(home, "R2"), public_key()
    assert new != old and verify(new_path).signer == new
    assert verify(new_path, key=old).ok  # whoever trusted the first key can follow
    assert verify(old_path, key=old).ok and verify(old_path, key=new).word == "unknown signer"
    other = tmp_path / "second"
    other.mkdir()
    assert verify(issue(other, "R1")).signer == new
    # a rotation that the old key did not sign is not followed
    with Ledger(home / "ledger.db") as ledger, ledger.begin() as tx:
        tx.append("key", {}, {"life": ledger.life, "old": old, "new": "ab" * 32, "signature": "00" * 64})
    assert "ab" * 32 not in (verify(new_path, key=old).signer,)


def test_a_life_keeps_the_key_its_chain_names(home: Path, tmp_path: Path) -> None:
    first = public_key()
    issue(home, "R1")
    other = tmp_path / "second"
    other.mkdir()
    with Ledger(other / "ledger.db") as ledger:
        rotate(ledger)
    assert public_key() != first
    assert verify(issue(home, "R2")).signer == first


def test_sealing_refuses_a_part_twice(home: Path) -> None:
    for content, notes in (({"a": 1}, {"a": 2}), ({"ledger": 1}, {})):
        with Ledger(home / "ledger.db") as ledger, ledger.begin() as tx, pytest.raises(BadInput, match="twice"):
            seal(tx, content, notes)


def test_an_altered_ledger_row_is_found(home: Path) -> None:
    path = issue(home, "R1")
    with Ledger(home / "ledger.db") as ledger, ledger.writing() as connection:
        connection.execute(text("update rows set body = '{}' where seq = 0"))
    assert "row 0" in verify(path).reasons[0]
