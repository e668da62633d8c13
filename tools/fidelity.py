"""Write what every part was checked against, from the tests: ``python tools/fidelity.py`` (``--check`` only compares).

A test says so by a marker::

    @pytest.mark.fidelity("keep/ewc", check="...", measured="...", paper="...", differs="...")

``docs/fidelity.md`` has one row per marker, ``remanence/fidelity.json`` the first check of each part. Markers are read from the
source, so their arguments are literals.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from remanence.catalogue import PARTS, VERBS

ROOT = Path(__file__).resolve().parent.parent
PAGE, WORDS = ROOT / "docs" / "fidelity.md", ROOT / "remanence" / "fidelity.json"
FIELDS = ("check", "measured", "paper", "differs")

HEAD = """# What was checked

Written by `tools/fidelity.py` from the markers of the tests; do not edit. A part without a row is shown as unverified everywhere.
"Paper" is the figure the paper (or its card) gives; "differs" is what is not as there.

| part | checked against | measured | paper | differs | test |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """One marker: the part, its four fields, and the test that carries it."""

    part: str
    fields: dict[str, str]
    test: str


def rows() -> list[Row]:
    """All markers, in the order of the catalogue.

    Raises:
        SystemExit: a marker that cannot be read, or names no part.
    """
    found = [row for path in sorted((ROOT / "tests").rglob("test_*.py")) for row in _markers(path)]
    order = {f"{part.verb}/{part.slug}": at for at, part in enumerate(PARTS)}
    for row in found:
        if row.part not in order:
            sys.exit(f"{row.test}: a fidelity marker names {row.part!r}, which is no part (of {', '.join(VERBS)})")
    return sorted(found, key=lambda row: (order[row.part], row.test))


def _markers(path: Path) -> Iterator[Row]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for mark in getattr(node, "decorator_list", []):
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fidelity":
                test = f"{path.relative_to(ROOT).as_posix()}::{getattr(node, 'name', '')}"
                try:
                    part = ast.literal_eval(mark.args[0])
                    fields = {str(word.arg): str(ast.literal_eval(word.value)) for word in mark.keywords}
                except (ValueError, IndexError):
                    sys.exit(f"{test}: the arguments of a fidelity marker must be literals")
                if set(fields) - set(FIELDS) or "check" not in fields:
                    sys.exit(f"{test}: a fidelity marker takes {', '.join(FIELDS)}; `check` is needed")
                yield Row(part, fields, test)


def page(found: list[Row]) -> str:
    lines = []
    for row in found:
        cells = [
            f"`{row.part}`",
            *(row.fields.get(field, "-") for field in FIELDS),
            f"`{row.test.removeprefix('tests/')}`",
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    missing = [
        f"`{part.verb}/{part.slug}`" for part in PARTS if f"{part.verb}/{part.slug}" not in {row.part for row in found}
    ]
    tail = f"\nUnverified: {', '.join(missing)}.\n" if missing else "\nEvery part of the catalogue has a row.\n"
    return HEAD + "\n".join(lines) + "\n" + tail


def words(found: list[Row]) -> str:
    first: dict[str, str] = {}
    for row in found:
        first.setdefault(row.part, row.fields["check"])
    return json.dumps(first, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    found = rows()
    wanted = {PAGE: page(found), WORDS: words(found)}
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if "--check" in sys.argv[1:]:
            print(f"{path.relative_to(ROOT)} is not current; run python tools/fidelity.py")
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if stale and "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
