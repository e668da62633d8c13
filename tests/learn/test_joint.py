"""Joint: each event is plain training on all that was seen and not forgotten."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import remanence as rm
from remanence.core.ids import Ids
from remanence.core.rng import generator
from remanence.data import cat
from remanence.models import mlp
from tests.keep.helpers import Course, same, stream

TASKS = stream().tasks[:3]


def test_equals_a_plain_loop_on_the_growing_data_bit_for_bit():
    course = Course(learner="joint", model=mlp(64, [32], 10))
    course.learn(*TASKS, epochs=2)
    naive = mlp(64, [32], 10)
    for number in range(3):
        data = cat([task.train for task in TASKS[: number + 1]])
        optimizer = torch.optim.SGD(naive.parameters(), lr=0.1, fused=True)
        for epoch in range(2):
            for picked in torch.randperm(len(data), generator=generator(0, f"learn/{number}", "", "order", epoch)).split(64):  # fmt: skip
                logits = naive(data["x"][picked])
                barred = torch.arange(10) >= 2 * number + 2
                optimizer.zero_grad()
                F.cross_entropy(
                    logits.masked_fill(barred, -torch.inf), data["y"][picked], reduction="none"
                ).mean().backward()
                optimizer.step()
    assert same(course.model, naive)


def test_the_lineage_tells_new_from_replayed():
    course = Course(learner="joint")
    for number, task in enumerate(TASKS):
        course.learn(task)
        earlier = Ids(torch.cat([t.train.id for t in TASKS[:number]])) if number else Ids()
        assert course.consumed.new == task.train.ids and course.consumed.replayed == earlier


def test_forgotten_examples_are_not_among_what_was_seen():
    """Class 1 wholly and five rows of class 2 are forgotten; the next event takes in everything else, and nothing more."""
    with rm.Life(mlp(64, [16]), learner="joint") as life:
        life.learn(TASKS[0])
        life.learn(TASKS[1])
        gone = Ids(TASKS[0].train.id[TASKS[0].train["y"] == 1]) | Ids(TASKS[1].train.id[TASKS[1].train["y"] == 2][:5])
        life.forget(rm.Request(ids=gone), by="catastrophic")
        life.learn(TASKS[2])
        body = life._ledger.rows("learn")[-1].body
        taken = life._ids(body["new"]) | life._ids(body["replayed"])
        assert taken == Ids(torch.cat([task.train.id for task in TASKS])) - gone
        assert life._ids(body["new"]) == TASKS[2].train.ids


@pytest.mark.fidelity(
    "learn/joint",
    check="a plain loop on the growing data; the upper bound on 5x2 digits, 2 seeds",
    measured="the same bits; 0.96, fine-tuning 0.20",
    paper="-",
    differs="-",
)
@pytest.mark.parametrize("seed", range(2))
def test_it_is_an_upper_bound(seed):
    found = {}
    for learner in ("joint", "finetune"):
        course = Course(learner=learner, hidden=(64,), seed=seed, epochs=10)
        course.learn(*stream())
        found[learner] = course.accuracy()
    assert found["joint"] > 0.9 and found["finetune"] < 0.25
