"""What a life says of itself: its events, where examples live, and the learn events as it remembers them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from remanence.core.ids import Ids
from remanence.data import Task
from remanence.life.books import Books
from remanence.life.events import Recipe, without
from remanence.life.ledger import Row


@dataclass(frozen=True)
class Event:
    """What became of one event."""

    number: int
    kind: str
    label: str
    status: str
    measures: dict[str, float]
    accuracy: dict[int, float]
    steps: int
    seconds: float


@dataclass(frozen=True)
class Trace:
    """Where `ids` live: a holder, what became of them there (`state`), through which `inputs`, and why."""

    holder: str
    ids: Ids
    state: str
    inputs: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.holder}: {len(self.ids)} {self.state} ({self.reason})"


@dataclass
class Learned:
    """A learn event as the life remembers it: how, from which task (None: its data cannot be reached) and which ids."""

    recipe: Recipe
    task: Task | None
    ids: Ids
    about: dict[str, Any]

    def retained(self, gone: Ids) -> Task | None:
        """The task with the rows consumed then that are not in `gone`; None where nothing is left or reachable."""
        if self.task is None:
            return None
        kept = without(self.task, self.task.train.ids - (self.ids - gone))
        return kept if len(kept.train) else None


def apply_row(books: Books, row: Row, ids_of: Callable[[str], Ids]) -> None:
    """Enter one committed row into the books."""
    if row.kind == "learn":
        books.learned(ids_of(row.body["new"]) | ids_of(row.body["replayed"]), row.body["moves_weights"])
    elif row.kind == "forget" and row.body["status"] != "nothing held":
        books.forgotten(ids_of(row.body["ids"]), row.body["weights_state"], row.body["why"], row.body["exact"])
