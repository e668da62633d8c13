"""Models retrained for evidence, kept on disk and shared: each lies under the hash of everything that made it.

    FOLDER/<key>/manifest.json, snapshots/

A reference is a holder of what it was trained on. Its life writes down the key and the ids; the folder knows neither lives nor ids.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import remanence
from remanence.core.errors import BadInput, Corrupt
from remanence.core.part import Part
from remanence.life.files import canonical, plain_errors, sha256, sync_folder, write_atomic
from remanence.life.snapshots import Snapshots

__all__ = ["References", "code_sha256"]

_KEY = re.compile(r"[0-9a-f]{64}")
#: What a result depends on beside the parts in use: the floors below them, and how a life runs and measures.
_SHARED = ("core", "nn", "models", "data", "train", "measure")
_LIFE = ("life", "events", "state", "evidence", "forgetting", "books")


class References:
    """The references in a folder, by key (64 hex digits).

    Raises:
        StorageError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        with plain_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise BadInput(f"{key!r:.80} is no key of a reference; it has 64 hex digits")
        return self.folder / key

    def __contains__(self, key: str) -> bool:
        return (self._path(key) / "manifest.json").is_file()

    def get(self, key: str) -> dict[str, Any] | None:
        """The packed state under `key`, checked against its hashes; None if there is none. A damaged one is dropped: it can be made anew."""
        if key not in self:
            return None
        try:
            manifest = json.loads((self._path(key) / "manifest.json").read_text(encoding="utf-8"))
            return Snapshots(self._path(key)).load(manifest)
        except (Corrupt, OSError, ValueError):
            self.erase(key)
            return None

    def put(self, key: str, packed: Mapping[str, Any]) -> None:
        """Keep a state. Another process may do the same at the same time; they are equal, and one stays."""
        if key in self:
            return
        part = self.folder / f".{key[:16]}.{secrets.token_hex(4)}"
        try:
            manifest = Snapshots(part).save(packed)
            write_atomic(part / "manifest.json", canonical(manifest).encode(), work=part / "work")
            with plain_errors(part), contextlib.suppress(FileExistsError):
                shutil.rmtree(part / "work")
                if self._path(key).exists() and key not in self:  # half erased
                    shutil.rmtree(self._path(key))
                try:
                    os.rename(part, self._path(key))
                except OSError:
                    if key not in self:
                        raise
                sync_folder(self.folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def erase(self, key: str) -> None:
        """Delete a reference; harmless when it is gone."""
        path = self._path(key)
        with plain_errors(path):
            (path / "manifest.json").unlink(missing_ok=True)
            if path.exists():
                shutil.rmtree(path)
                sync_folder(self.folder)

    def bytes(self, key: str) -> int:
        """Bytes on the disk."""
        path = self._path(key)
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.exists() else 0


def code_sha256(parts: Iterable[Part]) -> str:
    """sha256 (hex) of the code that a result depends on: the shared floors, and the modules of the parts in use and no others."""
    own = {part.module: _module_sha256(part.module) for part in parts}
    return sha256(canonical([_shared_sha256(), sorted(own.items())]))


@cache
def _shared_sha256() -> str:
    root = Path(remanence.__file__).parent
    files = [path for folder in _SHARED for path in sorted((root / folder).rglob("*.py"))]
    files += [root / "life" / f"{name}.py" for name in _LIFE] + sorted(root.glob("*/base.py"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def _module_sha256(module: str) -> str:
    from importlib.util import find_spec

    spec = find_spec(module)
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    return sha256(origin.read_bytes()) if origin is not None and origin.is_file() else "no source"
