"""The one idea: everything that remembers is a holder."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from remanence.core.ids import Ids

#: What a holder may be for an id, worst first. `trace`, receipts and reports use these words and no others.
STATES = ("holds", "suppressed", "unlearned", "deleted")


@runtime_checkable
class Holder(Protocol):
    """Weights, buffers, prototypes, anchors, snapshots: each can hold a trace of an example and answers for it."""

    def holds(self, ids: Ids) -> Ids:
        """Which of `ids` still leave a trace here."""

    def purge(self, ids: Ids) -> None:
        """Let them go."""

    def bytes(self) -> int:
        """What this memory costs."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to survive a crash: nested dicts of tensors and JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore exactly what `state_dict` gave."""


def worst(states: list[str]) -> str:
    """The worst of `states`: a holder takes the worst state among its inputs. An empty list is ``deleted``."""
    return min(states, key=STATES.index, default="deleted")
