"""Early stopping: training ends when a held-back share of the task is not answered better any more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from remanence.core.errors import BadInput
from remanence.core.problem import Out
from remanence.core.rng import generator
from remanence.data import Examples

if TYPE_CHECKING:
    from remanence.train.update import Update


class Stopping:
    """After each epoch the mean loss on the validation rows; `patience` epochs without a lower one end the run, and the weights of
    the best epoch come back (Prechelt 1998, "Early Stopping - But When?").

    The rows are a share of the task's own, drawn by an address of their own; they are not trained on, but they decide when
    training ends, so they count as consumed. Held-out test data is never looked at.
    """

    def __init__(self, patience: int, rows: Examples) -> None:
        self.patience, self.rows = patience, rows
        self.best, self.waited = math.inf, 0
        self.weights: dict[str, Tensor] = {}

    @classmethod
    def split(cls, u: Update, data: Examples) -> tuple[Stopping, Examples]:
        """The stopping of this run, and the rows that are left to train on.

        Raises:
            BadInput: too few rows for both.
        """
        count = round(u.settings.validation * len(data))
        if not 0 < count < len(data) or u.settings.patience is None:
            raise BadInput(
                f"patience needs rows to look at: validation={u.settings.validation} of {len(data)} rows leaves none on one side"
            )
        order = torch.randperm(len(data), generator=generator(u.seed, u.event, u.phase, "validation"))
        rows = data.select(order[:count].sort().values)
        u.consumed.epoch(rows.id, u.kind == "forget")
        return cls(u.settings.patience, rows), data.select(order[count:].sort().values)

    def over(self, u: Update) -> bool:
        """Look at the epoch that has just ended; whether it was the last."""
        with torch.no_grad():
            if "y" in self.rows.columns:
                y = self.rows["y"].to(u.device)
                loss = float(u.problem.loss(Out(u.outputs(self.rows)), {"y": y}, u.classes.seen if u.columns else None))
            else:
                loss = float(u.scores(self.rows)["loss"].double().mean())
        if loss < self.best:
            self.best, self.waited = loss, 0
            self.weights = {name: value.detach().clone() for name, value in u.model.state_dict().items()}
            return False
        self.waited += 1
        return self.waited >= self.patience

    def restore(self, u: Update) -> None:
        """Put the best epoch's weights and buffers back."""
        if self.weights and self.waited:
            u.model.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.waited = float(state["best"]), int(state["waited"])
        self.weights = {name: value.clone() for name, value in state["weights"].items()}
