"""Write the type stubs of the lazy packages from the catalogue: ``python tools/stubs.py`` (``--check`` only compares)."""

from __future__ import annotations

import sys
from pathlib import Path

from remanence.catalogue import PARTS

ROOT = Path(__file__).resolve().parent.parent
#: The lazy packages, with the subpackages each of them offers.
PACKAGES: dict[str, tuple[str, ...]] = {
    "learn": (),
    "keep": (),
    "forget": (),
    "where": (),
    "measure": ("metrics",),
    "measure/metrics": (),
}


def render(package: str) -> str:
    """The text of a package's ``__init__.pyi``."""
    verb = package.partition("/")[0]
    lines = ["# Written by tools/stubs.py from the catalogue; do not edit."]
    lines += [f"from remanence.{verb} import {folder} as {folder}" for folder in PACKAGES[package]]
    mine = sorted((part.module, part.name) for part in PARTS if part.verb == verb)
    lines += [f"from {module} import {name} as {name}" for module, name in mine]
    return "\n".join(lines) + "\n"


def path_of(package: str) -> Path:
    """Where a package's stub lies."""
    return ROOT / "remanence" / package / "__init__.pyi"


def main() -> int:
    stale = [p for p in PACKAGES if not path_of(p).is_file() or path_of(p).read_text(encoding="utf-8") != render(p)]
    if "--check" in sys.argv[1:]:
        for package in stale:
            print(f"{path_of(package).relative_to(ROOT)} is not current; run python tools/stubs.py")
        return 1 if stale else 0
    for package in stale:
        path_of(package).write_text(render(package), encoding="utf-8")
        print(f"wrote {path_of(package).relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
