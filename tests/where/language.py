"""Learn events of a small language model on facts, without a life's books; and an image stream whose tasks look at other places."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from remanence.core.problem import CausalLM
from remanence.data import Examples, Task, digits
from remanence.learn.finetune import Finetune
from remanence.life.events import Recipe, learn_event
from remanence.life.state import State
from remanence.train.resolve import know
from remanence.train.update import Update
from tests.lm import CONTEXT, facts, tiny

PROBLEM = CausalLM(context=CONTEXT)


class Speaker:
    """A language model on its way through tables of tokens."""

    def __init__(self, seed: int = 0, known: Examples | None = None, epochs: int = 40) -> None:
        self.state, self.seed, self.tables = State(tiny(seed), Finetune()), seed, list[Examples]()
        if known is not None:
            self.learn(known, epochs=epochs)

    @property
    def model(self) -> nn.Module:
        return self.state.model

    def copy(self) -> Speaker:
        made = copy.copy(self)
        made.state, made.tables = copy.deepcopy(self.state), list(self.tables)
        return made

    def learn(self, table: Examples, where: Any = (), **settings: Any) -> Update:
        for part in where:
            know(type(part))
        recipe = Recipe(
            len(self.tables), {"epochs": 30, "batch_size": 16, "optimizer": "adamw", "lr": 3e-3, **settings}
        )
        recipe.where = [part.spec() for part in where]
        task = Task(table, table, (), (), len(self.tables))
        u, _ = learn_event(self.state, task, recipe, problem=PROBLEM, seed=self.seed, history=list(self.tables))
        self.tables.append(table)
        return u

    def accuracy(self, table: Examples) -> float:
        """The share of the answers' tokens that it would say."""
        batch = table.batch(torch.arange(len(table)))
        self.model.eval()
        with torch.no_grad():
            return float(PROBLEM.score(PROBLEM.forward(self.model, batch), batch)["accuracy"].mean())


def books(seed: int, *counts: int) -> list[Examples]:
    """Tables of other facts about other things."""
    return [facts(n, seed=seed * 10 + i, keys=seed * 10 + i, first_id=1000 * i) for i, n in enumerate(counts)]


def halves(seed: int, count: int = 600) -> list[Task]:
    """Digits of which only the left half is seen, then digits of which only the right half is: the same ten classes."""
    data, tasks = digits(), []
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    for number, columns in enumerate((slice(0, 4), slice(4, 8))):
        seen = torch.zeros(8, 8)
        seen[:, columns] = 1
        half = data.replace(x=data["x"] * seen.flatten())
        rows = order[number * count : (number + 1) * count]
        train = Examples(half.select(rows).columns, f"half-{number}", torch.arange(count) + 10_000 * (number + 1))
        labels = tuple(range(10))
        tasks.append(Task(train, half.select(order[2 * count :]), labels, tuple(map(str, labels)), number))
    return tasks
