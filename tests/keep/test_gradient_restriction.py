"""The gradient-norm penalty: its value and slope, a loop written out, and what it does to digits."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.problem import Classification, Regression
from remanence.core.rng import generator
from remanence.data import Examples
from remanence.keep.gradient_restriction import GradientRestriction
from remanence.learn.finetune import Finetune
from remanence.models import mlp
from remanence.nn.influence import example_gradients
from remanence.train.loop import learn
from remanence.train.settings import Settings
from remanence.train.update import Update
from tests.forget.helpers import SEEDS
from tests.keep.helpers import Course, rows, same, stream, update

TASK = stream()[1].train


def test_the_term_is_a_sum_of_norms_one_for_each_tensor():
    model, keeper = mlp(64, [16], 4, seed=3), GradientRestriction(strength=0.7)
    u = update(model, TASK, [keeper])
    batch = rows(u)
    naive = copy.deepcopy(model)
    F.cross_entropy(naive(batch["x"]), batch["y"]).backward()
    norms = [p.grad.norm() for p in naive.parameters()]
    torch.testing.assert_close(keeper.loss(u, batch), 0.7 * sum(norms))
    assert sum(norms) > 1.2 * torch.stack(norms).norm()  # so it is not the norm of all
    assert all(p.grad is None for p in model.parameters())


def test_its_slope_against_differences():
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = Examples(
        {"x": torch.randn(20, 5, generator=g).double(), "y": torch.randn(20, 3, generator=g).double()}, "values"
    )
    u = Update(model=model, problem=Regression(), owner=Finetune(), settings=Settings(), data=lambda name: data)
    keeper, batch = GradientRestriction(strength=1.0), data.batch(torch.arange(20))
    slopes = torch.autograd.grad(keeper.loss(u, batch), list(model.parameters()))
    for p, slope in zip(model.parameters(), slopes, strict=True):
        for entry in range(0, p.numel(), 3):
            values = []
            for move in (1e-6, -1e-6):
                with torch.no_grad():
                    p.view(-1)[entry] += move
                u.fresh_out()
                values.append(keeper.loss(u, batch).detach())
                with torch.no_grad():
                    p.view(-1)[entry] -= move
            torch.testing.assert_close(slope.view(-1)[entry], (values[0] - values[1]) / 2e-6, atol=1e-7, rtol=1e-5)


def test_a_gradient_of_zero_has_no_slope():
    """At zero the norm has a corner; a NaN there would spread over the network."""
    model = nn.Linear(3, 2)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    data = Examples({"x": x, "y": model(x).detach()}, "solved")
    u = Update(model=model, problem=Regression(), owner=Finetune(), settings=Settings(), data=lambda name: data)
    term = GradientRestriction().loss(u, data.batch(torch.arange(8)))
    assert term == 0 and all((g == 0).all() for g in torch.autograd.grad(term, list(model.parameters())))


def test_twin_of_a_plain_loop():
    train = stream(1)[0].train
    course = Course({"gradient-restriction": {"strength": 0.05}}, model=mlp(64, [32], 10))
    course.learn(stream(1)[0], epochs=2)
    naive = mlp(64, [32], 10)
    optimizer = torch.optim.SGD(naive.parameters(), lr=0.1)
    for epoch in range(2):
        for index in torch.randperm(len(train), generator=generator(0, "learn/0", "", "order", epoch)).split(64):
            loss = F.cross_entropy(naive(train["x"][index]), train["y"][index])
            slopes = torch.autograd.grad(loss, list(naive.parameters()), create_graph=True)
            optimizer.zero_grad()
            (loss + 0.05 * sum(g.norm() for g in slopes)).backward()
            optimizer.step()
    for ours, theirs in zip(course.model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert not same(course.model, Course(model=mlp(64, [32], 10)).model) and not course.keeper.bytes()


def test_frozen_and_unused_parameters_are_left_out():
    model = mlp(64, [16], 4, seed=3)
    whole = GradientRestriction().loss(u := update(model, TASK), rows(u))
    model.body.requires_grad_(False)
    model.extra = nn.Linear(2, 2)
    head = GradientRestriction().loss(u := update(model, TASK), rows(u))
    assert 0 < head < whole


def test_only_while_learning_and_never_compiled():
    keeper = GradientRestriction()
    u = update(mlp(64, [16], 4), TASK, [keeper], kind="forget")
    assert keeper.loss(u, rows(u)) is None
    u.settings = Settings(compile=True)
    with pytest.raises(BadInput, match="compile"):
        keeper.begin(u)
    with pytest.raises(BadInput, match="strength"):
        GradientRestriction(strength=-1.0)
    assert GradientRestriction(strength=0).inert


@lru_cache
def taught(seed: int, strength: float) -> nn.Module:
    train = stream(1)[0].train
    model = mlp(64, [128], 10, seed=seed)
    settings = Settings(epochs=15, batch_size=8, lr=1e-3)
    parts = [GradientRestriction(strength=strength)]
    learn(Update(model=model, problem=Classification(), owner=Finetune(), settings=settings, data=lambda name: train, parts=parts,
                 labels=list(range(10)), new_labels=list(range(10)), seed=seed))  # fmt: skip
    return model


def figures(model, data):
    """The mean norm of an example's gradient, and the accuracy."""
    batch = data.batch(torch.arange(len(data)))
    found = example_gradients(model, Classification(), [batch], dict(model.named_parameters()))
    norm = torch.stack([g.norm() for g in found]).mean()
    return float(norm), float((model.eval()(batch["x"]).argmax(1) == batch["y"]).float().mean())


@pytest.mark.fidelity(
    "keep/gradient-restriction",
    check="value, slope and a plain loop; mean norm of per-example gradients, digits MLP, batches of 8, strength 0.3, three seeds",
    measured="lower by 27 to 30 % on training and by 25 to 28 % on held-out digits, accuracy equal or up by 0.7 points at most; with the default strength by 2 to 6 %",
    paper="-",
    differs="batches of 8 and a larger strength: with batches of 64 the norms fall only after convergence",
)
@pytest.mark.parametrize("seed", SEEDS)
def test_examples_pull_less_at_equal_accuracy(seed):
    task = stream(1)[0]
    some = task.train.select(torch.arange(500))
    for data in (some, task.test):
        (norm, right), (restricted, still) = (figures(taught(seed, strength), data) for strength in (0.0, 0.3))
        assert restricted < 0.8 * norm and still > right - 0.005
