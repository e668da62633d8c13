"""The loss of every task, and how much it rose since the task came."""

from __future__ import annotations

from dataclasses import dataclass

from remanence.train.roles import Metric
from remanence.train.update import Context


@dataclass
class Loss(Metric):
    """Mean loss on the test set of every task seen, and its rise since the life first measured the task.

        loss/<task>      mean over the task's rows of the problem's loss, in nats (of a text: per target)
        loss             mean over tasks
        loss/forgetting  mean over all tasks but the newest of  loss now - loss when it was first measured

    With general text as the first task (only shown, ``epochs=0``, where the network knows it) its figure is the forgetting of general
    text. A class that the head does not know has no loss; such a task is left out until it has one.

    Pick it for language models, whose accuracy moves late, and for continued pretraining. Needs: a test set per task, labels or targets.
    Reference: Ibrahim et al. 2024, arXiv 2403.08763, who judge continued pretraining by the losses on old and new data.
    """

    def setup(self) -> None:
        self.then: dict[str, float] = {}  # loss of each task when it was first measured, in the order of their coming

    def value(self, c: Context) -> dict[str, float]:
        scores = {str(task.id): c.evaluate(task.test) for task in c.tasks if len(task.test)}
        now = {task: found["loss"] for task, found in scores.items() if "loss" in found}
        for task, loss in now.items():
            self.then.setdefault(task, loss)
        rises = [now[task] - loss for task, loss in list(self.then.items())[:-1] if task in now]
        figures = {f"loss/{task}": loss for task, loss in now.items()}
        if now:
            figures["loss"] = sum(now.values()) / len(now)
        return {**figures, **({"loss/forgetting": sum(rises) / len(rises)} if rises else {})}
