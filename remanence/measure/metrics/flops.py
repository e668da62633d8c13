"""What learning has cost, in floating point operations."""

from __future__ import annotations

from dataclasses import dataclass

from remanence.core.knobs import knob
from remanence.nn.flops import TRAINING, flops
from remanence.train.roles import Metric
from remanence.train.update import Context, Update


@dataclass
class Flops(Metric):
    """Floating point operations of all training so far, ``flops``, and of each task, ``flops/<task>``.

        flops = sum over steps of 3 * f * rows        f = operations of one row's forward, counted on the event's first batch

    Lower is cheaper. The rows are those that the network took in, rows added by keepers among them; a batch that gives several steps
    counts several times. Matrix products, convolutions and attention are counted, a multiplication and an addition as two; what works
    element by element is not. It is an estimate, and a lower bound: not in it are what a method does beside the step (a teacher's
    answers, a Fisher, other networks that it trains, closed forms), forwards for early stopping and metrics, and forget requests,
    during which no metric is called. A frozen network is counted as if all of it were trained. Steps of a phase nested in a step
    count with the rows of the batch around it. A life rounds figures to six digits.

    It looks after every step and makes one forward in an event more. Larger `every` looks less often and takes the rows of the batch
    it sees for those of all steps since; what remains after an event's last look is then lost.

    Pick it beside `accuracy` to compare methods at equal compute, and `bytes` for memory. Needs: nothing. Reference: Bornschein et
    al. 2023, "NEVIS'22: A Stream of 100 Tasks Sampled from 30 Years of Computer Vision Research", arXiv 2211.11747, where a
    training step is also counted from its graph, there by the compiler.
    """

    every: int = knob(1, "steps between two looks; 1 counts every step", low=1)

    def setup(self) -> None:
        self.spent: dict[str, float] = {}  # by task
        self.seen: list[str | int] = ["", 0]  # the event, and how many of its steps are counted

    def value(self, c: Context) -> dict[str, float]:
        if isinstance(c, Update) and c.kind == "learn" and c.task is not None:
            self._count(c, str(c.task.id))
        return {"flops": sum(self.spent.values()), **{f"flops/{task}": spent for task, spent in self.spent.items()}}

    def _count(self, u: Update, task: str) -> None:
        event, steps = self.seen
        done = u.steps_done - (int(steps) if event == u.event else 0)
        known: tuple[str, float] | None = getattr(self, "_row", None)
        rows = len(u.batch["id"])
        if known is None or known[0] != u.event:
            known = (u.event, flops(lambda: u.problem.forward(u.model, u.batch)) / rows)
            self._row = known
        now = self.spent.get(task, 0.0) + TRAINING * known[1] * rows * u.settings.accumulate * done
        self.spent, self.seen = {**self.spent, task: now}, [u.event, u.steps_done]
