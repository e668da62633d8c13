"""FeatureDistill: the squared distance of features in closed form, what it leaves alone, and what it is worth."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.problem import Regression
from remanence.data import Examples, Task
from remanence.keep.feature_distill import FeatureDistill
from remanence.models import mlp
from tests.keep.helpers import NEW, Course, rows, same, shaken, state, stream, update

TASK = stream()[1].train


def begun(norm=False, **knobs):
    """A keeper whose event began at weights theta0; the model has moved since."""
    model = mlp(64, [16], 4, norm=norm, seed=3)
    keeper = FeatureDistill(**knobs)
    u = update(model, TASK, [keeper])
    keeper.begin(u)
    teacher = copy.deepcopy(model).eval()
    shaken(model)
    return u, keeper, teacher, rows(u)


@pytest.mark.parametrize("norm", [False, True])
def test_is_the_formula(norm):
    """The mean over rows of the sum over features; the teacher is in eval mode, whatever the student's."""
    u, keeper, teacher, batch = begun(norm, strength=0.3)
    before = state(keeper._teacher)
    found = keeper.loss(u, batch)
    f = copy.deepcopy(u.model).body(batch["x"])
    squared = [float(((a - b) ** 2).sum().detach()) for a, b in zip(f, teacher.body(batch["x"]), strict=True)]
    assert float(found.detach()) == pytest.approx(0.3 * sum(squared) / len(squared), rel=1e-5)
    assert same(keeper._teacher, before) and not any(m.training for m in keeper._teacher.modules())


def test_gradient():
    """Zero at theta0; of the body's weights elsewhere; never of the head or the teacher."""
    model = mlp(64, [16], 4, seed=3)
    keeper = FeatureDistill()
    u = update(model, TASK, [keeper])
    keeper.begin(u)
    for moved in (False, True):
        u.fresh_out()
        model.zero_grad()
        keeper.loss(u, rows(u)).backward()
        grads = [p.grad for p in model.body.parameters()]
        assert all(bool(g.any()) for g in grads) if moved else not any(bool(g.any()) for g in grads)
        assert all(p.grad is None for p in [*model.head.parameters(), *keeper._teacher.parameters()])
        shaken(model)


def test_any_network_with_a_head():
    """A convolutional body: features are flattened rows, as the head sees them."""
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))
    keeper = FeatureDistill(strength=1.0)
    u = update(model, TASK, [keeper])
    keeper.begin(u)
    teacher = copy.deepcopy(model)
    shaken(model)
    batch = rows(u)
    expected = (model[:4](batch["x"]) - teacher[:4](batch["x"])).square().sum() / len(batch["x"])
    torch.testing.assert_close(keeper.loss(u, batch), expected)


def test_the_first_event_has_no_teacher_and_nothing_outlives_an_event():
    plain, kept = Course(), Course("feature-distill")
    plain.learn(stream()[0])
    assert kept.learn(stream()[0]).extra_bytes == 0
    assert same(plain.model, kept.model)
    assert kept.learn(stream()[1]).extra_bytes > 0
    assert kept.keeper.bytes() == 0 and kept.keeper.state_dict() == {} and not kept.keeper.derived()
    assert not [name for name in vars(kept.keeper) if name.startswith("_")]


def test_regression_from_the_second_event_on():
    parts = [stream()[i].train for i in (0, 1)]
    tasks = [
        Task(e, e, id=i)
        for i, e in enumerate(Examples({"x": e["x"], "y": e["y"].float()}, "values", e.id) for e in parts)
    ]
    plain, kept = (Course(k, problem=Regression(), model=mlp(64, [16], 1), lr=0.01) for k in ((), "feature-distill"))
    for course in (plain, kept):
        course.learn(tasks[0])
    assert same(plain.model, kept.model)
    for course in (plain, kept):
        course.learn(tasks[1])
    assert not same(plain.model, kept.model)


def test_strength_zero_changes_no_bit():
    plain, kept = Course(), Course({"feature-distill": {"strength": 0}})
    for course in (plain, kept):
        course.learn(*stream().tasks[:2])
    assert same(plain.model, kept.model)
    with pytest.raises(BadInput, match="strength"):
        FeatureDistill(strength=-1.0)


def test_features_drift_less_the_stronger_it_is():
    """Mean squared drift of the old task's features over one more task: falls with strength, to under a tenth at 1."""
    start = Course((), NEW, "sigmoid", epochs=10)
    start.learn(stream()[0])
    x = stream()[0].test["x"]
    before = start.model.body(x)
    drift = []
    for strength in (0.0, 0.1, 1.0):
        course = start.copy({"feature-distill": {"strength": strength}})
        course.learn(stream()[1], lr=0.01)
        drift.append(float((course.model.body(x) - before).square().sum(1).mean().detach()))
    assert drift == sorted(drift, reverse=True) and drift[-1] < 0.1 * drift[0]


@pytest.mark.fidelity(
    "keep/feature-distill",
    check="the formula; with BCE on new classes against BCE alone, 5x2 digits, 3 seeds",
    measured="0.42 (0.39 to 0.45) against 0.34 (0.32 to 0.37)",
    paper="PredKD+FeatKD 19.1 on CIFAR-100 in 10 tasks, below PredKD's 25.2",
    differs="digits and an MLP; here it helps PredKD, too (0.44 against 0.36)",
)
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_better_than_nothing(seed):
    """Mean accuracy after five tasks of two digits; measured 0.07 to 0.10 above BCE alone."""
    found = {}
    for name, keep in (("alone", ()), ("kept", {"feature-distill": {"strength": 0.01}})):
        course = Course(keep, NEW, "sigmoid", hidden=(256, 256), seed=seed, epochs=10, batch_size=16)
        course.learn(*stream())
        found[name] = course.accuracy()
    assert found["kept"] > found["alone"] + 0.03
