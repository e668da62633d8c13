"""One learn event on a state: used by the life, by retraining and by references alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.problem import Classification, Problem
from remanence.data import Examples, Task, cat
from remanence.life.state import State
from remanence.train.loop import learn
from remanence.train.resolve import resolve, resolve_all
from remanence.train.roles import Keeper, Learner, Where
from remanence.train.settings import Settings
from remanence.train.update import Consumed, Update


@dataclass
class Recipe:
    """How a learn event is done, as JSON: from it the event can be repeated on other data or with another seed."""

    ordinal: int
    settings: dict[str, Any]
    learner: dict[str, Any] | None = None
    keep: list[dict[str, Any]] | None = None
    where: list[dict[str, Any]] = field(default_factory=list)
    carry: bool = False

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def without(task: Task, gone: Ids) -> Task:
    """The task without the rows in `gone`, its classes being those that are left."""
    train = task.train.without(gone)
    if train is task.train:
        return task
    labels = task.classes
    if labels and "y" in train.columns:
        left = set(train["y"].unique().tolist())
        names = dict(zip(labels, task.names or map(str, labels), strict=True))
        labels = tuple(label for label in labels if label in left)
        return replace(task, train=train, classes=labels, names=tuple(names[label] for label in labels))
    return replace(task, train=train)


def learn_event(
    state: State,
    task: Task,
    recipe: Recipe,
    *,
    problem: Problem,
    seed: int,
    history: Sequence[Examples],
    tasks: Sequence[Task] = (),
    device: torch.device | str = "cpu",
    before: Callable[[Update], None] | None = None,
    retrain: Callable[[Ids, int], nn.Module] | None = None,
    **options: Any,
) -> tuple[Update, Consumed]:
    """Take `task` in. `history` is the training data of earlier events, without what was forgotten.

    Raises:
        BadInput: the task has no rows, no labels, or labels outside the problem's fixed classes.
    """
    if not len(task.train):
        raise BadInput("the task has no examples left to learn")
    added, new, old = _new_labels(state, task, problem)
    learner = state.learner if recipe.learner is None else resolve("learn", recipe.learner, Learner)
    keepers = state.keepers if recipe.keep is None else resolve_all("keep", recipe.keep, Keeper)
    wheres = resolve_all("where", recipe.where, Where)
    state.labels, state.met = state.labels + added, old + new
    sources = {"task": lambda: task.train, "seen": lambda: cat([*history, task.train])}
    u = Update(
        model=state.model,
        problem=problem,
        owner=learner,
        settings=Settings(**recipe.settings),
        data=lambda name: _pick(sources, name),
        parts=[*keepers, *wheres],
        labels=state.labels,
        new_labels=new,
        old_labels=old,
        tasks=tasks,
        task=task,
        device=device,
        seed=seed,
        event=f"learn/{recipe.ordinal}",
        life_step=state.steps,
        history=lambda: [*history, task.train],
        retrain=retrain,
        **options,
    )
    state.grow(u, [learner, *keepers, *wheres])
    u.carried = dict(state.optimizer) if recipe.carry else None
    if before is not None:
        before(u)
    consumed = learn(u)
    state.steps += u.steps_done
    state.optimizer = u.carried or {}
    return u, consumed


def _new_labels(state: State, task: Task, problem: Problem) -> tuple[list[int], list[int], list[int]]:
    """Labels that get a column now; that the life meets now; and that it has met before. Where the problem fixes its classes, the
    columns are all there from the first event on, but who is new is told by the data."""
    if not isinstance(problem, Classification):
        return [], [], []
    present = [int(label) for label in task.train["y"].unique().tolist()]
    order = [label for label in task.classes if label in present] + [
        label for label in present if label not in task.classes
    ]
    new = [label for label in order if label not in state.met]
    if problem.classes is None:
        return new, new, list(state.met)
    strange = [label for label in order if label not in problem.classes]
    if strange:
        raise BadInput(f"labels {strange} are not among the problem's classes {problem.classes}")
    return [] if state.labels else list(problem.classes), new, list(state.met)


def _pick(sources: dict[str, Callable[[], Examples]], name: str) -> Examples:
    if name not in sources:
        raise BadInput(f"this event has no data called {name!r}; there is {', '.join(sources)}")
    return sources[name]()
