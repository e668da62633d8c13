"""LT-SFT: which entries move, that the others do not, and that skills can be taken off, put on and mixed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from remanence.core.ids import Ids
from remanence.core.problem import CausalLM
from remanence.data import Task, digits
from remanence.learn.finetune import Finetune
from remanence.learn.lt_sft import LTSFT
from remanence.models import mlp
from remanence.nn.masks import top_entries
from remanence.nn.sparse_delta import decode
from tests.keep.lives import Lived, same, stream, weights
from tests.lm import facts, tiny

STREAM = stream()
ADAMW = {"optimizer": {"adamw": {"weight_decay": 0.3}}, "lr": 3e-3, "batch_size": 64}


def moved(before, after):
    """Entries of which a bit changed, by name."""
    return {name: before[name].view(torch.int32) != value.view(torch.int32) for name, value in after.items()}


def count(masks, *but):
    return sum(int(m.sum()) for name, m in masks.items() if not name.startswith(but or ("-",)))


@pytest.mark.fidelity(
    "learn/lt-sft",
    check="both phases by hand: the largest changes of a full run, the same weights with all entries chosen; digits turned x digits renamed, learned apart and composed, five seeds",
    measured="the same bits; accuracy 0.52 on the unseen combination with 10 % of the entries, 0.30 with all",
    paper="abstract: above adapters in zero-shot transfer over languages",
    differs="the update is masked and not the gradient alone; exactly K entries; digits and a tiny language model",
)
def test_the_mask_is_the_largest_changes_of_a_full_run():
    """A life that is finetuned as the full phase does tells which entries; only these and the head's are other afterwards."""
    full, sparse, none = (Lived(model=mlp(64, [24], seed=2), learner=part) for part in (None, LTSFT(density=0.1), None))
    full.learn(STREAM[0], **ADAMW)
    sparse.learn(STREAM[0], **ADAMW)
    none.learn(STREAM[0], **{**ADAMW, "epochs": 0})
    start, there = weights(none.model), weights(full.model)
    change = {name: (there[name] - start[name]).abs() for name in start if not name.startswith("head")}
    budget = int(0.1 * sum(value.numel() for value in change.values()))
    wanted, found = top_entries(change, budget), moved(start, weights(sparse.model))
    assert all(torch.equal(wanted[name], found[name]) for name in change) and count(wanted) == budget
    assert count(found) - count(found, "head") > 0


class Twice(Finetune):
    """Finetune, go back, finetune: the second time with the order of a second phase."""

    def learn(self, u):
        before = [(t, t.detach().clone()) for t in (*u.model.parameters(), *u.model.buffers())]
        u.run()
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        u.run()


def test_with_all_entries_the_sparse_phase_is_plain_finetuning():
    """Bit for bit, running statistics too."""
    lives = [Lived(model=mlp(64, [24], norm=True, seed=2), learner=part) for part in (Twice(), LTSFT(density=1.0))]
    for lived in lives:
        lived.all(list(STREAM)[:2], **ADAMW)
    assert same(lives[0].model, lives[1].model)


def test_nothing_but_the_head_moves_at_density_0():
    lived = Lived(model=mlp(64, [24], 10, seed=2), learner=LTSFT(density=0.0))
    before = weights(lived.model)
    lived.learn(STREAM[0], **ADAMW)
    found = moved(before, weights(lived.model))
    assert count(found, "head") == 0 and count(found) > 0


def test_iterations_share_the_budget():
    once, twice = (Lived(model=mlp(64, [24], 10, seed=2), learner=LTSFT(density=0.1, iterations=n)) for n in (1, 2))
    found = []
    for lived in (once, twice):
        before = weights(lived.model)
        lived.learn(STREAM[0], **ADAMW)
        found.append(moved(before, weights(lived.model)))
    budget = int(0.1 * (64 * 24 + 24))
    assert count(found[0], "head") == budget and count(found[1], "head") == budget // 2 * 2
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("start", ["here", "base"])
def test_skills_come_off_and_go_on(start):
    """Over three events with a growing head: none of them is the network as it was drawn, all of them the one there is."""
    learner = LTSFT(density=0.1, start=start)
    lived = Lived(model=mlp(64, [24], seed=2), learner=learner)
    states = []
    for task in list(STREAM)[:3]:
        lived.learn(task, **ADAMW)
        states.append(weights(lived.model))
    assert list(learner.skills.deltas) == ["learn/0", "learn/1", "learn/2"]
    assert same(learner.compose(lived.model, learner.skills.deltas), lived.model)
    drawn = weights(mlp(64, [24], seed=2))
    bare = weights(learner.compose(lived.model))
    assert all(torch.equal(bare[name], drawn[name]) for name in drawn if not name.startswith("head"))
    first = weights(learner.compose(lived.model, ["learn/0"]))
    assert all(torch.equal(first[name][: len(value)], value) for name, value in states[0].items())
    assert same(lived.model, states[-1])  # looking changes nothing
    after = learner.skills.deltas["learn/2"]
    assert after.bytes() < learner.bytes() == sum(delta.bytes() for delta in learner.skills.deltas.values())
    swapped = weights(learner.compose(lived.model, ["learn/0", "learn/2"]))
    change = {name: swapped[name] - first[name] for name in swapped}
    at = {name: decode(gaps) for name, gaps in after.gaps.items()}
    for name, value in change.items():
        given = torch.zeros(value.numel())
        if name in at:
            given[at[name]] = after.new[name] - after.old[name]
        torch.testing.assert_close(value.flatten(), given, rtol=1e-4, atol=1e-6)


def test_from_the_base_every_skill_is_learned_as_if_it_were_the_first():
    """With one head for all columns: the second skill does not know of the first."""
    alone, both = (Lived(model=mlp(64, [24], 10, seed=2), learner=LTSFT(density=0.1, start="base")) for _ in range(2))
    for lived in (alone, both):
        lived.problem.classes = list(range(10))
    both.learn(STREAM[0], **ADAMW)
    alone.learn(STREAM[0], **{**ADAMW, "epochs": 0})
    for lived in (alone, both):
        lived.learn(STREAM[1], **ADAMW)
    one, two = (lived.state.learner.skills.deltas["learn/1"].state_dict() for lived in (alone, both))
    assert all(same(one[part], two[part]) for part in one)


def test_the_l1_term_is_in_the_gradient():
    """One step from a theta that the optimizer has moved before; by autograd."""
    learner = LTSFT(l1=50.0)
    lived = Lived(model=mlp(64, [8], 2, seed=2), learner=learner)
    lived.learn(STREAM[0], epochs=0)
    u = lived.update()
    u._parameters = dict(lived.model.named_parameters())
    rng = torch.Generator().manual_seed(0)
    learner._theta0 = {n: p.detach() + 0.1 * torch.randn(p.shape, generator=rng) for n, p in u.parameters.items()}
    learner._params, learner._mask = sum(p.numel() for p in u.parameters.values()), {}
    term = sum((p - learner._theta0[n]).abs().sum() for n, p in u.parameters.items())
    loss = F.cross_entropy(lived.model(STREAM[0].train["x"]), STREAM[0].train["y"])
    wanted = torch.autograd.grad(loss + 50.0 / learner._params * term, list(u.parameters.values()), retain_graph=True)
    loss.backward()
    learner.gradient(u)
    for p, g in zip(u.parameters.values(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_a_strong_l1_term_keeps_the_weights_near():
    far = []
    for l1 in (0.0, 30.0):
        lived = Lived(model=mlp(64, [24], 10, seed=2), learner=LTSFT(density=0.2, l1=l1))
        before = weights(lived.model)
        lived.learn(STREAM[0], **{**ADAMW, "optimizer": "sgd", "lr": 0.1})
        far.append(sum(float((value - before[name]).abs().sum()) for name, value in weights(lived.model).items()))
    assert far[1] < 0.7 * far[0]


def test_normalisations_may_stay():
    lived = Lived(model=mlp(64, [24], 10, norm=True, seed=2), learner=LTSFT(density=1.0, norms=False))
    before = weights(lived.model)
    lived.learn(STREAM[0], **ADAMW)
    now = weights(lived.model)
    held = {name for name in before if torch.equal(before[name], now[name])}
    assert held == {"body.2.weight", "body.2.bias"}


def test_a_language_model_with_one_matrix_for_input_and_output():
    """No head of its own: exactly K entries move, and they come off again."""
    learner = LTSFT(density=0.05)
    lived = Lived(model=tiny(), learner=learner)
    lived.problem = CausalLM(context=12)
    before = weights(lived.model)
    data = facts(48, 1)
    losses = []
    for number in range(2):
        with torch.no_grad():
            batch = data.batch(torch.arange(48))
            losses.append(float(lived.problem.loss(lived.problem.forward(lived.model, batch), batch)))
        if not number:
            lived.learn(Task(data, data, (), (), 0), optimizer="adamw", lr=1e-2, batch_size=24, epochs=8)
    params = dict(lived.model.named_parameters())
    assert len(learner.skills.deltas["learn/0"]) == int(0.05 * sum(p.numel() for p in params.values()))
    assert same(learner.compose(lived.model), before) and losses[1] < 0.8 * losses[0]


def test_after_a_forget_there_are_no_skills():
    lived = Lived(model=mlp(64, [24], seed=2), learner=LTSFT(density=0.1)).all(list(STREAM)[:2], **ADAMW)
    learner, gone = lived.state.learner, Ids(STREAM[0].train.id[:3])
    assert learner.derived() and learner.holds(gone) == gone
    fresh = LTSFT()
    fresh.load_state_dict(learner.state_dict())
    assert same(fresh.compose(lived.model), learner.compose(lived.model)) and fresh.bytes() == learner.bytes()
    lived.forget(gone)
    assert not learner.derived() and not learner.holds(gone) and learner.bytes() == 0


def transfer(seed, density):
    """Two skills from one base, a network of digits: "language", digits turned by a quarter, learned under the base's head; "task",
    another meaning for each digit, learned on upright ones. Held-out accuracy: of each alone on what it learned, and of both together
    on turned digits with the other meaning, of which there was no example."""
    data, rng = digits(), torch.Generator().manual_seed(seed)
    order, meaning = torch.randperm(len(data), generator=rng), torch.randperm(10, generator=rng)

    def part(number, view=lambda e: e):
        rows = order[400 * number : 400 * number + 400]
        return Task(view(data.select(rows)), view(data.select(order[1200:])), tuple(range(10)), (), number)

    def turned(e):
        return e.replace(x=e["x"].reshape(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64))

    def renamed(e):
        return e.replace(y=meaning[e["y"]])

    lived = Lived(model=mlp(64, [256], 10, seed=seed), seed=seed)
    lived.problem.classes = list(range(10))
    lived.learn(part(0), optimizer="adamw", lr=3e-3, batch_size=64, epochs=30)
    lived.state.learner = learner = LTSFT(density=density, start="base")
    for number, rows, view in ((1, 1, turned), (2, 0, renamed)):
        lived.model.head.requires_grad_(number == 2)
        lived.learn(part(rows, view), optimizer="adamw", lr=1e-2, batch_size=64, epochs=30)

    def accuracy(model, e):
        return float((model.eval()(e["x"]).argmax(1) == e["y"]).float().mean())

    test = data.select(order[1200:])
    language, task = (learner.compose(lived.model, [f"learn/{number}"]) for number in (1, 2))
    return accuracy(language, turned(test)), accuracy(task, renamed(test)), accuracy(lived.model, turned(renamed(test)))


@pytest.mark.parametrize("seed", [0, *[pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2)]])
def test_sparse_skills_compose_where_full_ones_do_not(seed):
    """Measured over five seeds, on what neither was shown: 0.53, 0.54, 0.61, 0.30, 0.62 at a density of 0.1; 0.32, 0.17, 0.35, 0.25, 0.39
    at 1."""
    sparse, full = transfer(seed, 0.1), transfer(seed, 1.0)
    assert sparse[0] > 0.8 and sparse[1] > 0.9
    assert sparse[2] > full[2] + 0.12
