"""The loss of every task: the mean over its rows, and what it rose by since the task came."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from remanence.core.problem import CausalLM
from tests.lm import CONTEXT, facts, tiny


@pytest.mark.fidelity(
    "measure/loss",
    check="mean of row losses by hand; the rise against the first measurement by hand; general rows that were only shown",
    measured="tiny language model, facts contradicted by a second table: the loss on the first rises by more than 3 nats",
)
def test_losses_and_their_rise_are_those_by_hand() -> None:
    problem = CausalLM(context=CONTEXT)
    first, second = facts(24, seed=1, keys=1), facts(24, seed=2, keys=1, first_id=100)

    def by_hand(model: torch.nn.Module, table: rm.data.Examples) -> float:
        batch = table.batch(torch.arange(len(table)))
        model.eval()
        with torch.no_grad():
            return float(problem.losses(problem.forward(model, batch), batch).mean())

    with rm.Life(tiny(0), problem=problem, measure=["loss"]) as life:
        one = life.learn(first, epochs=60, batch_size=8, lr=3e-3)
        then = by_hand(life.model, first)
        assert one.measures == pytest.approx({"loss": then, "loss/0": then}, abs=1e-5)
        two = life.learn(second, epochs=60, batch_size=8, lr=3e-3)
        now = by_hand(life.model, first), by_hand(life.model, second)
        expected = {"loss": sum(now) / 2, "loss/0": now[0], "loss/1": now[1], "loss/forgetting": now[0] - then}
        assert two.measures == pytest.approx(expected, abs=1e-5)
        assert two.measures["loss/forgetting"] > 3


def test_what_was_only_shown_has_a_loss_to_rise_from() -> None:
    with rm.Life(tiny(0), problem=CausalLM(context=CONTEXT), measure=["loss"]) as life:
        shown = life.learn(facts(16, seed=1, keys=1), epochs=0).measures["loss/0"]
        after = life.learn(facts(16, seed=2, keys=2, first_id=100), epochs=20, batch_size=8, lr=3e-3).measures
        assert after["loss/forgetting"] == pytest.approx(after["loss/0"] - shown, abs=1e-5)
