"""The checks of card nmc-pretrained, on raw digits and on a frozen random network."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.data import Task, cat
from remanence.learn.nmc import NMC
from remanence.models import identity, mlp
from remanence.nn.statistics import ClassStatistics
from tests.keep.lives import Lived, same, stream, weights

STREAM = stream()
SIDES = [("train", "x"), ("train", "y"), ("test", "x"), ("test", "y")]
ALL_X = torch.cat([task.train["x"] for task in STREAM])
ALL_Y = torch.cat([task.train["y"] for task in STREAM])


def nmc(model=None, **knobs):
    """A life of one learner on a frozen network; raw pixels where none is given."""
    return Lived(model=model or identity(64), learner=NMC(**knobs))


def means(lived):
    """The class means, labels ascending, whatever the order in which they came."""
    statistics, labels = lived.state.learner.statistics, lived.state.labels
    order = sorted(statistics.labels, key=lambda column: labels[column])
    return statistics.means(order)


def answers(lived, x):
    """Predicted labels."""
    c = lived.state.context(lived.problem)
    with c.aside():
        columns = lived.state.learner.predict(c, {"x": x}).logits.argmax(1)
    return torch.tensor(lived.state.labels)[columns]


def pooled(rows, number):
    """One task of the given rows of all training data."""
    some = cat([task.train for task in STREAM]).select(rows)
    return Task(some, some, tuple(int(y) for y in some["y"].unique()), (), number)


@pytest.mark.parametrize("seed", range(3))
def test_order_and_cut_of_the_stream_do_not_matter(seed):
    incremental = nmc().all(STREAM)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(ALL_Y), generator=g)
    other = nmc()
    for number, rows in enumerate(order.split(100 + 57 * seed)):
        other.learn(pooled(rows, number), batch_size=7 + 40 * seed, epochs=1 + seed)
    torch.testing.assert_close(means(other), means(incremental), rtol=1e-12, atol=1e-15)
    x = torch.cat([task.test["x"] for task in STREAM])
    assert torch.equal(answers(other, x), answers(incremental, x))


@pytest.mark.parametrize("normalise", [True, False])
def test_means_are_the_means_of_all_data(normalise):
    lived = nmc(normalise=normalise).all(STREAM)
    z = (F.normalize(ALL_X, dim=1) if normalise else ALL_X).double().numpy()
    wanted = np.stack([z[ALL_Y.numpy() == label].mean(0) for label in range(10)])
    np.testing.assert_allclose(means(lived).numpy(), wanted, rtol=1e-12, atol=1e-15)


def test_the_linear_form_is_the_nearest_mean():
    for metric in ("euclidean", "cosine"):
        lived = nmc(metric=metric).all(STREAM)
        mu = means(lived)
        mu = F.normalize(mu, dim=1) if metric == "cosine" else mu
        x = torch.cat([task.test["x"] for task in STREAM])
        nearest = torch.cdist(F.normalize(x, dim=1).double(), mu).argmin(1)
        assert torch.equal(answers(lived, x), nearest)


@pytest.mark.fidelity(
    "learn/nmc",
    check="scikit-learn's NearestCentroid on normalised raw digits, class-incremental 5 x 2, eight splits",
    measured="the same answers; accuracy 0.908 (0.900 to 0.931)",
    paper="0.90 +- 0.01 on digits; 88.5 % on split CIFAR-100 with ViT-B/16",
    differs="raw pixels for features: no pretrained backbone was run",
)
def test_digits_like_scikit_learn():
    from sklearn.neighbors import NearestCentroid

    found = []
    for seed in range(8):
        tasks = stream(seed)
        lived = nmc().all(tasks, epochs=1)
        x, y, test, truth = (torch.cat([getattr(t, side)[name] for t in tasks]) for side, name in SIDES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pixels that are always 0
            theirs = NearestCentroid().fit(F.normalize(x, dim=1).double().numpy(), y.numpy())
            wanted = torch.from_numpy(theirs.predict(F.normalize(test, dim=1).double().numpy()))
        assert torch.equal(answers(lived, test), wanted)
        found.append(float((wanted == truth).float().mean()))
    assert abs(sum(found) / 8 - 0.90) < 0.01


def test_deletion_equals_never_having_seen_it():
    gone = STREAM[1].train.ids.sample(20, torch.Generator().manual_seed(1)) | Ids([int(STREAM[0].train.id[3])])
    model = mlp(64, [32], 0, norm=True, seed=4)
    lived = nmc(model).all(STREAM)
    held = lived.state.learner.holds(gone)
    never = nmc(mlp(64, [32], 0, norm=True, seed=4))
    for task in STREAM:
        never.learn(Task(task.train.without(gone), task.test, task.classes, task.names, task.id))
    lived.forget(gone)
    assert held == gone and not lived.state.learner.holds(gone)
    assert float((means(lived) - means(never)).abs().max()) < 1e-10
    assert lived.state.learner.statistics.counts().tolist() == never.state.learner.statistics.counts().tolist()


def test_a_purged_class_is_gone_before_anything_is_rebuilt():
    """`purge` alone leaves no sum that counts a deleted row; a class of which all rows go is never answered again."""
    lived = nmc().all(STREAM)
    three = STREAM[1].train.ids & Ids(STREAM[1].train.id[STREAM[1].train["y"] == 3])
    lived.state.learner.purge(three)
    assert not lived.state.learner.holds(STREAM[1].train.ids) & three
    lived.forget(three)
    assert 3 not in [lived.state.labels[c] for c in lived.state.learner.statistics.labels]
    assert (answers(lived, STREAM[1].test["x"]) != 3).all()


def test_add_then_remove_is_never_having_added():
    z, y, ids = F.normalize(ALL_X, dim=1), ALL_Y, torch.arange(len(ALL_Y))
    some, rest = ids[::7], torch.ones(len(ids), dtype=torch.bool)
    rest[some] = False
    one, two = ClassStatistics(64), ClassStatistics()
    one.add(z, y, ids)
    one.remove(z[some], y[some], ids[some])
    two.add(z[rest], y[rest], ids[rest])
    assert float((one.means(range(10)) - two.means(range(10))).abs().max()) < 1e-10


def test_nothing_is_trained_and_the_features_are_those_of_eval_mode():
    model = mlp(64, [32], 0, norm=True, dropout=0.5, seed=2)
    before = weights(model)
    lived = nmc(model).all([STREAM[0], STREAM[1]])
    assert same(lived.model, before)
    z = F.normalize(model.eval().body(STREAM[0].train["x"]), dim=1).double()
    wanted = torch.stack([z[STREAM[0].train["y"] == label].mean(0) for label in (0, 1)])
    torch.testing.assert_close(means(lived)[:2], wanted.detach(), rtol=1e-6, atol=1e-8)


def test_state_survives_into_a_fresh_learner_and_back_to_empty():
    empty = NMC().state_dict()
    lived = nmc().all(STREAM)
    fresh = NMC()
    fresh.load_state_dict(lived.state.learner.state_dict())
    assert torch.equal(fresh.statistics.means(), lived.state.learner.statistics.means())
    assert fresh.statistics.ids == lived.state.learner.statistics.ids and fresh.bytes() == lived.state.learner.bytes()
    again = nmc()
    again.state.learner, again.state.labels, again.tasks = fresh, list(range(10)), list(STREAM)
    assert again.accuracy() == lived.accuracy()
    fresh.load_state_dict(empty)
    assert fresh.statistics.labels == [] and fresh.bytes() == 0 and fresh.statistics.dim == 0
    other = NMC()
    other.load_state_dict(fresh.state_dict())
    assert other.statistics.labels == []
    fresh.statistics.add(torch.ones(2, 5), torch.tensor([1, 1]), torch.arange(2))  # a state without rows fixes no size
    assert fresh.statistics.dim == 5


def test_statistics_of_a_stated_size_take_no_other():
    state = ClassStatistics(4).state_dict()
    with pytest.raises(BadInput, match="dim 4"):
        ClassStatistics(5).load_state_dict(state)
    with pytest.raises(BadInput, match="at least 1"):
        ClassStatistics(0)
    known = ClassStatistics(second_order=True)
    known.add(torch.ones(1, 3), torch.tensor([0]))
    assert known.outer().shape == (1, 3, 3)
    with pytest.raises(BadInput, match=r"\(B, 3\)"):
        known.add(torch.ones(1, 4), torch.tensor([0]))


def test_before_anything_is_learned_no_class_is_answered():
    lived = nmc()
    c = lived.state.context(lived.problem)
    assert lived.state.learner.predict(c, {"x": ALL_X[:3]}).logits.shape == (3, 0)


def test_wrong_knobs():
    with pytest.raises(BadInput, match="euclidean"):
        NMC(metric="euclid")
