"""Sharded training: against a loop by hand, bit for bit against shards that never had the data, and on digits."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.core.rng import generator, seed_of
from remanence.data import Task, cat
from remanence.keep.l2 import L2
from remanence.learn.base import SILENT, pooled, widened
from remanence.learn.finetune import Finetune
from remanence.learn.sisa import SISA
from remanence.models import cnn, mlp
from remanence.nn.shards import place
from tests.forget.helpers import SEEDS, split
from tests.keep.lives import Lived, stream

QUICK = {"epochs": 3, "batch_size": 16, "optimizer": "adamw", "lr": 5e-3}
TRAIN, TEST = split()


def sisa(model=None, seed=0, **knobs):
    model = mlp(64, [16], dropout=0.1, seed=seed) if model is None else model
    return Lived(model=model, learner=SISA(**{"shards": 3, "slices": 2, **knobs}), seed=seed)


def without(task, ids):
    return Task(task.train.without(ids), task.test, task.classes, task.names, task.id)


def equal(a, b):
    """Every saved tensor equal bit for bit: for two lives, or two shards."""
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in zip(a, b, strict=True)
    )


def everything(tasks):
    return Ids(torch.cat([task.train.id for task in tasks]))


def part_of(tasks, learner, shard, part, seed=0):
    """The ids of one slice of one shard, over all tasks, worked out anew."""
    cells = place(everything(tasks), learner.shards * learner.slices, seed_of(seed, "shards"))
    return cells[shard * learner.slices + part]


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cumulative", [True, False])
def test_against_a_loop_by_hand(cumulative):
    """Two shards, two slices, two tasks: plain SGD on sorted rows, orders drawn by address."""
    tasks = [stream()[0], stream()[1]]
    lived = sisa(model=mlp(64, [8], 4), shards=2, cumulative=cumulative)
    lived.all(tasks, epochs=6, batch_size=32, optimizer="sgd", lr=0.1)
    epochs = [4, 4] if cumulative else [6, 6]  # 2 * 6 / (2 + 1) each
    y_of = {int(i): lived.state.labels.index(int(y)) for t in tasks for i, y in zip(t.train.id, t.train["y"], strict=True)}  # fmt: skip
    x_of = {int(i): x for t in tasks for i, x in zip(t.train.id, t.train["x"], strict=True)}
    for shard in range(2):
        model, seen = mlp(64, [8], 4), Ids()
        for event, task in enumerate(tasks):
            for part in range(2):
                new = part_of([task], lived.state.learner, shard, part)
                seen = seen | new if cumulative else new
                ids = seen.array.tolist()
                x, y = torch.stack([x_of[i] for i in ids]), torch.tensor([y_of[i] for i in ids])
                for epoch in range(epochs[part]):
                    rng = generator(0, f"learn/{event}", f"sisa/{shard}/{part}/1", "order", epoch)
                    for rows in torch.randperm(len(ids), generator=rng).split(32):
                        model.zero_grad()
                        logits = model(x[rows])[:, : 2 * (event + 1)]
                        F.cross_entropy(logits, y[rows]).backward()
                        with torch.no_grad():
                            for p in model.parameters():
                                p -= 0.1 * p.grad
                saved = lived.state.learner.saved[shard][2 * event + part]
                for name, value in model.state_dict().items():
                    torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("epochs", "slices"), [(20, 4), (7, 3), (3, 1), (100, 9)])
def test_a_shard_costs_as_much_as_its_epochs_at_once(epochs, slices):
    """sum_j e_j j / R = epochs, but for whole numbers: each slice is off by less than one epoch."""
    lived = sisa(shards=1, slices=slices)
    lived.state.learner.events = [{"settings": {"epochs": epochs}}]
    found = [lived.state.learner._epochs(0, part) for part in range(slices)]
    assert sum(found) == 2 * epochs * slices // (slices + 1)
    assert all(abs(e - 2 * epochs / (slices + 1)) < 1 for e in found)
    assert sum(e * (j + 1) / slices for j, e in enumerate(found)) == pytest.approx(epochs, abs=1)


def test_every_slice_has_an_epoch_unless_there_are_none():
    lived = sisa(slices=5)
    for epochs, wanted in ((1, 1), (0, 0)):
        lived.state.learner.events = [{"settings": {"epochs": epochs}}]
        assert [lived.state.learner._epochs(0, part) for part in range(5)] == [wanted] * 5


def test_the_answer_is_the_mean_or_the_vote():
    p = torch.tensor([[[0.6, 0.4, 0.0]], [[0.45, 0.55, 0.0]], [[0.1, 0.2, 0.7]], [[0.51, 0.49, 0.0]]])
    torch.testing.assert_close(pooled(p, "mean"), torch.tensor([[0.415, 0.41, 0.175]]))
    torch.testing.assert_close(pooled(p, "vote"), torch.tensor([[2.415, 1.41, 1.175]]) / 5)
    assert pooled(p[1:], "vote").argmax() == pooled(p[1:], "mean").argmax() == 1  # a tie
    lived = sisa().all([stream()[0], stream()[1]], **QUICK)
    learner, x, c = lived.state.learner, stream()[1].test["x"], lived.state.context(lived.problem)
    with c.aside():
        found = learner.predict(c, {"x": x, "id": torch.arange(len(x))}).logits
        said = [functional_call(lived.model, saved[-1], (x,)).softmax(1) for saved in learner.saved]
    torch.testing.assert_close(found, torch.stack(said).mean(0).log().clamp(min=SILENT))


def test_columns_are_barred_or_cut():
    logits = torch.tensor([[1.0, 2.0]])
    assert torch.equal(widened(logits, 3), torch.tensor([[1.0, 2.0, -torch.inf]])) and widened(logits, 1).shape == (
        1,
        1,
    )


def test_slices_have_every_example_once_and_the_network_stays():
    lived = sisa()
    born = {name: value.clone() for name, value in lived.model.state_dict().items()}
    tasks = [stream()[0], stream()[1]]
    lived.all(tasks, **QUICK)
    learner = lived.state.learner
    assert all(torch.equal(value, born[name]) for name, value in lived.model.state_dict().items())
    assert sum(map(len, learner.book.cells)) == len(everything(tasks)) and len(learner.book.cells) == 12
    assert learner.holds(Ids([10**9]) | everything(tasks)) == everything(tasks)
    u = lived.updates[1]
    assert u.consumed.new == tasks[1].train.ids and u.consumed.replayed == tasks[0].train.ids


# -- exactness ---------------------------------------------------------------------------------------------------------


@lru_cache
def full():
    return sisa().all([stream()[0], stream()[1]], **QUICK)


@pytest.mark.parametrize("kind", ["some of all", "one", "a whole slice", "a whole shard"])
@pytest.mark.parametrize("cumulative", [True, False])
def test_unlearned_shards_equal_in_bits_shards_that_never_had_them(kind, cumulative):
    tasks = [stream()[0], stream()[1]]
    lived = sisa(cumulative=cumulative).all(tasks, **QUICK)
    learner = lived.state.learner
    gone = {
        "some of all": Ids(everything(tasks).array[::17]),
        "one": Ids(tasks[1].train.id[:1]),
        "a whole slice": part_of(tasks, learner, 1, 1),
        "a whole shard": part_of(tasks, learner, 1, 0) | part_of(tasks, learner, 1, 1),
    }[kind]
    before = [[dict(saved) for saved in shard] for shard in learner.saved]
    lived.forget(gone)
    never = sisa(cumulative=cumulative).all([without(task, gone) for task in tasks], **QUICK)
    assert all(map(equal, learner.saved, never.state.learner.saved))
    assert learner.book.cells == never.state.learner.book.cells and not learner.holds(gone)
    moved = [not equal(a, b) for a, b in zip(before, learner.saved, strict=True)]
    assert moved == [bool(gone & (part_of(tasks, learner, k, 0) | part_of(tasks, learner, k, 1))) for k in range(3)]
    for a, b in zip(before, learner.saved, strict=True):  # rolled back no further than needed
        for old, new in zip(a, b, strict=True):
            if all(torch.equal(old[n], new[n]) for n in old):
                assert all(old[n] is new[n] for n in old)
    x = tasks[0].test["x"]
    for one in (lived, never):
        c = one.state.context(one.problem)
        with c.aside():
            one.said = one.state.learner.predict(c, {"x": x, "id": torch.arange(len(x))}).logits
    assert torch.equal(lived.said, never.said)
    assert len(learner.answers(lived.state.context(lived.problem), {"x": x})[0]) == 3 - (kind == "a whole shard")


def test_forgetting_between_events_and_twice():
    tasks, gone = list(stream())[:3], Ids(everything(list(stream())[:2]).array[::23])
    first, second = Ids(gone.array[::2]), Ids(gone.array[1::2])
    lived = sisa()
    lived.learn(tasks[0], **QUICK)
    lived.forget(first)
    lived.tasks = [without(task, first) for task in lived.tasks]
    lived.learn(without(tasks[1], first), **QUICK)
    lived.forget(second)
    lived.tasks = [without(task, second) for task in lived.tasks]
    lived.learn(tasks[2], **QUICK)
    never = sisa().all([without(task, gone) for task in tasks], **QUICK)
    assert all(map(equal, lived.state.learner.saved, never.state.learner.saved))


def test_a_convolutional_network_with_running_statistics():
    def small(task):
        return Task(*(e.replace(x=e["x"].reshape(-1, 1, 8, 8)) for e in (task.train, task.test)), task.classes, task.names, task.id)  # fmt: skip

    tasks = [small(stream()[0]), small(stream()[1])]
    gone = Ids(everything(tasks).array[::29])
    lived = sisa(model=cnn((1, 8, 8), [4]), shards=2).all(tasks, **QUICK)
    lived.forget(gone)
    never = sisa(model=cnn((1, 8, 8), [4]), shards=2).all([without(task, gone) for task in tasks], **QUICK)
    assert all(map(equal, lived.state.learner.saved, never.state.learner.saved))
    assert any("running_mean" in name for name in lived.state.learner.saved[0][0])


def test_the_same_examples_in_two_events_are_one_example():
    task, gone = stream()[0], Ids(stream()[0].train.id[:3])
    turned = Task(task.train.select(torch.arange(len(task.train)).flip(0)), task.test, task.classes, task.names, 1)
    lived = sisa().all([task, turned], **QUICK)
    lived.forget(gone)
    never = sisa().all([without(task, gone), without(turned, gone)], **QUICK)
    assert all(map(equal, lived.state.learner.saved, never.state.learner.saved))


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_keepers_and_wheres_are_refused():
    lived = Lived(model=mlp(64, [8]), learner=SISA(), keep=[L2(strength=0.1)])
    with pytest.raises(BadInput, match="l2 cannot act"):
        lived.learn(stream()[0], **QUICK)
    Lived(model=mlp(64, [8]), learner=SISA(), keep=[L2(strength=0)]).learn(stream()[0], **QUICK)


def test_a_network_that_another_learner_moved_is_refused():
    lived = sisa()
    lived.learn(stream()[0], **QUICK)
    with torch.no_grad():
        lived.model.body[1].bias[0] += 1
    with pytest.raises(BadInput, match="has been moved"):
        lived.learn(stream()[1], **QUICK)
    with pytest.raises(BadInput, match="by='retrain'"):
        lived.forget(Ids(stream()[0].train.id[:1]))


def test_data_out_of_reach_is_refused_before_anything_moves():
    lived = sisa().all([stream()[0], stream()[1]], **QUICK)
    before = [list(shard) for shard in lived.state.learner.saved]
    with pytest.raises(BadInput, match="cannot be reached"):
        lived.state.learner.unlearn(lived.update("forget", [stream()[1].train]), Ids(stream()[0].train.id[:1]))
    assert all(map(equal, before, lived.state.learner.saved))


# -- purpose -----------------------------------------------------------------------------------------------------------


@pytest.mark.fidelity(
    "learn/sisa",
    check="a loop by hand; shards after unlearning against shards that never had the data, in bits; digits, three seeds",
    measured="5 shards of 4 slices: 0.946 to 0.958 held out (plain training 0.982); a single shard 0.929 to 0.944 on average; five tasks: 0.964 (joint 0.982 to 0.987)",
    paper="accuracy falls with the number of shards, slowly up to 20 on simple tasks",
    differs="hash placement, several events, fresh optimizer for each slice, ties of a vote",
)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_ensemble_beats_its_shards_and_stays_near_plain_training(seed):
    task = Task(TRAIN, TEST, tuple(range(10)), tuple(map(str, range(10))), 0)
    settings = {"epochs": 20, "batch_size": 32, "optimizer": "adamw", "lr": 2e-3}
    lived = Lived(model=mlp(64, [64], seed=seed), learner=SISA(), seed=seed)
    lived.learn(task, **settings)
    plain = Lived(model=mlp(64, [64], seed=seed), learner=Finetune(), seed=seed)
    plain.learn(task, **settings)
    with torch.no_grad():
        said = [functional_call(lived.model, saved[-1], (TEST["x"],)) for saved in lived.state.learner.saved]
    alone = [float((logits.argmax(1) == TEST["y"]).float().mean()) for logits in said]
    assert lived.accuracy() > sum(alone) / 5 + 0.008
    assert plain.accuracy() - 0.06 < lived.accuracy() < plain.accuracy()


def test_old_slices_keep_old_classes():
    """Three tasks of two digits: on all slices so far, against on the new slice alone."""
    found = {}
    for cumulative in (True, False):
        lived = sisa(model=mlp(64, [32]), cumulative=cumulative).all(list(stream())[:3], **{**QUICK, "epochs": 6})
        found[cumulative] = lived.accuracy()
    assert found[True] > 0.9 and found[False] < 0.6


def test_saving_and_loading():
    lived, again = full(), SISA(shards=3, slices=2)
    again.load_state_dict(lived.state.learner.state_dict())
    assert again.spec() == lived.state.learner.spec() and again.bytes() == lived.state.learner.bytes()
    assert again.book.cells == lived.state.learner.book.cells
    assert all(map(equal, again.saved, lived.state.learner.saved))
    bytes_of_one = sum(value.nbytes for value in lived.state.learner.saved[0][-1].values())
    assert again.bytes() > 6 * bytes_of_one  # three shards, two slices, two events, the first of them with fewer rows
    assert len(cat([task.train for task in lived.tasks])) * 8 == again.book.bytes()
