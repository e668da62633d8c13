"""Lives without a home: learn events on digits, one after the other, and a forget as a life does it, without its books."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn

from remanence.core.ids import Ids
from remanence.core.problem import Classification
from remanence.data import Examples, Stream, split_digits
from remanence.learn.finetune import Finetune
from remanence.life.events import Recipe, learn_event
from remanence.life.state import State
from remanence.models import mlp
from remanence.train.roles import Keeper, Learner
from remanence.train.settings import Settings
from remanence.train.update import Update

SGD = {"optimizer": "sgd", "lr": 0.1, "batch_size": 32, "epochs": 5}


@lru_cache
def stream(seed: int = 0) -> Stream:
    """Five tasks of two digits each."""
    return split_digits(seed=seed)


class Lived:
    """A state and its history; `learn` adds an event, `forget` purges ids and lets every part rebuild."""

    def __init__(
        self,
        keep: list[Keeper] | None = None,
        model: nn.Module | None = None,
        learner: Learner | None = None,
        seed: int = 0,
    ) -> None:
        model = mlp(64, [64], seed=seed) if model is None else model
        self.state, self.seed = State(model, learner or Finetune(), list(keep or [])), seed
        self.problem = Classification()
        self.tasks: list[Any] = []
        self.updates: list[Update] = []

    @property
    def model(self) -> nn.Module:
        return self.state.model

    def learn(self, task: Any, where: Any = (), **settings: Any) -> Update:
        history = [t.train for t in self.tasks]
        recipe = Recipe(len(self.tasks), {**SGD, **settings})
        recipe.where = [part.spec() for part in where]
        u, _ = learn_event(self.state, task, recipe, problem=self.problem, seed=self.seed, history=history)
        self.tasks.append(task)
        self.updates.append(u)
        inputs = Ids()
        for done in self.tasks:
            inputs = inputs | done.train.ids
        for part in self.state.holders().values():
            part.inputs = inputs
        return u

    def all(self, tasks: Any, **settings: Any) -> Lived:
        for task in tasks:
            self.learn(task, **settings)
        return self

    def forget(self, ids: Ids) -> None:
        """Purge the records and let the computed values be rebuilt; the weights stay as they are."""
        history = [t.train.without(ids) for t in self.tasks]
        for part in self.state.holders().values():
            part.purge(ids)
        for part in self.state.holders().values():
            if hasattr(type(part), "forgot"):
                part.forgot(self.update("forgot", history), ids)
            part.inputs = part.inputs - ids

    def update(self, kind: str = "learn", history: list[Examples] | None = None) -> Update:
        """An update outside the loop, to call single hooks with."""
        history = [t.train for t in self.tasks] if history is None else history
        return Update(
            model=self.model,
            problem=self.problem,
            owner=self.state.learner,
            settings=Settings(),
            data=lambda name: history[-1],
            parts=self.state.keepers,
            labels=self.state.labels,
            seed=self.seed,
            event=f"forget/{len(self.tasks)}",
            kind=kind,
            history=lambda: list(history),
        )

    def accuracy(self, number: int | None = None) -> float:
        """Held-out accuracy of one task, or the mean over all tasks learned."""
        c = self.state.context(self.problem)
        tasks = self.tasks if number is None else [self.tasks[number]]
        return sum(c.evaluate(task.test)["accuracy"] for task in tasks) / len(tasks)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    """Equal names, and every tensor equal bit for bit."""
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
