"""Gradient-based sample selection: scores, who comes in and who gives way, and where it helps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chi2

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.problem import Regression
from remanence.data import Examples, Task
from remanence.keep.gss import GSS
from remanence.keep.replay import Replay
from remanence.models import mlp
from tests.keep.lives import Lived, same, stream

STREAM = stream()


def first(task, count):
    some = task.train.select(torch.arange(min(count, len(task.train))))
    return Task(some, task.test, task.classes, task.names, task.id)


SMALL = [first(task, 80) for task in STREAM]
TWO = SMALL[:2]


def line(x, y, first=0):
    """Rows of a regression without bias: the gradient of row i is (w.x_i - y_i) x_i."""
    x, y = torch.tensor(x), torch.tensor(y)[:, None]
    return {"x": x, "y": y, "id": torch.arange(first, first + len(x)), "origin": torch.zeros(len(x), dtype=torch.int64)}


def at_zero(keeper):
    """An update with the network w = 0, where the gradient of (x, y) is -y x."""
    net = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    lived = Lived([keeper], net)
    lived.problem = Regression()
    rows = line([[1.0, 0.0]], [1.0])
    u = lived.update(history=[Examples({"x": rows["x"], "y": rows["y"]}, "line", rows["id"])])
    u.epoch = 0
    return u


def test_who_can_enter_a_full_buffer():
    """Duplicates inside: the same direction (C = 2) and an orthogonal one (C = 1) stay out, an opposing one can enter."""
    for x, y, score in (
        ([3.0, 0.0], 1.0, 2.0),
        ([0.0, 1.0], 1.0, 1.0),
        ([1.0, 1.0], -1.0, 1 - 0.5**0.5),
        ([1.0, 0.0], -2.0, 0.0),
    ):
        keeper = GSS(capacity=4, compared=4)
        u = at_zero(keeper)
        keeper.after(u, line([[1.0, 0.0]] * 4, [1.0] * 4))
        assert keeper.buffer.columns["score"].tolist() == pytest.approx([1.1] * 4)
        keeper.after(u, line([x] * 40, [y] * 40, first=10))
        entered = [
            float(s) for i, s in zip(*(keeper.buffer.columns[n] for n in ("id", "score")), strict=True) if i >= 10
        ]
        assert len(keeper.buffer) == 4 and (len(entered) > 0) is (score < 1)
        assert entered == pytest.approx([score] * len(entered), abs=1e-6)


def test_who_gives_way_and_how_often():
    """Row i with chance C_i / sum C * C_i / (C_i + C), by the chi-squared test at 0.1 %."""
    scores, new, runs = torch.tensor([0.2, 0.9, 1.6], dtype=torch.float64), 1 - 0.5**0.5, 1000
    counts = torch.zeros(4)
    u = at_zero(GSS())
    for _ in range(runs):
        keeper = GSS(capacity=3, compared=3)
        stored = {**line([[1.0, 0.0]] * 3, [1.0] * 3), "score": scores}
        del stored["origin"]
        keeper.buffer.add(stored, torch.Generator())
        keeper.after(u, line([[1.0, 1.0]], [-1.0], first=10))  # the stream of draws goes on from run to run
        gone = {0, 1, 2} - set(keeper.buffer.columns["id"].tolist())
        counts[gone.pop() if gone else 3] += 1
    chance = scores / scores.sum() * scores / (scores + new)
    expected = runs * torch.cat([chance, 1 - chance.sum(0, keepdim=True)])
    statistic = float(((counts - expected).square() / expected).sum())
    assert statistic < chi2.ppf(0.999, 3)


def test_scores_are_the_naive_ones():
    """1 + the largest cosine of the row's gradient with those of the rows that were there, never with itself."""
    keeper = GSS(capacity=500, compared=500)
    lived = Lived([keeper], mlp(64, [16], dropout=0.3)).all([SMALL[0]], epochs=1)
    lived.forget(Ids(SMALL[0].train.id[60:]))
    columns, net = keeper.buffer.columns, copy.deepcopy(lived.model).eval()
    assert len(columns["id"]) == 60
    gradients = []
    for x, y in zip(columns["x"], columns["y"], strict=True):
        loss = F.cross_entropy(net(x[None]), y[None])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]).double())
    g = F.normalize(torch.stack(gradients), dim=1)
    cosines = (g @ g.T).fill_diagonal_(-2.0)
    torch.testing.assert_close(columns["score"], 1 + cosines.amax(1), rtol=0, atol=1e-5)


def test_a_row_is_stored_once_and_later_epochs_offer_none():
    keeper = GSS(capacity=1000)
    Lived([keeper], mlp(64, [16])).all(TWO, epochs=2)
    assert len(keeper.buffer) == keeper.buffer.offered == len(SMALL[0].train) + len(SMALL[1].train)
    u = at_zero(small := GSS(capacity=4))
    small.after(u, line([[1.0, 0.0]] * 4, [1.0, 1.0, -1.0, -1.0]))
    before = {name: column.clone() for name, column in small.buffer.columns.items()}
    small.after(u, line([[-1.0, 0.0]] * 4, [9.0] * 4))  # the same ids, and an opposing gradient
    assert all(torch.equal(column, small.buffer.columns[name]) for name, column in before.items())


@pytest.mark.parametrize("knobs", [{"capacity": 0}, {"batch_size": 0}], ids=str)
def test_nothing_drawn_or_stored_is_nothing_there(knobs):
    plain = Lived([], mlp(64, [16])).all(TWO, epochs=1)
    assert GSS(**knobs).inert and same(plain.model, Lived([GSS(**knobs)], mlp(64, [16])).all(TWO, epochs=1).model)


def test_it_looks_without_a_trace():
    """Gradients of single rows touch no running statistics, no ``.grad`` and no random number of the step."""
    u = (
        Lived([keeper := GSS(capacity=70)], mlp(64, [16], norm=True, dropout=0.3))
        .all([first(STREAM[0], 50)], epochs=1)
        .update()
    )
    u.model.train()
    u.epoch, state, draws = 0, copy.deepcopy(u.model.state_dict()), torch.get_rng_state()
    batch = u.mapped(SMALL[0].train).batch(torch.arange(60, 80))
    keeper.after(u, {**batch, "origin": torch.zeros(20, dtype=torch.int64)})
    assert len(keeper.buffer) == 70
    assert same(state, u.model) and torch.equal(draws, torch.get_rng_state()) and u.model.training
    assert all(p.grad is None for p in u.model.parameters())


def test_forgotten_rows_are_gone_and_scores_made_anew():
    keeper = GSS(capacity=40)
    lived = Lived([keeper], mlp(64, [16])).all(TWO, epochs=1)
    everyone, gone = SMALL[0].train.ids | SMALL[1].train.ids, SMALL[0].train.ids
    assert keeper.derived() and keeper.holds(everyone) == everyone  # scores hold what the weights held
    left, before = keeper.buffer.ids - gone, keeper.buffer.columns["score"].clone()
    lived.forget(gone)
    assert keeper.buffer.ids == left and 0 < len(left) < 40 and not keeper.holds(gone)
    assert not set(before.tolist()) & set(keeper.buffer.columns["score"].tolist())
    u = lived.learn(SMALL[2], epochs=1)
    assert u.consumed.replayed & left and not u.consumed.replayed & gone


def test_same_seed_same_bits_and_state_round_trip():
    lives = [Lived([GSS(30, 10)], mlp(64, [16]), seed=3).all(TWO, epochs=1) for _ in range(2)]
    assert same(lives[0].model, lives[1].model)
    fresh = GSS(30, 10)
    fresh.load_state_dict(copy.deepcopy(lives[0].state.keepers[0].state_dict()))
    assert fresh.bytes() == lives[0].state.keepers[0].bytes() == 30 * (64 * 4 + 8 + 8 + 8)
    lives[0].state.keepers[0] = fresh
    for lived in lives:
        lived.learn(SMALL[2], epochs=1)
    assert same(lives[0].model, lives[1].model)


@pytest.mark.fidelity(
    "keep/gss",
    check="scores against single gradients; who enters and who gives way against the formula (chi-squared test); digits 5 x 2 "
    "class-incremental, one pass, 40 rows a task and 270 in the third, 50 examples stored, three seeds",
    measured="0.33, 0.41, 0.39 where a reservoir has 0.20 to 0.22 and finetuning 0.10 to 0.18; balanced: 0.62 to 0.65, a reservoir "
    "0.67 to 0.73",
    paper="-",
    differs="digits and a small perceptron, one step a batch; on equal tasks it is a little worse here",
)
def test_unequal_tasks():
    """The paper's case for it: one task has most of the rows, and a reservoir is filled by it."""
    tasks = [first(task, 1000 if number == 2 else 40) for number, task in enumerate(STREAM)]
    for seed in range(3):
        lives = [
            Lived(keep, mlp(64, [64], seed=seed), seed=seed).all(tasks, epochs=1, batch_size=10)
            for keep in ([], [GSS(50, 10)], [Replay(None, 50, 10, "reservoir")])
        ]
        plain, chosen, uniform = (lived.accuracy() for lived in lives)
        assert chosen > uniform + 0.08 and chosen > plain + 0.15
        of_the_large = [
            int(torch.isin(lived.state.keepers[0].buffer.columns["y"], torch.tensor([4, 5])).sum())
            for lived in lives[1:]
        ]
        assert of_the_large[0] < of_the_large[1]


@pytest.mark.slow
def test_equal_tasks():
    """Measured: 0.65, 0.62, 0.63 where finetuning has 0.19, 0.19, 0.10 and a reservoir 0.67, 0.71, 0.73."""
    momentum = {"optimizer": {"sgd": {"momentum": 0.9}}, "lr": 0.05, "epochs": 3}
    for seed in range(3):
        plain, chosen = (
            Lived(keep, mlp(64, [64], seed=seed), seed=seed).all(STREAM, **momentum).accuracy()
            for keep in ([], [GSS(50, 32)])
        )
        assert chosen > plain + 0.35


def test_wrong_knobs():
    for knobs in ({"capacity": -1}, {"batch_size": -1}, {"compared": 0}):
        with pytest.raises(BadInput):
            GSS(**knobs)
