"""What the weights hold, by the ledger's rows: pure set algebra, replayed from the first row to the last."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from remanence.core.ids import Ids


@dataclass
class Books:
    """`consumed`: ids the weights were trained on. `states`: those that a forget has changed since, by state.
    `tombstones`: ids that every later data access leaves out. `attempts`: why an id is still in ``holds``."""

    consumed: Ids = field(default_factory=Ids)
    touched: Ids = field(default_factory=Ids)
    states: dict[str, Ids] = field(default_factory=lambda: {"deleted": Ids(), "unlearned": Ids(), "suppressed": Ids()})
    tombstones: Ids = field(default_factory=Ids)
    attempts: list[tuple[Ids, str]] = field(default_factory=list)

    def learned(self, ids: Ids, moves_weights: bool) -> None:
        """An event took `ids` in: they hold again, whatever was forgotten before."""
        self.tombstones = self.tombstones - ids
        self.touched = self.touched | ids
        if moves_weights:
            self.consumed = self.consumed | ids
            self.states = {state: held - ids for state, held in self.states.items()}
            self.attempts = [(held - ids, why) for held, why in self.attempts]

    def forgotten(self, ids: Ids, state: str, why: str, exact: bool) -> None:
        """A committed forget of `ids` left the weights in `state`; an exact one deletes everything forgotten so far."""
        self.tombstones = self.tombstones | ids
        reached = self.tombstones if exact else ids
        for name in self.states:
            self.states[name] = self.states[name] - reached
        self.attempts = [(held - reached, reason) for held, reason in self.attempts]
        if state == "holds":
            self.attempts.append((reached, why))
        else:
            self.states[state] = self.states[state] | reached

    def weights(self, ids: Ids) -> list[tuple[Ids, str, str]]:
        """(ids, state, reason) of the weights for those of `ids` that they ever consumed, worst first."""
        mine = ids & self.consumed
        left = mine
        rows: list[tuple[Ids, str, str]] = []
        reasons = {
            "suppressed": "hidden by a guard",
            "unlearned": "measured closer to retraining than doing nothing",
            "deleted": "as in a life without them",
        }
        changed: list[tuple[Ids, str, str]] = []
        for state, why in reasons.items():
            found = mine & self.states[state]
            left = left - found
            if found:
                changed.append((found, state, why))
        for held, why in self.attempts:
            found = left & held
            left = left - found
            if found:
                rows.append((found, "holds", why))
        if left:
            rows.insert(0, (left, "holds", "consumed in training"))
        return rows + changed

    def holding(self) -> Ids:
        """Ids of which the weights may hold a trace: all consumed but those deleted."""
        return self.consumed - self.states["deleted"]

    def summary(self) -> dict[str, Any]:
        return {"consumed": len(self.consumed), **{state: len(ids) for state, ids in self.states.items()}}
