"""A-GEM: the projection and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.problem import Regression
from remanence.data import Task, digits, permuted
from remanence.keep.agem import AGEM
from remanence.keep.replay import Replay
from remanence.models import mlp
from remanence.train.roles import Keeper
from tests.keep.lives import Lived, same, stream, weights

STREAM = stream()
TWO = list(STREAM)[:2]


def ready(**kw):
    """A keeper that draws its whole buffer, an update to call it with, and the gradient r of the whole buffer's loss."""
    keeper = AGEM(30, 30)
    lived = Lived([keeper], mlp(64, [16], **kw)).all(TWO, epochs=1)
    u, columns = lived.update(), keeper.buffer.columns
    r = u.grad(torch.nn.functional.cross_entropy(lived.model(columns["x"]), columns["y"]))
    return keeper, u, r


def dot(a, b):
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("against", [3.0, 0.01, -0.01, -3.0])
def test_the_projection(seed, against):
    """g - (g.r / r.r) r where g.r < 0: then g.r is 0; elsewhere every bit stays."""
    keeper, u, r = ready()
    rng = torch.Generator().manual_seed(seed)
    noise = [torch.randn(x.shape, generator=rng) for x in r]
    free = [n - dot(noise, r) / dot(r, r) * x for n, x in zip(noise, r, strict=True)]  # nothing along r
    given = [n - against * x for n, x in zip(free, r, strict=True)]
    for p, g in zip(u.parameters.values(), given, strict=True):
        p.grad = g.clone()
    keeper.gradient(u)
    now = [p.grad for p in u.parameters.values()]
    if against < 0:
        assert all(torch.equal(a, b) for a, b in zip(now, given, strict=True))
    else:
        assert abs(dot(now, r)) < 1e-6 * (dot(now, now) * dot(r, r)) ** 0.5
        for a, b in zip(now, free, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_parameters_without_a_gradient_get_none():
    keeper, u, r = ready()
    names = list(u.parameters)
    for (name, p), x in zip(u.parameters.items(), r, strict=True):
        p.grad = None if name == names[0] else -x.clone()
    keeper.gradient(u)
    assert u.parameters[names[0]].grad is None
    assert all(float(u.parameters[name].grad.abs().max()) < 1e-6 for name in names[1:])


def test_it_looks_without_a_trace():
    """Running statistics, random numbers and, with nothing in its way, the weights' bits."""
    keeper, u, r = ready(norm=True, dropout=0.3)
    u.model.train()
    for p, x in zip(u.parameters.values(), r, strict=True):
        p.grad = x.clone()
    before, state = weights(u.model), torch.get_rng_state()
    keeper.gradient(u)
    assert same(before, u.model) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("knobs", [{"capacity": 0}, {"batch_size": 0}], ids=str)
def test_nothing_drawn_or_stored_is_nothing_there(knobs):
    plain = Lived([], mlp(64, [16], norm=True, dropout=0.2)).all(TWO, epochs=1)
    other = Lived([AGEM(**knobs)], mlp(64, [16], norm=True, dropout=0.2)).all(TWO, epochs=1)
    assert AGEM(**knobs).inert and same(plain.model, other.model)


def test_the_first_event_is_free():
    plain = Lived([], mlp(64, [16], norm=True, dropout=0.2)).all([STREAM[0]])
    keeper = AGEM()
    assert same(plain.model, Lived([keeper], mlp(64, [16], norm=True, dropout=0.2)).all([STREAM[0]]).model)
    assert len(keeper.buffer) == 200


class Watch(Keeper):
    """Writes down the loss on the rows of another keeper after every step."""

    def after(self, u, batch):
        columns = u.keepers[0].buffer.columns
        if columns:
            losses.append(torch.nn.functional.cross_entropy(u.model(columns["x"]), columns["y"]).detach())


losses: list[torch.Tensor] = []


class Looks(AGEM):
    """Stores and does nothing."""

    def gradient(self, u):
        pass


@pytest.mark.parametrize("seed", range(3))
def test_small_steps_do_not_raise_the_loss_on_what_is_drawn(seed):
    """Plain SGD, the whole buffer drawn: the largest rise is of second order in the rate, and without it of first order."""
    rises = {}
    for kind in (AGEM, Looks):
        for lr in (0.02, 0.01):
            lived = Lived([kind(60, 60), Watch()], mlp(64, [32], 10, seed=seed), seed=seed)
            lived.problem.classes = list(range(10))
            lived.learn(STREAM[0], epochs=3)
            losses.clear()
            lived.learn(STREAM[1], epochs=1, lr=lr)
            steps = torch.stack(losses)
            rises[kind, lr] = float((steps[1:] - steps[:-1]).max())
    assert rises[AGEM, 0.01] < rises[Looks, 0.01] / 10


def test_drawn_rows_enter_the_lineage():
    keeper = AGEM(30, 10)
    lived = Lived([keeper], mlp(64, [16])).all([STREAM[0]], epochs=1)
    held = keeper.buffer.ids
    u = lived.learn(STREAM[1], epochs=2)
    assert u.consumed.new == STREAM[1].train.ids and u.consumed.replayed == held


def test_forgotten_rows_are_gone():
    keeper = AGEM(30)
    lived = Lived([keeper], mlp(64, [16])).all(TWO, epochs=1)
    everyone = STREAM[0].train.ids | STREAM[1].train.ids
    assert keeper.holds(everyone) == keeper.buffer.ids and not keeper.derived()
    gone = keeper.buffer.ids.sample(7, torch.Generator().manual_seed(0))
    lived.forget(gone)
    assert not keeper.holds(gone) and len(keeper.buffer) == 23
    assert not lived.learn(STREAM[2], epochs=2).consumed.replayed & gone


def test_same_seed_same_bits_and_state_round_trip():
    lives = [Lived([AGEM(30, 10)], mlp(64, [16]), seed=3).all(TWO, epochs=1) for _ in range(2)]
    assert same(lives[0].model, lives[1].model)
    fresh = AGEM(30, 10)
    fresh.load_state_dict(copy.deepcopy(lives[0].state.keepers[0].state_dict()))
    assert fresh.bytes() == lives[0].state.keepers[0].bytes() == 30 * (64 * 4 + 8 + 8)
    lives[0].state.keepers[0] = fresh
    for lived in lives:
        lived.learn(STREAM[2], epochs=1)
    assert same(lives[0].model, lives[1].model)


@pytest.mark.fidelity(
    "keep/agem",
    check="the projection against its closed form; the loss on the drawn rows along an event; permuted digits, five tasks, and digits "
    "5 x 2 class-incremental, three seeds",
    measured="permuted: 0.57 to 0.62 where finetuning has 0.41 to 0.44 and replay 0.74 to 0.75; class-incremental: 0.19 to 0.28 where "
    "finetuning has 0.13 to 0.19 and replay 0.64 to 0.73",
    paper="-",
    differs="digits, a small perceptron and five tasks",
)
def test_permuted_digits():
    tasks = permuted(digits(), 5)
    for seed in range(3):
        plain, kept, replay = (
            Lived(keep, mlp(64, [64], 10, seed=seed), seed=seed).all(tasks, epochs=3).accuracy()
            for keep in ([], [AGEM()], [Replay(None, 200, 64, "reservoir")])
        )
        assert plain + 0.1 < kept < replay


def test_new_classes_are_more_than_it_can_do():
    """Measured: 0.27, 0.19, 0.28 where finetuning has 0.19, 0.13, 0.18, and replay from as many examples 0.64 to 0.73."""
    found = [
        [
            Lived(keep, mlp(64, [64], seed=seed), seed=seed).all(STREAM, epochs=3).accuracy()
            for keep in ([], [AGEM()], [Replay(None, 200, 64, "reservoir")])
        ]
        for seed in range(3)
    ]
    assert all(replay > kept + 0.3 for _, kept, replay in found)
    assert all(kept > plain for plain, kept, _ in found)


def test_targets():
    """A regression, the same inputs told other targets in between."""
    tasks = []
    for number, task in enumerate(TWO):
        train, test = (part.replace(y=part["y"].float()[:, None]) for part in (task.train, task.test))
        tasks.append(Task(train, test, (), (), number))
    for seed in range(3):
        errors = []
        for keep in ([], [AGEM()]):
            lived = Lived(keep, mlp(64, [32], 1, seed=seed), seed=seed)
            lived.problem = Regression()
            lived.all(tasks, epochs=5, lr=0.02)
            errors.append(lived.state.context(lived.problem).evaluate(tasks[0].test)["mse"])
        assert errors[1] < errors[0] / 2


def test_wrong_knobs():
    for knobs in ({"capacity": -1}, {"batch_size": -1}):
        with pytest.raises(BadInput):
            AGEM(**knobs)
    assert not AGEM().holds(Ids([1, 2]))
