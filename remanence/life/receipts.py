"""Receipts: signed accounts of what a ledger says was done, and their verification.

A receipt is JSON: {"receipt": body, "signature": hex, "key": hex}, an Ed25519 signature over the body's canonical text.
The body names the ledger row it follows; its own row carries the same
signature, so a kept receipt shows if the ledger's tail was cut.

Private keys lie in the user's configuration folder (`$REMANENCE_CONFIG`, else `$XDG_CONFIG_HOME/remanence`, else
`~/.config/remanence`), never in a home, one file per key: ``keys/<public key>.pem``, and in
``current`` the name of the one that new lives sign with. A life goes on with the key that its chain names; `rotate`
changes it by a row signed with the old one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from remanence.core.errors import BadInput, Corrupt, RemanenceError, StorageError
from remanence.life.files import canonical, inside, plain_errors, sha256_file, write_atomic
from remanence.life.ledger import Ledger, Row, Transaction

__all__ = [
    "Verdict",
    "chain_key",
    "config_folder",
    "describe",
    "public_key",
    "receipt_of",
    "rotate",
    "seal",
    "sign",
    "verify",
]

_HEX64 = re.compile(r"[0-9a-f]{64}")


# -- keys --------------------------------------------------------------------------------------------------------------
# -----------------------------


def config_folder() -> Path:
    """The user's configuration folder (it may not exist yet)."""
    if folder := os.environ.get("REMANENCE_CONFIG"):
        return Path(folder)
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "remanence"


def public_key(expected: str | None = None) -> str:
    """The public key (hex) that would sign now; the first key is made on first need.

    Args:
        expected: the key that must be there (the one a life's chain names).

    Raises:
        StorageError: the expected key is missing or unreadable; says where it should be and what can be done.
        Corrupt: the key file is damaged.
    """
    return _public(_private(expected))


def _public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def _private(expected: str | None = None) -> Ed25519PrivateKey:
    folder = config_folder()
    name = expected
    if name is None:
        current = folder / "current"
        if current.exists():
            with plain_errors(current):
                name = current.read_text().strip()
        else:
            key = _new_key()
            with plain_errors(current):
                write_atomic(current, (_public(key) + "\n").encode(), mode=0o600)
            return key
    if not _HEX64.fullmatch(name):
        raise Corrupt(
            f"{folder / 'current'} does not name a key; write the name of one of the files in {folder / 'keys'} into it"
        )
    path = folder / "keys" / f"{name}.pem"
    if not path.exists():
        raise StorageError(
            f"the signing key {name[:16]} is missing: {path} does not exist; put it back, point REMANENCE_CONFIG "
            "to the folder that has it, or go on with another key by rotate(ledger, lost=True), "
            "which every later receipt will show"
        )
    with plain_errors(path):
        if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
            os.chmod(path, 0o600)  # a copy may have come with wider permissions
        data = path.read_bytes()
    try:
        loaded = load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        raise Corrupt(f"{path} is damaged; restore it from a copy") from None
    if not isinstance(loaded, Ed25519PrivateKey) or _public(loaded) != name:
        raise Corrupt(f"{path} does not hold the key it is named after; restore it from a copy")
    return loaded


def _new_key() -> Ed25519PrivateKey:
    key = Ed25519PrivateKey.generate()
    data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    folder = config_folder() / "keys"
    with plain_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(folder / f"{_public(key)}.pem", data, mode=0o600)
    return key


def sign(body: dict[str, Any], expected: str | None = None) -> dict[str, Any]:
    """Signs a body: {"receipt": body, "signature": hex, "key": hex public key}.

    Args:
        body: JSON.
        expected: the key to sign with; default: the user's current one, made on first need.

    Raises:
        BadInput: the body is not JSON.
        StorageError, Corrupt: as for `public_key`.
    """
    text = canonical(body)
    key = _private(expected)
    return {"receipt": json.loads(text), "signature": key.sign(text.encode()).hex(), "key": _public(key)}


def chain_key(ledger: Ledger) -> str | None:
    """The key that the life's next receipt must be signed with.

    The newest one its chain names, or None before the first receipt.
    """
    for row in reversed(ledger.rows(("receipt", "key"))):
        name = row.extra.get("new") if row.kind == "key" else row.extra.get("key")
        if isinstance(name, str):
            return name
    return None


def rotate(ledger: Ledger, *, lost: bool = False) -> Row:
    """Makes a new key for a life (and for lives to come), and records it in a row of kind ``key`` signed by the old
    key. The old key's file stays; other lives may still use it.

    Args:
        ledger: the life's ledger.
        lost: the old key cannot be read any more: the row is not signed by it, and receipts by the new key count as an
            unknown signer's to those who trusted the old one.

    Raises:
        StorageError, Corrupt: the old key cannot be read (and `lost` is False).
    """
    with ledger.begin() as tx:
        last = tx.last()
        old = chain_key(ledger)
        signer = None if lost else _private(old)
        new = _new_key()
        extra: dict[str, Any] = {
            "life": ledger.life,
            "old": old if signer is None else _public(signer),
            "new": _public(new),
        }
        text = _rotation_text(ledger.life, "" if last is None else last.hash, extra["old"], extra["new"])
        extra["signature"] = None if signer is None else signer.sign(text).hex()
        row = tx.append("key", {}, extra)
    write_atomic(config_folder() / "current", (extra["new"] + "\n").encode(), mode=0o600)
    return row


def _rotation_text(life: str, after: str, old: str | None, new: str) -> bytes:
    return canonical({"rotation": {"life": life, "after": after, "old": old, "new": new}}).encode()


# -- making receipts ---------------------------------------------------------------------------------------------------
# -----------------------------


def seal(tx: Transaction, content: dict[str, Any], notes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Signs a receipt and appends its row (kind ``receipt``) in the open transaction. Write the file afterwards, from
    the result or from `receipt_of` the row.

    Args:
        tx: the open transaction.
        content: the part that an equal life repeats in every bit; becomes the row's body. Known to `verify`: ``files``
            (see `describe`), ``erased`` (paths), ``id`` (the receipt's name).
        notes: the part that may differ (times, peak bytes, commitments); becomes part of the row's `extra`.

    Returns:
        The receipt; its body is content, notes and ``ledger``: {life, seq, hash} of the row before its own.
    """
    notes = notes or {}
    double = sorted((set(content) & set(notes)) | ({"ledger"} & (set(content) | set(notes))))
    if double:
        raise BadInput(f"the receipt has {', '.join(double)} twice")
    last = tx.last()
    place = {
        "life": tx._ledger.life,
        "seq": -1 if last is None else last.seq,
        "hash": "" if last is None else last.hash,
    }
    receipt = sign({**content, **notes, "ledger": place}, expected=chain_key(tx._ledger))
    tx.append(
        "receipt", content, {"notes": notes, "ledger": place, "signature": receipt["signature"], "key": receipt["key"]}
    )
    return receipt


def receipt_of(row: Row) -> dict[str, Any]:
    """The receipt that a row of kind ``receipt`` carries, equal to what `seal` returned."""
    if row.kind != "receipt":
        raise BadInput(f"row {row.seq} is a row of kind {row.kind}, not a receipt")
    body = {**row.body, **row.extra["notes"], "ledger": row.extra["ledger"]}
    return {"receipt": body, "signature": row.extra["signature"], "key": row.extra["key"]}


def describe(home: str | Path, paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Files as a receipt lists them: [{"path": relative to the home, "sha256": hex, "bytes": n}], sorted by path."""
    root = Path(home).resolve()
    found = sorted({inside(root, path) for path in paths})
    return [
        {"path": path.relative_to(root).as_posix(), "sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in found
    ]


# -- verifying ---------------------------------------------------------------------------------------------------------
# -----------------------------


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        word: ``consistent``; ``altered`` (receipt, ledger or a listed file is not what was signed); ``unknown signer``
            (unchanged since somebody signed it, but not by a key you know).
        reasons: why, in sentences; empty if consistent.
        files: path -> ``present``, ``erased by receipt R`` (or ``erased by row N``), ``missing`` or ``altered``.
        signer: the public key in the receipt (hex), or "".
        checked: what was checked, in words.
    """

    word: str
    reasons: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    signer: str = ""
    checked: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if consistent."""
        return self.word == "consistent"


def verify(path: str | Path, home: str | Path | None = None, key: str | None = None) -> Verdict:
    """Checks a receipt: its signature, its signer, its place in the ledger and the files it lists. Writes nothing.

    Args:
        path: the receipt's file.
        home: the life's folder; default: two folders up from the file if a ledger lies there. Without a home the ledger
            and the files are not checked, and the verdict says so.
        key: the public key (hex) that must have signed, directly or through rotations recorded in the ledger; default:
            the keys in the user's configuration folder.

    Raises:
        StorageError: the file cannot be read.
        BadInput: `key` is no public key.
    """
    if key is not None and not _HEX64.fullmatch(key.strip().lower()):
        raise BadInput(f"{key!r:.80} is no public key; expected 64 hex digits")
    with plain_errors(path):
        data = Path(path).read_bytes()
    try:
        receipt = json.loads(data, object_pairs_hook=_no_double, parse_constant=_refuse)
        body, signature, signer = receipt["receipt"], bytes.fromhex(receipt["signature"]), receipt["key"]
        if (
            set(receipt) != {"receipt", "signature", "key"}
            or not isinstance(body, dict)
            or not _HEX64.fullmatch(signer)
        ):
            raise ValueError("it has other parts than receipt, signature and key")
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(signer)).verify(signature, canonical(body).encode())
    except InvalidSignature:
        return Verdict(
            "altered",
            ("the signature does not fit the text: one of them was changed after signing",),
            signer=str(signer),
        )
    except (ValueError, KeyError, TypeError, RecursionError, BadInput) as error:
        return Verdict("altered", (f"this is no whole receipt ({error})",))
    reasons: list[str] = []
    files: dict[str, str] = {}
    checked = ["signature"]
    chain: list[Row] = []
    root = Path(home) if home is not None else Path(path).resolve().parent.parent
    if home is not None or (root / "ledger.db").exists():
        checked.append("ledger")
        try:
            with Ledger(root / "ledger.db", create=False, read_only=True) as ledger:
                chain, life = ledger.rows(), ledger.life
            reasons += _in_chain(receipt, chain, life)
        except RemanenceError as error:
            reasons.append(f"the ledger cannot be relied on: {error}")
        files = _look(root, body.get("files", []), chain)
        checked.append("files")
        reasons += [f"{name} is {state}" for name, state in files.items() if state in ("missing", "altered")]
    known = {key.strip().lower()} if key is not None else _own_keys()
    if reasons:
        return Verdict("altered", tuple(reasons), files, signer, tuple(checked))
    if signer not in _follow(known, chain):
        whom = (
            "is not the key you gave"
            if key is not None
            else "is not among your keys; if you know it from its owner, pin it with the key"
        )
        return Verdict("unknown signer", (f"the signer {signer} {whom}",), files, signer, tuple(checked))
    return Verdict("consistent", (), files, signer, (*checked, "signer"))


def _no_double(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers may see two different values where a key stands twice, so it may not."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _in_chain(receipt: dict[str, Any], chain: list[Row], life: str) -> list[str]:
    place = receipt["receipt"].get("ledger")
    if not isinstance(place, dict) or not isinstance(place.get("seq"), int):
        return ["the receipt does not name its row in the ledger"]
    if place.get("life") != life:
        return [f"the receipt belongs to the life {place.get('life')}, the ledger to {life}"]
    seq = place["seq"]
    if seq + 1 >= len(chain):
        return [f"the ledger ends before row {seq + 1}, this receipt's: its tail was cut"]
    if seq >= 0 and chain[seq].hash != place.get("hash"):
        return [f"row {seq} of the ledger is not the one this receipt followed"]
    own = chain[seq + 1]
    if own.kind != "receipt" or own.extra.get("signature") != receipt["signature"]:
        return [f"row {seq + 1} of the ledger is not this receipt"]
    return []


def _look(root: Path, listed: Any, chain: list[Row]) -> dict[str, str]:
    """What became of each listed file. Where several rows erased a path, the last one counts."""
    erased: dict[str, str] = {}
    for row in chain:
        by = f"receipt {row.body.get('id', row.seq)}" if row.kind == "receipt" else f"row {row.seq}"
        for part in (row.body, row.extra, row.extra.get("notes") or {}):
            paths = part.get("erased") if isinstance(part, dict) else None
            for item in paths if isinstance(paths, list) else []:
                name = item.get("path") if isinstance(item, dict) else item
                if isinstance(name, str):
                    erased[name] = f"erased by {by}"
    out: dict[str, str] = {}
    for item in listed if isinstance(listed, list) else []:
        if not isinstance(item, dict) or not isinstance(item.get("path"), str):
            out[str(item)[:80]] = "altered"
            continue
        name = item["path"]
        try:
            file = inside(root, name)
            if file.is_file():
                out[name] = "present" if sha256_file(file) == item.get("sha256") else "altered"
            else:
                out[name] = erased.get(name, "missing")
        except (RemanenceError, OSError, ValueError):
            out[name] = "altered"
    return out


def _own_keys() -> set[str]:
    with contextlib.suppress(OSError):
        return {path.stem for path in (config_folder() / "keys").glob("*.pem")}
    return set()


def _follow(known: set[str], chain: list[Row]) -> set[str]:
    """The known keys and those that they handed over to, by the chain's signed rotations."""
    known = set(known)
    previous = ""
    for row in chain:
        if row.kind == "key" and row.extra.get("old") in known and isinstance(row.extra.get("signature"), str):
            with contextlib.suppress(InvalidSignature, ValueError, TypeError):
                old, new = row.extra["old"], row.extra["new"]
                text = _rotation_text(row.extra.get("life", ""), previous, old, new)
                Ed25519PublicKey.from_public_bytes(bytes.fromhex(old)).verify(
                    bytes.fromhex(row.extra["signature"]), text
                )
                known.add(new)
        previous = row.hash
    return known
