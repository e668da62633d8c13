"""Which classes come when: a stream as a table in plain text, and as a picture in SVG."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remanence.core.ids import Ids

if TYPE_CHECKING:
    from remanence.data.stream import Stream

#: How many classes have a column of numbers; of more, each is one character wide.
_NUMBERED = 20
_SHADES = "·░▒▓█"
_LEFT, _TOP, _WIDE = 76, 34, 720


def counts_of(stream: Stream) -> tuple[list[int], Tensor]:
    """The labels of all training rows, ascending, and how many of each every task has (tasks, labels). Without integer labels there are
    no labels, and one column counts all rows."""
    columns = [task.train.columns.get("y") for task in stream]
    if not all(isinstance(y, Tensor) and y.dim() == 1 and not y.is_floating_point() for y in columns):
        return [], torch.tensor([[len(task.train)] for task in stream]).reshape(-1, 1)
    labels = sorted({int(c) for y in columns for c in y.unique()})  # type: ignore[union-attr]
    known = torch.tensor(labels, dtype=torch.int64)
    rows = [torch.bincount(torch.searchsorted(known, y), minlength=len(labels)) for y in columns]  # type: ignore[arg-type]
    return labels, torch.stack(rows) if rows else torch.zeros(0, len(labels), dtype=torch.int64)


def again_of(stream: Stream) -> list[int]:
    """How many training rows of each task had come in one before it."""
    seen, found = Ids(), []
    for task in stream:
        found.append(len(task.train.ids & seen))
        seen = seen | task.train.ids
    return found


def table(stream: Stream) -> str:
    """One line for each task: training rows, how many of them came before, test rows, and rows of each class (``.`` is none). Of more
    than 20 classes, one shade for each instead, against the largest count."""
    labels, counts = counts_of(stream)
    numbered = len(labels) <= _NUMBERED
    largest = max(1, int(counts.max())) if counts.numel() else 1
    lines = [["task", "rows", "again", "test", *(map(str, labels) if numbered else ["classes"])]]
    for task, again, row in zip(stream, again_of(stream), counts.tolist(), strict=True):
        shown = [str(n or ".") for n in row] if labels else []
        if not numbered:
            shown = ["".join(_SHADES[-(-4 * n // largest)] for n in row)]
        lines.append([str(task.id), str(len(task.train)), str(again), str(len(task.test)), *shown])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(word.rjust(w) for word, w in zip(line, widths, strict=True)) for line in lines)


def picture(stream: Stream) -> str:
    """An SVG file: a row for each class, a column for each task, the darker the more training rows; every cell says its number to
    whoever points at it. Colours follow a light or dark page."""
    labels, counts = counts_of(stream)
    tasks, names = len(stream), [str(c) for c in labels] or ["rows"]
    wide = max(2.0, min(60.0, _WIDE / max(1, tasks)))
    tall = max(4.0, min(22.0, 480 / len(names)))
    right, bottom = _LEFT + wide * tasks, _TOP + tall * len(names)
    gap = 1 if min(wide, tall) > 6 else 0
    largest = max(1, int(counts.max())) if counts.numel() else 1
    title = f"{stream.name}: {tasks} tasks, {len(labels) or 'no'} classes"
    found = [f'<text x="{_LEFT}" y="20" class="strong">{escape(title)}</text>']
    for i, name in enumerate(names):
        y = _TOP + tall * i
        if i % max(1, round(14 / tall)) == 0:  # a name needs 14 units
            found.append(f'<text x="{_LEFT - 8}" y="{y + tall / 2 + 4:.1f}" class="end">{escape(name)}</text>')
        for k in range(tasks):
            if n := int(counts[k, i]):
                what = f"class {name}" if labels else "rows"
                found.append(
                    f'<rect x="{_LEFT + wide * k:.1f}" y="{y:.1f}" width="{wide - gap:.1f}" height="{tall - gap:.1f}" '
                    f'class="cell" fill-opacity="{0.12 + 0.88 * n / largest:.2f}">'
                    f"<title>task {stream[k].id}, {escape(what)}: {n}</title></rect>"
                )
    for k in range(0, tasks, max(1, round(30 / wide))):
        x = _LEFT + wide * (k + 0.5)
        found.append(f'<text x="{x:.1f}" y="{bottom + 16:.1f}" class="mid">{stream[k].id}</text>')
    found.append(f'<text x="{right:.1f}" y="{bottom + 34:.1f}" class="end">task; darkest: {largest} rows</text>')
    style = (
        "text{font:12px sans-serif;fill:#222}.end{text-anchor:end}.mid{text-anchor:middle}.strong{font-weight:bold}"
        ".cell{fill:#0072b2}@media(prefers-color-scheme:dark){text{fill:#ddd}.cell{fill:#56b4e9}}"
    )
    box = f"0 0 {max(right + 16, 420):.0f} {bottom + 44:.0f}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" role="img" aria-labelledby="t">'
        f'<title id="t">{escape(title)}</title><style>{style}</style>{"".join(found)}</svg>\n'
    )
