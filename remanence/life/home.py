"""A home as a folder: whether a life has begun in it, and deleting it whole."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from remanence.core.errors import BadInput, Locked
from remanence.life.files import plain_errors
from remanence.life.ledger import Ledger
from remanence.life.lock import Lock


def begun(home: str | Path) -> bool:
    """Whether a life was born in this folder. One that was killed before has left files of no life, which count for nothing.

    Raises:
        Corrupt: there is a ledger, and it cannot be relied on.
    """
    path = Path(home) / "ledger.db"
    if not path.is_file() or not path.stat().st_size:
        return False
    try:
        with Ledger(path, create=True, check=False) as ledger:
            return bool(ledger.rows("born"))
    except Locked:
        return True


#: What a life puts into its home; whatever else lies there is not ours.
_OWN = re.compile(
    r"ledger\.db(-wal|-shm|-journal)?|plan\.yaml|(report|audit)\.(html|json)|cell\.json|snapshots|receipts|work|lock"
)


def unlived(home: str | Path) -> bool:
    """Whether the life in a home was born and nothing has happened to it yet, so that it can begin anew."""
    with Ledger(Path(home) / "ledger.db", read_only=True) as ledger:
        return not ledger.rows(("learn", "forget", "asked", "receipt"))


def delete(home: str | Path) -> list[str]:
    """Delete a life with everything it remembers; returns what was deleted. Files in the folder that are no life's stay.

    Raises:
        BadInput: the folder is no life's home.
        Locked: a process is writing to it.
    """
    root = Path(home).resolve()
    if not (root / "ledger.db").is_file():
        raise BadInput(f"{root} is no life's home (no ledger.db); nothing was deleted")
    lock = Lock(root)
    try:
        names = [path.name for path in root.iterdir() if _OWN.fullmatch(path.name) and path.name != "lock"]
        # the ledger last: it is what makes the folder a home, so that a deletion that was killed can be asked for again
        names.sort(key=lambda name: (name == "ledger.db", name))
        with plain_errors(root):
            for name in names:
                path = root / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
    finally:
        lock.release()
    with plain_errors(root):
        (root / "lock").unlink(missing_ok=True)
        if not any(root.iterdir()):
            root.rmdir()
    return names
