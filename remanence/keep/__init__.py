"""Keepers: what protects the old while the new is learned. Each class is imported when it is first asked for."""

from remanence.catalogue import surface

__getattr__, __dir__ = surface("keep")
