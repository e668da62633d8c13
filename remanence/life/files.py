"""Durable files: what is written here is on the disk whole or not at all, also after a kill or a power cut.

A file is written beside its final place (or in the life's ``work/``), flushed to the disk, renamed, and the folder's
entry is flushed as well. Operating system
errors come out as `StorageError` with plain words and what to do. `canonical` is the one text form of JSON in a life:
everything that is hashed or signed goes through it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remanence.core.errors import BadInput, StorageError

__all__ = ["canonical", "empty", "inside", "plain_errors", "sha256", "sha256_file", "sync_folder", "write_atomic"]


def canonical(value: Any) -> str:
    """JSON with sorted keys, no blanks, ASCII only and Python's shortest exact form of floats: equal values give equal
    text on every machine.

    Numpy scalars are taken as numbers, tuples as lists.

    Raises:
        BadInput: a NaN or infinite number, a key that is no string, or a value that is not JSON; the message names the
            place.
    """
    return json.dumps(_plain(value, "$"), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _plain(value: Any, place: str) -> Any:
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadInput(f"{place} is {value}, which JSON cannot hold; store None or a word instead")
        return float(value)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise BadInput(f"{place} has the key {key!r}; keys must be strings")
        return {key: _plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}[{at}]") for at, item in enumerate(value)]
    if (
        hasattr(value, "dtype")
        and getattr(value, "ndim", 1) == 0
        and hasattr(value, "item")
        and not hasattr(value, "detach")
    ):
        return _plain(value.item(), place)
    raise BadInput(f"{place} is a {type(value).__name__}, which is not JSON")


def sha256(data: bytes | bytearray | memoryview | str) -> str:
    """sha256 (hex) of bytes, or of a text's UTF-8 bytes."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """sha256 (hex) of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with plain_errors(path), open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def inside(root: str | Path, path: str | Path) -> Path:
    """`path` (taken relative to `root` unless absolute) with links resolved.

    Raises:
        BadInput: it lies outside `root`.
    """
    base = Path(root).resolve()
    full = (base / path).resolve()
    if full != base and base not in full.parents:
        raise BadInput(f"{str(path)!r} lies outside {str(base)!r}")
    return full


@contextlib.contextmanager
def plain_errors(path: str | Path) -> Iterator[None]:
    """Turns operating system errors about `path` into `StorageError` with plain words."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(storage_message(error, path)) from error


def storage_message(error: OSError, path: str | Path) -> str:
    """What went wrong with `path`, and what to do about it."""
    where = str(error.filename or path)
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return f"the disk is full: {where} could not be written; nothing was changed; free some space and try again"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return (
            f"no permission for {where} (a read-only folder or disk?); nothing was changed; make it accessible "
            "and try again"
        )
    if error.errno == errno.ENOENT:
        return f"{where} does not exist"
    return f"{where}: {error.strerror or error}"


def write_atomic(
    path: str | Path,
    data: bytes | bytearray | memoryview,
    *,
    work: str | Path | None = None,
    mode: int = 0o644,
    settle: bool = True,
) -> None:
    """Writes a file so that after any crash either the old content or the new is there, never a part.

    Args:
        path: where the file shall be; its folder is made if missing.
        data: the whole content.
        work: the folder of the unfinished file, on the same disk (a life's ``work/``, emptied at every open); default:
            the file's own folder.
        mode: permissions of the new file; it has them from its first byte on.
        settle: flush the folder's entry, too. Who writes several files may do that once, by `sync_folder`, after the last.

    Raises:
        StorageError: full, read-only or failing disk; the unfinished file is removed and the old content is as it was.
    """
    path = Path(path)
    folder = Path(work) if work is not None else path.parent
    part = folder / f".{path.name}.{secrets.token_hex(6)}.part"
    with plain_errors(path):
        _make_folder(path.parent)
        _make_folder(folder)
        try:
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            if settle:
                sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise


def _make_folder(folder: Path) -> None:
    """Makes a folder and its parents; the entry of each new one is flushed in its parent."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        sync_folder(new.parent)


def sync_folder(folder: str | Path) -> None:
    """Flushes a folder's entries (a rename or removal is not durable before).

    Nothing to do on Windows, which cannot open folders.
    """
    if os.name == "nt":
        return
    with plain_errors(folder):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def empty(folder: str | Path) -> None:
    """Removes everything in a folder, and makes the folder if it is missing. Links are removed, never followed."""
    folder = Path(folder)
    with plain_errors(folder):
        _make_folder(folder)
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                empty(entry)
                entry.rmdir()
            else:
                entry.unlink()
        sync_folder(folder)
