"""Words and figures of a report: how numbers, sizes, times and states are said, and where a request stands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from remanence.core.holder import STATES
from remanence.life.report_schema import EventData, ReceiptData, ReportData, TraceData

DASH, MINUS = "\u2013", "\u2212"
#: A glyph beside each word, so that no state is told by colour alone: the fuller the disc, the more is left.
GLYPHS = {"holds": "●", "suppressed": "◉", "unlearned": "◔", "deleted": "○"}
STATUS_GLYPHS = {
    "done": "✓",
    "partial": "◐",
    "failed": "✕",
    "refused": "⊘",
    "nothing held": "\u2013",
    "in progress": "…",
}
MEANING = {
    "holds": "it contains the examples or a value computed from them, or was computed by weights that hold them",
    "suppressed": "the weights still hold them; a guard hides them",
    "unlearned": "an approximate method changed the weights, and they measured closer to retraining than doing nothing did",
    "deleted": "no copy and no value computed from them is left, or the holder equals that of a life without them",
}
SUMMARY_NAMES = {
    "average_accuracy": "Average accuracy",
    "average_incremental_accuracy": "Average incremental accuracy",
    "forgetting": "Forgetting",
    "backward_transfer": "Backward transfer",
    "forward_transfer": "Forward transfer",
}
SCORE_NAMES = {"accuracy": "Accuracy", "mse": "Mean squared error"}
#: Figures that are differences and so carry a sign.
SIGNED = ("backward_transfer", "forward_transfer")


def percent(value: float | None, signed: bool = False) -> str:
    """A share as per cent with one decimal, a dash where there is none."""
    if value is None:
        return DASH
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return text.replace("-", MINUS) + " %"


def figure(value: float | None, score: str) -> str:
    """A figure of the matrix: accuracies are shares, squared errors have the target's unit squared."""
    return percent(value) if score == "accuracy" else number(value)


def number(value: float | None, digits: int = 3) -> str:
    """A figure with about `digits` significant decimals; a dash where there is none."""
    if value is None:
        return DASH
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f").replace("-", MINUS)
    if value == 0:
        return "0"
    text = f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.{digits - 1}e}"
    return text.replace("-", MINUS)


def size(count: float | None) -> str:
    """Bytes in decimal units: 52 900 is "52.9 kB"."""
    if count is None:
        return DASH
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 99.95 else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def duration(seconds: float | None) -> str:
    """Seconds in the unit that reads best: "40 ms", "1.2 s", "3 min 20 s", "2 h 05 min"."""
    if seconds is None:
        return DASH
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(n: int, word: str, many: str | None = None) -> str:
    """ "1 event", "7 events"."""
    return f"{number(n)} {word if n == 1 else many or word + 's'}"


def listed(words: Sequence[str], limit: int = 4) -> str:
    """ "a, b and c"; after `limit` words the rest is counted."""
    shown = list(words)
    if len(shown) > limit:
        shown = [*shown[: limit - 1], f"{len(shown) - limit + 1} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else ""


def rank(state: str) -> int:
    """Worst first; a word that is none of the four counts as worse than all of them."""
    return STATES.index(state) if state in STATES else -1


def worst(states: Iterable[str]) -> str | None:
    """The worst of some states, None if there are none."""
    return min(states, key=rank, default=None)


def task_name(names: Sequence[str], number: object) -> str:
    """The classes of a task in short: "0, 1", or its number where it has no names."""
    shown = [str(name) for name in names]
    if not shown:
        return f"task {number}"
    return ", ".join(shown) if len(shown) <= 3 else f"{', '.join(shown[:2])}, … {shown[-1]}"


def asked(label: str) -> str:
    """What a forget event's label asks for: without its first word."""
    return label.removeprefix("forget ").strip() or label


@dataclass(frozen=True)
class Standing:
    """Where one forget request stands now. `state`: the worst over its holders, None where no trace was recorded."""

    event: EventData
    receipt: ReceiptData | None
    rows: list[TraceData]
    state: str | None
    words: str

    @property
    def n(self) -> int | None:
        return self.receipt["n"] if self.receipt else max((row["n"] for row in self.rows), default=None)


@dataclass(frozen=True)
class Counts:
    """How many requests have each worst state, and the sentence that says so."""

    requests: int
    states: dict[str, int] = field(default_factory=dict)


def standings(data: ReportData) -> list[Standing]:
    """Every forget request, the one that stands worst first."""
    receipts = {receipt["seq"]: receipt for receipt in data["receipts"]}
    found = []
    for event in data["events"]:
        if event["kind"] != "forget":
            continue
        receipt = receipts.get(event["seq"])
        names = {event["label"], *([receipt["request"]] if receipt else [])}
        rows = sorted((row for row in data["trace"] if row["request"] in names), key=lambda row: rank(row["state"]))
        state = worst(row["state"] for row in rows)
        found.append(Standing(event, receipt, rows, state, _words(event["status"], rows, state)))
    return sorted(found, key=_badness)


def _badness(standing: Standing) -> tuple[int, int]:
    if standing.state is None:
        return (len(STATES) if standing.event["status"] == "nothing held" else -2, standing.event["seq"])
    return rank(standing.state), standing.event["seq"]


def _words(status: str, rows: Sequence[TraceData], state: str | None) -> str:
    if state is None:
        return {
            "nothing held": "No holder had ever held any of it.",
            "failed": "The attempt failed; the life is as it was before.",
            "refused": "The request was refused; nothing was changed.",
            "in progress": "The request is not finished yet.",
        }.get(status, "No trace was recorded, so nothing can be said of it.")
    where = listed(list(dict.fromkeys(row["holder"] for row in rows if row["state"] == state)), 3)
    other = len({row["holder"] for row in rows} - {row["holder"] for row in rows if row["state"] == state})
    said = f"{state[:1].upper()}{state[1:]} in" if state else "In"
    if not other:
        return (
            f"{said} {where}."
            if len({row["holder"] for row in rows}) == 1
            else f"{said} every holder that had it: {where}."
        )
    better = listed(sorted({row["state"] for row in rows if row["state"] != state}, key=rank))
    return f"{said} {where}; {better} in {count(other, 'other holder')}."


def lead(data: ReportData, stand: Sequence[Standing]) -> list[str]:
    """One or two sentences: what was learned, what was asked to be forgotten, and how many requests stand how."""
    learned = [event for event in data["events"] if event["kind"] == "learn" and event["status"] in ("done", "")]
    if not data["events"]:
        return ["Nothing has happened in this life yet."]
    first = f"This life learned {count(len(data['tasks']), 'task')} in {count(len(learned), 'event')}"
    if not stand:
        return [f"{first} and was never asked to forget."]
    first += f" and was asked to forget {'once' if len(stand) == 1 else 'twice' if len(stand) == 2 else f'{len(stand)} times'}."
    return [first]


def tally(stand: Sequence[Standing]) -> list[tuple[str, int]]:
    """(worst state, requests), worst first; requests without a trace are counted under their status."""
    found: dict[str, int] = {}
    for item in stand:
        word = item.state or item.event["status"] or "not traced"
        found[word] = found.get(word, 0) + 1
    return list(found.items())
