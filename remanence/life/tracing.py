"""Where an example lives: every holder, what became of the ids there, and why."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from remanence.core.holder import STATES, Holder
from remanence.core.ids import Ids
from remanence.life.books import Books
from remanence.life.record import Trace, apply_row

if TYPE_CHECKING:
    from remanence.life.life import Life


def trace(life: Life, ids: Ids, erasing: bool | None = None) -> list[Trace]:
    """See `Life.trace`. `erasing`: whether an erasure is owed, in which case nothing counts as gone yet; None: ask the ledger."""
    owed = life._ledger.get_current("owed") if erasing is None else erasing
    rows: list[Trace] = []
    for found, state, why in life._books.weights(ids):
        rows.append(Trace("weights", found, state, (), why))
    for name, method in life._state.holders().items():
        records = records_held(method, ids)
        if records:
            rows.append(Trace(name, records, "holds", (), "a copy, or a sum that counts them, is stored"))
        derived = (ids - records) & method.inputs if method.derived() else Ids()
        for found, state, why in life._books.weights(derived):
            rows.append(Trace(name, found, state, ("weights",), f"computed by the weights ({why})"))
        for why, purged in _once_held(life, name, ids).items():
            if gone := purged - records - derived:
                rows.append(Trace(name, gone, "deleted", (), why))
    rows += _snapshots(life, ids) + _checkpoint(life, ids) + _references(life, ids)
    if owed:
        rows = [Trace(t.holder, t.ids, "holds", t.inputs, f"erasing: {t.reason}") for t in rows]
    return sorted(rows, key=lambda t: STATES.index(t.state))


def _once_held(life: Life, holder: str, ids: Ids) -> dict[str, Ids]:
    """Those of `ids` that a forget found in `holder`, by what became of them there."""
    found: dict[str, Ids] = {}
    for row in life._rows:
        if row.kind == "forget" and holder in row.body["held"]:
            why = row.body["why"] if holder == row.body["through"] else "purged on request; no copy is left"
            found[why] = found.get(why, Ids()) | (ids & life._ids(row.body["ids"]))
    return found


def _snapshots(life: Life, ids: Ids) -> list[Trace]:
    """Saved states still on disk, each with what the weights held when it was made."""

    @functools.cache
    def mine_in(digest: str) -> Ids:
        return life._ledger.lineage.intersect(digest, ids)  # ids are traced one by one: the others need not be read

    rows: list[Trace] = []
    entries = life._ledger.get_current("snapshots", [])
    for entry in entries:
        if not entry["event"]:
            continue
        books = Books()
        for row in life._rows:
            if row.body["event"] <= entry["event"]:
                apply_row(books, row, mine_in)
        counted = (
            ids & books.touched - books.consumed - books.tombstones
        )  # taken in without training: counted, or stored
        for found, state, why in [
            *books.weights(ids),
            (counted, "holds", "a copy, or a sum that counts them, is stored"),
        ]:
            rows.append(
                Trace(
                    f"snapshots/{entry['event']}",
                    found,
                    state,
                    ("weights",),
                    f"saved after event {entry['event']}: {why}",
                )
            )
    alive = {f"snapshots/{entry['event']}" for entry in entries}
    for row in life._rows:
        if row.kind == "forget":
            mine = ids & life._ids(row.body["ids"]) if row.body["n"] else Ids()
            for holder in row.body["held"]:
                if mine and holder.startswith("snapshots/") and holder not in alive:
                    rows.append(
                        Trace(
                            holder,
                            mine & consumed_by(life, int(holder.split("/")[1])),
                            "deleted",
                            (),
                            "the file was erased",
                        )
                    )
    return [row for row in rows if row.ids]


def _checkpoint(life: Life, ids: Ids) -> list[Trace]:
    """The snapshot inside an event that was stopped: it goes with the next event that is committed."""
    saved = life._ledger.get_current("checkpoint")
    if not saved:
        return []
    at = life._snapshots.load(saved["manifest"])["position"]
    found = ids & (life._books.holding() | Ids(at["new"].numpy()) | Ids(at["replayed"].numpy()))
    return (
        [Trace("snapshots/checkpoint", found, "holds", (), "saved inside an event that was stopped")] if found else []
    )


def _references(life: Life, ids: Ids) -> list[Trace]:
    """Models retrained for evidence that are kept: each holds what it was trained on, until a request erases it."""
    rows = [
        Trace(
            f"references/{entry['key'][:8]}",
            ids & life._ids(entry["ids"]),
            "holds",
            (),
            "a model retrained for evidence learned them",
        )
        for entry in life._ledger.get_current("references", [])
        if life._store is None or entry["key"] in life._store  # another life may have erased a shared one
    ]
    alive = {row.holder for row in rows}
    for row in life._rows:
        if row.kind == "forget" and row.body["n"]:
            for holder in row.body["held"]:
                if holder.startswith("references/") and holder not in alive:
                    rows.append(
                        Trace(holder, ids & life._ids(row.body["ids"]), "deleted", (), "the reference was erased")
                    )
    return [row for row in rows if row.ids]


def consumed_by(life: Life, event: int) -> Ids:
    """Ids consumed by the learn events up to event number `event`."""
    found = Ids()
    for row in life._rows:
        if row.kind == "learn" and row.body["event"] <= event:
            found = found | life._ids(row.body["new"]) | life._ids(row.body["replayed"])
    return found


def records_held(method: Any, ids: Ids) -> Ids:
    """Ids whose records (not values computed by weights) are in the method's memory."""
    found = Ids()
    for value in method.remembered().values():
        if isinstance(value, Holder) and not getattr(value, "derived", False):
            found = found | value.holds(ids)
    return found
