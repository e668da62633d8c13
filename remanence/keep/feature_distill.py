"""Hold the features of the current data where the model of the event's start had them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from remanence.core.knobs import knob
from remanence.core.problem import Batch
from remanence.nn.anatomy import head
from remanence.nn.distances import mse
from remanence.train.roles import Keeper
from remanence.train.update import Update


@dataclass
class FeatureDistill(Keeper):
    """Pull the head's input towards what the model of the event's start gives for the same rows.

        L + strength * mean_i ||f(x_i) - f0(x_i)||_2^2        summed over the D features

    f0 is frozen and in eval mode; it is made anew at each event and dropped after it, so nothing here outlives an event. It
    acts once something was learned before: from the second event on, and in forget runs, where its rows are the retained.

    Pick it, with `lwf` for the head, where features drift and no old example may be kept; with a pretrained network `l2` does
    better (Smith et al. 2023). The head itself is not held. Needs: borders.
    Reference: Smith et al. 2023, "A Closer Look at Rehearsal-Free Continual Learning", arXiv 2203.17269 (FeatKD).
    Deviation: rows are averaged; the paper gives no weight, so the default is ours.
    """

    strength: float = knob(0.1, "weight of the distillation term; distances grow with the number of features", low=0)

    def begin(self, u: Update) -> None:
        nothing = not len(u.classes.old) if u.columns else u.first
        self._teacher = None if nothing else u.reference()
        if self._teacher is not None:
            u.ask_features()

    def loss(self, u: Update, batch: Batch) -> Tensor | None:
        if self._teacher is None:
            return None
        with torch.no_grad():
            target = u.problem.forward(self._teacher, batch, head(self._teacher)).features
        found = u.out(batch, features=True).features
        assert found is not None and target is not None
        return self.strength * mse(found, target, reduce="sum").mean()
