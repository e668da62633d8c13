"""Keep some old examples and train on them again beside the new ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.nn.buffer import Buffer
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class Replay(Keeper):
    """Every batch is joined by rows drawn from a buffer of old examples.

        L = mean over (new rows + drawn rows) of loss(f(x), y)

    ``class-balanced`` (the default): after each event `per_class` examples of each of its classes stay, or `capacity` is
    shared evenly by all classes. ``reservoir``: every example of the stream is in the buffer of `capacity` with equal
    probability at any time (Vitter 1985, algorithm R).

    Pick it whenever old examples may be kept: nothing this simple is better. Needs: labels for ``class-balanced``.
    References: Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning", arXiv 1902.10486.
    """

    stores: ClassVar[tuple[str, ...]] = ("capacity", "per_class")

    per_class: int | None = knob(20, "examples kept of each class; None: `capacity` decides", low=0)
    capacity: int | None = knob(None, "examples kept in all; None: no limit but `per_class`", low=0)
    batch_size: int = knob(64, "rows drawn per batch", low=0)
    policy: str = knob("class-balanced", "who stays", choices=("class-balanced", "reservoir"))

    def setup(self) -> None:
        if self.policy == "reservoir" and self.capacity is None:
            from remanence.core.errors import BadInput

            raise BadInput("replay: policy='reservoir' needs a capacity")
        self.buffer = Buffer(self.capacity, None if self.policy == "reservoir" else self.per_class, self.policy)

    @property
    def inert(self) -> bool:
        return self.batch_size == 0 or self.capacity == 0 or (self.policy == "class-balanced" and self.per_class == 0)

    def prepare(self, u: Update, batch: Batch) -> Batch:
        if not len(self.buffer):
            return batch
        return u.extend(
            batch, self.buffer.draw(self.batch_size, u.rng("replay"), balanced=self.policy != "reservoir"), self
        )

    def after(self, u: Update, batch: Batch) -> None:
        if self.policy == "reservoir" and u.kind == "learn" and u.epoch < u.sweep:
            self._add(u, {name: column[batch["origin"] == 0] for name, column in batch.items()})

    def end(self, u: Update) -> None:
        # Of an event without epochs, which only shows its rows, no batch came.
        if u.kind == "learn" and (self.policy == "class-balanced" or not u.settings.epochs):
            task = u.data("task")
            for batch in u.batches(task, 4096):
                self._add(u, batch)

    def _add(self, u: Update, batch: Batch) -> None:
        rows = {name: column for name, column in batch.items() if name not in ("origin", "weight")}
        self.buffer.add(rows, u.rng("replay-buffer"))
