"""The report of a life: one HTML page that needs nothing else, and the same as tables for the terminal.

    data = json.loads((home / "report.json").read_text())
    page = render_html(data)                                 # str: inline CSS and SVG, no script, no request to anywhere
    rich.print(render_table(data))

Both take the plain dict of `report.json` (its keys and types: `ReportData` in `report_schema`), leave it as it is, and
depend on nothing else: the same dict gives the same bytes. Missing keys and numbers that are not finite are allowed and
shown as a dash. Every text is escaped. States are shown as they are given: a holder is called deleted or unlearned only if
its row says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from remanence.life import report_charts as charts
from remanence.life import report_words as words
from remanence.life.report_schema import ReceiptData, ReportData, complete
from remanence.life.report_table import render_table

#: A receipt's file may be linked if it is a plain path below the report.
_BELOW = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_./-]*")


def render_html(data: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        data: the dict of ``report.json``; keys that are missing are taken as empty.
    """
    report = complete(data)
    stand = words.standings(report)
    columns = charts.Columns(report["events"])
    return template("report.html.j2").render(
        r=report,
        stand=stand,
        tally=words.tally(stand),
        lead=words.lead(report, stand),
        figures=_figures(report),
        learned=_learned(report),
        charts=_charts(report, columns),
        receipts=[_receipt(receipt, i) for i, receipt in enumerate(report["receipts"])],
        loose=_loose(report, stand),
    )


def _charts(report: ReportData, columns: charts.Columns) -> list[tuple[str, str, Markup]]:
    """(heading, note, picture) of everything that is drawn over the events."""
    if not report["events"]:
        return []
    found = [("Events", "", charts.timeline(columns))]
    if report["tasks"] and report["score"] != "accuracy":
        found.append(
            (
                f"{words.SCORE_NAMES.get(report['score'], report['score'])} of each task",
                "on held-out data, after each event; lower is better; a row is a task; shaded from 0 to the largest",
                charts.heat(columns, report["tasks"], report["matrix"], report["score"]),
            )
        )
    elif report["tasks"]:
        found.append(
            (
                "Accuracy of each task",
                "on held-out data, after each event",
                charts.accuracy(columns, report["tasks"], report["matrix"]),
            )
        )
        found.append(
            (
                "The same in numbers",
                f"per cent; a row is a task; shaded from {words.percent(charts.floor(report['matrix']))} to 100 %",
                charts.heat(columns, report["tasks"], report["matrix"]),
            )
        )
    if any(value is not None for item in report["forgotten"] for value in item["series"]):
        note = "held-out examples of it, after each event since; it should stay down"
        found.append(("Accuracy on what was forgotten", note, charts.forgotten(columns, report["forgotten"])))
    if any(any(holder["over_time"]) for holder in report["holders"]):
        found.append(
            ("What the memory costs", "bytes by holder after each event", charts.holdings(columns, report["holders"]))
        )
    return found


def _figures(report: ReportData) -> list[tuple[str, str, str]]:
    """(name, value, convention) of the summary strip."""
    found = []
    for key, figure in report["summary"].items():
        name = words.SUMMARY_NAMES.get(key, key.replace("_", " "))
        found.append((name, words.percent(figure["value"], key in words.SIGNED), figure["convention"]))
    if report["holders"]:
        total = sum(holder["bytes"] for holder in report["holders"])
        found.append(("Memory", words.size(total), f"all {words.count(len(report['holders']), 'holder')} now"))
    seconds = [event["seconds"] for event in report["events"] if event["seconds"] is not None]
    if seconds:
        found.append(("Time", words.duration(sum(seconds)), f"in {words.count(len(seconds), 'event')}"))
    return found


def _learned(report: ReportData) -> list[dict[str, Any]]:
    """Per task: its names, its accuracy (or squared error) now, and right after it was learned."""
    found = []
    for j, task in enumerate(report["tasks"]):
        line = [row[j] for row in report["matrix"]]
        given = [value for value in line if value is not None]
        now = line[-1] if line else None
        found.append(
            {
                "name": words.task_name(task["names"], task["id"]),
                "id": task["id"],
                "now": now,
                "first": given[0] if given else None,
            }
        )
    return found


def _receipt(receipt: ReceiptData, index: int) -> dict[str, Any]:
    """A receipt with what its part of the page needs: merged holder rows, pictures, sentences."""
    before = {row["holder"]: row["n"] for row in receipt["held"]}
    rows = [
        {"holder": d["holder"], "n": before.pop(d["holder"], None), "action": d["action"], "state": d["state"]}
        for d in receipt["done"]
    ]
    rows += [
        {"holder": holder, "n": n, "action": "no later state was recorded", "state": ""} for holder, n in before.items()
    ]
    rows.sort(key=lambda row: words.rank(str(row["state"])))
    states = [str(row["state"]) for row in rows]
    return {
        "r": receipt,
        "key": f"receipt-{receipt['seq']}-{index}",
        "rows": rows,
        "worst": words.worst(states),
        "cells": [(cell, charts.evidence(f"e{index}-{k}", cell)) for k, cell in enumerate(receipt["evidence"])],
        "cost": _cost(receipt),
        "link": receipt["file"] if _BELOW.fullmatch(receipt["file"]) else None,
    }


def _cost(receipt: ReceiptData) -> str:
    cost = receipt["cost"]
    if cost["seconds"] is None:
        return "What it cost was not recorded."
    text = f"It took {words.duration(cost['seconds'])}."
    if cost["reference_seconds"] is not None:
        text = text[:-1] + f"; retraining once without these examples takes {words.duration(cost['reference_seconds'])}"
        if (share := cost["fraction_of_retraining"]) is not None:
            text += f", so this was {words.number(share, 2)} of a retraining"
        text += "."
    return text


def _loose(report: ReportData, stand: list[words.Standing]) -> list[Any]:
    """Trace rows that belong to no event of the report: shown as well, nothing is swept under the rug."""
    shown = {id(row) for item in stand for row in item.rows}
    return sorted((row for row in report["trace"] if id(row) not in shown), key=lambda row: words.rank(row["state"]))


@cache
def template(name: str) -> Template:
    """A compiled page; it escapes every text, and cannot reach any file but its own folder."""
    environment = Environment(
        loader=PackageLoader("remanence.life", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=words.percent,
        figure=words.figure,
        number=words.number,
        size=words.size,
        duration=words.duration,
        listed=words.listed,
        asked=words.asked,
        capital=_capital,
    )
    environment.globals.update(
        icon=charts.state_icon,
        counted=words.count,
        meaning=words.MEANING,
        score_names=words.SCORE_NAMES,
        status_glyphs=words.STATUS_GLYPHS,
        marker=charts.marker,
    )
    return environment.get_template(name)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


__all__ = ["ReportData", "render_html", "render_table"]
