"""I-LoRA: the slow weights are the average it says, the loss is the naive one, and old tasks last longer than with replay alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from remanence.core.problem import CausalLM
from remanence.data import Task
from remanence.keep.i_lora import ILoRA, hidden_states
from remanence.models import mlp
from remanence.train.roles import Keeper
from remanence.where.lora import LoRA
from tests import lm
from tests.keep.lives import Lived, same, stream, weights

STREAM = stream()
TWO = list(STREAM)[:2]
MOMENTUM = {"optimizer": {"sgd": {"momentum": 0.9}}, "lr": 0.05, "epochs": 3}


class Watch(Keeper):
    """The fast weights after every batch; it comes after the keeper under test."""

    def after(self, u, batch):
        seen.append({name: p.detach().clone() for name, p in u.parameters.items()})


seen: list[dict] = []


@pytest.fixture(autouse=True)
def _empty():
    seen.clear()


def net(seed=0):
    return mlp(64, [16], seed=seed)


def fast(keeper):
    """Between events."""
    return keeper.other.values


@pytest.mark.parametrize("settings", [{}, {"accumulate": 3}], ids=["every batch", "every third batch"])
def test_the_slow_weights_are_the_average_of_the_fast_ones(settings):
    """Counted anew in each event, from the slow weights of the event before and the fast ones as they were."""
    keeper = ILoRA(a_max=0.8, capacity=0)
    lived, start = Lived([keeper, Watch()], mlp(64, [16], outputs=4)), None
    for task in TWO:
        start = start or weights(lived.model)
        seen.clear()
        lived.learn(task, epochs=2, **settings)
        every = settings.get("accumulate", 1)
        steps = seen[every - 1 :: every]
        assert len(steps) > 5
        slow = {name: value.double() for name, value in start.items()}
        for k, now in enumerate(steps, 1):
            a = min(1 - 1 / (k + 1), 0.8)
            slow = {name: a * value + (1 - a) * now[name] for name, value in slow.items()}
        for name, value in weights(lived.model).items():
            torch.testing.assert_close(value.double(), slow[name], rtol=0, atol=1e-6)
            assert not torch.equal(value, steps[-1][name])
        assert same(fast(keeper), seen[-1])
        start = weights(lived.model)


def test_the_fast_weights_train_as_if_nothing_were_there():
    """Without a buffer; over a head that grows, while what is served are other weights."""
    plain = Lived([], net()).all(TWO)
    keeper = ILoRA(a_max=0.9, capacity=0)
    lived = Lived([keeper], net()).all(TWO)
    assert same(fast(keeper), weights(plain.model)) and not same(lived.model, plain.model)
    assert keeper.bytes() == sum(p.nbytes for p in lived.model.parameters())


def test_without_slowness_it_is_replay_and_the_term_is_zero():
    """Slow weights that are the fast ones see the same hidden states: no distance and no gradient, whatever its weight."""
    lives = [
        Lived([ILoRA(a_max=0.0, gamma=gamma, capacity=40, compare=how)], mlp(64, [16], dropout=0.2)).all(TWO)
        for gamma, how in ((0.0, "above"), (5.0, "above"), (5.0, "symmetric"))
    ]
    assert all(same(lived.model, lives[0].model) for lived in lives)
    assert all(same(weights(lived.model), fast(lived.state.keepers[0])) for lived in lives)
    assert not same(lives[0].model, Lived([], mlp(64, [16], dropout=0.2)).all(TWO).model)


@pytest.mark.parametrize("count", [None, 7])
@pytest.mark.parametrize("how", ["above", "symmetric"])
def test_the_loss_and_its_gradient_are_the_naive_ones(how, count):
    keeper = ILoRA(gamma=3.0, capacity=40, batch_size=count, compare=how)
    lived = Lived([keeper], net()).all(TWO, epochs=1)
    u, quick, slow = lived.update(), copy.deepcopy(lived.model), copy.deepcopy(lived.model)
    quick.load_state_dict(fast(keeper))
    keeper.begin(u)
    assert same(lived.model, quick)
    new = u.mapped(STREAM[1].train).batch(torch.arange(20))
    new["origin"] = torch.zeros(20, dtype=torch.int64)
    batch = keeper.prepare(u, new)
    rows = {name: column[20:] for name, column in batch.items()}
    assert len(rows["id"]) == (count or 20) and (rows["origin"] == 1).all()
    total = u.owner.objective(u, batch) + keeper.loss(u, batch)
    h = quick.body(rows["x"])
    below = slow.body(rows["x"]).detach() - h
    distance = (below.clamp(min=0) if how == "above" else below).square().mean()
    assert distance > 0 and (below > 0).any() and (below < 0).any()
    losses = [F.cross_entropy(quick(b["x"]), b["y"]) for b in (new, rows)]
    naive = sum(losses) / 2 + 3.0 * distance
    torch.testing.assert_close(total, naive)
    closed = torch.where((below > 0) | (how == "symmetric"), -2 * below, 0).detach() / below.numel()
    truth = torch.autograd.grad(sum(losses) / 2 + 3.0 * (closed * h).sum(), list(quick.parameters()))
    torch.testing.assert_close(list(torch.autograd.grad(total, list(lived.model.parameters()))), list(truth))


def test_no_row_is_drawn_in_the_first_event_and_every_row_is_offered_once():
    class Count(Keeper):
        def loss(self, u, batch):
            seen.append(batch["origin"])

    keeper = ILoRA(capacity=30)
    lived = Lived([keeper, Count()], net())
    u = lived.learn(TWO[0])
    assert not any(bool(origin.any()) for origin in seen) and not u.consumed.replayed
    seen.clear()
    u = lived.learn(TWO[1])
    assert all(int((origin == 1).sum()) == min(30, int((origin == 0).sum())) for origin in seen)
    assert u.consumed.replayed and keeper.buffer.offered == len(TWO[0].train) + len(TWO[1].train)


def test_after_a_forget_nothing_is_left_but_the_weights_that_answer():
    keeper = ILoRA(capacity=50)
    lived = Lived([keeper], net()).all(TWO)
    gone = keeper.buffer.ids.sample(9, torch.Generator().manual_seed(0)) | TWO[1].train.ids
    assert keeper.holds(gone) == gone & lived.tasks[0].train.ids | TWO[1].train.ids
    served = weights(lived.model)
    lived.forget(gone)
    assert not keeper.holds(gone) and not fast(keeper) and same(lived.model, served)
    lived.learn(STREAM[2], lr=0.0, epochs=1)
    now = weights(lived.model)
    assert all(torch.equal(now[name][: len(value)], value) for name, value in served.items())


def test_with_adapters_only_these_and_the_head_are_held_twice():
    lived = Lived([ILoRA(capacity=20)], net())
    before = weights(lived.model)
    lived.learn(TWO[0], where=[LoRA(rank=2)])
    lived.learn(TWO[1], where=[LoRA(rank=2)])
    assert set(fast(lived.state.keepers[0])) == {"body.1.down", "body.1.up", "head.weight", "head.bias"}
    now = weights(lived.model)
    assert torch.equal(now["body.1.base.weight"], before["body.1.weight"]) and now["body.1.up"].any()
    assert not torch.equal(now["body.1.up"], fast(lived.state.keepers[0])["body.1.up"])


def text(u, count=6, seed=0, wide=lm.CONTEXT):
    """Rows of unequal length, targets of unequal number."""
    rows = lm.facts(count, seed).batch(torch.arange(count))
    rows["labels"][::2, 7:] = -100
    rows["labels"][1, :8] = -100
    rows["origin"] = torch.zeros(count, dtype=torch.int64)
    return {n: c[:, :wide] if c.dim() == 2 else c for n, c in rows.items()}


def test_hidden_states_of_a_language_model_are_those_that_transformers_gives():
    model = lm.tiny()
    ids = text(None)["input_ids"].long()
    with torch.no_grad(), hidden_states(model, ["model.layers.0", "model.layers.1"]) as states:
        wanted = model(input_ids=ids, output_hidden_states=True).hidden_states
    keeper = ILoRA()
    keeper.begin(Lived([], model).update(history=[lm.facts(4, 0)]))
    assert keeper._blocks == ["model.layers.0", "model.layers.1"] and list(states)[-1] == "lm_head"
    assert all(torch.equal(a, b) for a, b in zip(states.values(), wanted, strict=True))


@pytest.mark.parametrize("packing", [False, True])
def test_a_texts_padding_is_not_compared(packing):
    """The naive sum over tokens one by one, the same however wide the rows are padded."""
    lived = Lived([], lm.tiny())
    lived.problem = CausalLM(context=lm.CONTEXT, packing=packing)
    u, slow, keeper = lived.update(history=[lm.facts(4, 0)]), lm.tiny(1), ILoRA(gamma=2.0)
    keeper.begin(u)
    keeper.other.track(dict(slow.named_parameters()))
    found = []
    for wide in (9, lm.CONTEXT):
        keeper._drawn = text(u, wide=wide)
        found.append(keeper.loss(u, {}))
    torch.testing.assert_close(*found)
    rows, layers = text(u), [[], [], []]
    lengths = rows["attention_mask"].sum(1).tolist()
    for row, length in zip(rows["input_ids"], lengths, strict=True):
        h = [m(input_ids=row[None, :length].long(), output_hidden_states=True).hidden_states for m in (slow, u.model)]
        for layer, a, b in zip(layers, *h, strict=True):
            layer.append((a - b)[0].relu().square())
    naive = 2.0 * sum(torch.cat(layer).mean() for layer in layers) / 3
    torch.testing.assert_close(found[0], naive)


def test_new_and_old_texts_weigh_the_same_whatever_their_numbers_of_tokens():
    lived = Lived([], lm.tiny())
    lived.problem = CausalLM(context=lm.CONTEXT)
    u = lived.update(history=[lm.facts(4, 0)])
    keeper = ILoRA(gamma=0.0, capacity=5)
    new, old = text(u, 6, 1), text(u, 5, 2)
    old["id"] = old["id"] + 100
    u.parts = [keeper]
    keeper.buffer.add({n: c for n, c in old.items() if n != "origin"}, torch.Generator().manual_seed(0))
    keeper.begin(u)
    batch = keeper.prepare(u, new)
    total = u.owner.objective(u, batch)
    each = [u.problem.loss(u.problem.forward(u.model, rows), rows) for rows in (new, old)]
    torch.testing.assert_close(total, sum(each) / 2)


def forgetting(keep, seed):
    lived, first = Lived([keep], mlp(64, [64], seed=seed), seed=seed), []
    for number, task in enumerate(stream(seed)):
        lived.learn(task, **MOMENTUM)
        first.append(lived.accuracy(number))
    last = [lived.accuracy(number) for number in range(5)]
    return sum(a - b for a, b in zip(first[:-1], last[:-1], strict=True)) / 4, sum(last) / 5


@pytest.mark.fidelity(
    "keep/i-lora",
    check="naive average and loss; digits 5 x 2 class-incremental against replay with an equal reservoir of 50, five seeds",
    measured="forgetting 0.27 (a_max 0.9, gamma 10) against 0.40 with replay alone, accuracy 0.74 against 0.65; 0.40 with a_max 0.25",
    paper="up to 11 points over earlier methods on eight domains with Llama-2-7B",
    differs="digits and a small perceptron without adapters; with the code's a_max of 0.25 there is no gain here",
)
def test_old_tasks_last_longer_than_with_replay_alone():
    gains = []
    for seed in range(5):
        found = [
            forgetting(ILoRA(a_max=a_max, gamma=gamma, capacity=50), seed) for a_max, gamma in ((0.0, 0.0), (0.9, 10.0))
        ]
        gains.append((found[0][0] - found[1][0], found[1][1] - found[0][1]))
    assert all(less > 0.02 for less, _ in gains)
    assert sum(less for less, _ in gains) / 5 > 0.08 and sum(more for _, more in gains) / 5 > 0.05


@pytest.mark.slow
def test_old_facts_last_longer_than_with_replay_alone():
    """48 facts, then 48 others for 15 epochs, with a reservoir of 12; of old answers 0.39 to 0.41 are left with replay, 0.46 to 0.49 with
    slow weights. After 30 epochs training is at rest, slow is where fast is, and both have 0.43."""
    for seed in range(3):
        left = []
        for a_max, gamma in ((0.0, 0.0), (0.9, 10.0)):
            lived = Lived([ILoRA(a_max=a_max, gamma=gamma, capacity=12)], lm.tiny(seed), seed=seed)
            lived.problem, first = CausalLM(context=lm.CONTEXT), []
            for k, epochs in enumerate((30, 15)):
                data = lm.facts(48, 10 * seed + k, keys=10 * seed + k, first_id=1000 * k)
                lived.learn(Task(data, data, (), (), k), optimizer="adamw", lr=0.003, epochs=epochs, batch_size=16)
                first.append(lived.accuracy(k))
            assert min(first) > 0.9
            left.append(lived.accuracy(0))
        assert left[1] > left[0] + 0.03
