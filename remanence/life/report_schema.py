"""What a report is drawn from: the dict of `report.json`, its types, and how it is made safe to draw.

The dict is plain JSON. Keys that are missing get an empty value, a number that is not finite becomes None, and text loses
what a page or a terminal would act on (control characters, changes of writing direction, lone surrogates). Accuracies are
shares, 0 to 1; `bytes` are bytes; `seconds` are seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypedDict, cast


class Consumed(TypedDict):
    new: int
    replayed: int


class EventData(TypedDict):
    """One event. `kind`: ``learn`` or ``forget``; `status`: ``done``, ``partial``, ``failed``, ``refused``, ``nothing
    held`` or ``in progress``; `keep`: slugs of the keepers."""

    seq: int
    kind: str
    label: str
    by: str
    keep: list[str]
    where: str | None
    status: str
    seconds: float | None
    peak_bytes: int | None
    steps: int
    consumed: Consumed
    measures: dict[str, Any]


class TaskData(TypedDict):
    id: Any
    names: list[str]


class FigureData(TypedDict):
    """A summary figure and, in words, which of the definitions in use it follows."""

    value: float | None
    convention: str


class ForgottenData(TypedDict):
    """Held-out accuracy on what forget event `event` removed: one value per event, or per event after it."""

    event: int
    label: str
    series: list[float | None]


class HolderData(TypedDict):
    """Bytes of one holder now, and after each event (`over_time` may be empty: it is then not drawn)."""

    name: str
    kind: str
    bytes: int
    over_time: list[int]


class TraceData(TypedDict):
    """What became of a request's `n` examples in one holder; `inputs` are the holders it was computed from."""

    request: str
    holder: str
    n: int
    state: str
    reason: str
    inputs: list[str]


class HeldData(TypedDict):
    holder: str
    n: int


class DoneData(TypedDict):
    holder: str
    action: str
    state: str


class CellData(TypedDict):
    """One measured figure: after the method, with nothing done, and over `n` references; `ci95` is a half width.

    `direction`: ``nearest`` (as near to the references as possible) or ``lower``; `range`: the figure's range in words.
    """

    metric: str
    after: float | None
    nothing: float | None
    reference_mean: float | None
    reference_sd: float | None
    n: int
    ci95: float | None
    direction: str
    verdict: str
    range: str


class CostData(TypedDict):
    seconds: float | None
    reference_seconds: float | None
    fraction_of_retraining: float | None
    peak_bytes: int | None


class ReceiptData(TypedDict):
    """A receipt. `earned` says why *unlearned* was or was not earned; `file` is relative to the report."""

    request: str
    seq: int
    status: str
    by: str
    n: int
    asked_plain: str
    held: list[HeldData]
    done: list[DoneData]
    evidence: list[CellData]
    earned: str
    cost: CostData
    not_covered: list[str]
    file: str
    signer: str
    hash: str


class ReportData(TypedDict):
    """`matrix`: one row per event, one column per task, of `score`: ``accuracy``, or ``mse`` of a regression. `state`: ``complete`` or
    ``in progress``."""

    name: str
    life: str
    state: str
    weights_sha256: str
    content_digest: str
    events: list[EventData]
    tasks: list[TaskData]
    score: str
    matrix: list[list[float | None]]
    summary: dict[str, FigureData]
    forgotten: list[ForgottenData]
    holders: list[HolderData]
    trace: list[TraceData]
    receipts: list[ReceiptData]
    plan: str | None
    versions: dict[str, Any]
    drift: list[Any]


_EVENT = {
    "seq": 0,
    "kind": "",
    "label": "",
    "by": "",
    "keep": [],
    "where": None,
    "status": "",
    "seconds": None,
    "peak_bytes": None,
    "steps": 0,
    "consumed": {},
    "measures": {},
}
_CELL = {
    "metric": "",
    "after": None,
    "nothing": None,
    "reference_mean": None,
    "reference_sd": None,
    "n": 0,
    "ci95": None,
    "direction": "",
    "verdict": "",
    "range": "",
}
_RECEIPT = {
    "request": "",
    "seq": 0,
    "status": "",
    "by": "",
    "n": 0,
    "asked_plain": "",
    "held": [],
    "done": [],
    "evidence": [],
    "earned": "",
    "cost": {},
    "not_covered": [],
    "file": "",
    "signer": "",
    "hash": "",
}
_REPORT: dict[str, Any] = {
    "name": "",
    "life": "",
    "state": "",
    "weights_sha256": "",
    "content_digest": "",
    "events": [],
    "tasks": [],
    "score": "accuracy",
    "matrix": [],
    "summary": {},
    "forgotten": [],
    "holders": [],
    "trace": [],
    "receipts": [],
    "plan": None,
    "versions": {},
    "drift": [],
}
#: Control characters but tab and newline, marks that change the direction of text, and lone surrogates.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def safe(value: Any) -> Any:
    """`value` with text that can be drawn and only finite numbers; what JSON does not know becomes its `str`."""
    if isinstance(value, str):
        return _UNSAFE.sub("\ufffd", value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(safe(str(key))): safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [safe(item) for item in value]
    return safe(str(value))


def complete(data: Mapping[str, Any]) -> ReportData:
    """`data`, safe to draw and with every key: a life without events is a report too."""
    report = _filled(safe(data), _REPORT)
    report["events"] = [_filled(event, _EVENT) for event in report["events"]]
    for event in report["events"]:
        event["consumed"] = _filled(event["consumed"], {"new": 0, "replayed": 0})
    report["tasks"] = [_filled(task, {"id": "", "names": []}) for task in report["tasks"]]
    width = len(report["tasks"])
    rows = [[*(row or []), *[None] * width][:width] for row in report["matrix"]]
    report["matrix"] = [*rows, *[[None] * width for _ in report["events"]]][: len(report["events"])]
    report["summary"] = {
        name: _filled(figure if isinstance(figure, dict) else {"value": figure}, {"value": None, "convention": ""})
        for name, figure in report["summary"].items()
    }
    report["forgotten"] = [_filled(item, {"event": 0, "label": "", "series": []}) for item in report["forgotten"]]
    report["holders"] = [
        _filled(item, {"name": "", "kind": "", "bytes": 0, "over_time": []}) for item in report["holders"]
    ]
    trace = {"request": "", "holder": "", "n": 0, "state": "", "reason": "", "inputs": []}
    report["trace"] = [_filled(item, trace) for item in report["trace"]]
    report["receipts"] = [_filled(item, _RECEIPT) for item in report["receipts"]]
    for receipt in report["receipts"]:
        receipt["held"] = [_filled(item, {"holder": "", "n": 0}) for item in receipt["held"]]
        receipt["done"] = [_filled(item, {"holder": "", "action": "", "state": ""}) for item in receipt["done"]]
        receipt["evidence"] = [_filled(item, _CELL) for item in receipt["evidence"]]
        cost = {"seconds": None, "reference_seconds": None, "fraction_of_retraining": None, "peak_bytes": None}
        receipt["cost"] = _filled(receipt["cost"], cost)
    return cast(ReportData, report)


def _filled(given: Mapping[str, Any] | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `defaults`; None counts as missing where the default is a list, a dict, a text or a number."""
    found = {key: value.copy() if isinstance(value, (list, dict)) else value for key, value in defaults.items()}
    for key, value in (given or {}).items():
        if value is not None or defaults.get(key) is None:
            found[key] = value
    return found
