"""EWC, MAS and SI on a language model: facts learned first outlive facts learned later."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import remanence as rm
from remanence.core.problem import CausalLM
from remanence.data import Task
from tests.lm import facts, tiny


def lived(keep: Any, seed: int) -> tuple[float, float]:
    """The share of tokens of the first and of the second facts that are right in the end."""
    life = rm.Life(tiny(seed), keep=keep, problem=rm.CausalLM(context=12), seed=seed)
    data = [facts(32, 10 * seed + 1, 10 * seed), facts(32, 10 * seed + 2, 10 * seed + 1, first_id=100)]
    tasks = [Task(examples, examples, id=number) for number, examples in enumerate(data)]
    for task, epochs in zip(tasks, (40, 20), strict=True):
        life.learn(task, epochs=epochs, batch_size=16, lr=3e-3)
    problem, found = CausalLM(), []
    with torch.no_grad():
        for examples in data:
            batch = examples.batch(torch.arange(32))
            right = problem.score(problem.forward(life.model.eval(), batch), batch)["accuracy"]
            found.append(float(right.mean()))
    return found[0], found[1]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_weights_that_old_facts_need_are_held(seed: int) -> None:
    bare, _ = lived([], seed)
    for keep in ({"ewc": {"strength": 3e5}}, {"mas": {"strength": 0.1}}, {"si": {"strength": 300.0}}):
        old, new = lived([keep], seed)
        assert old > bare + 0.3 and new > 0.7, keep
