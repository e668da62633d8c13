"""Every error a user can meet, one class per kind; messages say what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RemanenceError(Exception):
    """Base of all errors raised on purpose."""


class BadInput(RemanenceError, ValueError):
    """A value, shape, type or id that cannot be used; nothing has moved."""


class UnknownName(BadInput):
    """A method, knob, class or file name that does not exist."""


class PlanError(BadInput):
    """A plan that cannot be run; names the file, the line and the nearest valid spelling."""


class Refused(RemanenceError):
    """An event or request was refused before anything moved."""


class DataChanged(RemanenceError):
    """A source no longer has the fingerprint under which its positional ids were recorded."""


class Locked(RemanenceError):
    """Another process or object is writing to this life."""


class Corrupt(RemanenceError):
    """A file is truncated, altered or missing."""


class Drift(RemanenceError):
    """Code, versions, threads or hardware differ from those under which the life was begun."""


class StorageError(RemanenceError, OSError):
    """The disk is full, read-only or failing."""


class NotFinite(RemanenceError):
    """A loss or weight became NaN or infinite."""


class EventFailed(RemanenceError):
    """An event failed after it was accepted; the life is as it was before."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of `choices`, or an empty string."""
    options = list(choices)
    lowered = {option.lower(): option for option in options}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return f"; did you mean {lowered[close[0]]!r}?" if close else ""
