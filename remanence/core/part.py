"""A part: one line of the catalogue."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

KINDS = (
    "method", "guard", "layer", "cache", "store", "optimizer", "loss", "metric", "attack", "probe", "benchmark", "stream",
    "schedule", "transform", "head", "engine",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A method, metric or other building block: where it is, what it needs and where it comes from.

    `verb` and `slug` are unique together; `target` is ``module:Class``; `cards` are the papers' names; `needs` are words such as
    ``labels`` or ``old-data``.
    """

    slug: str
    verb: str
    kind: str
    family: str
    target: str
    cards: tuple[str, ...] = ()
    paper: str = ""
    needs: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def name(self) -> str:
        """The class's name."""
        return self.target.partition(":")[2]

    def load(self) -> type[Any]:
        """Import and return the class."""
        loaded: type[Any] = getattr(importlib.import_module(self.module), self.name)
        return loaded
