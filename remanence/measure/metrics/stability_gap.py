"""The stability gap: how deep old tasks fall between two measurements at task ends.

    A(E_i, f_n)   accuracy on task i after step n
    |T_i|         the step at which task i ended; k is the task learned last, the current one
    min-ACC = 1/(k-1) sum_{i<k} min_{|T_i| < n <= t} A(E_i, f_n)
    WC-ACC  = 1/k A(E_k, f_t) + (1 - 1/k) min-ACC
    WF^D    = mean over tasks of max over windows of D consecutive evaluations of max_{i<=j} (A_i - A_j)
    WP^D    = the same of (A_j - A_i)
    LCA_b   = mean over tasks of the mean of the first b evaluations of the task while it is learned
    gap     = mean over earlier tasks of the accuracy now minus its minimum
    depth   = mean over earlier tasks of A(0) - min_n A(n), A(0) before the current event and n counting in it
    length  = mean of the steps until A(n) >= A(0) again after the lowest point (all so far, where it is not back yet)
    area    = mean of sum_n max(0, A(0) - A(n)) * every

All but length and area (both in steps) lie in [0, 1]. Higher is better for min-ACC, WC-ACC, WP and LCA; lower for the others.

Pick it to see what task-end accuracy hides: a drop at every switch, with replay too. Of texts, the accuracy is the share of
target tokens.
Needs: a test set per task, labels.

Reference: De Lange et al., "Continual evaluation for lifelong learning: Identifying the stability gap", ICLR 2023,
arXiv 2205.13452. Depth, length and area are made for this library after Guo et al. 2025, "Efficient Domain Continual
Pretraining by Mitigating the Stability Gap", ACL, arXiv 2406.14833, which shows the curves and names no figure.

Deviations: i = j is allowed in the windows, so that WF and WP are never negative; LCA_b starts after the first step,
not before it (that evaluation does not exist in the loop). With `every` > 1 the minimum is optimistic; the period is
reported beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.rng import generator
from remanence.data import Examples
from remanence.train.roles import Metric
from remanence.train.update import Context

TaskId = int


class _Extreme:
    """Over all windows of `size` consecutive values, the largest fall (sign 1) or rise (sign -1); O(1) amortised,
    O(size) memory.

    The deque holds the values that can still be a window's maximum: indices ascending, values descending.
    """

    def __init__(self, size: int, sign: int) -> None:
        self.size, self.sign, self.best = size, sign, 0.0
        self.queue: deque[tuple[int, float]] = deque()

    def add(self, index: int, value: float) -> None:
        value *= self.sign
        while self.queue and self.queue[-1][1] <= value:
            self.queue.pop()
        self.queue.append((index, value))
        if self.queue[0][0] <= index - self.size:
            self.queue.popleft()
        self.best = max(self.best, self.queue[0][1] - value)


class Dip:
    """How far a value falls below where it was, and for how many evaluations."""

    def __init__(self, base: float, count: int = 0, depth: float = 0.0, area: float = 0.0, back: int = 0) -> None:
        self.base, self.count, self.depth, self.area, self.back = base, count, depth, area, back

    def add(self, value: float) -> None:
        """One evaluation."""
        self.count += 1
        short = max(0.0, self.base - value)
        self.area += short
        if short > self.depth:
            self.depth, self.back = short, 0
        elif not short and self.depth and not self.back:
            self.back = self.count

    @property
    def length(self) -> int:
        """Evaluations until the value was back after its lowest point; all so far where it is not; 0 where it never fell."""
        return (self.back or self.count) if self.depth else 0


class _Series:
    """What is kept of one task's accuracies."""

    def __init__(self, windows: Sequence[int]) -> None:
        self.count, self.last, self.minimum = 0, float("nan"), float("inf")
        self.started, self.first, self.ended = 0, 0.0, False
        self.dip: Dip | None = None  # since the current task began
        self.fall = {size: _Extreme(size, 1) for size in windows}
        self.rise = {size: _Extreme(size, -1) for size in windows}


class Trace:
    """The measure itself, fed one evaluation at a time; it needs no model.

    ``start(task)`` when a task begins, ``feed(step, {task: accuracy})`` after steps, ``end(task)`` when it ends;
    `figures` at any moment.

    A holder of no example: it keeps mean accuracies only.
    """

    def __init__(self, windows: Sequence[int] = (10, 100), beta: int = 10) -> None:
        if not windows or min(windows) < 2 or beta < 1:
            raise BadInput(
                f"windows must be at least 2 evaluations long and beta at least 1, got {tuple(windows)} and {beta}"
            )
        self.windows, self.beta = tuple(int(size) for size in windows), int(beta)
        self.tasks: dict[TaskId, _Series] = {}
        self.current: TaskId | None = None
        self.step = -1

    def start(self, task: TaskId) -> None:
        """`task` is learned from now on; one that was being learned has ended."""
        if self.current is not None and self.current != task:
            self.end(self.current)
        series = self._of(task)
        if self.current != task:
            series.ended = False  # learned once more: its minimum counts from its new end
            for each in self.tasks.values():
                each.dip = Dip(each.last) if each is not series and each.count else None
        self.current = task

    def end(self, task: TaskId) -> None:
        """`task` has been learned; its minimum counts from the next evaluation on."""
        series = self._of(task)
        if not series.ended:
            series.ended, series.minimum = True, float("inf")

    def drop(self, task: TaskId) -> None:
        """Leave `task` out from now on: it was forgotten on request, which is no gap."""
        self.tasks.pop(task, None)
        self.current = None if self.current == task else self.current

    def feed(self, step: int, accuracies: Mapping[TaskId, float]) -> None:
        """One evaluation after `step` (a clock that never goes back).

        Raises:
            BadInput: the clock went back, or an accuracy is not finite.
        """
        if step < self.step:
            raise BadInput(f"step {step} comes after step {self.step}; the clock must not go back")
        self.step = step
        for task, accuracy in accuracies.items():
            if not 0 <= accuracy <= 1:
                raise BadInput(f"the accuracy of task {task} is {accuracy}; it must lie in [0, 1]")
            series = self._of(task)
            for size in self.windows:
                series.fall[size].add(series.count, accuracy)
                series.rise[size].add(series.count, accuracy)
            series.count, series.last = series.count + 1, accuracy
            if series.dip is not None:
                series.dip.add(accuracy)
            if series.ended:
                series.minimum = min(series.minimum, accuracy)
            elif task == self.current and series.started < self.beta:
                series.started, series.first = series.started + 1, series.first + accuracy

    @property
    def min_acc(self) -> float | None:
        """Mean over earlier tasks of their lowest accuracy since they ended; None before there are any."""
        return _mean([series.minimum for series in self._earlier()])

    @property
    def wc_acc(self) -> float | None:
        """``1/k`` of the current accuracy and ``1 - 1/k`` of min-ACC, k = earlier tasks + 1; None before the current
        task was measured."""
        current = self.tasks.get(self.current) if self.current is not None else None
        if current is None or not current.count:
            return None
        k = len(self._earlier()) + 1
        return current.last / k + (1 - 1 / k) * (self.min_acc or 0.0)

    @property
    def gap(self) -> float | None:
        """Mean over earlier tasks of their accuracy now minus their lowest since they ended."""
        return _mean([series.last - series.minimum for series in self._earlier()])

    @property
    def lca(self) -> float | None:
        """Mean over tasks of their mean accuracy in the first `beta` evaluations while they were learned."""
        return _mean([series.first / series.started for series in self.tasks.values() if series.started])

    def forgetting(self, window: int) -> float | None:
        """WF^window: mean over tasks of the largest fall within so many evaluations; never less for a longer window."""
        return _mean([series.fall[window].best for series in self.tasks.values() if series.count])

    def plasticity(self, window: int) -> float | None:
        """WP^window: mean over tasks of the largest rise within so many evaluations."""
        return _mean([series.rise[window].best for series in self.tasks.values() if series.count])

    def figures(self) -> dict[str, float]:
        """Everything that is defined by now, by name; length and area in evaluations."""
        found: dict[str, float | None] = {
            "min_acc": self.min_acc,
            "wc_acc": self.wc_acc,
            "gap": self.gap,
            f"lca{self.beta}": self.lca,
        }
        dips = [series.dip for series in self.tasks.values() if series.dip is not None and series.dip.count]
        for name in ("depth", "length", "area"):
            found[name] = _mean([getattr(dip, name) for dip in dips])
        for size in self.windows:
            found[f"wf{size}"], found[f"wp{size}"] = self.forgetting(size), self.plasticity(size)
        return {name: value for name, value in found.items() if value is not None}

    def _of(self, task: TaskId) -> _Series:
        if task not in self.tasks:
            self.tasks[task] = _Series(self.windows)
        return self.tasks[task]

    def _earlier(self) -> list[_Series]:
        """Tasks that have ended and were measured since, without the current one."""
        return [s for task, s in self.tasks.items() if task != self.current and s.ended and s.minimum != float("inf")]

    # ------------------------------------------------------------------ the holder

    def holds(self, ids: Ids) -> Ids:
        return Ids()

    def purge(self, ids: Ids) -> None:
        pass

    def bytes(self) -> int:
        """Eight bytes for every number kept."""
        pairs = sum(len(e.queue) for s in self.tasks.values() for e in [*s.fall.values(), *s.rise.values()])
        return 8 * (2 * pairs + len(self.tasks) * (12 + 2 * len(self.windows)))

    def state_dict(self) -> dict[str, Any]:
        rows = []
        for task, s in self.tasks.items():
            minimum = None if s.minimum == float("inf") else s.minimum
            windows = [
                [size, e.sign, e.best, [list(pair) for pair in e.queue]]
                for size in self.windows
                for e in (s.fall[size], s.rise[size])
            ]
            last = s.last if s.count else None
            dip = [s.dip.base, s.dip.count, s.dip.depth, s.dip.area, s.dip.back] if s.dip is not None else []
            rows.append([task, s.count, last, minimum, s.started, s.first, s.ended, windows, *dip])
        return {
            "windows": list(self.windows),
            "beta": self.beta,
            "current": self.current,
            "step": self.step,
            "tasks": rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.windows, self.beta = tuple(state["windows"]), int(state["beta"])
        self.current, self.step, self.tasks = state["current"], int(state["step"]), {}
        for task, count, last, minimum, started, first, ended, windows, *dip in state["tasks"]:
            s = self._of(int(task))
            s.count, s.started, s.first, s.ended = count, started, first, ended
            s.last = float("nan") if last is None else last
            s.minimum = float("inf") if minimum is None else minimum
            s.dip = Dip(*dip) if dip else None
            for size, sign, best, queue in windows:
                extreme = (s.fall if sign > 0 else s.rise)[size]
                extreme.best, extreme.queue = best, deque((int(i), float(v)) for i, v in queue)


@dataclass
class StabilityGap(Metric):
    """Measures every task seen after every `every`-th step, and says how deep the old ones fell. See the head of this
    file.

    In the loop it only feeds its trace; measured outside of the loop, after the event, it ends the tasks learned by
    then. Forget runs are left out.
    """

    every: int = knob(1, "steps between evaluations", low=1)
    subset: int = knob(1000, "test examples per task, the same ones each time", low=1)
    windows: list[int] = knob([10, 100], "lengths of the windows of WF and WP, in evaluations")
    beta: int = knob(10, "evaluations that LCA averages", low=1)

    def setup(self) -> None:
        self.trace = Trace(self.windows, self.beta)

    def value(self, c: Context) -> dict[str, float]:
        """The figures so far, and the period they were taken with.

        Raises:
            BadInput: the problem has no accuracy.
        """
        task, inside = getattr(c, "task", None), hasattr(c, "step")
        if inside and getattr(c, "kind", "learn") != "learn":
            return self._figures()
        tasks = {each.id: each for each in c.tasks}
        if inside and task is not None:
            tasks.setdefault(task.id, task)
            self.trace.start(task.id)
        found = {number: self._accuracy(c, each.test) for number, each in tasks.items() if len(each.test)}
        for gone in set(self.trace.tasks) - set(found):
            self.trace.drop(gone)
        if inside:
            self.trace.feed(self.trace.step + 1, found)
        else:
            known = {number: series.last for number, series in self.trace.tasks.items() if series.count}
            if found != known:  # else the last step's evaluation, which is in the trace already
                self.trace.feed(self.trace.step + 1, found)
            for number in found:
                self.trace.end(number)
        return self._figures()

    def _figures(self) -> dict[str, float]:
        found = self.trace.figures()
        steps: dict[str, float] = {name: found[name] * self.every for name in ("length", "area") if name in found}
        return {**found, **steps, "every": float(self.every)}

    def _accuracy(self, c: Context, test: Examples) -> float:
        scores = c.evaluate(fixed_subset(test, self.subset))
        if "accuracy" not in scores:
            raise BadInput(
                "stability-gap needs a problem with an accuracy, such as classification; take it out of `measure`"
            )
        return scores["accuracy"]


def fixed_subset(examples: Examples, size: int) -> Examples:
    """At most `size` of `examples`, always the same ones: another draw at each step would add its noise to the
    minimum."""
    if len(examples) <= size:
        return examples
    rows = torch.randperm(len(examples), generator=generator(0, "fixed-subset", len(examples)))[:size]
    return examples.select(rows.sort().values)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
