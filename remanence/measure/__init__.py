"""Measures: what a life remembers, what leaked, what it cost. Each class is imported when it is first asked for."""

from remanence.catalogue import surface

__getattr__, __dir__ = surface("measure", ("metrics", "benchmarks"))
