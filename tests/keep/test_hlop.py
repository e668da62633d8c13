"""HLOP: the rule finds principal directions, old inputs get old answers, and little is forgotten, in spiking networks too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.problem import Regression
from remanence.data import Examples, Task
from remanence.keep.gpm import GPM
from remanence.keep.hlop import HLOP
from remanence.models import cnn, mlp
from remanence.models.small import seeded
from remanence.models.snn import SNN
from remanence.nn.subspace import layer_inputs
from tests.keep.lives import Lived, same, stream, weights

STREAM = stream()


def orthonormal(rows: int, width: int, seed: int) -> torch.Tensor:
    drawn = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.T[:rows].float().contiguous()


def settle(
    keeper: HLOP, h: torch.Tensor, axes: torch.Tensor, spread: torch.Tensor, batches: int, m=None
) -> torch.Tensor:
    """H after so many batches of 64 Gaussian rows with these axes (d, d) and standard deviations (d,)."""
    v, rng = torch.zeros_like(h), torch.Generator().manual_seed(9)
    for _ in range(batches):
        x = (torch.randn(64, len(spread), generator=rng) * spread) @ axes
        h, v = keeper._hebb(h, v, x, m)
    return h


@pytest.mark.fidelity(
    "keep/hlop",
    check="Gaussian inputs with known principal directions; per-example loop of the rule; digits 5 x 2 class-incremental, ReLU and spiking",
    measured="|H'H - VV'| = 0.10 after 100 batches (5 of 30 directions), |HH' - I| = 0.002; digits 0.82 to 0.87 with, 0.20 without "
    "(GPM 0.64 to 0.74); spiking 0.80 to 0.81 with, 0.20 without (GPM 0.49 to 0.60), three seeds",
    paper="backward transfer -1.30 on permuted MNIST",
    differs="digits and small networks; rows are made orthonormal at the end of an event; no spiking lateral neurons",
)
@pytest.mark.parametrize("seed", range(3))
def test_rows_find_the_principal_subspace(seed):
    axes = orthonormal(30, 30, seed)
    spread = torch.tensor([3.0] * 5 + [0.1] * 25).sqrt()
    h = settle(HLOP(), orthonormal(5, 30, 100 + seed), axes, spread, 100)
    assert float((h.T @ h - axes[:5].T @ axes[:5]).norm()) < 0.15
    assert float((h @ h.T - torch.eye(5)).norm()) < 0.01
    early = settle(HLOP(), orthonormal(5, 30, 100 + seed), axes, spread, 20)
    assert float((early.T @ early - axes[:5].T @ axes[:5]).norm()) > 0.5  # it is learned, not computed


def test_beside_old_rows_they_find_what_these_leave_over():
    axes = orthonormal(30, 30, 1)
    spread = torch.tensor([4.0] * 4 + [2.0] * 3 + [0.05] * 23).sqrt()
    h = settle(HLOP(), orthonormal(3, 30, 2), axes, spread, 200, m=axes[:4].T)
    assert float((h.T @ h - axes[4:7].T @ axes[4:7]).norm()) < 0.1 and float((h @ axes[:4].T).norm()) < 0.01


def test_the_rule_is_a_loop_over_examples():
    rng = torch.Generator().manual_seed(3)
    x, old = torch.randn(7, 6, generator=rng), orthonormal(2, 6, 4)
    h, v = orthonormal(2, 6, 5), 0.1 * torch.randn(2, 6, generator=rng)
    ours = HLOP(steps=3, rate=0.02, momentum=0.8)._hebb(h.clone(), v.clone(), x, old.T)
    for _ in range(3):
        both = torch.cat([old, h])  # the lateral neurons of all events, of which the old ones do not learn
        change = torch.zeros_like(both)
        for row in x:
            y = both @ row
            change += torch.outer(y, row - both.T @ y) / len(x)
        v = 0.8 * v + 0.2 * change[2:]
        h = h + 0.02 * v
    torch.testing.assert_close(ours[0], h)
    torch.testing.assert_close(ours[1], v)


def test_large_inputs_do_not_make_it_diverge():
    """With inputs a hundred times as large the paper's rate alone blows up; the bound keeps the same subspace."""
    axes, spread = orthonormal(12, 12, 0), torch.tensor([300.0] * 2 + [10.0] * 10)
    h = settle(HLOP(), orthonormal(2, 12, 1), axes, spread, 100)
    assert float((h.T @ h - axes[:2].T @ axes[:2]).norm()) < 0.1


def numbers(x: torch.Tensor, number: int) -> Task:
    y = x @ torch.randn(x.shape[1], 3, generator=torch.Generator().manual_seed(number))
    e = Examples({"x": x, "y": y}, f"numbers-{number}", torch.arange(len(x)) + 1000 * number)
    return Task(e, e, (), (), number)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd", "lr": 0.05},
        {"optimizer": {"sgd": {"momentum": 0.9, "weight_decay": 0.01}}, "lr": 0.02},
        {"optimizer": {"adamw": {"weight_decay": 0.1}}, "lr": 0.01},
    ],
    ids=["sgd", "momentum and decay", "adamw"],
)
def test_inputs_inside_the_subspace_get_their_old_answers(settings):
    """One layer: whatever lies in the span of the rows is answered as before, bias and all; other inputs are learned."""
    rng = torch.Generator().manual_seed(0)
    keeper, net = HLOP(first=0.3, later=0.1), nn.Sequential(nn.Linear(20, 3))
    lived = Lived([keeper], net)
    lived.problem = Regression()
    lived.learn(numbers(torch.randn(64, 20, generator=rng), 0), **settings)
    assert keeper.subspace.rank("0") == 6  # 0.3 of 21
    inside = (
        torch.randn(50, 6, generator=rng) @ keeper.subspace.bases["0"].T
    )  # (50, 21): the last column meets the bias
    joint = torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach()
    second = numbers(torch.randn(64, 20, generator=rng), 1)
    start = float(lived.state.context(lived.problem).evaluate(second.test)["mse"])
    basis = keeper.subspace.bases["0"].clone()
    lived.learn(second, **{**settings, "epochs": 20})
    now = torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach()
    torch.testing.assert_close(inside @ now.T, inside @ joint.T, rtol=1e-4, atol=1e-4)
    assert float(lived.state.context(lived.problem).evaluate(second.test)["mse"]) < 0.9 * start
    assert torch.equal(keeper.subspace.bases["0"][:, :6], basis) and keeper.subspace.rank("0") == 8


def test_with_as_many_rows_as_inputs_nothing_moves_any_more():
    lived = Lived([HLOP(first=1.0)], mlp(64, [16], 4, norm=True))
    lived.problem.classes = [0, 1, 2, 3]
    lived.learn(STREAM[0])
    before = weights(lived.model)
    lived.learn(STREAM[1])
    assert same(before, lived.model) and lived.state.keepers[0].subspace.rank("head") == 17


def test_the_first_event_is_free_and_without_rows_nothing_is_there():
    assert HLOP(first=0.0, later=0.0).inert and not HLOP().inert
    plain = Lived([], mlp(64, [16])).all([STREAM[0]])
    lived = Lived([HLOP()], mlp(64, [16])).all([STREAM[0]])
    assert same(plain.model, lived.model)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "snn"])
def test_on_real_inputs_the_rows_explain_nearly_what_the_best_rows_could(kind):
    """The share of the energy of the layers' inputs, against the principal directions of the same number. Measured: 0.92 to 1.00 of it."""
    make = {
        "mlp": lambda: mlp(64, [32], 2),
        "cnn": lambda: cnn((1, 8, 8), [4, 6], 2),
        "snn": lambda: seeded(0, lambda: SNN(64, [32, 24], 2)),
    }
    shape, task = (-1, 1, 8, 8) if kind == "cnn" else (-1, 64), STREAM[0]
    train, test = (e.replace(x=e["x"].reshape(shape)) for e in (task.train, task.test))
    keeper, lived = HLOP(), Lived([], make[kind]())
    lived.learn(Task(train, test, task.classes, task.names, 0))
    lived.state.keepers = [keeper]
    lived.learn(Task(train, test, task.classes, task.names, 1), lr=0.0, epochs=30)  # the network stands still
    net = lived.model.eval()
    inputs = layer_inputs(net, lambda b: net(b["x"]), [train.batch(torch.arange(len(train)))], bias=True)
    for name, x in inputs.items():
        m = keeper.subspace.bases[name].double()
        best = torch.linalg.svdvals(x)[: m.shape[1]].square().sum()
        assert float((x @ m).square().sum() / best) > 0.9, name


def test_after_a_forget_the_rows_are_learned_from_the_retained_data():
    keeper = HLOP()
    lived = Lived([keeper], mlp(64, [24], seed=2)).all(list(STREAM)[:3], epochs=2)
    gone = STREAM[0].train.ids | Ids(STREAM[1].train.id[:100])
    assert keeper.holds(gone) == gone and keeper.derived()
    ranks = [keeper.subspace.rank(name) for name in keeper.subspace.bases]
    lived.forget(gone)
    assert not keeper.holds(gone) and keeper.events == 2 and not keeper.rows and not keeper.velocity
    assert all(keeper.subspace.rank(n) < before for n, before in zip(keeper.subspace.bases, ranks, strict=True))
    with torch.no_grad():
        x = torch.cat([STREAM[1].train.without(gone)["x"], STREAM[2].train["x"]])
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
    m = keeper.subspace.bases["body.1"]
    assert float((x @ m).square().sum() / x.square().sum()) > 0.8


def test_inside_an_event_the_rows_are_saved_and_after_it_only_the_basis():
    seen = []
    lived = Lived([HLOP()], mlp(64, [16]))
    lived.learn(STREAM[0], epochs=1)
    keeper = lived.state.keepers[0]
    assert set(keeper.state_dict()["rows"]) == set() and keeper.bytes() == keeper.subspace.bytes()
    with pytest.MonkeyPatch.context() as patch:
        after = HLOP.after
        patch.setattr(
            HLOP, "after", lambda self, u, b: (after(self, u, b), seen.append(copy.deepcopy(self.state_dict())))
        )
        lived.learn(STREAM[1], epochs=1)
    assert all(set(state["rows"]) == set(state["velocity"]) == {"body.1", "head"} for state in seen)
    assert not torch.equal(seen[0]["rows"]["head"], seen[-1]["rows"]["head"])


@pytest.mark.parametrize("seed", range(3))
def test_digits(seed):
    """One head for all. Measured: 0.86, 0.87, 0.82 with (GPM 0.64, 0.74, 0.72), 0.20 without."""
    plain, kept = (Lived(keep, mlp(64, [128], seed=seed), seed=seed).all(STREAM) for keep in ([], [HLOP()]))
    assert plain.accuracy() < 0.25 and kept.accuracy() > plain.accuracy() + 0.5
    assert kept.accuracy(0) > 0.65 and plain.accuracy(0) < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_digits_by_spikes(seed):
    """Measured: 0.80, 0.81, 0.80 with (GPM 0.52, 0.60, 0.49), 0.20 without."""
    found = {}
    for name, keep in (("alone", []), ("gpm", [GPM()]), ("hlop", [HLOP()])):
        found[name] = Lived(keep, seeded(seed, lambda: SNN(64, [128])), seed=seed).all(STREAM).accuracy()
    assert found["alone"] < 0.25 and found["hlop"] > 0.7 and found["hlop"] > found["gpm"] + 0.05, found


def test_refusals():
    for knobs in ({"first": 1.5}, {"later": -0.1}, {"momentum": 2.0}, {"steps": -1}):
        with pytest.raises(BadInput, match=next(iter(knobs))):
            HLOP(**knobs)
    net = nn.Sequential(nn.Unflatten(1, (8, 8)), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(BadInput, match=r"hlop: 1 is a Conv1d"):
        Lived([HLOP()], net).learn(STREAM[0])
