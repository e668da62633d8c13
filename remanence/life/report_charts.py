"""Charts of a report as SVG text: no script, no font and no file from elsewhere.

Colours are CSS classes and variables of the page, so a chart follows its light, dark and print themes. The charts over
events share one horizontal scale, so that they can stand below one another. Every chart has a title and a description.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from markupsafe import Markup, escape

from remanence.life.report_schema import CellData, EventData, ForgottenData, HolderData, TaskData
from remanence.life.report_words import MINUS, STATUS_GLYPHS, asked, number, percent, size, task_name

_LEFT, _RIGHT, _ROOM = 76.0, 132.0, 692.0
#: Okabe and Ito's colours are CSS variables --c0 to --c5; dashes and markers tell series apart without them.
_COLOURS = 6
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "13 4", "4 2")

Series = Sequence[float | None]


def el(name: str, *children: object, **attributes: object) -> Markup:
    """One XML element; text and attribute values are escaped, `class_` is ``class``, ``_`` in a name is ``-``."""
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            shown = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
            words.append(f'{key.rstrip("_").replace("_", "-")}="{escape(shown)}"')
    inside = "".join(str(escape(child)) for child in children)
    # every part of the text was escaped above or is markup made here
    return Markup(f"<{' '.join(words)}>{inside}</{name}>" if children else f"<{' '.join(words)}/>")


def svg(key: str, width: float, height: float, title: str, desc: str, *children: object, scales: bool = True) -> Markup:
    """A picture with a name for screen readers. `scales`: keep its smallest letters at 10 pixels or more."""
    style = f"min-width:{0.84 * width:.0f}px;max-width:{1.25 * width:.0f}px" if scales else None
    box = f"0 0 {width:.0f} {height:.0f}"
    head = (el("title", title, id=f"{key}-t"), el("desc", desc, id=f"{key}-d"))
    return el("svg", *head, *children, viewBox=box, role="img", aria_labelledby=f"{key}-t {key}-d", style=style)


def state_icon(state: str) -> Markup:
    """A disc that is as full as the holder still is: holds, suppressed, unlearned, deleted."""
    inside: dict[str, tuple[Markup, ...]] = {
        "holds": (el("circle", cx=8, cy=8, r=6.5, fill="currentColor"),),
        "suppressed": (_ring(), el("circle", cx=8, cy=8, r=3.4, fill="currentColor")),
        "unlearned": (_ring(), el("path", d="M8 8V1.8A6.2 6.2 0 0 1 14.2 8Z", fill="currentColor")),
        "deleted": (_ring(),),
    }
    unknown = (_ring(), el("path", d="M4 8h8", stroke="currentColor", stroke_width=1.6))
    return el("svg", *inside.get(state, unknown), viewBox="0 0 16 16", class_="icon", aria_hidden="true")


def _ring() -> Markup:
    return el("circle", cx=8, cy=8, r=6.2, fill="none", stroke="currentColor", stroke_width=1.6)


def marker(index: int, x: float, y: float, r: float = 4.2) -> Markup:
    """The marker of series `index`; its colour comes from the class."""
    kind = index % 6
    css = f"mark c{index % _COLOURS}"
    if kind == 0:
        return el("circle", cx=x, cy=y, r=r, class_=css)
    corners = {
        1: ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
        2: ((0, -1.15), (1.05, 0.75), (-1.05, 0.75)),
        3: ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        4: ((0, 1.15), (1.05, -0.75), (-1.05, -0.75)),
        5: ((-0.6, -1.1), (0.6, -1.1), (1.2, 0), (0.6, 1.1), (-0.6, 1.1), (-1.2, 0)),
    }[kind]
    return el("polygon", points=" ".join(f"{x + r * a:.1f},{y + r * b:.1f}" for a, b in corners), class_=css)


class Columns:
    """The horizontal scale that all charts over events share: one column per event."""

    def __init__(self, events: Sequence[EventData]) -> None:
        self.events = events
        self.column = min(max(_ROOM / max(len(events), 1), 44.0), 180.0)
        self.end = _LEFT + self.column * len(events)
        self.width = max(self.end + _RIGHT, 420.0)

    def x(self, i: int) -> float:
        return _LEFT + self.column * (i + 0.5)

    def bands(self, top: float, bottom: float, line: bool = True) -> list[Markup]:
        """A tinted column and, where it hides nothing, a dashed line at every forget event."""
        found = []
        for i, event in enumerate(self.events):
            if event["kind"] == "forget":
                x = self.x(i)
                found.append(
                    el("rect", x=x - self.column / 2, y=top, width=self.column, height=bottom - top, class_="band")
                )
                found += [el("line", x1=x, x2=x, y1=top, y2=bottom, class_="cut")] if line else []
        return found

    def numbers(self, y: float) -> list[Markup]:
        return [el("text", event["seq"], x=self.x(i), y=y, class_="axis mid") for i, event in enumerate(self.events)]


def timeline(columns: Columns) -> Markup:
    """Learn events as discs, forget events as diamonds, in order."""
    events, line = columns.events, 26.0
    # an average letter of the 12-unit font is about 6.4 units wide
    letters = max(int(columns.column / 6.4), 5)
    found = [el("line", x1=_LEFT, x2=columns.end, y1=line, y2=line, class_="rule")]
    for i, event in enumerate(events):
        x, learn = columns.x(i), event["kind"] == "learn"
        label = event["label"].removeprefix("learn ").strip() if learn else asked(event["label"])
        tip = el("title", f"{event['seq']}. {event['label']}, by {event['by']}: {event['status']}")
        if learn:
            shape = el("circle", cx=x, cy=line, r=11.0, class_="learn")
            sign = f"M{x - 4.5:.1f} {line:.0f}h9M{x:.1f} {line - 4.5:.1f}v9"
        else:
            shape = el("path", d=f"M{x:.1f} {line - 14:.0f}l14 14l-14 14l-14 -14Z", class_="forget")
            sign = f"M{x - 4.5:.1f} {line:.0f}h9"
        words = [el("g", tip, shape, el("path", d=sign, class_="sign"))]
        y = line + 33
        for part in _two_lines(label, letters):
            words.append(el("text", part, x=x, y=y, class_="label strong mid"))
            y += 15
        words.append(el("text", _short(event["by"], letters), x=x, y=y + 1, class_="axis mid"))
        if event["status"] != "done":
            glyph = STATUS_GLYPHS.get(event["status"], "?")
            words.append(
                el("text", _short(f"{glyph} {event['status']}", letters + 2), x=x, y=y + 18, class_="label mid warn")
            )
        found += words
    key = (
        el("text", "learn +", x=0, y=line - 3, class_="axis"),
        el("text", f"forget {MINUS}", x=0, y=line + 13, class_="axis"),
    )
    told = "; ".join(f"{event['seq']}: {event['label']} by {event['by']}, {event['status']}" for event in events)
    return svg("timeline", columns.width, 114, "Timeline of events", told or "No events.", *key, *found)


def accuracy(columns: Columns, tasks: Sequence[TaskData], matrix: Sequence[Series]) -> Markup:
    """One curve per task over the events; the vertical axis starts at the ten per cent below the lowest value."""
    low = floor(matrix)
    names = [task_name(task["names"], task["id"]) for task in tasks]
    series = [[row[j] for row in matrix] for j in range(len(tasks))]
    last = [next((v for v in reversed(line) if v is not None), None) for line in series]
    told = "; ".join(f"{name}: {percent(value)} at the end" for name, value in zip(names, last, strict=True))
    desc = f"{told}. The axis runs from {percent(low)} to 100 %." if told else "No tasks."
    return _curves(
        "accuracy",
        columns,
        names,
        series,
        low,
        max(210.0, 17.0 * len(names) + 60),
        "Accuracy of each task after each event",
        desc,
    )


def forgotten(columns: Columns, items: Sequence[ForgottenData]) -> Markup:
    """Held-out accuracy on what was removed, from the forget event on; 0 to 100 %."""
    names, series = [], []
    for item in items:
        names.append(item["label"] or f"event {item['event']}")
        # a series may cover all events or only those since the request: both end at the last event
        line = [*[None] * len(columns.events), *item["series"]][-len(columns.events) :] if columns.events else []
        series.append(line)
    told = "; ".join(
        f"{name}: {', '.join(percent(v) for v in line if v is not None)}"
        for name, line in zip(names, series, strict=True)
    )
    return _curves("forgotten", columns, names, series, 0.0, 120.0, "Held-out accuracy on what was forgotten", told)


def _curves(
    key: str,
    columns: Columns,
    names: list[str],
    series: list[list[float | None]],
    low: float,
    height: float,
    title: str,
    desc: str,
) -> Markup:
    top, bottom = 10.0, height - 24
    step = 0.1 if low >= 0.5 else 0.25 if low == 0 else 0.2
    ticks = [low + step * k for k in range(int(round((1 - low) / step, 6)) + 1)]
    if height < 150:
        ticks = [low, (low + 1) / 2, 1.0]

    def y(value: float) -> float:
        return bottom - (min(max(value, low), 1.0) - low) / (1 - low) * (bottom - top)

    found = columns.bands(top, bottom)
    for tick in ticks:
        found.append(el("line", x1=_LEFT, x2=columns.end, y1=y(tick), y2=y(tick), class_="grid"))
        found.append(el("text", f"{100 * tick:.0f} %", x=_LEFT - 8, y=y(tick) + 4, class_="axis end"))
    ends: list[tuple[float, float, int]] = []
    for j, line in enumerate(series):
        points = [(columns.x(i), y(v)) if v is not None else None for i, v in enumerate(line)]
        css = f"curve c{j % _COLOURS}"
        dash = _DASHES[(j + j // 6) % 6] or None
        found.append(el("path", d=_path(points), class_=css, stroke_dasharray=dash))
        for i, point in enumerate(points):
            if point is not None:
                tip = el("title", f"{names[j]}: {percent(line[i])} after event {columns.events[i]['seq']}")
                found.append(el("g", tip, marker(j, *point)))
        if given := [point for point in points if point is not None]:
            ends.append((*given[-1], j))
    for (x, at, j), free in zip(
        sorted(ends, key=lambda e: e[1]),
        _apart([e[1] for e in sorted(ends, key=lambda e: e[1])], 16, top, bottom),
        strict=True,
    ):
        value = next(v for v in reversed(series[j]) if v is not None)
        start = columns.end + 6
        found.append(el("path", d=f"M{x + 7:.1f} {at:.1f}L{start:.1f} {free:.1f}", class_=f"lead c{j % _COLOURS}"))
        found.append(marker(j, start + 7, free))
        label = el("tspan", _short(names[j], 10), class_="strong")
        found.append(
            el("text", label, f"  {100 * value:.1f}", x=start + 18, y=free + 4, class_="label", xml__space=None)
        )
    return svg(key, columns.width, height, title, desc, *found, *columns.numbers(height - 6))


def floor(matrix: Sequence[Series]) -> float:
    """Where the charts of accuracies start: the ten per cent below the lowest, at most 80 %."""
    values = [value for row in matrix for value in row if value is not None]
    return min(int(max(min(values, default=0.0) - 0.02, 0.0) * 10), 8) / 10


def heat(columns: Columns, tasks: Sequence[TaskData], matrix: Sequence[Series], score: str = "accuracy") -> Markup:
    """A row per task, a column per event. Accuracies are in per cent, the shade goes from the charts' floor to 100 %; squared errors
    are as they are, the shade goes from 0 to the largest."""
    shares = score == "accuracy"
    largest = max((value for line in matrix for value in line if value is not None), default=0.0) or 1.0
    row, top, low, high = 30.0, 6.0, floor(matrix) if shares else 0.0, 1.0 if shares else largest
    height = top + row * len(tasks) + 24
    found: list[Markup] = []
    for j, task in enumerate(tasks):
        y = top + row * j
        found.append(
            el(
                "text",
                _short(task_name(task["names"], task["id"]), 10),
                x=_LEFT - 10,
                y=y + row / 2 + 4,
                class_="label end",
            )
        )
        for i in range(len(columns.events)):
            value, x = matrix[i][j], columns.x(i)
            if value is None:
                found.append(el("circle", cx=x, cy=y + row / 2, r=1.5, class_="none"))
                continue
            depth = 0.06 + 0.88 * (min(max(value, low), high) - low) / (high - low)
            cell = el(
                "rect",
                x=x - columns.column / 2 + 1,
                y=y + 1,
                width=columns.column - 2,
                height=row - 2,
                rx=3,
                class_="heat",
                fill_opacity=f"{depth:.2f}",
            )
            found += [
                cell,
                el(
                    "text",
                    f"{100 * value:.1f}" if shares else number(value),
                    x=x,
                    y=y + row / 2 + 4,
                    class_="label mid " + ("over" if depth > 0.74 else ""),
                ),
            ]
    title = "Accuracy matrix: tasks by events, in per cent" if shares else "Mean squared errors: tasks by events"
    names = ", ".join(task_name(task["names"], task["id"]) for task in tasks)
    return svg(
        "matrix",
        columns.width,
        height,
        title,
        f"Rows: {names}. Columns: events in order.",
        *found,
        *columns.numbers(height - 6),
    )


def holdings(columns: Columns, holders: Sequence[HolderData]) -> Markup:
    """Bytes of every holder after each event, stacked; the smallest are summed where there are more than six."""
    drawn = [(holder["name"], holder["over_time"]) for holder in holders if any(holder["over_time"])]
    drawn.sort(key=lambda item: -max(item[1]))
    if len(drawn) > _COLOURS:
        rest = [line for _, line in drawn[_COLOURS - 1 :]]
        summed = [sum(line[i] for line in rest if i < len(line)) for i in range(max(map(len, rest)))]
        drawn = [*drawn[: _COLOURS - 1], (f"{len(rest)} others", summed)]
    n, top, bottom = len(columns.events), 22.0, 146.0
    stacks = [[line[i] if i < len(line) else 0 for _, line in drawn] for i in range(n)]
    most = max((sum(stack) for stack in stacks), default=0) or 1
    scale = (bottom - top) / most
    found = columns.bands(top - 18, bottom, line=False)
    wide = min(columns.column * 0.62, 64.0)
    ends: list[tuple[float, int]] = []
    for i, stack in enumerate(stacks):
        base = bottom
        for j, amount in enumerate(stack):
            tall = amount * scale
            if amount > 0:
                tip = el("title", f"{drawn[j][0]}: {size(amount)} after event {columns.events[i]['seq']}")
                # a hair of paper between two parts, so that they are told apart without colour
                found.append(
                    el(
                        "rect",
                        tip,
                        x=columns.x(i) - wide / 2,
                        y=base - tall,
                        width=wide,
                        height=max(tall - 0.8, 0.8),
                        class_=f"part c{j}",
                    )
                )
                if i == n - 1:
                    ends.append((base - tall / 2, j))
            base -= tall
        if sum(stack):
            found.append(el("text", size(sum(stack)), x=columns.x(i), y=base - 6, class_="axis mid"))
    found.append(el("line", x1=_LEFT, x2=columns.end, y1=bottom, y2=bottom, class_="rule"))
    ends.sort()
    for (at, j), free in zip(ends, _apart([e[0] for e in ends], 16, top, bottom), strict=True):
        x, start = columns.x(n - 1) + wide / 2 + 2, columns.end + 6
        found.append(el("path", d=f"M{x:.1f} {at:.1f}L{start:.1f} {free:.1f}", class_="lead"))
        found.append(el("rect", x=start + 3, y=free - 4, width=8, height=8, class_=f"part c{j}"))
        found.append(el("text", _short(drawn[j][0], 15), x=start + 18, y=free + 4, class_="label"))
    told = "; ".join(f"{name}: {size(line[-1])} at the end" for name, line in drawn)
    return svg(
        "holdings",
        columns.width,
        170,
        "Bytes of each holder after each event",
        told or "No sizes.",
        *found,
        *columns.numbers(164),
    )


def evidence(key: str, cell: CellData) -> Markup | None:
    """Where a figure lies after the method, with nothing done, and for the references with the interval of their mean."""
    after, nothing, mean, half, sd = (
        cell["after"],
        cell["nothing"],
        cell["reference_mean"],
        cell["ci95"],
        cell["reference_sd"],
    )
    reach = max(half or 0.0, sd or 0.0)
    values = [v for v in (after, nothing, mean) if v is not None]
    if not values:
        return None
    edges = [*values, *([mean - reach, mean + reach] if mean is not None else [])]
    low, high = _scale(min(edges), max(edges), cell["range"])
    left, right, line = 8.0, 252.0, 14.0

    def x(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (right - left)

    found = [el("line", x1=left, x2=right, y1=line, y2=line, class_="rule")]
    if mean is not None:
        if half:
            found.append(
                el(
                    "rect",
                    x=x(mean - half),
                    y=line - 6,
                    width=max(x(mean + half) - x(mean - half), 1.5),
                    height=12,
                    class_="span",
                )
            )
        if sd:
            found.append(el("line", x1=x(mean - sd), x2=x(mean + sd), y1=line, y2=line, class_="spread"))
        found.append(el("line", x1=x(mean), x2=x(mean), y1=line - 8, y2=line + 8, class_="mean"))
    if nothing is not None:
        found.append(el("circle", cx=x(nothing), cy=line, r=5.0, class_="nothing"))
    if after is not None:
        found.append(el("path", d=f"M{x(after):.1f} {line - 6.5:.1f}l6.5 6.5l-6.5 6.5l-6.5 -6.5Z", class_="after"))
    found.append(el("text", number(low, 2), x=left, y=36, class_="axis"))
    found.append(el("text", number(high, 2), x=right, y=36, class_="axis end"))
    told = f"After: {number(after)}; doing nothing: {number(nothing)}; retrained: {number(mean)}"
    told += f" ± {number(half)}." if half is not None else ", spread unknown." if cell["n"] == 1 else "."
    return svg(
        key, 260, 40, cell["metric"], f"{told} Axis from {number(low, 2)} to {number(high, 2)}.", *found, scales=False
    )


def _scale(low: float, high: float, words: str) -> tuple[float, float]:
    """Ends of an axis: around the values, inside the figure's range, and never so near that a hair looks like a gulf."""
    bounds = re.match(r"\s*(-?[\d.]+)\s+(?:to\s+(-?[\d.]+)|up)", words)
    floor = float(bounds[1]) if bounds else None
    roof = float(bounds[2]) if bounds and bounds[2] else None
    if floor is not None and roof is not None and roof > floor:
        least = (roof - floor) / 5
        room = max(high - low, least) * 0.6
        middle = (low + high) / 2
        # a twentieth of the range is a tidy grid for the ends
        grid = (roof - floor) / 20
        start, stop = max(floor, _down(middle - room, grid)), min(roof, -_down(-(middle + room), grid))
        return (start, stop) if stop > start else (floor, roof)
    if floor is not None and low >= floor:
        return floor, high + 0.1 * (high - floor) if high > floor else floor + 1
    room = (high - low) * 0.15 or abs(high) * 0.5 or 1.0
    return low - room, high + room


def _down(value: float, grid: float) -> float:
    return grid * int(value // grid)


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """A line through the points, broken where one is missing."""
    words, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        words.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
        pen = "L"
    return "".join(words) or "M0 0"


def _apart(wanted: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Heights near those `wanted` (ascending), at least `gap` apart, inside the chart where there is room."""
    found: list[float] = []
    for value in wanted:
        found.append(max(value, found[-1] + gap) if found else max(value, top))
    over = found[-1] - bottom if found else 0.0
    if over > 0:
        limit = bottom
        for i in range(len(found) - 1, -1, -1):
            found[i] = min(found[i], limit)
            limit = found[i] - gap
    return found


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: max(letters - 1, 1)].rstrip() + "…"


def _two_lines(text: str, letters: int) -> list[str]:
    """`text` in one or two lines of at most `letters`."""
    first, rest = "", text.split()
    while rest and (not first or len(first) + 1 + len(rest[0]) <= letters):
        first = f"{first} {rest.pop(0)}".strip()
    lines = [_short(first, letters)]
    if rest:
        lines.append(_short(" ".join(rest), letters))
    return lines
