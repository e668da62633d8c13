"""What follows the commit of a forget request: erase, look again, the receipt; and afterwards, redaction.

Every step may be repeated: what a kill left undone is done at the next opening.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remanence.core.errors import Refused
from remanence.core.holder import STATES
from remanence.core.ids import Ids
from remanence.life import receipts
from remanence.life.files import canonical, empty, write_atomic
from remanence.life.ledger import Row
from remanence.life.tracing import records_held, trace

if TYPE_CHECKING:
    from remanence.life.life import Life

NOT_COVERED = (
    "your source files, exports and backups",
    "what pretraining saw",
    "duplicates under other ids",
    "remnants on SSDs, in copy-on-write file systems, swap, and database archives or replicas",
    "attacks that were not run",
    "what someone learns by comparing the model before and after",
)


def reached(step: str) -> None:
    """Called after each numbered step; a place for tests to pull the plug."""


@dataclass(frozen=True)
class Receipt:
    """A signed account of what was done; `status` is ``done``, ``partial`` or ``nothing held``. `ids` is empty once redacted."""

    number: int
    status: str
    ids: Ids
    by: str
    states: dict[str, str]
    evidence: list[dict[str, Any]]
    path: Path
    content: dict[str, Any]

    def __str__(self) -> str:
        return f"receipt {self.number}: {self.status}; {self.content['n']} examples by {self.by}; " + ", ".join(
            f"{holder} {state}" for holder, state in self.states.items()
        )


def receipt_from(life: Life, row: Row) -> Receipt:
    """The receipt that a ledger row carries."""
    content = row.body
    number = int(content["id"])
    states: dict[str, str] = {}
    for entry in content["done"]:
        known = states.get(entry["holder"])
        states[entry["holder"]] = entry["state"] if known is None else min(known, entry["state"], key=STATES.index)
    ids = life._ids(content["ids"]) if content["n"] else Ids()
    return Receipt(
        number, content["status"], ids, content["by"], states, content["evidence"], receipt_path(life, number), content
    )


def receipt_path(life: Life, number: int) -> Path:
    return life.home / "receipts" / f"{number:04d}.json"


def finish(life: Life) -> None:
    """Whatever is owed after a commit: erasing, looking again, the receipt. Every step may be repeated."""
    owed = life._ledger.get_current("owed")
    if owed:
        row = next(r for r in life._ledger.rows("forget") if r.body["number"] == owed["number"])
        _erase(life, owed["references"])
        reached("erase")
        remaining = _look_again(life, row)
        reached("look again")
        _receipt(life, row, owed["erase"], remaining)
        reached("receipt")
    gone = life._books.tombstones  # a reference that could not be reached then is tried again at every open
    known = life._ledger.get_current("references", [])
    _drop_references(life, [entry["key"] for entry in known if gone & life._ids(entry["ids"])])
    copy_receipts(life)
    reached("file")


def copy_receipts(life: Life) -> None:
    """Write the files of receipts that lack one."""
    for receipt in life._ledger.rows("receipt"):
        path = receipt_path(life, int(receipt.body["id"]))
        if not path.exists():
            text = canonical(receipts.receipt_of(receipt)) + "\n"
            write_atomic(path, text.encode(), work=life.home / "work")


def _erase(life: Life, references: Sequence[str]) -> None:
    _drop_references(life, references)
    life._sweep()
    empty(life.home / "work")
    life._ledger.scrub()


def _drop_references(life: Life, stale: Sequence[str]) -> None:
    """Erase references that hold what was forgotten; one in a folder that this life was not given stays, and is named."""
    if not stale or life._store is None:
        return
    for key in stale:
        life._store.erase(key)
    with life._ledger.begin() as tx:
        left = [entry for entry in life._ledger.get_current("references", []) if entry["key"] not in stale]
        tx.set_current("references", left)


def _look_again(life: Life, row: Row) -> list[dict[str, Any]]:
    """Reload what is on disk and ask every holder and the folder itself: what still holds the ids, each with its reason."""
    ids = life._ids(row.body["ids"])
    entry = life._ledger.get_current("snapshots")[-1]
    state = life._fresh_state(life.model)
    if ids:
        state.load(life._snapshots.load(entry["manifest"]), copy.deepcopy(life._blank))
    found = []
    for name, method in state.holders().items():
        records = records_held(method, ids)
        if records:
            found.append({"holder": name, "n": len(records), "why": "records are still stored"})
    stray = life._snapshots.sweep([e["manifest"] for e in life._ledger.get_current("snapshots")], dry=True)
    if stray:
        found.append(
            {"holder": "snapshots", "n": len(stray), "why": "files could not be erased; tried again at every open"}
        )
    return found


def _receipt(life: Life, row: Row, erased: list[str], remaining: list[dict[str, Any]]) -> None:
    """Built from ledger rows only, signed, appended to the chain; the file is a copy."""
    body = row.body
    if any(int(r.body["id"]) == body["number"] for r in life._ledger.rows("receipt")):
        with life._ledger.begin() as tx:
            tx.set_current("owed", None)
        return
    ids = life._ids(body["ids"])
    done = []
    for t in trace(life, ids, erasing=False) if ids else []:
        done.append({"holder": t.holder, "n": len(t.ids), "state": t.state, "action": t.reason})
    open_holders = [entry for entry in done if entry["state"] == "holds"] + remaining
    status = "nothing held" if not ids else "partial" if open_holders else "done"
    asked = next(r for r in life._ledger.rows("asked") if r.body["number"] == body["number"])
    entry = life._ledger.get_current("snapshots")[-1]
    content = {
        "id": str(body["number"]),
        "status": status,
        "n": body["n"],
        "unseen": body["unseen"],
        "ids": body["ids"],
        "by": body["by"],
        "method": body["method"],
        "references": body["seeds"],
        "held": [{"holder": name, "n": n} for name, n in body["held"].items()],
        "done": done,
        "remaining": remaining,
        "evidence": body["evidence"],
        "before": body["before"],
        "after": body["after"],
        "earned": body["earned"],
        "notes": body["notes"],
        "weights_sha256": body["weights_sha256"],
        "not_covered": list(NOT_COVERED),
        "files": receipts.describe(life.home, [life.home / name for name in life._snapshots.files(entry["manifest"])]),
        "erased": erased,
    }
    parts = row.extra["parts"]
    notes = {
        "commitment": asked.extra["commitment"],
        "at": time.time(),
        "cost": {
            "seconds": parts.get("method"),
            "peak_bytes": body["peak_bytes"],
            "reference_seconds": parts["references"] / body["seeds"] if body["seeds"] and parts else None,
        },
    }
    with life._ledger.begin() as tx:
        receipts.seal(tx, content, notes)
        tx.set_current("owed", None)


# -- afterwards -------------------------------------------------------------------------------------------------------


def redact(life: Life) -> list[str]:
    """See `Life.redact`."""
    from remanence.life.plan import without_ids
    from remanence.life.summary import planned

    life._writable()
    if planned(life) > len(life._rows) + life._ledger.get_current("repeated", 0):
        raise Refused(
            "the plan has events to come, which may name ids; live it to its end first (remanence resume HOME)"
        )
    said = []
    rows = life._ledger.rows("receipt")
    for row in rows:
        number, ids = int(row.body["id"]), life._ids(row.body["ids"]) if row.body["n"] else Ids()
        if life._ledger.get_private(f"request/{number}") is None:
            continue
        holding = sorted({t.holder for t in trace(life, ids) if t.state != "deleted"}) if ids else []
        if holding:
            said.append(f"request {number} stays: {', '.join(holding)} not deleted")
            continue
        with life._ledger.begin() as tx:
            tx.delete_private(f"request/{number}")
            life._ledger.lineage.redact(ids)
            tx.append("redacted", {"number": number}, {"at": time.time()})
        said.append(f"request {number} redacted")
    if life._ledger.last("redacted") is not None and not life._ledger.private_keys(
        "request/"
    ):  # also what a kill left undone
        if life._plan is not None:
            life._plan = without_ids(life._plan, "redacted")
            life._write("plan.yaml", life._plan.encode())
        life._replay_rows()
    life._ledger.scrub()
    return said


__all__ = ["NOT_COVERED", "Receipt", "copy_receipts", "finish", "receipt_from", "redact"]
