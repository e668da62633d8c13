"""Learn events on the split digits: on a bare `State`, as a life makes them but without its books; or one `Update` by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from remanence.core.problem import Classification, Problem
from remanence.data import Examples, Stream, Task, split_digits
from remanence.life.events import Recipe, learn_event
from remanence.life.state import State
from remanence.models import mlp
from remanence.train.resolve import resolve, resolve_all
from remanence.train.roles import Keeper, Learner
from remanence.train.settings import Settings
from remanence.train.update import Update

#: Sigmoid BCE on the columns of the new classes only: L_c of Smith et al. 2023.
NEW = {"finetune": {"compete": "new"}}


@lru_cache
def stream(tasks: int = 5) -> Stream:
    return split_digits(tasks)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor]) -> bool:
    """Equal names, and every tensor equal bit for bit."""
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(_bits(a[n]), _bits(b[n])) for n in a)


def _bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(-1).view(torch.uint8)


class Course:
    """A learner and keepers on their way through a stream."""

    def __init__(
        self,
        keep: Any = (),
        learner: Any = "finetune",
        link: str = "softmax",
        model: nn.Module | None = None,
        hidden: Sequence[int] = (32,),
        seed: int = 0,
        problem: Problem | None = None,
        **settings: Any,
    ) -> None:
        self.state = State(
            model or mlp(64, list(hidden), seed=seed),
            resolve("learn", learner, Learner),
            resolve_all("keep", keep, Keeper),
        )
        self.problem, self.seed = problem or Classification(link=link), seed
        self.settings = {"epochs": 1, "batch_size": 64, "optimizer": "sgd", "lr": 0.1, **settings}
        self.done: list[Task] = []

    @property
    def model(self) -> nn.Module:
        return self.state.model

    @property
    def keeper(self) -> Any:
        return self.state.keepers[0]

    def learn(self, *tasks: Task, before: Callable[[Update], None] | None = None, **settings: Any) -> Update:
        for task in tasks:
            recipe = Recipe(len(self.done), {**self.settings, **settings})
            history = [earlier.train for earlier in self.done]
            u, self.consumed = learn_event(
                self.state, task, recipe, problem=self.problem, seed=self.seed, history=history, before=before
            )
            self.done.append(task)
        return u

    def copy(self, keep: Any = ()) -> Course:
        """The same course from here on, with other keepers."""
        made = copy.copy(self)
        made.state, made.done = copy.deepcopy(self.state), list(self.done)
        made.state.keepers = resolve_all("keep", keep, Keeper)
        return made

    def accuracies(self) -> list[float]:
        c = self.state.context(self.problem)
        return [c.evaluate(task.test)["accuracy"] for task in self.done]

    def accuracy(self) -> float:
        """The mean over the tasks learned."""
        found = self.accuracies()
        return sum(found) / len(found)


def update(
    model: nn.Module,
    train: Examples,
    parts: Sequence[Any] = (),
    *,
    labels: Sequence[int] = (0, 1, 2, 3),
    new: Sequence[int] = (2, 3),
    problem: Problem | None = None,
    link: str = "softmax",
    learner: Any = "finetune",
    **kw: Any,
) -> Update:
    """The update of an event that has begun nothing yet."""
    return Update(
        model=model,
        problem=problem or Classification(link=link),
        owner=resolve("learn", learner, Learner),
        settings=Settings(epochs=1, batch_size=64, optimizer="sgd", lr=0.1),
        data=lambda name: train,
        parts=list(parts),
        labels=labels,
        new_labels=new,
        **kw,
    )


def rows(u: Update, count: int = 32) -> dict[str, Tensor]:
    """The first rows of the event's data, labels as columns."""
    return u.data("task").batch(torch.arange(count))


def shaken(model: nn.Module, size: float = 0.1, seed: int = 1) -> nn.Module:
    """Move every weight a little, in place."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=rng))
    return model
