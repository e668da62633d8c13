"""Forgetters: what removes a request from the weights. Each class is imported when it is first asked for."""

from remanence.catalogue import surface

__getattr__, __dir__ = surface("forget")
