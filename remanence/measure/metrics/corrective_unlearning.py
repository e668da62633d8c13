"""Whether what manipulated data did to a network is undone: accuracy with the true labels where it did harm, and elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.problem import Classification
from remanence.data import Examples, cat, stamp
from remanence.train.roles import Metric
from remanence.train.update import Context


@dataclass
class CorrectiveUnlearning(Metric):
    """Accuracy on the affected domain, with true labels, beside accuracy on the rest.

        Acc_corr = P(f(x) = y),  x from the affected domain        Acc_retain = P(f(x) = y),  x from the rest

    ``patch``: the affected domain is every held-out image of another class than `target`, stamped; the rest is the held-out data as
    it is; ``attack`` is the share of stamped images that is answered with `target`. ``confusion``: the classes `pair`, against all
    others. ``random``: there is no affected domain, only ``retained``. All in [0, 1]; the first two higher, ``attack`` lower is better.
    The stream is ``corrupted``, with the same knobs; what is known to be bad is asked for by ``concepts: [known bad]``.

    The goal is the clean network's behaviour, not retraining: a model retrained without the known rows keeps the harm of the hidden
    ones, and membership figures say nothing here. Whoever chooses a method's settings by these figures uses labels that nobody has.

    Pick it when a part of some bad data was found and its harm is to be undone. Needs: a test set per task, labels.
    Reference: Goel et al. 2024, "Corrective Machine Unlearning", arXiv 2402.14015.
    """

    how: str = knob("patch", "how the data was manipulated, as in the stream", choices=("patch", "confusion", "random"))
    target: int = knob(0, "the label that stamped images were given")
    pair: list[int] = knob([0, 1], "the two classes whose labels were swapped")
    size: int = knob(3, "side of the patch in pixels", low=1)
    brightness: float = knob(1.0, "value of the patch's pixels")

    def value(self, c: Context) -> dict[str, float]:
        if not isinstance(c.problem, Classification):
            raise BadInput("corrective-unlearning needs classes")
        tests = [
            Examples({n: task.test.columns[n] for n in ("x", "y")}, "held out", task.test.id)
            for task in c.tasks
            if len(task.test)
        ]
        if not tests:
            return {}
        test = cat(tests)
        if self.how == "confusion":
            inside = torch.isin(test["y"], torch.tensor(self.pair))
            parts = {
                "corrected": test.select(inside.nonzero()[:, 0]),
                "retained": test.select((~inside).nonzero()[:, 0]),
            }
        elif self.how == "patch":
            others = test.select((test["y"] != self.target).nonzero()[:, 0])
            stamped = others.replace(x=stamp(others["x"], self.size, self.brightness))
            wrong = stamped.replace(y=torch.full_like(others["y"], self.target))
            parts = {"corrected": stamped, "attack": wrong, "retained": test}
        else:
            parts = {"retained": test}
        return {f"corrective/{name}": c.evaluate(part)["accuracy"] for name, part in parts.items() if len(part)}
