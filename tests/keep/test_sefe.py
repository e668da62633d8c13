"""SEFE's RegLoRA: the penalty and its positions against plain loops, fresh adapters after every event, and what it is for."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.problem import CausalLM
from remanence.core.rng import generator, seed_of
from remanence.data import Task
from remanence.keep.sefe import SEFE, entries
from remanence.models import mlp
from remanence.nn.adapters import LowRank, add_low_rank
from remanence.where.lora import LoRA
from tests.keep.lives import Lived, same, stream, weights
from tests.lm import facts, tiny

STREAM = stream()
LORA = LoRA(rank=4, alpha=8.0)


def lived(keeper, seed=0, hidden=(24,), model=None):
    made = Lived([keeper] if keeper else [], model or mlp(64, list(hidden), 10, seed=seed), seed=seed)
    made.problem.classes = list(range(10))
    return made


def layer(rank, width, height, seed=0):
    rng = torch.Generator().manual_seed(seed)
    made = LowRank(nn.Linear(width, height), rank, 2.0, rng)
    with torch.no_grad():
        made.up.copy_(torch.randn(height, rank, generator=rng))
    return made


@pytest.mark.parametrize("rank, width, height", [(1, 3, 4), (2, 3, 4), (5, 11, 6)])
@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_the_penalty_and_its_gradient(rank, width, height, share):
    """strength * mean |B A| over K; its gradient is that of G = strength * sign(B A) / |K| on K: dB = G A', dA = B' G."""
    one = layer(rank, width, height)
    at = torch.randperm(width * height, generator=torch.Generator().manual_seed(1))
    at = at[: max(1, int(share * width * height))]
    keeper = SEFE(strength=7.0)
    keeper._held = [(one, at)]
    u = lived(None).update()
    value = keeper.loss(u, {})
    value.backward()
    product = (one.up @ one.down).detach()
    mask = torch.zeros(width * height).index_fill(0, at, 1.0).view(height, width)
    torch.testing.assert_close(value, 7.0 * (product.abs() * mask).sum() / len(at))
    g = 7.0 * product.sign() * mask / len(at)
    torch.testing.assert_close(one.up.grad, g @ one.down.detach().T)
    torch.testing.assert_close(one.down.grad, one.up.detach().T @ g)


def test_both_ways_to_the_entries_agree():
    one = layer(2, 30, 20)
    for size in (1, 10, 299, 300, 600):  # the second way from 300 on
        at = torch.randperm(600, generator=torch.Generator().manual_seed(size))[:size]
        torch.testing.assert_close(entries(one, at), (one.up @ one.down).flatten()[at])


def test_layers_weigh_the_same_and_without_positions_there_is_no_term():
    keeper, layers = SEFE(strength=1.0), [layer(2, 3, 4, seed) for seed in range(2)]
    keeper._held = list(zip(layers, (torch.tensor([0]), torch.arange(12)), strict=True))
    u = lived(None).update()
    means = [(one.up @ one.down).flatten()[at].abs().mean() for one, at in keeper._held]
    torch.testing.assert_close(keeper.loss(u, {}), sum(means) / 2)
    keeper._held = []
    assert keeper.loss(u, {}) is None


@pytest.mark.fidelity(
    "keep/sefe",
    check="three events of a plain loop: penalty on dense products, top entries, merge, fresh adapters; forgetting against the same without a penalty",
    measured="weights equal to 1e-5, the same positions; loss on an old table of facts 2.97, and 3.07 without the penalty at an equal loss on the new one (2.79 and 2.76), three seeds",
    paper="abstract: best on eight multimodal tasks with LLaVA",
    differs="RegLoRA only; a position counts once; digits and a tiny language model",
)
@pytest.mark.parametrize("share, strength", [(0.0, 5.0), (0.1, 5.0)])
def test_three_events_are_a_plain_loop(share, strength):
    """A share of 0 is plain adapters, merged after every event."""
    keeper = SEFE(strength=strength, share=share)
    ours, naive = lived(keeper), mlp(64, [24], 10)
    naive = add_low_rank(naive, ["body.1"], 4, 8.0, seed_of(0, "learn/0", "", "lora"))
    one, key = naive.body[1], torch.zeros(24, 64, dtype=torch.bool)
    for number, task in enumerate(list(STREAM)[:3]):
        ours.learn(task, where=[LORA], epochs=2)
        optimizer = torch.optim.SGD([one.down, one.up, *naive.head.parameters()], lr=0.1)
        for epoch in range(2):
            order = torch.randperm(len(task.train), generator=generator(0, f"learn/{number}", "", "order", epoch))
            for rows in order.split(32):
                loss = F.cross_entropy(naive(task.train["x"][rows]), task.train["y"][rows])
                if key.any():
                    loss = loss + strength * (one.up @ one.down)[key].abs().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            change = one.up @ one.down
            if share:
                key |= change.abs() >= change.abs().flatten().topk(int(share * 1536)).values[-1]
            one.base.weight += 2.0 * change
            rng = generator(seed_of(0, f"learn/{number}", "", "sefe"), "body.1")
            one.down.copy_(torch.empty(4, 64).uniform_(-(64**-0.5), 64**-0.5, generator=rng))
            one.up.zero_()
        for (name, a), b in zip(ours.model.state_dict().items(), naive.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
        held = torch.cat([keys["body.1"] for keys in keeper.keys])
        assert len(held) == len(held.unique()) and torch.equal(held.sort().values, key.flatten().nonzero().squeeze(1))


def test_an_event_leaves_the_function_and_fresh_adapters():
    keeper = SEFE()
    ours, plain = lived(keeper), lived(None)
    for made in (ours, plain):
        made.learn(STREAM[0], where=[LORA])
    one, other = ours.model.body[1], plain.model.body[1]
    assert not one.up.any() and other.up.any() and not torch.equal(one.down, other.down)
    x = STREAM[0].test["x"]
    torch.testing.assert_close(ours.model(x), plain.model(x), rtol=1e-4, atol=1e-5)
    product = (other.up @ other.down).detach().abs().flatten()
    chosen = keeper.keys[0]["body.1"]
    assert len(chosen) == int(0.02 * 1536)
    assert product[chosen].min() >= product[~torch.isin(torch.arange(1536), chosen)].max()


def test_strength_0_is_nothing_there():
    ours, plain = lived(SEFE(strength=0.0)), lived(None)
    for made in (ours, plain):
        made.all(list(STREAM)[:2], where=[LORA], epochs=1)
    assert same(ours.model, plain.model) and not ours.state.keepers[0].keys


def test_a_request_drops_positions_from_its_event_on():
    keeper = SEFE(strength=1.0)
    made = lived(keeper).all(list(STREAM)[:3], where=[LORA], epochs=1)
    first, everyone = copy.deepcopy(keeper.keys[0]), Ids()
    for task in list(STREAM)[:3]:
        everyone = everyone | task.train.ids
    assert keeper.derived() and keeper.holds(everyone) == everyone
    assert keeper.bytes() == sum(8 * len(t) for t in keeper.ids) + sum(8 * len(t["body.1"]) for t in keeper.keys)
    again = SEFE()
    again.load_state_dict(keeper.state_dict())
    made.forget(Ids([10**9]))
    assert len(keeper.keys) == 3
    made.forget(Ids(STREAM[1].train.id[:2]))
    assert len(keeper.keys) == len(keeper.ids) == 1 and same(keeper.keys[0], first)
    made.forget(Ids(STREAM[0].train.id[:2]))
    assert not keeper.keys and not keeper.bytes() and not keeper.derived() and len(again.keys) == 3


def test_without_adapters_it_is_refused():
    with pytest.raises(BadInput, match="lora"):
        lived(SEFE()).learn(STREAM[0])


PROBLEM = CausalLM(context=12)


def table(seed, number):
    """24 facts of its own keys."""
    data = facts(24, seed, keys=number, first_id=1000 * number)
    return Task(data, data, (), (), number)


def loss(model, task):
    batch = task.train.batch(torch.arange(len(task.train)))
    with torch.no_grad():
        return float(PROBLEM.loss(PROBLEM.forward(model, batch), batch))


def two_tables(seed):
    """A trained network learns a table by adapters, then another one: with the penalty, without, and without for a shorter time. Of each:
    the loss on the old table and on the new one, the mean change of a weight at key positions and elsewhere; first the new loss before."""
    settings = {"optimizer": "adamw", "batch_size": 12}
    where = [LoRA(rank=8, alpha=16.0)]
    made = Lived([], tiny(seed), seed=seed)
    made.problem = PROBLEM
    made.learn(table(10 + seed, 0), **settings, lr=3e-3, epochs=12)
    keeper = SEFE()
    made.state.keepers = [keeper]
    old, new = table(20 + seed, 1), table(30 + seed, 2)
    made.learn(old, where=where, **settings, lr=5e-3, epochs=25)
    found = [loss(made.model, new)]
    for penalty, epochs in ((True, 14), (False, 14), (False, 11)):
        one = copy.deepcopy(made)
        if not penalty:
            one.state.keepers[0].keys = []
        before = weights(one.model)
        one.learn(new, where=where, **settings, lr=3e-3, epochs=epochs)
        inside, outside = [], []
        for name, at in keeper.keys[0].items():
            change = (one.model.state_dict()[f"{name}.base.weight"] - before[f"{name}.base.weight"]).abs().flatten()
            inside.append(change[at])
            outside.append(change[~torch.isin(torch.arange(len(change)), at)])
        moved = [float(torch.cat(part).mean()) for part in (inside, outside)]
        found.append((loss(one.model, old), loss(one.model, new), *moved))
    return found


@pytest.mark.parametrize("seed", [1, *[pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3)]])
def test_less_of_an_old_table_is_forgotten(seed):
    """Measured, loss on the old and on the new table: 2.82 and 2.76, 3.01 and 2.81, 3.07 and 2.81 with; without 2.97 and 2.59, 3.16 and
    2.68, 3.44 and 2.62; in fewer epochs 2.92 and 2.72, 3.09 and 2.78, 3.21 and 2.77."""
    start, held, free, short = two_tables(seed)
    assert held[1] < start - 0.3 and held[0] < free[0] - 0.1
    assert held[0] < short[0] - 0.05 and held[1] < short[1] + 0.06
    assert held[2] < 0.1 * free[2] and held[3] > 0.5 * free[3]
