"""The checks of card acu on the learner: a ridge head that knows neither the order nor the cut of its stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from remanence.core.errors import BadInput
from remanence.core.ids import Ids
from remanence.data import Task, cat
from remanence.learn.acu import ACU
from remanence.learn.nmc import NMC
from remanence.models import identity, mlp
from tests.forget.helpers import SEEDS
from tests.keep.lives import Lived, same, stream, weights

STREAM = list(stream())
ALL = cat([task.train for task in STREAM])


def acu(model=None, seed=0, **knobs):
    """A life of one learner on a frozen network; raw pixels where none is given."""
    return Lived(model=model or identity(64), learner=ACU(**{"width": 200, **knobs}), seed=seed)


def head(lived):
    """W with its columns by label, whatever the order in which they came."""
    ridge, labels = lived.state.learner.ridge, lived.state.labels
    order = sorted(range(len(ridge.labels)), key=lambda at: labels[ridge.labels[at]])
    return ridge.weights()[:, order]


def answers(lived, x):
    """Predicted labels."""
    c = lived.state.context(lived.problem)
    with c.aside():
        columns = lived.state.learner.predict(c, {"x": x}).logits.argmax(1)
    return torch.tensor(lived.state.labels)[columns]


def pooled(rows, number):
    """One task of the given rows of all training data."""
    some = ALL.select(rows)
    return Task(some, some, tuple(int(y) for y in some["y"].unique()), (), number)


@pytest.mark.parametrize("seed", range(3))
def test_order_and_cut_of_the_stream_do_not_matter(seed):
    model = mlp(64, [32], 0, norm=True, dropout=0.5, seed=4)
    incremental = acu(model).all(STREAM)
    order = torch.randperm(len(ALL), generator=torch.Generator().manual_seed(seed))
    other = acu(model)
    for number, rows in enumerate(order.split(100 + 57 * seed)):
        other.learn(pooled(rows, number), batch_size=3 + 40 * seed, epochs=1 + seed)
    assert float((head(other) - head(incremental)).abs().max()) < 1e-9
    x = torch.cat([task.test["x"] for task in STREAM])
    assert torch.equal(answers(other, x), answers(incremental, x))


def test_without_an_expansion_it_is_the_closed_form_on_the_features():
    lived = acu(width=0, gamma=0.5).all(STREAM)
    phi, hot = ALL["x"].double().numpy(), np.eye(10)[ALL["y"].numpy()]
    wanted = np.linalg.solve(phi.T @ phi + 0.5 * np.eye(64), phi.T @ hot)
    np.testing.assert_allclose(head(lived).numpy(), wanted, rtol=0, atol=1e-10)
    c = lived.state.context(lived.problem)
    order = [lived.state.labels.index(label) for label in range(10)]
    scores = lived.state.learner.predict(c, {"x": ALL["x"]}).logits[:, order]
    np.testing.assert_allclose(scores.numpy(), phi @ wanted, rtol=0, atol=1e-5)


def test_the_expansion_is_half_open_and_of_the_size_of_the_features():
    lived = acu(width=4000).all([STREAM[0]])
    x = STREAM[0].train["x"][:50]
    phi = lived.state.learner._phi(lived.state.context(lived.problem), x)
    assert phi.shape == (50, 4000) and phi.min() == 0 and 0.4 < float((phi > 0).double().mean()) < 0.6
    # E relu(v.z)^2 = |z|^2 / 2 times the variance 1 / 64
    torch.testing.assert_close(phi.square().mean(1), x.double().square().sum(1) / 128, rtol=0.2, atol=0)


@pytest.mark.fidelity(
    "learn/acu",
    check="numpy's ridge solution without the expansion; any order, cut and batch size; class-incremental 5 x 2 digits beside nmc, three seeds",
    measured="equal to 1e-10; held-out accuracy 0.987 to 0.996 on pixels where nmc has 0.91 to 0.93",
    paper="- (only the abstract was read)",
    differs="sums are kept in place of R; gamma, width and the law of the random layer are ours",
)
@pytest.mark.parametrize("seed", SEEDS)
def test_digits_class_incremental(seed):
    """Raw pixels and a network with random weights: better than class means by 5 points or more."""
    for model in (identity(64), mlp(64, [64], seed=seed)):
        mine = acu(model, seed, width=1000).all(stream(seed), epochs=1).accuracy()
        means = Lived(model=model, learner=NMC(), seed=seed).all(stream(seed), epochs=1).accuracy()
        assert mine > 0.94 and mine > means + 0.05


def test_recounting_equals_never_having_seen_it():
    gone = STREAM[1].train.ids.sample(20, torch.Generator().manual_seed(1)) | Ids([int(STREAM[0].train.id[3])])
    lived = acu(mlp(64, [32], 0, norm=True, seed=4)).all(STREAM)
    never = acu(mlp(64, [32], 0, norm=True, seed=4))
    for task in STREAM:
        never.learn(Task(task.train.without(gone), task.test, task.classes, task.names, task.id))
    assert lived.state.learner.holds(gone) == gone
    lived.state.learner.purge(gone)
    assert lived.state.learner.holds(gone) == gone, "purge must leave the sums to unlearn or forgot"
    lived.forget(gone)
    assert not lived.state.learner.holds(gone)
    assert float((head(lived) - head(never)).abs().max()) < 1e-8
    assert lived.state.learner.ridge.counts() == never.state.learner.ridge.counts()


def test_a_class_without_rows_is_never_answered():
    three = Ids(ALL.id[ALL["y"] == 3])
    lived = acu().all(STREAM)
    lived.forget(three)
    x = STREAM[1].test["x"]
    c = lived.state.context(lived.problem)
    logits = lived.state.learner.predict(c, {"x": x}).logits
    column = lived.state.labels.index(3)
    assert (logits[:, column] == -torch.inf).all() and torch.isfinite(logits).sum() == 9 * len(x)


def test_nothing_is_trained():
    model = mlp(64, [32], 0, norm=True, dropout=0.5, seed=2)
    before = weights(model)
    lived = acu(model).all(STREAM[:2])
    assert same(lived.model, before) and lived.state.steps == 0


def test_the_random_layer_belongs_to_the_life_and_not_to_its_events():
    whole, late, other = acu().all(STREAM), acu().all(STREAM[1:]), acu(seed=1).all(STREAM)
    draws = [lived.state.learner.draw for lived in (whole, late, other)]
    assert draws[0] == draws[1] != draws[2]
    whole.forget(STREAM[0].train.ids)
    assert float((head(whole) - head(late)).abs().max()) < 1e-8


def test_the_layer_is_drawn_again_and_not_saved():
    lived = acu(width=300).all(STREAM)
    assert not [name for name in vars(lived.state.learner) if name.startswith("_")]
    assert lived.updates[0].extra_bytes == 64 * 300 * 8
    assert lived.state.learner.bytes() == 8 * (300 * 300 + 300 * 10 + len(ALL))
    fresh = ACU(width=300)
    fresh.load_state_dict(lived.state.learner.state_dict())
    again = acu()
    again.state.learner, again.state.labels, again.tasks = fresh, lived.state.labels, list(STREAM)
    assert torch.equal(answers(again, ALL["x"]), answers(lived, ALL["x"]))
    fresh.load_state_dict(ACU(width=300).state_dict())
    assert fresh.bytes() == 0 and not fresh.ridge.labels


def test_a_network_that_was_trained_in_between_is_refused():
    lived = acu(mlp(64, [32], seed=1)).all(STREAM[:2])
    with torch.no_grad():
        lived.model.head.weight += 1  # no feature depends on it
    lived.learn(STREAM[2])
    with torch.no_grad():
        next(lived.model.parameters())[0, 0] += 1
    with pytest.raises(BadInput, match="backbone that no event trains"):
        lived.learn(STREAM[3])


def test_before_anything_is_learned_no_class_is_answered():
    lived = acu()
    c = lived.state.context(lived.problem)
    assert lived.state.learner.predict(c, {"x": ALL["x"][:3]}).logits.shape == (3, 0)


def test_wrong_knobs():
    with pytest.raises(BadInput, match="gamma"):
        ACU(gamma=0.0)
    with pytest.raises(BadInput, match="width"):
        ACU(width=-1)
