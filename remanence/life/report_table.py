"""The report of a life as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from remanence.life.report_schema import ReceiptData, ReportData, complete
from remanence.life.report_words import (
    DASH,
    GLYPHS,
    MEANING,
    SIGNED,
    STATUS_GLYPHS,
    SUMMARY_NAMES,
    Standing,
    asked,
    count,
    duration,
    lead,
    listed,
    number,
    percent,
    standings,
    task_name,
    worst,
)

_STYLES = {"holds": "bold red", "suppressed": "yellow", "unlearned": "blue", "deleted": "green"}


def render_table(data: Mapping[str, Any]) -> RenderableType:
    """What `rich` prints of a life: the events, the summary, the receipts in a few lines, where the forgotten examples are.

    Args:
        data: the dict of ``report.json``; texts are shown as they are, without rich's markup.
    """
    report = complete(data)
    stand = standings(report)
    parts: list[RenderableType] = [
        Text(" ".join([report["name"], *([f"({report['state']})"] if report["state"] else [])]).strip(), style="bold")
    ]
    parts += [Text(sentence) for sentence in lead(report, stand)]
    if report["events"]:
        parts += [Text(), _events(report)]
    if report["summary"]:
        parts += [Text(), _summary(report)]
    for receipt in report["receipts"]:
        parts += [Text(), _receipt(receipt)]
    if stand:
        parts += [Text(), _trace(stand)]
    if report["drift"]:
        parts += [
            Text(),
            Text(
                f"Not exact: continued although something had changed ({'; '.join(map(str, report['drift']))}).",
                style="red",
            ),
        ]
    return Group(*parts)


def _table(*columns: tuple[str, bool] | tuple[str, bool, int]) -> Table:
    """A plain table; a column is (heading, whether it holds figures, and the width below which it is never squeezed)."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold")
    for heading, right, *width in columns:
        narrowest = width[0] if width else None
        table.add_column(
            Text(heading), justify="right" if right else "left", no_wrap=right, overflow="fold", min_width=narrowest
        )
    return table


def _events(report: ReportData) -> Table:
    """One row per event: how accurate each task was after it, in per cent; for a regression its mean squared error."""
    names = [task_name(task["names"], task["id"]) for task in report["tasks"]]
    if report["score"] != "accuracy":
        names = [f"{report['score']}, {name}" for name in names]
    table = _table(("#", True), ("event", False, 20), *[(name, True) for name in names], ("time", True), ("", False, 2))
    for event, row in zip(report["events"], report["matrix"], strict=True):
        shown = [None if v is None else f"{100 * v:.1f}" if report["score"] == "accuracy" else number(v) for v in row]
        cells = [Text("·", style="dim") if value is None else Text(value) for value in shown]
        status, forgets = event["status"], event["kind"] == "forget"
        said = STATUS_GLYPHS.get(status, "?") + ("" if status == "done" else f" {status}")
        label = Text.assemble((event["label"], "bold" if forgets else ""), (f" · {event['by']}", "dim"))
        table.add_row(
            Text(str(event["seq"])),
            label,
            *cells,
            Text(duration(event["seconds"])),
            Text(said, style="" if status == "done" else "bold yellow"),
        )
    return table


def _summary(report: ReportData) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for key, figure in report["summary"].items():
        name = SUMMARY_NAMES.get(key, key.replace("_", " "))
        table.add_row(
            Text(name),
            Text(percent(figure["value"], key in SIGNED), justify="right"),
            Text(figure["convention"], style="dim"),
        )
    return table


def _receipt(receipt: ReceiptData) -> Group:
    head = Text.assemble(
        ("Receipt ", "bold"),
        (receipt["asked_plain"] or asked(receipt["request"]), "bold"),
        f": {STATUS_GLYPHS.get(receipt['status'], '?')} {receipt['status']}; {count(receipt['n'], 'example')} by {receipt['by']}",
    )
    if receipt["cost"]["seconds"] is not None:
        head.append(f"; {duration(receipt['cost']['seconds'])}")
        if receipt["cost"]["reference_seconds"] is not None:
            head.append(f", a retraining {duration(receipt['cost']['reference_seconds'])}")
    lines: list[RenderableType] = [head]
    if state := worst(row["state"] for row in receipt["done"]):
        where = list(dict.fromkeys(row["holder"] for row in receipt["done"] if row["state"] == state))
        lines.append(Text.assemble("  then, at worst: ", _state(state), f" in {listed(where)}"))
    if receipt["evidence"]:
        n = max(cell["n"] for cell in receipt["evidence"])
        table = _table(
            ("  figure", False, 20),
            ("after", True),
            ("do nothing", True),
            (f"retrained (n={n})", True),
            ("reading", False, 16),
        )
        for cell in receipt["evidence"]:
            mean = number(cell["reference_mean"])
            if cell["ci95"] is not None:
                mean += f" ± {number(cell['ci95'])}"
            row = (
                f"  {cell['metric']}",
                number(cell["after"]),
                number(cell["nothing"]),
                mean if cell["n"] == n else f"{mean} (n={cell['n']})",
                cell["verdict"],
            )
            table.add_row(*[Text(word) for word in row])
        lines.append(table)
    if receipt["earned"]:
        lines.append(Text(f"  unlearned? {receipt['earned']}"))
    if receipt["not_covered"]:
        lines.append(Text(f"  not covered: {'; '.join(receipt['not_covered'])}", style="dim"))
    if receipt["file"]:
        lines.append(Text(f"  {receipt['file']}", style="dim"))
    return Group(*lines)


def _trace(stand: Sequence[Standing]) -> Table:
    table = _table(
        ("request", False, 9), ("state now", False, 11), ("holder", False, 11), ("n", True), ("why", False, 20)
    )
    for item in stand:
        name = asked(item.event["label"])
        for k, row in enumerate(item.rows):
            why = row["reason"] + (f" (from {listed(row['inputs'])})" if row["inputs"] else "")
            table.add_row(
                Text(name if k == 0 else "", style="bold"),
                _state(row["state"]),
                Text(row["holder"]),
                Text(number(row["n"])),
                Text(why),
            )
        if not item.rows:
            table.add_row(
                Text(name, style="bold"),
                Text(item.event["status"] or "not traced"),
                Text(DASH),
                Text(DASH),
                Text(item.words),
            )
    return table


def _state(state: str) -> Text:
    return Text(
        f"{GLYPHS.get(state, '?')} {state or 'not recorded'}", style=_STYLES[state] if state in MEANING else "bold"
    )
