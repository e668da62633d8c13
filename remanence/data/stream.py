"""Tasks and the streams they come in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from remanence.core.errors import BadInput
from remanence.data.examples import Examples

SCENARIOS = ("class", "task", "domain", "none")


@dataclass(frozen=True)
class Task:
    """One step of a stream: what to learn from and what to be measured on.

    `classes` are the labels that occur in `train`; `names` are words for them, in the same order. `strangers`: rows of the same kind
    that nobody learns, for attacks that tell members from others; None: `test` are such rows.
    """

    train: Examples
    test: Examples
    classes: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    id: int = 0
    strangers: Examples | None = None

    def fingerprint(self) -> str:
        """SHA-256 over train, test and strangers."""
        strangers = "" if self.strangers is None else self.strangers.fingerprint()
        return hashlib.sha256((self.train.fingerprint() + self.test.fingerprint() + strangers).encode()).hexdigest()


@dataclass(frozen=True)
class Stream:
    """Tasks in order. `scenario`: what tells them apart (class, task, domain or none); `borders`: whether learners are told where a task ends."""

    tasks: tuple[Task, ...]
    scenario: str = "class"
    borders: bool = True
    name: str = field(default="stream", compare=False)

    def __post_init__(self) -> None:
        if self.scenario not in SCENARIOS:
            raise BadInput(f"scenario={self.scenario!r} is not one of {', '.join(SCENARIOS)}")

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __getitem__(self, index: int) -> Task:
        if not -len(self.tasks) <= index < len(self.tasks):
            raise BadInput(f"the stream {self.name!r} has tasks 0 to {len(self.tasks) - 1}, not {index}")
        return self.tasks[index]

    def fingerprint(self) -> str:
        """SHA-256 over all tasks: the same stream has the same fingerprint in every process."""
        return hashlib.sha256("".join(task.fingerprint() for task in self.tasks).encode()).hexdigest()

    def table(self) -> str:
        """Which classes come when, as text: one line for each task."""
        from remanence.data.picture import table

        return table(self)

    def picture(self) -> str:
        """Which classes come when, as the text of an SVG file."""
        from remanence.data.picture import picture

        return picture(self)


def groups_of(classes: Sequence[int], tasks: int) -> list[list[int]]:
    """`classes` cut into `tasks` groups of equal size.

    Raises:
        BadInput: they cannot be cut evenly.
    """
    if not 1 <= tasks <= len(classes) or len(classes) % tasks:
        fits = [n for n in range(1, len(classes) + 1) if len(classes) % n == 0]
        raise BadInput(f"{len(classes)} classes cannot be cut into {tasks} equal tasks; tasks may be {fits}")
    size = len(classes) // tasks
    return [list(classes[i * size : (i + 1) * size]) for i in range(tasks)]
