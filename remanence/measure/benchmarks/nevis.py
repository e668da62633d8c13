"""A stream of data sets, judged by its errors and by all the computation that they took."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.core.rng import generator, seed_of
from remanence.data import Examples, Stream
from remanence.data.digits import hold_out
from remanence.nn.anatomy import evaluating, features, head_name, lone_rows, module_bytes
from remanence.nn.flops import TRAINING, flops
from remanence.train.roles import Benchmark
from remanence.train.schedules import schedule_of


@dataclass(frozen=True)
class ResourceUsage:
    """What was used: operations, and the most parameters held at once."""

    flops: float = 0.0
    parameters: int = 0
    bytes: int = 0

    def combine(self, other: ResourceUsage) -> ResourceUsage:
        """Both, one after the other: operations add up, peaks take the larger."""
        return ResourceUsage(
            self.flops + other.flops, max(self.parameters, other.parameters), max(self.bytes, other.bytes)
        )


@dataclass(frozen=True)
class TrainingEvent:
    """What a learner may see of a task: `train`, and `dev` to choose by; `y` are 0 to classes - 1."""

    task: int
    train: Examples
    dev: Examples
    classes: int


@dataclass(frozen=True)
class PredictionEvent:
    """What a learner is asked of a task: `test`, without its labels."""

    task: int
    test: Examples


class StreamLearner(Protocol):
    """Who takes part. A state is not changed in place, so that a run can go on from any of them."""

    def init(self) -> Any:
        """The state before the first task."""

    def train(self, event: TrainingEvent, state: Any) -> tuple[Any, ResourceUsage]:
        """The state after the task, and what all of it took, the search for hyper-parameters included."""

    def predict(self, event: PredictionEvent, state: Any) -> Tensor:
        """A score (N, classes) of each class for each test row; the largest is the answer."""


@dataclass(frozen=True)
class Trajectory:
    """A learner's way through a stream: of each task so far its test error, its number of test rows and what it used."""

    state: Any
    errors: tuple[float, ...] = ()
    sizes: tuple[int, ...] = ()
    usages: tuple[ResourceUsage, ...] = ()

    @property
    def usage(self) -> ResourceUsage:
        found = ResourceUsage()
        for each in self.usages:
            found = found.combine(each)
        return found

    @property
    def accuracy(self) -> float:
        """The mean over tasks."""
        return 1 - math.fsum(self.errors) / len(self.errors)

    @property
    def weighted_accuracy(self) -> float:
        """The share of all test rows that were answered rightly."""
        return 1 - math.fsum(e * n for e, n in zip(self.errors, self.sizes, strict=True)) / sum(self.sizes)

    @property
    def curve(self) -> list[tuple[float, float]]:
        """After each task, operations so far and the mean error so far."""
        return [
            (math.fsum(u.flops for u in self.usages[:n]), math.fsum(self.errors[:n]) / n)
            for n in range(1, len(self.errors) + 1)
        ]

    @property
    def point(self) -> tuple[float, float]:
        """The end of the curve, for `pareto`."""
        return self.curve[-1]


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of those (operations, error) that no other dominates, by being nowhere larger and somewhere smaller; the cheapest
    first, and of equal points all."""

    def dominated(point: tuple[float, float]) -> bool:
        return any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in points.values())

    front = [name for name, point in points.items() if not dominated(point)]
    return sorted(front, key=lambda name: (points[name], name))


@dataclass
class Nevis(Benchmark):
    """A learner goes through data sets in the order of their dates; what counts is its error and everything that was computed for it.

        for each task: state, used = train(train rows, dev rows, state);  error = share of wrong answers on its test rows
        operations = sum of used = sum over trials of 3 f rows epochs + f dev rows,  and f rows for each embedding

    f are the operations of one row's forward, counted on a batch (`remanence.nn.flops`). `run` leads any `StreamLearner` through a
    `Stream` of labelled tasks (`remanence.data.nevis.dated` makes one of folders) and returns its `Trajectory`: mean and
    example-weighted accuracy, the curve of error against operations, peaks of parameters; `pareto` says which of several learners
    are worth their price. A test row is never handed to `train`, and without its label to `predict`; a stream in which a test id
    is also one to train on is refused.

    `baseline` gives the paper's fine-tuners, one network per task: ``independent`` starts from new weights (or from given ones, if
    its builder returns a pretrained body), ``previous`` from the task before, ``dynamic`` from the earlier task whose body's features
    let a k-nearest-neighbour classifier fitted on the training rows answer most of the dev rows. Of `trials` with drawn rates and
    label smoothing the one with the lowest dev error stays; all are paid for.

    Pick it to ask whether transfer between tasks is worth what it costs; a life's own forgetting is not asked, as every task keeps
    its network. Needs: labels. Reference: Bornschein et al. 2023, "NEVIS'22: A Stream of 100 Tasks Sampled from 30 Years of Computer
    Vision Research", arXiv 2211.11747. Deviations: single-label tasks only, so that nothing averages accuracies with mean average
    precisions; trials last `epochs` and not 50,000 steps, without warm-up, early stopping and augmentation; features are taken in
    eval mode, there in train mode; the dev forwards and the search for a start are counted, in its code they are not; the oracle
    of transfers is not here. Prediction is not counted, as there.
    """

    start: str = knob("dynamic", "where a task's network starts", choices=("independent", "previous", "dynamic"))
    trials: int = knob(16, "drawn hyper-parameters per task", low=1)
    epochs: int = knob(20, "passes of a trial", low=1)
    batch_size: int = knob(64, "rows of a step", low=1)
    lowest: float = knob(1e-4, "of the rates that are drawn, log-uniform", low=0)
    highest: float = knob(1e-1, "of the rates that are drawn", low=0)
    smoothing: float = knob(0.3, "the most label smoothing that is drawn", low=0, high=1)
    momentum: float = knob(0.9, "Nesterov's; 0: none", low=0, high=1)
    weight_decay: float = knob(1e-4, "pull to zero", low=0)
    k: int = knob(5, "neighbours that vote on a dev row", low=1)
    checkpoints: int = knob(0, "the latest networks that are kept to start from; 0: all", low=0)
    dev_share: float = knob(0.2, "share of every class to choose by", low=0, high=1)

    def events(self, stream: Stream, seed: int = 0) -> Iterator[TrainingEvent | PredictionEvent]:
        """A training and a prediction event for each task.

        Raises:
            BadInput: no labels, a task without rows, too few rows of a class, or a test row that is trained on.
        """
        for task in stream:
            shared = [other.id for other in stream if task.test.ids & other.train.ids]
            if shared or not len(task.test):
                what = f"rows that task {shared[0]} trains on" if shared else "no rows"
                raise BadInput(f"the test set of task {task.id} has {what}; nothing measured on it would mean anything")
        for number, task in enumerate(stream):
            y = task.train["y"]
            if y.is_floating_point() or y.dim() != 1:
                raise BadInput(f"task {task.id} needs integer labels y, not {y.dtype} {tuple(y.shape)}")
            train, dev = hold_out(task.train, None, self.dev_share, seed_of(seed, "dev", number))
            known = y.unique()
            parts = [part.replace(y=torch.searchsorted(known, part["y"])) for part in (train, dev)]
            yield TrainingEvent(number, parts[0], parts[1], len(known))
            yield PredictionEvent(number, Examples({"x": task.test["x"]}, task.test.source, task.test.id))

    def run(
        self,
        stream: Stream,
        learner: StreamLearner,
        tasks: int | None = None,
        after: Trajectory | None = None,
        seed: int = 0,
    ) -> Trajectory:
        """The learner's way through the stream.

        Args:
            tasks: stop after so many.
            after: go on from here; with the same stream, learner and seed, all figures are those of a run that never stopped.
        """
        done = after or Trajectory(learner.init())
        for event in self.events(stream, seed):
            if event.task < len(done.errors) or (tasks is not None and event.task >= tasks):
                continue
            if isinstance(event, TrainingEvent):
                state, used = learner.train(event, done.state)
                continue
            task = stream[event.task]
            answers = learner.predict(event, state).argmax(1).cpu()
            right = task.train["y"].unique()[answers] == task.test["y"]
            error = 1 - float(right.double().mean())
            done = replace(
                done,
                state=state,
                errors=(*done.errors, error),
                sizes=(*done.sizes, len(right)),
                usages=(*done.usages, used),
            )
        return done

    def baseline(self, make: Builder, seed: int = 0) -> FineTuning:
        """The fine-tuner that the knobs describe, on the CPU; ``make(classes, seed)`` builds a network with so many outputs."""
        return FineTuning(self, make, seed)


class Builder(Protocol):
    def __call__(self, classes: int, seed: int, /) -> nn.Module: ...


class Start(NamedTuple):
    """An earlier task, and the share of dev rows that the neighbours among its features answer rightly (None: not asked)."""

    task: int
    share: float | None


@dataclass(frozen=True)
class Networks:
    """One network for each task that is kept, and where each task's network started (None: from new weights)."""

    models: tuple[tuple[int, nn.Module], ...] = ()
    starts: tuple[Start | None, ...] = ()


@dataclass(frozen=True)
class FineTuning:
    """The baselines: see `Nevis`."""

    p: Nevis
    make: Builder
    seed: int = 0

    ROWS: ClassVar[int] = 256  # of a forward that trains nothing

    def init(self) -> Networks:
        return Networks()

    def train(self, event: TrainingEvent, state: Networks) -> tuple[Networks, ResourceUsage]:
        fresh = self.make(event.classes, seed_of(self.seed, "model", event.task))
        rows = event.train["x"][: self.ROWS]
        with evaluating(fresh):
            each = flops(lambda: fresh(rows)) / len(rows)
        kept = state.models[-self.p.checkpoints or None :]
        begin, spent = self._begin(event, kept, each)
        if begin is not None:
            _take_body(fresh, next(model for task, model in kept if task == begin.task))
        best: tuple[float, nn.Module] | None = None
        for trial in range(self.p.trials):
            model = self._fit(copy.deepcopy(fresh), event, trial)
            wrong = float((self._scores(model, event.dev).argmax(1) != event.dev["y"]).double().mean())
            spent += each * (TRAINING * len(event.train) * self.p.epochs + len(event.dev))
            if best is None or wrong < best[0]:
                best = (wrong, model)
        assert best is not None
        held = [
            *(model for _, model in kept),
            *[fresh] * min(3, self.p.trials + 1),
        ]  # start, trial, and the best so far
        usage = ResourceUsage(spent, sum(_count(model) for model in held), sum(module_bytes(model) for model in held))
        return Networks((*kept, (event.task, best[1])), (*state.starts, begin)), usage

    def predict(self, event: PredictionEvent, state: Networks) -> Tensor:
        """
        Raises:
            BadInput: the task's network is no longer kept.
        """
        for task, model in state.models:
            if task == event.task:
                return self._scores(model, event.test)
        raise BadInput(f"the network of task {event.task} is not kept; raise checkpoints={self.p.checkpoints}")

    def _begin(
        self, event: TrainingEvent, kept: tuple[tuple[int, nn.Module], ...], each: float
    ) -> tuple[Start | None, float]:
        """Where to start, and the operations that it took to find out."""
        if not kept or self.p.start == "independent":
            return None, 0.0
        if self.p.start == "previous":
            return Start(kept[-1][0], None), 0.0
        found, spent = [], 0.0
        for task, model in kept:
            z, asked = (self._features(model, part) for part in (event.train, event.dev))
            right = neighbours(z, event.train["y"], asked, self.p.k) == event.dev["y"]
            found.append(Start(task, float(right.double().mean())))
            spent += each * (len(z) + len(asked)) + 2 * len(z) * len(asked) * z.shape[1]
        return max(found, key=lambda start: start.share or 0.0), spent

    def _fit(self, model: nn.Module, event: TrainingEvent, trial: int) -> nn.Module:
        p, address = self.p, ("trial", event.task, trial)
        low, high = math.log(p.lowest), math.log(p.highest)
        drawn = torch.rand(2, generator=generator(self.seed, *address), dtype=torch.float64).tolist()
        lr, smoothing = math.exp(low + (high - low) * drawn[0]), p.smoothing * drawn[1]
        optimizer = torch.optim.SGD(
            model.parameters(), lr=lr, momentum=p.momentum, nesterov=p.momentum > 0, weight_decay=p.weight_decay
        )
        order, schedule, step = generator(self.seed, "order", *address), schedule_of("cosine"), 0
        total = p.epochs * -(-len(event.train) // p.batch_size)
        with torch.random.fork_rng(devices=[]), lone_rows(model):
            torch.manual_seed(seed_of(self.seed, "forward", *address))
            model.train()
            for _ in range(p.epochs):
                for rows in torch.randperm(len(event.train), generator=order).split(p.batch_size):
                    for group in optimizer.param_groups:
                        group["lr"] = lr * schedule.factor(step, total, 0)
                    batch = event.train.batch(rows)
                    optimizer.zero_grad()
                    F.cross_entropy(model(batch["x"]), batch["y"], label_smoothing=smoothing).backward()
                    optimizer.step()
                    step += 1
        return model.requires_grad_(False).eval()

    @torch.no_grad()
    def _scores(self, model: nn.Module, examples: Examples) -> Tensor:
        with evaluating(model):
            return torch.cat([model(x) for x in examples["x"].split(self.ROWS)])

    @torch.no_grad()
    def _features(self, model: nn.Module, examples: Examples) -> Tensor:
        with evaluating(model):
            return torch.cat([features(model, x) for x in examples["x"].split(self.ROWS)]).double()


def neighbours(z: Tensor, y: Tensor, asked: Tensor, k: int) -> Tensor:
    """The label that most of the k rows of `z` (N, D) nearest to each row of `asked` (M, D) have; of equally many the smallest."""
    found = []
    for rows in asked.split(1024):
        near = torch.cdist(rows, z).topk(min(k, len(z)), largest=False).indices
        found.append(F.one_hot(y[near], int(y.max()) + 1).sum(1).argmax(1))
    return torch.cat(found)


def _take_body(model: nn.Module, source: nn.Module) -> None:
    """Give `model` all values of `source` but the head's."""
    own, head = model.state_dict(), head_name(model) + "."
    taken = {name: value for name, value in source.state_dict().items() if not name.startswith(head)}
    model.load_state_dict({**own, **taken})


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


__all__ = [
    "FineTuning",
    "Networks",
    "Nevis",
    "PredictionEvent",
    "ResourceUsage",
    "Start",
    "StreamLearner",
    "TrainingEvent",
    "Trajectory",
    "neighbours",
    "pareto",
]
