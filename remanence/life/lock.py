"""One writer per life: an operating system lock on ``HOME/lock``.

It ends with its process, so a killed writer leaves no stale lock behind.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self

from remanence.core.errors import Locked
from remanence.life.files import plain_errors

__all__ = ["Lock"]

# Where the locked byte lies on Windows, whose locks keep others from reading the bytes they cover: far behind the pid.
_FAR = 1 << 30
_TRIES, _PAUSE = 20, 0.025  # seconds


class Lock:
    """Takes the writer's lock of a life; hold the object as long as you write, then `release` it (or use ``with``).

    The lock is not re-entrant: a second `Lock` of the same home is refused in the same process too. Locks are local;
    homes on network disks are not protected.

    Raises:
        Locked: another process, or another object of this process, is writing to the life; names its pid.
        StorageError: the home cannot be written.
    """

    def __init__(self, home: str | Path) -> None:
        self.path = Path(home) / "lock"
        self._handle: int | None = None
        with plain_errors(self.path):
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited by programs we start
        for tries_left in reversed(range(_TRIES)):
            try:
                _lock(handle)
                break
            except OSError:
                pid = _pid(handle)
                if tries_left and pid != os.getpid():
                    time.sleep(
                        _PAUSE
                    )  # a killed writer may take a moment to be gone, and so may a worker it just forked
                    continue
                os.close(handle)
                raise Locked(self._message(pid)) from None
        try:
            with plain_errors(self.path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()}\n".encode(), 0) if hasattr(os, "pwrite") else os.write(
                    handle, f"{os.getpid()}\n".encode()
                )
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        _open.add(self)

    def _message(self, pid: int | None) -> str:
        home = self.path.parent
        if pid == os.getpid():
            return f"{home} is already open in this process; close() the other Life first, or use that one"
        who = f"process {pid}" if pid is not None else "another process"
        return f"{home} is being written by {who}; wait until it ends, or stop it: the lock goes with the process"

    def release(self) -> None:
        """Gives the lock back; harmless when done twice."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, 0)
            os.close(handle)  # closing is what unlocks

    @property
    def held(self) -> bool:
        """True until `release`."""
        return self._handle is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if contextlib is not None:  # at the interpreter's end, modules are gone already
            with contextlib.suppress(Exception):
                self.release()


if sys.platform == "win32":  # pragma: no cover
    import msvcrt

    def _lock(handle: int) -> None:
        os.lseek(handle, _FAR, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _pid(handle: int) -> int | None:
    """The pid that the holder wrote, or None while it has not done so yet."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        return int(os.read(handle, 32))
    except (OSError, ValueError):
        return None


_open: weakref.WeakSet[Lock] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child (a data loader's worker) would share the lock and keep it after its parent was killed.

    It closes its copy at once.
    """
    for lock in list(_open):
        if lock._handle is not None:
            os.close(lock._handle)  # the parent's own handle, and with it the lock, stays
            lock._handle = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
