"""A comparison as tables: for the terminal, as CSV, Markdown and one HTML page with its picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from remanence.life.files import write_atomic
from remanence.life.grid import AS_PLANNED, AXES
from remanence.life.report import template
from remanence.life.report_charts import el, marker, svg
from remanence.life.report_words import DASH, number, percent, size

#: Columns of the table of lives: (figure, heading, how a value is said).
_LIVES = (
    ("average_accuracy", "average accuracy", percent),
    ("average_incremental_accuracy", "incremental", percent),
    ("forgetting", "forgetting", percent),
    ("seconds", "seconds", lambda value: number(value, 1)),
    ("bytes", "memory", size),
)
#: These only where one of the variants learned by `joint`.
_JOINT = (("omega_all", "Omega", lambda value: number(value, 2)), ("intransigence", "intransigence", percent))
_MEMORY = "memory"
#: What the picture shows: how far the request is from retrained, against what that did to everything else.
FORGOTTEN, UTILITY = "KL from references", "test accuracy"
#: Sets of examples that KLoM is told of, where it was asked for.
_KLOM = ("forget", "retain", "test")


def write(folder: Path, data: Mapping[str, Any]) -> Path:
    """Write ``comparison.csv``, ``.md`` and ``.html`` beside ``comparison.json``; returns the page's path."""
    write_atomic(folder / "comparison.csv", as_csv(data).encode())
    write_atomic(folder / "comparison.md", as_markdown(data).encode())
    write_atomic(folder / "comparison.html", as_html(data).encode())
    return folder / "comparison.html"


def stat(value: Mapping[str, Any] | None, say: Any = number) -> str:
    """``mean ± half width``; a single seed has no ±."""
    if value is None:
        return DASH
    text = str(say(value["mean"]))
    return text if value["half"] is None else f"{text} ± {str(say(value['half'])).lstrip('+')}"


def varied(data: Mapping[str, Any]) -> list[str]:
    """The axes on which anything differs from the plan."""
    return [axis for axis in AXES if any(row[axis] != AS_PLANNED for row in data["lives"])]


def lives_table(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: a variant, its figures, and its difference to the first in average accuracy, paired by seed."""
    axes = varied(data)
    figures = [*_LIVES, *[each for each in _JOINT if any(each[0] in row["figures"] for row in data["lives"])]]
    heading = [*["budget" if axis == _MEMORY else axis for axis in axes], *[name for _, name, _ in figures]]
    heading.append("against the first")
    rows = []
    for row in data["lives"]:
        cells = [stat(row["figures"].get(key), say) for key, _, say in figures]
        difference = stat(row["difference"], lambda value: percent(value, True)) if row["difference"] else DASH
        rows.append([*[row[axis] for axis in axes], *cells, difference])
    return heading, rows


def memory_table(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of accuracy against memory: for each variant its incremental and its last accuracy at every budget, and in
    brackets what its stores hold there; the area over the budgets, and accuracy per MB at the smallest and at the largest."""
    made = data["memory"]
    axes = [axis for axis in varied(data) if axis != _MEMORY]
    rows = []
    for row in made["rows"]:
        cells = []
        for point in row["points"]:
            held = f" ({number(point['stored'])})" if point["stored"] is not None else ""
            cells.append(point["outside"] or stat(point["value"], percent) + held)
        cells.append(stat(row["auc"], lambda value: number(value, 4)))
        cells += [stat(row[key], lambda value: number(100 * value, 1)) for key in ("apm_s", "apm_e")]
        said = "incremental" if row["area"] == "AUC-A" else "last"
        rows.append([*[row[axis] for axis in axes], said, *cells])
    budgets = [size(budget) for budget in made["budgets"]]
    return [*axes, "accuracy", *budgets, "AUC", "APM-S", "APM-E"], rows


MEMORY_NOTE = (
    "All that remembers at the end of the life, network and stores together, fits into the budget; in brackets what its stores may hold. "
    "AUC is the area under the curve by the trapezoid rule, in accuracy (a share) x MB: AUC-A of incremental, AUC-L of last accuracy, "
    "where a variant fits into every budget. APM-S and APM-E are % per MB at the smallest and the largest. Old data that a method reads "
    "again from the stream, as joint does, is in no budget."
)


def request_table(data: Mapping[str, Any], request: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of one request: distances to retrained models with what they say, and cost as a share of retraining."""
    metrics = list(dict.fromkeys(metric for row in request["rows"] for metric in row["gaps"]))
    rows = []
    for row in request["rows"]:
        cells = []
        for metric in metrics:
            verdict = row["verdicts"].get(metric)
            cells.append(stat(row["gaps"].get(metric)) + (f" ({verdict})" if verdict else ""))
        cells += [_klom(row, part, True) for part in _KLOM if "klom" in request]
        peak = size(row["peak"]["mean"]) if row["peak"] else DASH
        rows.append(
            [row["by"], *cells, stat(row["cost"], lambda value: number(value, 2)), peak, ", ".join(row["states"])]
        )
    heading = [*metrics, *[f"KLoM {part}" for part in _KLOM if "klom" in request]]
    return ["method", *heading, "cost", "memory", "weights"], rows


def _klom(row: Mapping[str, Any], part: str, whole: bool = False) -> str:
    """The mean over examples, and in brackets the 95th percentile."""
    value = row.get("klom", {}).get(part)
    if value is None:
        return DASH
    return number(value["mean"], 2) + (f" (95 %: {number(value['p95'], 2)})" if whole else "")


def title(request: Mapping[str, Any]) -> str:
    """``forget class 3, keep replay``"""
    setting = [f"{axis} {request[axis]}" for axis in AXES if request.get(axis, AS_PLANNED) != AS_PLANNED]
    return ", ".join([f"forget {request['request']}", *setting])


NOTE = (
    "Distances to models retrained without the request: the nearer to 0 the better, from either side; mean over seeds ± half of the 95 % "
    "interval. Cost is a share of one retraining."
)


def note(data: Mapping[str, Any]) -> str:
    """What the figures of the requests are."""
    found = next((request["klom"] for request in data["requests"] if "klom" in request), None)
    if found is None:
        return NOTE
    return (
        f"{NOTE} KLoM is the KL of the margins of {found['lives']} networks from those of {found['oracles']} retrained ones ({found['estimator']} "
        f"estimator), in nats, mean and 95th percentile over examples; it is never 0 with so few: the row of another seed is its floor."
    )


#: A verdict as a glyph, for the terminal.
GLYPHS = {
    "indistinguishable from retraining": "✓",
    "closer than doing nothing": "↗",
    "no closer": "=",
    "farther": "✕",
    "this request cannot tell": "?",
    "spread unknown": "·",
}
LEGEND = "; ".join(f"{glyph} {verdict}" for verdict, glyph in GLYPHS.items())


def render(data: Mapping[str, Any]) -> RenderableType:
    """What `rich` prints of a comparison; one membership attack of several stands here, all of them in the files."""
    parts: list[RenderableType] = [
        Text(f"{data['name']}: {len(data['lives'])} variants, seeds {', '.join(map(str, data['seeds']))}", style="bold")
    ]
    heading, rows = lives_table(data)
    parts.append(_table([name.replace("average accuracy", "accuracy") for name in heading], rows, len(varied(data))))
    if _MEMORY in data:
        heading, rows = memory_table(data)
        parts += [_table(heading, rows, heading.index("accuracy") + 1), Text(MEMORY_NOTE, style="dim")]
    for request in data["requests"]:
        parts += [Text(title(request), style="bold"), _compact(request)]
    if data["requests"]:
        parts += [Text(note(data), style="dim"), Text(LEGEND, style="dim")]
    parts += [Text(line, style="bold red") for line in _failed(data)]
    return Group(*parts)


def _compact(request: Mapping[str, Any]) -> Table:
    metrics = list(dict.fromkeys(metric for row in request["rows"] for metric in row["gaps"]))
    attacks = [metric for metric in metrics if metric.startswith("membership")]
    shown = [metric for metric in metrics if metric not in attacks[1:]]
    rows = []
    for row in request["rows"]:
        cells = [f"{stat(row['gaps'].get(m))} {GLYPHS.get(row['verdicts'].get(m), ' ')}" for m in shown]
        cells += [_klom(row, "forget")] if "klom" in request else []
        rows.append([row["by"], *cells, stat(row["cost"], lambda value: number(value, 2))])
    names = {"KL from references": "KL", attacks[0] if attacks else "": "MIA AUC"}
    heading = [
        *[names.get(m, m.replace(" accuracy", " acc.")) for m in shown],
        *(["KLoM"] if "klom" in request else []),
    ]
    return _table(["method", *heading, "cost"], rows, 1)


def _failed(data: Mapping[str, Any]) -> list[str]:
    """A line for each variant and reason, with the seeds; what only does not go together is no failure."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for entry in data["failed"]:
        names = ", ".join(f"{axis} {entry[axis]}" for axis in AXES if entry[axis] != AS_PLANNED)
        seeds.setdefault((names, entry["error"]), []).append(str(entry["seed"]))
    return [
        f"{'not lived' if refused(error) else 'failed'}: {names}, seed {', '.join(numbers)}: {error}"
        for (names, error), numbers in seeds.items()
    ]


def refused(error: str) -> bool:
    """Whether a life was refused because its parts, network and data do not go together."""
    return error.startswith("BadInput")


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold")
    for at, name in enumerate(heading):
        table.add_column(
            Text(name), justify="left" if at < words else "right", overflow="fold", min_width=14 if at < words else 7
        )
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    return table


def as_csv(data: Mapping[str, Any]) -> str:
    """One line per variant and figure: table, the axes, request, method, figure, mean, half, n, verdict."""
    out = io.StringIO()
    sheet = csv.writer(out, lineterminator="\n")
    sheet.writerow(
        [
            "table",
            "learner",
            "keep",
            "where",
            "budget",
            "request",
            "forget",
            "figure",
            "mean",
            "half_width_95",
            "n",
            "verdict",
        ]
    )

    def line(
        table: str,
        row: Mapping[str, Any],
        request: str,
        forget: str,
        figure: str,
        value: Mapping[str, Any] | None,
        verdict: str = "",
    ) -> None:
        if value is not None:
            half = "" if value["half"] is None else value["half"]
            names = [_safe(str(row[axis])) for axis in AXES[:-1]]
            sheet.writerow(
                [table, *names, _safe(request), _safe(forget), figure, value["mean"], half, value["n"], verdict]
            )

    for row in data["lives"]:
        for figure, value in row["figures"].items():
            line("lives", row, "", row["forget"], figure, value)
        line("lives", row, "", row["forget"], "average_accuracy against the first", row["difference"])
    for row in data.get(_MEMORY, {"rows": []})["rows"]:
        whole = {**row, _MEMORY: ""}
        for point in row["points"]:
            line("memory", {**row, _MEMORY: size(point["budget"])}, "", row["forget"], row["accuracy"], point["value"])
        for name, key in ((row["area"], "auc"), ("APM-S", "apm_s"), ("APM-E", "apm_e")):
            line("memory", whole, "", row["forget"], f"{name} of {row['accuracy']}", row[key])
    for request in data["requests"]:
        for row in request["rows"]:
            for metric, value in row["gaps"].items():
                line(
                    "requests",
                    request,
                    request["request"],
                    row["by"],
                    f"distance: {metric}",
                    value,
                    row["verdicts"].get(metric, ""),
                )
            for part, value in row.get("klom", {}).items():
                for key in ("mean", "p95") if value else ():
                    told = {"mean": value[key], "half": None, "n": request["klom"]["lives"]}
                    line("requests", request, request["request"], row["by"], f"KLoM {part}: {key}", told)
            line("requests", request, request["request"], row["by"], "cost", row["cost"])
            line("requests", request, request["request"], row["by"], "peak bytes", row["peak"])
    return out.getvalue()


def _safe(text: str) -> str:
    """A spreadsheet takes what begins so for a formula."""
    return "'" + text if text and text[0] in "=+-@\t\r" else text


def as_markdown(data: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    parts = [
        f"# {_cell(data['name'])}",
        f"{len(data['lives'])} variants, seeds {', '.join(map(str, data['seeds']))}.",
        _markdown(*lives_table(data)),
    ]
    if _MEMORY in data:
        parts += ["## At equal memory", _markdown(*memory_table(data)), MEMORY_NOTE]
    for request in data["requests"]:
        parts += [f"## {_cell(title(request))}", _markdown(*request_table(data, request))]
    if data["requests"]:
        parts.append(note(data))
    parts += [f"- {_cell(line)}" for line in _failed(data)]
    return "\n\n".join(parts) + "\n"


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in lines)


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def as_html(data: Mapping[str, Any]) -> str:
    """One page that needs nothing else: tables and, for every request, the picture."""
    requests = [
        (title(request), request_table(data, request), pareto(f"p{i}", request))
        for i, request in enumerate(data["requests"])
    ]
    return template("comparison.html.j2").render(
        d=data,
        lives=lives_table(data),
        picture=against_bytes("m", data),
        memory=memory_table(data) if _MEMORY in data else None,
        memory_note=MEMORY_NOTE,
        words=len(varied(data)),
        requests=requests,
        note=note(data),
        failed=_failed(data),
    )


def pareto(key: str, request: Mapping[str, Any]) -> Markup | None:
    """How near the request is to retrained (across) and how near everything else is (up), the size of a mark telling the cost; the
    methods that none beats in both are joined by a line."""
    points = []
    for row in request["rows"]:
        gone, kept = row["gaps"].get(FORGOTTEN), row["gaps"].get(UTILITY)
        if gone is not None and kept is not None:
            points.append((row["by"], gone, kept, row["cost"]["mean"] if row["cost"] else 0.0))
    if len(points) < 2:
        return None
    wide, high, left, top = 520.0, 300.0, 66.0, 16.0
    most_x = 1.15 * max(gone["mean"] for _, gone, _, _ in points) or 1.0
    most_y = 1.15 * max(kept["mean"] for _, _, kept, _ in points) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return left + wide * min(x / most_x, 1.0), top + high * (1 - min(y / most_y, 1.0))

    found = [
        el("line", x1=left, x2=left + wide, y1=top + high, y2=top + high, class_="rule"),
        el("line", x1=left, x2=left, y1=top, y2=top + high, class_="rule"),
    ]
    front = _front([(gone["mean"], kept["mean"]) for _, gone, kept, _ in points])
    found.append(
        el("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in front)), class_="front")
    )
    taken: list[tuple[float, float, float, float]] = []
    for i, (name, gone, kept, cost) in enumerate(points):
        x, y = at(gone["mean"], kept["mean"])
        tip = f"{name}: {FORGOTTEN} {stat(gone)}, {UTILITY} {stat(kept)}, cost {number(cost, 2)}"
        ends = []
        if gone["half"]:
            ends.append(
                (at(max(gone["mean"] - gone["half"], 0), kept["mean"]), at(gone["mean"] + gone["half"], kept["mean"]))
            )
        if kept["half"]:
            ends.append(
                (at(gone["mean"], max(kept["mean"] - kept["half"], 0)), at(gone["mean"], kept["mean"] + kept["half"]))
            )
        bars = [el("line", x1=x1, x2=x2, y1=y1, y2=y2, class_="bar") for (x1, y1), (x2, y2) in ends]
        lx, ly, anchor = _free(x, y, name, taken, left + wide + 80)
        label = el("text", name, x=lx, y=ly, class_=f"label{anchor}")
        found.append(el("g", el("title", tip), *bars, marker(i, x, y, 4.0 + 3.0 * min(cost, 1.0) ** 0.5), label))
    for share in (0.0, 0.5, 1.0):
        x, y = at(share * most_x, share * most_y)
        found += [
            el("text", number(share * most_x), x=x, y=top + high + 18, class_="axis mid"),
            el("text", number(share * most_y), x=left - 8, y=y + 4, class_="axis end"),
        ]
    found += [
        el(
            "text",
            f"request: distance to retrained ({FORGOTTEN}, nats)",
            x=left + wide / 2,
            y=top + high + 40,
            class_="axis mid",
        ),
        el(
            "text",
            f"the rest: distance to retrained ({UTILITY})",
            x=-(top + high / 2),
            y=14,
            class_="axis mid",
            transform="rotate(-90)",
        ),
    ]
    told = "; ".join(f"{name} at {number(gone['mean'])} and {number(kept['mean'])}" for name, gone, kept, _ in points)
    return svg(key, left + wide + 90, top + high + 52, "Forgetting against utility; lower left is best", told, *found)


def against_bytes(key: str, data: Mapping[str, Any]) -> Markup | None:
    """Accuracy after the last event (up) against the bytes of all that remembers (across), where learners, keepers or budgets are
    compared; the lives of a variant at several budgets are joined by a line."""
    axes = [axis for axis in varied(data) if axis != _MEMORY]
    if not {"learner", "keep", _MEMORY} & set(varied(data)):
        return None
    curves: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any], str]]] = {}
    for row in data["lives"]:
        weight, value = row["figures"]["bytes"], row["figures"]["average_accuracy"]
        if weight is not None and value is not None:
            name = ", ".join(row[axis] for axis in axes) or "as planned"
            curves.setdefault(name, []).append((weight, value, row[_MEMORY]))
    points = [point for curve in curves.values() for point in curve]
    if len(points) < 2:
        return None
    wide, high, left, top = 520.0, 300.0, 66.0, 16.0
    most_x = 1.15 * max(weight["mean"] for weight, _, _ in points) or 1.0
    most_y = min(1.0, 1.15 * max(value["mean"] for _, value, _ in points)) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return left + wide * min(x / most_x, 1.0), top + high * (1 - min(y / most_y, 1.0))

    found = [
        el("line", x1=left, x2=left + wide, y1=top + high, y2=top + high, class_="rule"),
        el("line", x1=left, x2=left, y1=top, y2=top + high, class_="rule"),
    ]
    taken: list[tuple[float, float, float, float]] = []
    for i, (name, curve) in enumerate(curves.items()):
        spots = [at(weight["mean"], value["mean"]) for weight, value, _ in curve]
        if len(set(spots)) > 1:
            found.append(el("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in spots), class_="front"))
        for (weight, value, budget), (x, y) in zip(curve, spots, strict=True):
            half = value["half"] or 0.0
            low, up = at(weight["mean"], max(value["mean"] - half, 0.0)), at(weight["mean"], value["mean"] + half)
            bars = [el("line", x1=x, x2=x, y1=low[1], y2=up[1], class_="bar")] if half else []
            told = f"{name}{'' if budget == AS_PLANNED else f' with {budget}'}: {stat(value, percent)} at {size(weight['mean'])}"
            found.append(el("g", el("title", told), *bars, marker(i, x, y)))
        lx, ly, anchor = _free(*spots[-1], name, taken, left + wide + 80)
        found.append(el("text", name, x=lx, y=ly, class_=f"label{anchor}"))
    for share in (0.0, 0.5, 1.0):
        x, y = at(share * most_x, share * most_y)
        found += [
            el("text", size(share * most_x), x=x, y=top + high + 18, class_="axis mid"),
            el("text", percent(share * most_y), x=left - 8, y=y + 4, class_="axis end"),
        ]
    found += [
        el("text", "bytes of all that remembers", x=left + wide / 2, y=top + high + 40, class_="axis mid"),
        el("text", "average accuracy", x=-(top + high / 2), y=14, class_="axis mid", transform="rotate(-90)"),
    ]
    said = "; ".join(
        f"{name} {percent(value['mean'])} at {size(weight['mean'])}"
        for name, curve in curves.items()
        for weight, value, _ in curve
    )
    return svg(key, left + wide + 90, top + high + 52, "Accuracy against memory; upper left is best", said, *found)


def _free(
    x: float, y: float, name: str, taken: list[tuple[float, float, float, float]], edge: float
) -> tuple[float, float, str]:
    """Where a label can stand without covering another: (x, y, class of its anchor). A letter is about 6.3 units wide, a line 14 high."""
    width = 6.3 * len(name)
    spots = [(side, dy) for dy in (-7.0, 15.0, -21.0, 29.0, -35.0, 43.0, -49.0) for side in (1, -1)]
    for side, dy in spots:
        start = x + 9 if side > 0 else x - 9 - width
        box_ = (start, y + dy - 11, start + width, y + dy + 3)
        inside = start > 0 and box_[2] < edge and box_[1] > 0
        if inside and not any(box_[0] < b[2] and b[0] < box_[2] and box_[1] < b[3] and b[1] < box_[3] for b in taken):
            break
    taken.append(box_)
    return (x + 9, y + dy, "") if side > 0 else (x - 9, y + dy, " end")


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats in both, from left to right."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best
