"""Wheres: which weights a run may write. Each class is imported when it is first asked for."""

from remanence.catalogue import surface

__getattr__, __dir__ = surface("where")
