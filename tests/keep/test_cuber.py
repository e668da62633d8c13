"""CUBER against a plain loop that builds every projection anew; GPM where nothing may open; old tasks that get better."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.problem import Regression
from remanence.data import Examples, Task
from remanence.keep.cuber import CUBER
from remanence.keep.gpm import GPM
from remanence.models import cnn, mlp
from tests.keep.helpers import stream
from tests.keep.lives import Lived, same, weights

WHOLE, STREAM = stream(1)[0], stream()


def part(low: int, high: int, number: int, images: bool = False) -> Task:
    """Some rows of all ten digits, to be measured on the same held-out rows."""
    rows = torch.arange(low, high)
    sets = [
        Examples({"x": e["x"].reshape(-1, 1, 8, 8) if images else e["x"], "y": e["y"]}, "digits", e.id)
        for e in (WHOLE.train, WHOLE.test)
    ]
    return Task(sets[0].select(rows), sets[1], WHOLE.classes, WHOLE.names, number)


def permuted(number: int) -> Task:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(number))
    sets = [Examples({"x": e["x"][:, order], "y": e["y"]}, f"permuted-{number}", e.id + 2000 * number) for e in (WHOLE.train, WHOLE.test)]  # fmt: skip
    return Task(sets[0], sets[1], WHOLE.classes, WHOLE.names, number)


def ten(keep, model=None, seed=0) -> Lived:
    lived = Lived(keep, model or mlp(64, [64], 10, seed=seed), seed=seed)
    lived.problem.classes = list(range(10))
    return lived


def plain_net() -> nn.Module:
    net = nn.Sequential(nn.Linear(64, 20, bias=False), nn.ReLU(), nn.Linear(20, 10, bias=False))
    for number, layer in enumerate((net[0], net[2])):
        nn.init.normal_(layer.weight, std=0.2, generator=torch.Generator().manual_seed(number))
    return net


class Naive:
    """The method for a net of two bias-free layers: full batches, plain SGD, projections as d x d matrices, penalty by autograd."""

    def __init__(self, net, overlap, agreement, leash, most):
        self.net, self.overlap, self.agreement, self.leash, self.most = net, overlap, agreement, leash, most
        self.bases = {"0": [], "2": []}
        self.old = {"0": [], "2": []}
        self.log = []

    def gradient(self, x, y):
        loss = F.cross_entropy(self.net(x), y)
        grads = torch.autograd.grad(loss, [self.net[0].weight, self.net[2].weight])
        return dict(zip(("0", "2"), grads, strict=True))

    @staticmethod
    def cosine(a, b):
        return float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))

    def remember(self, x, y, union, share):
        with torch.no_grad():
            inputs = {"0": x.double(), "2": self.net[:2](x).double()}
        for name, g in self.gradient(x, y).items():
            energies = [float((inputs[name] @ column.double()).square().sum()) for column in union[name].T]
            known = {i for j, (_, columns) in enumerate(self.bases[name]) for i in columns}
            chosen = [i for i in range(len(energies)) if i not in known]
            for i in sorted(known, key=lambda i: -energies[i]):
                if sum(energies[j] for j in chosen) >= share * float(inputs[name].square().sum()) - 1e-6:
                    break
                chosen.append(i)
            self.bases[name].append((union[name][:, chosen], chosen))
            self.old[name].append(g)

    def learn(self, x, y, steps, lr):
        start = {name: self.net[int(name)].weight.detach().clone() for name in self.bases}
        opened = {}
        for name, g in self.gradient(x, y).items():
            near = [(float((g @ b).norm() / g.norm()), j) for j, (b, _) in enumerate(self.bases[name])]
            near = sorted([item for item in near if item[0] > self.overlap], reverse=True)[: self.most]
            opened[name] = {j for _, j in near if self.cosine(self.old[name][j], g) > self.agreement}
        for _ in range(steps):
            for name, g in self.gradient(x, y).items():
                opened[name] -= {j for j in opened[name] if self.cosine(self.old[name][j], g) <= self.agreement}
                w = self.net[int(name)].weight.detach().clone().requires_grad_()
                for j in opened[name]:
                    b = self.bases[name][j][0]
                    away = (w - start[name]) @ b
                    if bool(away.any()):
                        g = g + torch.autograd.grad(self.leash * away.norm(), w)[0]
                closed = [b for j, (b, _) in enumerate(self.bases[name]) if j not in opened[name]]
                if closed:
                    u, s, _ = torch.linalg.svd(torch.cat(closed, 1).double(), full_matrices=False)
                    u = u[:, s > 1e-4].float()
                    g = g - g @ u @ u.T
                with torch.no_grad():
                    self.net[int(name)].weight -= lr * g
            self.log.append({name: set(js) for name, js in opened.items()})


@pytest.mark.fidelity(
    "keep/cuber",
    check="four tasks of a plain loop that builds every projection as a matrix; GPM with most=0; a few digits, then more of them",
    measured="weights equal to 1e-4 (they move by 0.1), GPM to 1e-6; the first task rises from 0.28-0.32 to 0.82-0.88 (GPM 0.40-0.51, no keeper 0.87-0.92), three seeds",
    paper="backward transfer +0.13 on 10-split CIFAR-100 where GPM has -0.9",
    differs="no scaled projections; one head; the leash's weight 0.1 was chosen here",
)
@pytest.mark.parametrize("most", [1, 2])
def test_four_tasks_are_a_plain_loop(most):
    keeper = CUBER(threshold=0.9, increase=0.01, samples=1000, overlap=0.4, agreement=0.05, leash=0.2, most=most)
    lived = ten([keeper], plain_net())
    naive = Naive(copy.deepcopy(lived.model), 0.4, 0.05, 0.2, most)
    tasks = [part(100 * n, 100 * n + 80, n) if n != 1 else permuted(1) for n in range(4)]
    tasks[1] = Task(tasks[1].train.select(torch.arange(100, 180)), tasks[1].test, tasks[1].classes, tasks[1].names, 1)
    for number, task in enumerate(tasks):
        lived.learn(task, epochs=25, batch_size=100, lr=0.3)
        naive.learn(task.train["x"], task.train["y"], 25, 0.3)
        for name in ("0", "2"):
            ours, theirs = lived.model[int(name)].weight, naive.net[int(name)].weight
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        naive.remember(task.train["x"], task.train["y"], keeper.subspace.bases, 0.9 + 0.01 * number)
        for name, bases in naive.bases.items():
            assert [sorted(columns) for _, columns in bases] == [u.nonzero()[:, 0].tolist() for u in keeper.uses[name]]
    sizes = {len(js) for step in naive.log for js in step.values()}
    assert sizes == set(range(most + 1))  # all cases came up: none, one and (where allowed) two open


@pytest.mark.parametrize("knobs", [{"most": 0}, {"overlap": 1.0}])
@pytest.mark.parametrize("kind", ["mlp", "norm", "cnn"])
def test_where_nothing_may_open_it_is_gpm(knobs, kind):
    def model():
        return cnn((1, 8, 8), [4, 6], 10) if kind == "cnn" else mlp(64, [24], 10, norm=kind == "norm")

    tasks = [part(100 * n, 100 * n + 90, n, kind == "cnn") for n in range(3)]
    lives = []
    for keep in (CUBER(threshold=0.8, samples=1000, **knobs), GPM(threshold=0.8, samples=1000)):
        lives.append(ten([keep], model()).all(tasks, optimizer={"sgd": {"momentum": 0.9}}, lr=0.02))
    for name, value in weights(lives[1].model).items():
        torch.testing.assert_close(lives[0].model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    cuber, gpm = (lived.state.keepers[0] for lived in lives)
    for name, m in gpm.subspace.bases.items():  # of the same rows, in another order
        n = cuber.subspace.bases[name]
        torch.testing.assert_close(n @ n.T, m @ m.T, rtol=0, atol=1e-5)
    for name, uses in cuber.uses.items():  # together the tasks use every column, so nothing of GPM's is left free
        columns = torch.zeros(cuber.subspace.rank(name), dtype=torch.bool)
        for use in uses:
            columns[: len(use)] |= use
        assert columns.all()


def test_a_tasks_basis_explains_it_with_the_fewest_columns():
    keeper = CUBER(threshold=0.85, increase=0.02, samples=1000, most=0)
    lived = ten([keeper], plain_net())
    for number in range(3):
        before, task = keeper.subspace.rank("0"), permuted(number)
        lived.learn(Task(task.train.select(torch.arange(900)), task.test, task.classes, task.names, number), epochs=1)
        x, use = lived.tasks[-1].train["x"].double(), keeper.uses["0"][number]
        energy = (x @ keeper.subspace.bases["0"].double()).square().sum(0) / x.square().sum()
        share = 0.85 + 0.02 * number
        assert use[before:].all() and float(energy[use].sum()) > share - 1e-6
        assert float(energy[use].sum() - energy[use].min()) < share
        assert not number or float(energy[:before][~use[:before]].max()) <= float(energy[:before][use[:before]].min())


def line(targets, number):
    """A regression on inputs of rank 6."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=rng) @ torch.randn(6, 12, generator=rng)
    w = torch.randn(12, 1, generator=rng) * targets
    e = Examples({"x": x, "y": x @ w}, f"line-{number}", torch.arange(40) + 100 * number)
    return Task(e, e, (), (), number)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_same_task_again_improves_and_its_opposite_is_shut_out(sign):
    """Half learned, then learned again: the loss falls. With the targets turned round no answer of the first task moves."""
    lived = Lived([CUBER(threshold=1.0)], nn.Sequential(nn.Linear(12, 1)))
    lived.problem = Regression()
    first, second = line(1.0, 0), line(sign, 1)
    opened = []
    project = CUBER.project
    lived.learn(first, epochs=5, batch_size=40, lr=0.005)
    x, y = first.train["x"], first.train["y"]
    before = lived.model(x).detach()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CUBER, "project", lambda self, *args: (opened.append(dict(self.open)), project(self, *args))[1])
        lived.learn(second, epochs=20, batch_size=40, lr=0.005)
    after = lived.model(x).detach()
    assert len(opened) == 20
    if sign > 0:
        assert all(step["0"].tolist() == [True] for step in opened)
        assert float(F.mse_loss(after, y)) < 0.5 * float(F.mse_loss(before, y))
    else:
        assert not any(opened)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_a_task_that_comes_to_disagree_is_shut_for_good():
    """The targets turn round in the middle of an event: from the first such step on the old answers stay."""
    lived = Lived([CUBER(threshold=1.0, leash=0.0)], nn.Sequential(nn.Linear(12, 1)))
    lived.problem = Regression()
    lived.learn(line(1.0, 0), epochs=5, batch_size=40, lr=0.005)
    lived.learn(line(1.0, 1), epochs=0)  # nothing changes, but a second task is known
    keeper, u = lived.state.keepers[0], lived.update()
    keeper.begin(u)
    x, y = lived.tasks[0].train["x"], lived.tasks[0].train["y"]
    answers, flags, saved = [], [], []
    for step in range(12):
        lived.model.zero_grad()
        target = y if step < 4 or step >= 8 else -y
        F.mse_loss(lived.model(x), target).backward()
        keeper.gradient(u)
        before = weights(lived.model)
        with torch.no_grad():
            for p in lived.model.parameters():
                p -= 0.005 * p.grad
            keeper.project(u, u.parameters, before)
        answers.append(lived.model(x).detach())
        flags.append(keeper.open["0"].any().item())
        saved.append(copy.deepcopy(keeper.state_dict()["open"]))  # else a crash would open it again
    assert flags == [True] * 4 + [False] * 8 == [bool(state["0"].any()) for state in saved]
    assert float((answers[3] - answers[0]).abs().max()) > 0.1
    torch.testing.assert_close(answers[-1], answers[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_what_a_few_examples_taught_gets_better(seed):
    """60 digits, then 340 others. The first task is asked again: nothing stored, and it rises with the second."""
    tasks, found = [part(0, 60, 0), part(60, 400, 1)], {}
    for name, keep in (("alone", []), ("gpm", [GPM()]), ("cuber", [CUBER()])):
        found[name] = ten(keep, seed=seed).all(tasks, epochs=10).accuracy(0)
    assert found["cuber"] > found["gpm"] + 0.2, found


def test_unrelated_tasks_are_kept_as_by_gpm():
    """Three permutations of the digits, the mean over three seeds. Measured: 0.895 beside GPM's 0.903, and 0.66 without."""
    found = dict.fromkeys(("alone", "gpm", "cuber"), 0.0)
    for seed in range(3):
        for name, keep in (("alone", []), ("gpm", [GPM()]), ("cuber", [CUBER()])):
            lived = ten(keep, seed=seed).all([part(0, len(WHOLE.train), 0), permuted(1), permuted(2)], epochs=10)
            found[name] += lived.accuracy() / 3
    assert found["cuber"] > found["gpm"] - 0.03 and found["cuber"] > found["alone"] + 0.1, found


def test_after_a_forget_all_is_made_of_the_retained_data():
    keeper = CUBER(threshold=0.9, samples=10_000)
    lived = Lived([keeper], mlp(64, [24], seed=2)).all(list(STREAM)[:3], epochs=2)
    assert [len(g) for g in keeper.gradients["head"]] == [2, 4, 6]  # the head has grown
    gone = STREAM[0].train.ids | Ids(STREAM[1].train.id[:100])
    assert keeper.holds(gone) == gone and keeper.derived()
    lived.forget(gone)
    assert not keeper.holds(gone) and keeper.events == 2
    assert [len(g) for g in keeper.gradients["head"]] == [6, 6]
    left = STREAM[1].train.without(gone)
    net, x = copy.deepcopy(lived.model), left["x"]
    F.cross_entropy(net(x), left["y"]).backward()
    joint = torch.cat([net.head.weight.grad, net.head.bias.grad[:, None]], 1)
    torch.testing.assert_close(keeper.gradients["head"][0], joint, rtol=1e-4, atol=1e-6)


def test_state_round_trip_and_bytes():
    lived = Lived([CUBER()], mlp(64, [16])).all(list(STREAM)[:2], epochs=1)
    keeper, fresh = lived.state.keepers[0], CUBER()
    fresh.load_state_dict(keeper.state_dict())
    assert fresh.events == 2 and same(fresh.subspace.bases, keeper.subspace.bases) and fresh.bytes() == keeper.bytes()
    columns = sum(use.numel() for uses in keeper.uses.values() for use in uses)
    gradients = 4 * 2 * 16 * 65 + 4 * (2 + 4) * 17
    assert keeper.bytes() == keeper.subspace.bytes() + columns + gradients and not keeper.open


def test_refusals():
    for knobs in ({"overlap": 1.5}, {"agreement": -2.0}, {"most": -1}, {"leash": -0.1}):
        with pytest.raises(BadInput, match=next(iter(knobs))):
            CUBER(**knobs)
    net = nn.Sequential(nn.Unflatten(1, (8, 8)), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(BadInput, match=r"cuber: 1 is a Conv1d"):
        Lived([CUBER()], net).learn(STREAM[0])
    assert CUBER(threshold=0.0).inert
