"""Metrics: one figure or a few, taken after each event. Each class is imported when it is first asked for."""

from remanence.catalogue import surface

__getattr__, __dir__ = surface("measure")
