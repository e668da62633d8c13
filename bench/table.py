"""Writes docs/bench.md from bench/results/*.json.

python -m bench.table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.common import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "bench.md"
ORDER = ("loop", "lm", "peers", "ledger", "learn", "language", "evidence", "forget", "vmap")

HEAD = """# Benchmarks

`make bench` measures everything here but the peers, `make bench-peers` those; both rewrite this page from
`bench/results/*.json`, which hold every figure with the machine and the date.

One thread. Every time is the median of at least 7 runs after a warm-up, with its quartiles; sizes are of one run. Where two things are compared
they run in turn in one session (A B, B A, ...), and the ratio is taken pair by pair, of CPU time, which other work on the
machine disturbs less; the wall clock's ratio stands beside it. The machine below is shared and small: a ratio moved by up to a quarter between sessions. A target that is missed
says so.
"""


def number(value: float, unit: str) -> str:
    if unit == "x":
        return f"{value:.2f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def line(row: dict[str, Any]) -> str:
    span = ""
    if row["low"] is not None and row["high"] is not None:
        span = f" ({number(row['low'], row['unit'])} to {number(row['high'], row['unit'])})"
    met = {None: "", True: "met", False: "**missed**"}[row["met"]]
    value = f"{number(row['value'], row['unit'])}{' ' + row['unit'] if row['unit'] else ''}{span}"
    cells = [row["what"], row["on"], value, row["target"], met, row["note"]]
    return f"| {' | '.join(cells)} |"


def page() -> str:
    parts = [HEAD]
    found = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    for name in [*(n for n in ORDER if n in found), *sorted(set(found) - set(ORDER))]:
        result = found[name]
        m = result["machine"]
        where = f"{m['cpu']} ({m['capability']}), {m['cores']} cores, load by all {m['load']}, Python {m['python']}, torch {m['torch']}, {result['date']}"
        parts.append(f"## {result['title']}\n\n{result['text']}\n\n{where}\n")
        if result["rows"]:
            parts.append("| what | on | median (quartiles) | target | | |\n|---|---|---|---|---|---|")
            parts += [line(row) for row in result["rows"]]
        parts += result.get("settings", {}).get("tables", {}).values()
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    PAGE.write_text(page())
    print(f"wrote {PAGE.name} from {len(list(RESULTS.glob('*.json')))} results")


if __name__ == "__main__":
    main()
