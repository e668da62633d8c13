"""Remanence keeps the books on what a neural network remembers: learn, keep, forget, recall, budget, measure."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "Life": "remanence.life.life:Life",
    "guard": "remanence.train.guard:guard",
    "protect": "remanence.train.trainer:protect",
    "Request": "remanence.data:Request",
    "Ids": "remanence.core.ids:Ids",
    "CausalLM": "remanence.core.problem:CausalLM",
    "Classification": "remanence.core.problem:Classification",
    "Regression": "remanence.core.problem:Regression",
    "parts": "remanence.catalogue:parts",
}
_MODULES = ("data", "models", "learn", "keep", "forget", "where", "measure", "testing")

if TYPE_CHECKING:
    from remanence import data, forget, keep, learn, measure, models, testing, where
    from remanence.catalogue import parts
    from remanence.core.ids import Ids
    from remanence.core.problem import CausalLM, Classification, Regression
    from remanence.data import Request
    from remanence.life.life import Life
    from remanence.train.guard import guard
    from remanence.train.trainer import protect

__all__ = [
    "CausalLM",
    "Classification",
    "Ids",
    "Life",
    "Regression",
    "Request",
    "data",
    "forget",
    "guard",
    "keep",
    "learn",
    "measure",
    "models",
    "parts",
    "protect",
    "testing",
    "where",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        module, _, attribute = _NAMES[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    if name in _MODULES:
        return importlib.import_module(f"remanence.{name}")
    raise AttributeError(f"module 'remanence' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
