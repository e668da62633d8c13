"""Run the Python examples of a page as a reader would: ``python tools/readme.py [README.md] [--all]``.

The first ```` ```python ```` block is run (``--all``: every one, in order, as one program) in an empty folder.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language in a Markdown page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def run(code: str) -> int:
    """Run a program in an empty folder with this interpreter; returns its exit status."""
    with tempfile.TemporaryDirectory(prefix="remanence-") as folder:
        program = Path(folder) / "example.py"
        program.write_text(code, encoding="utf-8")
        return subprocess.run([sys.executable, program.name], cwd=folder, check=False).returncode


def main() -> int:
    pages = [argument for argument in sys.argv[1:] if not argument.startswith("-")] or ["README.md"]
    for page in pages:
        found = blocks(ROOT / page, "python")
        if not found:
            print(f"{page} has no Python example")
            return 1
        code = "\n".join(found if "--all" in sys.argv[1:] else found[:1])
        print(f"Running the example of {page}", flush=True)
        if status := run(code):
            print(f"the example of {page} ended with status {status}")
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
