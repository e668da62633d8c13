"""The life as plain JSON: what `report.json` holds and the page and the table are drawn from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from remanence.core.ids import Ids
from remanence.life.erasing import receipt_from
from remanence.life.ledger import Row
from remanence.life.references import kept_bytes
from remanence.life.snapshots import weights_sha256
from remanence.life.state import state_bytes
from remanence.measure import matrix as figures

if TYPE_CHECKING:
    from remanence.life.life import Life

_KINDS = {
    "learn": "statistics",
    "keep": "statistics",
    "weights": "weights",
    "snapshots": "snapshot",
    "references": "snapshot",
}


def summary(life: Life) -> dict[str, Any]:
    """Everything the report shows; no example, id or per-example value is in it."""
    rows = list(life._rows)
    born = life._born.body
    lived = len(rows) + life._ledger.get_current("repeated", 0)  # a repeated request of the plan is no event of its own
    tasks = {row.body["task"]["id"]: row.body["task"]["names"] for row in rows if row.kind == "learn"}
    columns = list(tasks)
    told = life.problem.main == "accuracy"
    matrix = [[row.body["accuracy"].get(str(task)) for task in columns] for row in rows]  # of a regression: mse
    return {
        "name": born["name"],
        "life": life._ledger.life,
        "state": "in progress" if life._ledger.get_current("owed") or planned(life) > lived else "complete",
        "weights_sha256": weights_sha256(life.model.state_dict()),
        "content_digest": life.content_digest(),
        "events": [_event(life, row) for row in rows],
        "tasks": [{"id": task, "names": names} for task, names in tasks.items()],
        "score": life.problem.main,
        "matrix": matrix,
        "summary": _figures(rows, columns) if told else {},
        "forgotten": _forgotten(rows),
        "holders": _holders(life, rows),
        "trace": _traces(life, rows),
        "receipts": [_receipt(life, row) for row in life._ledger.rows("receipt")],
        "plan": _plan_text(life),
        "versions": life._born.extra["versions"],
        "drift": [row.extra["changed"] for row in life._ledger.rows("drift")],
    }


def planned(life: Life) -> int:
    """How many events the life's plan has; 0 without a plan."""
    if life._plan is None or life._plan.startswith("# removed"):
        return 0
    from remanence.life.yaml import parse

    return len(parse(life._plan, "plan.yaml").data["events"])  # checked when it was run; only counted here


def asked_plain(life: Life, number: int) -> str:
    """A request in words, from the private table; its number where it was redacted."""
    private = life._ledger.get_private(f"request/{number}")
    return str(private["plain"]) if private else f"request {number} (redacted)"


def _event(life: Life, row: Row) -> dict[str, Any]:
    body = row.body
    learning = row.kind == "learn"
    status = "done"
    if not learning:
        receipt = next((r.body for r in life._ledger.rows("receipt") if r.body["id"] == str(body["number"])), None)
        status = receipt["status"] if receipt else "in progress"
    return {
        "seq": body["event"],
        "kind": row.kind,
        "label": body["label"] if learning else f"forget {asked_plain(life, body['number'])}",
        "by": body["learner"] if learning else body["by"],
        "keep": body["keep"],
        "where": ", ".join(body["where"]) or None,
        "status": status,
        "seconds": row.extra["seconds"],
        "peak_bytes": None,
        "steps": body["steps"],
        "consumed": body.get("consumed", {"new": 0, "replayed": 0}),
        "measures": body["measures"],
    }


def _figures(rows: list[Row], columns: list[int]) -> dict[str, Any]:
    """The summary over learn events: one row each, as the metrics' definitions ask for."""
    learned = [row for row in rows if row.kind == "learn"]
    table = [[row.body["accuracy"].get(str(task), math.nan) for task in columns] for row in learned]
    found: dict[str, Any] = {}
    for name, function, convention in (
        ("average_accuracy", figures.average_accuracy, "mean over tasks after the last learn event"),
        (
            "average_incremental_accuracy",
            figures.average_incremental_accuracy,
            "mean over learn events of the mean over tasks seen",
        ),
        ("forgetting", figures.forgetting, "Chaudhry 2018: best earlier accuracy minus the last, mean over old tasks"),
        (
            "backward_transfer",
            figures.backward_transfer,
            "Lopez-Paz 2017: last accuracy minus that right after learning, mean over old tasks",
        ),
    ):
        value = float(function(table)) if table else math.nan
        found[name] = {"value": value if math.isfinite(value) else None, "convention": convention}
    found["forward_transfer"] = {
        "value": None,
        "convention": "not measured: tasks are not tested before they are learned",
    }
    return found


def _forgotten(rows: list[Row]) -> list[dict[str, Any]]:
    """Held-out accuracy of wholly forgotten classes after each event since, one series per class."""
    labels = sorted({label for row in rows for label in row.body["lost"]})
    found = []
    for label in labels:
        series = [row.body["lost"].get(label) for row in rows]
        first = next(i for i, value in enumerate(series) if value is not None)
        found.append({"event": rows[first].body["event"], "label": label, "series": series})
    return found


def _holders(life: Life, rows: list[Row]) -> list[dict[str, Any]]:
    now = {**state_bytes(life._state), "snapshots": life._snapshot_bytes(), **kept_bytes(life)}
    names = list(dict.fromkeys([name for row in rows for name in row.body["holders"]] + list(now)))
    return [
        {
            "name": name,
            "kind": "buffer" if "replay" in name or "fpf" in name else _KINDS.get(name.split("/")[0], "statistics"),
            "bytes": now.get(name, 0),
            "over_time": [row.body["holders"].get(name, 0) for row in rows]
            if name not in ("snapshots", "references")
            else [],
        }
        for name in names
    ]


def _traces(life: Life, rows: list[Row]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        if row.kind == "forget" and row.body["n"]:
            ids: Ids = life._ids(row.body["ids"])
            for t in life.trace(ids) if ids else []:
                found.append(
                    {
                        "request": f"forget {asked_plain(life, row.body['number'])}",
                        "holder": t.holder,
                        "n": len(t.ids),
                        "state": t.state,
                        "reason": t.reason,
                        "inputs": list(t.inputs),
                    }
                )
    return found


def _receipt(life: Life, row: Row) -> dict[str, Any]:
    body = row.body
    receipt = receipt_from(life, row)
    cost = dict(row.extra["notes"]["cost"])
    known = cost.get("seconds") is not None and cost.get("reference_seconds")
    cost["fraction_of_retraining"] = cost["seconds"] / cost["reference_seconds"] if known else None
    event = next(r.body["event"] for r in life._ledger.rows("forget") if r.body["number"] == receipt.number)
    return {
        "request": f"forget {asked_plain(life, receipt.number)}",
        "seq": event,
        "status": body["status"],
        "by": body["by"],
        "n": body["n"],
        "asked_plain": asked_plain(life, receipt.number),
        "held": body["held"],
        "done": body["done"],
        "evidence": body["evidence"],
        "earned": body["earned"],
        "cost": cost,
        "not_covered": body["not_covered"],
        "file": f"receipts/{receipt.path.name}",
        "signer": row.extra["key"],
        "hash": row.hash,
    }


def _plan_text(life: Life) -> str | None:
    """The plan without the ids it names: a report carries no id."""
    from remanence.life.plan import without_ids

    return None if life._plan is None else without_ids(life._plan, "[...]")
